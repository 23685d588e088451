"""Training batches: random crops of a prepared store, read by NVIDIA DALI and augmented, on the CPU or on a GPU.

DALI reads, crops, flips, turns and draws (`graph.py`), ahead of the training; `augment.py` does the rest with what was drawn.
Every random number is drawn inside DALI, so that `TrainingPipeline.state` covers the whole stream, prefetched batches included.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dropgen_fast.data.augment import Augmenter, ChainName, uniforms_per_sample
from dropgen_fast.data.augmentation import AugmentationConfig
from dropgen_fast.data.store import Store, StoredCase
from dropgen_fast.errors import InputError


@dataclass(frozen=True)
class Batch:
    """Crops of N cases, contiguous: `image` (N, C, D, H, W) float32 in [0, 1] and `label` (N, 1, D, H, W) uint8."""

    image: torch.Tensor
    label: torch.Tensor
    cases: tuple[str, ...]
    starts: tuple[tuple[int, ...], ...]
    """Of each crop the first voxel (z, y, x) that was read of its volume, before flips and turns; negative in padding."""


class TrainingPipeline(Iterator[Batch]):
    """An endless iterator of training batches.

    Cases are reshuffled every epoch; a batch may span two epochs. With several ranks each reads its own share of the cases,
    and the shares move on by one rank every epoch; with fewer cases than ranks, each reads all, in an order of its own. A batch
    may be DALI's own memory (nothing is copied), which DALI does not use again while a tensor of the batch is alive.

    Args:
        store: the prepared store.
        split: which cases to read.
        patch: voxels (D, H, W) of a crop; smaller volumes are padded with zeros, their lowest intensity.
        batch_size: crops per batch and rank.
        seed: decides the order of the cases and every draw; the same for all ranks.
        augmentation: what is done to a crop.
        chain: what does the intensities: "fused", one op, or "dali", one DALI operator after the other; see `Augmenter`.
        foreground_fraction: probability that a crop is placed to hold a foreground voxel, of a class drawn uniformly from those
            that occur in the case.
        device: index of the GPU that augments and holds the batches; None: the CPU.
        num_threads: DALI's CPU threads.
        rank, world_size: this process among those that train together.
        case_ids: use only these cases of the split.
        align: crops begin at multiples of so many voxels, counted on the volume as `features.volume.pad` pads it.
        restore: a `state` to go on from; everything else must be as it was then, except `num_threads`.

    Raises:
        InputError: DALI is not installed, a setting is wrong, a case has no label, `restore` does not fit.
    """

    def __init__(self, store: Store, *, patch: tuple[int, int, int], batch_size: int, seed: int, split: str = "train",
                 augmentation: AugmentationConfig | None = None, chain: ChainName = "fused", foreground_fraction: float = 0.33,
                 device: int | None = None, num_threads: int = 2, rank: int = 0, world_size: int = 1,
                 case_ids: Sequence[str] | None = None, align: tuple[int, int, int] = (1, 1, 1), restore: bytes | None = None
                 ) -> None:
        augmentation = augmentation or AugmentationConfig()
        _check(patch, batch_size, foreground_fraction, num_threads, rank, world_size)
        _check_alignment(align, patch, augmentation)
        cases = _select(store, split, case_ids)
        self.cases_per_epoch = len(cases)
        self._device = device
        self._case_of = {str(case.foreground): case.id for case in cases}
        self._identity = {
            "store": store.identity(), "cases": hashlib.sha256(json.dumps([c.id for c in cases]).encode()).hexdigest(),
            "patch": list(patch), "batch_size": batch_size, "seed": seed, "augmentation": dataclasses.asdict(augmentation),
            "chain": chain, "foreground_fraction": foreground_fraction, "align": list(align),
            "device": "cpu" if device is None else "gpu", "rank": rank, "world_size": world_size}
        self._identity = json.loads(json.dumps(self._identity))  # tuples become lists, as they do in a state
        channels = len(store.channels)
        self._augmenter = Augmenter(augmentation, patch, channels, batch_size, chain, device, num_threads)
        # With fewer cases than ranks every rank reads all of them.
        order = _seed("order", seed) if len(cases) >= world_size else _seed("order", seed, rank)
        shard, shards = (rank, world_size) if len(cases) >= world_size else (0, 1)
        self._pipeline = _training_graph()(
            volumes=[str(c.volume) for c in cases], foregrounds=[str(c.foreground) for c in cases], layout=cases[0].layout,
            patch=tuple(patch), augmentation=augmentation, uniforms=uniforms_per_sample(channels),
            foreground_fraction=foreground_fraction, align=align, reader_seed=order, rank=shard, world_size=shards,
            gpu=device is not None, batch_size=batch_size, num_threads=num_threads, device_id=device,
            seed=_seed("draws", seed, rank), checkpoint=self._checkpoint(restore))
        try:
            self._pipeline.build()
        except RuntimeError as error:
            if restore is not None and "checkpoint" in str(error).lower():
                raise InputError("the state to restore is damaged: DALI cannot read its part of it") from error
            raise _readable(error) from error

    def __next__(self) -> Batch:
        """The next batch; raises `InputError` naming the file where one cannot be read."""
        try:
            # On a GPU the batch is ordered on torch's stream: nobody waits, and memory goes back to DALI after torch's last use.
            stream = None if self._device is None else torch.cuda.current_stream(self._device)
            image, label, uniforms, origin, start, *normals = self._pipeline.run(stream)
        except RuntimeError as error:
            raise _readable(error) from error
        cases = tuple(self._case_of[bytes(origin.at(i)).decode()] for i in range(len(origin)))
        augmented = self._augmenter(_tensor(image), _tensor(label), _tensor(uniforms), _tensor(normals[0]) if normals else None)
        return Batch(*augmented, cases, tuple(tuple(row) for row in _tensor(start).tolist()))

    def state(self) -> bytes:
        """Everything that the constructor's `restore` needs to go on with the batch after the last one returned, bit for bit."""
        return json.dumps(self._identity, sort_keys=True).encode() + b"\n" + bytes(self._pipeline.checkpoint())

    def _checkpoint(self, state: bytes | None) -> bytes | None:
        if state is None:
            return None
        header, newline, checkpoint = state.partition(b"\n")
        try:
            saved = json.loads(header)
        except ValueError:
            saved = None
        if not newline or not isinstance(saved, dict):
            raise InputError("the state to restore is not one of a TrainingPipeline")
        for name, value in self._identity.items():
            if saved.get(name) != value:
                raise InputError(f"cannot go on from this state: {name} was {saved.get(name)}, now it is {value}")
        return checkpoint


def _tensor(batch: Any) -> torch.Tensor:
    """DALI's batch as a torch view of the same memory."""
    tensor: torch.Tensor = torch.from_dlpack(batch.as_tensor())
    return tensor


def _training_graph() -> Any:
    try:
        from dropgen_fast.data.graph import training_graph
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("nvidia"):
            raise
        raise InputError("NVIDIA DALI is not installed: install one of the extras cpu, cuda13 and cuda12, "
                         "for example pip install 'dropgen_fast[cpu]'") from error
    return training_graph


def _seed(purpose: str, *numbers: int) -> int:
    """A seed that DALI takes (31 bits), different for every purpose and rank."""
    return int.from_bytes(hashlib.sha256(json.dumps([purpose, *numbers]).encode()).digest()[:4], "big") >> 1


def _check(patch: Sequence[int], batch_size: int, foreground_fraction: float, num_threads: int, rank: int, world_size: int
           ) -> None:
    if len(patch) != 3 or not all(isinstance(n, int) and n > 0 for n in patch):
        raise InputError(f"patch must be three positive whole numbers, got {patch}")
    if batch_size < 1 or num_threads < 1:
        raise InputError(f"batch_size and num_threads must be at least 1, got {batch_size} and {num_threads}")
    if not 0 <= foreground_fraction <= 1:
        raise InputError(f"foreground_fraction must be between 0 and 1, got {foreground_fraction}")
    if not 0 <= rank < world_size:
        raise InputError(f"rank must be between 0 and world_size - 1 = {world_size - 1}, got {rank}")


def _check_alignment(align: Sequence[int], patch: Sequence[int], augmentation: AugmentationConfig) -> None:
    if not all(n >= 1 and size % n == 0 for n, size in zip(align, patch, strict=True)):
        raise InputError(f"align must divide the patch {patch}, got {align}")
    if tuple(align) != (1, 1, 1) and augmentation.turning:
        raise InputError("align is for patches that are not turned; rotate90_probability is "
                         f"{augmentation.rotate90_probability}")


def _select(store: Store, split: str, case_ids: Sequence[str] | None) -> list[StoredCase]:
    cases = {case.id: case for case in store.cases(split)}
    if not cases:
        raise InputError(f"{store.path} has no {split} cases: prepare a cohort with a {split} split")
    if case_ids is not None:
        if unknown := [i for i in case_ids if i not in cases]:
            raise InputError(f"{store.path} has no {split} case {unknown[0]!r}")
        cases = {case_id: cases[case_id] for case_id in sorted(set(case_ids))}
    if unlabelled := [case.id for case in cases.values() if case.label_source is None]:
        raise InputError(f"{split} case {unlabelled[0]!r} of {store.path} has no label")
    return list(cases.values())


def _readable(error: RuntimeError) -> Exception:
    """DALI's many-line error as one line where it is about a file of the store; any other as it is."""
    path = re.search(r"/[^\n\"'`]+\.npy", str(error))
    if path is None:
        return error
    return InputError(f"{path[0]} cannot be read: it is missing, damaged or was changed while in use; prepare the store again")
