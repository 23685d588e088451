"""intensity_chain's Triton kernels, compiled ahead of time for GPUs that need not be here; see compile_kernels.py."""

from __future__ import annotations

import pytest
from ahead_of_time import CAPABILITIES, Row, compiled, rows_of


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """What compile_intensity_chain.py says."""
    return rows_of("compile_intensity_chain.py")


def test_nothing_is_spilled(rows: list[Row]) -> None:
    assert {(row["capability"], row["kernel"]) for row in compiled(rows)} == {
        (capability, kernel) for capability in CAPABILITIES
        for kernel in ("_statistics", "_fold", "_power_sums", "_write", "_standard_normal")}
    assert [row for row in compiled(rows) if row["stack"] or row["local"]] == []


# Vectors of 128 bits in a tile of 8 voxels per thread: 2 for each time that it is read or written. `_statistics` reads the
# image and writes it with noise; `_power_sums` reads the one or the other; `_write` reads the image in two branches, what was
# written in a third, and writes in two. A vector of 4 voxels of a 16-bit type has 64 bits.
HOT = {"_statistics": (2, 0, 2), "_power_sums": (2, 2, 0), "_write": (4, 2, 4), "_standard_normal": (0, 0, 2)}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("case", "image_bits"), [
    ("all", 128), ("float16", 64), ("int16", 64), ("by 4", 128), ("by 4 together", 128)])
def test_vectors_are_whole(rows: list[Row], capability: int, case: str, image_bits: int) -> None:
    """Rows of 12 voxels too, and channels whose voxels 4 divides where their rows do not: Triton knows of 16 only."""
    found = {row["kernel"]: row for row in rows if row.get("capability") == capability and row["case"] == case}
    assert bool(found) == (case == "all" or capability == CAPABILITIES[0])  # the others are compiled for one
    for kernel, row in found.items():
        if kernel == "_fold":
            continue
        of_image, of_result, stores = HOT[kernel]
        wide = {kind: sum(row.get(f"{kind} {bits}", 0) * bits // 128 for bits in (128, 256)) for kind in ("ld", "st")}
        assert wide["ld"] == of_result + (of_image if image_bits == 128 else 0), row
        assert row.get("ld 64", 0) == (of_image if image_bits == 64 else 0) + (kernel == "_standard_normal"), row  # its seed
        assert wide["st"] == stores, row
        assert [row.get(f"ld {bits}", 0) for bits in (8, 16)] == [0, 0], row
        assert [row.get(f"st {bits}", 0) for bits in (8, 16)] == [0, 0], row
        assert row.get("st 32", 0) == (2 if kernel == "_statistics" else 0), row  # a chunk's extremes


@pytest.mark.parametrize(("case", "chain"), [
    ("all", ["_statistics", "_fold", "_power_sums", "_fold", "_write"]), ("rescale", ["_statistics", "_fold", "_write"]),
    ("contrast", ["_statistics", "_fold", "_write"]), ("gamma", ["_statistics", "_fold", "_write"]), ("noise", ["_write"]),
    ("neutral", ["_write"]),
])
def test_launches(rows: list[Row], case: str, chain: list[str]) -> None:
    """As many as the kernels' file says."""
    row = next(row for row in rows if row["case"] == case)
    assert row["chain"] == chain
    assert row["noise"] == ["_standard_normal"]
