"""What the tests of fuse_streams share: tensors, draws, the definition in float64, how close a result must be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dropgen_fast import Window, ZScore
from dropgen_fast.kernels.fuse_streams import draw_scale, pack_image_norm, reference

BACKENDS = ("reference", "native", "triton")
# Half a unit in the last place of the result, relative to its own size, and float32's share of the arithmetic before it:
# about 40 roundings of values that instance norm may have made 10 times larger than their standard deviation.
TOLERANCE = {torch.float32: (3e-6, 5e-5), torch.float16: (2**-11, 1e-4), torch.bfloat16: (2**-8, 1e-4)}
IMAGE_NORMS = {"minmax": "minmax", "none": "none", "window": Window(-0.5, 0.8), "zscore": ZScore(0.3, 1.7)}


def streams(
    shape: tuple[int, ...] = (2, 1, 6, 7, 9), grid: tuple[int, ...] = (3, 7, 4), channels: int = 5, *,
    dtype: torch.dtype = torch.float32, image_dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(shape, generator=generator)
    image = (image * 40 + 100).clamp(0, 255).to(image_dtype) if not image_dtype.is_floating_point else image.to(image_dtype)
    return image, (torch.randn((shape[0], channels, *grid), generator=generator) * 2 + 1).to(dtype)


def half_of(n: int, c: int, seed: int = 1) -> Tensor:
    """A draw in which some channels are dropped and some are kept."""
    keep = torch.rand(n, c, generator=torch.Generator().manual_seed(seed)) < 0.6
    keep[:, 0], keep[:, -1] = True, False
    return keep


def definition(
    image: Tensor, features: Tensor | None, keep: Tensor, *, p: float = 0.75, mode: str = "channel", **kwargs: Any,
) -> Tensor:
    """The definition in float64, from the very values that the backend was given."""
    cf = features.shape[1] if features is not None else 0
    scale = draw_scale(image.shape[0], image.shape[1], cf, (p, p), mode=mode, keep=keep)
    options = {"image_norm": "minmax", "feature_norm": "instance", "eps": 1e-5} | kwargs
    options["image_norm"] = pack_image_norm(options["image_norm"])
    return reference.fuse_streams(image.double(), features.double() if features is not None else None, scale.double(),
                                  dtype=torch.float64, **options)


def close(result: Tensor, wanted: Tensor, scale: float = 1.0, *, backend: str = "") -> None:
    relative, absolute = TOLERANCE[result.dtype]
    if result.dtype == torch.bfloat16 and backend == "triton" and not result.is_cuda:
        relative *= 2  # Triton's interpreter cuts float32 to bfloat16 off where a GPU rounds it: a whole unit, not half
    torch.testing.assert_close(result.double(), wanted, rtol=relative, atol=absolute * scale)


def layouts(t: Tensor) -> list[Tensor]:
    """The same values: dense, channels-last, every other voxel of a larger tensor, axes exchanged."""
    wide = torch.zeros(*t.shape[:4], 2 * t.shape[4], dtype=t.dtype)[..., ::2].copy_(t)
    turned = t.transpose(2, 4).contiguous().transpose(2, 4)
    return [t, t.contiguous(memory_format=torch.channels_last_3d), wide, turned]
