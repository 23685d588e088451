"""Ways to do the same work on many items: one after the other, in processes of this machine, or on the workers of a Dask cluster.

Each yields results as they come, in any order; closing the generator stops what has not begun. Work and items must be picklable.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import queue
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import CancelledError, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from dropgen_fast import __version__
from dropgen_fast.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")
ADDRESS = re.compile(r"(tcp|tls)://(\[[0-9a-fA-F:.]+\]|[\w.-]+):\d+")
CONNECT_S = 10.0
"""How long a scheduler has to answer."""
NO_WORKER_S = 60.0
"""How long a cluster may be without any worker: one that died is started again, or another takes its place."""
LOOK_S = 1.0
"""How often the cluster's workers are looked at."""


def one_by_one(work: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
    """In this process."""
    for item in items:
        yield work(item)


def in_processes(work: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Generator[Result, None, None]:
    """In `workers` processes of this machine.

    Raises:
        InputError: a process ended abruptly.
    """
    # Spawned, not forked: a forked child of a process that has touched CUDA cannot use it.
    pool = ProcessPoolExecutor(min(workers, len(items)), mp_context=multiprocessing.get_context("spawn"),
                               initializer=_begin_worker)
    try:
        for future in as_completed([pool.submit(work, item) for item in items]):
            yield future.result()
    except BrokenProcessPool as error:
        raise InputError("a worker process ended abruptly, most likely for want of memory: use fewer workers and run again, "
                         "what was prepared is kept (a script of yours needs `if __name__ == \"__main__\":`)") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    """In a worker process: Ctrl-C is the parent's, and when the parent is gone, killed even, so is the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


@dataclass(frozen=True)
class OnSharedFolder(Generic[Item, Result]):
    """Work that begins with a look at whether this machine sees the same folder, and runs the same version, as the one that asks.

    `marker` is a file of the folder, `content` what it holds, `version` that of the package.
    """

    work: Callable[[Item], Result]
    marker: Path
    content: str
    version: str

    def __call__(self, item: Item) -> Result:
        """Do the work; raises `InputError` where it would be done in another folder or by another version."""
        if __version__ != self.version:
            raise InputError(f"the cluster's machine {socket.gethostname()} has dropgen_fast {__version__}, this one "
                             f"{self.version}: install the same on both")
        try:
            found = self.marker.read_text()
        except OSError:
            found = ""
        if found != self.content:
            raise InputError(f"the cluster's machine {socket.gethostname()} does not see {self.marker.parent} as this one does: "
                             "store and sources must be on a shared file system, at the same path everywhere")
        return self.work(item)


def on_cluster(work: Callable[[Item], Result], items: Sequence[Item], scheduler: str, *, lost: Callable[[Item, str], Result],
               warn: Callable[[str], None]) -> Generator[Result, None, None]:
    """On the workers of the Dask scheduler at an address like tcp://host:8786.

    An item whose workers die again and again (Dask gives up after the fourth) is tried once more on its own, and then becomes
    `lost(item, reason)`; `warn` is told of each worker that was lost. What workers have begun when the generator is closed
    cannot be stopped: they finish it.

    Raises:
        InputError: distributed is not installed; the address is none; the scheduler does not answer, goes away, or has no
            worker for a minute.
    """
    if not ADDRESS.fullmatch(scheduler):
        raise InputError(f"scheduler must be an address like tcp://host:8786, got {scheduler!r}")
    try:
        import distributed
    except ModuleNotFoundError as error:
        raise InputError("a Dask scheduler needs the package distributed: pip install 'dropgen_fast[cluster]'") from error
    try:
        client = distributed.Client(scheduler, timeout=CONNECT_S, set_as_default=False)
    except Exception as error:  # whatever Dask makes of an address where there is nothing, or nothing of its kind
        raise InputError(f"no Dask scheduler answers at {scheduler} within {CONNECT_S:g} s: check the address, such as "
                         "tcp://host:8786, and that it runs") from error
    try:
        watch = _Workers(client, scheduler, warn)
        suspects = []
        for item, future in _as_done(client, work, items, watch):
            try:
                yield _result(future)
            except _Died:
                _check_scheduler(client, scheduler)
                suspects.append(item)
        for suspect in suspects:  # Dask blames all that waited on a worker that died: one at a time, the guilty one is found
            for item, future in _as_done(client, work, [suspect], watch):
                try:
                    yield _result(future)
                except _Died:
                    _check_scheduler(client, scheduler)
                    yield lost(item, "every worker that took it died, most likely for want of memory")
    finally:
        client.close(timeout=CONNECT_S)  # the scheduler drops what nobody waits for any more


def _as_done(client: Any, work: Callable[[Item], Result], items: Sequence[Item], watch: _Workers
             ) -> Generator[tuple[Item, Any], None, None]:
    """Each item with its future, as they are done."""
    finished: queue.SimpleQueue[Any] = queue.SimpleQueue()
    futures = client.map(work, items, pure=False)
    item_of = {future.key: item for future, item in zip(futures, items, strict=True)}
    for future in futures:
        future.add_done_callback(finished.put)
    while item_of:
        watch.look()
        with contextlib.suppress(queue.Empty):
            future = finished.get(timeout=LOOK_S)
            yield item_of.pop(future.key), future
            future.release()
    watch.look(now=True)


class _Died(Exception):
    """The workers that had an item died, and its result with them."""


def _result(future: Any) -> Any:
    """The result of a future that is done; raises what its work raised, or `_Died`."""
    from distributed.scheduler import KilledWorker

    try:
        return future.result()
    except (KilledWorker, CancelledError) as error:
        raise _Died from error
    except ImportError as error:
        raise InputError(f"the cluster's workers cannot import what they need ({error}): install dropgen_fast there") from error


def _check_scheduler(client: Any, scheduler: str) -> None:
    if client.status != "running":
        raise InputError(f"the Dask scheduler at {scheduler} went away: run again, what was prepared is kept")


class _Workers:
    """The workers of a cluster: tells of each that was lost, and gives up where none is left."""

    def __init__(self, client: Any, scheduler: str, warn: Callable[[str], None]) -> None:
        self._client, self._scheduler, self._warn = client, scheduler, warn
        self._known: set[str] = set()
        self._looked = self._seen = time.monotonic()

    def look(self, *, now: bool = False) -> None:
        """Compare with the last look, once in `LOOK_S`; raises `InputError` where there has been no worker for too long."""
        if not now and time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        try:
            present = set(self._client.nthreads())
        except Exception:  # whatever Dask makes of a scheduler that is gone; the futures say so in a moment
            return
        for address in sorted(self._known - present):
            self._warn(f"worker {address} was lost; its cases went to others")
        self._known = present
        if present:
            self._seen = self._looked
        elif self._looked - self._seen > NO_WORKER_S:
            raise InputError(f"the Dask scheduler at {self._scheduler} has had no worker for {NO_WORKER_S:g} s: start workers "
                             "(dask worker) and run again, what was prepared is kept")
