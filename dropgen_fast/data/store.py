"""The prepared store: what `prepare` writes and training reads.

::

    store.json                      what the store holds (below); renamed into place last
    cases/<id>-<hash>/image.npy     (D, H, W, C) float32 or float16, each channel in [0, 1]
                      label.npy     (D, H, W, 1) uint8; none for a test case without a label
                      foreground.npy  (1 + R, 3) int32: the shape, then R voxel coordinates of foreground
                      case.json     where it came from, geometry, statistics

Arrays are in RAS voxel order, C-contiguous, in .npy format 1.0, so that DALI's reader can take regions out of them. In
`foreground.npy` every class that occurs has the same number of rows: a row at random is a class at random.

A case's folder bears the hash of everything that its content depends on (bytes of the sources, settings, format version). It
is written under another name and renamed when complete, so a folder that bears its name is whole, and is never changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dropgen_fast.data.cohort import SPLITS
from dropgen_fast.errors import InputError
from dropgen_fast.files import write_atomically

FORMAT_VERSION = 1
KIND = "dropgen_fast store"
INDEX = "store.json"
HEADER_BYTES = 4096
"""More than the header of any volume takes."""
PARSING = threading.Lock()
"""NumPy parses a header as Python source, which some versions of CPython 3.11 and 3.12 do not always survive in two threads at
once ("SystemError: AST constructor recursion depth mismatch")."""


@dataclass(frozen=True)
class StoredCase:
    """One prepared case: where it is, the files it was made from, and `info`, the content of its case.json."""

    id: str
    split: str
    folder: Path
    sources: tuple[Path, ...]
    label_source: Path | None
    info: Mapping[str, Any]

    @property
    def image(self) -> Path:
        """Path of image.npy."""
        return self.folder / "image.npy"

    @property
    def label(self) -> Path | None:
        """Path of label.npy; None for a case without a label."""
        return self.folder / "label.npy" if self.label_source else None

    @property
    def foreground(self) -> Path:
        """Path of foreground.npy."""
        return self.folder / "foreground.npy"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels of the prepared volume, (D, H, W)."""
        d, h, w = self.info["prepared_shape"]
        return d, h, w


@dataclass(frozen=True)
class Entry:
    """What the index says of a case: its folder, relative to the store, and the absolute paths of its sources."""

    folder: str
    images: tuple[str, ...]
    label: str | None


@dataclass(frozen=True)
class StoreIndex:
    """The content of store.json; `cases` maps a split to its cases by id, `left_out` ids to reasons."""

    classes: tuple[str, ...]
    channels: tuple[str, ...]
    spacing_mm: tuple[float, float, float]
    intensity_window: tuple[float, float] | None
    dtype: str
    preset: str | None
    cases: Mapping[str, Mapping[str, Entry]]
    left_out: Mapping[str, str]


class Store:
    """A prepared store, opened and checked: `Store.open(path)`."""

    def __init__(self, path: Path, index: StoreIndex, cases: Mapping[str, tuple[StoredCase, ...]]) -> None:
        self.path = path
        self.index = index
        self._cases = cases

    @classmethod
    def open(cls, path: Path | str) -> Store:
        """Open a store and check that every file of every case is there, whole and what it should be.

        Raises:
            InputError: `path` is no store, was written by another version, or a file is missing or damaged (named).
        """
        path = Path(path).absolute()
        index = read_index(path)
        jobs = [(split, case_id, entry) for split in SPLITS for case_id, entry in index.cases[split].items()]
        with ThreadPoolExecutor(16) as pool:  # waiting for a file server, not computing
            found = list(pool.map(lambda job: open_case(path, *job, dtype=index.dtype), jobs))
        return cls(path, index, {split: tuple(c for c in found if c.split == split) for split in SPLITS})

    def cases(self, split: str) -> tuple[StoredCase, ...]:
        """The cases of a split, "train", "val" or "test", in the order of their ids; may be empty."""
        if split not in SPLITS:
            raise InputError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        return self._cases[split]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of their label values, background first."""
        return self.index.classes

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the image channels."""
        return self.index.channels

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """The spacing that was asked for; each case's own is in its case.json (rounding to whole voxels)."""
        return self.index.spacing_mm

    @property
    def intensity_window(self) -> tuple[float, float] | None:
        """The clipping window of the images, in their own unit; None: none."""
        return self.index.intensity_window

    @property
    def preset(self) -> str | None:
        """The preset that the store was prepared with."""
        return self.index.preset

    def identity(self) -> str:
        """A hash of the content: equal if and only if classes, channels, settings, splits and every case are equal."""
        folders = {split: {case.id: case.folder.name for case in cases} for split, cases in self._cases.items()}
        content = [FORMAT_VERSION, self.classes, self.channels, self.spacing_mm, self.intensity_window, self.index.dtype, folders]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def load(self, case: StoredCase) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8] | None]:
        """The image (D, H, W, C) as float32 and the label (D, H, W, 1), None where there is none."""
        image = _read_npy(case.image).astype(np.float32, copy=False)
        return image, _read_npy(case.label) if case.label else None


def is_store(path: Path) -> bool:
    """Whether a folder has a store's index, of whatever version."""
    try:
        return json.loads((path / INDEX).read_text())["kind"] == KIND
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_index(path: Path) -> StoreIndex:
    """Read store.json; raises `InputError` where it is missing, not a store's or of another version."""
    if not (path / INDEX).is_file():
        raise InputError(f"{path} is not a prepared store (it has no {INDEX}): run `dropgen-fast prepare` first")
    if not is_store(path):
        raise InputError(f"{path / INDEX} is not the index of a prepared store, or is damaged: prepare the store again")
    content = json.loads((path / INDEX).read_text())
    if content.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{path} is a store of format {content.get('format_version')}, this version reads format "
                         f"{FORMAT_VERSION}: prepare it again")
    try:
        values = {f.name: content[f.name] for f in dataclasses.fields(StoreIndex)}
        cases = {split: {case_id: Entry(entry["folder"], tuple(entry["images"]), entry["label"])
                         for case_id, entry in sorted(values["cases"][split].items())} for split in SPLITS}
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path / INDEX} is damaged ({error!r}): prepare the store again") from error
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return StoreIndex(**{**values, "cases": cases})


def write_index(path: Path, index: StoreIndex) -> None:
    """Write store.json in one step: readers see the old one or the new one."""
    content = {"kind": KIND, "format_version": FORMAT_VERSION, **dataclasses.asdict(index)}
    write_atomically(path / INDEX, json.dumps(content, indent=1))


def open_case(store: Path, split: str, case_id: str, entry: Entry, *, dtype: str) -> StoredCase:
    """A case of the store, its files checked by header and size; raises `InputError` naming the file at fault."""
    folder = store / entry.folder
    try:
        info = json.loads((folder / "case.json").read_text())
        case = StoredCase(case_id, split, folder, tuple(map(Path, entry.images)),
                          Path(entry.label) if entry.label else None, info)
        expected = [(case.image, (*case.shape, len(case.sources)), dtype),
                    (case.foreground, (1 + int(info["foreground_rows"]), 3), "int32")]
        if case.label:
            expected.append((case.label, (*case.shape, 1), "uint8"))
    except FileNotFoundError as error:
        raise InputError(f"case {case_id}: {error.filename} is missing: prepare the store again") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"case {case_id}: {folder / 'case.json'} is damaged ({error!r}): delete {folder} and prepare the "
                         "store again") from error
    for path, shape, wanted in expected:
        if problem := _npy_problem(path, shape, wanted):
            raise InputError(f"case {case_id}: {path} {problem}: delete {folder} and prepare the store again")
    return case


def _npy_problem(path: Path, shape: Sequence[int], dtype: str) -> str:
    """What is wrong with a .npy file ("" if nothing), judged from its header and its size."""
    try:
        with path.open("rb") as file:
            start = io.BytesIO(file.read(HEADER_BYTES))
            with PARSING:
                if np.lib.format.read_magic(start) != (1, 0):
                    return "is not in .npy format 1.0"
                found, fortran, found_dtype = np.lib.format.read_array_header_1_0(start)
            size = start.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize
            if found != tuple(shape) or fortran or found_dtype != np.dtype(dtype):
                return f"holds {found_dtype} {found}, expected {dtype} {tuple(shape)} in C order"
            if (actual := file.seek(0, os.SEEK_END)) != size:
                return f"has {actual} bytes, expected {size}"
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:
        return f"is damaged ({' '.join(str(error).split())})"
    return ""


def _read_npy(path: Path) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({error}): prepare the store again") from error
    return array


def write_npy(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array in C order and .npy format 1.0 and wait until it is on the disk."""
    with path.open("wb") as file:
        np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
        _flush(file)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file and wait until it is on the disk."""
    with path.open("w") as file:
        json.dump(content, file, indent=1)
        _flush(file)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
