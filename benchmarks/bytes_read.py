"""How many bytes of a store's files a random crop reads, the kernel's read-ahead included: counted, not computed.

::

    python benchmarks/bytes_read.py --folder /on/the/disk --shape 512 512 400 --crop 128 128 128 --crops 20

For each layout a volume is written, and for each crop its pages are dropped from the page cache, the region is read through
DALI's numpy reader as training does, and the pages of the file that are then in the cache are counted (mincore). These pages
are what came from the disk: those that the crop needs and those that the kernel read ahead. The second count, `read_bytes` of
/proc/self/io, is the kernel's own of what this process made the block layer fetch; both are printed. The folder must be on a
disk: files of a tmpfs are nowhere but in memory, and are refused.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from nvidia.dali import fn, pipeline_def, types

from dropgen_fast.data.bricks import BRICK, Layout, encode, write_npy, write_volume
from dropgen_fast.files import read_ahead_kib

PAGE = mmap.PAGESIZE
SETTLED_S = 0.02
"""Read-ahead goes on after the reader has what it wanted: the count is taken when it has stood still for this long."""


@dataclass(frozen=True)
class CropRead:
    """One crop: bytes of the crop itself, bytes of the file in the page cache afterwards, bytes that /proc/self/io counted."""

    crop_bytes: int
    cached_bytes: int
    fetched_bytes: int

    @property
    def ratio(self) -> float:
        """Bytes read over bytes of the crop: the larger of the two counts."""
        return max(self.cached_bytes, self.fetched_bytes) / self.crop_bytes


def drop_pages(path: Path) -> None:
    """Take a file's pages out of the page cache; raises `RuntimeError` where they stay (tmpfs, a map that is open)."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if left := cached_bytes(path):
        raise RuntimeError(f"{left} bytes of {path} stay in the page cache: use a folder on a disk, and no other reader")


def cached_bytes(path: Path) -> int:
    """Bytes of a file, in whole pages, that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    size = path.stat().st_size
    pages = ctypes.create_string_buffer(-(-size // PAGE))
    with path.open("rb") as file:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        try:
            if libc.mincore(address, size, pages):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        finally:
            libc.munmap(address, size)
    return int((np.frombuffer(pages, np.uint8)[: -(-size // PAGE)] & 1).sum()) * PAGE


def settled_cached_bytes(path: Path) -> int:
    """`cached_bytes` once the kernel's read-ahead has come to its end."""
    before, now = -1, cached_bytes(path)
    while now != before:
        time.sleep(SETTLED_S)
        before, now = now, cached_bytes(path)
    return now


def fetched_bytes() -> int:
    """What this process has made the block layer fetch so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


@pipeline_def(batch_size=1, device_id=None, prefetch_queue_depth=1)
def _region(path: str, start: Sequence[int], shape: Sequence[int]) -> Any:
    return fn.readers.numpy(files=[path], roi_start=types.Constant(np.array(start, np.int32)), roi_shape=list(shape),
                            roi_axes=[0, 1, 2], out_of_bounds_policy="pad", fill_value=0)


def read_region(path: Path, start: Sequence[int], shape: Sequence[int], threads: int = 1) -> npt.NDArray[Any]:
    """A region of the first three axes through DALI's reader, as the training graph reads it."""
    pipeline = _region(str(path), start, shape, num_threads=threads)
    pipeline.build()
    (batch,) = pipeline.run()
    return np.array(batch.at(0))


def bricks_of(layout: Layout, start: Sequence[int], crop: Sequence[int]) -> tuple[list[int], list[int]]:
    """First brick and number of bricks along each axis that hold the crop at voxel `start`."""
    first = [s // b for s, b in zip(start, layout.brick, strict=True)]
    return first, [(s + n - 1) // b - f + 1 for s, n, b, f in zip(start, crop, layout.brick, first, strict=True)]


def read_crop(path: Path, start: Sequence[int], crop: Sequence[int], layout: Layout | None, threads: int = 1
              ) -> list[npt.NDArray[Any]]:
    """The crop at voxel `start`, inside the volume: its image and, where the file has one, its label, (*crop, C) each.

    `layout` None: the file is a plain array (D, H, W, C).
    """
    if layout is None:
        return [read_region(path, start, crop, threads)]
    first, count = bricks_of(layout, start, crop)
    whole = layout.unpack(read_region(path, first, count, threads))
    inside = tuple(slice(s - f * b, s - f * b + n) for s, f, b, n in zip(start, first, layout.brick, crop, strict=True))
    return [part[inside] for part in whole if part is not None]


def measure(path: Path, starts: Sequence[Sequence[int]], crop: Sequence[int], layout: Layout | None,
            volumes: Sequence[npt.NDArray[Any]] = (), threads: int = 1) -> list[CropRead]:
    """Read a crop at each start from the cold file; with `volumes` (image, label), check that it is theirs."""
    reads = []
    for start in starts:
        drop_pages(path)
        before = fetched_bytes()
        found = read_crop(path, start, crop, layout, threads)
        reads.append(CropRead(sum(part.nbytes for part in found), settled_cached_bytes(path), fetched_bytes() - before))
        inside = tuple(slice(s, s + n) for s, n in zip(start, crop, strict=True))
        if volumes and not all(np.array_equal(a, b[inside]) for a, b in zip(found, volumes, strict=True)):
            raise RuntimeError(f"the crop at {start} of {path} is not the volume's")
    return reads


def move_data(path: Path, start: int) -> None:
    """Let a .npy file's data begin at another byte: its header is filled up with spaces."""
    content = path.read_bytes()
    size = int.from_bytes(content[8:10], "little")
    header = content[10 : 10 + size].rstrip().ljust(start - 11) + b"\n"
    path.write_bytes(content[:8] + len(header).to_bytes(2, "little") + header + content[10 + size :])


def random_starts(shape: Sequence[int], crop: Sequence[int], count: int) -> list[list[int]]:
    """First voxels of crops inside a volume, uniform over all positions."""
    rng = np.random.default_rng(0)
    return [[int(rng.integers(0, n - c + 1)) for n, c in zip(shape, crop, strict=True)] for _ in range(count)]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("."), help="where to write the volumes (they are removed)")
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 400))
    parser.add_argument("--crop", type=int, nargs=3, default=(128, 128, 128))
    parser.add_argument("--crops", type=int, default=20)
    parser.add_argument("--cubes", type=int, nargs="+", default=(16, 32, 64), help="edges of the cubes beside the store's bricks")
    parser.add_argument("--image-dtype", choices=("float32", "float16", "int16"), default="int16")
    parser.add_argument("--threads", type=int, default=1, help="of DALI")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    image, label = rng.random((*options.shape, 1), np.float32), rng.integers(0, 255, (*options.shape, 1), np.uint8)
    both = [encode(image, options.image_dtype), label]
    starts = random_starts(options.shape, options.crop, options.crops)
    store = Layout(tuple(options.shape), 1, options.image_dtype, True, BRICK)
    print(f"volume {tuple(options.shape)} {options.image_dtype}, crop {tuple(options.crop)}, {options.crops} crops, "
          f"{options.threads} threads, read-ahead of the disk {read_ahead_kib(options.folder) or '?'} KiB")
    print("ratio = bytes read / bytes of the crop\n")
    print(f"{'layout':<32}{'file':<16}{'MiB':>6}{'mean':>8}{'max':>8}{'in cache':>10}{'fetched':>10}{'s a crop':>10}")

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "volume.npy"

        def row(name: str, file: str, layout: Layout | None, volumes: Sequence[npt.NDArray[Any]]) -> list[CropRead]:
            began = time.perf_counter()
            reads = measure(path, starts, options.crop, layout, volumes, options.threads)
            print_row(name, file, path.stat().st_size, reads, (time.perf_counter() - began) / options.crops)
            return reads

        two = []
        for file, volume in zip(("image", "label"), both, strict=True):
            write_npy(path, volume)
            two.append(row("plain C order", file, None, [volume]))
        print_row("plain C order", "both files", 0, _sum(*two))
        for edge in options.cubes:
            name = f"{edge} × {edge} × {edge}"
            cubes = replace(store, brick=(edge,) * 3)
            two = []
            for file, volume, dtype in (("image", image, options.image_dtype), ("label", label, "uint8")):
                layout = replace(cubes, labelled=False, dtype=dtype)
                write_volume(path, layout, volume, None)
                two.append(row(name, file, layout, [both[0] if file == "image" else label]))
            print_row(name, "both files", 0, _sum(*two))
            write_volume(path, cubes, image, label[..., 0])
            row(name, "one file", cubes, both)
        name = " × ".join(map(str, BRICK)) + ", the store's"
        write_volume(path, store, image, label[..., 0])
        row(name, "one file", store, both)
        move_data(path, PAGE)
        row("same, data on a page's edge", "one file", store, both)


def _sum(a: Sequence[CropRead], b: Sequence[CropRead]) -> list[CropRead]:
    """The crops of two files as one."""
    return [CropRead(x.crop_bytes + y.crop_bytes, x.cached_bytes + y.cached_bytes, x.fetched_bytes + y.fetched_bytes)
            for x, y in zip(a, b, strict=True)]


def print_row(name: str, file: str, size: int, reads: Sequence[CropRead], seconds: float | None = None) -> None:
    """One line of the table."""
    cached = statistics.mean(r.cached_bytes / r.crop_bytes for r in reads)
    fetched = statistics.mean(r.fetched_bytes / r.crop_bytes for r in reads)
    ratios = [r.ratio for r in reads]
    print(f"{name:<32}{file:<16}{f'{size / 2**20:.0f}' if size else '':>6}{statistics.mean(ratios):>8.2f}{max(ratios):>8.2f}"
          f"{cached:>10.2f}{fetched:>10.2f}{'' if seconds is None else f'{seconds:.3f}':>10}")


if __name__ == "__main__":
    sys.exit(main())
