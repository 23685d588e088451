"""anatomix: the published foundation models that are U-Nets, trained on synthetic volumes (arXiv 2411.02372).

Architectures as their authors' repository, github.com/neel-dey/anatomix, has them at a29b8a8.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dropgen_fast.errors import InputError
from dropgen_fast.networks import UNet

HUB_REPOSITORY = "neeldey/anatomix"
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "anatomix": {"out_channels": 16, "base_channels": 16, "downsamplings": 4},
    "anatomix-dev": {"out_channels": 32, "base_channels": 32, "downsamplings": 5, "normalization": "instance", "eps": 1e-2,
                     "pooling": "average", "upsampling": "trilinear"},
}
"""Arguments of `UNet` by name; their weights are ``<name>.pth`` in the Hub's repository."""
SHA256 = re.compile("[0-9a-f]{64}")
WAY_OUT = "download {} from there on another machine and give its path (--extractor-weights)"


def channels(name: str) -> int:
    """How many features a model of `ARCHITECTURES` gives."""
    return int(ARCHITECTURES[name]["out_channels"])


def build(name: str = "anatomix") -> UNet:
    """A model of `ARCHITECTURES`, with fresh weights."""
    return UNet(1, **ARCHITECTURES[name])


def load(
    name: str = "anatomix", weights: Path | None = None, sha256: str | None = None, revision: str | None = None,
) -> tuple[UNet, str]:
    """The network with its published weights, and the SHA-256 of their file.

    Args:
        name: of `ARCHITECTURES`.
        weights: a local file (.pth or .safetensors); None: ``<name>.pth`` from the Hugging Face Hub.
        sha256: what the file's hash must be; a file from the Hub is held against the hash that the Hub gives anyway.
        revision: of the Hub's repository, a commit, tag or branch; None: its newest.

    Raises:
        InputError: no such file, the Hub cannot be reached, a hash that differs, or a file that is not these weights.
    """
    path, published = (weights, None) if weights is not None else _from_hub(f"{name}.pth", revision)
    if not path.is_file():
        raise InputError(f"weights {path} do not exist")
    digest = _sha256(path)
    for wanted, whose in ((sha256, "asked for"), (published, "the Hub's")):
        if wanted is not None and wanted.lower() != digest:
            raise InputError(f"weights {path} have SHA-256 {digest}, {whose} is {wanted}: the file is damaged or another one")
    network = build(name)
    state = _read(path)
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise InputError(f"weights {path} are not those of {name}: {' '.join(str(error).split())[:300]}") from error
    if not all(value.isfinite().all() for value in network.state_dict().values()):
        raise InputError(f"weights {path} hold values that are not finite: the file is damaged or another one")
    return network, digest


def _from_hub(name: str, revision: str | None) -> tuple[Path, str | None]:
    """(local copy of a file of the Hub's repository, the SHA-256 that the Hub publishes for it).

    The Hub is asked for the hash first: that fails at once where there is no network, and the download after many tries.
    """
    import huggingface_hub

    try:
        etag = huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(HUB_REPOSITORY, name, revision=revision)).etag
    except Exception as error:  # the Hub's client has changed its HTTP library, and its exceptions, twice
        return _from_cache(name, revision, error)
    if etag is None or not SHA256.fullmatch(etag):
        raise InputError(f"the Hugging Face Hub publishes no SHA-256 for {name} of {HUB_REPOSITORY}: {WAY_OUT.format(name)}")
    try:
        return Path(huggingface_hub.hf_hub_download(HUB_REPOSITORY, name, revision=revision)), etag
    except Exception as error:
        raise InputError(f"{name} of {HUB_REPOSITORY} could not be downloaded ({type(error).__name__}): "
                         f"{WAY_OUT.format(name)}") from error


def _from_cache(name: str, revision: str | None, problem: Exception) -> tuple[Path, str | None]:
    """What an earlier download left; the cache keeps files under the hash that the Hub gave, behind a link."""
    import huggingface_hub

    try:
        path = Path(huggingface_hub.hf_hub_download(HUB_REPOSITORY, name, revision=revision, local_files_only=True))
    except Exception as error:
        raise InputError(f"the Hugging Face Hub cannot be reached for {HUB_REPOSITORY} ({type(problem).__name__}): "
                         f"{WAY_OUT.format(name)}") from error
    stored = path.resolve().name
    return path, stored if SHA256.fullmatch(stored) else None


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file; a prefix that torch.compile left is taken off."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own ways to be damaged
        raise InputError(f"weights {path} are damaged or no weights file: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"weights {path} must hold a plain state dict of tensors, got {type(state).__name__}")
    return {str(key).removeprefix("_orig_mod."): value for key, value in state.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
