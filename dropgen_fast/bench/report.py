"""What the suite "op" measured: as rows that are kept, as a table for the screen, as a picture.

A row is one JSON object: `name`, `value`, `unit`, `low` and `high` (quartiles), the device and the software, and what the
value is of. Names are stable: `op.<direction>.<what>.<case>` for a case, and `op.<direction>.<what>` for the geometric mean
over the cases of that run, listed in `cases`; its `low` and `high` are the geometric means of theirs. The layout, where it
is not contiguous, and the backend, where it is not "auto", come last in a name.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dropgen_fast.bench.measure import Spread
from dropgen_fast.bench.op import DIRECTIONS, OTHERS, Case, Measured, OpResult
from dropgen_fast.page import FAINT, INK

Row = dict[str, Any]

TITLES = {"forward": "forward", "forward_read": "forward and one read of it", "backward": "backward",
          "both": "forward and backward"}
WAYS = {"ours": "fuse_streams", "eager": "eager", "compile": "torch.compile", "monai": "MONAI"}
# Okabe and Ito's colours, told apart with every common kind of colour vision.
COLOURS = {"ours": "#0072B2", "eager": "#D55E00", "compile": "#009E73", "monai": "#8A8F98"}
MARKERS = {"ours": "o", "eager": "s", "compile": "D", "monai": "v"}


# ---- rows -----------------------------------------------------------------------------------------------------------


def rows(result: OpResult, facts: Mapping[str, Any]) -> list[Row]:
    """Every row of a run; `facts` go into each: device, versions, commit, date."""
    made = [make_row("device.copy_gb_s", _over_all([m.copy_gb_s for m in result.measured]), "GB/s", facts),
            make_row("device.matrix_gflop_s", result.matrix_gflop_s, "GFLOP/s", facts)]
    for m in result.measured:
        about = {**facts, "case": {**m.case.fields(), "direction": m.direction, "backend": m.backend}, "taken_by": m.taken_by,
                 "rounds": m.rounds, "bytes": m.work.compulsory_bytes, "bytes_moved": m.work.bytes_moved,
                 "copy_gb_s": m.copy_gb_s.median}
        for what, (spread, unit, way) in _values(m).items():
            made.append(make_row(f"op.{m.direction}.{what}.{m.case.name}{_backend(m)}", spread, unit,
                             {**about, "peak_bytes": m.peak_bytes[way]}))
    for group in _groups(result.measured):
        first = group[0]
        layout = "" if first.case.layout == "contiguous" else f".{first.case.layout}"
        about = {**facts, "cases": [m.case.name for m in group], "backend": first.backend}
        for what, spread in _means(group).items():
            made.append(make_row(f"op.{first.direction}.{what}{layout}{_backend(first)}", spread, "ratio", about))
    return made


def make_row(name: str, spread: Spread, unit: str, about: Mapping[str, Any]) -> Row:
    """A row of any suite; of a ratio it says whether anything may be claimed of it."""
    row = {"name": name, "value": spread.median, "unit": unit, "low": spread.low, "high": spread.high, **about}
    if ".x_" in name or "_over_" in name:
        row["claim"] = spread.verdict() == "claim"
    return row


def _values(m: Measured) -> dict[str, tuple[Spread, str, str]]:
    """What a case has: spread, unit, and the way whose peak memory goes with it."""
    values = {"share_of_bandwidth": (m.share, "ratio", "ours"), "gb_s": (m.gb_s, "GB/s", "ours")}
    values |= {"ms" if way == "ours" else f"ms_{way}": (spread, "ms", way) for way, spread in m.ms.items()}
    return values | {f"x_{way}": (spread, "ratio", "ours") for way, spread in m.ratios.items()}


def _backend(m: Measured) -> str:
    return "" if m.backend == "auto" else f".{m.backend}"


def _groups(measured: Sequence[Measured]) -> list[list[Measured]]:
    """The cases of each direction and backend."""
    groups: dict[tuple[str, str], list[Measured]] = {}
    for direction in DIRECTIONS:
        for m in measured:
            if m.direction == direction:
                groups.setdefault((direction, m.backend), []).append(m)
    return list(groups.values())


def _means(group: Sequence[Measured]) -> dict[str, Spread]:
    """Geometric means over the cases, of what every one of them has."""
    means = {"share_of_bandwidth": Spread.geometric_mean(m.share for m in group)}
    for way in OTHERS:
        if all(way in m.ratios for m in group):
            means[f"x_{way}"] = Spread.geometric_mean(m.ratios[way] for m in group)
    return means


def _over_all(spreads: Sequence[Spread]) -> Spread:
    return Spread.of([s.median for s in spreads])


# ---- screen ---------------------------------------------------------------------------------------------------------


def screen(result: OpResult, facts: Mapping[str, Any]) -> str:
    """One screen: what was measured on what, a table for each direction, how to read it."""
    lines = [*head(result, facts), *op_lines(result), "",
             f"Median of {_rounds(result.measured)} rounds (quartiles). MB: 10⁶ bytes that must move at least. "
             "× eager: its time over ours.",
             "≈ 1: the quartiles include 1. unclear: they are wider than the distance from 1, so nothing is claimed."]
    return "\n".join([*lines, *(f"{WAYS[way]} could not be run: {why}" for way, why in result.missing.items())])


def head(result: OpResult, facts: Mapping[str, Any]) -> list[str]:
    """The machine, the software, what a copy and a matrix product reached."""
    copy = _over_all([m.copy_gb_s for m in result.measured])
    hardware, software = (", ".join(f"{name} {facts[name]}" for name in names if facts[name]) for names in (
        ("cuda", "driver"), ("dropgen_fast", "torch", "triton", "monai")))
    commit = (facts["commit"] or "unknown")[:12] + ("-dirty" if str(facts["commit"]).endswith("-dirty") else "")
    return [
        f"device   {facts['device']}, {_threads(facts)}, load {facts['load_average']} at the start{hardware and f', {hardware}'}",
        f"with     {software}, commit {commit}",
        f"copy     {_range(copy)} GB/s read and written; float32 matrix product {_number(result.matrix_gflop_s.median)} GFLOP/s",
    ]


def op_lines(result: OpResult) -> list[str]:
    """The op: a table for each direction."""
    takers = sorted({f"{m.backend} is {m.taken_by}" for m in result.measured if m.backend != m.taken_by})
    lines = ["; ".join([f"op       fuse_streams, {_problem(result.measured[0].case)}", *takers])]
    for direction in DIRECTIONS:
        groups = [g for g in _groups(result.measured) if g[0].direction == direction]
        lines += ["", _line(TITLES[direction], "ms", "MB", "share of copy", *(f"× {WAYS[way]}" for way in OTHERS))]
        for group in groups:
            named = f", {group[0].backend}" if len(groups) > 1 or group[0].backend != "auto" else ""
            lines += [_measured_line(m, named) for m in group]
            if len(group) > 1:
                lines.append(_mean_line(group, named))
    return lines


def _measured_line(m: Measured, named: str) -> str:
    return _line(_label(m.case) + named, _number(m.ms["ours"].median), _number(m.work.compulsory_bytes / 1e6), _percent(m.share),
                 *(ratio_text(m.ratios.get(way)) for way in OTHERS))


def _mean_line(group: Sequence[Measured], named: str) -> str:
    means = _means(group)
    return _line("geometric mean" + named, "", "", _percent(means["share_of_bandwidth"]),
                 *(ratio_text(means.get(f"x_{way}")) for way in OTHERS))


def _label(case: Case) -> str:
    return f"{case.dtype}, stride {case.stride}"


def _threads(facts: Mapping[str, Any]) -> str:
    return "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"


def _problem(case: Case) -> str:
    """What the cases of a run have in common."""
    size = "×".join(map(str, case.size))
    return f"N = {case.batch}, {size} voxels, 1 + {case.feature_channels} channels, p = {case.p:g}, {case.layout}"


def _line(*cells: str) -> str:
    first, *others = cells
    return " ".join([f"{first:<30}", *(f"{cell:>{width}}" for cell, width in zip(others, (6, 6, 15, 19, 19, 19), strict=True))])


def _rounds(measured: Sequence[Measured]) -> str:
    counts = [m.rounds for m in measured]
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def _number(value: float) -> str:
    """Three digits that matter."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 4
    return f"{value:.{digits}f}"


def _range(spread: Spread) -> str:
    return f"{_number(spread.median)} ({_number(spread.low)}-{_number(spread.high)})"


def _percent(spread: Spread) -> str:
    return f"{100 * spread.median:.0f} % ({100 * spread.low:.0f}-{100 * spread.high:.0f})"


def ratio_text(spread: Spread | None) -> str:
    """A ratio and its quartiles; no number where its spread allows none."""
    if spread is None:
        return "-"
    spread_text = f"({_number(spread.low)}-{_number(spread.high)})"
    verdict = spread.verdict()
    return _range(spread) if verdict == "claim" else f"{'≈ 1' if verdict == 'one' else 'unclear'} {spread_text}"


# ---- picture --------------------------------------------------------------------------------------------------------


def picture(result: OpResult, facts: Mapping[str, Any]) -> bytes:
    """A roofline and the bandwidth of every case, as PNG; of several backends, the first."""
    first = result.measured[0].backend
    measured = [m for m in result.measured if m.backend == first]
    count = len(measured) + len({m.direction for m in measured})
    figure = Figure(figsize=(14, max(5.5, 1.9 + 0.24 * count)), layout="constrained")
    roof, bars = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _draw_roofline(roof, measured, result.matrix_gflop_s.median)
    _draw_bandwidth(bars, measured)
    figure.suptitle(f"fuse_streams on {facts['device']}, {_threads(facts)}: {_problem(measured[0].case)}",
                    fontsize=12, color=INK, x=0.01, ha="left")
    handles = [Line2D([], [], linestyle="", marker=MARKERS[way], color=COLOURS[way], label=title)
               for way, title in WAYS.items() if any(way in m.ms for m in measured)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_roofline(axes: Axes, measured: Sequence[Measured], matrix_gflop_s: float) -> None:
    """Operations per second over operations per compulsory byte: what is on the slanted line moves at the copy's speed."""
    copy_gb_s = _over_all([m.copy_gb_s for m in measured]).median
    shown = [m for m in measured if m.direction in ("forward", "backward") and m.work.operations]
    intensities = [m.work.operations / m.work.compulsory_bytes for m in shown]
    ridge = matrix_gflop_s / copy_gb_s
    left, right = min([*intensities, ridge]) / 2.5, max([*intensities, ridge]) * 3
    axes.plot([left, ridge, right], [left * copy_gb_s, matrix_gflop_s, matrix_gflop_s], color=INK, linewidth=1.6)
    lowest = left * copy_gb_s
    for m, x in zip(shown, intensities, strict=True):
        for way in ("ours", "eager"):
            y = m.work.operations / m.ms[way].median / 1e6
            lowest = min(lowest, y)
            axes.plot(x, y, MARKERS[way], color=COLOURS[way], markersize=7, alpha=0.9,
                      fillstyle="full" if m.direction == "forward" else "none")
    _name_columns(axes, [m.case for m in shown], intensities)
    top = matrix_gflop_s * 2.2
    bottom = lowest * (lowest / top) ** 0.55  # room for the names below the points
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    axes.annotate(f"float32 matrix product, {_number(matrix_gflop_s)} GFLOP/s", (right, matrix_gflop_s), xytext=(-4, 5),
                  textcoords="offset points", ha="right", color=INK, fontsize=9)
    start = left * 1.1
    axes.text(start, start * copy_gb_s * 1.12, f"copy, {_number(copy_gb_s)} GB/s", ha="left", va="bottom", color=INK,
              fontsize=9, rotation=math.degrees(math.atan(copy_gb_s)), rotation_mode="anchor", transform_rotates_text=True)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("10⁹ operations per second")
    axes.set_title("roofline: filled forward, hollow backward", fontsize=10.5, loc="left", color=INK)
    _style(axes, "both")


def _name_columns(axes: Axes, shown: Sequence[Case], intensities: Sequence[float]) -> None:
    """Below the points, the cases that stand at (nearly) the same place."""
    columns: list[tuple[float, dict[str, set[int]]]] = []
    for x, case in sorted(zip(intensities, shown, strict=True), key=lambda pair: pair[0]):
        if not columns or x > 1.15 * columns[-1][0]:
            columns.append((x, {}))
        columns[-1][1].setdefault(case.dtype, set()).add(case.stride)
    for x, named in columns:
        lines = [f"{dtype}, stride {', '.join(map(str, sorted(strides)))}" for dtype, strides in named.items()]
        axes.text(x, 0.02, "\n".join(lines), transform=axes.get_xaxis_transform(), rotation=90, ha="center", va="bottom",
                  fontsize=8.5, color=INK)


def _draw_bandwidth(axes: Axes, measured: Sequence[Measured]) -> None:
    """Compulsory bytes over time of every case and way, with quartiles, beside what the copy reached."""
    labels: list[tuple[float, str]] = []
    y = 0.0
    for direction in DIRECTIONS:
        group = [m for m in measured if m.direction == direction]
        axes.text(0.005, y, TITLES[direction], transform=axes.get_yaxis_transform(), va="center", fontsize=9.5, weight="bold",
                  color=INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1}, zorder=4)
        for m in group:
            y += 1
            labels.append((y, _label(m.case)))
            axes.axhline(y, color=FAINT, linewidth=0.8, zorder=0)
            for way, ms in reversed(list(m.ms.items())):
                at, low, high = (m.work.compulsory_bytes / value / 1e6 for value in (ms.median, ms.high, ms.low))
                axes.plot([low, high], [y, y], color=COLOURS[way], linewidth=2.2, alpha=0.5, zorder=2)
                axes.plot(at, y, MARKERS[way], color=COLOURS[way], markersize=6, zorder=3)
        y += 1.2
    copy = _over_all([m.copy_gb_s for m in measured])
    axes.axvline(copy.median, color=INK, linewidth=1.6, zorder=1)
    axes.text(copy.median, -1.0, f"copy, {_number(copy.median)} GB/s", ha="right", va="bottom", fontsize=9, color=INK)
    axes.set_yticks([at for at, _ in labels], [text for _, text in labels], fontsize=9)
    axes.set(xscale="log", ylim=(y - 0.4, -0.9))
    axes.set_xlabel("GB/s of what must move (bar: quartiles)")
    axes.tick_params(axis="y", length=0)
    _style(axes, "x")


def _style(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#8a949e")
    axes.tick_params(colors=INK)
    axes.grid(axis=grid, color=FAINT, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
