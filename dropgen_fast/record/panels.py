"""A patch as a picture: image, features, label and prediction, in three planes."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dropgen_fast.page import INK

OVERLAY = 0.65
"""Opacity of a class on the image."""
FAINTEST, BRIGHTEST = 1, 99
"""Percentiles of a feature component that are shown black and full."""
PLANES = ("axial", "coronal", "sagittal")
TILE_IN, DPI = 2.1, 100

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]
Pixels = npt.NDArray[np.uint8]
"""(height, width, 3)."""


def panel(
    image: Floats, features: Floats | None, label: Labels, found: Labels, classes: Sequence[str], *,
    spacing_mm: Sequence[float],
) -> Pixels:
    """A picture of the three planes in which most of the label is: rows are planes, columns what is shown.

    Args:
        image: (D, H, W) in RAS order, of any range.
        features: (C, d, h, w) over the same field of view, shown as colours by `principal_colours`; None: not shown.
        label, found: (D, H, W), class numbers.
        classes: names, background first.
        spacing_mm: (D, H, W), of the image's voxels.
    """
    low, high = np.percentile(image, [0.5, 99.5])
    grey = np.repeat(np.clip((image - low) / max(high - low, 1e-6), 0, 1)[..., None], 3, -1)
    colours = class_colours(len(classes))
    columns = {"image": grey}
    if features is not None:
        columns["features (PCA)"] = _nearest(principal_colours(features), image.shape)
    columns |= {"label": _overlaid(grey, label, colours), "prediction": _overlaid(grey, found, colours)}
    places = _busiest(label if label.any() else found)
    extents_mm = [n * mm for n, mm in zip(image.shape, spacing_mm, strict=True)]
    # Planes across axis 2, 1 and 0; what lies along the rows and the columns of each.
    across = [(2, 1, 0), (1, 2, 0), (0, 2, 1)]
    heights = [extents_mm[up] / extents_mm[right] for _, up, right in across]
    shown = sorted(set(np.unique(label).tolist() + np.unique(found).tolist()) - {0})
    figure = Figure(figsize=(TILE_IN * len(columns) + 0.3, TILE_IN * sum(heights) + 0.35 + 0.22 * -(-len(shown) // 4)),
                    layout="constrained", dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(3, len(columns), squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, ((axis, up, right), plane) in enumerate(zip(across, PLANES, strict=True)):
        for column, (title, volume) in enumerate(columns.items()):
            axes = grid[row][column]
            flat = volume.take(places[axis], axis)  # the axes that are left keep their order
            axes.imshow(flat.transpose(1, 0, 2)[::-1], interpolation="nearest", aspect="auto",
                        extent=(0, extents_mm[right], 0, extents_mm[up]))
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(title, fontsize=9, color=INK)
        grid[row][0].set_ylabel(plane, fontsize=9, color=INK)
    if shown:
        handles = [Patch(color=colours[k], label=classes[k]) for k in shown if k < len(classes)]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def principal_colours(features: Floats) -> Floats:
    """The first three principal components of features (C, d, h, w) as red, green and blue: (d, h, w, 3) in [0, 1].

    A component's sign is such that the largest of its weights is positive. Constant channels have no part in it; fewer than
    three components leave colours black.
    """
    channels, *size = features.shape
    x = features.reshape(channels, -1).astype(np.float64)
    x = x - x.mean(1, keepdims=True)
    scale = x.std(1, keepdims=True)
    x = np.divide(x, scale, out=np.zeros_like(x), where=scale > 1e-12)
    values, vectors = np.linalg.eigh(x @ x.T / x.shape[1])
    result = np.zeros((3, x.shape[1]))
    for k, which in enumerate(np.argsort(values)[::-1][:3]):
        weights = vectors[:, which]
        if values[which] < 1e-9:
            break
        along = weights * np.sign(weights[np.abs(weights).argmax()]) @ x
        low, high = np.percentile(along, [FAINTEST, BRIGHTEST])
        result[k] = np.clip((along - low) / max(high - low, 1e-12), 0, 1)
    return np.ascontiguousarray(np.moveaxis(result.reshape(3, *size), 0, -1), np.float32)


def class_colours(count: int) -> npt.NDArray[np.float64]:
    """(count, 3) in [0, 1]: a colour for each class, the background's black."""
    table = matplotlib.colormaps["tab10" if count <= 11 else "tab20"].resampled(10 if count <= 11 else 20)
    return np.array([[0, 0, 0], *(table(k % table.N)[:3] for k in range(count - 1))])


def _overlaid(grey: Floats, label: Labels, colours: npt.NDArray[np.float64]) -> Floats:
    result = grey.copy()
    inside = label > 0
    result[inside] = (1 - OVERLAY) * grey[inside] + OVERLAY * colours[label[inside] % len(colours)]
    return result


def _nearest(volume: Floats, size: Sequence[int]) -> Floats:
    """(d, h, w, 3) on the grid (D, H, W) over the same field of view: the nearest voxel's value."""
    at = [np.minimum(((np.arange(n) + 0.5) * m / n).astype(int), m - 1)
          for n, m in zip(size, volume.shape[:3], strict=True)]
    return volume[np.ix_(*at)]


def _busiest(label: Labels) -> tuple[int, ...]:
    """For each axis the place at which the most classes are, and of those the most voxels."""
    places = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        areas = np.stack([(label == k).sum(others) for k in np.unique(label) if k] or [np.ones(label.shape[axis])])
        places.append(int(np.argmax((areas > 0).sum(0) + areas.sum(0) / (label.size + 1))))
    return tuple(places)
