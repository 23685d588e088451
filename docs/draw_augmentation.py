"""Draw the pictures of docs/augmentation.md: ``python docs/draw_augmentation.py`` writes them beside the page.

Every voxel shown comes out of `dropgen_fast.data.transforms`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes

from dropgen_fast.data.transforms import gibbs_ringing, low_resolution

OURS, MONAI, INK = "#2f6db5", "#d9822b", "#222222"
EDGE = 45  # voxels of the low resolution picture
COARSE = 5  # of its voxels make a coarse one
BINS = 12  # of the spectrum in the Gibbs picture
RADIUS = 3.2  # of its masks, in bins


def draw(folder: Path) -> list[Path]:
    """Write both pictures into a folder; their paths."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.titlesize": 10})
    return [_save(_low_resolution(), folder / "augmentation_low_resolution.png"),
            _save(_gibbs(), folder / "augmentation_gibbs.png")]


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=100, facecolor="white")
    plt.close(figure)
    return path


def _slices(image: np.ndarray) -> torch.Tensor:
    """A slice (H, W) as a batch."""
    return torch.from_numpy(image.astype(np.float32))[None, None, None]


# ---- low resolution ----------------------------------------------------------------------------------------------------


def _low_resolution() -> plt.Figure:
    y, x = np.mgrid[:EDGE, :EDGE] - (EDGE - 1) / 2
    image = 0.25 + 0.75 / (1 + np.exp((np.hypot(x, y) - 11) / 1.2))
    zoom = torch.tensor([1 / COARSE])
    results = {like: low_resolution(_slices(image), zoom, like_monai=like)[0, 0, 0].numpy() for like in (False, True)}
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.1), width_ratios=[1, 1, 1, 1.7], layout="constrained")
    for panel, title, shown in ((axes[0], "before", image), (axes[1], "low resolution", results[False]),
                                (axes[2], "with like_monai", results[True])):
        panel.imshow(shown, cmap="gray", vmin=0, vmax=1)
        panel.contour(image, [0.625], colors=[MONAI if panel is axes[2] else OURS], linewidths=1.2, linestyles="dashed")
        panel.set(title=title, xticks=[], yticks=[])
    middle = EDGE // 2
    axes[3].plot(image[middle], color=INK, linewidth=1, label="before")
    axes[3].plot(results[False][middle], color=OURS, label="low resolution")
    axes[3].plot(results[True][middle], color=MONAI, label="with like_monai")
    axes[3].set(title=f"the middle row; a coarse voxel is {COARSE} of these", xlabel="voxel", ylim=(0.15, 1.25))
    axes[3].legend(loc="upper center", ncols=3, frameon=False, fontsize=9)
    axes[3].spines[["top", "right"]].set_visible(False)
    return figure


# ---- Gibbs ringing -----------------------------------------------------------------------------------------------------


def _gibbs() -> plt.Figure:
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
    alpha = 1 - RADIUS / (BINS * np.sqrt(2) / 2)
    for panel, like_monai, title in ((axes[0], False, "what is kept of each frequency"), (axes[1], True, "with like_monai")):
        _show_mask(panel, _kept(alpha, like_monai), 0.5 if like_monai else 0.0)
        panel.set_title(title)
    y, x = np.mgrid[:64, :64] - 31.5
    image = np.where((np.abs(x) < 18) & (np.abs(y) < 12), 0.9, 0.15)
    ringing = gibbs_ringing(_slices(image), torch.tensor([0.6]))[0, 0, 0].numpy()
    for panel, title, shown in ((axes[2], "before", image), (axes[3], "Gibbs ringing, alpha 0.6", ringing)):
        panel.imshow(shown, cmap="gray", vmin=0, vmax=1)
        panel.set(title=title, xticks=[], yticks=[])
    return figure


def _kept(alpha: float, like_monai: bool) -> np.ndarray:
    """(BINS, BINS), zero frequency in the middle: the spectrum of what becomes of one bright voxel, whose own is 1 everywhere."""
    image = np.zeros((BINS, BINS))
    image[0, 0] = 1
    result = gibbs_ringing(_slices(image), torch.tensor([alpha], dtype=torch.float64), like_monai=like_monai)[0, 0, 0]
    return np.fft.fftshift(np.fft.fft2(result.numpy())).real


def _show_mask(panel: Axes, kept: np.ndarray, offset: float) -> None:
    """The weights, and the circle that was meant: about zero frequency or, in MONAI, `offset` bins below it."""
    lowest = -(BINS // 2)
    panel.imshow(kept, cmap="Blues", vmin=0, vmax=1.6, extent=(lowest - 0.5, -lowest - 0.5, -lowest - 0.5, lowest - 0.5))
    panel.add_patch(plt.Circle((-offset, -offset), RADIUS, fill=False, color=MONAI if offset else OURS, linewidth=1.5))
    for (row, column), weight in np.ndenumerate(kept.round(3)):
        if 0 < weight < 1:
            panel.text(column + lowest, row + lowest, "½", ha="center", va="center", fontsize=8)
    panel.plot(0, 0, "+", color=INK, markersize=9)
    panel.set(xticks=[lowest, 0, -lowest - 1], yticks=[lowest, 0, -lowest - 1], xlabel="frequency, bins")


if __name__ == "__main__":
    for written in draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent):
        print(written)
