"""Which files a cohort consists of: read from an nnU-Net style folder or from a CSV file, checked, never opened.

**Folder.** ``imagesTr labelsTr`` (train), ``imagesVal labelsVal`` (val), ``imagesTs labelsTs`` (test), with ``.nii`` or
``.nii.gz`` files. ``<case>_0000``, ``<case>_0001`` and so on are channels of one case, whose label is ``<case>``; a file
without such an ending is a case of one channel. Where an image ``amos_0001`` of the training folder has a label of the very
same name, four digits at the end belong to the id, in the whole cohort. ``dataset.json`` gives the class names (``labels``)
and the channel names (``channel_names`` or ``modality``) where it exists.

**CSV.** Columns ``image,label,split`` and, optionally, ``case`` (the id; else the image's file name). Several channels:
``image_0000,image_0001,…`` instead of ``image``. Relative paths start at the folder of the CSV. Splits are train, val, test.

What is wrong with one case (a channel or a label that is missing, an id used twice) leaves that case out and is listed in
`Cohort.left_out`; what is wrong with the cohort as a whole raises `InputError`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dropgen_fast.errors import InputError

SPLITS = ("train", "val", "test")
FOLDERS = {"train": ("imagesTr", "labelsTr"), "val": ("imagesVal", "labelsVal"), "test": ("imagesTs", "labelsTs")}
ENDINGS = (".nii.gz", ".nii")
CHANNEL = re.compile(r"(.+)_(\d{4})")
MAX_CLASSES = 256
"""Labels are stored in one byte."""
ANISOTROPIC = 3.0
"""How many times the spacing of the others an axis has that counts as anisotropic, as in nnU-Net."""


@dataclass(frozen=True)
class Case:
    """One subject: its channels in order and its label map (None: a test case without one)."""

    id: str
    split: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class LeftOut:
    """A case that is not used, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class Cohort:
    """The cases of a cohort and what it says of itself; `classes` are in the order of their label values."""

    cases: tuple[Case, ...]
    classes: tuple[str, ...] | None = None
    channels: tuple[str, ...] | None = None
    left_out: tuple[LeftOut, ...] = ()
    warnings: tuple[str, ...] = ()

    def split(self, split: str) -> tuple[Case, ...]:
        """The cases of one split, "train", "val" or "test"."""
        return tuple(c for c in self.cases if c.split == split)


def read_cohort(source: Path) -> Cohort:
    """Read a cohort from a folder or a CSV file (module docstring).

    Raises:
        InputError: `source` is neither, has no training case, or describes its classes, channels or columns wrongly.
    """
    source = Path(source)
    if source.is_dir():
        cohort = _read_folder(source)
        nothing = f"{source / 'imagesTr'} has no training images: expected <case>_0000.nii.gz files there"
    elif source.is_file():
        if source.suffix.lower() != ".csv":
            raise InputError(f"{source} is neither an nnU-Net style folder nor a .csv file")
        cohort = _read_csv(source)
        nothing = f"{source} has no row whose split is train"
    else:
        raise InputError(f"{source} does not exist: give an nnU-Net style folder or a .csv file")
    if not cohort.split("train"):
        first = next(iter(cohort.left_out), None)
        raise InputError(f"{source}: no training case is usable, the first one left out: {first.id}: {first.reason}" if first
                         else nothing)
    return cohort


def split_off_validation(cohort: Cohort, fraction: float, seed: int) -> Cohort:
    """Move a share of the training cases to the val split; the same ids and seed always give the same split.

    The cases are ranked by a hash of seed and id, so that the order of the files does not matter and adding a case moves
    at most one other. At least one case is moved and at least one stays.

    Raises:
        InputError: `fraction` is not between 0 and 1, there is a val split already, or there are fewer than two cases.
    """
    train = cohort.split("train")
    if not 0 < fraction < 1:
        raise InputError(f"val-fraction must be between 0 and 1, got {fraction}")
    if cohort.split("val"):
        raise InputError("val-fraction is for cohorts without a val split; this one has "
                         f"{len(cohort.split('val'))} val cases: leave the option out")
    if len(train) < 2:
        raise InputError(f"val-fraction needs at least two training cases, this cohort has {len(train)}")
    count = min(max(1, round(fraction * len(train))), len(train) - 1)
    ranked = sorted(train, key=lambda case: hashlib.sha256(f"{seed}/{case.id}".encode()).digest())
    moved = {case.id for case in ranked[:count]}
    cases = (replace(c, split="val") if c.split == "train" and c.id in moved else c for c in cohort.cases)
    return replace(cohort, cases=tuple(cases))


def _read_folder(source: Path) -> Cohort:
    if not (source / "imagesTr").is_dir():
        raise InputError(f"{source} has no folder imagesTr: expected an nnU-Net style folder (imagesTr, labelsTr, …)")
    classes, channels = _read_dataset_json(source / "dataset.json")
    images = {split: list(_volumes(source / folder)) for split, (folder, _) in FOLDERS.items()}
    labels = {split: {_stem(p): p for p in _volumes(source / folder)} for split, (_, folder) in FOLDERS.items()}
    plain = any(CHANNEL.fullmatch(_stem(p)) and _stem(p) in labels["train"] for p in images["train"])

    drafts: list[tuple[str, str, dict[int, Path], Path | None]] = []
    left_out: list[LeftOut] = []
    warnings: list[str] = []
    for split in SPLITS:
        grouped: dict[str, dict[int, Path]] = defaultdict(dict)
        for path in images[split]:
            match = None if plain else CHANNEL.fullmatch(_stem(path))
            case_id, channel = (match[1], int(match[2])) if match else (_stem(path), 0)
            if channel in grouped[case_id]:
                left_out.append(LeftOut(case_id, f"two files for channel {channel}: {grouped[case_id][channel]}, {path}"))
            grouped[case_id][channel] = path
        drafts += [(case_id, split, found, labels[split].get(case_id)) for case_id, found in sorted(grouped.items())]
        if orphans := sorted(set(labels[split]) - set(grouped)):
            warnings.append(f"{len(orphans)} files in {FOLDERS[split][1]} have no image, first {labels[split][orphans[0]]}")
    indices = set().union(*(found for _, _, found, _ in drafts)) if drafts else set()
    expected = len(channels) if channels else len(indices)
    if indices and max(indices) >= expected and not channels:
        raise InputError(f"{source}: channels must be numbered from _0000 without a gap, found "
                         f"{', '.join(f'_{i:04d}' for i in sorted(indices))}")

    cases = []
    bad_ids = {entry.id for entry in left_out}
    for case_id, split, found, label in drafts:
        if case_id in bad_ids:
            continue
        folder, label_folder = (source / name for name in FOLDERS[split])
        if lacking := [i for i in range(expected) if i not in found]:
            missing = ", ".join(f"{case_id}_{i:04d}.nii.gz" for i in lacking)
            left_out.append(LeftOut(case_id, f"missing channel: {folder} has no {missing}, which other cases "
                                             "or dataset.json have"))
        elif unknown := [i for i in found if i >= expected]:
            left_out.append(LeftOut(case_id, f"{found[unknown[0]]} is channel {unknown[0]}, but dataset.json has "
                                             f"{expected} channels"))
        elif label is None and (split != "test" or label_folder.is_dir()):
            left_out.append(LeftOut(case_id, f"missing label: {label_folder} has no {case_id}.nii.gz"))
        else:
            cases.append(Case(case_id, split, tuple(found[i] for i in range(expected)), label))
    return _without_duplicates(Cohort(tuple(cases), classes, channels, tuple(left_out), tuple(warnings)))


def read_images(folder: Path) -> Cohort:
    """The cases of a folder of images alone, to predict: ``<case>_0000.nii.gz``, ``<case>_0001.nii.gz``, …, or ``<case>.nii.gz``.

    Where no file ends in ``_0000``, four digits at the end belong to the id, as in ``amos_0117.nii.gz``.

    Raises:
        InputError: the folder does not exist or holds no NIfTI file.
    """
    paths = list(_volumes(folder))
    if not paths:
        raise InputError(f"{folder} {'holds no .nii or .nii.gz file' if folder.is_dir() else 'is not a folder'}")
    grouped: dict[str, dict[int, Path]] = defaultdict(dict)
    plain = not any(_stem(path).endswith("_0000") for path in paths)
    for path in paths:
        match = None if plain else CHANNEL.fullmatch(_stem(path))
        grouped[match[1] if match else _stem(path)][int(match[2]) if match else 0] = path
    gaps = {case_id: found for case_id, found in grouped.items() if sorted(found) != list(range(len(found)))}
    left_out = tuple(LeftOut(case_id, f"channels must be numbered from _0000 without a gap, {folder} has "
                             + ", ".join(found[i].name for i in sorted(found))) for case_id, found in gaps.items())
    cases = tuple(Case(case_id, "test", tuple(found[i] for i in sorted(found)), None)
                  for case_id, found in sorted(grouped.items()) if case_id not in gaps)
    return Cohort(cases, left_out=left_out)


def _volumes(folder: Path) -> Iterator[Path]:
    """NIfTI files of a folder in the order of their names, without hidden ones; none where there is no folder."""
    if folder.is_dir():
        yield from sorted(p for p in folder.iterdir() if p.name.endswith(ENDINGS) and not p.name.startswith("."))


def _stem(path: Path) -> str:
    for ending in ENDINGS:
        if path.name.endswith(ending):
            return path.name.removesuffix(ending)
    return path.name


def _read_dataset_json(path: Path) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Class names and channel names, each None where the file or the entry does not exist."""
    if not path.is_file():
        return None, None
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object")
    if (ending := content.get("file_ending", ".nii.gz")) not in ENDINGS:
        raise InputError(f"{path}: file_ending {ending!r} is not supported; convert the images to .nii.gz")
    labels = content.get("labels")
    names = content.get("channel_names", content.get("modality"))
    classes = None if labels is None else class_names(labels, str(path))
    channels = None if names is None else _in_order(names, f"{path}: channel_names", "channel")
    return classes, channels


def class_names(labels: object, where: str) -> tuple[str, ...]:
    """Names in the order of their values from ``{name: value}`` (nnU-Net v2) or ``{"value": name}`` (v1).

    Raises:
        InputError: values are not 0, 1, …, K-1, a region of several values, or nnU-Net's ignore label.
    """
    if isinstance(labels, Mapping) and any(isinstance(v, (list, tuple)) for v in labels.values()):
        raise InputError(f"{where}: labels has regions made of several values; give each value a class of its own")
    if isinstance(labels, Mapping) and "ignore" in labels:
        raise InputError(f"{where}: the ignore label is not supported; give those voxels a class or leave the cases out")
    classes = _in_order(labels, f"{where}: labels", "class")
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise InputError(f"{where}: labels must name 2 to {MAX_CLASSES} classes, background (0) first, got {len(classes)}")
    return classes


def _in_order(mapping: object, where: str, what: str) -> tuple[str, ...]:
    """Names from ``{name: index}`` or ``{"index": name}``, whose indices must be 0, 1, …"""
    if not isinstance(mapping, Mapping) or not mapping:
        raise InputError(f"{where} must map names to numbers, got {mapping!r}")
    by_index: dict[int, str] = {}
    for key, value in mapping.items():
        index, name = (key, value) if isinstance(value, str) and not value.isdigit() else (value, key)
        if isinstance(index, bool) or not (isinstance(index, int) or str(index).isdigit()):
            raise InputError(f"{where}: {key!r}: {value!r} gives no whole number for a {what}")
        if int(index) in by_index:
            raise InputError(f"{where}: {what} {int(index)} has two names, {by_index[int(index)]!r} and {name!r}")
        if str(name) in by_index.values():
            raise InputError(f"{where}: the name {name!r} is given to two of them; each {what} needs its own")
        by_index[int(index)] = str(name)
    if sorted(by_index) != list(range(len(by_index))):
        raise InputError(f"{where} must be numbered 0 to {len(by_index) - 1} without a gap"
                         f"{', background 0' if what == 'class' else ''}, got {sorted(by_index)}")
    return tuple(by_index[i] for i in range(len(by_index)))


def _read_csv(source: Path) -> Cohort:
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = reader.fieldnames or []
            rows = [(reader.line_num, row) for row in reader if any(row.values())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{source} is not a readable CSV file in UTF-8: {error}") from error
    image_columns = _image_columns(source, columns)
    cases: list[Case] = []
    left_out: list[LeftOut] = []
    for line, row in rows:
        case, problem = _csv_case(source, line, row, image_columns)
        if problem:
            left_out.append(LeftOut(case.id, problem))
        else:
            cases.append(case)
    channels = None if len(image_columns) == 1 else tuple(image_columns)
    return _without_duplicates(Cohort(tuple(cases), None, channels, tuple(left_out)))


def _image_columns(source: Path, columns: Sequence[str]) -> list[str]:
    """The columns with images, in the order of the channels; checks the others."""
    numbered = sorted(c for c in columns if re.fullmatch(r"image_\d{4}", c))
    if "image" in columns and numbered:
        raise InputError(f"{source} has both image and {numbered[0]}: use image for one channel, image_0000, … for several")
    if not numbered and "image" not in columns:
        raise InputError(f"{source} needs a column image (or image_0000, image_0001, …), has {', '.join(columns) or 'none'}")
    if numbered != [f"image_{i:04d}" for i in range(len(numbered))]:
        raise InputError(f"{source}: image columns must be numbered from image_0000 without a gap, got {numbered}")
    if lacking := [c for c in ("label", "split") if c not in columns]:
        raise InputError(f"{source} needs the columns {', '.join(lacking)}, has {', '.join(columns)}")
    return numbered or ["image"]


def _csv_case(source: Path, line: int, row: Mapping[str, str | None], image_columns: Sequence[str]) -> tuple[Case, str]:
    """The case of one row, and what is wrong with it ("" if nothing)."""
    cell = {key: (value or "").strip() for key, value in row.items() if isinstance(key, str)}
    split = cell["split"].lower()
    if split not in SPLITS:
        raise InputError(f"{source} line {line}: split must be train, val or test, got {cell['split']!r}")
    paths = [source.parent / cell[c] for c in image_columns if cell[c]]
    name = _stem(paths[0]) if paths else f"line {line}"
    match = CHANNEL.fullmatch(name) if len(image_columns) > 1 else None
    case_id = cell.get("case") or (match[1] if match else name)
    label = source.parent / cell["label"] if cell["label"] else None
    case = Case(case_id, split, tuple(paths), label)
    if lacking := [c for c in image_columns if not cell[c]]:
        return case, f"missing channel: {source} line {line} has nothing in column {lacking[0]}"
    if absent := [p for p in paths if not p.is_file()]:
        return case, f"missing image: {absent[0]} does not exist ({source} line {line})"
    if label is None and split != "test":
        return case, f"missing label: {source} line {line} has nothing in column label"
    if label is not None and not label.is_file():
        return case, f"missing label: {label} does not exist ({source} line {line})"
    return case, ""


def _without_duplicates(cohort: Cohort) -> Cohort:
    """Leave out every case whose id is used twice or cannot name a folder: which one is meant, nobody can know."""
    by_id: dict[str, list[Case]] = defaultdict(list)
    for case in cohort.cases:
        by_id[case.id].append(case)
    left_out = list(cohort.left_out)
    for case_id, found in by_id.items():
        if len(found) > 1:
            where = ", ".join(f"{c.split}: {c.images[0]}" for c in found)
            left_out.append(LeftOut(case_id, f"the id is used {len(found)} times ({where}); ids must be unique"))
        elif not _can_name_a_folder(case_id):
            left_out.append(LeftOut(case_id, f"the id {case_id!r} cannot name a folder: no / or control characters, at most "
                                             "200 bytes, no dot at the start"))
    bad = {entry.id for entry in left_out}
    return replace(cohort, cases=tuple(c for c in cohort.cases if c.id not in bad), left_out=tuple(left_out))


def _can_name_a_folder(case_id: str) -> bool:
    return (bool(case_id) and "/" not in case_id and case_id.isprintable() and not case_id.startswith(".")
            and len(case_id.encode()) <= 200)


def target_spacing_mm(spacings_mm: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]]) -> tuple[float, float, float]:
    """The spacing to resample a cohort to: the median of each axis over the cases, with nnU-Net's exception.

    Where one axis' median is more than `ANISOTROPIC` times the larger of the two others', and its median number of voxels less
    than that part of the smaller of theirs, half of the cases would lose slices that they cannot spare: that axis takes the 10th
    percentile of its spacings, but never less than the larger of the two others'.

    Args:
        spacings_mm: of each case along the same three axes, millimetres.
        shapes: voxels of each case along these axes.
    """
    target, voxels = np.median(np.asarray(spacings_mm, np.float64), axis=0), np.median(np.asarray(shapes), axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    if target[worst] > ANISOTROPIC * target[others].max() and voxels[worst] * ANISOTROPIC < voxels[others].min():
        tenth = np.percentile([spacing[worst] for spacing in spacings_mm], 10)
        target[worst] = max(tenth, target[others].max())
    x, y, z = map(float, target)
    return x, y, z
