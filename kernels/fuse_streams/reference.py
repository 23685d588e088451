"""`fuse_streams` in plain torch: the definition that every backend is held against.

Shapes: N batch, Ci image channels, Cf feature channels, D H W voxels, d h w coarse voxels.

    y[n, c] = scale[n, c] · norm_image(image)[n, c]                    for c < Ci
    y[n, Ci + c] = scale[n, Ci + c] · up(norm_features(features))[n, c]

`up` is trilinear interpolation with half-pixel centres and clamped edges. Features are normalized on their own grid and
then interpolated; weights sum to one, so for "instance" and "none" the order makes no difference. Statistics run over
the finite voxels only: a NaN or Inf stays where it is instead of spoiling its whole sample.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def normalize_image(image: Tensor, kind: str, a: float, b: float) -> Tensor:
    """Image (N, Ci, D, H, W), floating, normalized; the statistics of "minmax" are held constant under autograd."""
    if kind == "none":
        return image
    if kind == "window":
        return (image.clamp(a, b) - a) / (b - a)
    if kind == "zscore":
        return (image - a) / b
    finite = torch.isfinite(image)
    axes = (1, 2, 3, 4)
    with torch.no_grad():
        lo = torch.where(finite, image, torch.inf).amin(axes, keepdim=True)
        hi = torch.where(finite, image, -torch.inf).amax(axes, keepdim=True)
        span = hi - lo
        # Constant: no span whose reciprocal float32 can hold (nor has a sample without a finite voxel).
        varies = span >= torch.finfo(torch.float32).tiny
        gain = torch.where(varies, 1 / torch.where(varies, span, 1), 0)
        lo = torch.where(varies, lo, 0)
    return (image - lo) * gain


def normalize_features(features: Tensor, norm: str, eps: float) -> Tensor:
    """Features (N, Cf, d, h, w), floating, normalized on their own grid.

    instance: (f - mean) / sqrt(var + eps) over the voxels of each sample and channel, biased variance.
    unit: f / max(‖f‖₂, eps) over the channels of each voxel.
    standard: (f - mean) / sqrt(var + eps) over the channels of each voxel, biased variance.
    """
    if norm == "none":
        return features
    if norm == "unit":
        return F.normalize(features, dim=1, eps=eps)
    if norm == "standard":
        centred = features - features.mean(1, keepdim=True)
        return centred * (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    finite = torch.isfinite(features)
    axes = (2, 3, 4)
    count = finite.sum(axes, keepdim=True).clamp(min=1)
    known = torch.where(finite, features, 0)
    mean = known.sum(axes, keepdim=True) / count
    variance = torch.where(finite, known - mean, 0).square().sum(axes, keepdim=True) / count
    return (features - mean) * (variance + eps).rsqrt()


def fuse_streams(
    image: Tensor,
    features: Tensor | None,
    scale: Tensor,
    *,
    image_norm: tuple[str, float, float],
    feature_norm: str,
    eps: float,
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.contiguous_format,
    channel_multiple: int = 1,
    check_finite: bool = False,
) -> Tensor:
    """The op's result (N, C, D, H, W) in `dtype`, C = Ci + Cf rounded up to a multiple of `channel_multiple`.

    Args:
        image: (N, Ci, D, H, W).
        features: (N, Cf, d, h, w) floating, or None.
        scale: (N, Ci + Cf), what each channel is multiplied by; a channel whose scale is 0 is dropped.
        image_norm: as `pack_image_norm` gives it.
        feature_norm: see `normalize_features`.
        eps: of the feature normalization.
        dtype: of the result. Arithmetic is float64 when an input is, else float32.
        memory_format: of the result.
        channel_multiple: see above; the added channels are zero.
        check_finite: raise ValueError where a voxel is NaN or Inf instead of leaving it where it is.
    """
    inputs = [("image", image)] if features is None else [("image", image), ("features", features)]
    if check_finite:
        for name, tensor in inputs:
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name} holds {int((~torch.isfinite(tensor)).sum())} NaN or infinite voxels")
    work = torch.float64 if any(t.dtype == torch.float64 for _, t in inputs) else torch.float32
    x = normalize_image(image.to(work), *image_norm)
    if features is not None:
        f = normalize_features(features.to(work), feature_norm, eps)
        if f.shape[2:] != x.shape[2:]:
            f = F.interpolate(f, size=x.shape[2:], mode="trilinear", align_corners=False)
        x = torch.cat([x, f], 1)
    scale = scale.to(work)[:, :, None, None, None]
    x = torch.where(scale != 0, x * scale, 0)  # where, not only *: a dropped NaN is dropped
    if pad := -x.shape[1] % channel_multiple:
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, pad))
    return x.to(dtype).contiguous(memory_format=memory_format)
