"""A training on many GPUs on paper: what it sends, reads and writes, and what of it a step waits for.

How long a step takes on one GPU, T, is the reader's to put in: it is measured, not computed. The speeds of links and disks are
assumptions (`Cluster`). Everything else is counted: parameters and their gradients, in the network as it is built; the bytes of
a crop, in the store's bricks; messages, by the algorithm that sends them. ``python benchmarks/scaling.py --model`` prints the
tables of docs/scaling.md, ``python benchmarks/scaling.py`` measures what one machine can show of the model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dropgen_fast.data.bricks import BRICK
from dropgen_fast.errors import InputError
from dropgen_fast.networks import UNet
from dropgen_fast.presets import load_preset, preset_names

FLOAT_BYTES = 4
"""Of a weight, and of its gradient: under autocast too."""
FIRST_BUCKET_BYTES, BUCKET_BYTES = 1 << 20, 25 << 20
"""Defaults of DistributedDataParallel: a bucket is closed by the gradient that makes it this large."""
FEATURE_CHANNELS = 16
"""Of anatomix."""
MOMENTS = 2
"""Of AdamW, for each weight."""
READ_AHEAD_BYTES = 128 * 1024
VOXEL_BYTES = 3
"""In a store of one channel as int16: image and label."""


# ---- assumptions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """Assumptions about machines and job; none was measured. Bandwidths are those of one direction, GB are 10⁹ bytes."""

    gpus_per_node: int = 8
    """GPUs of a node; each has its own process."""
    nvlink_gb_s: float = 450.0
    """What a GPU sends within its node: NVLink of the H100, 900 GB/s both ways together."""
    link_gb_s: float = 50.0
    """Of a link between nodes: InfiniBand of 400 Gb/s."""
    links_per_node: int = 1
    """Links of a node: 1 of modest machines, 8 where each GPU has its own."""
    latency_us: float = 10.0
    """Of a message, whatever its size."""
    batch: int = 4
    """Patches per GPU and step."""
    write_gb_s: float = 1.0
    """Of the disk that checkpoints go to."""
    save_every: int = 1000
    """Steps from checkpoint to checkpoint."""
    gpus: tuple[int, ...] = (8, 16, 64, 256, 1024)
    """Rows of the tables."""
    step_s: tuple[float, ...] = (0.1, 0.3, 1.0)
    """T, the seconds of a step on one GPU alone, for which the tables are made."""

    def send_gb_s(self, gpus: int) -> float:
        """What the narrowest place of a ring through that many GPUs lets pass."""
        if gpus <= self.gpus_per_node:
            return self.nvlink_gb_s
        return min(self.nvlink_gb_s, self.links_per_node * self.link_gb_s)

    def check(self) -> None:
        """Raise `InputError` for a number that is not above 0. Not raised on construction: tyro would make a box of it."""
        for name, value in dataclasses.asdict(self).items():
            if not all(number > 0 for number in (value if isinstance(value, tuple) else (value,))):
                raise InputError(f"--cluster.{name.replace('_', '-')} must be above 0, got {value}")


# ---- gradients: what there is, and when ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer as it is called: its parameters, in their order, and the operations of its forward pass."""

    parameters: tuple[int, ...]
    operations: float


def paper_network(classes: int, image_channels: int = 1) -> UNet:
    """The paper's U-Net on image and anatomix features, shapes only."""
    with torch.device("meta"):
        return UNet(image_channels + FEATURE_CHANNELS * image_channels, classes)


def parameters(network: nn.Module) -> int:
    """Trainable numbers of a network."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def layers(network: nn.Module, shape: Sequence[int]) -> list[Layer]:
    """The layers of a network of meta tensors in the order of their calls, for an input (N, C, D, H, W).

    A convolution of Ci to Co channels takes 2 · kernel · Ci · Co operations for each voxel that it gives. Other layers count for
    nothing: they take time of memory, not of arithmetic, in proportion to the same voxels.
    """
    found: list[Layer] = []

    def note(module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        operations = 0.0
        if isinstance(module, nn.Conv3d):
            operations = 2.0 * module.weight.numel() * math.prod(output.shape) / output.shape[1]
        found.append(Layer(tuple(p.numel() for p in module.parameters()), operations))

    hooks = [m.register_forward_hook(note) for m in network.modules() if not list(m.children())]
    try:
        network(torch.empty(tuple(shape), device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def operations(called: Sequence[Layer]) -> float:
    """Operations of a step's convolutions.

    Each layer's backward pass takes twice its forward pass; the first layer's once, since no gradient of the input is wanted.
    """
    return 3 * sum(layer.operations for layer in called) - called[_first(called)].operations


def arrivals(called: Sequence[Layer]) -> list[tuple[int, float]]:
    """Gradients as the backward pass gives them, the last layer's first.

    Of each: bytes, and the share of the step (forward and backward pass, in operations) that is over by then.
    """
    first, total, found = _first(called), operations(called), []
    done = sum(layer.operations for layer in called)
    for number in reversed(range(len(called))):
        done += called[number].operations * (1 if number == first else 2)
        found += [(FLOAT_BYTES * count, done / total) for count in reversed(called[number].parameters)]
    return found


def _first(called: Sequence[Layer]) -> int:
    """Number of the first convolution."""
    return next((number for number, layer in enumerate(called) if layer.operations), 0)


def buckets(arriving: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """What DistributedDataParallel sends at once: bytes of each bucket, and the share of the step at which it is full."""
    made: list[tuple[int, float]] = []
    size, share = 0, 0.0
    for more, share in arriving:
        size += more
        if size >= (BUCKET_BYTES if made else FIRST_BUCKET_BYTES):
            made.append((size, share))
            size = 0
    return [*made, (size, share)] if size else made


# ---- the all-reduce -----------------------------------------------------------------------------------------------------


def ring_bytes(size: int, gpus: int) -> float:
    """What each GPU sends, and gets, in an all-reduce of `size` bytes by a ring: 2 (n - 1) / n times the size.

    No algorithm sends less (Patarasuk and Yuan 2009, doi 10.1016/j.jpdc.2008.09.002).
    """
    return 2 * (gpus - 1) / gpus * size


def all_reduce_s(size: int, gpus: int, cluster: Cluster) -> float:
    """Seconds of an all-reduce of `size` bytes: the faster of a ring and a pair of trees, as NCCL chooses between them.

    A ring sends `ring_bytes` in 2 (n - 1) messages one after the other; two trees (Sanders, Speck and Träff 2009, doi
    10.1016/j.parco.2009.09.001) twice the size, in pieces, with 2 ⌈log₂ n⌉ messages until the last has come.
    """
    if gpus == 1:
        return 0.0
    bytes_s, latency_s = cluster.send_gb_s(gpus) * 1e9, cluster.latency_us * 1e-6
    ring = ring_bytes(size, gpus) / bytes_s + 2 * (gpus - 1) * latency_s
    trees = 2 * size / bytes_s + 2 * math.ceil(math.log2(gpus)) * latency_s
    return min(ring, trees)


def exposed_s(full: Sequence[tuple[int, float]], step_s: float, gpus: int, cluster: Cluster) -> float:
    """Seconds that a step of `step_s` has to wait for its gradients at the end.

    The `buckets` go out one after the other, each as soon as it is full, while the backward pass goes on as fast as alone.
    """
    free_s = 0.0
    for size, share in full:
        free_s = max(free_s, share * step_s) + all_reduce_s(size, gpus, cluster)
    return max(0.0, free_s - step_s)


# ---- the loader ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CropBytes:
    """A crop at a random place of a store of bricks, by the formulae of docs/loading.md: means over all places."""

    crop: float
    bricks: float
    read: float

    @property
    def amplification(self) -> float:
        """Bytes read over bytes of the crop."""
        return self.read / self.crop


def crop_bytes(patch: Sequence[int], voxel_bytes: int = VOXEL_BYTES, read_ahead_bytes: int = READ_AHEAD_BYTES) -> CropBytes:
    """Bytes of a crop (D, H, W), of the bricks that hold it, and of what is read with the kernel's read-ahead."""
    (nz, ny, _), (bz, by, _) = patch, BRICK
    bricks = float(voxel_bytes * math.prod(n + b - 1 for n, b in zip(patch, BRICK, strict=True)))
    runs = (1 + (nz - 1) / bz) * (1 + (ny - 1) / by)
    return CropBytes(float(voxel_bytes * math.prod(patch)), bricks, bricks + runs * 2 * read_ahead_bytes)


def loader_gb_s(patch: Sequence[int], step_s: float, gpus: int, cluster: Cluster) -> float:
    """What so many GPUs read from the store, in 10⁹ bytes a second."""
    return gpus * cluster.batch / step_s * crop_bytes(patch).read / 1e9


# ---- checkpoints and validation -----------------------------------------------------------------------------------------


def checkpoint_bytes(network: nn.Module, *, averaged: bool = False) -> int:
    """Weights, AdamW's moments and BatchNorm's statistics, once more the weights and statistics where they are averaged.

    Left out: names, and what every process adds (its random numbers and its place in the data), some KB.
    """
    statistics = sum(b.numel() * b.element_size() for b in network.buffers())
    return FLOAT_BYTES * parameters(network) * (1 + MOMENTS + averaged) + statistics * (1 + averaged)


def windows(volume: Sequence[int], patch: Sequence[int]) -> int:
    """Half-overlapping patches that cover a volume, both (D, H, W)."""
    return math.prod(1 + math.ceil(max(n - p, 0) / (p // 2)) for n, p in zip(volume, patch, strict=True))


def validation_share(cases: int, gpus: int) -> float:
    """Share of the processes' time that is at work while `cases` volumes of equal size are validated, whole cases each."""
    return cases / (gpus * math.ceil(cases / gpus))


# ---- tables -------------------------------------------------------------------------------------------------------------


def tables(cluster: Cluster) -> dict[str, str]:
    """Title → table in Markdown: what docs/scaling.md shows."""
    presets = {name: load_preset(name) for name in preset_names()}
    patches = {name: preset.patch for name, preset in presets.items() if preset.patch is not None}
    network = paper_network(4)
    size = FLOAT_BYTES * parameters(network)
    full = buckets(arrivals(layers(network, (1, 1 + FEATURE_CHANNELS, 128, 128, 128))))
    return {
        "network": _network(presets), "buckets": _buckets(full), "all-reduce": _all_reduce(size, full, cluster),
        "crops": _crops(patches), "loader of a node": _loader(patches, cluster), "store": _store(patches, cluster),
        "checkpoints": _checkpoints(network, cluster), "validation": _validation(cluster)}


def _network(presets: Any) -> str:
    rows = []
    for name, preset in presets.items():
        network = paper_network(len(preset.classes))
        count = parameters(network)
        rows.append([name, len(preset.classes), f"{count:,}", f"{FLOAT_BYTES * count / 1e6:.1f}"])
    return _table(["preset", "classes", "parameters", "MB of gradients"], rows)


def _buckets(full: Sequence[tuple[int, float]]) -> str:
    rows = [[number, f"{size / 1e6:.1f}", f"{100 * share:.0f} %"] for number, (size, share) in enumerate(full, start=1)]
    return _table(["bucket", "MB", "full after this share of T"], rows)


def _all_reduce(size: int, full: Sequence[tuple[int, float]], cluster: Cluster) -> str:
    rows = []
    for gpus in cluster.gpus:
        alone = sum(all_reduce_s(part, gpus, cluster) for part, _ in full)
        row = [f"{gpus:,}", f"{ring_bytes(size, gpus) / 1e6:.0f}", number(1000 * alone)]
        for step_s in cluster.step_s:
            hidden = exposed_s(full, step_s, gpus, cluster)
            row.append(f"{100 * step_s / (step_s + hidden):.1f} % ({100 * step_s / (step_s + alone):.1f} %)")
        rows.append(row)
    heads = [f"efficiency at T = {step_s:g} s" for step_s in cluster.step_s]
    return _table(["GPUs", "MB that each sends", "ms, all buckets", *heads], rows)


def _crops(patches: dict[str, Any]) -> str:
    rows = []
    for name, patch in patches.items():
        found = crop_bytes(patch)
        rows.append([name, " × ".join(map(str, patch)), f"{found.crop / 1e6:.2f}", f"{found.bricks / 1e6:.2f}",
                     f"{found.read / 1e6:.2f}", f"{found.amplification:.2f}"])
    return _table(["preset", "patch", "MB of the crop", "MB of its bricks", "MB read", "amplification"], rows)


def _loader(patches: dict[str, Any], cluster: Cluster) -> str:
    rows = [[name, *(number(loader_gb_s(patch, step_s, cluster.gpus_per_node, cluster)) for step_s in cluster.step_s)]
            for name, patch in patches.items()]
    return _table(["GB/s that a node reads", *(f"T = {step_s:g} s" for step_s in cluster.step_s)], rows)


def _store(patches: dict[str, Any], cluster: Cluster) -> str:
    middle = cluster.step_s[len(cluster.step_s) // 2]
    rows = [[name, *(number(loader_gb_s(patch, middle, gpus, cluster)) for gpus in cluster.gpus)]
            for name, patch in patches.items()]
    return _table([f"GB/s of the store at T = {middle:g} s", *(f"{gpus:,} GPUs" for gpus in cluster.gpus)], rows)


def _checkpoints(network: nn.Module, cluster: Cluster) -> str:
    rows = []
    for name, averaged in (("weights and moments", False), ("and averaged weights", True)):
        size = checkpoint_bytes(network, averaged=averaged)
        seconds = size / cluster.write_gb_s / 1e9
        shares = (f"{100 * seconds / (seconds + cluster.save_every * step_s):.2f} %" for step_s in cluster.step_s)
        rows.append([name, f"{size / 1e6:.0f}", f"{seconds:.2f}", *shares])
    heads = (f"share of the time, T = {step_s:g} s" for step_s in cluster.step_s)
    return _table(["what is saved", "MB", f"s at {cluster.write_gb_s:g} GB/s", *heads], rows)


def _validation(cluster: Cluster) -> str:
    counts = (20, 100, 1000)
    rows = [[f"{gpus:,}", *(f"{math.ceil(cases / gpus)} ({100 * validation_share(cases, gpus):.0f} %)" for cases in counts)]
            for gpus in cluster.gpus]
    return _table(["GPUs", *(f"{cases:,} cases" for cases in counts)], rows)


def number(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(heads: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" if cells[0] != "---" else "|" + "|".join(cells) + "|"
                     for cells in lines)
