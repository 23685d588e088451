"""`warp` in plain torch: the definition that every other backend is compared with.

Coordinates are float64 whatever the types of the call, so that a result is exact up to the arithmetic of its own type.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor


def warp(
    image: Tensor, label: Tensor | None, matrix: Tensor, displacement: Tensor | None, *, border: bool,
) -> tuple[Tensor, Tensor | None]:
    """See the public `warp`; `image` may be float64, too, and all tensors are on one device."""
    out = torch.empty(image.shape, dtype=image.dtype, device=image.device)
    label_out = torch.empty(label.shape, dtype=label.dtype, device=label.device) if label is not None else None
    for n in range(image.shape[0]):  # sample by sample: eight taps of one at a time
        source = source_coordinates(matrix[n], displacement[n] if displacement is not None else None, image.shape[2:])
        for axis, size in enumerate(image.shape[2:]):  # a border is a clamp; else two voxels away is as good as anywhere
            bounds = (0, size - 1) if border else (-2, size + 1)
            source[axis] = source[axis].nan_to_num(nan=-2.0).clamp(*bounds)
        out[n] = _linear(image[n], source)
        if label is not None and label_out is not None:
            label_out[n] = _nearest(label[n], source)
    return out, label_out


def source_coordinates(matrix: Tensor, displacement: Tensor | None, size: torch.Size | tuple[int, ...]) -> Tensor:
    """s = A·(o + u(o)) + t of each voxel o of one sample: (3, D, H, W) float64, in voxels.

    Args:
        matrix: (3, 4), [A|t].
        displacement: (3, d, h, w) in voxels, or None.
        size: D, H, W.
    """
    axes = [torch.arange(n, dtype=torch.float64, device=matrix.device) for n in size]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    if displacement is not None:
        place = place + F.interpolate(displacement.double()[None], tuple(size), mode="trilinear", align_corners=False)[0]
    exact = matrix.double()
    return torch.einsum("ij,jdhw->idhw", exact[:, :3], place) + exact[:, 3, None, None, None]


def _linear(image: Tensor, source: Tensor) -> Tensor:
    """Σ over the 8 voxels around of weight · voxel; those outside count 0. Channels (C, D, H, W), source (3, D, H, W)."""
    low = source.floor()
    upper = source - low
    total = torch.zeros(image.shape, dtype=torch.promote_types(image.dtype, torch.float32), device=image.device)
    for corner in product((0, 1), repeat=3):
        weight = torch.ones_like(upper[0])
        for axis, step in enumerate(corner):
            weight = weight * (upper[axis] if step else 1 - upper[axis])
        # Numbers, not a tensor of them, which would have to reach the device, and for which the host would wait.
        index, inside = _index(torch.stack([low[axis] + step for axis, step in enumerate(corner)]), image.shape[1:])
        total += torch.where(inside, weight, 0.0).to(total.dtype) * image.flatten(1)[:, index].to(total.dtype)
    return total.to(image.dtype)


def _nearest(label: Tensor, source: Tensor) -> Tensor:
    """The voxel at floor(s + 1/2), or 0 outside. Labels (L, D, H, W), source (3, D, H, W)."""
    index, inside = _index((source + 0.5).floor(), label.shape[1:])
    return torch.where(inside, label.flatten(1)[:, index], 0)


def _index(voxel: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
    """Of whole coordinates (3, D, H, W): the flat index, or the nearest voxel's outside; and where they are inside."""
    index = torch.zeros(voxel.shape[1:], dtype=torch.int64, device=voxel.device)
    inside = torch.ones(voxel.shape[1:], dtype=torch.bool, device=voxel.device)
    for axis, n in enumerate(size):
        index = index * n + voxel[axis].clamp(0, n - 1).long()
        inside &= (voxel[axis] >= 0) & (voxel[axis] < n)
    return index, inside
