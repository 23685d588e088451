"""`dice_cross_entropy`'s Triton kernels, compiled ahead of time for GPUs that need not be here; see compile_kernels.py."""

from __future__ import annotations

import pytest
from ahead_of_time import CAPABILITIES, Row, compiled, rows_of

KERNELS = ("_sums", "_combine", "_gradient")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """What compile_dice_ce.py says."""
    return rows_of("compile_dice_ce.py")


def test_nothing_is_spilled(rows: list[Row]) -> None:
    assert {(row["capability"], row["kernel"]) for row in compiled(rows)} == {
        (number, kernel) for number in CAPABILITIES for kernel in KERNELS}
    spilled = [row for row in compiled(rows) if row["stack"] or row["local"]]
    # With the classes of no preset the compiler may give up two registers of _sums for one more block on a processor.
    assert [row for row in spilled if row["case"].split()[0] not in ("17", "105", "256") or row["stack"] + row["local"] > 8] == []


def test_two_launches_forward_and_one_backward(rows: list[Row]) -> None:
    launches = [(row["forward"], row["backward"]) for row in rows if "forward" in row]
    assert launches
    assert all(names == (["_sums", "_combine"], ["_gradient"]) for names in launches)


# A tile of 2048 scores, 128 threads: 16 scores a thread. As vectors of 128 bits 4 of float32 and 2 of 16-bit types; channels-last
# with 4 classes a voxel in bfloat16 has but 64 bits. The gradient stores what it loads.
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_scores_are_read_and_written_as_vectors(rows: list[Row], capability: int) -> None:
    found = {(row["case"], row["kernel"]): row for row in compiled(rows) if row["capability"] == capability}
    vectors = {"16": (128, 4), "16 bf16": (128, 2), "16 last": (128, 4), "16 bf16 last": (128, 2),
               "4": (128, 4), "4 bf16": (128, 2), "4 last": (128, 4), "4 bf16 last": (64, 4)}
    if capability == CAPABILITIES[0]:
        vectors |= dict.fromkeys(("half", "2", "9", "14", "17", "105", "256", "256 last"), (128, 2))
        vectors |= dict.fromkeys(("torch.int8", "torch.int64"), (128, 4))
    for case, (bits, count) in vectors.items():
        sums, gradient = found[case, "_sums"], found[case, "_gradient"]
        assert sums[f"ld {bits}"] == count, sums
        assert gradient[f"ld {bits}"] >= count, gradient  # the coefficients may be read as vectors too
        assert {key: value for key, value in gradient.items() if key.startswith("st ")} == {f"st {bits}": count}, gradient
