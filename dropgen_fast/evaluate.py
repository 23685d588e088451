"""Score predictions against labels: Dice and HD95 of every case and class, with MONAI's metrics.

    python -m dropgen_fast.evaluate --predictions DIR --labels DIR --out DIR

What is a score, for one class of one case:

=====================  ======================  =====================================================================
in the label           in the prediction       Dice, HD95
=====================  ======================  =====================================================================
yes                    yes                     both
only one of the two                            Dice 0; HD95 has no value, the case counts under `hd95_undefined`
no                     no                      neither: an empty cell, in no mean
=====================  ======================  =====================================================================

HD95 is the larger of the two directed 95th percentiles of the distances between the surfaces, in mm of the file's own
spacing. The mean foreground Dice is the mean over cases of a case's mean over its scored classes, so that every case
weighs the same however many classes it shows.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import tyro
from monai.metrics import compute_dice, compute_hausdorff_distance
from scipy import ndimage
from tqdm import tqdm

from dropgen_fast.cli import run
from dropgen_fast.data.cohort import class_names
from dropgen_fast.data.geometry import Grid, largest_offset_mm, load_volume
from dropgen_fast.data.prepare import MAX_OFFSET_VOXELS, WHOLE
from dropgen_fast.errors import InputError
from dropgen_fast.files import write_atomically
from dropgen_fast.presets import load_preset

PER_CASE = "per_case.csv"
SUMMARY = "summary.json"
COLUMNS = ("case", "class", "class_name", "dice", "hd95_mm", "label_voxels", "predicted_voxels")
SUFFIXES = (".nii.gz", ".nii")
LARGEST_VALUE = 65535


@dataclass
class EvaluateConfig:
    """Score predictions against labels: Dice and HD95 per case and class."""

    predictions: Path
    """Folder of predicted label maps, <case>.nii.gz."""
    labels: Path
    """Folder of true label maps, <case>.nii.gz."""
    out: Path
    """Folder that gets per_case.csv and summary.json."""
    classes: tuple[str, ...] = ()
    """Class names in the order of their values, background first; or one dataset.json, preset or preset file. Without
    it: the dataset.json beside the labels folder, else the values found in the files."""
    overwrite: bool = False
    """Replace an evaluation of other predictions or labels that --out holds."""


@dataclass(frozen=True)
class Score:
    """One class of one case; None where there is no score."""

    case: str
    value: int
    """The class's value in the label maps."""
    class_name: str
    dice: float | None
    hd95_mm: float | None
    label_voxels: int
    predicted_voxels: int

    @property
    def hd95_undefined(self) -> bool:
        """In one of label and prediction and not in the other: there is no surface to measure from."""
        return self.dice is not None and self.hd95_mm is None


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; the scores are ordered by case and then by class."""

    scores: tuple[Score, ...]
    classes: Mapping[int, str]
    """Foreground classes: value to name."""
    missing: tuple[str, ...] = ()
    """Cases that have a label and no prediction."""
    rejected: Mapping[str, str] = field(default_factory=dict)
    """Cases that could not be scored, each with one line that says why."""
    without_label: tuple[str, ...] = ()
    """Predictions that no label belongs to."""

    @property
    def cases(self) -> tuple[str, ...]:
        """The cases that were scored."""
        return tuple(dict.fromkeys(s.case for s in self.scores))

    @property
    def complete(self) -> bool:
        """Every label was scored."""
        return not self.missing and not self.rejected

    @property
    def mean_foreground_dice(self) -> float | None:
        """Mean over cases of the mean over a case's scored classes; None when nothing has a score."""
        return mean_foreground_dice(self.scores)

    def summary(self) -> dict[str, Any]:
        """Everything but the single scores, as written to summary.json; null where there is no number."""
        def of(value: int) -> dict[str, Any]:
            mine = [s for s in self.scores if s.value == value]
            return {"value": value,
                    "dice": _statistics([s.dice for s in mine if s.dice is not None]),
                    "hd95_mm": _statistics([s.hd95_mm for s in mine if s.hd95_mm is not None]),
                    "hd95_undefined": sum(s.hd95_undefined for s in mine)}

        return {"mean_foreground_dice": self.mean_foreground_dice,
                "cases": len(self.cases),
                "missing_predictions": list(self.missing),
                "rejected": dict(self.rejected),
                "predictions_without_label": list(self.without_label),
                "per_class": {name: of(value) for value, name in self.classes.items()}}

    def table(self) -> str:
        """The summary for a terminal."""
        def text(value: float | None, digits: int) -> str:
            return "-" if value is None else f"{value:.{digits}f}"

        rows = [("class", "Dice mean", "median", "std", "cases", "HD95 mm mean", "median", "undefined")]
        for name, row in self.summary()["per_class"].items():
            dice, hd95 = row["dice"], row["hd95_mm"]
            rows.append((name, text(dice["mean"], 4), text(dice["median"], 4), text(dice["std"], 4), str(dice["count"]),
                         text(hd95["mean"], 2), text(hd95["median"], 2), str(row["hd95_undefined"])))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
                 for row in rows]
        lines.insert(1, "-" * len(lines[0]))
        lines.append(f"mean foreground Dice {text(self.mean_foreground_dice, 4)} over {len(self.cases)} cases")
        return "\n".join(lines)


def mean_foreground_dice(scores: Sequence[Score]) -> float | None:
    """Mean over cases of the mean over a case's scored classes; None when nothing has a score."""
    per_case: dict[str, list[float]] = {}
    for score in scores:
        if score.dice is not None:
            per_case.setdefault(score.case, []).append(score.dice)
    return statistics.fmean(map(statistics.fmean, per_case.values())) if per_case else None


def evaluate(predictions: Path, labels: Path, classes: Mapping[int, str] | None = None) -> Evaluation:
    """Score every label map of one folder against the prediction of the same name in another.

    Args:
        predictions: folder of predicted label maps, <case>.nii.gz (or .nii).
        labels: folder of true label maps, named alike.
        classes: foreground classes, value to name; None takes the values found in the files.

    A case without a prediction, or whose two files cannot be compared (unreadable, not 3D, other shape or geometry,
    values that are no class), is named in the result and left out; the others are scored.

    Raises:
        InputError: a folder that is not there or empty, or no case at all that could be scored.
    """
    label_files, prediction_files = _volumes(labels), _volumes(predictions)
    if not label_files:
        raise InputError(f"{labels} holds no label map; wanted <case>.nii.gz files")
    missing = tuple(case for case in label_files if case not in prediction_files)
    found: dict[str, dict[int, Score]] = {}
    rejected: dict[str, str] = {}
    for case in tqdm([c for c in label_files if c in prediction_files], desc="evaluate", unit="case", disable=None):
        try:
            found[case] = _score_case(case, prediction_files[case], label_files[case], classes)
        except InputError as error:
            rejected[case] = str(error)
    if not found:
        raise InputError(next(iter(rejected.values())) if rejected else
                         f"{predictions} holds no prediction for any of the {len(label_files)} labels in {labels}, "
                         f"for instance {next(iter(label_files))}; files are paired by name")
    if classes is None:
        classes = {value: _nameless(value) for value in sorted({v for scores in found.values() for v in scores})}
    if not classes:
        raise InputError(f"neither {labels} nor {predictions} holds any class but background: there is nothing to score")
    scores = tuple(by_value.get(value, Score(case, value, name, None, None, 0, 0))
                   for case, by_value in found.items() for value, name in classes.items())
    return Evaluation(scores, classes, missing, rejected, tuple(c for c in prediction_files if c not in label_files))


def resolve_classes(classes: Sequence[str], labels: Path) -> dict[int, str] | None:
    """The foreground classes, value to name; None when neither the user nor a dataset.json names any.

    Args:
        classes: what the user gave: nothing; one dataset.json, preset or preset file; or names, background first.
        labels: the labels folder; a dataset.json beside it is read when the user gave nothing.

    Raises:
        InputError: no such file or preset, or one that names no classes.
    """
    if not classes:
        beside = labels.resolve().parent / "dataset.json"
        return _classes_of_dataset(beside) if beside.is_file() else None
    if len(classes) > 1:
        if len(set(classes)) < len(classes):
            raise InputError(f"--classes must name every class once, got {' '.join(classes)}")
        return _foreground(classes)
    if classes[0].endswith(".json"):
        return _classes_of_dataset(Path(classes[0]))
    names = load_preset(classes[0]).classes
    if names is None:
        raise InputError(f"preset {classes[0]} names no classes; give their names, background first")
    return _foreground(names)


def read_scores(path: Path) -> list[Score]:
    """The scores of a per_case.csv.

    Raises:
        InputError: no such file, or not one of ours.
    """
    try:
        with path.open(newline="") as file:
            return [Score(row["case"], int(row["class"]), row["class_name"],
                          float(row["dice"]) if row["dice"] else None,
                          float(row["hd95_mm"]) if row["hd95_mm"] else None,
                          int(row["label_voxels"]), int(row["predicted_voxels"])) for row in csv.DictReader(file)]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path} is no {PER_CASE} of evaluate: columns {', '.join(COLUMNS)} wanted") from error


def _volumes(folder: Path) -> dict[str, Path]:
    """Case name to file, in the order of names."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; wanted a folder of <case>.nii.gz files")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((s for s in SUFFIXES if path.name.endswith(s)), None)
        if suffix is None or path.name.startswith("."):
            continue
        case = path.name.removesuffix(suffix)
        if case in files:
            raise InputError(f"{files[case]} and {path} are the same case twice; keep one of them")
        files[case] = path
    return files


def _load_label_map(path: Path) -> tuple[npt.NDArray[np.int32], Grid]:
    """Voxels (I, J, K) of a label map, and the grid they are on."""
    volume = load_volume(path)
    low, high = volume.array.min(), volume.array.max()  # either is NaN where a voxel is
    if not 0 <= low <= high <= LARGEST_VALUE:
        raise InputError(f"{path} must hold classes from 0 to {LARGEST_VALUE}, got values from {low:g} to {high:g}")
    whole = np.rint(volume.array).astype(np.int32)
    if volume.array.dtype.kind == "f" and np.abs(volume.array - whole).max() > WHOLE:
        raise InputError(f"{path} must hold whole numbers, one per class; it holds fractions")
    i, j, k = whole.shape
    return whole, Grid((i, j, k), volume.affine)


def _check_same_grid(prediction: Grid, label: Grid, files: tuple[Path, Path]) -> None:
    """As strict as between an image and its label in `prepare`."""
    if prediction.shape != label.shape:
        raise InputError(f"{files[0]} has shape {prediction.shape} and {files[1]} has {label.shape}; "
                         "a prediction must be on the grid of its label")
    apart_mm = largest_offset_mm(prediction, label)
    if apart_mm > MAX_OFFSET_VOXELS * min(label.spacing_mm):
        raise InputError(f"{files[0]} and {files[1]} have different affines, their corners lie up to {apart_mm:.3g} mm "
                         "apart; a prediction must be on the grid of its label")


def _score_case(case: str, prediction_file: Path, label_file: Path,
                classes: Mapping[int, str] | None) -> dict[int, Score]:
    """Scores of the classes that are in the label or the prediction, by value."""
    prediction, prediction_grid = _load_label_map(prediction_file)
    label, label_grid = _load_label_map(label_file)
    _check_same_grid(prediction_grid, label_grid, (prediction_file, label_file))
    boxes = [_boxes(volume) for volume in (prediction, label)]
    if classes is not None:
        for path, values in zip((prediction_file, label_file), boxes, strict=True):
            if unknown := sorted(set(values) - set(classes)):
                raise InputError(f"{path} holds values {unknown} that are no class; "
                                 f"the classes are {', '.join(f'{v} {n}' for v, n in classes.items())}")
    scores = {}
    for value in sorted({*boxes[0], *boxes[1]}):
        name = _nameless(value) if classes is None else classes[value]
        box = _union([b[value] for b in boxes if value in b])
        scores[value] = _score_class(case, value, name, prediction[box] == value, label[box] == value,
                                     list(label_grid.spacing_mm))
    return scores


def _score_class(case: str, value: int, name: str, predicted: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_],
                 spacing_mm: list[float]) -> Score:
    """Dice and HD95 of one class that is in `predicted` or `true`, both (x, y, z)."""
    counts = int(true.sum()), int(predicted.sum())
    if 0 in counts:
        return Score(case, value, name, 0.0, None, *counts)
    y_pred, y = (torch.from_numpy(mask).double()[None, None] for mask in (predicted, true))
    dice = float(compute_dice(y_pred, y))
    with warnings.catch_warnings():  # MONAI warns of an argument that it passes to itself
        warnings.filterwarnings("ignore", "monai.metrics.utils get_mask_edges", FutureWarning)
        hd95 = compute_hausdorff_distance(y_pred, y, include_background=True, percentile=95, spacing=spacing_mm)
    return Score(case, value, name, dice, float(hd95), *counts)


def _boxes(volume: npt.NDArray[np.int32]) -> dict[int, tuple[slice, ...]]:
    """Bounding box of each class that the volume holds: neither metric looks beyond, and boxes are far smaller."""
    return {value: box for value, box in enumerate(ndimage.find_objects(volume), start=1) if box is not None}


def _union(boxes: list[tuple[slice, ...]]) -> tuple[slice, ...]:
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes, strict=True))


def _nameless(value: int) -> str:
    return f"class_{value}"


def _classes_of_dataset(path: Path) -> dict[int, str]:
    """Foreground classes of an nnU-Net dataset.json."""
    try:
        labels = json.loads(path.read_text())["labels"]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{path} is no dataset.json: wanted JSON with "labels": {{"background": 0, ...}}') from error
    return _foreground(class_names(labels, str(path)))


def _foreground(names: Sequence[str]) -> dict[int, str]:
    """Value to name, without the background that comes first."""
    return dict(enumerate(names[1:], start=1))


def _statistics(values: list[float]) -> dict[str, float | int | None]:
    """Mean, median, standard deviation (of the sample, n - 1) and count; None where there are too few values."""
    return {"mean": statistics.fmean(values) if values else None,
            "median": statistics.median(values) if values else None,
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "count": len(values)}


def _check_out(config: EvaluateConfig) -> None:
    """An evaluation of the same two folders may be made again; any other stays unless the user says otherwise."""
    if config.out.exists() and not config.out.is_dir():
        raise InputError(f"--out {config.out} is a file; wanted a folder")
    held = [name for name in (SUMMARY, PER_CASE) if (config.out / name).exists()]
    if not held or config.overwrite:
        return
    try:
        before = json.loads((config.out / SUMMARY).read_text())
        same = {key: before[key] for key in ("predictions", "labels")} == _inputs(config)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise InputError(f"--out {config.out} holds another evaluation ({held[0]}); choose another folder, "
                         "or give --overwrite to replace it")


def _inputs(config: EvaluateConfig) -> dict[str, str]:
    return {"predictions": str(config.predictions.resolve()), "labels": str(config.labels.resolve())}


def _write(evaluation: Evaluation, config: EvaluateConfig) -> None:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for s in evaluation.scores:
        rows.writerow((s.case, s.value, s.class_name, "" if s.dice is None else f"{s.dice:.6f}",
                       "" if s.hd95_mm is None else f"{s.hd95_mm:.6f}", s.label_voxels, s.predicted_voxels))
    config.out.mkdir(parents=True, exist_ok=True)
    write_atomically(config.out / PER_CASE, text.getvalue())
    write_atomically(config.out / SUMMARY, json.dumps({**_inputs(config), **evaluation.summary()}, indent=2) + "\n")


def main(argv: Sequence[str]) -> int:
    """The command; 0 when every label was scored, 1 when a prediction was missing or could not be compared."""
    config = tyro.cli(EvaluateConfig, args=list(argv), prog="dropgen-fast evaluate")
    _check_out(config)
    new = not config.out.exists()
    config.out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is told before the work, not after
    try:
        evaluation = evaluate(config.predictions, config.labels, resolve_classes(config.classes, config.labels))
    except InputError:
        if new:
            config.out.rmdir()
        raise
    _write(evaluation, config)
    print(evaluation.table())
    for name in evaluation.without_label:
        print(f"no label for prediction {name}: not scored")
    for line in evaluation.rejected.values():
        print(f"dropgen-fast evaluate: not scored: {line}", file=sys.stderr)
    if evaluation.missing:
        print(f"dropgen-fast evaluate: {len(evaluation.missing)} of {len(evaluation.cases) + len(evaluation.missing)} "
              f"labels have no prediction in {config.predictions}: {', '.join(evaluation.missing)}", file=sys.stderr)
    return 0 if evaluation.complete else 1


if __name__ == "__main__":
    sys.exit(run("evaluate", main, sys.argv[1:]))
