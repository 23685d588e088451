"""How fast a training runs, and what it waits for."""

from __future__ import annotations

import contextlib
import resource
import threading
import time
from collections.abc import Iterator

import torch

SAMPLE_S = 1.0
"""Seconds between two looks at the GPU's utilization."""


class Monitor:
    """Throughput, the share of the time that the device waits for data, memory and utilization, between calls of `take`.

    On a GPU the waiting is what the GPU does: time between two events in its own queue, so that data which come while earlier
    steps are still computed cost nothing. On a CPU it is the process' own. Nothing here waits for the GPU but `take` and
    `exclude`, which come where the training waits anyway.

    Args:
        device: that trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._utilization = Utilization(device) if self._on_gpu else None
        self._depth = 0
        self._begin()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        if not self._on_gpu:
            before = time.perf_counter()
            yield
            self._waited_s += time.perf_counter() - before
            return
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        yield
        events[1].record()
        self._events.append(events)

    @contextlib.contextmanager
    def exclude(self) -> Iterator[None]:
        """Around what is no training: validation, checkpoints. May be nested."""
        if self._depth == 0:
            self._synchronize()
            self._left_at = time.perf_counter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._synchronize()
                self._excluded_s += time.perf_counter() - self._left_at

    def step(self, patches: int) -> None:
        """Count a step that has trained on so many patches."""
        self._steps += 1
        self._patches += patches

    def take(self) -> dict[str, float]:
        """What was since the last call, which begins anew; empty before the first step. Waits for the device.

        * ``patches_per_s``, ``step_ms``
        * ``waiting_for_data``: share of the time, 0 to 1
        * ``gpu_utilization``: share of the time in which a kernel ran (NVML), where NVML can be asked
        * ``peak_memory_gib``: that tensors held on the GPU; on a CPU the most that the process has ever held
        """
        self._synchronize()
        if not self._steps:
            return {}
        seconds = max(time.perf_counter() - self._began - self._excluded_s, 1e-9)
        waited_s = self._waited_s + sum(a.elapsed_time(b) for a, b in self._events) / 1e3
        values = {"patches_per_s": self._patches / seconds, "step_ms": 1e3 * seconds / self._steps,
                  "waiting_for_data": min(1.0, waited_s / seconds), "peak_memory_gib": self._peak_bytes() / 2**30}
        utilization = self._utilization.take() if self._utilization is not None else None
        if utilization is not None:
            values["gpu_utilization"] = utilization
        self._begin()
        return values

    def close(self) -> None:
        """End the look at the GPU."""
        if self._utilization is not None:
            self._utilization.close()

    def _begin(self) -> None:
        self._began, self._excluded_s, self._waited_s = time.perf_counter(), 0.0, 0.0
        self._left_at = self._began
        self._steps = self._patches = 0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._device)

    def _peak_bytes(self) -> int:
        if self._on_gpu:
            return int(torch.cuda.max_memory_allocated(self._device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Utilization:
    """A GPU's utilization, looked at each `SAMPLE_S` seconds by a thread; nothing where NVML cannot be asked.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._samples: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="utilization", daemon=True)
        self._thread.start()

    def take(self) -> float | None:
        """The mean since the last call, 0 to 1; None where there is none."""
        samples, self._samples = self._samples, []
        return sum(samples) / len(samples) if samples else None

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            try:
                self._samples.append(torch.cuda.utilization(self._device) / 100)
            except Exception:  # without NVML's Python package, or where NVML refuses (MIG): a number less, no reason to stop
                return
