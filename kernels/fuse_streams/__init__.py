"""`fuse_streams`: normalize, interpolate, concatenate and drop the two streams of DropGen in one pass.

The public function checks its arguments, draws what is dropped with torch's generator and hands both to a backend:
`reference` (the definition, plain torch), `native` (C++ on the CPU) or `triton`. The draw is a tensor like any other
input, so every backend can be fed the same one, and a CUDA graph replays with fresh draws.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from .backends import BACKENDS, FLOAT_DTYPES, available_backends, check_dtypes, choose, measured, names
from .draw import MODES, Rate, RateSchedule, check_rates, draw_scale
from .norms import FEATURE_NORMS, ImageNorm, Window, ZScore, pack_image_norm
from .op import forward, forward_op

__all__ = ["BACKENDS", "ImageNorm", "Rate", "RateSchedule", "Window", "ZScore", "available_backends", "draw_scale",
           "fuse_streams"]


def fuse_streams(
    image: Tensor,
    features: Tensor | None = None,
    *,
    p: Rate | Tensor = 0.75,
    training: bool = True,
    mode: str = "channel",
    keep: Tensor | None = None,
    at_least_one: bool = False,
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
        p: drop rate in [0, 1). A pair is (rate of the image, rate of the features). A tensor, () or (2,) float32 on the image's
            device, is a rate or a pair that may change between the replays of a graph and the calls of a compiled function;
            its values are checked on the CPU only, and not while compiling. Outside [0, 1) the result means nothing.
        training: False drops nothing and scales nothing.
        mode: "channel", the paper's: every channel of every sample on its own with probability p, survivors multiplied
            by 1 / (1 - p). "stream": of every sample the whole image with probability p[0], or else the whole of the
            features with probability p[1], never both, survivors not rescaled; a single p means (p, 0), the sum must
            be at most 1.
        keep: (N, Ci + Cf) bool, fixes the draw instead of drawing it (survivors are scaled as the mode says); as any draw,
            it counts in training only.
        at_least_one: in mode "channel", where a draw would drop every channel of a sample one of them is kept, any with equal
            chance, and scaled as any survivor; its expectation is then above the undropped value. In mode "stream" one stream is
            always kept, and without features this keeps the image whatever p. Does not change an explicit `keep`.
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
    channels ("unit", "standard", and "minmax" of several image channels).

    The draw comes from torch's generator of the image's device, as that of `F.dropout3d` does: the same seed gives the same
    draw on every backend. Autocast changes nothing here: the result's dtype is as said above. `torch.func.vmap` folds the
    mapped axis into the batch; it needs its `randomness` said where something is drawn. Derivatives of the second order and
    forward-mode ones are the reference backend's alone, the others raise.

    Raises:
        ValueError: an argument that does not fit, named with what was wanted and what came.
        RuntimeError: a backend that cannot be had here, with the reason and the ones that can.
    """
    channels = _check(image, features, keep, mode, memory_format, channel_multiple, feature_norm, eps)
    rates = check_rates(p, mode, image.device)
    dtype = dtype or (features.dtype if features is not None else torch.float32)
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be one of {names(FLOAT_DTYPES)}, got {dtype}")
    kind, a, b = pack_image_norm(image_norm)
    chosen = choose(backend, image, features)
    scale = draw_scale(image.shape[0], *channels, rates, mode=mode, training=training, keep=keep, at_least_one=at_least_one,
                       device=image.device)
    settings = (kind, a, b, feature_norm, eps, dtype, memory_format == torch.channels_last_3d, channel_multiple)
    if backend == "auto":
        chosen = measured(chosen, image, features, settings, lambda name: forward_op(image, features, scale, *settings, name))
    if chosen == "reference":
        return reference.fuse_streams(image, features, scale, image_norm=(kind, a, b), feature_norm=feature_norm, eps=eps,
                                      dtype=dtype, memory_format=memory_format, channel_multiple=channel_multiple)
    return forward(image, features, scale, *settings, chosen)


def _check(
    image: Tensor, features: Tensor | None, keep: Tensor | None, mode: str, memory_format: torch.memory_format,
    channel_multiple: int, feature_norm: str, eps: float,
) -> tuple[int, int]:
    """Check everything but the rates; the numbers of image and feature channels."""
    _check_volumes("image", image, "(N, Ci, D, H, W)")
    channels = (image.shape[1], 0)
    if features is not None:
        _check_volumes("features", features, "(N, Cf, d, h, w)")
        if features.shape[0] != image.shape[0]:
            raise ValueError(f"features must have the image's batch size {image.shape[0]}, got {features.shape[0]}")
        if any(f > i for f, i in zip(features.shape[2:], image.shape[2:], strict=True)):
            raise ValueError(f"features must be no larger than the image: grid {tuple(features.shape[2:])} "
                             f"against {tuple(image.shape[2:])}")
        if features.device != image.device:
            raise ValueError(f"features must be on the image's device {image.device}, got {features.device}")
        channels = (image.shape[1], features.shape[1])
    check_dtypes(image, features)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if feature_norm not in FEATURE_NORMS:
        raise ValueError(f"feature_norm must be one of {', '.join(FEATURE_NORMS)}, got {feature_norm!r}")
    # Not math.isfinite, which torch.compile cannot trace for a symbolic number.
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < math.inf:
        raise ValueError(f"eps must be a positive number, got {eps!r}")
    if memory_format not in (torch.contiguous_format, torch.channels_last_3d):
        raise ValueError(f"memory_format must be torch.contiguous_format or torch.channels_last_3d, got {memory_format}")
    if isinstance(channel_multiple, bool) or not isinstance(channel_multiple, int) or channel_multiple < 1:
        raise ValueError(f"channel_multiple must be a whole number ≥ 1, got {channel_multiple!r}")
    if keep is not None:
        wanted = (image.shape[0], sum(channels))
        if not isinstance(keep, Tensor):
            raise ValueError(f"keep must be a tensor, {wanted} bool, got {type(keep).__name__}")
        _check_dense("keep", keep)
        if tuple(keep.shape) != wanted or keep.dtype != torch.bool or keep.device != image.device:
            raise ValueError(f"keep must be {wanted} bool on {image.device}, "
                             f"got {tuple(keep.shape)} {keep.dtype} on {keep.device}")
    return channels


def _check_volumes(name: str, tensor: Tensor, wanted: str) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor {wanted}, got {type(tensor).__name__}; torch.from_dlpack makes one of an "
                         "array without a copy")
    _check_dense(name, tensor)
    if tensor.dim() != 5 or 0 in tensor.shape:
        raise ValueError(f"{name} must be {wanted} with no empty axis, got shape {tuple(tensor.shape)}")


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.is_nested or tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {'a nested one' if tensor.is_nested else tensor.layout}")
