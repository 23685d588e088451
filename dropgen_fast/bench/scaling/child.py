"""A function in a process of its own, whose memory is limited, and which may die of it."""

from __future__ import annotations

import multiprocessing
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from dropgen_fast.errors import InputError

PRELOADED = ["dropgen_fast.bench.scaling.sweep"]
"""Imported once, in the process that the others are forked from."""


def in_child(function: Callable[..., Any], arguments: tuple[Any, ...], timeout_s: float) -> Any:
    """The function's result in a fresh process, or a string that says why there is none: memory, or time.

    Raises:
        InputError: what the function raised, an option that does not fit.
        RuntimeError: anything else that it raised.
    """
    context = multiprocessing.get_context("forkserver")  # a fork of this process would share its threads, a spawn imports anew
    context.set_forkserver_preload(PRELOADED)
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sending, function, arguments), daemon=True)
    process.start()
    sending.close()
    try:
        if not receiving.poll(timeout_s):
            return f"not done after {timeout_s:.0f} s"
        kind, result = receiving.recv()
    except EOFError:
        process.join()
        return _ended(process.exitcode)
    finally:
        process.kill()  # it has nothing left to do
        process.join()
        receiving.close()
    if kind == "input":
        raise InputError(result)
    if kind == "error":
        raise RuntimeError(result)
    return result


def _ended(status: int | None) -> str:
    """Why a process gave no result. The system kills for want of memory, libraries abort."""
    if status in (-signal.SIGKILL, -signal.SIGABRT):
        return f"the process was ended by {signal.Signals(-status).name}, as for want of memory"
    return f"the process ended with status {status}"


def _child(sending: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        answer = ("result", function(*arguments))
    except InputError as error:
        answer = ("input", str(error))
    except Exception as error:
        what = " ".join(str(error).split())
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in what
        answer = ("result", "does not fit the memory") if memory else ("error", f"{type(error).__name__}: {what}")
    sending.send(answer)


def limit_memory(device: torch.device, memory_bytes: int) -> None:
    """Let this process fail where it would take more than so much, instead of taking it from others."""
    if device.type == "cuda":
        total, held = torch.cuda.get_device_properties(device).total_memory, torch.cuda.memory_reserved(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, (held + memory_bytes) / total), device)
        return
    status = Path("/proc/self/status").read_text()
    held = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (held + memory_bytes, resource.RLIM_INFINITY))
