"""`warp`'s Triton kernel, compiled ahead of time for GPUs that need not be here; see compile_kernels.py."""

from __future__ import annotations

import pytest
from ahead_of_time import CAPABILITIES, Row, compiled, rows_of


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """What compile_warp.py says."""
    return rows_of("compile_warp.py")


def test_nothing_is_spilled(rows: list[Row]) -> None:
    assert {(row["capability"], row["kernel"]) for row in compiled(rows)} == {(number, "_warp") for number in CAPABILITIES}
    assert [row for row in compiled(rows) if row["stack"] or row["local"]] == []


def test_one_launch(rows: list[Row]) -> None:
    launches = [row["forward"] for row in rows if "forward" in row]
    assert launches
    assert all(names == ["_warp"] for names in launches)


# 512 voxels and 128 threads: 4 voxels a thread. Stores: each type's once where a sample is copied, once where it is not.
# Loads: 8 scalars a voxel of the image and 1 of the label; 8 a voxel of a displacement on a coarser grid, one component at a
# time; or, on rows as long as the image's, a vector of each of 4 rows.
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_stores_are_vectors(rows: list[Row], capability: int) -> None:
    found = {row["case"]: row for row in compiled(rows) if row["capability"] == capability}
    first = capability == CAPABILITIES[0]
    general = ("channels", "image alone", "dense", "by 8", "by 4", "border", "int16", "int32")
    for case in ("elastic", "affine", *(general if first else ())):
        row = found[case]
        assert row["st 128"] == (4 if case == "int32" else 2), row
        assert row.get("st 8", 0) + row.get("st 16", 0) == 0, row
        assert row.get("st 32", 0) == (0 if case in ("image alone", "int16", "int32") else 2), row
        assert row.get("ld 8", 0) + row.get("ld 16", 0) == (0 if case in ("image alone", "int32") else 4), row
        assert row.get("ld 128", 0) >= (4 if case == "dense" else 1), row
        if case not in ("affine", "image alone", "dense"):
            assert row["ld 32"] >= 2 * 8 * 4, row
    for case in ("half", *(("bfloat16",) if first else ())):
        assert found[case]["st 64"] == 2, found[case]
        assert found[case]["ld 16"] == 8 * 4, found[case]
