"""Checkpoints: one file that holds all that a resumed run needs, whole or not there at all."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from dropgen_fast.errors import InputError
from dropgen_fast.files import replacing

VERSION = 1


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint under another name, flush it to disk and rename it into place.

    `content` holds tensors and plain Python values only, so that it loads with ``weights_only=True``.
    """
    try:
        with replacing(path) as file:
            torch.save({"version": VERSION, **content}, file)
    except OSError as error:
        raise InputError(f"checkpoint {path} cannot be written: {error.strerror or error}") from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU.

    Raises:
        InputError: there is none, it is damaged, or another version wrote it.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"checkpoint {path} does not exist") from error
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise InputError(f"checkpoint {path} is damaged or not a checkpoint "
                         f"({type(error).__name__}); give another, or train again") from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise InputError(f"checkpoint {path} has version {version}, this program reads version {VERSION}")
    return content


def rng_state() -> dict[str, Any]:
    """State of torch's generators, the CPU's and every GPU's."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state: dict[str, Any]) -> None:
    """Put torch's generators where `rng_state` found them."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):  # else: resumed elsewhere, on another number of GPUs
        torch.cuda.set_rng_state_all(state["cuda"])
