"""What a crop costs to read, by layout: the store's bricks, cubes, plain arrays.

::

    python benchmarks/bytes_read.py --folder /on/the/disk --shape 512 512 400 --crop 128 128 128 --crops 20

For each layout a volume is written and the bytes that random crops read from it are counted, as
`dropgen_fast/bench/loading/reads.py` says. Both counts are printed: pages that were in the cache afterwards, bytes that the
process made the block layer fetch. The folder must be on a disk: files of a tmpfs are nowhere but in memory, and are refused.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dropgen_fast.bench.loading.reads import PAGE, CropRead, measure, move_data, random_starts
from dropgen_fast.data.bricks import BRICK, Layout, encode, write_npy, write_volume
from dropgen_fast.files import read_ahead_kib


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
    starts = random_starts(options.shape, options.crop, options.crops, np.random.default_rng(0))
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
