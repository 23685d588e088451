"""The surfaces of every class of a label map, and how far two of them are apart.

Two kinds of surface, as the two scores are defined:

* HD95 measures between *edge voxels*: voxels of the class with a face neighbour outside of it, or at the volume's border.
* Surface Dice weighs by area (Nikolov et al. 2021, J Med Internet Res 23(7):e26151). The dual grid has a cell between each
  2 × 2 × 2 voxels. A cell with some of its 8 corners in the class and some not holds a *surface element*: it lies at the
  cell's centre, and its area is that of marching cubes through the cell, looked up by which corners are inside. With s one
  class's elements in the prediction, t in the label, a their areas and d the distance to the nearest element of the other:

      surface Dice = (sum of a_s where d_s ≤ tolerance + sum of a_t where d_t ≤ tolerance) / (sum of a_s + sum of a_t)

The surfaces of all classes are found in the same few passes over the label map, so that one stray voxel far from its organ
costs nothing. Distances come from k-d trees over the surface points: exact, in time n log n of their number.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from dropgen_fast.data.geometry import Triple

ROUNDING = 1e-6
"""Relative excess over the tolerance that still counts as equal to it: spacings pass through float32 headers (6e-8 each)."""
CORNERS = tuple(itertools.product((0, 1), repeat=3))
"""Of a cell, in the order of the bits of its code, highest first."""

Points = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Surface:
    """The surface of one class; positions in mm along the array's axes, from an origin that both label maps share."""

    edges_mm: Points
    """Centres of the edge voxels, (n, 3)."""
    elements_mm: Points
    """Centres of the surface elements, (m, 3)."""
    areas_mm2: npt.NDArray[np.float64]
    """Of the surface elements, (m,)."""


def surfaces(labels: npt.NDArray[Any], spacing_mm: Triple) -> dict[int, Surface]:
    """The surface of every class but background (0) that a label map (I, J, K) holds; what is beyond it is background."""
    # NIfTI files vary fastest along the first axis, and so does everything here.
    padded = np.zeros([size + 2 for size in labels.shape], labels.dtype, order="F")
    padded[1:-1, 1:-1, 1:-1] = labels
    edges = _edges(padded, spacing_mm)
    cells, corners = _mixed_cells(padded)
    table = _area_mm2_of_code(spacing_mm)
    found = {}
    for value, edges_mm in edges.items():
        codes = np.packbits(corners == value, axis=1)[:, 0]
        own = np.flatnonzero(codes)  # 255, all inside, is no mixed cell
        # A cell's centre lies half a voxel from its first corner, which the padding has moved by one: edges share that origin.
        found[value] = Surface(edges_mm, _mm(cells[own] + 0.5, spacing_mm), table[codes[own]])
    return found


def hd95_mm(one: Surface, other: Surface) -> float:
    """The larger of the two directed 95th percentiles (linear between ranks) of the distances between edge voxels, in mm."""
    a, b = one.edges_mm, other.edges_mm
    return max(float(np.percentile(_distances_mm(a, b), 95)), float(np.percentile(_distances_mm(b, a), 95)))


def surface_dice(one: Surface, other: Surface, tolerance_mm: float) -> float:
    """Share of the area of both surfaces that lies within `tolerance_mm` of the other, 0 to 1."""
    limit_mm = tolerance_mm * (1 + ROUNDING)
    near_mm2 = 0.0
    for a, b in ((one, other), (other, one)):
        # Any bound above the limit will do: the tree looks no farther, and what lies beyond comes back as infinite.
        distances_mm = _distances_mm(a.elements_mm, b.elements_mm, 1.01 * limit_mm + 1e-3)
        near_mm2 += float(a.areas_mm2[distances_mm <= limit_mm].sum())
    return near_mm2 / float(one.areas_mm2.sum() + other.areas_mm2.sum())


def _distances_mm(points: Points, targets: Points, farthest_mm: float = np.inf) -> npt.NDArray[np.float64]:
    """From each point to the nearest target; infinite where that is `farthest_mm` or more."""
    tree = cKDTree(targets, leafsize=32, balanced_tree=False, compact_nodes=False)
    distances_mm: npt.NDArray[np.float64] = tree.query(points, distance_upper_bound=farthest_mm)[0]
    return distances_mm


def _edges(padded: npt.NDArray[Any], spacing_mm: Triple) -> dict[int, Points]:
    """Edge voxels of each class, in mm from voxel (0, 0, 0) of `padded`."""
    core = padded[1:-1, 1:-1, 1:-1]
    edge = np.zeros(core.shape, bool, order="F")
    for axis, shift in itertools.product(range(3), (0, 2)):
        window = [slice(1, -1)] * 3
        window[axis] = slice(shift, padded.shape[axis] - 2 + shift)
        edge |= core != padded[tuple(window)]
    edge &= core != 0
    at = _where(edge)
    values = core[tuple(at.T)]
    order = np.argsort(values, kind="stable")
    classes, starts = np.unique(values[order], return_index=True)
    parts = np.split(_mm(at[order] + 1, spacing_mm), starts[1:])
    return {int(value): part for value, part in zip(classes, parts, strict=False)}  # no class at all is one empty part


def _mixed_cells(padded: npt.NDArray[Any]) -> tuple[npt.NDArray[np.intp], npt.NDArray[Any]]:
    """Cells whose corners are not all of one class: their first corner (n, 3) in `padded`, and the classes of all 8 (n, 8)."""
    at = _where(_over_corners(np.minimum, padded) != _over_corners(np.maximum, padded))
    return at, np.stack([padded[tuple((at + corner).T)] for corner in CORNERS], axis=1)


def _over_corners(of: Callable[..., npt.NDArray[Any]], values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`np.minimum` or `np.maximum` over the 8 corners of every cell, one axis after the other."""
    for axis in range(3):
        lower, upper = (tuple(part if a == axis else slice(None) for a in range(3)) for part in (slice(-1), slice(1, None)))
        values = of(values[lower], values[upper])
    return values


def _where(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """Indices (n, 3) of the true voxels of an array in Fortran order."""
    return np.stack(np.unravel_index(np.flatnonzero(mask.ravel(order="F")), mask.shape, order="F"), axis=1)


def _mm(indices: npt.NDArray[Any], spacing_mm: Triple) -> Points:
    return np.asarray(indices * np.asarray(spacing_mm), np.float64)


@functools.lru_cache(maxsize=64)
def _area_mm2_of_code(spacing_mm: Triple) -> npt.NDArray[np.float64]:
    """Area of the surface in a cell, by its code: the sum of 2^(7 - i) over the corners i that are inside, (256,)."""
    from monai.metrics.utils import get_code_to_measure_table  # not at the top: it takes longer than all other imports together

    table: npt.NDArray[np.float64] = get_code_to_measure_table(spacing_mm)[0].double().numpy()
    return table
