"""`fuse_streams`: normalize, interpolate, concatenate and drop the two streams of DropGen in one pass.

The public function checks its arguments, draws what is dropped with torch's generator and hands both to a backend:
`reference` (the definition, plain torch), `native` (C++ on the CPU) or `triton`. The draw is a tensor like any other
input, so every backend can be fed the same one, and a CUDA graph replays with fresh draws.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import native, reference, triton
from .norms import FEATURE_NORMS, ImageNorm, Window, ZScore, pack_image_norm

__all__ = ["BACKENDS", "ImageNorm", "Window", "ZScore", "available_backends", "draw_scale", "fuse_streams"]

BACKENDS = ("auto", "native", "triton", "reference")
MODES = ("channel", "stream")
IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int16, torch.uint8)
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Rate = float | tuple[float, float]


def fuse_streams(
    image: Tensor,
    features: Tensor | None = None,
    *,
    p: Rate = 0.75,
    training: bool = True,
    mode: str = "channel",
    keep: Tensor | None = None,
    image_norm: ImageNorm = "minmax",
    feature_norm: str = "instance",
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    channel_multiple: int = 1,
    backend: str = "auto",
) -> Tensor:
    """What DropGen feeds its network (arXiv 2604.02564): both streams, normalized, channels dropped at random.

        y[n, c]      = s[n, c] · norm_image(image)[n, c]                        the image stream
        y[n, Ci + c] = s[n, Ci + c] · up(norm_features(features))[n, c]         the feature stream

    with `up` the trilinear interpolation to the image's grid (half-pixel centres, edges clamped, equal to
    ``F.interpolate(..., align_corners=False)``) and s the draw: 0 for what is dropped.

    Args:
        image: (N, Ci, D, H, W), float32, float16, bfloat16, int16 or uint8.
        features: (N, Cf, d, h, w), floating, with d ≤ D, h ≤ H, w ≤ W; None for the image alone.
        p: drop rate in [0, 1). A pair is (rate of the image, rate of the features).
        training: False drops nothing and scales nothing.
        mode: "channel", the paper's: every channel of every sample on its own with probability p, survivors multiplied
            by 1 / (1 - p). "stream": of every sample the whole image with probability p[0], or else the whole of the
            features with probability p[1], never both, survivors not rescaled; a single p means (p, 0), the sum must
            be at most 1.
        keep: (N, Ci + Cf) bool, fixes the draw instead of drawing it (survivors are scaled as the mode says); as any draw,
            it counts in training only.
        image_norm: "minmax" (per sample over all its channels together; constant → 0), "none", `Window` or `ZScore`.
        feature_norm: "instance" (per sample and channel over its voxels, biased variance), "unit" or "standard" (per
            voxel over its channels), "none". Features are normalized on their own grid, then interpolated.
        eps: added to the variance ("instance", "standard"), lower bound of the norm ("unit").
        dtype: of the result: float32, float16 or bfloat16; default that of `features`, else float32.
        memory_format: torch.contiguous_format or torch.channels_last_3d.
        channel_multiple: the result's channels are rounded up to a multiple of this with zero channels.
        backend: "auto" takes the fastest that fits the call; any other is taken or refused.

    Returns:
        (N, C, D, H, W), C = Ci + Cf rounded up. Differentiable with respect to `features` (through interpolation and
        normalization) and `image` (its statistics held constant).

    Statistics are float32 or better whatever the input. Those of "minmax" and "instance" run over the finite voxels: a
    voxel that is not finite stays so where it is (and where interpolation reaches from it) and does not spoil its sample;
    gradients are given for finite inputs. Dropped channels are zeros and are not read, but for statistics that span
    channels ("unit", "standard", and "minmax" of several image channels). Derivatives of the second order and forward-mode
    ones are the reference backend's alone.

    Raises:
        ValueError: an argument that does not fit, named with what was wanted and what came.
        RuntimeError: a backend that cannot be had here, with the reason and the ones that can.
    """
    channels = _check(image, features, keep, mode, memory_format, channel_multiple, feature_norm, eps)
    rates = _check_rates(p, mode)
    dtype = dtype or (features.dtype if features is not None else torch.float32)
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be one of {_names(FLOAT_DTYPES)}, got {dtype}")
    kind, a, b = pack_image_norm(image_norm)
    chosen = _choose(backend, image, features)
    scale = draw_scale(image.shape[0], *channels, rates, mode=mode, training=training, keep=keep, device=image.device)
    if chosen == "reference":
        return reference.fuse_streams(image, features, scale, image_norm=(kind, a, b), feature_norm=feature_norm, eps=eps,
                                      dtype=dtype, memory_format=memory_format, channel_multiple=channel_multiple)
    out, _, _ = _forward_op(image, features, scale, kind, a, b, feature_norm, eps, dtype,
                            memory_format == torch.channels_last_3d, channel_multiple, chosen)
    return out


def draw_scale(
    batch: int, image_channels: int, feature_channels: int, rates: tuple[float, float], *, mode: str = "channel",
    training: bool = True, keep: Tensor | None = None, device: torch.device | str | None = None,
) -> Tensor:
    """Draw what is dropped: (N, Ci + Cf) float32, 0 for a dropped channel, else what a survivor is multiplied by.

    Args:
        batch, image_channels, feature_channels: N, Ci, Cf.
        rates: drop rate of the image and of the features.
        mode, training, keep: as in `fuse_streams`.
        device: of the result; the draw uses torch's generator of that device.
    """
    sizes = (image_channels, feature_channels)
    ones = [torch.ones(batch, size, device=device, dtype=torch.float32) for size in sizes]
    if not training:
        return torch.cat(ones, 1)
    if mode == "channel":
        survivors = torch.cat([one / (1 - rate) for one, rate in zip(ones, rates, strict=True)], 1)
        if keep is None:
            limits = torch.cat([one * rate for one, rate in zip(ones, rates, strict=True)], 1)
            keep = torch.rand(survivors.shape, device=device, dtype=torch.float32) >= limits
    else:
        survivors = torch.cat(ones, 1)
        if keep is None:
            u = torch.rand(batch, 1, device=device, dtype=torch.float32)
            kept = (u >= rates[0], (u < rates[0]) | (u >= rates[0] + rates[1]))
            keep = torch.cat([k.expand(batch, size) for k, size in zip(kept, sizes, strict=True)], 1)
    return torch.where(keep, survivors, 0.0)


def available_backends() -> dict[str, str]:
    """Each backend's name and "" where it can be had here, else the reason why not."""
    return {"native": native.MISSING, "triton": triton.MISSING, "reference": ""}


def _choose(backend: str, image: Tensor, features: Tensor | None) -> str:
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
        _check_dtypes(image, features)
        return "reference"
    if reasons[backend]:
        fits = [name for name, why in reasons.items() if not why]
        raise RuntimeError(f"backend {backend!r} cannot take this call: {reasons[backend]}; "
                           f"what can: {', '.join([*fits, 'reference'])}")
    return backend


def _check(
    image: Tensor, features: Tensor | None, keep: Tensor | None, mode: str, memory_format: torch.memory_format,
    channel_multiple: int, feature_norm: str, eps: float,
) -> tuple[int, int]:
    """Check everything but the rates; the numbers of image and feature channels."""
    if image.dim() != 5 or 0 in image.shape:
        raise ValueError(f"image must be (N, Ci, D, H, W) with no empty axis, got shape {tuple(image.shape)}")
    _check_dtypes(image, features)
    channels = (image.shape[1], 0)
    if features is not None:
        if features.dim() != 5 or 0 in features.shape:
            raise ValueError(f"features must be (N, Cf, d, h, w) with no empty axis, got shape {tuple(features.shape)}")
        if features.shape[0] != image.shape[0]:
            raise ValueError(f"features must have the image's batch size {image.shape[0]}, got {features.shape[0]}")
        if any(f > i for f, i in zip(features.shape[2:], image.shape[2:], strict=True)):
            raise ValueError(f"features must be no larger than the image: grid {tuple(features.shape[2:])} "
                             f"against {tuple(image.shape[2:])}")
        if features.device != image.device:
            raise ValueError(f"features must be on the image's device {image.device}, got {features.device}")
        channels = (image.shape[1], features.shape[1])
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if feature_norm not in FEATURE_NORMS:
        raise ValueError(f"feature_norm must be one of {', '.join(FEATURE_NORMS)}, got {feature_norm!r}")
    if not 0 < eps < math.inf:  # not math.isfinite, which torch.compile cannot trace for a symbolic number
        raise ValueError(f"eps must be a positive number, got {eps}")
    if memory_format not in (torch.contiguous_format, torch.channels_last_3d):
        raise ValueError(f"memory_format must be torch.contiguous_format or torch.channels_last_3d, got {memory_format}")
    if isinstance(channel_multiple, bool) or not isinstance(channel_multiple, int) or channel_multiple < 1:
        raise ValueError(f"channel_multiple must be a whole number ≥ 1, got {channel_multiple!r}")
    if keep is not None:
        wanted = (image.shape[0], sum(channels))
        if not isinstance(keep, Tensor):
            raise ValueError(f"keep must be a tensor, {wanted} bool, got {type(keep).__name__}")
        if tuple(keep.shape) != wanted or keep.dtype != torch.bool or keep.device != image.device:
            raise ValueError(f"keep must be {wanted} bool on {image.device}, "
                             f"got {tuple(keep.shape)} {keep.dtype} on {keep.device}")
    return channels


def _check_dtypes(image: Tensor, features: Tensor | None) -> None:
    if image.dtype not in IMAGE_DTYPES:
        raise ValueError(f"image must be one of {_names(IMAGE_DTYPES)}, got {image.dtype}")
    if features is not None and features.dtype not in FLOAT_DTYPES:
        raise ValueError(f"features must be one of {_names(FLOAT_DTYPES)}, got {features.dtype}")


def _check_rates(p: Rate, mode: str) -> tuple[float, float]:
    """(rate of the image, rate of the features)."""
    if isinstance(p, (tuple, list)):
        rates = tuple(p)
        if len(rates) != 2:
            raise ValueError(f"p must be one rate or (rate of the image, rate of the features), got {p!r}")
    else:
        rates = (p, 0.0) if mode == "stream" else (p, p)
    if not all(isinstance(rate, (int, float)) for rate in rates):
        raise ValueError(f"p must be one rate or (rate of the image, rate of the features), got {p!r}")
    if mode == "stream":
        if not all(0 <= rate <= 1 for rate in rates) or sum(rates) > 1:
            raise ValueError(f"p must be rates in [0, 1] whose sum is at most 1 in stream mode, got {p!r}")
    elif not all(0 <= rate < 1 for rate in rates):
        raise ValueError(f"p must be in [0, 1), got {p!r}")
    return float(rates[0]), float(rates[1])


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _checked_scale(scale: Tensor, image: Tensor, features: Tensor | None, backend: str) -> Tensor:
    """The draw as kernels read it. The op may be called with anything: by itself, or by an exported graph on another device."""
    wanted = (image.shape[0], image.shape[1] + (features.shape[1] if features is not None else 0))
    if scale.dtype != torch.float32 or tuple(scale.shape) != wanted:
        raise ValueError(f"scale must be {wanted} float32, got {tuple(scale.shape)} {scale.dtype}")
    if reason := _module(backend).refuses([image, scale] if features is None else [image, features, scale]):
        raise RuntimeError(f"backend {backend!r} cannot take this call: {reason}")
    return scale.contiguous()


def _module(backend: str) -> ModuleType:
    return {"native": native, "triton": triton}[backend]


@torch.library.custom_op("dropgen_fast::fuse_streams", mutates_args=())
def _forward_op(
    image: Tensor, features: Tensor | None, scale: Tensor, image_norm: str, norm_a: float, norm_b: float,
    feature_norm: str, eps: float, dtype: torch.dtype, channels_last: bool, channel_multiple: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the image's statistics (N, 2: shift, gain) and the features' (see `_statistics_shape`)."""
    scale = _checked_scale(scale, image, features, backend)
    out, image_stats, feature_stats = _empty_outputs(image, features, scale, feature_norm, dtype, channels_last, channel_multiple)
    _module(backend).forward(image, features, scale, out, image_stats, feature_stats,
                             image_norm=(image_norm, norm_a, norm_b), feature_norm=feature_norm, eps=eps)
    return out, image_stats, feature_stats


@_forward_op.register_fake
def _(
    image: Tensor, features: Tensor | None, scale: Tensor, image_norm: str, norm_a: float, norm_b: float,
    feature_norm: str, eps: float, dtype: torch.dtype, channels_last: bool, channel_multiple: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(image, features, scale, feature_norm, dtype, channels_last, channel_multiple)


def _empty_outputs(
    image: Tensor, features: Tensor | None, scale: Tensor, feature_norm: str, dtype: torch.dtype,
    channels_last: bool, channel_multiple: int,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = (scale.shape[1] + channel_multiple - 1) // channel_multiple * channel_multiple
    shape = (image.shape[0], channels, *image.shape[2:])
    memory_format = torch.channels_last_3d if channels_last else torch.contiguous_format
    out = torch.empty(shape, dtype=dtype, device=image.device, memory_format=memory_format)
    image_stats = torch.empty((image.shape[0], 2), dtype=torch.float32, device=image.device)
    feature_stats = torch.empty(_statistics_shape(features, feature_norm), dtype=torch.float32, device=image.device)
    return out, image_stats, feature_stats


def _statistics_shape(features: Tensor | None, norm: str) -> tuple[int, ...]:
    """(shift, gain) of each sample and channel for "instance", of each sample and voxel for "unit" and "standard"."""
    if features is None or norm == "none":
        return (0,)
    n, channels, *grid = features.shape
    return (n, channels, 2) if norm == "instance" else (n, 2, *grid)


@torch.library.custom_op("dropgen_fast::fuse_streams_backward", mutates_args=())
def _backward_op(
    grad: Tensor, image: Tensor | None, features: Tensor | None, scale: Tensor, image_stats: Tensor,
    feature_stats: Tensor, image_channels: int, image_norm: str, norm_a: float, norm_b: float, feature_norm: str, eps: float,
    image_dtype: torch.dtype | None, backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients to the image (empty where `image_dtype` is None) and to the features (empty where None)."""
    grad_image, grad_features = _empty_gradients(grad, features, image_channels, image_dtype)
    work = grad_features if grad_features.dtype == torch.float32 else torch.empty_like(
        grad_features, dtype=torch.float32, memory_format=torch.contiguous_format)
    _module(backend).backward(
        grad, image, features, scale.contiguous(), image_stats, feature_stats,
        grad_image if image_dtype is not None else None, work if features is not None else None,
        image_channels=image_channels, image_norm=(image_norm, norm_a, norm_b), feature_norm=feature_norm, eps=eps)
    return grad_image, grad_features if work is grad_features else work.to(grad_features.dtype)


@_backward_op.register_fake
def _(
    grad: Tensor, image: Tensor | None, features: Tensor | None, scale: Tensor, image_stats: Tensor,
    feature_stats: Tensor, image_channels: int, image_norm: str, norm_a: float, norm_b: float, feature_norm: str, eps: float,
    image_dtype: torch.dtype | None, backend: str,
) -> tuple[Tensor, Tensor]:
    return _empty_gradients(grad, features, image_channels, image_dtype)


def _empty_gradients(
    grad: Tensor, features: Tensor | None, image_channels: int, image_dtype: torch.dtype | None,
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
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _image_stats: Tensor | None, _feature_stats: Tensor | None) -> tuple[Any, ...]:
    none = (None,) * 12
    if grad is None:
        return none
    image, features, scale, image_stats, feature_stats = ctx.saved_tensors
    grad_image, grad_features = _backward_op(grad, image, features, scale, image_stats, feature_stats, ctx.image_channels,
                                             *ctx.settings,
                                             ctx.image_dtype if ctx.needs_image else None, ctx.backend)
    return (grad_image if ctx.needs_image else None, grad_features if ctx.needs_features else None, *none[2:])


torch.library.register_autograd("dropgen_fast::fuse_streams", _backward, setup_context=_setup_context)
