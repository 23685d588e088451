"""Draw the pictures of docs/fuse_streams.md: ``python docs/draw_fuse_streams.py`` writes them beside the page."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

IMAGE, FEATURES, DROPPED, INK = "#d9822b", "#2f6db5", "#b8b8b8", "#222222"
STRIDE = 2  # of the features in both pictures
Point = tuple[float, float]


def draw(folder: Path) -> list[Path]:
    """Write both pictures into a folder; their paths."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK})
    return [_save(_passes(), folder / "fuse_streams_passes.png"),
            _save(_interpolation(), folder / "fuse_streams_interpolation.png")]


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)
    return path


# ---- the two passes: a row per channel of one sample -----------------------------------------------------------------


def _passes() -> plt.Figure:
    figure, axes = _canvas(13.0, 8.0)
    rows = [("image", 4.0), ("feature 0", 0.0), ("feature 1", 4.0), ("feature 2", 0.0), ("feature 3", 0.0), ("feature 4", 4.0),
            ("padding", None)]
    for left, width, colour, title, note in (
        (3.05, 3.15, "#eef3fa", "pass 1: statistics", "reads the image and the kept features"),
        (6.45, 6.45, "#fdf3e7", "pass 2: the result", "reads them again, writes each voxel of the result once"),
    ):
        axes.add_patch(Rectangle((left, 0.1), width, 7.75, facecolor=colour, edgecolor="none"))
        axes.text(left + width / 2, 7.55, title, ha="center", weight="bold", size=12)
        axes.text(left + width / 2, 7.25, note, ha="center", size=9.5)
    axes.text(0.95, 7.55, "inputs", ha="center", weight="bold", size=12)
    axes.text(2.35, 7.55, "draw s", ha="center", weight="bold", size=12)
    axes.text(2.35, 7.25, "0 or 1 / (1 − p)", ha="center", size=9.5)
    for i, (name, scale) in enumerate(rows):
        _channel(axes, 6.55 - 0.98 * i, name, scale)
    axes.text(12.35, 7.05, "result", ha="center", weight="bold", size=10)
    return figure


def _channel(axes: Axes, y: float, name: str, scale: float | None) -> None:
    """One channel's way from its input (left) to the result (right), at height y."""
    image, kept = name == "image", bool(scale)
    cells = 8 if image else 8 // STRIDE
    shades = np.random.default_rng(len(name) + int(10 * y)).uniform(0.2, 1.0, (cells, cells))
    colour = DROPPED if not kept else IMAGE if image else FEATURES
    if scale is None:
        axes.text(0.95, y, "no input", ha="center", va="center", size=9.5, style="italic")
        axes.text(9.0, y, "channel_multiple: zeros up to a round number of channels", ha="center", va="center", size=9.5)
    else:
        axes.text(0.42, y, name, ha="center", va="center", size=10, rotation=0)
        _tile(axes, (1.25, y), shades, colour, kept)
        axes.plot([1.7, 2.05], [y, y], color=colour, lw=1.3)
        axes.add_patch(Rectangle((2.1, y - 0.22), 0.5, 0.44, facecolor="white" if kept else "#e6e6e6", edgecolor=INK, lw=0.9))
        axes.text(2.35, y, f"{scale:g}", ha="center", va="center", weight="bold")
    if kept:
        _arrow(axes, (2.65, y), (3.2, y), colour)
        _box(axes, 3.25, 2.75, y, "min, max\n→ shift, gain" if image else "mean, variance\n→ shift, gain", colour)
        _arrow(axes, (6.05, y), (6.6, y), colour)
        steps = "(x − shift) · gain · s" if image else "8 neighbours → interpolate → (f − shift) · gain · s"
        _box(axes, 6.65, 4.65, y, steps, colour)
        _arrow(axes, (11.35, y), (11.95, y), colour)
    elif scale is not None:
        axes.text(4.62, y, "not read", ha="center", va="center", style="italic", color="#666666")
        axes.text(9.0, y, "input not read; result zeros", ha="center", va="center", size=10, style="italic", color="#666666")
    _tile(axes, (12.35, y), shades if image else _stretch(shades), colour, kept)


def _stretch(shades: np.ndarray) -> np.ndarray:
    """Interpolated to the grid of the image."""
    matrix = np.zeros((8, len(shades)))
    for i in range(8):
        for a, weight in _taps(i):
            matrix[i, a] += weight
    return matrix @ shades @ matrix.T


def _tile(axes: Axes, centre: Point, shades: np.ndarray, colour: str, kept: bool, side: float = 0.76) -> None:
    """A channel as a grid of voxels."""
    left, bottom, cells = centre[0] - side / 2, centre[1] - side / 2, len(shades)
    step = side / cells
    for r in range(cells):
        for c in range(cells):
            corner = (left + c * step, bottom + (cells - 1 - r) * step)
            look = {"facecolor": colour, "alpha": float(shades[r, c])} if kept else {"facecolor": "white"}
            axes.add_patch(Rectangle(corner, step, step, edgecolor="none", **look))
    for k in range(cells + 1):
        axes.plot([left + k * step] * 2, [bottom, bottom + side], color="white" if kept else DROPPED, lw=0.6)
        axes.plot([left, left + side], [bottom + k * step] * 2, color="white" if kept else DROPPED, lw=0.6)
    axes.add_patch(Rectangle((left, bottom), side, side, facecolor="none", edgecolor=colour, lw=1.2))
    if not kept:
        axes.text(*centre, "0" if centre[0] > 10 else "×", ha="center", va="center", size=15, color="#777777", weight="bold")


# ---- the interpolation and its transpose, in two dimensions ----------------------------------------------------------


def _interpolation() -> plt.Figure:
    figure, axes = _canvas(13.0, 6.1)
    axes.text(3.15, 5.75, "forward: an output voxel reads its neighbours", ha="center", weight="bold", size=12)
    axes.text(9.75, 5.75, "backward: a coarse voxel gathers what it reached", ha="center", weight="bold", size=12)
    _grids(axes, 0.9)
    _grids(axes, 7.5)
    voxel = (4, 3)
    for a, wa in _taps(voxel[0]):
        for b, wb in _taps(voxel[1]):
            _weighted(axes, _coarse(0.9, a, b), _fine(0.9, *voxel), wa * wb)
    axes.plot(*_fine(0.9, *voxel), "s", color=IMAGE, ms=13, zorder=4)
    target = (1, 2)
    for i in range(8):
        for j in range(8):
            weight = sum(w for a, w in _taps(i) if a == target[0]) * sum(w for b, w in _taps(j) if b == target[1])
            if weight:
                (x0, y0), (x1, y1) = _fine(7.5, i, j), _coarse(7.5, *target)
                axes.plot([x0, x1], [y0, y1], color=IMAGE, lw=0.7 + 2 * weight, zorder=2)
                axes.plot(x0, y0, "s", color=IMAGE, ms=5 + 14 * weight, zorder=3)
    axes.plot(*_coarse(7.5, *target), "o", color=FEATURES, ms=19, zorder=4)
    axes.text(3.15, 0.62, "weights sum to one", ha="center", size=10)
    axes.text(9.75, 0.62, "the larger the square, the larger its weight; one fixed order, no atomics", ha="center", size=10)
    axes.text(6.5, 0.2, "circles: coarse voxels (d, h, w)    ·    squares: output voxels (D, H, W)    ·    "
              "drawn in 2D at stride 2; in 3D eight neighbours", ha="center", size=10)
    return figure


def _taps(i: int, size: int = 8, coarse: int = 8 // STRIDE) -> list[tuple[int, float]]:
    """(coarse voxel, weight) of an output voxel along an axis: half-pixel centres, edges clamped."""
    source = max((i + 0.5) * coarse / size - 0.5, 0.0)
    lower = int(source)
    upper = min(lower + 1, coarse - 1)
    return [(lower, 1 - (source - lower)), (upper, source - lower)] if upper != lower else [(lower, 1.0)]


def _fine(left: float, i: int, j: int, side: float = 4.5) -> Point:
    return left + (j + 0.5) * side / 8, 0.95 + (i + 0.5) * side / 8


def _coarse(left: float, a: int, b: int) -> Point:
    (x0, y0), (x1, y1) = _fine(left, STRIDE * a, STRIDE * b), _fine(left, STRIDE * a + STRIDE - 1, STRIDE * b + STRIDE - 1)
    return (x0 + x1) / 2, (y0 + y1) / 2


def _grids(axes: Axes, left: float) -> None:
    for i in range(8):
        for j in range(8):
            axes.plot(*_fine(left, i, j), "s", color="#d0d0d0", ms=5)
    for a in range(8 // STRIDE):
        for b in range(8 // STRIDE):
            axes.plot(*_coarse(left, a, b), "o", color=FEATURES, ms=10, alpha=0.45)


def _weighted(axes: Axes, start: Point, end: Point, weight: float) -> None:
    axes.plot([start[0], end[0]], [start[1], end[1]], color=FEATURES, lw=1 + 4 * weight, zorder=2)
    axes.plot(*start, "o", color=FEATURES, ms=19, zorder=3)
    outward = 0.36 if start[1] > end[1] else -0.36
    axes.text(start[0], start[1] + outward, f"{16 * weight:.0f}/16", ha="center", va="center", size=11, color=FEATURES,
              weight="bold")


# ---- pieces ----------------------------------------------------------------------------------------------------------


def _canvas(width: float, height: float) -> tuple[plt.Figure, Axes]:
    """A figure whose coordinates are inches."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def _box(axes: Axes, left: float, width: float, y: float, text: str, colour: str) -> None:
    axes.add_patch(FancyBboxPatch((left, y - 0.3), width, 0.6, boxstyle="round,pad=0.02", facecolor="white",
                                  edgecolor=colour, lw=1.3))
    axes.text(left + width / 2, y, text, ha="center", va="center", size=10)


def _arrow(axes: Axes, start: Point, end: Point, colour: str) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=colour, lw=1.3, shrinkA=0, shrinkB=0))


if __name__ == "__main__":
    for written in draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent):
        print(written)
