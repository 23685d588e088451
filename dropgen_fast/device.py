"""Devices: which one, and what memory it has left."""

from __future__ import annotations

import torch

from dropgen_fast.errors import InputError


def choose_device(name: str) -> torch.device:
    """"auto" is the GPU where there is one, else the CPU; any other name is torch's.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device must be auto, cpu, cuda or cuda:<n>, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device must be auto, cpu, cuda or cuda:<n>, got {name!r}")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"device {name!r} cannot be had: torch sees {count or 'no'} GPU{'s' if count > 1 else ''} here")
    return device


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had: what the GPU's driver and torch's cache have left, or what the system says of its own."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
