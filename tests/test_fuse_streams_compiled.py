"""fuse_streams' Triton kernels, compiled ahead of time for GPUs that need not be here; see compile_kernels.py."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from ahead_of_time import CAPABILITIES, Row, compiled, rows_of


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """What compile_kernels.py says."""
    return rows_of("compile_kernels.py")


def test_nothing_is_spilled(rows: list[Row]) -> None:
    assert {row["capability"] for row in compiled(rows)} == set(CAPABILITIES)
    assert {row["kernel"] for row in compiled(rows)} == {
        "_statistics", "_voxel_statistics", "_fuse", "_fuse_channels_last", "_image_backward", "_transpose_interpolation",
        "_gradient_sums", "_channel_norm_backward", "_voxel_norm_backward"}
    assert [row for row in compiled(rows) if row["stack"] or row["local"]] == []


@dataclass(frozen=True)
class Access:
    """What one launch's PTX must hold: whole 128-bit vectors at least, narrower accesses at most.

    Vectors of a thread are the bytes of its tile over 16 bytes and the tile's threads. Narrow loads are scalars (the draw,
    statistics, a channel's first voxel) and combine partial statistics; narrow stores are those statistics.
    """

    loads: int = 0
    stores: int = 0
    loads_16: int = 0
    loads_32: int = 9
    stores_32: int = 6


# 4 vectors of bfloat16 or float32 are stored per thread and tile; a float32 image takes 8 loads for 4 stores of bfloat16.
# Stores: 4 of a dropped channel's zeros, 4 of the image, 4 of features of the image's size or 1 a row of a cell.
HOT = {
    ("same", "_statistics"): Access(loads=8 + 8, loads_16=1),
    ("same", "_fuse"): Access(loads=8 + 4, stores=4 + 4 + 4, loads_16=1),
    ("same", "_gradient_sums"): Access(loads=8 + 8),
    ("same", "_channel_norm_backward"): Access(loads=2 + 2, stores=4 + 4),
    ("same", "_image_backward"): Access(loads=2, stores=4 + 4),
    ("same float32", "_statistics"): Access(loads=8 + 8),
    ("same float32", "_fuse"): Access(loads=4 + 4, stores=4 + 4 + 4),
    ("half", "_fuse"): Access(loads=8, stores=4 + 4 + 2 * 2, loads_16=1 + 8 * 8),  # 8 columns of 2 × 2 × 2 coarse voxels
    ("half", "_transpose_interpolation"): Access(loads=4, stores=1),
    ("half", "_channel_norm_backward"): Access(loads=2 + 4, stores=4 + 4),
    ("half float32", "_fuse"): Access(loads=4, stores=4 + 4 + 2 * 2, loads_32=9 + 8 * 4),
    ("quarter", "_fuse"): Access(loads=8, stores=4 + 4 + 2 * 4, loads_16=1 + 8 * 8),
    ("quarter", "_transpose_interpolation"): Access(loads=4),
    ("arbitrary", "_fuse"): Access(loads=8, stores=4 + 4 + 2, loads_16=1 + 8 * 8),
    ("last same", "_statistics"): Access(loads=8 + 8 + 1),
    ("last same", "_fuse_channels_last"): Access(loads=1, stores=2, loads_16=4, loads_32=24),
    ("last half", "_fuse_channels_last"): Access(stores=1, loads_16=4, loads_32=24),
    ("last half of dense", "_fuse_channels_last"): Access(stores=1, loads_16=4 + 8 * 4, loads_32=24),
}
# Rows of 72 voxels: 8 divides them, 16 does not, and Triton knows of 16 only.
GENERAL = {("by 8", "_fuse"): HOT["half", "_fuse"], ("by 8", "_transpose_interpolation"): Access(loads=4, loads_16=4)}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_vectors_are_whole(rows: list[Row], capability: int) -> None:
    found = {(row["case"], row["kernel"]): row for row in compiled(rows) if row["capability"] == capability}
    for key, access in {**HOT, **(GENERAL if capability == CAPABILITIES[0] else {})}.items():
        row = found[key]
        wide = {kind: sum(row.get(f"{kind} {bits}", 0) * bits // 128 for bits in (128, 256)) for kind in ("ld", "st")}
        assert wide["ld"] >= access.loads, row
        assert wide["st"] >= access.stores, row
        assert row.get("ld 8", 0) + row.get("ld 16", 0) <= access.loads_16, row
        assert row.get("ld 32", 0) <= access.loads_32, row
        assert row.get("st 32", 0) <= access.stores_32, row
        assert row.get("st 8", 0) + row.get("st 16", 0) == 0, row


@pytest.mark.parametrize(("case", "forward", "backward"), [
    ("same", ["_statistics", "_fuse"], ["_image_backward", "_gradient_sums", "_channel_norm_backward"]),
    ("half", ["_statistics", "_fuse"], ["_image_backward", "_transpose_interpolation", "_channel_norm_backward"]),
    ("last half", ["_statistics", "_fuse_channels_last"], None),
    ("image", ["_statistics", "_fuse"], ["_image_backward"]),
    ("none", ["_statistics", "_fuse"], ["_image_backward", "_channel_norm_backward"]),
    ("none half", ["_statistics", "_fuse"], ["_image_backward", "_transpose_interpolation"]),
    ("none of either", ["_fuse"], ["_image_backward", "_channel_norm_backward"]),
    ("unit", ["_voxel_statistics", "_fuse"], ["_image_backward", "_voxel_norm_backward"]),
    ("unit half", ["_voxel_statistics", "_fuse"], ["_image_backward", "_transpose_interpolation", "_voxel_norm_backward"]),
    ("standard crops", ["_voxel_statistics", "_statistics", "_fuse"], ["_image_backward", "_voxel_norm_backward"]),
])
def test_launches(rows: list[Row], case: str, forward: list[str], backward: list[str] | None) -> None:
    """As many as the kernels' file says."""
    row = next(row for row in rows if row["case"] == case)
    assert row["forward"] == forward
    assert row.get("backward") == backward
