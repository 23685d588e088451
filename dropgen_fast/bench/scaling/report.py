"""What `scaling` measured: as rows, as a table for the screen, as a picture that is drawn from rows."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from dropgen_fast.bench.measure import Spread
from dropgen_fast.bench.report import COLOURS, FAINT, INK, Row, make_row
from dropgen_fast.bench.scaling.cases import AXES, Axis, Base, Point
from dropgen_fast.bench.scaling.growth import exponents, over_model

TITLES: dict[Axis, str] = {"patch": "patch, edge in voxels", "batch": "patches a batch", "channels": "feature channels",
                           "classes": "classes", "processes": "processes"}
OF: dict[Axis, str] = {"patch": "voxels", "channels": "1 + channels"}
"""What an exponent is of, where not of the value itself."""


@dataclass(frozen=True)
class Result:
    """Points by axis; other values by name, with their units; the base cases that they belong to."""

    base: Base
    points: Mapping[Axis, Sequence[Point]]
    checks: Mapping[str, tuple[Spread, str]] = field(default_factory=dict)
    checked: Base | None = None
    """The case of the checks."""


def together(parts: Sequence[Result]) -> Result:
    """Parts of one run as one, at least one."""
    return dataclasses.replace(parts[0], points={axis: points for part in parts for axis, points in part.points.items()},
                               checks={name: value for part in parts for name, value in part.checks.items()})


def rows(result: Result, facts: Mapping[str, Any]) -> list[Row]:
    """A row for each value; one whose point did not fit has no value and says why in `problem`."""
    made: list[Row] = []
    for axis, points in result.points.items():
        ratios = over_model(points, result.base)
        for point in points:
            about = {**facts, "case": dataclasses.asdict(point.case.base), "size": point.case.size, "rounds": len(point.ms)}
            name = f"scaling.{axis}.{point.case.value}"
            made += [_or_problem(f"{name}.ms", Spread.of(point.ms) if point.ms else None, "ms", point, about),
                     _or_problem(f"{name}.peak_gib", _gib(point), "GiB", point, about)]
            if point.case.value in ratios and point.case.base != result.base:
                made.append(make_row(f"{name}.ms_over_model", ratios[point.case.value], "ratio", about))
            made += [make_row(f"{name}.{what}", spread, unit, about) for what, (spread, unit) in point.more.items()]
        about = {**facts, "case": dataclasses.asdict(result.base), "values": [point.case.value for point in points],
                 "of": OF.get(axis, axis)}
        made += [make_row(f"scaling.{axis}.exponent_{what}", spread, "exponent", about)
                 for what, spread in exponents(points).items()]
    about = {**facts, "case": dataclasses.asdict(result.checked or result.base)}
    return made + [make_row(f"scaling.{name}", spread, unit, about) for name, (spread, unit) in result.checks.items()]


def _gib(point: Point) -> Spread | None:
    if point.peak_bytes is None:
        return None
    gib = point.peak_bytes / 2**30
    return Spread(gib, gib, gib)


def _or_problem(name: str, spread: Spread | None, unit: str, point: Point, about: Mapping[str, Any]) -> Row:
    if spread is not None:
        return make_row(name, spread, unit, about)
    return {"name": name, "value": None, "unit": unit, "low": None, "high": None, "problem": point.problem or "not known here",
            **about}


def screen(result: Result, facts: Mapping[str, Any]) -> str:
    """For a terminal: a table for each axis, then the checks."""
    base = result.base
    lines = [f"device   {facts['device']}, {facts['threads']} threads, torch {facts['torch']}",
             f"base     {base.batch} patches of {base.patch}³, {base.channels} feature channels, {base.classes} classes, "
             f"{base.precision}, network {' '.join(base.network_options) or 'of the paper'}"]
    for axis, points in result.points.items():
        lines += ["", f"{TITLES[axis]:<24}{'ms':>10}{'quartiles':>20}{'peak GiB':>10}{'× the model':>14}"]
        ratios, slopes = over_model(points, base), exponents(points)
        lines += [_line(point, ratios.get(point.case.value)) for point in points]
        told = (f"{what} {_range(slope)}" for what, slope in slopes.items())
        if slopes:
            lines.append(f"exponent of {OF.get(axis, axis)}: {', '.join(told)}")
    if result.checks:
        lines += ["", "the model's parts"]
        lines += [f"{name:<40}{_range(spread)} {unit}" for name, (spread, unit) in result.checks.items()]
    return "\n".join([*lines, "", "Median (quartiles) over the rounds. × the model: time over the base's time times the ratio of "
                      "the convolutions' operations."])


def _line(point: Point, ratio: Spread | None) -> str:
    if point.problem:
        gib = f", peak {point.peak_bytes / 2**30:.2f} GiB" if point.peak_bytes else ""
        return f"{point.case.value:<24}{point.problem}{gib}"
    ms = Spread.of(point.ms)
    line = (f"{point.case.value:<24}{ms.median:>10.1f}{f'{ms.low:.1f} – {ms.high:.1f}':>20}"
            f"{'-' if point.peak_bytes is None else f'{point.peak_bytes / 2**30:.2f}':>10}"
            f"{'' if ratio is None else f'{ratio.median:.2f}':>14}")
    return "\n".join([line, *(f"    {name:<30}{_range(spread)} {unit}" for name, (spread, unit) in point.more.items())])


def _range(spread: Spread) -> str:
    return f"{spread.median:.3g} ({spread.low:.3g} – {spread.high:.3g})"


# ---- the picture ---------------------------------------------------------------------------------------------------------


def picture(kept: Sequence[Row]) -> bytes:
    """Time above, memory below, against each axis that the rows have, all logarithmic: a PNG.

    Of rows of one name the last counts. A point that did not fit is a cross on the lower edge.
    """
    latest = {row["name"]: row for row in kept}
    axes = [axis for axis in AXES if any(name.startswith(f"scaling.{axis}.") for name in latest)]
    figure = Figure(figsize=(2.9 * max(len(axes), 1) + 0.6, 5.6), layout="constrained")
    grid = figure.subplots(2, max(len(axes), 1), squeeze=False, sharey="row")
    for column, axis in enumerate(axes):
        _draw(grid[0][column], latest, axis, "ms", COLOURS["ours"])
        _draw(grid[1][column], latest, axis, "peak_gib", COLOURS["eager"])
        grid[1][column].set_xlabel(TITLES[axis], color=INK)
    grid[0][0].set_ylabel("ms a step", color=INK)
    grid[1][0].set_ylabel("peak GiB", color=INK)
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    return png.getvalue()


def _draw(axes: Axes, latest: Mapping[str, Row], axis: Axis, what: str, colour: str) -> None:
    start, end = f"scaling.{axis}.", f".{what}"
    found = sorted((int(name[len(start):-len(end)]), row) for name, row in latest.items()
                   if name.startswith(start) and name.endswith(end) and name[len(start):-len(end)].isdigit())
    there = [(row["size"], row) for _, row in found if row["value"] is not None]
    if there:
        sizes, values = [size for size, _ in there], [row["value"] for _, row in there]
        errors = [[row["value"] - row["low"] for _, row in there], [row["high"] - row["value"] for _, row in there]]
        axes.errorbar(sizes, values, yerr=errors, fmt="o-", color=colour, markersize=5, linewidth=1.4, capsize=3)
    missing = [row["size"] for _, row in found if row["value"] is None]
    if missing:
        axes.plot(missing, [0.03] * len(missing), "x", color=INK, transform=axes.get_xaxis_transform())
    axes.set(xscale="log", yscale="log")
    slope = latest.get(f"scaling.{axis}.exponent_{'ms' if what == 'ms' else 'gib'}")
    if slope is not None:
        axes.set_title(f"∝ ({OF.get(axis, axis)})^{slope['value']:.2f}", fontsize=10, color=INK, loc="left")
    axes.xaxis.set_major_locator(FixedLocator([row["size"] for _, row in found]))
    names = {row["size"]: str(value) for value, row in found}
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: names.get(round(at), "")))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.tick_params(colors=INK, labelsize=8.5)
