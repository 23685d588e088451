"""`warp`'s Triton kernel, compiled ahead of time for GPUs that need not be here; see compile_kernels.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

CAPABILITIES = (90, 80, 100)
Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """What compile_warp.py says; registers are printed, for the record (pytest -s)."""
    pytest.importorskip("triton.backends.nvidia.driver")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = os.path.join(os.path.dirname(__file__), "compile_warp.py")
    done = subprocess.run([sys.executable, program, *map(str, CAPABILITIES)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for row in found:
        if "kernel" in row:
            print(f"sm_{row['capability']} {row['kernel']} ({row['case']}): {row['registers']} registers")
    return found


def compiled(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "kernel" in row]


def test_nothing_is_spilled(rows: list[Row]) -> None:
    assert {(row["capability"], row["kernel"]) for row in compiled(rows)} == {(number, "_warp") for number in CAPABILITIES}
    assert [row for row in compiled(rows) if row["stack"] or row["local"]] == []


def test_one_launch(rows: list[Row]) -> None:
    launches = [row["forward"] for row in rows if "forward" in row]
    assert launches
    assert all(names == ["_warp"] for names in launches)


# 512 voxels and 128 threads: 4 voxels a thread. Stores: each type's once where a sample is copied, once where it is not.
# Loads: 8 scalars a voxel of the image and 1 of the label; a displacement's 3 components come in vectors, from 4 rows each.
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_stores_are_vectors(rows: list[Row], capability: int) -> None:
    found = {row["case"]: row for row in compiled(rows) if row["capability"] == capability}
    first = capability == CAPABILITIES[0]
    general = ("channels", "image alone", "by 8", "by 4", "border", "int16", "int32")
    for case in ("elastic", "affine", *(general if first else ())):
        row = found[case]
        assert row["st 128"] == (4 if case == "int32" else 2), row
        assert row.get("st 8", 0) + row.get("st 16", 0) == 0, row
        assert row.get("st 32", 0) == (0 if case in ("image alone", "int16", "int32") else 2), row
        assert row.get("ld 8", 0) + row.get("ld 16", 0) == (0 if case in ("image alone", "int32") else 4), row
        assert row.get("ld 128", 0) >= (1 if case in ("affine", "image alone") else 1 + 3 * 4), row
    for case in ("half", *(("bfloat16",) if first else ())):
        assert found[case]["st 64"] == 2, found[case]
        assert found[case]["ld 16"] == 8 * 4, found[case]
