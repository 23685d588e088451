"""Timing that a ratio can be built on.

What is compared runs interleaved: a round runs each way once, and the order is turned by one place from round to round. A
ratio is taken within each round, so that a machine that slows down slows both sides; its median and quartiles over the
rounds are reported. A plain copy runs in the same rounds: shares of bandwidth are shares of what the machine did then.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Of each of the copy's two buffers: many times any cache."""
MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}
MIN_ROUNDS, MAX_ROUNDS = 5, 200
COPY = "copy"

Run = Callable[[int, int, Callable[[], None]], None]
"""One run of one way: the number of its round, its place in that round, and `mark`, called before and after each timed part."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        """Of at least one value."""
        low, median, high = np.percentile(list(values), (25, 50, 75))
        return Spread(float(median), float(low), float(high))

    @staticmethod
    def geometric_mean(spreads: Iterable[Spread]) -> Spread:
        """Of medians, of lower and of upper quartiles: cases are measured one after the other, so no quartiles of their own."""
        table = np.log([(s.median, s.low, s.high) for s in spreads])
        return Spread(*(float(v) for v in np.exp(table.mean(0))))

    def verdict(self) -> Literal["claim", "one", "unclear"]:
        """What a ratio may say: "one" where its quartiles include 1, "unclear" where they are wider than its distance from 1."""
        if self.low <= 1 <= self.high:
            return "one"
        return "claim" if self.high - self.low <= abs(self.median - 1) else "unclear"


class Times:
    """Milliseconds between the marks of each way, round by round."""

    def __init__(self, marks_ms: Mapping[str, list[list[float]]]) -> None:
        self._marks_ms = marks_ms

    def __contains__(self, way: str) -> bool:
        return way in self._marks_ms

    @property
    def rounds(self) -> int:
        """How many rounds were run."""
        return len(next(iter(self._marks_ms.values())))

    def ms(self, way: str, first: int, last: int) -> list[float]:
        """Time from mark `first` to mark `last` of a way, for each round."""
        return [marks[last] - marks[first] for marks in self._marks_ms[way]]


class Meter:
    """Times ways against each other, and against a copy, on one device.

    On a GPU times are those of CUDA events. Before each run a buffer far larger than the cache is filled: that empties the
    cache and keeps the GPU busy while the host enqueues what is timed, so that a kernel's time is not its launch's.
    """

    def __init__(self, device: torch.device, *, rounds: int | None = None) -> None:
        """`rounds`: of every measurement; by default as many as its time allows, within MIN_ROUNDS and MAX_ROUNDS."""
        self.device = device
        self.rounds = rounds
        self.copy_bytes = COPY_BYTES[device.type]
        self._source = torch.ones(self.copy_bytes, dtype=torch.uint8, device=device)
        self._target = torch.zeros_like(self._source)  # written: a page that was never touched is slow the first time

    def interleave(self, ways: Mapping[str, Run], seconds: float) -> Times:
        """Run the ways, which must be warm, and the copy (`COPY`, two marks) for about `seconds`."""
        ways = {**ways, COPY: self._copy}
        names = list(ways)
        marks_ms: dict[str, list[list[float]]] = {name: [] for name in names}
        deadline = time.perf_counter() + seconds
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            done = 0
            while not self._enough(done, deadline):
                for place in range(len(names)):
                    name = names[(done + place) % len(names)]
                    marks_ms[name].append(self._time(ways[name], done, place))
                done += 1
        finally:
            if collecting:
                gc.enable()
        return Times(marks_ms)

    def _enough(self, done: int, deadline: float) -> bool:
        if self.rounds is not None:
            return done >= self.rounds
        return done >= MAX_ROUNDS or (done >= MIN_ROUNDS and time.perf_counter() >= deadline)

    def _time(self, run: Run, number: int, place: int) -> list[float]:
        """Milliseconds from the first mark to each."""
        if self.device.type == "cuda":
            events: list[torch.cuda.Event] = []

            def record() -> None:
                events.append(torch.cuda.Event(enable_timing=True))
                events[-1].record()

            for _ in range(2):
                self._target.zero_()
            run(number, place, record)
            torch.cuda.synchronize(self.device)
            return [events[0].elapsed_time(event) for event in events]
        stamps_ns: list[int] = []
        run(number, place, lambda: stamps_ns.append(time.perf_counter_ns()))
        return [(stamp - stamps_ns[0]) / 1e6 for stamp in stamps_ns]

    def _copy(self, number: int, place: int, mark: Callable[[], None]) -> None:
        mark()
        self._target.copy_(self._source)
        mark()

    def copy_gb_s(self, times: Times) -> list[float]:
        """Bytes read and written by the copy per time, in 10⁹ a second, for each round."""
        return [2 * self.copy_bytes / ms / 1e6 for ms in times.ms(COPY, 0, 1)]

    def matrix_gflop_s(self) -> Spread:
        """Rate of a float32 matrix product, in 10⁹ operations a second: the compute roof of arithmetic in float32."""
        side = MATRIX_SIDE[self.device.type]
        a, b = (torch.randn(side, side, device=self.device) for _ in range(2))

        def product(number: int, place: int, mark: Callable[[], None]) -> None:
            mark()
            torch.mm(a, b)
            mark()

        product(0, 0, lambda: None)
        return Spread.of(2 * side**3 / self._time(product, 0, 0)[1] / 1e6 for _ in range(MIN_ROUNDS))

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """The most memory that a call holds at once beyond what was held before, its result included; None where unknown.

        On the CPU it is the growth of the process's resident set: pages never touched do not count, nor does memory that
        the allocator had kept from before.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            call()
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - before
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now: proc(5)
            before = _status_bytes("VmRSS")
            call()
            return max(0, _status_bytes("VmHWM") - before)
        except OSError:
            call()
            return None


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
