"""How fast what was measured grows, and how much faster than the operations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dropgen_fast.bench.measure import Spread
from dropgen_fast.bench.scaling.cases import Base, Point


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """k of the least squares of log value = k · log size + constant."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def exponents(points: Sequence[Point]) -> dict[str, Spread]:
    """Of time (over the rounds) and of memory (one number) of an axis, over its points that were timed, and weighed; none of
    fewer than two.
    """
    made: dict[str, Spread] = {}
    timed = [point for point in points if point.ms and not point.problem]
    if len(timed) > 1:
        sizes = [point.case.size for point in timed]
        made["ms"] = Spread.of(exponent(sizes, row) for row in zip(*(point.ms for point in timed), strict=True))
    weighed = [point for point in points if point.peak_bytes]
    if len(weighed) > 1:
        slope = exponent([p.case.size for p in weighed], [float(p.peak_bytes or 0) for p in weighed])
        made["gib"] = Spread(slope, slope, slope)
    return made


def over_model(points: Sequence[Point], base: Base) -> dict[int, Spread]:
    """Time of each point over that which the base's time and the operations of both let expect; where the base was measured."""
    reference = next((p for p in points if p.case.base == base and p.ms and not p.problem), None)
    if reference is None or reference.case.axis == "processes":  # whose work is the same everywhere
        return {}
    return {p.case.value: Spread.of(
        a / b * base.operations() / p.case.base.operations() for a, b in zip(p.ms, reference.ms, strict=True))
        for p in points if p.ms and not p.problem}
