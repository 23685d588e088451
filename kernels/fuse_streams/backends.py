"""The backends of `fuse_streams`: which there are, what each can take, and which one takes a call."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import native, triton

BACKENDS = ("auto", "native", "triton", "reference")
IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int16, torch.uint8)
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def available_backends() -> dict[str, str]:
    """Each backend's name and "" where it can be had here, else the reason why not."""
    return {"native": native.MISSING, "triton": triton.MISSING, "reference": ""}


def choose(backend: str, image: Tensor, features: Tensor | None) -> str:
    """The backend for this call; an explicit request that cannot be met raises with the reason."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    tensors = [image] if features is None else [image, features]
    if backend == "reference":
        return backend
    reasons = {name: module.MISSING or module.refuses(tensors)
               for name, module in (("triton", triton), ("native", native))}
    if backend == "auto":
        # The fast kernels hold int32 coordinates, float32 statistics; what they refuse the definition takes.
        first = "triton" if image.is_cuda else "native"
        if not reasons[first]:
            return first
        check_dtypes(image, features)
        return "reference"
    if reasons[backend]:
        fits = [name for name, why in reasons.items() if not why]
        raise RuntimeError(f"backend {backend!r} cannot take this call: {reasons[backend]}; "
                           f"what can: {', '.join([*fits, 'reference'])}")
    return backend


def check_dtypes(image: Tensor, features: Tensor | None) -> None:
    if image.dtype not in IMAGE_DTYPES:
        raise ValueError(f"image must be one of {names(IMAGE_DTYPES)}, got {image.dtype}")
    if features is not None and features.dtype not in FLOAT_DTYPES:
        raise ValueError(f"features must be one of {names(FLOAT_DTYPES)}, got {features.dtype}")


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def module_of(backend: str) -> ModuleType:
    """The module of a backend with kernels: `forward`, `backward`, `refuses`."""
    return {"native": native, "triton": triton}[backend]
