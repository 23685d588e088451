"""Features of whole volumes, kept on disk: a frozen extractor gives the same for the same volume every time."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dropgen_fast.files import replacing

VERSION = 1
DAMAGED = (RuntimeError, OSError, EOFError, KeyError, TypeError, pickle.UnpicklingError, zipfile.BadZipFile)
"""What torch raises for a file that is not whole, or not one of these."""

log = logging.getLogger(__name__)


class FeatureCache:
    """A folder of features, each under the hash of all that decides it. Several processes may share it.

    Args:
        folder: made when the first features are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._refused = False

    def features(self, volume: Tensor, about: Mapping[str, Any], compute: Callable[[], Tensor | None]) -> Tensor | None:
        """The features of a volume, from the folder or else computed and kept.

        A disk that refuses to be written costs nothing but the time of computing again; a line says so once.

        Args:
            volume: the extractor's input, any tensor.
            about: all else that decides the features: the extractor's identity, the arithmetic, the padding.
            compute: gives the features, or None where they cannot be had.

        Returns:
            On the CPU from the folder, mapped and not read until they are used. Those that were just computed on the CPU are
            so too, that they need not be held; others are where `compute` puts them.
        """
        path = self.folder / f"{_key(volume, about)}.pt"
        kept = _read(path)
        if kept is not None:
            return kept
        found = compute()
        if found is None or not self._keep(path, found) or found.device.type != "cpu":
            return found
        kept = _read(path)
        return kept if kept is not None else found

    def _keep(self, path: Path, features: Tensor) -> bool:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                torch.save({"features": features.cpu()}, file)
            return True
        except OSError as error:
            if not self._refused:
                log.warning("features are not kept: %s: %s", error.filename or path, error.strerror or error)
            self._refused = True
            return False


def _key(volume: Tensor, about: Mapping[str, Any]) -> str:
    digest = hashlib.blake2b(json.dumps([VERSION, list(volume.shape), str(volume.dtype), dict(about)], sort_keys=True).encode(),
                             digest_size=32)
    digest.update(volume.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> Tensor | None:
    """What was kept; None where there is nothing, or a file that is damaged."""
    if not path.exists():
        return None
    try:
        features = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["features"]
    except DAMAGED:
        return None
    return features if isinstance(features, Tensor) else None
