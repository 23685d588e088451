"""What is dropped: drawn once, with torch's generator, and handed to every backend as a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

MODES = ("channel", "stream")
Rate = float | tuple[float, float]


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


def check_rates(p: Rate, mode: str) -> tuple[float, float]:
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
