"""The vocabulary that the op's backends share: normalizations, and how they are written down for a kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass

FEATURE_NORMS = ("instance", "unit", "standard", "none")


@dataclass(frozen=True)
class Window:
    """Clip the image to [lo, hi], then map lo to 0 and hi to 1 (CT: Hounsfield units)."""

    lo: float
    hi: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lo) and math.isfinite(self.hi) and self.lo < self.hi):
            raise ValueError(f"Window needs finite lo < hi, got lo={self.lo}, hi={self.hi}")


@dataclass(frozen=True)
class ZScore:
    """Subtract a fixed mean and divide by a fixed standard deviation."""

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"ZScore needs a finite mean and a finite std > 0, got mean={self.mean}, std={self.std}")


ImageNorm = str | Window | ZScore
"""\"minmax\", \"none\", a `Window` or a `ZScore`."""


def pack_image_norm(norm: ImageNorm) -> tuple[str, float, float]:
    """(kind, a, b): the form in which a custom op can take a normalization."""
    if isinstance(norm, Window):
        return "window", float(norm.lo), float(norm.hi)
    if isinstance(norm, ZScore):
        return "zscore", float(norm.mean), float(norm.std)
    if norm in ("minmax", "none"):
        return norm, 0.0, 0.0
    raise ValueError(f'image_norm must be "minmax", "none", Window(lo, hi) or ZScore(mean, std), got {norm!r}')
