"""Checkpoints: one file that holds all that a resumed run needs, whole or not there at all."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from dropgen_fast.errors import InputError
from dropgen_fast.files import replacing

VERSION = 2


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


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of torch's generators: the CPU's, and that of the GPU that a process trains on."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put torch's generators where `rng_state` found them."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and device.type == "cuda":  # else: resumed on another kind of device
        torch.cuda.set_rng_state(state["cuda"], device)
