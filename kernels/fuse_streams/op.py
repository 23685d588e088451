"""The registration of `fuse_streams` with torch: two custom ops, their fakes, the gradient that ties them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import memory
from .backends import module_of


def _checked_scale(scale: Tensor, image: Tensor, features: Tensor | None, backend: str) -> Tensor:
    """The draw as kernels read it. The op may be called with anything: by itself, or by an exported graph on another device."""
    wanted = (image.shape[0], image.shape[1] + (features.shape[1] if features is not None else 0))
    if scale.dtype != torch.float32 or tuple(scale.shape) != wanted:
        raise ValueError(f"scale must be {wanted} float32, got {tuple(scale.shape)} {scale.dtype}")
    if reason := module_of(backend).refuses([image, scale] if features is None else [image, features, scale]):
        raise RuntimeError(f"backend {backend!r} cannot take this call: {reason}")
    return scale.contiguous()


@torch.library.custom_op("dropgen_fast::fuse_streams", mutates_args=())
def forward_op(
    image: Tensor, features: Tensor | None, scale: Tensor, image_norm: str, norm_a: float, norm_b: float,
    feature_norm: str, eps: float, dtype: torch.dtype, channels_last: bool, channel_multiple: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the image's statistics (N, 2: shift, gain) and the features' (see `_statistics_shape`)."""
    scale = _checked_scale(scale, image, features, backend)
    shape, memory_format = _result_layout(image, scale, channels_last, channel_multiple)
    out = _allocate(shape, dtype, memory_format, image.device)
    image_stats, feature_stats = _empty_statistics(image, features, feature_norm)
    module_of(backend).forward(image, features, scale, out, image_stats, feature_stats,
                               image_norm=(image_norm, norm_a, norm_b), feature_norm=feature_norm, eps=eps)
    return out, image_stats, feature_stats


@forward_op.register_fake
def _(
    image: Tensor, features: Tensor | None, scale: Tensor, image_norm: str, norm_a: float, norm_b: float,
    feature_norm: str, eps: float, dtype: torch.dtype, channels_last: bool, channel_multiple: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shape, memory_format = _result_layout(image, scale, channels_last, channel_multiple)
    out = torch.empty(shape, dtype=dtype, device=image.device, memory_format=memory_format)
    return out, *_empty_statistics(image, features, feature_norm)


def _result_layout(
    image: Tensor, scale: Tensor, channels_last: bool, channel_multiple: int,
) -> tuple[tuple[int, ...], torch.memory_format]:
    channels = (scale.shape[1] + channel_multiple - 1) // channel_multiple * channel_multiple
    return (image.shape[0], channels, *image.shape[2:]), torch.channels_last_3d if channels_last else torch.contiguous_format


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return memory.empty(shape, dtype, memory_format)
    return torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)


def _empty_statistics(image: Tensor, features: Tensor | None, feature_norm: str) -> tuple[Tensor, Tensor]:
    image_stats = torch.empty((image.shape[0], 2), dtype=torch.float32, device=image.device)
    return image_stats, torch.empty(_statistics_shape(features, feature_norm), dtype=torch.float32, device=image.device)


def _statistics_shape(features: Tensor | None, norm: str) -> tuple[int, ...]:
    """(shift, gain) of each sample and channel for "instance", of each sample and voxel for "unit" and "standard"."""
    if features is None or norm == "none":
        return (0,)
    n, channels, *grid = features.shape
    return (n, channels, 2) if norm == "instance" else (n, 2, *grid)


@torch.library.custom_op("dropgen_fast::fuse_streams_backward", mutates_args=())
def backward_op(
    grad: Tensor, image: Tensor | None, features: Tensor | None, scale: Tensor, image_stats: Tensor,
    feature_stats: Tensor, image_channels: int, image_norm: str, norm_a: float, norm_b: float, feature_norm: str, eps: float,
    image_dtype: torch.dtype | None, backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients to the image (empty where `image_dtype` is None) and to the features (empty where None)."""
    device = grad.device
    grad_image = grad.new_empty(0, dtype=torch.float32)
    if image_dtype is not None:
        shape = (grad.shape[0], image_channels, *grad.shape[2:])
        grad_image = _allocate(shape, image_dtype, torch.contiguous_format, device)
    grad_features = grad.new_empty(0, dtype=torch.float32)
    if features is not None:
        # GPU kernels take the normalization's gradient in place, in float32.
        dtype = features.dtype if backend == "native" and device.type == "cpu" else torch.float32
        grad_features = _allocate(tuple(features.shape), dtype, torch.contiguous_format, device)
    scale, image_stats, feature_stats = (t.contiguous() for t in (scale, image_stats, feature_stats))  # vmap repeats by strides
    module_of(backend).backward(
        grad, image, features, scale, image_stats, feature_stats,
        grad_image if image_dtype is not None else None, grad_features if features is not None else None,
        image_channels=image_channels, image_norm=(image_norm, norm_a, norm_b), feature_norm=feature_norm, eps=eps)
    return grad_image, grad_features if features is None else grad_features.to(features.dtype)


@backward_op.register_fake
def _(
    grad: Tensor, image: Tensor | None, features: Tensor | None, scale: Tensor, image_stats: Tensor,
    feature_stats: Tensor, image_channels: int, image_norm: str, norm_a: float, norm_b: float, feature_norm: str, eps: float,
    image_dtype: torch.dtype | None, backend: str,
) -> tuple[Tensor, Tensor]:
    image_shape = (grad.shape[0], image_channels, *grad.shape[2:]) if image_dtype is not None else (0,)
    grad_image = torch.empty(image_shape, dtype=image_dtype or torch.float32, device=grad.device)
    if features is None:
        return grad_image, torch.empty(0, dtype=torch.float32, device=grad.device)
    return grad_image, torch.empty(features.shape, dtype=features.dtype, device=grad.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, features, scale, kind, a, b, feature_norm, eps, _, _, _, backend = inputs
    _, image_stats, feature_stats = output
    ctx.needs_image, ctx.needs_features = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    # Only a window's gradient looks at the voxels again: where it clipped, it is zero.
    saved_image = image if ctx.needs_image and kind == "window" else None
    ctx.save_for_backward(saved_image, features if ctx.needs_features else None, scale, image_stats, feature_stats)
    ctx.image_channels, ctx.image_dtype = image.shape[1], image.dtype
    ctx.settings = (kind, a, b, feature_norm, eps)
    ctx.backend = backend
    ctx.mark_non_differentiable(image_stats, feature_stats)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _image_stats: Tensor | None, _feature_stats: Tensor | None) -> tuple[Any, ...]:
    none = (None,) * 12
    if grad is None:
        return none
    image, features, scale, image_stats, feature_stats = ctx.saved_tensors
    grad_image, grad_features = FuseStreamsBackward.apply(
        grad, image, features, scale, image_stats, feature_stats, ctx.image_channels, *ctx.settings,
        ctx.image_dtype if ctx.needs_image else None, ctx.backend)
    return (grad_image if ctx.needs_image else None, grad_features if ctx.needs_features else None, *none[2:])


def _refuse(ctx: Any, *_: Any) -> Any:
    raise RuntimeError('fuse_streams has derivatives of the second order and forward-mode ones with backend="reference" only')


torch.library.register_autograd("dropgen_fast::fuse_streams", _backward, setup_context=_setup_context)
torch.library.register_autograd("dropgen_fast::fuse_streams_backward", _refuse)


class FuseStreams(torch.autograd.Function):
    """`forward_op` and its gradient for eager calls.

    torch's registration above serves graphs (compiled, exported); of eager calls it knows no `torch.func` transforms, and it
    drops the tangents of forward-mode derivatives in silence where this raises.
    """

    generate_vmap_rule = True
    # Of no other signature: torch binds the arguments to it anew at every call, which takes longer the more it says.
    forward = staticmethod(lambda *arguments: forward_op(*arguments))
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)
    jvp = staticmethod(_refuse)


class FuseStreamsBackward(torch.autograd.Function):
    """`backward_op` for eager calls: the end of the chain."""

    generate_vmap_rule = True
    forward = staticmethod(lambda *arguments: backward_op(*arguments))
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(_refuse)
    jvp = staticmethod(_refuse)


def forward(*arguments: Any) -> Tensor:
    """The result of `forward_op`, whose arguments these are, differentiable."""
    out: Tensor = (forward_op if torch.compiler.is_compiling() else FuseStreams.apply)(*arguments)[0]
    return out


# ---- torch.func.vmap: the mapped axis is folded into the batch -------------------------------------------------------


def _fold(tensor: Tensor | None, axis: int | None, size: int) -> Tensor | None:
    """(B, N, …) as (B · N, …); what is not mapped is repeated; what has no batch (statistics that are not taken) is left."""
    if tensor is None or (axis is None and tensor.dim() == 1):
        return tensor
    return (tensor.expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)).flatten(0, 1)


def _unfold(outputs: tuple[Tensor, ...], size: int) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    return (tuple(t if t.dim() == 1 else t.unflatten(0, (size, -1)) for t in outputs),
            tuple(None if t.dim() == 1 else 0 for t in outputs))


@forward_op.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    tensors = (_fold(t, axis, info.batch_size) for t, axis in zip(arguments[:3], in_dims[:3], strict=True))
    return _unfold(forward_op(*tensors, *arguments[3:]), info.batch_size)


@backward_op.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    tensors = (_fold(t, axis, info.batch_size) for t, axis in zip(arguments[:6], in_dims[:6], strict=True))
    return _unfold(backward_op(*tensors, *arguments[6:]), info.batch_size)
