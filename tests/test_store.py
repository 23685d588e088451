"""The store's files: bricks and what a crop of them costs to read, changes underneath, disks that are full or lie."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nifti_factory import write_cohort

from dropgen_fast.bench.loading import reads
from dropgen_fast.cli import run
from dropgen_fast.data import bricks, store
from dropgen_fast.data.bricks import BRICK, DTYPES, Layout, read_volume, write_npy, write_volume
from dropgen_fast.data.cohort import read_cohort
from dropgen_fast.data.prepare import Settings, prepare_case
from dropgen_fast.data.store import Store
from dropgen_fast.errors import InputError
from dropgen_fast.files import read_ahead_kib
from dropgen_fast.prepare import main


def prepare(source: Path, folder: Path, *options: str) -> int:
    return run("prepare", main, ["--source", str(source), "--store", str(folder), "--workers", "1",
                                 "--spacing-mm", "1", "1", "1", *options])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two training cases, to copy and spoil."""
    folder = tmp_path_factory.mktemp("prepared")
    assert prepare(write_cohort(folder / "cohort", {"train": 2}), folder / "store") == 0
    return folder / "store"


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))  # with its times


def volume(shape: tuple[int, ...], channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.random((*shape, channels), np.float32), rng.integers(0, 255, shape, np.uint8)


# --- bricks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "channels", "labelled"),
                         [((33, 31, 16), 2, True), ((7, 64, 50), 1, True), ((40, 5, 17), 3, False)])
def test_a_volume_comes_back(tmp_path: Path, shape: tuple[int, int, int], channels: int, labelled: bool, dtype: str) -> None:
    layout = Layout(shape, channels, dtype, labelled, BRICK)
    image, label = volume(shape, channels)
    image[0, 0, 0], image[-1, -1, -1] = 0, 1
    write_volume(tmp_path / "volume.npy", layout, image, label if labelled else None)
    found, found_label = read_volume(tmp_path / "volume.npy", layout)
    # Half a step: of float16 below 1 (2^-11), of int16 (1/32767) with two float32 roundings near 1 on the way.
    tolerance = {"float32": 0, "float16": 2**-12, "int16": 0.5 / 32767 + 2 * 2**-24}[dtype]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, image, rtol=0, atol=tolerance)
    assert (found.min(), found.max()) == (0, 1)
    if labelled:
        assert found_label is not None
        np.testing.assert_array_equal(found_label, label[..., None])
    else:
        assert found_label is None


def test_where_a_voxel_lies(tmp_path: Path) -> None:
    """The format itself: brick by brick, in a brick channel by channel, then the label."""
    layout = Layout((70, 40, 50), 2, "int16", True, (32, 32, 16))
    image, label = volume(layout.shape, 2)
    write_volume(tmp_path / "volume.npy", layout, image, label)
    content = (tmp_path / "volume.npy").read_bytes()
    start = len(content) - 3 * 2 * 4 * 16384 * 5
    assert start == 10 + int.from_bytes(content[8:10], "little")
    z, y, x, c = 67, 33, 20, 1
    brick = start + ((2 * 2 + 1) * 4 + 1) * 16384 * 5
    inside = (3 * 32 + 1) * 16 + 4
    assert np.frombuffer(content, "<i2", 1, brick + (c * 16384 + inside) * 2)[0] == round(float(image[z, y, x, c]) * 32767)
    assert content[brick + 2 * 16384 * 2 + inside] == label[z, y, x]


def test_dali_reads_regions_of_bricks(tmp_path: Path) -> None:
    layout = Layout((70, 50, 45), 2, "float16", True, BRICK)
    image, label = volume(layout.shape, 2)
    write_volume(tmp_path / "volume.npy", layout, image, label)
    for start in ((0, 0, 0), (30, 17, 25), (31, 15, 16)):
        found, found_label = reads.read_crop(tmp_path / "volume.npy", start, (39, 33, 20), layout)
        inside = tuple(slice(s, s + n) for s, n in zip(start, (39, 33, 20), strict=True))
        np.testing.assert_array_equal(found, image[inside].astype(np.float16))
        np.testing.assert_array_equal(found_label[..., 0], label[inside])


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk with Linux' usual read-ahead: the test's own, or a file system in a file, where one may be mounted."""
    if read_ahead_kib(tmp_path) == 128:
        yield tmp_path
        return
    folder, image = tmp_path / "disk", tmp_path / "disk.img"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(128 << 20)
    try:
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no disk with a read-ahead of 128 KiB here, and none can be mounted")
    try:
        device = folder.stat().st_dev  # the test's own: what it is set to concerns nobody else
        Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").write_text("128")
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_crop_reads_less_than_three_times_its_bytes(disk: Path) -> None:
    """Cold, with the kernel's read-ahead, by two counts; a plain array of the same volume does not, so the count counts."""
    shape, crop = (256, 256, 256), (128, 128, 128)
    image, label = volume(shape)
    starts = reads.random_starts(shape, crop, 6, np.random.default_rng(0))
    layout = Layout(shape, 1, "int16", True, BRICK)
    path = disk / "volume.npy"
    write_volume(path, layout, image, label)
    counted = reads.measure(path, starts, crop, layout, [bricks.encode(image, "int16"), label[..., None]])
    for read, start in zip(counted, starts, strict=True):
        _, count = reads.bricks_of(layout, start, crop)
        assert read.crop_bytes == 3 * 128**3
        assert read.cached_bytes >= np.prod(count) * layout.file_shape[3]  # all that it needs came from the file
        assert read.ratio < 3
    # On a page's edge DALI's request for all of the file takes effect: the first megabyte or more for every crop.
    reads.move_data(path, reads.PAGE)
    moved = reads.measure(path, starts, crop, layout)
    assert sum(r.ratio for r in moved) > sum(r.ratio for r in counted)
    write_npy(path, label[..., None])
    assert all(read.ratio > 3 for read in reads.measure(path, starts, crop, None, [label[..., None]]))


# --- changed underneath -------------------------------------------------------------------------------------------------


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(InputError) as error:
        Store.open(folder)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_a_copy_is_sound_with_or_without_its_times(prepared: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = Store.open(prepared).identity()
    summed: list[Path] = []
    monkeypatch.setattr(store, "checksum", lambda path: summed.append(path) or bricks.checksum(path))
    assert Store.open(copy).identity() == identity
    assert summed == []  # the times agree: nothing is read but headers
    for path in copy.rglob("*.npy"):
        os.utime(path)
    assert Store.open(copy).identity() == identity
    assert len(summed) == 4


def test_a_changed_file_is_named(copy: Path) -> None:
    first, second = Store.open(copy).cases("train")
    for path in (first.volume, second.foreground):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        refused(copy, str(path), "changed after it was written")
        path.write_bytes(content)
        Store.open(copy)


def test_a_file_that_cannot_be_read_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(store, "checksum", broken)
    path = Store.open(copy).cases("train")[0].volume
    os.utime(path)
    refused(copy, str(path), "Input/output error")


def test_a_file_of_another_case_is_refused(copy: Path) -> None:
    first, second = Store.open(copy).cases("train")
    shutil.copy2(second.folder / "volume.npy", first.folder / "volume.npy")  # a whole file of the right shape, with its times
    refused(copy, str(first.volume), "changed after it was written")
    shutil.rmtree(first.folder)
    shutil.copytree(second.folder, first.folder)
    refused(copy, "case.json", "train_1")


@pytest.mark.parametrize(("setting", "value"), [("dtype", "float16"), ("brick", [16, 16, 16])])
def test_an_index_of_other_settings_is_refused(copy: Path, setting: str, value: Any) -> None:
    index = json.loads((copy / "store.json").read_text())
    (copy / "store.json").write_text(json.dumps({**index, setting: value}))
    refused(copy, "case.json")


def test_a_store_of_version_1_is_refused(copy: Path) -> None:
    index = json.loads((copy / "store.json").read_text())
    (copy / "store.json").write_text(json.dumps({**index, "format_version": 1}))
    refused(copy, "format 1", "prepare it again")


# --- validated on write -------------------------------------------------------------------------------------------------


def test_bytes_that_come_back_wrong_are_no_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    source = write_cohort(tmp_path / "cohort", {"train": 2})
    monkeypatch.setattr(bricks, "checksum", lambda path: bricks.zlib.crc32(path.read_bytes()) ^ ("train_1-" in str(path)))
    assert prepare(source, tmp_path / "store") == 1
    error = capsys.readouterr().err
    assert "left out: case train_1: " in error
    assert "volume.npy does not come back as it was written" in error
    assert [p.name.split("-")[0] for p in (tmp_path / "store/cases").iterdir()] == ["train_0"]
    case = read_cohort(source).cases[1]
    with pytest.raises(InputError, match="does not come back"):
        prepare_case(case, tmp_path / "alone", Settings((1, 1, 1)))
    assert list((tmp_path / "alone/cases").iterdir()) == []  # at once, not only when a run ends


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda image, label: image.__setitem__((3, 3, 3, 0), np.nan), "intensities from nan to nan"),
    (lambda image, label: image.__setitem__((3, 3, 3, 0), 1.5), "intensities from 0.0 to 1.5"),
    (lambda image, label: label.__setitem__((3, 3, 3), 9), "values that the file does not have")])
def test_content_out_of_range_is_no_case(tmp_path: Path, spoil: Callable[[np.ndarray, np.ndarray], None], message: str,
                                         monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from dropgen_fast.data import prepare as module

    def rows(label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        spoil(image[-1], label)
        return np.empty((0, 3), np.int32)

    image: list[np.ndarray] = []
    made = module.prepare_image
    monkeypatch.setattr(module, "prepare_image", lambda *a: (p := made(*a), image.append(p.array))[0])
    monkeypatch.setattr(module, "foreground_rows", rows)
    assert prepare(write_cohort(tmp_path / "cohort", {"train": 1}), tmp_path / "store") == 2
    assert message in capsys.readouterr().err
    assert list((tmp_path / "store/cases").iterdir()) == []


# --- a disk that refuses ------------------------------------------------------------------------------------------------


def nothing_half_written(folder: Path) -> None:
    """No folder of a case that was begun, no part of an index, and every folder of a case is whole."""
    assert [p.name for p in folder.iterdir() if p.name.startswith(".") and p.name != store.LOCK] == []
    for case in (folder / "cases").iterdir():
        assert not case.name.startswith(".")
        info = json.loads((case / "case.json").read_text())
        for name, record in info["files"].items():
            assert bricks.checksum(case / name) == record["crc32"]


def one_line(text: str, *words: str) -> None:
    lines = [line for line in text.splitlines() if line.startswith("dropgen-fast prepare: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in text
    assert all(word in lines[0] for word in words), lines[0]


@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "mkdir"])
def test_a_disk_that_refuses_any_one_call(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    """The first call of `prepare` fails, then the second, until none is left; the store that was there stays what it was."""
    source = write_cohort(tmp_path / "cohort", {"train": 2}, shape=(8, 8, 8))
    assert prepare(source, tmp_path / "before") == 0
    identity = Store.open(tmp_path / "before").identity()
    real = getattr(os, call)
    failing, calls, failed = 0, 1, 0

    def refuse(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **options)

    while calls >= failing:
        folder = Path(shutil.copytree(tmp_path / "before", tmp_path / f"store {failing}"))
        failing, calls = failing + 1, 0
        capsys.readouterr()
        with monkeypatch.context() as patched:
            patched.setattr(os, call, refuse)
            status = prepare(source, folder, "--dtype", "float16")
        nothing_half_written(folder)
        if status == 0:  # the last round, or a call that may fail: to make a folder that is there
            assert Store.open(folder).identity() != identity
            continue
        assert status == 2
        one_line(capsys.readouterr().err, str(folder), "No space left on device", "make room")
        assert Store.open(folder).identity() == identity
        failed += 1
    assert failed >= {"fsync": 10, "rename": 2, "replace": 1, "mkdir": 2}[call]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, where one may be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_disk_that_fills_up(tmp_path: Path, small_disk: Path, workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_cohort(tmp_path / "cohort", {"train": 5}, shape=(60, 60, 60))  # 1.4 MB a case
    assert prepare(source, small_disk / "store", "--workers", workers) == 2
    one_line(capsys.readouterr().err, str(small_disk / "store"), "No space left on device", "make room")
    nothing_half_written(small_disk / "store")
    with pytest.raises(InputError, match="not a prepared store"):
        Store.open(small_disk / "store")
    whole = len(list((small_disk / "store/cases").iterdir()))
    assert whole >= 1
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    assert prepare(source, small_disk / "store") == 0
    assert f"{5 - whole} of them prepared now, {whole} unchanged" in capsys.readouterr().out


LIMITED = """
import resource, sys
from dropgen_fast.cli import run
from dropgen_fast.prepare import main

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    sys.exit(run("prepare", main, sys.argv[1:]))
"""


def test_files_that_may_not_grow(tmp_path: Path) -> None:
    """The operating system refuses a write half-way, in worker processes."""
    source = write_cohort(tmp_path / "cohort", {"train": 2}, shape=(60, 60, 60))
    (tmp_path / "limited.py").write_text(LIMITED)
    done = subprocess.run([sys.executable, tmp_path / "limited.py", "--source", source, "--store", tmp_path / "store",
                           "--workers", "2", "--spacing-mm", "1", "1", "1"], check=False, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    one_line(done.stderr, str(tmp_path / "store/cases/train_"), "File too large")
    nothing_half_written(tmp_path / "store")
    assert list((tmp_path / "store/cases").iterdir()) == []


def test_a_disk_that_reads_far_ahead_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where the store does not fit into memory, and the disk tells of it."""
    assert main(["--source", str(write_cohort(tmp_path / "cohort")), "--store", str(tmp_path / "store"), "--workers", "1"]) == 0
    opened = Store.open(tmp_path / "store")
    monkeypatch.setattr(store, "read_ahead_kib", lambda path: 4096)
    assert store.slow_disk(opened) == ""
    monkeypatch.setattr(os, "sysconf", lambda name: 64)  # pages, and bytes of one
    assert "reads 4096 KiB ahead" in store.slow_disk(opened)
    for ahead in (128, None):
        monkeypatch.setattr(store, "read_ahead_kib", lambda path, ahead=ahead: ahead)
        assert store.slow_disk(opened) == ""


def test_read_ahead_is_the_kernels(tmp_path: Path) -> None:
    ahead = read_ahead_kib(tmp_path)
    assert ahead is None or ahead >= 0


@pytest.fixture
def small(tmp_path: Path) -> Store:
    """A store of one case for each split."""
    source = write_cohort(tmp_path / "cohort", {"train": 1, "val": 1})
    assert main(["--source", str(source), "--store", str(tmp_path / "store"), "--workers", "1"]) == 0
    return Store.open(tmp_path / "store")


def again(opened: Store) -> int:
    """Prepare the same cohort into the same store once more."""
    return run("prepare", main, ["--source", str(opened.path.parent / "cohort"), "--store", str(opened.path), "--workers", "1"])


@pytest.mark.parametrize("byte", range(0, 118, 7))
def test_a_damaged_header_is_named_and_mended(small: Store, byte: int) -> None:
    """Whatever NumPy's parser makes of it."""
    volume = small.cases("train")[0].volume
    content = bytearray(volume.read_bytes())
    content[byte] ^= 1
    volume.write_bytes(content)
    with pytest.raises(InputError, match=r"volume\.npy"):
        Store.open(small.path)
    assert again(small) == 0
    Store.open(small.path)


@pytest.mark.parametrize("change", [{"brick": [0, 32, 8]}, {"prepared_shape": None}, {"id": "other"}])
def test_a_damaged_case_is_named(small: Store, change: dict[str, Any]) -> None:
    path = small.cases("train")[0].folder / "case.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=r"case\.json"):
        Store.open(small.path)


@pytest.mark.parametrize("change", [{"channels": None}, {"classes": None}, {"brick": 32}])
def test_a_damaged_index_is_named(small: Store, change: dict[str, Any]) -> None:
    path = small.path / "store.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=r"store\.json is damaged"):
        Store.open(small.path)


def test_the_index_must_mean_the_case(small: Store) -> None:
    path = small.path / "store.json"
    index = json.loads(path.read_text())
    index["cases"]["train"]["train_0"]["folder"] = index["cases"]["val"]["val_0"]["folder"]
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match="the index has it as train_0, it is of val_0"):
        Store.open(small.path)


def test_what_cannot_be_read_now_is_not_deleted(small: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file server that stutters says nothing about the file."""
    case = small.cases("train")[0]

    def stale(path: Path, *_: object) -> str:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(store, "npy_problem", stale)
    with pytest.raises(InputError, match="cannot be read: Stale file handle"):
        Store.open(small.path)
    assert again(small) == 2  # no training case could be looked at
    monkeypatch.undo()
    assert Store.open(small.path).cases("train")[0].folder == case.folder


def test_preparing_again_sets_lost_times_back(small: Store) -> None:
    case = small.cases("train")[0]
    written = case.volume.stat().st_mtime_ns
    os.utime(case.volume)
    assert case.volume.stat().st_mtime_ns != written
    assert again(small) == 0
    assert case.volume.stat().st_mtime_ns == written


def test_prune_leaves_what_is_no_case(small: Store) -> None:
    old = small.cases("train")[0].folder
    (small.path / "cases" / "notes.txt").write_text("mine")
    (small.path / ".store.json.x1").write_text("of a kill")
    source = small.path.parent / "cohort"
    assert main(["--source", str(source), "--store", str(small.path), "--workers", "1", "--dtype", "int16", "--prune"]) == 0
    assert not old.exists()
    assert (small.path / "cases" / "notes.txt").exists()
    assert not list(small.path.glob(".store.json.*"))


def test_a_median_that_moved_is_told(small: Store, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    index = json.loads((small.path / "store.json").read_text())
    (small.path / "store.json").write_text(json.dumps({**index, "spacing_mm": [2, 1, 1]}))
    assert again(small) == 0
    assert "median spacing is 1 1 1 mm, that of the store was 2 1 1 mm" in capsys.readouterr().err


def test_a_sigterm_ends_prepare_and_its_workers(tmp_path: Path) -> None:
    source = write_cohort(tmp_path / "cohort", {"train": 30}, shape=(64, 64, 64))
    command = [sys.executable, "-m", "dropgen_fast.prepare", "--source", str(source), "--store", str(tmp_path / "store"),
               "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    begun = time.monotonic()
    while not (tmp_path / "store/cases").exists() or not os.listdir(tmp_path / "store/cases"):
        assert time.monotonic() - begun < 60
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 143
    assert not list((tmp_path / "store/cases").glob(".*"))
    assert not (tmp_path / "store/store.json").exists()


@pytest.mark.parametrize("change", [{"format_version": 1}, {"brick": 32}])
def test_a_store_of_another_version_or_damaged_is_prepared_again(small: Store, change: dict[str, Any]) -> None:
    """Which is what its message tells to do; the spacing is the cohort's median here."""
    path = small.path / "store.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match="prepare"):
        Store.open(small.path)
    assert again(small) == 0
    assert Store.open(small.path).identity() == small.identity()
