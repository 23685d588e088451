"""The page of a run: what came out, how it went, what it was; one file that needs no other."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import dropgen_fast
from dropgen_fast.files import write_atomically
from dropgen_fast.page import COLOURS, document, picture, plain_axes, to_png

Rows = Sequence[Mapping[str, Any]]
FEW = 20
"""Losses beyond which a running mean is drawn over them."""
MANY = 8
"""Classes beyond which their curves have no names in the chart; the table has them all."""


def write_page(path: Path, name: str, settings: Mapping[str, Any], rows: Rows, panels: Sequence[Path]) -> None:
    """Write the page of a run.

    Args:
        path: of the HTML file.
        name: of the run.
        settings: all of them.
        rows: of metrics.jsonl.
        panels: pictures of validation cases (PNG files), named by case.
    """
    method = settings.get("model", {}).get("method", "")
    validations = [row for row in rows if "validation_dice" in row]
    logged = [row for row in rows if "loss" in row]
    versions = f"dropgen_fast {dropgen_fast.__version__}, torch {torch.__version__}"
    parts = [f"<h1>{html.escape(name)}</h1>",
             f'<p class="run">{html.escape(str(method))} · {rows[-1]["step"] if rows else 0} steps · seed '
             f'{html.escape(str(settings.get("seed")))} · {html.escape(versions)}</p>',
             _lead(validations), _warnings(logged)]
    if validations:
        parts += ["<h2>Validation</h2>", '<p class="note">Dice over the validation cases, on the prepared grid.</p>',
                  _card(picture(_validation_chart(validations), "Validation Dice of each class against the step")),
                  _card(_class_table(validations))]
    if panels:
        parts += ["<h2>Validation cases</h2>",
                  '<p class="note">A patch about the foreground, as the latest validation saw it.</p>', *map(_panel, panels)]
    if logged:
        parts += ["<h2>Training</h2>", _card(picture(_training_chart(logged), "Loss and learning rate against the step")),
                  "<h2>Speed</h2>", _card(picture(_speed_chart(logged), "Patches per second and shares of the time")),
                  _card(_speed_table(logged))]
    told = yaml.safe_dump(dict(settings), sort_keys=False, default_flow_style=None, width=100)
    parts += ["<h2>Settings</h2>", f"<pre>{html.escape(told)}</pre>"]
    write_atomically(path, document(f"dropgen_fast: {name}", "\n".join(parts)))


def _lead(validations: Rows) -> str:
    scored = [row for row in validations if row["validation_dice"] is not None]
    if not scored:
        return '<p class="lead">No validation has a score.</p>'
    best = max(scored, key=lambda row: row["validation_dice"])
    return (f'<p class="lead">Best mean validation Dice {best["validation_dice"]:.3f}, after {best["step"]} steps (best.pt); '
            f'{scored[-1]["validation_dice"]:.3f} at the last validation, after {scored[-1]["step"]}.</p>')


def _warnings(logged: Rows) -> str:
    skipped = logged[-1].get("skipped_steps", 0) if logged else 0
    return (f'<p class="warning">{skipped} step{"s" if skipped > 1 else ""} had gradients that were not finite and changed '
            "nothing.</p>") if skipped else ""


def _card(content: str) -> str:
    return f'<div class="card">{content}</div>'


def _panel(path: Path) -> str:
    return _card(f'<p class="note">{html.escape(path.stem)}</p>'
                 + picture(path.read_bytes(), f"{path.stem}: image, features, label and prediction"))


def _series(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _validation_chart(validations: Rows) -> bytes:
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    axes = figure.subplots()
    names = list(validations[-1]["per_class"])
    for k, name in enumerate(names):
        points = [(row["step"], row["per_class"].get(name)) for row in validations]
        axes.plot([s for s, _ in points], [np.nan if v is None else v for _, v in points], linewidth=1.1, alpha=0.8,
                  color=COLOURS[k % len(COLOURS)], label=name if len(names) <= MANY else None,
                  marker="o" if len(points) == 1 else None)
    steps, means = _series(validations, "validation_dice")
    axes.plot(steps, means, color="#1c2733", linewidth=2.2, label="mean", marker="o", markersize=3.5)
    axes.set(ylim=(0, 1), xlabel="step", ylabel="Dice")
    axes.legend(frameon=False, fontsize=8.5, ncols=2)
    plain_axes(axes)
    return to_png(figure, 140)


def _training_chart(logged: Rows) -> bytes:
    figure = Figure(figsize=(9.2, 3.2), layout="constrained")
    loss, rate = figure.subplots(1, 2)
    steps, values = _series(logged, "loss")
    many = len(values) > FEW
    loss.plot(steps, values, color=COLOURS[0], linewidth=0.8 if many else 1.4, alpha=0.4 if many else 1)
    if many:
        width = len(values) // FEW + 1
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        loss.plot(steps[width - 1:], smooth, color=COLOURS[0], linewidth=1.8)
    loss.set_title("loss, mean since the last row", fontsize=10, loc="left")
    _line(rate, *_series(logged, "learning_rate"), "learning rate")
    for axes in (loss, rate):
        axes.set_xlabel("step")
        plain_axes(axes)
    return to_png(figure, 140)


def _speed_chart(logged: Rows) -> bytes:
    figure = Figure(figsize=(9.2, 2.8), layout="constrained")
    throughput, shares = figure.subplots(1, 2)
    _line(throughput, *_series(logged, "patches_per_s"), "patches per second")
    for k, (name, title) in enumerate((("waiting_for_data", "waiting for data"), ("gpu_utilization", "GPU busy"))):
        steps, values = _series(logged, name)
        if values:
            shares.plot(steps, [100 * v for v in values], color=COLOURS[k], linewidth=1.4, label=title)
    shares.set_title("share of the time, %", fontsize=10, loc="left")
    shares.set_ylim(0, 100)
    if shares.lines:
        shares.legend(frameon=False, fontsize=8.5)
    throughput.set_ylim(bottom=0)
    for axes in (throughput, shares):
        axes.set_xlabel("step")
        plain_axes(axes)
    return to_png(figure, 140)


def _line(axes: Axes, steps: Sequence[int], values: Sequence[float], title: str) -> None:
    axes.plot(steps, values, color=COLOURS[0], linewidth=1.4)
    axes.set_title(title, fontsize=10, loc="left")


def _class_table(validations: Rows) -> str:
    scored = [row for row in validations if row["validation_dice"] is not None]
    best = max(scored, key=lambda row: row["validation_dice"]) if scored else validations[-1]
    last = validations[-1]
    lines = "".join(f'<tr><th scope="row">{html.escape(name)}</th><td>{_dice(best["per_class"].get(name))}</td>'
                    f'<td>{_dice(last["per_class"].get(name))}</td></tr>' for name in last["per_class"])
    return (f'<table class="numbers"><thead><tr><th>class</th><th>Dice at step {best["step"]} (best)</th>'
            f'<th>at step {last["step"]} (last)</th></tr></thead><tbody>{lines}<tr><th scope="row">mean</th>'
            f'<td>{_dice(best["validation_dice"])}</td><td>{_dice(last["validation_dice"])}</td></tr></tbody></table>')


def _dice(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _speed_table(logged: Rows) -> str:
    """Medians over the rows: the first steps, slow while libraries warm up, do not count for more than they are."""
    units = {"patches_per_s": ("patches per second", "{:.2f}", 1), "step_ms": ("step, ms", "{:.0f}", 1),
             "waiting_for_data": ("waiting for data, %", "{:.0f}", 100), "gpu_utilization": ("GPU busy, %", "{:.0f}", 100)}
    found = {name: _series(logged, name)[1] for name in (*units, "peak_memory_gib")}
    lines = [(title, text.format(factor * float(np.median(found[name])))) for name, (title, text, factor) in units.items()
             if found[name]]
    if found["peak_memory_gib"]:
        lines.append(("peak memory, GiB", f"{max(found['peak_memory_gib']):.2f}"))
    body = "".join(f'<tr><th scope="row">{title}</th><td>{value}</td></tr>' for title, value in lines)
    return f'<table class="numbers"><thead><tr><th></th><th>median</th></tr></thead><tbody>{body}</tbody></table>'
