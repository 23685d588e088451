"""The registration of `dice_cross_entropy` with torch: two custom ops, their fakes, the gradient that ties them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import memory
from . import native, triton

COEFFICIENTS = 2
"""Of each sample and class: what the gradient of its sums adds to p's of a voxel of that class, and to any voxel's."""


def module_of(backend: str) -> ModuleType:
    """The module of a backend with kernels: `forward`, `backward`, `refuses`."""
    return {"native": native, "triton": triton}[backend]


def _layout(scores: Tensor) -> torch.memory_format:
    """In which the gradient is laid out: the scores' own."""
    last = not scores.is_contiguous() and scores.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.channels_last_3d if last else torch.contiguous_format


def _dense(scores: Tensor, label: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """As kernels read them. The op may be called with anything: by an exported graph on another device."""
    if reason := module_of(backend).refuses(scores):
        raise RuntimeError(f"backend {backend!r} cannot take this call: {reason}")
    return scores.contiguous(memory_format=_layout(scores)), label.contiguous()


def _results(scores: Tensor) -> tuple[Tensor, Tensor]:
    return (torch.empty((), dtype=torch.float32, device=scores.device),
            torch.empty((scores.shape[0], scores.shape[1], COEFFICIENTS), dtype=torch.float32, device=scores.device))


@torch.library.custom_op("dropgen_fast::dice_ce", mutates_args=())
def forward_op(scores: Tensor, label: Tensor, include_background: bool, backend: str) -> tuple[Tensor, Tensor]:
    """The loss () and what the gradient needs of the sums, (N, C, 2), both float32."""
    dense, label = _dense(scores, label, backend)
    loss, coefficients = _results(scores)
    module_of(backend).forward(dense, label, loss, coefficients, include_background=include_background)
    return loss, coefficients


@forward_op.register_fake
def _(scores: Tensor, label: Tensor, include_background: bool, backend: str) -> tuple[Tensor, Tensor]:
    return _results(scores)


@torch.library.custom_op("dropgen_fast::dice_ce_backward", mutates_args=())
def backward_op(grad: Tensor, scores: Tensor, label: Tensor, coefficients: Tensor, backend: str) -> Tensor:
    """The gradient to the scores, in their type and layout."""
    dense, label = _dense(scores, label, backend)
    shape, layout = tuple(scores.shape), _layout(scores)
    if scores.device.type == "cpu":
        grad_scores = memory.empty(shape, scores.dtype, layout)
    else:
        grad_scores = torch.empty(shape, dtype=scores.dtype, device=scores.device, memory_format=layout)
    module_of(backend).backward(grad.contiguous(), dense, label, coefficients.contiguous(), grad_scores)
    return grad_scores


@backward_op.register_fake
def _(grad: Tensor, scores: Tensor, label: Tensor, coefficients: Tensor, backend: str) -> Tensor:
    return torch.empty(scores.shape, dtype=scores.dtype, device=scores.device, memory_format=_layout(scores))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scores, label, _, ctx.backend = inputs
    ctx.save_for_backward(scores, label, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _coefficients: Tensor | None) -> tuple[Tensor | None, None, None, None]:
    if grad is None:
        return None, None, None, None
    scores, label, coefficients = ctx.saved_tensors
    return DiceCeBackward.apply(grad, scores, label, coefficients, ctx.backend), None, None, None


def _refuse(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        'dice_cross_entropy has derivatives of the second order and forward-mode ones with backend="reference" only')


torch.library.register_autograd("dropgen_fast::dice_ce", _backward, setup_context=_setup_context)
torch.library.register_autograd("dropgen_fast::dice_ce_backward", _refuse)


class DiceCe(torch.autograd.Function):
    """`forward_op` and its gradient for eager calls: torch's registration would drop forward-mode tangents in silence."""

    forward = staticmethod(lambda *arguments: forward_op(*arguments))
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)
    jvp = staticmethod(_refuse)


class DiceCeBackward(torch.autograd.Function):
    """`backward_op` for eager calls: the end of the chain."""

    forward = staticmethod(lambda *arguments: backward_op(*arguments))
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(_refuse)
    jvp = staticmethod(_refuse)


def forward(*arguments: Any) -> Tensor:
    """The loss of `forward_op`, whose arguments these are, differentiable."""
    loss: Tensor = (forward_op if torch.compiler.is_compiling() else DiceCe.apply)(*arguments)[0]
    return loss
