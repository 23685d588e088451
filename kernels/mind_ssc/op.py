"""The registration of `mind_ssc` with torch: one custom op and its fake. It has no gradient."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .. import memory
from . import native, triton
from .reference import CHANNELS


def module_of(backend: str) -> ModuleType:
    """The module of a backend with kernels: `mind_ssc`, `refuses`."""
    return {"native": native, "triton": triton}[backend]


@torch.library.custom_op("dropgen_fast::mind_ssc", mutates_args=())
def forward_op(image: Tensor, radius: int, dilation: int, dtype: torch.dtype, backend: str) -> Tensor:
    """(N, 1, D, H, W) → (N, 12, D, H, W); the arguments are those of the public `mind_ssc`."""
    # The op may be called with anything: by an exported graph on another device.
    if reason := module_of(backend).refuses(image, radius, dilation):
        raise RuntimeError(f"backend {backend!r} cannot take this call: {reason}")
    shape = (image.shape[0], CHANNELS, *image.shape[2:])
    out = memory.empty(shape, dtype) if image.device.type == "cpu" else torch.empty(shape, dtype=dtype, device=image.device)
    module_of(backend).mind_ssc(image.contiguous(), out, radius=radius, dilation=dilation)
    return out


@forward_op.register_fake
def _(image: Tensor, radius: int, dilation: int, dtype: torch.dtype, backend: str) -> Tensor:
    return torch.empty((image.shape[0], CHANNELS, *image.shape[2:]), dtype=dtype, device=image.device)


def forward(image: Tensor, radius: int, dilation: int, dtype: torch.dtype, backend: str) -> Tensor:
    """`forward_op`."""
    out: Tensor = forward_op(image, radius, dilation, dtype, backend)
    return out
