"""Two assumptions of the model on paper, held against this machine: when gradients are there, and what a checkpoint takes."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dropgen_fast import checkpoint
from dropgen_fast.bench.measure import Meter, Spread
from dropgen_fast.bench.scaling import cluster
from dropgen_fast.bench.scaling.cases import Base
from dropgen_fast.bench.scaling.child import in_child
from dropgen_fast.errors import InputError

READY_SHARES = (0.25, 0.5, 0.75, 0.95)
"""Of the gradients' bytes: by which share of a step are they there?"""
PATIENCE_S = 600.0
"""Of what measures the gradients."""


def ready_shares(base: Base, device: torch.device, rounds: int) -> dict[str, tuple[Spread, str]]:
    """By which share of forward and backward pass so much of the gradients' bytes is there: measured, and by the model.

    The network is the base's; the optimizer, the loss' forward pass and the fusion are left out, as the model does.
    """
    found = in_child(_ready, (base, device, torch.get_num_threads(), rounds), PATIENCE_S)
    if isinstance(found, str):
        raise InputError(f"gradients: {found}")
    model = cluster.arrivals(base.layers())
    values: dict[str, tuple[Spread, str]] = {}
    for number, share in enumerate(READY_SHARES):
        values[f"ready_{100 * share:.0f}"] = (Spread.of(row[number] for row in found), "share of the step")
        values[f"ready_{100 * share:.0f}_model"] = (Spread.of([_reached(model, share)]), "share of the step")
    return values


def _ready(base: Base, device: torch.device, threads: int, rounds: int) -> list[list[float]]:
    torch.set_num_threads(threads)
    network = base.network().to(device)
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # torch's stubs lack this form
    fused = torch.rand(base.shape).to(device, memory_format=torch.channels_last_3d)
    stamps: list[tuple[int, float]] = []

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def note(parameter: Tensor) -> None:
        stamps.append((cluster.FLOAT_BYTES * parameter.numel(), now()))

    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(note)
    rows = []
    for number in range(rounds + 1):
        network.zero_grad()
        stamps.clear()
        begun = now()
        with torch.autocast(device.type, torch.bfloat16, enabled=base.precision == "bf16"):
            network(fused).float().mean().backward()
        length = now() - begun
        if number:  # the first warms up
            rows.append([_reached([(size, (at - begun) / length) for size, at in stamps], share) for share in READY_SHARES])
    return rows


def _reached(arriving: Sequence[tuple[int, float]], share: float) -> float:
    """When that share of the bytes has come."""
    sizes, at = zip(*arriving, strict=True)
    come = np.cumsum(sizes)
    return float(at[int(np.searchsorted(come, share * come[-1]))])


def checkpoint_values(base: Base, folder: Path, rounds: int) -> dict[str, tuple[Spread, str]]:
    """A checkpoint's bytes over the model's, and its time over that of plain writing so many bytes to the same disk."""
    network = base.network()
    optimizer = torch.optim.AdamW(network.parameters(), 0.0)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    content = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        saved, plain = Path(scratch) / "last.pt", Path(scratch) / "plain"
        checkpoint.save(saved, content)
        size = saved.stat().st_size
        block = b"\0" * size

        def save(number: int, place: int, mark: Callable[[], None]) -> None:
            mark()
            checkpoint.save(saved, content)
            mark()

        def write(number: int, place: int, mark: Callable[[], None]) -> None:
            plain.unlink(missing_ok=True)
            mark()
            with plain.open("wb") as file:
                file.write(block)
                file.flush()
                os.fsync(file.fileno())
            mark()

        times = Meter(torch.device("cpu"), rounds=rounds).interleave({"save": save, "write": write}, math.inf)
    saves, writes = times.ms("save", 0, 1), times.ms("write", 0, 1)
    return {"bytes": (Spread.of([size]), "bytes"),
            "bytes_over_model": (Spread.of([size / cluster.checkpoint_bytes(network)]), "ratio"),
            "ms": (Spread.of(saves), "ms"), "write_gb_s": (Spread.of(size / ms / 1e6 for ms in writes), "GB/s"),
            "ms_over_model": (Spread.of(a / b for a, b in zip(saves, writes, strict=True)), "ratio")}
