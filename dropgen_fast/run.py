"""A run's folder: its settings, its record of numbers, its checkpoints.

::

    config.yaml     every setting of the run
    metrics.jsonl   one JSON object a line: losses as they come, validations as they come
    best.pt, last.pt  checkpoints: the best validation Dice so far, and the latest
    events.*        the same numbers for TensorBoard
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
from pathlib import Path
from typing import IO, Any

import yaml
from torch.utils.tensorboard import SummaryWriter

from dropgen_fast.errors import InputError
from dropgen_fast.files import write_atomically

LOCK = ".lock"


class RunFolder:
    """The folder of one training run; a folder that holds another run, or anything else, is refused."""

    def __init__(self, path: Path, settings: dict[str, Any], *, resume: bool, free: tuple[str, ...] = ()) -> None:
        """Look at the folder of a new run, or with `resume` at one that holds a run with the same settings; write nothing.

        Args:
            path: the folder.
            settings: of the run, as `plain` gives them.
            resume: go on with the run that is there.
            free: settings that may differ from those of the run that is gone on with.

        Raises:
            InputError: the folder holds a run (and `resume` is off, or settings differ), or holds other files.
        """
        self.path, self._settings = path, settings
        self.best, self.last = path / "best.pt", path / "last.pt"
        self._config, self._metrics = path / "config.yaml", path / "metrics.jsonl"
        if path.exists() and not path.is_dir():
            raise InputError(f"--out {path} is a file; name a folder for the run")
        if self._config.exists():
            if not resume:
                raise InputError(f"--out {path} holds another run; give another folder, or --resume to go on with it")
            _check_same(self._config, settings, free)
        elif path.exists() and any(p for p in path.iterdir() if p.name != LOCK):
            raise InputError(f"--out {path} holds files that are no run; give an empty or a new folder")
        self._writer: SummaryWriter | None = None
        self._lock: IO[str] | None = None

    def start(self, step: int) -> None:
        """Begin to record after `step` steps; what an interrupted run recorded later than that is taken out.

        Raises:
            InputError: another process is training into this folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"--out {self.path}: another process is training into it; wait for it, or give another "
                             "folder") from error
        write_atomically(self._config, yaml.safe_dump(self._settings, sort_keys=False))
        kept = [line for line in self._lines() if json.loads(line)["step"] <= step]
        write_atomically(self._metrics, "".join(line + "\n" for line in kept))
        self._writer = SummaryWriter(str(self.path), purge_step=step + 1)

    def record(self, step: int, **values: Any) -> None:
        """Append one row, to metrics.jsonl and to TensorBoard."""
        with self._metrics.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        assert self._writer is not None, "start() comes first"
        for name, value in values.items():
            for key, number in (value if isinstance(value, dict) else {"": value}).items():
                if number is not None:
                    self._writer.add_scalar(f"{name}/{key}" if key else name, number, step)

    def close(self) -> None:
        """Flush what TensorBoard still holds, and let others into the folder."""
        if self._writer is not None:
            self._writer.close()
        if self._lock is not None:
            self._lock.close()

    def _lines(self) -> list[str]:
        """The whole lines of metrics.jsonl; a line that a kill cut short is no line."""
        if not self._metrics.exists():
            return []
        lines = self._metrics.read_text().split("\n")[:-1]
        return [line for line in lines if _is_row(line)]


def _is_row(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def plain(settings: Any) -> Any:
    """A dataclass as what YAML can hold: mappings, lists, strings, numbers."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        return {f.name: plain(getattr(settings, f.name)) for f in dataclasses.fields(settings)}
    if isinstance(settings, (list, tuple)):
        return [plain(v) for v in settings]
    return str(settings) if isinstance(settings, Path) else settings


def _check_same(config: Path, settings: dict[str, Any], free: tuple[str, ...]) -> None:
    """A resumed run must be the run that was begun."""
    try:
        before = _flat(yaml.safe_load(config.read_text()))
    except (yaml.YAMLError, AttributeError) as error:
        raise InputError(f"{config} is damaged; the run cannot be resumed") from error
    now = _flat(settings)
    differing = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k) and k not in free)
    if differing:
        changes = ", ".join(f"{k} was {before.get(k)} and is now {now.get(k)}" for k in differing)
        raise InputError(f"{config.parent} cannot be resumed with other settings: {changes}; "
                         "give the same ones, or another --out")


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
