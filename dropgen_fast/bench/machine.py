"""What a row must say of the machine and of the software that it was measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import dropgen_fast

SOURCE = Path(dropgen_fast.__file__).resolve().parent.parent
MEASURED = ("dropgen_fast", "kernels", "setup.py", "CMakeLists.txt")
"""What of the checkout decides a measurement."""


def describe(device: torch.device) -> dict[str, Any]:
    """The fields that every row carries: device, versions, commit, threads, load."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_model(),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "monai": version("monai"),
        "cuda": torch.version.cuda,
        "driver": driver_version() if cuda else None,
        "dropgen_fast": dropgen_fast.__version__,
        "commit": commit(SOURCE),
    }


def cpu_model() -> str:
    """The processor's own name for itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def last_level_cache_bytes(device: torch.device) -> int:
    """Size of the largest cache that the device's cores share; 64 MiB where it is not told."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes, default=64 << 20)


def driver_version() -> str | None:
    """Of the NVIDIA driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    return done.stdout.split("\n")[0].strip() or None


def commit(source: Path) -> str | None:
    """Hash of the checkout that runs, with "-dirty" where what is measured differs from it; None for an installed package."""
    top = _git(source, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != source:  # no checkout, or an environment inside someone else's
        return None
    head = _git(source, "rev-parse", "HEAD")
    return head and head + ("-dirty" if _git(source, "status", "--porcelain", "--", *MEASURED) else "")


def _git(source: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(source), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def dali_version() -> str | None:
    """Of NVIDIA DALI, whichever CUDA it is built for."""
    return version("nvidia-dali-cuda130") or version("nvidia-dali-cuda120")


def version(package: str) -> str | None:
    """Of an installed package; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
