"""Volumes in bricks: blocks of voxels that lie together in the file, so that a crop is a few runs of bytes.

volume.npy is a uint8 array (BZ, BY, BX, bytes): BZ × BY × BX bricks of bz × by × bx voxels, which cover the volume and are
filled up with zeros at its far ends. The bytes of one brick are its image, channel after channel, each (bz, by, bx) numbers of
the store's type (little endian), and then, where the case has one, its label (bz, by, bx) of one byte a voxel. In C order the
bricks along x follow each other: a crop is one run of bytes for each pair of a z and a y that it touches.

What a crop costs is counted by benchmarks/bytes_read.py, and explains the layout. The kernel reads ahead: with Linux' usual
128 KiB some 250 KiB around each run that a crop never asked for. So image and label share their runs, and bricks are large
along z and y, which makes runs few, and short along x, where it costs nothing. The data begins at the end of NumPy's header,
which is no multiple of a page, on purpose: from a page on, DALI would ask the kernel for the whole file, and the kernel would
read the first MB or more of it for every crop.

Images are in [0, 1]. As float16 a number between 1/2 and 1 has a step of 1/2048, and each halving of the number halves the
step; as int16, round(32767 · value), the step is 1/32767 everywhere: 16 times finer at the top, equal near 1/16, coarser below
1/32. Scans that spread over the whole range want int16, those whose window leaves most voxels near zero float16.
"""

from __future__ import annotations

import io
import math
import os
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dropgen_fast.errors import InputError

Shape = tuple[int, int, int]
DTYPES = ("float32", "float16", "int16")
"""Number types of stored images."""
INT16_ONE = 32767
"""What stands for 1 in an image of int16."""
BRICK: Shape = (32, 32, 8)
"""Voxels of a brick along z, y and x (the first, second and last axis)."""
HEADER_BYTES = 4096
"""More than the header of any of our files takes."""
BLOCK_BYTES = 1 << 20
PARSING = threading.Lock()
"""NumPy parses a header as Python source, which some versions of CPython 3.11 and 3.12 do not always survive in two threads at
once ("SystemError: AST constructor recursion depth mismatch")."""


@dataclass(frozen=True)
class FileRecord:
    """What a file was when it was written: its size, the zlib.crc32 of all its bytes, and its time of modification."""

    bytes: int
    crc32: int
    mtime_ns: int


@dataclass(frozen=True)
class Layout:
    """How a volume of `shape` (D, H, W) with that many image channels lies in volume.npy."""

    shape: Shape
    channels: int
    dtype: str
    labelled: bool
    brick: Shape

    @property
    def image_bytes(self) -> int:
        """Bytes of a brick that are its image; the rest is its label."""
        return self.channels * np.dtype(self.dtype).itemsize * math.prod(self.brick)

    @property
    def file_shape(self) -> tuple[int, int, int, int]:
        """Shape (BZ, BY, BX, bytes) of the array in the file."""
        z, y, x = (-(-n // b) for n, b in zip(self.shape, self.brick, strict=True))
        return z, y, x, self.image_bytes + self.labelled * math.prod(self.brick)

    def pack(self, image: npt.NDArray[Any], label: npt.NDArray[np.uint8] | None) -> npt.NDArray[np.uint8]:
        """Image (d, H, W, C) of the store's type and label (d, H, W) → (bricks, BY, BX, bytes); d may be a part of D."""
        parts = [_to_bricks(image, self.brick)]
        if label is not None:
            parts.append(_to_bricks(label[..., None], self.brick))
        return np.concatenate(parts, axis=-1)

    def unpack(self, bricks: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8] | None]:
        """Any block (nz, ny, nx, bytes) of bricks → its image (nz·bz, ny·by, nx·bx, C) and label (…, 1), or None without one."""
        stored = np.dtype(self.dtype).newbyteorder("<")
        image = _from_bricks(np.ascontiguousarray(bricks[..., : self.image_bytes]).view(stored), self.brick)
        label = _from_bricks(bricks[..., self.image_bytes :], self.brick) if self.labelled else None
        return image, label


def _to_bricks(volume: npt.NDArray[Any], brick: Shape) -> npt.NDArray[np.uint8]:
    """(d, H, W, C) → (nz, ny, nx, bytes), zeros where a brick reaches beyond the volume."""
    counts = [-(-n // b) for n, b in zip(volume.shape, brick, strict=False)]
    channels = volume.shape[3]
    whole = np.pad(volume, [*((0, n * b - size) for n, b, size in zip(counts, brick, volume.shape, strict=False)), (0, 0)])
    split = whole.reshape(counts[0], brick[0], counts[1], brick[1], counts[2], brick[2], channels)
    apart = split.transpose(0, 2, 4, 6, 1, 3, 5).astype(volume.dtype.newbyteorder("<"), order="C")
    return apart.reshape(*counts, -1).view(np.uint8)


def _from_bricks(bricks: npt.NDArray[Any], brick: Shape) -> npt.NDArray[Any]:
    """(nz, ny, nx, C·bz·by·bx) numbers → (nz·bz, ny·by, nx·bx, C)."""
    nz, ny, nx, _ = bricks.shape
    whole = bricks.reshape(nz, ny, nx, -1, *brick).transpose(0, 4, 1, 5, 2, 6, 3)
    return whole.reshape(nz * brick[0], ny * brick[1], nx * brick[2], -1)


def encode(image: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """An image in [0, 1] as the number type of a store, one of `DTYPES`."""
    return np.rint(image * np.float32(INT16_ONE)).astype(np.int16) if dtype == "int16" else image.astype(dtype, copy=False)


def decode(stored: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The image that `encode` was given, as float32, to within the stored type's rounding."""
    image = stored.astype(np.float32)
    return image / np.float32(INT16_ONE) if stored.dtype.kind == "i" else image


def write_volume(path: Path, layout: Layout, image: npt.NDArray[np.float32], label: npt.NDArray[np.uint8] | None) -> FileRecord:
    """Write an image (D, H, W, C) in [0, 1] and a label (D, H, W), one layer of bricks at a time; otherwise as `write_npy`."""
    def layers() -> Iterator[npt.NDArray[np.uint8]]:
        for z in range(0, layout.shape[0], layout.brick[0]):
            part = slice(z, z + layout.brick[0])
            yield layout.pack(encode(image[part], layout.dtype), None if label is None else label[part])

    return _write(path, layout.file_shape, np.dtype(np.uint8), layers())


def read_volume(path: Path, layout: Layout) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8] | None]:
    """The image (D, H, W, C) and the label (D, H, W, 1), None without one, that `write_volume` was given.

    Raises:
        InputError: the file is missing, damaged, or not of this layout.
    """
    try:
        problem = npy_problem(path, layout.file_shape, "uint8")
        image, label = layout.unpack(np.load(path)) if not problem else (np.empty(0), None)
    except (OSError, ValueError, EOFError) as error:
        problem = f"cannot be read ({error})"
    if problem:
        raise InputError(f"{path} {problem}: prepare the store again")
    inside = tuple(slice(n) for n in layout.shape)
    return decode(image[inside]), None if label is None else np.ascontiguousarray(label[inside])


def write_npy(path: Path, array: npt.NDArray[Any]) -> FileRecord:
    """Write an array in C order and .npy format 1.0, wait until it is on the disk, and read it back.

    Raises:
        InputError: other bytes came back than were written.
        OSError: the file system refused.
    """
    return _write(path, array.shape, array.dtype, [array])


def _write(path: Path, shape: Sequence[int], dtype: np.dtype[Any], parts: Iterable[npt.NDArray[Any]]) -> FileRecord:
    with path.open("wb") as file:
        header = _header(shape, dtype)
        file.write(header)
        crc32 = zlib.crc32(header)
        for part in parts:
            content = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
            file.write(content)
            crc32 = zlib.crc32(content, crc32)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what is read back comes from the disk
    if (found := checksum(path)) != crc32:
        raise InputError(f"{path} does not come back as it was written (checksum {found:08x}, not {crc32:08x}): check the disk")
    status = path.stat()
    return FileRecord(status.st_size, crc32, status.st_mtime_ns)


def _header(shape: Sequence[int], dtype: np.dtype[Any]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False,
                                                  "shape": tuple(map(int, shape))})
    return header.getvalue()


def checksum(path: Path) -> int:
    """The zlib.crc32 of a file's bytes."""
    crc32 = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            crc32 = zlib.crc32(block, crc32)
    return crc32


def npy_problem(path: Path, shape: Sequence[int], dtype: str) -> str:
    """What is wrong with a .npy file of ours ("" if nothing), judged from its header and its size; raises `OSError`."""
    wanted = _header(shape, np.dtype(dtype))
    try:
        with path.open("rb") as file:
            start = file.read(HEADER_BYTES)
            if not start.startswith(wanted):
                return _header_problem(start, shape, dtype)
            size = len(wanted) + math.prod(shape) * np.dtype(dtype).itemsize
            if (actual := file.seek(0, os.SEEK_END)) != size:
                return f"has {actual} bytes, expected {size}"
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except IsADirectoryError:
        return "is a folder"
    return ""


def _header_problem(start: bytes, shape: Sequence[int], dtype: str) -> str:
    """What a header that is not the expected one says."""
    content = io.BytesIO(start)
    try:
        with PARSING:
            if np.lib.format.read_magic(content) != (1, 0):
                return "is not in .npy format 1.0"
            found, fortran, found_dtype = np.lib.format.read_array_header_1_0(content)
    except Exception as error:  # NumPy parses it as Python: there is no end to what damaged bytes can raise
        return f"is damaged ({' '.join(str(error).split())})"
    return (f"holds {found_dtype} {found} in {'Fortran' if fortran else 'C'} order from byte {content.tell()}, "
            f"expected {dtype} {tuple(shape)} in C order")
