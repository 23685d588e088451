"""Frozen feature extractors: the embedded MIND-SSC, the anatomix family, or any module of yours."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from dropgen_fast.errors import InputError
from dropgen_fast.features import anatomix, mind
from dropgen_fast.features.folded import FoldedUNet
from dropgen_fast.features.frozen import FrozenExtractor
from dropgen_fast.networks import fake_forward, import_object

__all__ = ["FrozenExtractor", "load_extractor"]

NAMES = ("mind", *anatomix.ARCHITECTURES)
PROBED_SIDES = (64, 32, 96, 128)  # voxels; 128 is what ViTs often want and nothing else


def load_extractor(
    name: str, *, stride: int = 1, weights: str | Path | None = None, sha256: str | None = None, revision: str | None = None,
) -> FrozenExtractor:
    """A frozen extractor by name: (N, Ci, D, H, W) in [0, 1] → (N, Ci · channels, d, h, w).

    Args:
        name: "mind" (embedded, 12 channels), "anatomix" or "anatomix-dev" (16 and 32 channels, published weights), or
            ``package.module:factory``, where ``factory()`` gives a module (N, 1, D, H, W) → (N, C, d, h, w); C is its attribute
            ``channels``, else it is found by trying it, without arithmetic, on cubes of `PROBED_SIDES` voxels until it takes one.
        stride: run it on the image downsampled by this factor.
        weights: local file of the published weights; None: from the Hugging Face Hub.
        sha256: what that file's hash must be.
        revision: of the Hub's repository, where the weights come from there; None: its newest.

    Raises:
        InputError: no such extractor, or weights that cannot be had or do not fit.
    """
    if stride < 1:
        raise InputError(f"extractor stride must be at least 1, got {stride}")
    if name not in anatomix.ARCHITECTURES and (weights, sha256, revision) != (None, None, None):
        raise InputError(f"extractor {name!r} takes no weights; they are for {' and '.join(anatomix.ARCHITECTURES)}")
    if weights is not None and revision is not None:
        raise InputError(f"extractor weights are the file {weights} or the Hub's revision {revision}: give one of them")
    if name == "mind":
        return FrozenExtractor(mind.MIND(), name=name, channels=mind.CHANNELS, stride=stride, sha256=mind.VERSION)
    if name in anatomix.ARCHITECTURES:
        network, digest = anatomix.load(name, None if weights is None else Path(weights), sha256, revision)
        return FrozenExtractor(FoldedUNet(network), name=name, channels=anatomix.channels(name), stride=stride, sha256=digest)
    if ":" not in name:
        raise InputError(f"no extractor {name!r}; there are {', '.join(NAMES)}, or give package.module:factory")
    factory = import_object(name, "extractor")
    try:
        module = factory()
    except Exception as error:  # whatever a foreign factory raises
        raise InputError(f"extractor {name} cannot be made: {' '.join(str(error).split()) or type(error).__name__}") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"extractor {name} must give a torch.nn.Module, got {type(module).__name__}")
    return FrozenExtractor(module, name=name, channels=_channels(module, name), stride=stride, sha256=_state_hash(module))


def _channels(module: nn.Module, name: str) -> int:
    """How many features a module gives: its attribute, else what comes out of it."""
    told = getattr(module, "channels", None)
    if isinstance(told, int):
        return told
    module.eval()
    problems = []
    for side in PROBED_SIDES:
        try:
            out = fake_forward(module, (1, 1, side, side, side))
        except Exception as error:  # whatever a foreign module raises for a size that it cannot take
            problems.append(" ".join(str(error).split())[:300])
            continue
        if not isinstance(out, torch.Tensor) or out.dim() != 5:
            raise InputError(f"extractor {name} must give a tensor (N, C, d, h, w), got "
                             f"{tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__}")
        return out.shape[1]
    raise InputError(f"extractor {name} takes no cube of {', '.join(map(str, PROBED_SIDES))} voxels ({problems[0]}); give it an "
                     "attribute `channels` if it needs another size")


def _state_hash(module: nn.Module) -> str:
    """SHA-256 over the names and bytes of a module's state."""
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
