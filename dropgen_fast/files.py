"""Files that are whole or not there: a reader finds the old one or the new one, never a part. And how disks read ahead."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when the block ends, once it is on the disk; not if the block raises."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp's files are their owner's alone
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file in one step."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def read_ahead_kib(path: Path) -> int | None:
    """How many KiB the kernel reads ahead on the disk or mount that holds a file or folder; None where it does not tell."""
    device = path.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    whole_disk = Path(f"/sys/dev/block/{name}").resolve().parent  # a partition has the setting of its disk
    for setting in (Path(f"/sys/class/bdi/{name}/read_ahead_kb"), whole_disk / "queue/read_ahead_kb"):
        if setting.exists():
            return int(setting.read_text())
    return None


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
