"""The prepared store: what `prepare` writes and training reads.

::

    store.json                      what the store holds (below); renamed into place last
    cases/<id>-<hash>/volume.npy    (BZ, BY, BX, bytes) uint8: bricks of image (float32, float16 or int16) and label, see `bricks`
                      foreground.npy  (1 + R, 3) int32: the shape, then R voxel coordinates of foreground
                      case.json     where it came from, geometry, statistics, and what each of the files above was when written

Volumes are in RAS voxel order, each channel of an image in [0, 1]. In `foreground.npy` every class that occurs has the same
number of rows: a row at random is a class at random.

A case's folder bears the hash of everything that its content depends on (bytes of the sources, settings, format version). It
is written under another name and renamed when complete, so a folder that bears its name is whole, and is never changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dropgen_fast.data.bricks import FileRecord, Layout, checksum, npy_problem, read_volume
from dropgen_fast.data.cohort import SPLITS
from dropgen_fast.errors import InputError
from dropgen_fast.files import read_ahead_kib, write_atomically

FORMAT_VERSION = 2
KIND = "dropgen_fast store"
INDEX = "store.json"
CASE_FOLDER = re.compile(r".+-[0-9a-f]{12}")
READ_AHEAD_KIB = 128
"""What Linux reads ahead where nobody changed it, and what bricks are made for."""
LOCK = ".dropgen_fast_store"


class DiskError(InputError):
    """The store's disk refuses to be written: it is full, say, or read-only."""


class UnreadableError(InputError):
    """A file of the store cannot be read now: for want of a permission, say, or of a file server. It may be sound."""


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
    def volume(self) -> Path:
        """Path of volume.npy."""
        return self.folder / "volume.npy"

    @property
    def foreground(self) -> Path:
        """Path of foreground.npy."""
        return self.folder / "foreground.npy"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels of the prepared volume, (D, H, W)."""
        d, h, w = self.info["prepared_shape"]
        return d, h, w

    @property
    def layout(self) -> Layout:
        """How volume.npy is laid out."""
        bz, by, bx = self.info["brick"]
        return Layout(self.shape, len(self.sources), self.info["dtype"], self.label_source is not None, (bz, by, bx))


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
    brick: tuple[int, int, int]
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
        """Open a store and check that every file of every case is there, whole, and the one that was written.

        Header and size of each file are always looked at. Where its time of modification is not the recorded one, its bytes
        are read and their checksum decides: a store that was copied without its times is sound, but every opening reads all of
        it. Copy with times (``cp -a``, ``rsync -a``), and opening reads a page of each file.

        Raises:
            InputError: `path` is no store, was written by another version, or a file is missing or damaged (named).
        """
        path = Path(path).absolute()
        index = read_index(path)
        jobs = [(split, case_id, entry) for split in SPLITS for case_id, entry in index.cases[split].items()]
        with ThreadPoolExecutor(16) as pool:  # waiting for a file server, not computing
            found = list(pool.map(lambda job: open_case(path, *job, dtype=index.dtype, brick=index.brick), jobs))
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
        content = [FORMAT_VERSION, self.classes, self.channels, self.spacing_mm, self.intensity_window, self.index.dtype,
                   self.index.brick, folders]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def load(self, case: StoredCase) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8] | None]:
        """The image (D, H, W, C) as float32 and the label (D, H, W, 1), None where there is none."""
        return read_volume(case.volume, case.layout)


def slow_disk(store: Store) -> str:
    """What to change of the disk that holds a store larger than this machine's memory, "" if nothing.

    Around each run of bytes that a crop asks for, the kernel reads ahead: docs/loading.md has what that costs.
    """
    size = sum(case.volume.stat().st_size for split in SPLITS for case in store.cases(split))
    if size <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return ""  # it stays in the page cache once it is read
    ahead = read_ahead_kib(store.path)
    if ahead is None or ahead <= READ_AHEAD_KIB:
        return ""
    return (f"the disk of {store.path} reads {ahead} KiB ahead of every run of bytes, several times what a crop needs: "
            f"set its read_ahead_kb to {READ_AHEAD_KIB} (docs/loading.md)")


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
        if not all(isinstance(values[name], list) and values[name] for name in ("classes", "channels", "spacing_mm", "brick")):
            raise TypeError("a list is missing")
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path / INDEX} is damaged ({error!r}): prepare the store again") from error
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return StoreIndex(**{**values, "cases": cases})


def write_index(path: Path, index: StoreIndex) -> None:
    """Write store.json in one step: readers see the old one or the new one."""
    content = {"kind": KIND, "format_version": FORMAT_VERSION, **dataclasses.asdict(index)}
    with writing(path / INDEX):
        write_atomically(path / INDEX, json.dumps(content, indent=1))


def open_case(store: Path, split: str, case_id: str, entry: Entry, *, dtype: str, brick: tuple[int, int, int]) -> StoredCase:
    """A case of the store, its files checked as `Store.open` says; raises `InputError` naming the file at fault."""
    folder = store / entry.folder
    try:
        info = json.loads((folder / "case.json").read_text())
        case = StoredCase(case_id, split, folder, tuple(map(Path, entry.images)),
                          Path(entry.label) if entry.label else None, info)
        expected: list[tuple[Path, tuple[int, ...], str]] = [
            (case.volume, case.layout.file_shape, "uint8"),
            (case.foreground, (1 + int(info["foreground_rows"]), 3), "int32")]
        if (case.layout.dtype, case.layout.brick) != (dtype, tuple(brick)) or folder.name != f"{info['id']}-{info['hash'][:12]}":
            raise ValueError(f"it is of {info['id']}, {info['hash'][:12]}, {info['dtype']}, bricks of {info['brick']}")
        if info["id"] != case_id:
            raise ValueError(f"the index has it as {case_id}, it is of {info['id']}")
        records = {path: FileRecord(**info["files"][path.name]) for path, _, _ in expected}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"case {case_id}: {error.filename} is missing: prepare the store again") from error
    except OSError as error:
        raise UnreadableError(f"case {case_id}: {error.filename} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(f"case {case_id}: {folder / 'case.json'} is damaged ({error!r}): delete {folder} and prepare the "
                         "store again") from error
    for path, shape, wanted in expected:
        try:
            problem = npy_problem(path, shape, wanted) or _change(path, records[path])
        except OSError as error:
            raise UnreadableError(f"case {case_id}: {path} cannot be read: {error.strerror}") from error
        if problem:
            raise InputError(f"case {case_id}: {path} {problem}: delete {folder} and prepare the store again")
    return case


def renew_times(folder: Path) -> None:
    """Set the times of a sound case's files back to the recorded ones, where a copy lost them: opening it is cheap again."""
    for name, record in json.loads((folder / "case.json").read_text())["files"].items():
        status = (folder / name).stat()
        if status.st_mtime_ns != record["mtime_ns"]:
            with contextlib.suppress(OSError):  # of a store that somebody else owns
                os.utime(folder / name, ns=(status.st_atime_ns, record["mtime_ns"]))


def _change(path: Path, record: FileRecord) -> str:
    """How a file differs from what was written ("" if not); its bytes are read only where its time is another."""
    status = path.stat()
    if status.st_size != record.bytes:
        return f"has {status.st_size} bytes, {record.bytes} were written"
    if status.st_mtime_ns != record.mtime_ns and checksum(path) != record.crc32:
        return "was changed after it was written (its checksum is another)"
    return ""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file and wait until it is on the disk."""
    with path.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever the file system refuses within the block becomes a `DiskError` about the file it names, or else about `path`."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise DiskError(f"{error.filename or path} cannot be written: {error.strerror or error}; "
                        f"{'make room' if full else 'put that right'} and run again, what was prepared is kept") from error


@contextlib.contextmanager
def locked(store: Path) -> Iterator[str]:
    """Hold a store for writing; its lock file also marks the folder of an unfinished first `prepare` as ours.

    Yields what the lock file holds, another text each time, by which other machines know that they see this folder. Between
    machines the lock holds as far as their file system's locks do (NFS version 4 has them).

    Raises:
        InputError: the folder holds something else, or another process holds it.
    """
    if store.exists() and not store.is_dir():
        raise InputError(f"{store} is a file, not a folder for a store")
    if store.is_dir() and not is_store(store) and not (store / LOCK).exists() and any(store.iterdir()):
        raise InputError(f"{store} holds something that is not a prepared store: choose another folder or an empty one")
    with writing(store):
        store.mkdir(parents=True, exist_ok=True)
        lock = (store / LOCK).open("a")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process is preparing into {store}: wait for it to end") from error
        with writing(store / LOCK):
            (store / "cases").mkdir(exist_ok=True)
            _remove_leftovers(store)  # first, so that there is room on a full disk
            lock.truncate(0)
            lock.write(content := uuid.uuid4().hex)
            lock.flush()
            os.fsync(lock.fileno())
        try:
            yield content
        finally:
            _remove_leftovers(store)


def _remove_leftovers(store: Path) -> None:
    """Folders of cases that were begun and not finished; the lock says that no other run is at them."""
    for leftover in (store / "cases").glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for index in store.glob(f".{INDEX}.*"):
        index.unlink(missing_ok=True)


def others(store: Path, index: StoreIndex) -> list[Path]:
    """The case folders that an index does not name: of older sources or settings."""
    named = {store / entry.folder for cases in index.cases.values() for entry in cases.values()}
    return [folder for folder in (store / "cases").iterdir() if folder not in named and CASE_FOLDER.fullmatch(folder.name)
            and folder.is_dir()]
