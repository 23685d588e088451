"""The demonstration's report: one HTML page that needs nothing else, and one picture for a README."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.patches import Patch

from dropgen_fast.demo.cohort import CLASSES, DOMAINS, SOURCE, case_name
from dropgen_fast.demo.results import METHODS, load_scores, of_domain, sentence
from dropgen_fast.evaluate import Score, mean_foreground_dice
from dropgen_fast.files import write_atomically
from dropgen_fast.page import INK, document, picture, plain_axes, to_png

# Okabe and Ito's colours, told apart with every common kind of colour vision.
TISSUE_COLOURS = {1: "#56B4E9", 2: "#E69F00", 3: "#009E73"}
METHOD_COLOURS = {"erm": "#8A8F98", "dropgen": "#0072B2"}
OVERLAY = 0.75
MAGNIFIED = 4

Pixels = npt.NDArray[np.float64]
"""(height, width, 3) in 0..1."""


@dataclass(frozen=True)
class Row:
    """One contrast of the subject that is shown: the same slice as image, truth and each method's prediction."""

    domain: str
    image: Pixels
    truth: Pixels
    predictions: Mapping[str, Pixels]
    dice: Mapping[str, float]
    """Mean foreground Dice of this case, by method."""


def write_report(out: Path, results: Mapping[str, Any]) -> None:
    """Write report.html and report.png from the results and from what the demo left under `out`."""
    scores = load_scores(out)
    first_test = results["subjects"]["training"] + results["subjects"]["validation"] + 1
    rows = _rows(out, first_test, scores)
    curves = {method: read_metrics(out / method / "metrics.jsonl") for method in METHODS}
    write_atomically(out / "report.png", _summary_picture(rows, results, scores))
    write_atomically(out / "report.html", _page(results, rows, _bar_chart(results, scores), _curve_chart(curves), first_test))


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of each loss and of each validation Dice in a run's metrics.jsonl."""
    curves: dict[str, list[tuple[int, float]]] = {"loss": [], "validation_dice": []}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        for name, points in curves.items():
            if row.get(name) is not None:
                points.append((int(row["step"]), float(row[name])))
    return curves


def _rows(out: Path, subject: int, scores: Mapping[str, Sequence[Score]]) -> list[Row]:
    label = _load(out / "cohort" / "labelsTs" / f"{case_name(subject, SOURCE)}.nii.gz")
    z = _telling_slice(label)
    rows = []
    for domain in DOMAINS:
        case = case_name(subject, domain)
        image = _load(out / "cohort" / "imagesTs" / f"{case}_0000.nii.gz")[:, :, z].astype(np.float64)
        grey = np.clip(image / np.percentile(image, 99.5), 0, 1)
        maps = {m: _load(out / m / "predictions" / f"{case}.nii.gz")[:, :, z] for m in METHODS}
        dice = {m: mean_foreground_dice([s for s in scores[m] if s.case == case]) for m in METHODS}
        rows.append(Row(domain, _pixels(grey), _pixels(grey, label[:, :, z]),
                        {m: _pixels(grey, labels) for m, labels in maps.items()},
                        {m: float("nan") if value is None else value for m, value in dice.items()}))
    return rows


def _load(path: Path) -> npt.NDArray[Any]:
    return np.asanyarray(nib.load(path).dataobj)


def _telling_slice(label: npt.NDArray[Any]) -> int:
    """The axial slice that shows every tissue: the one whose smallest tissue, against its largest slice, is largest."""
    areas = np.stack([(label == value).sum(axis=(0, 1)) for value in TISSUE_COLOURS]).astype(np.float64)
    return int(np.argmax((areas / np.maximum(areas.max(axis=1, keepdims=True), 1)).min(axis=0)))


def _pixels(grey: npt.NDArray[np.float64], label: npt.NDArray[Any] | None = None) -> Pixels:
    """A slice (x, y) as it is looked at, front up, with the tissues of a label map in colour."""
    rgb = np.repeat(grey[..., None], 3, axis=-1)
    if label is not None:
        for value, colour in TISSUE_COLOURS.items():
            at = label == value
            rgb[at] = (1 - OVERLAY) * rgb[at] + OVERLAY * _rgb(colour)
    return np.ascontiguousarray(np.flip(rgb.transpose(1, 0, 2), axis=0))


def _rgb(colour: str) -> npt.NDArray[np.float64]:
    return np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)]) / 255


def _per_case(scores: Sequence[Score], domain: str) -> list[float]:
    """Mean foreground Dice of each case of a domain."""
    mine = of_domain(scores, domain)
    values = [mean_foreground_dice([s for s in mine if s.case == case]) for case in dict.fromkeys(s.case for s in mine)]
    return [value for value in values if value is not None]


def _draw_bars(axes: Axes, results: Mapping[str, Any], scores: Mapping[str, Sequence[Score]]) -> None:
    """Grouped bars, one group per domain, with a dot for each case."""
    places = np.arange(len(DOMAINS))
    width = 0.36
    for offset, (method, title) in zip((-0.5, 0.5), METHODS.items(), strict=True):
        means = [results["per_domain"][domain][method] for domain in DOMAINS]
        at = places + offset * width
        axes.bar(at, means, width * 0.94, color=METHOD_COLOURS[method], label=title)
        for x, mean, domain in zip(at, means, DOMAINS, strict=True):
            dots = _per_case(scores[method], domain)
            spread = np.linspace(-0.22, 0.22, len(dots)) * width if len(dots) > 1 else [0.0]
            axes.scatter(x + np.asarray(spread), dots, s=11, color="white", edgecolor=INK, linewidth=0.8, zorder=3)
            axes.annotate(f"{mean:.2f}", (x, max([mean, *dots])), xytext=(0, 4), textcoords="offset points", ha="center",
                          fontsize=9, color=INK)
    axes.set_xticks(places, [domain.title for domain in DOMAINS.values()])
    axes.set_ylim(0, 1.08)
    axes.set_yticks(np.arange(0, 1.01, 0.2))
    axes.set_ylabel("mean foreground Dice")
    plain_axes(axes)


def _bar_chart(results: Mapping[str, Any], scores: Mapping[str, Sequence[Score]]) -> bytes:
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    axes = figure.subplots()
    _draw_bars(axes, results, scores)
    axes.legend(frameon=False, ncols=2, loc="upper right")
    return to_png(figure)


def _curve_chart(curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> bytes:
    figure = Figure(figsize=(9.2, 3.4), layout="constrained")
    panels = {"loss": "training loss (Dice + cross-entropy)", "validation_dice": "validation Dice, source contrast"}
    for axes, (name, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for method, label in METHODS.items():
            points = curves[method][name]
            axes.plot([step for step, _ in points], [value for _, value in points], color=METHOD_COLOURS[method], label=label,
                      linewidth=1.8, marker="o" if name == "validation_dice" else None, markersize=4)
        axes.set_title(title, fontsize=10.5, loc="left", color=INK)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        if name == "validation_dice":
            axes.set_ylim(0, 1)
        axes.legend(frameon=False)
        plain_axes(axes)
    return to_png(figure)


def _summary_picture(rows: Sequence[Row], results: Mapping[str, Any], scores: Mapping[str, Sequence[Score]]) -> bytes:
    """One row per contrast with image, truth and both predictions, and the bar chart beside them."""
    aspect = rows[0].image.shape[0] / rows[0].image.shape[1]
    cell = 1.62
    figure = Figure(figsize=(4 * cell + 5.6, len(rows) * 0.9 * cell * aspect + 0.75), layout="constrained")
    pictures, chart = figure.subfigures(1, 2, width_ratios=(4 * cell, 5.6))  # type: ignore[misc]
    grid = pictures.subplots(len(rows), 4, gridspec_kw={"wspace": 0.02, "hspace": 0.02})
    for y, row in enumerate(rows):
        cells = [row.image, row.truth, *row.predictions.values()]
        for x, (axes, pixels) in enumerate(zip(grid[y], cells, strict=True)):
            axes.imshow(pixels, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if y == 0:
                axes.set_title(("image", "truth", *METHODS.values())[x], fontsize=11, color=INK)
            if x >= 2:
                axes.text(0.97, 0.02, f"{row.dice[list(METHODS)[x - 2]]:.2f}", transform=axes.transAxes, ha="right", va="bottom",
                          color="white", fontsize=10)
        grid[y][0].set_ylabel(DOMAINS[row.domain].title, fontsize=10.5, color=INK)
    pictures.legend(handles=[Patch(color=colour, label=CLASSES[value]) for value, colour in TISSUE_COLOURS.items()],
                    loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    axes = chart.subplots()
    _draw_bars(axes, results, scores)
    axes.set_title(f"trained on T1 only, {results['steps']} steps each, seed {results['seed']}", fontsize=11, color=INK)
    axes.legend(frameon=False, ncols=2, loc="upper right")
    return to_png(figure, dpi=110)


def _slice_png(pixels: Pixels) -> bytes:
    """A slice, each voxel magnified to a square."""
    buffer = io.BytesIO()
    imsave(buffer, np.kron(pixels, np.ones((MAGNIFIED, MAGNIFIED, 1))), format="png")
    return buffer.getvalue()


STYLE = """
.slices { border-collapse: separate; border-spacing: 8px 8px; margin: -4px auto; width: 100%; max-width: 1000px; }
.slices th { font-weight: 600; font-size: 15px; padding: 2px 6px; }
.slices th[scope=row] { text-align: left; max-width: 8.5em; }
.slices td { width: 22%; text-align: center; font-size: 14px; color: #55616e; font-variant-numeric: tabular-nums; }
img.slice { display: block; width: 100%; image-rendering: pixelated; border-radius: 6px; margin-bottom: 3px; }
.legend { display: flex; gap: 22px; flex-wrap: wrap; margin: 12px 8px 0; font-size: 14.5px; }
.legend i { display: inline-block; width: 14px; height: 14px; border-radius: 3px; margin-right: 7px; vertical-align: -2px; }
.numbers .group { border-left: 1px solid #e2e6eb; }
.numbers .better { font-weight: 700; }
"""


def _page(results: Mapping[str, Any], rows: Sequence[Row], bars: bytes, curves: bytes, subject: int) -> str:
    subjects = results["subjects"]
    escaped = {key: html.escape(str(results[key])) for key in ("variant", "seed", "steps")}
    warning = ('<p class="warning"><strong>A smoke test.</strong> It shows that everything runs; after so few steps the numbers '
               "say nothing about either method.</p>") if results["quick"] else ""
    versions = html.escape(", ".join(f"{name} {version}" for name, version in results["versions"].items()))
    commands = html.escape("\n".join(results["commands"]))
    return document("dropgen_fast demo: DropGen beside ERM", f"""<h1>DropGen beside ERM, from one contrast to others</h1>
<p class="run">{escaped['steps']} training steps each, seed {escaped['seed']}, {results['minutes']:.1f} minutes in all ·
DropGen: {escaped['variant']} · ERM: the same network and recipe with the image alone</p>
{warning}
<p class="lead">{html.escape(sentence(results))}</p>
<p>Both networks learned to find cerebrospinal fluid, grey and white matter in T1-weighted heads
({subjects['training']} for training, {subjects['validation']} for choosing the checkpoint), with the same augmentation and
the same number of steps. They are tested on {subjects['test']} other heads: in T1, and in contrasts that neither has seen.</p>

<h2>What they see and what they say</h2>
<p class="note">Held-out subject {subject}, the same axial slice in every contrast. Below each prediction: mean Dice of this case
over the three tissues (whole volume).</p>
<div class="card">{_slice_table(rows)}{_legend()}</div>

<h2>Dice by contrast</h2>
<p class="note">Bars: mean over test subjects of the mean over the three tissues; dots: single subjects.</p>
<div class="card">{picture(bars, _bars_alt(results), "chart")}</div>
<div class="card">{_number_table(results)}</div>

<h2>Learning curves</h2>
<p class="note">Validation is on the source contrast only: no target image takes part in any choice.</p>
<div class="card">{picture(curves, "Training loss and validation Dice of ERM and DropGen against the step", "chart")}</div>

<h2>What this shows, and what not</h2>
<p>The heads are the ICBM152 T1 template (an average of 152 people, from nilearn's package) under random smooth deformations;
the labels come from its tissue maps. The target contrasts are piecewise linear maps of the T1 intensities, not other scans.
So this shows the mechanism at work in a few minutes, on one seed; it is not a benchmark. HD95 and every single score are in
the evaluation folders beside this page.</p>

<h2>The commands that were run</h2>
<pre>{commands}</pre>
<p class="note">{versions}</p>""", STYLE)


def _slice_table(rows: Sequence[Row]) -> str:
    head = "".join(f'<th scope="col">{title}</th>' for title in ("", "image", "truth", *METHODS.values()))
    body = []
    for row in rows:
        title = DOMAINS[row.domain].title
        cells = [picture(_slice_png(row.image), f"{title}: the image", "slice") + "&nbsp;",
                 picture(_slice_png(row.truth), f"{title}: the true tissues", "slice") + "&nbsp;"]
        cells += [picture(_slice_png(pixels), f"{title}: what {METHODS[m]} predicts, Dice {row.dice[m]:.2f}", "slice")
                  + f"Dice {row.dice[m]:.2f}" for m, pixels in row.predictions.items()]
        body.append(f'<tr><th scope="row">{html.escape(title)}</th>{"".join(f"<td>{c}</td>" for c in cells)}</tr>')
    return f'<table class="slices"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _legend() -> str:
    items = "".join(f'<span><i style="background:{colour}"></i>{html.escape(CLASSES[value])}</span>'
                    for value, colour in TISSUE_COLOURS.items())
    return f'<div class="legend">{items}</div>'


def _number_table(results: Mapping[str, Any]) -> str:
    columns = ["all tissues", *CLASSES[1:]]
    head = "".join(f'<th class="group" colspan="2" scope="colgroup">{html.escape(name)}</th>' for name in [*columns, "HD95, mm"])
    names = "".join(f'<th{" class=group" if m == "erm" else ""} scope="col">{title}</th>'
                    for _ in [*columns, ""] for m, title in METHODS.items())
    body = []
    for domain, described in DOMAINS.items():
        pairs = [results["per_domain"][domain], *results["per_tissue"][domain].values()]
        cells = "".join(_cells(pair, 3, larger_is_better=True) for pair in pairs)
        body.append(f'<tr><th scope="row">{html.escape(described.title)}</th>{cells}'
                    f'{_cells(results["hd95_mm"][domain], 1, larger_is_better=False)}</tr>')
    undefined = {m: sum(results["hd95_undefined"][domain][m] for domain in DOMAINS) for m in METHODS}
    note = (f'<p class="note">Mean Dice; the better of each pair in bold. HD95 is the mean over subjects and tissues that have '
            f'one: a tissue that a method does not find at all has none (ERM {undefined["erm"]}, '
            f'DropGen {undefined["dropgen"]} times).</p>')
    return (f'<table class="numbers"><thead><tr><th></th>{head}</tr><tr><th scope="col">contrast</th>{names}</tr></thead>'
            f'<tbody>{"".join(body)}</tbody></table>{note}')


def _cells(pair: Mapping[str, float | None], digits: int, *, larger_is_better: bool) -> str:
    texts = {m: "–" if value is None else f"{value:.{digits}f}" for m, value in pair.items()}
    known = {m: float(text) for m, text in texts.items() if text != "–"}
    better = ""
    if len(set(known.values())) == len(METHODS):  # as printed: what reads alike is not told apart
        better = (max if larger_is_better else min)(known, key=lambda m: known[m])
    classes = {m: " ".join([*["group"] * (m == "erm"), *["better"] * (m == better)]) for m in texts}
    return "".join(f'<td class="{classes[m]}">{text}</td>' for m, text in texts.items())


def _bars_alt(results: Mapping[str, Any]) -> str:
    parts = [f"{described.title}: ERM {results['per_domain'][domain]['erm']:.2f}, "
             f"DropGen {results['per_domain'][domain]['dropgen']:.2f}" for domain, described in DOMAINS.items()]
    return "Mean foreground Dice by contrast. " + "; ".join(parts)
