"""`mind_ssc` in plain torch: the definition that every other backend is compared with."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

# The six face neighbours, and the twelve pairs of them that are an edge apart (distance √2).
NEIGHBOURS = tuple(tuple(sign if axis == a else 0 for a in range(3)) for axis in range(3) for sign in (-1, 1))
PAIRS = tuple((a, b) for a, b in itertools.combinations(NEIGHBOURS, 2)
              if sum((i - j) ** 2 for i, j in zip(a, b, strict=True)) == 2)
CHANNELS = len(PAIRS)
FLOOR = 1e-9
"""Added to the variance, so that it can divide where nothing varies."""


def mind_ssc(image: Tensor, *, radius: int, dilation: int) -> Tensor:
    """See the public `mind_ssc`: (N, 1, D, H, W) → (N, 12, D, H, W) float32; a float64 image is computed in float64."""
    image = image if image.dtype == torch.float64 else image.float()
    ssd = mean_squared_differences(image[:, 0], radius, dilation)
    least = ssd.amin(1, keepdim=True)
    noise = ssd.mean(1, keepdim=True) - least
    usual = noise.mean((1, 2, 3, 4), keepdim=True)
    noise = torch.minimum(torch.maximum(noise, usual * 1e-3), usual * 1e3) + FLOOR
    return ssd.sub_(least).div_(noise).neg_().exp_()


def mean_squared_differences(volume: Tensor, radius: int, dilation: int) -> Tensor:
    """(N, D, H, W) → (N, 12, D, H, W): means over the box of the squared differences, pair by pair.

    The mean is a sum of the differences of a volume scaled by the root of the box's size; edges are repeated in the one volume
    rather than in twelve; and one pair is finished before the next begins, so that its few volumes stay in the processor's
    cache. That is where the time goes otherwise.
    """
    volume = volume * (2 * radius + 1) ** -1.5
    seen = {offset: _shifted(volume, offset, radius, dilation) for offset in NEIGHBOURS}
    out = volume.new_empty(volume.shape[0], len(PAIRS), *volume.shape[1:])
    for k, (a, b) in enumerate(PAIRS):
        squared = (seen[a] - seen[b]).square_()
        out[:, k] = box_sum(squared, radius)
    return out


def _shifted(volume: Tensor, offset: tuple[int, ...], radius: int, dilation: int) -> Tensor:
    """The volume (N, D, H, W) as seen from that neighbour, edges clamped, then padded by the radius, edges clamped."""
    for axis, step in enumerate(offset, start=1):
        n = volume.shape[axis]
        index = torch.arange(-radius, n + radius, device=volume.device).clamp_(0, n - 1)
        volume = volume.index_select(axis, (index + step * dilation).clamp_(0, n - 1))
    return volume


def box_sum(x: Tensor, radius: int) -> Tensor:
    """Sums over (2 · radius + 1)³ voxels of (N, D + 2 · radius, …), axis by axis, where the whole box lies inside: (N, D, …)."""
    for axis in (3, 2, 1):
        n = x.shape[axis] - 2 * radius
        first, *others = (x.narrow(axis, k, n) for k in range(2 * radius + 1))
        x = sum(others, first)
    return x
