"""Ways that are compared, each in a process group of its own, taking turns.

A way is opened in a new process, held to the given cores and to as many threads of torch. While another way has its turn the
whole group, worker processes included, stands still (SIGSTOP): nobody loads ahead at another's cost, and a way goes on in the
state in which it was stopped, its stock of finished batches used up. A turn is timed from the arrival of one batch to the arrival
of another, so with no stock left it lasts as long as making those batches takes.

Time: the wall clock, and the CPU time that the process and its living worker processes have used together, all threads and the
system's share included, from the clock that POSIX keeps for each process (`clock_getcpuclockid`).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dropgen_fast.bench.measure import Spread
from dropgen_fast.errors import InputError

OPENING_SECONDS = 600
"""Before a way that does not answer is given up: a cold import, a cache of volumes, a first batch."""
CALIBRATED_SECONDS = 0.05
"""The least that is measured to know how long a batch takes."""
CLOSING_SECONDS = 20
"""Before a group that was asked to end is killed."""
PERCENTILES = (20, 50, 80)
PRELOADED = ["torch", "monai.data", "monai.transforms", "nvidia.dali.fn", "dropgen_fast.data.pipeline"]
"""Imported once, in the process that the ways' processes are forked from; none of them starts a thread or touches a GPU."""


@dataclass(frozen=True)
class Place:
    """Where ways run and what they load: the same for all that are compared."""

    store: Path
    scratch: Path
    """A folder that is removed afterwards."""
    patch: tuple[int, int, int]
    batch_size: int
    cores: tuple[int, ...]
    device: str = "cpu"
    """cpu or cuda:<n>."""
    seed: int = 0

    @property
    def threads(self) -> int:
        """Threads, or worker processes: one for each core."""
        return len(self.cores)

    @property
    def gpu(self) -> int | None:
        """Index of the GPU; None for the CPU."""
        return None if self.device == "cpu" else torch.device(self.device).index or 0


@dataclass(frozen=True)
class Source:
    """An opened way: `next` does the work of one batch of `patches` and returns when it is there."""

    next: Callable[[], Any]
    patches: int
    stock: int = 0
    """Batches that may lie ready when nobody has asked for a while."""
    burst: int = 1
    """Batches that workers finish at about the same time: a turn is made of at least so many."""


Opener = Callable[[Place], Source]
"""Runs in the new process. Raises where a way cannot be had, or does not do what it is compared for."""


@dataclass(frozen=True)
class Turn:
    """What one turn took."""

    patches: int
    seconds: float
    cpu_seconds: float

    @property
    def patches_s(self) -> float:
        """Patches per second of wall time."""
        return self.patches / self.seconds

    @property
    def ms(self) -> float:
        """Milliseconds of wall time a patch."""
        return 1e3 * self.seconds / self.patches

    @property
    def cpu_ms(self) -> float:
        """Milliseconds of CPU time a patch."""
        return 1e3 * self.cpu_seconds / self.patches


class Unavailable(Exception):
    """A way cannot be run here; the message is one line."""


def spread(values: list[float]) -> Spread:
    """The median with the percentiles 20 and 80."""
    low, median, high = np.percentile(values, PERCENTILES)
    return Spread(float(median), float(low), float(high))


# ---- in the way's process -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ready:
    call_seconds: float
    burst: int


@dataclass(frozen=True)
class _Failure:
    line: str
    trace: str
    user: bool
    """Whether a user can put it right."""


def _serve(connection: Connection, opener: Opener, place: Place) -> None:
    os.setpgid(0, 0)
    os.sched_setaffinity(0, place.cores)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries that print: the screen is for what was measured
    warnings.simplefilter("ignore")
    torch.set_num_threads(place.threads)
    # This process was started by a fork server; the workers of what is compared start as they would anywhere else.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    try:
        source = opener(place)
        connection.send(_Ready(_warm_up(source, place), source.burst))
        while True:
            connection.send(_turn(source, place, connection.recv()))
    except (EOFError, BrokenPipeError):  # nobody asks any more; how workers take their end is of no interest
        os.dup2(1, 2)
    except Exception as error:
        line = " ".join(str(error).split()) or type(error).__name__
        connection.send(_Failure(line, traceback.format_exc(), isinstance(error, InputError)))


def _warm_up(source: Source, place: Place) -> float:
    """Use up what lies ready, made before everything was warm; seconds that a batch takes."""
    for _ in range(source.stock + 1):
        source.next()
    calls = source.burst
    while (seconds := _turn(source, place, calls).seconds) < CALIBRATED_SECONDS:
        calls *= 4
    return seconds / calls


def _turn(source: Source, place: Place, calls: int) -> Turn:
    if source.stock:
        source.next()  # what was under way when it was stopped; the time runs from its arrival
    _synchronize(place)
    cpu, wall = _cpu_seconds(), time.perf_counter()
    for _ in range(calls):
        source.next()
    _synchronize(place)
    return Turn(calls * source.patches, time.perf_counter() - wall, _cpu_seconds() - cpu)


def _synchronize(place: Place) -> None:
    if place.gpu is not None:
        torch.cuda.synchronize(place.gpu)


def _cpu_seconds() -> float:
    """CPU time of this process and of its living worker processes."""
    workers = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
    return sum(map(process_cpu_seconds, [os.getpid(), *workers]))


def process_cpu_seconds(process: int) -> float:
    """User and system time of all threads of a process so far."""
    clock = ctypes.c_int()
    if error := ctypes.CDLL(None).clock_getcpuclockid(process, ctypes.byref(clock)):
        raise OSError(error, os.strerror(error), f"process {process}")
    return time.clock_gettime(clock.value)


def check_batch(image: Tensor, label: Tensor, place: Place) -> None:
    """Raise `Unavailable` unless a batch is what a network of this place could be trained on."""
    wanted = (place.batch_size, 1, *place.patch)
    if image.shape[:1] + image.shape[2:] != wanted[:1] + wanted[2:] or tuple(label.shape) != wanted:
        raise Unavailable(f"gave image {tuple(image.shape)} and label {tuple(label.shape)}, wanted {wanted}")
    if not image.is_floating_point() or not bool(image.isfinite().all()):
        raise Unavailable("gave voxels that are not finite floating-point numbers")
    if image.device.type != torch.device(place.device).type:
        raise Unavailable(f"left the batch on {image.device}, wanted {place.device}")


def check_augments(next_batch: Callable[[], tuple[Tensor, Tensor]], place: Place) -> None:
    """Raise `Unavailable` unless two batches are sound, not constant, and differ from each other."""
    (first, label), (second, _) = next_batch(), next_batch()
    check_batch(first, label, place)
    if first.min() == first.max() or torch.equal(first, second):
        raise Unavailable("gave the same batch twice, or a constant one: nothing is augmented")


# ---- in the process that compares -----------------------------------------------------------------------------------


def _start(target: Callable[..., None], *arguments: Any) -> tuple[Any, Connection]:
    """A new process that runs `target` with its end of a pipe and the arguments; the process and our end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments))
    process.start()
    theirs.close()
    return process, ours


def _guard(connection: Connection) -> None:
    """Kill the groups that were named once nobody is at the other end any more: what stands still can't end by itself."""
    os.setpgid(0, 0)  # out of Ctrl-C's way
    groups: list[int] = []
    with contextlib.suppress(EOFError):
        while True:
            groups.append(connection.recv())
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


class Feed:
    """A way in its process group: opened, then asked for turns."""

    def __init__(self, name: str, opener: Opener, place: Place, guard: Connection) -> None:
        """Open it and let it stand still; raises `Unavailable`, or `InputError` for what a user can put right."""
        self.name = name
        self._process, self._pipe = _start(_serve, opener, place)
        guard.send(self._process.pid)
        try:
            answer = self._answer(OPENING_SECONDS)
            self.call_seconds, self.burst = answer.call_seconds, answer.burst
            self._signal(signal.SIGSTOP)
        except BaseException:
            self.close()
            raise

    def turn(self, calls: int) -> Turn:
        """So many batches, timed."""
        self._signal(signal.SIGCONT)
        self._pipe.send(calls)
        turn: Turn = self._answer(None)
        self._signal(signal.SIGSTOP)
        return turn

    def close(self) -> None:
        """End the whole group: it is asked to, and made to where it does not."""
        with contextlib.suppress(ProcessLookupError):
            self._signal(signal.SIGCONT)
        self._pipe.close()
        self._process.join(CLOSING_SECONDS)
        self._process.kill()
        with contextlib.suppress(ProcessLookupError):
            self._signal(signal.SIGKILL)
        self._process.join()

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)

    def _answer(self, seconds: float | None) -> Any:
        if not self._pipe.poll(seconds):
            raise Unavailable(f"no batch within {seconds:.0f} s")
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise Unavailable(f"{self.name} ended abruptly, perhaps for want of memory") from None
        if isinstance(answer, _Failure):
            raise InputError(answer.line) if answer.user else Unavailable(answer.line)
        return answer


@contextlib.contextmanager
def opened(openers: Mapping[str, Opener], place: Place, say: Callable[[str], None]
           ) -> Iterator[tuple[dict[str, Feed], dict[str, str]]]:
    """Feeds of the ways that can be had, by name, and the reason for each of the others."""
    feeds: dict[str, Feed] = {}
    missing: dict[str, str] = {}
    guarding, guard = _start(_guard)
    try:
        for name, opener in openers.items():
            say(f"opening {name}")
            try:
                feeds[name] = Feed(name, opener, place, guard)
            except Unavailable as error:
                missing[name] = str(error)
        yield feeds, missing
    finally:
        for feed in feeds.values():
            feed.close()
        guard.close()
        guarding.join()


def take_turns(feeds: Mapping[str, Feed], rounds: int, seconds: float) -> dict[str, list[Turn]]:
    """Turns of each way, one a round, `seconds` for each way over all rounds; who begins moves on from round to round."""
    names = list(feeds)
    calls = {name: max(feed.burst, math.ceil(seconds / rounds / feed.call_seconds)) for name, feed in feeds.items()}
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    for number in range(rounds):
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            turns[name].append(feeds[name].turn(calls[name]))
    return turns
