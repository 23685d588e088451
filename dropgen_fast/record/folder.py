"""A run's folder: its settings, its record of numbers and pictures, its checkpoints.

::

    config.yaml     every setting of the run
    metrics.jsonl   one JSON object a line: losses as they come, validations as they come
    best.pt, last.pt  checkpoints: the best validation Dice so far, and the latest
    panels/*.png    validation cases as the latest validation saw them
    run.html        a page of all that, at the end
    events.*        numbers and pictures for TensorBoard
"""

from __future__ import annotations

import fcntl
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import yaml
from matplotlib.image import imsave
from torch.utils.tensorboard import SummaryWriter

from dropgen_fast.config import flat
from dropgen_fast.errors import InputError
from dropgen_fast.files import write_atomically
from dropgen_fast.record.page import write_page

LOCK = ".lock"
WANDB_ID = ".wandb_id"
PANELS = "panels"
METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
BEING_WRITTEN = (".config.yaml.*", ".metrics.jsonl.*", ".last.pt.*", ".best.pt.*", ".run.html.*", ".requeue.*")
"""What a kill leaves of a file that was being written (see `files.replacing`)."""


class RunFolder:
    """The folder of one training run; a folder that holds another run, or anything else, is refused."""

    def __init__(
        self, path: Path, settings: dict[str, Any], *, resume: bool, free: Sequence[str] = (), wandb: str | None = None,
    ) -> None:
        """Look at the folder of a new run, or with `resume` at one that holds a run with the same settings; write nothing.

        Args:
            path: the folder.
            settings: of the run: mappings, lists, strings, numbers.
            resume: go on with the run that is there.
            free: settings that may differ from those of the run that is gone on with.
            wandb: a project of Weights & Biases that is to get the numbers too.

        Raises:
            InputError: the folder holds a run (and `resume` is off, or settings differ), or holds other files; or there is no
                package wandb.
        """
        self.path, self._settings = path, settings
        self._config, self._metrics = path / CONFIG, path / METRICS
        if path.exists() and not path.is_dir():
            raise InputError(f"--out {path} is a file; name a folder for the run")
        if self._config.exists():
            if not resume:
                raise InputError(f"--out {path} holds another run; give another folder, or --resume to go on with it")
            _check_same(self._config, settings, free)
        elif path.exists() and set(path.iterdir()) - {path / LOCK, *_leftovers(path)}:
            raise InputError(f"--out {path} holds files that are no run; give an empty or a new folder")
        self._writer: SummaryWriter | None = None
        self._lock: IO[str] | None = None
        self._project, self._wandb = wandb, _import_wandb() if wandb is not None else None
        self._online: Any = None

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
        for leftover in _leftovers(self.path):
            leftover.unlink(missing_ok=True)
        write_atomically(self._config, yaml.safe_dump(self._settings, sort_keys=False))
        kept = [row for row in read_metrics(self._metrics) if row["step"] <= step]
        write_atomically(self._metrics, "".join(json.dumps(row) + "\n" for row in kept))
        self._writer = SummaryWriter(str(self.path), purge_step=step + 1)
        if self._wandb is not None:
            self._online = self._go_online()

    def record(self, step: int, **values: Any) -> None:
        """Append one row, to metrics.jsonl, to TensorBoard and, where asked for, to Weights & Biases.

        A value is a number, None (there is none) or a mapping of such by name.
        """
        with self._metrics.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        assert self._writer is not None, "start() comes first"
        numbers = {f"{name}/{key}" if key else name: number for name, value in values.items()
                   for key, number in (value if isinstance(value, dict) else {"": value}).items() if number is not None}
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)
        if self._online is not None:
            self._online.log(numbers, step=step)

    def picture(self, step: int, case_id: str, pixels: npt.NDArray[np.uint8]) -> None:
        """Keep a picture (height, width, 3) of a validation case; the folder keeps the latest of each case, TensorBoard all."""
        folder = self.path / PANELS
        folder.mkdir(exist_ok=True)
        imsave(folder / f"{case_id}.png", pixels)
        assert self._writer is not None, "start() comes first"
        self._writer.add_image(f"validation/{case_id}", pixels, step, dataformats="HWC")
        if self._online is not None and self._wandb is not None:
            self._online.log({f"validation/{case_id}": self._wandb.Image(pixels)}, step=step)

    def finish(self) -> None:
        """Write the run's page."""
        panels = sorted((self.path / PANELS).glob("*.png"))
        write_page(self.path / "run.html", self.path.resolve().name, self._settings, read_metrics(self._metrics), panels)

    def close(self) -> None:
        """Flush what TensorBoard and Weights & Biases still hold, and let others into the folder."""
        if self._writer is not None:
            self._writer.close()
        if self._online is not None:
            self._online.finish()
        if self._lock is not None:
            self._lock.close()

    def _go_online(self) -> Any:
        """The run at Weights & Biases: the same one after every restart."""
        assert self._wandb is not None
        held = self.path / WANDB_ID
        if not held.exists():
            write_atomically(held, secrets.token_hex(4))
        try:
            return self._wandb.init(project=self._project, id=held.read_text(), name=self.path.resolve().name, resume="allow",
                                    dir=str(self.path), config=self._settings)
        except Exception as error:  # its client has many ways to say that it cannot be reached
            raise InputError(f"--wandb {self._project}: {' '.join(str(error).split())[:300]}; set WANDB_MODE=offline, or leave "
                             "--wandb out") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, none where it is missing; a line that a kill cut short is no row."""
    if not path.exists():
        return []
    rows = [_row(line) for line in path.read_text().split("\n")[:-1]]
    return [row for row in rows if row is not None]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _leftovers(path: Path) -> list[Path]:
    return [leftover for pattern in BEING_WRITTEN for leftover in path.glob(pattern)]


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise InputError("--wandb needs the package wandb: install dropgen_fast[wandb], or leave it out") from error
    return wandb


def _check_same(config: Path, settings: dict[str, Any], free: Sequence[str]) -> None:
    """A resumed run must be the run that was begun."""
    try:
        before = flat(yaml.safe_load(config.read_text()))
    except (yaml.YAMLError, AttributeError) as error:
        raise InputError(f"{config} is damaged; the run cannot be resumed") from error
    now = flat(settings)
    differing = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k) and k not in free)
    if differing:
        changes = ", ".join(f"{k} was {before.get(k)} and is now {now.get(k)}" for k in differing)
        raise InputError(f"{config.parent} cannot be resumed with other settings: {changes}; "
                         "give the same ones, or another --out")

