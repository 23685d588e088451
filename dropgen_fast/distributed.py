"""Processes that train together: one per GPU (NCCL), or several on CPUs (gloo), as ``torchrun`` or ``srun`` starts them."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dropgen_fast.device import choose_device
from dropgen_fast.errors import InputError

T = TypeVar("T")
PATIENCE = datetime.timedelta(minutes=60)
"""How long a process waits for the others: the slowest may still be validating its last volume."""
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """One process among those that train together: `rank` of `size`, and the device that is its own."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @staticmethod
    def alone(device: str = "auto") -> Ranks:
        """A training of one process."""
        chosen = choose_device(device)
        if chosen.index is not None and chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        return Ranks(device=chosen)

    @staticmethod
    def join(device: str = "auto") -> Ranks:
        """Meet the other processes where a launcher has started several; else as `alone`. `leave` ends it.

        Where there are GPUs, or "cuda" is asked for, each process takes the GPU of its number on the machine.

        Raises:
            InputError: the launcher's environment is incomplete, or there are fewer GPUs than processes.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Ranks.alone(device)
        if missing := [name for name in LAUNCHED if name not in os.environ]:
            raise InputError(f"WORLD_SIZE says that several processes train together, but {', '.join(missing)} "
                             f"{'is' if len(missing) == 1 else 'are'} not set: start them with torchrun")
        rank, size, local = (int(os.environ[name]) for name in LAUNCHED[:3])
        chosen = choose_device(device)
        if chosen.type == "cuda":
            if chosen.index is not None:
                raise InputError(f"device {device!r} is one GPU, and {size} processes train together: give cuda, for one each")
            chosen = choose_device(f"cuda:{local}")
            torch.cuda.set_device(chosen)
        # Bookkeeping (states, scores, the wish to stop) goes through gloo, so that it never waits for the GPU.
        backends = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backends, store=_store_of_this_attempt(), rank=rank, world_size=size, timeout=PATIENCE)
        return Ranks(rank, size, chosen)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def leave(self) -> None:
        """End what `join` began."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def gather(self, value: T) -> list[T]:
        """Every process' value, in the order of ranks, for all of them; values are picklable."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        """The first process' value, for all."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        shared: T = values[0]
        return shared


class Agreement:
    """What one process wishes and all do at the same step: the largest of the numbers that they gave one call earlier.

    Nobody waits: a call sends this process' number on its way and gives back what was agreed on since the last call.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._alone = ranks.size == 1
        self._number = torch.zeros((), dtype=torch.int64)
        self._pending: Any = None

    def __call__(self, number: int) -> int:
        """What was agreed on with the last call (0 at first); alone, the number itself."""
        if self._alone:
            return number
        agreed = self.settle()
        self._number.fill_(max(number, agreed))
        self._pending = dist.all_reduce(self._number, dist.ReduceOp.MAX, async_op=True)
        return agreed

    def settle(self) -> int:
        """Wait for what is on its way, and give it back."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        return int(self._number)


def _store_of_this_attempt() -> dist.Store | None:
    """Where the processes find each other; None: as torch does it by itself.

    torchrun keeps one store over its restarts, and torch looks up addresses there without saying of which attempt: a process
    that was started again finds those of the dead (pytorch issue 135712). On one machine the number of restarts tells the
    attempts apart. On several machines it is not the same everywhere; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun
    begin a new store.
    """
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if not one_machine or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=PATIENCE)
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def restarted() -> bool:
    """Whether torchrun has started this process in the place of one that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
