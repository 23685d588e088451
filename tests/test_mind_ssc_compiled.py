"""`mind_ssc`'s Triton kernels, compiled ahead of time for GPUs that need not be here; see compile_kernels.py."""

from __future__ import annotations

import pytest
from ahead_of_time import CAPABILITIES, Row, compiled, rows_of


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """What compile_mind_ssc.py says."""
    return rows_of("compile_mind_ssc.py")


def test_nothing_is_spilled(rows: list[Row]) -> None:
    assert {(row["capability"], row["kernel"]) for row in compiled(rows)} == {
        (capability, kernel) for capability in CAPABILITIES for kernel in ("_variance", "_describe")}
    assert [row for row in compiled(rows) if row["stack"] or row["local"]] == []


def test_two_launches(rows: list[Row]) -> None:
    launches = [row["forward"] for row in rows if "forward" in row]
    assert launches
    assert all(names == ["_variance", "_describe"] for names in launches)


# A voxel a thread: a store of each channel of a plane, neighbours of a warp side by side; no 64-bit or wider one could be.
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("case", "bits"), [("float32", 32), ("bfloat16", 16)])
def test_a_channel_is_stored_once(rows: list[Row], capability: int, case: str, bits: int) -> None:
    row = next(row for row in compiled(rows)
               if (row["capability"], row["case"], row["kernel"]) == (capability, case, "_describe"))
    assert {kind: count for kind, count in row.items() if kind.startswith("st ")} == {f"st {bits}": 12}


def test_registers_leave_room_for_two_blocks(rows: list[Row]) -> None:
    """Of 256 threads each in 65,536 registers; loads are many, and other warps are what hides them. Of boxes up to 5³ voxels."""
    assert max(row["registers"] for row in compiled(rows) if row["case"] != "radius 3") <= 128
