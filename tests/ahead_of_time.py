"""What the programs compile_*.py say of an op's Triton kernels, compiled for GPUs that need not be here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

CAPABILITIES = (90, 80, 100)
Row = dict[str, Any]


def rows_of(program: str) -> list[Row]:
    """Run a program of this folder, without Triton's interpreter; registers are printed, for the record (pytest -s)."""
    pytest.importorskip("triton.backends.nvidia.driver")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.path.join(os.path.dirname(__file__), program)
    done = subprocess.run([sys.executable, path, *map(str, CAPABILITIES)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for row in compiled(found):
        print(f"sm_{row['capability']} {row['kernel']} ({row['case']}): {row['registers']} registers")
    return found


def compiled(rows: list[Row]) -> list[Row]:
    """The rows that are about a kernel."""
    return [row for row in rows if "kernel" in row]
