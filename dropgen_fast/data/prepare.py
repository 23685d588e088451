"""From a cohort's NIfTI files to the prepared store: check, reorient to RAS, resample, scale, write.

`prepare_image` is what prediction calls as well, so that a network sees new images exactly as it saw those it was trained on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from dropgen_fast import __version__
from dropgen_fast.data.bricks import BRICK, DTYPES, Layout, Shape, write_npy, write_volume
from dropgen_fast.data.cohort import MAX_CLASSES, SPLITS, Case, Cohort, LeftOut, target_spacing_mm
from dropgen_fast.data.geometry import Grid, GridMap, Triple, Volume, largest_offset_mm, load_volume, ras_grid, read_grid
from dropgen_fast.data.parallel import OnSharedFolder, in_processes, on_cluster, one_by_one
from dropgen_fast.data.store import (
    FORMAT_VERSION,
    LOCK,
    DiskError,
    Entry,
    StoreIndex,
    UnreadableError,
    flush_folder,
    locked,
    open_case,
    others,
    renew_times,
    write_index,
    write_json,
    writing,
)
from dropgen_fast.errors import InputError

FOREGROUND_ROWS = 8192
"""Foreground coordinates kept per case, shared equally among the classes that occur."""
MAX_OFFSET_VOXELS = 0.1
"""How far the corners of an image and its label may be apart, in edges of the smallest voxel. Headers hold float32 numbers, and
a rotation of nearly half a turn stored as a quaternion loses half the digits, some 0.1 mm at the far corner of a head; less
than a tenth of a voxel moves no label to another voxel, more is a different grid."""
WHOLE = 1e-3
"""How far a label may be from a whole number: integers stored with a scale factor come back slightly off."""


@dataclass(frozen=True)
class Settings:
    """What the content of a prepared case depends on, besides its files."""

    spacing_mm: Triple
    intensity_window: tuple[float, float] | None = None
    dtype: str = "float32"
    brick: Shape = BRICK

    def __post_init__(self) -> None:
        """Check the values; raises `InputError`."""
        if len(self.spacing_mm) != 3 or not all(np.isfinite(s) and s > 0 for s in self.spacing_mm):
            raise InputError(f"spacing_mm must be three positive numbers, got {self.spacing_mm}")
        window = self.intensity_window
        if window is not None and not (len(window) == 2 and np.isfinite(window).all() and window[0] < window[1]):
            raise InputError(f"intensity_window must be two numbers, low < high, got {window}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if len(self.brick) != 3 or not all(4 <= n <= 256 for n in self.brick):
            raise InputError(f"brick must be three numbers of voxels, 4 to 256 each, got {self.brick}")


@dataclass(frozen=True)
class PreparedImage:
    """An image as a network sees it: `array` (D, H, W, C) float32 in RAS order, each channel in [0, 1]."""

    array: npt.NDArray[np.float32]
    grid_map: GridMap
    statistics: tuple[dict[str, float], ...]

    @property
    def affine(self) -> npt.NDArray[np.float64]:
        """Voxel-to-world affine (4, 4) of `array`, millimetres."""
        return self.grid_map.prepared.affine


def minmax(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Rescale to [0, 1] by the array's own minimum and maximum, over all of its axes together; constant → 0."""
    array = np.asarray(array, dtype=np.float32)
    low, high = array.min(), array.max()
    return (array - low) / (high - low) if high > low else np.zeros_like(array)


def prepare_image(paths: Sequence[Path], spacing_mm: Triple, intensity_window: tuple[float, float] | None = None
                  ) -> PreparedImage:
    """Load the channels of one subject, reorient to RAS, resample and scale each channel to [0, 1].

    Without a window a channel's own minimum and maximum go to 0 and 1; with one, its ends do, and what is outside is clipped.
    A volume is scaled as a whole because noise and padding are given in that unit; the scaling of each patch or image that
    follows in training and prediction undoes any other.

    Raises:
        InputError: as `load_volume`; voxels that are not finite; a constant channel; channels on different grids.
    """
    volumes = [load_volume(path) for path in paths]
    first = _grid(volumes[0])
    for volume in volumes[1:]:
        _check_same_grid(first, _grid(volume), volumes[0].path, volume.path)
    grid_map = GridMap.to_spacing(first, spacing_mm)
    array = np.empty((*grid_map.prepared.shape, len(volumes)), np.float32)
    statistics = []
    for c, volume in enumerate(volumes):
        _check_finite(volume)
        if volume.array.min() == volume.array.max():
            raise InputError(f"{volume.path} is constant: every voxel is {volume.array.flat[0]}")
        channel = grid_map.forward(volume.array, order=1)
        if not np.isfinite(channel).all() or not np.isfinite(np.float32(channel.max()) - np.float32(channel.min())):
            raise InputError(f"{volume.path} has intensities from {volume.array.min()} to {volume.array.max()}, more than "
                             "float32 holds; rescale it")
        statistics.append(_statistics(channel))
        if intensity_window:
            np.clip(channel, *intensity_window, out=channel)
        if channel.min() == channel.max():
            raise InputError(f"{volume.path} is constant (all {channel.flat[0]}) once resampled to {spacing_mm} mm"
                             + (f" and clipped to {intensity_window}" if intensity_window else ""))
        low, high = intensity_window or (channel.min(), channel.max())
        array[..., c] = (channel - np.float32(low)) / (np.float32(high) - np.float32(low))
    return PreparedImage(array, grid_map, tuple(statistics))


def prepare_label(path: Path, grid_map: GridMap, image: Path, class_count: int | None = None
                  ) -> tuple[npt.NDArray[np.uint8], dict[int, int]]:
    """Load a label map and bring it onto the prepared grid (D, H, W) by nearest neighbour.

    Returns it with the number of voxels of each value in the file.

    Raises:
        InputError: as `load_volume`; another grid than the image's; values that are no whole numbers, or not in 0…class_count-1.
    """
    volume = load_volume(path)
    _check_same_grid(grid_map.original, _grid(volume), image, path)
    _check_finite(volume)
    whole = np.rint(volume.array) if volume.array.dtype.kind == "f" else volume.array
    if volume.array.dtype.kind == "f" and np.abs(volume.array - whole).max() > WHOLE:
        values = np.unique(volume.array[np.abs(volume.array - whole) > WHOLE])
        raise InputError(f"{path} has labels that are not whole numbers: {_some(values)}")
    counts = voxels_per_value(whole)
    check_classes(counts, class_count, path)
    return grid_map.forward(whole.astype(np.uint8), order=0), counts


def voxels_per_value(label: npt.NDArray[Any]) -> dict[int, int]:
    """How many voxels have each whole number that occurs."""
    if label.min() >= 0 and label.max() < MAX_CLASSES:  # counting is linear, finding unknown values is a sort
        voxels = np.bincount(label.astype(np.uint8).ravel())
        return {int(v): int(voxels[v]) for v in np.flatnonzero(voxels)}
    values, voxels = np.unique(label, return_counts=True)
    return {int(v): int(n) for v, n in zip(values, voxels, strict=True)}


def check_classes(counts: dict[int, int], class_count: int | None, path: Path) -> None:
    """Refuse label values outside 0…class_count-1 (None: 0…255); raises `InputError`."""
    limit = class_count or MAX_CLASSES
    if outside := [v for v in counts if not 0 <= v < limit]:
        voxels = sum(counts[v] for v in outside)
        raise InputError(f"{path} has label values outside the class map (0 to {limit - 1}): {_some(outside)}, {voxels} voxels")


def _some(values: Sequence[Any] | npt.NDArray[Any]) -> str:
    return ", ".join(f"{v:g}" for v in values[:5]) + (", …" if len(values) > 5 else "")


def _grid(volume: Volume) -> Grid:
    i, j, k = volume.array.shape
    return Grid((i, j, k), volume.affine)


def _check_same_grid(a: Grid, b: Grid, path_a: Path, path_b: Path) -> None:
    if a.shape != b.shape:
        raise InputError(f"shapes differ: {path_a} has {a.shape}, {path_b} has {b.shape}")
    offset_mm, voxel_mm = largest_offset_mm(a, b), min(a.spacing_mm)
    if offset_mm > MAX_OFFSET_VOXELS * voxel_mm:
        raise InputError(f"affines differ: {path_a} and {path_b} place a corner {offset_mm:.3g} mm apart, allowed is a tenth of "
                         f"a voxel, {MAX_OFFSET_VOXELS * voxel_mm:.3g} mm")


def _check_finite(volume: Volume) -> None:
    if volume.array.dtype.kind == "f" and (bad := int(np.count_nonzero(~np.isfinite(volume.array)))):
        raise InputError(f"{volume.path} has {bad} voxels that are NaN or infinite")


def _statistics(channel: npt.NDArray[np.float32]) -> dict[str, float]:
    low, high = np.percentile(channel, [0.5, 99.5])
    return {"min": float(channel.min()), "max": float(channel.max()), "mean": float(channel.mean(dtype=np.float64)),
            "std": float(channel.std(dtype=np.float64)), "p0.5": float(low), "p99.5": float(high)}


def foreground_rows(label: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.int32]:
    """Voxel coordinates (R, 3) of foreground, the same number for each class that occurs; none without foreground."""
    flat = label.ravel()
    classes = np.flatnonzero(np.bincount(flat, minlength=MAX_CLASSES)[1:]) + 1
    rows = []
    for value in classes:
        found = np.flatnonzero(flat == value)
        rows.append(found[rng.integers(0, len(found), FOREGROUND_ROWS // len(classes))])
    voxels = np.concatenate(rows) if rows else np.empty(0, np.int64)
    return np.stack(np.unravel_index(voxels, label.shape), axis=1).astype(np.int32)


@dataclass(frozen=True)
class Prepared:
    """A case that is in the store: its entry for the index, label voxels per value, warnings, whether it was there before."""

    case: Case
    entry: Entry
    counts: dict[int, int]
    warnings: tuple[str, ...]
    reused: bool


def prepare_case(case: Case, store: Path, settings: Settings, class_count: int | None = None) -> Prepared:
    """Prepare one case into the store, unless the store has it from the same bytes and settings.

    Raises:
        InputError: as `prepare_image` and `prepare_label`; nothing is left in the store then.
    """
    digest = _digest(case, settings)
    folder = f"cases/{case.id}-{digest[:12]}"
    entry = Entry(folder, tuple(str(p.absolute()) for p in case.images), str(case.label.absolute()) if case.label else None)
    reused = _is_whole(store, case, entry, settings)
    if not reused:
        _write_case(case, store / folder, settings, digest, class_count)
    info = json.loads((store / folder / "case.json").read_text())
    counts = {int(v): n for v, n in info["label_voxels"].items()}
    if case.label:
        check_classes(counts, class_count, case.label)
    return Prepared(case, entry, counts, tuple(_case_warnings(case, info)), reused)


def _is_whole(store: Path, case: Case, entry: Entry, settings: Settings) -> bool:
    if not (store / entry.folder).is_dir():
        return False
    try:
        open_case(store, case.split, case.id, entry, dtype=settings.dtype, brick=settings.brick)
    except UnreadableError:
        raise  # for now, perhaps: nothing says that it is damaged
    except InputError:
        shutil.rmtree(store / entry.folder)  # damaged since it was written: make it anew
        return False
    renew_times(store / entry.folder)
    return True


def _write_case(case: Case, folder: Path, settings: Settings, digest: str, class_count: int | None) -> None:
    image = prepare_image(case.images, settings.spacing_mm, settings.intensity_window)
    label: npt.NDArray[np.uint8] | None = None
    counts: dict[int, int] = {}
    if case.label:
        label, counts = prepare_label(case.label, image.grid_map, case.images[0], class_count)
    rows = np.empty((0, 3), np.int32) if label is None else foreground_rows(
        label, np.random.default_rng(int(digest[:16], 16)))
    grids = image.grid_map
    layout = Layout(grids.prepared.shape, len(case.images), settings.dtype, label is not None, settings.brick)
    _check_content(case, image.array, label, counts)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")  # two machines of a cluster may have a case at once
    try:
        with writing(folder):
            temporary.mkdir(parents=True)
            files = {"volume.npy": write_volume(temporary / "volume.npy", layout, image.array, label),
                     "foreground.npy": write_npy(temporary / "foreground.npy",
                                                 np.concatenate([[grids.prepared.shape], rows]).astype(np.int32))}
            write_json(temporary / "case.json", {
                "id": case.id, "hash": digest, "dtype": settings.dtype, "brick": settings.brick,
                "files": {name: dataclasses.asdict(record) for name, record in files.items()},
                "original_shape": grids.original.shape, "original_affine": grids.original.affine.tolist(),
                "prepared_shape": grids.prepared.shape, "prepared_affine": grids.prepared.affine.tolist(),
                "prepared_spacing_mm": grids.prepared.spacing_mm,
                "intensities": image.statistics, "label_voxels": counts,
                "prepared_label_voxels": {} if label is None else voxels_per_value(label),
                "foreground_rows": len(rows),
            })
            flush_folder(temporary)
            try:
                os.rename(temporary, folder)
            except OSError:
                if not folder.is_dir():  # it is where another machine was faster: the same content
                    raise
            flush_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_content(case: Case, image: npt.NDArray[np.float32], label: npt.NDArray[np.uint8] | None, counts: dict[int, int]
                   ) -> None:
    """Whether what is about to be written is what training may expect; a GPU's or a machine's fault ends here."""
    low, high = image.min(), image.max()
    if not (low >= 0 and high <= 1):  # nor where they are NaN
        raise InputError(f"{case.images[0]} came out with intensities from {low} to {high}, not within 0 to 1: prepare it again")
    if label is not None and (label.shape != image.shape[:3] or not set(voxels_per_value(label)) <= set(counts)):
        raise InputError(f"{case.label} came out with shape {label.shape}, expected {image.shape[:3]}, or with values that the "
                         "file does not have: prepare it again")


def _case_warnings(case: Case, info: dict[str, Any]) -> Iterator[str]:
    if not case.label:
        return
    before, after = info["label_voxels"], info["prepared_label_voxels"]
    if set(before) == {"0"}:
        yield f"case {case.id}: {case.label} is all background"
    elif lost := sorted(set(before) - set(after), key=int):
        yield (f"case {case.id}: label {', '.join(lost)} has no voxel left at spacing "
               f"{', '.join(f'{s:.3g}' for s in info['prepared_spacing_mm'])} mm")


def _digest(case: Case, settings: Settings) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, settings.spacing_mm, settings.intensity_window, settings.dtype,
                                        settings.brick, FOREGROUND_ROWS, len(case.images), case.label is not None]).encode())
    for path in (*case.images, *([case.label] if case.label else [])):
        digest.update(_file_digest(path))
    return digest.hexdigest()


def _file_digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return digest.digest()


@dataclass
class Report:
    """What became of a cohort: cases in the store, cases left out with the reason, and warnings."""

    classes: tuple[str, ...] = ()
    prepared: list[Prepared] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def cohort_spacing_mm(cohort: Cohort) -> Triple:
    """The spacing for a cohort, from its training images' headers (`target_spacing_mm`); unreadable files do not count."""
    def grid(case: Case) -> Grid | InputError:
        try:
            return ras_grid(read_grid(case.images[0]))
        except InputError as error:
            return error

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(grid, cohort.split("train")))
    grids = [g for g in found if isinstance(g, Grid)]
    if not grids:
        raise InputError(f"no training image is readable, the first one: {found[0]}")
    x, y, z = (round(s, 6) for s in target_spacing_mm([g.spacing_mm for g in grids], [g.shape for g in grids]))
    return x, y, z


def prepare_cohort(cohort: Cohort, store: Path, settings: Settings, *, classes: tuple[str, ...] | None = None,
                   preset: str | None = None, workers: int = 1, scheduler: str | None = None, strict: bool = False,
                   prune: bool = False) -> Report:
    """Prepare every case of a cohort, in `workers` processes or on a Dask cluster, and write the store's index last.

    A case that fails is left out, named in the report and in the index, and stops nothing, unless `strict`. `classes` default
    to the cohort's; where neither says, they are numbered up to the highest value of the training labels. `prune` removes
    case folders that the new index does not name. On a cluster (`scheduler`, an address like tcp://host:8786) every worker must
    see the sources and the store at the same paths; the lock on the store is held here.

    Raises:
        InputError: `store` holds something else, another process is writing to it, no training case could be prepared, the
            cluster fails, or (`strict`) the first failing case; `DiskError` where the store cannot be written.
    """
    classes = classes or cohort.classes
    report = Report(left_out=list(cohort.left_out), warnings=list(cohort.warnings))
    if strict and report.left_out:
        raise InputError(f"case {report.left_out[0].id}: {report.left_out[0].reason}")
    store = Path(store).absolute()
    with locked(store) as run:
        with contextlib.closing(_prepare_all(cohort.cases, store, settings, len(classes) if classes else None, workers,
                                             scheduler, run, report.warnings.append)) as results:
            for result in results:
                if isinstance(result, Prepared):
                    report.prepared.append(result)
                    continue
                report.left_out.append(result)
                if strict:
                    raise InputError(f"case {result.id}: {result.reason}")
        report.left_out.sort(key=lambda entry: entry.id)
        report.prepared.sort(key=lambda p: (SPLITS.index(p.case.split), p.case.id))
        training = [p for p in report.prepared if p.case.split == "train"]
        if not training:
            raise InputError(f"no training case could be prepared; first: {report.left_out[0].id}: "
                             f"{report.left_out[0].reason}")
        report.classes = classes or _numbered_classes(training)
        if not classes:
            _leave_out_unknown_values(report)
        report.warnings += [w for p in report.prepared for w in p.warnings] + _cohort_warnings(report, training)
        index = StoreIndex(
            classes=report.classes, channels=cohort.channels or _numbered_channels(training[0]),
            spacing_mm=settings.spacing_mm, intensity_window=settings.intensity_window, dtype=settings.dtype,
            brick=settings.brick, preset=preset,
            cases={split: {p.case.id: p.entry for p in report.prepared if p.case.split == split} for split in SPLITS},
            left_out={entry.id: entry.reason for entry in report.left_out})
        write_index(store, index)
        if prune:
            for folder in others(store, index):
                shutil.rmtree(folder)
    return report


def _prepare_all(cases: Sequence[Case], store: Path, settings: Settings, class_count: int | None, workers: int,
                 scheduler: str | None, run: str, warn: Callable[[str], None]) -> Generator[Prepared | LeftOut, None, None]:
    """Every case, wherever there is room for it; `run` is what `locked` gave."""
    work = functools.partial(_try_case, store=store, settings=settings, class_count=class_count)
    if scheduler is not None:
        shared = OnSharedFolder(work, store / LOCK, run, __version__)
        results = on_cluster(shared, cases, scheduler, lost=lambda case, reason: LeftOut(case.id, reason), warn=warn)
    else:
        results = in_processes(work, cases, workers) if workers > 1 else one_by_one(work, cases)
    with contextlib.closing(results):
        yield from tqdm(results, total=len(cases), desc="prepare", unit="case", disable=None)


def _try_case(case: Case, store: Path, settings: Settings, class_count: int | None) -> Prepared | LeftOut:
    try:
        return prepare_case(case, store, settings, class_count)
    except DiskError:
        raise  # not this case's fault, and the next one would meet it too
    except InputError as error:
        return LeftOut(case.id, str(error))
    except MemoryError:
        return LeftOut(case.id, f"not enough memory for {case.images[0]}")


def _numbered_classes(training: Sequence[Prepared]) -> tuple[str, ...]:
    highest = max((v for p in training for v in p.counts), default=0)
    if highest == 0:
        raise InputError("no training label has any foreground, and no class map says what it should be")
    return ("background", *(f"class_{v}" for v in range(1, highest + 1)))


def _leave_out_unknown_values(report: Report) -> None:
    """Where the classes were found in the training labels, the labels of the other splits must keep to them."""
    for prepared in list(report.prepared):
        try:
            if prepared.case.label:
                check_classes(prepared.counts, len(report.classes), prepared.case.label)
        except InputError as error:
            report.prepared.remove(prepared)
            report.left_out.append(LeftOut(prepared.case.id, str(error)))


def _cohort_warnings(report: Report, training: Sequence[Prepared]) -> list[str]:
    warnings = [f"class {value} ({name}) occurs in no training label"
                for value, name in enumerate(report.classes) if value and not any(value in p.counts for p in training)]
    if not any(p.case.split == "val" for p in report.prepared):
        warnings.append("no val split: train needs one to choose its best checkpoint; add imagesVal or use --val-fraction")
    return warnings


def _numbered_channels(prepared: Prepared) -> tuple[str, ...]:
    count = len(prepared.case.images)
    return ("image",) if count == 1 else tuple(f"image_{i:04d}" for i in range(count))
