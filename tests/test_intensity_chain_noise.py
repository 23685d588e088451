"""The noise of `intensity_chain`: known answers, backends against the definition, and statistics."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import scipy.stats
import torch
from intensity_chain_cases import NORMAL, U, normals_of_triton

from dropgen_fast.kernels.intensity_chain import reference, standard_normal
from dropgen_fast.kernels.intensity_chain import triton as triton_backend

SEEDS = torch.tensor([5, -7, 2**63 - 1])
COUNT = 1 << 20
SIGMAS = 4.5  # a statistic of a good generator is beyond with a probability of 7e-6; seeds are fixed


@pytest.mark.parametrize(("counter", "key", "words"), [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    """The vectors of philox4x32, 10 rounds, that Random123 publishes with its source (kat_vectors)."""
    found = reference.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))  # type: ignore[arg-type]
    assert tuple(map(int, found)) == words


def test_counter_key_and_lanes() -> None:
    """Voxel 4 j + i of a stream is normal i of the counter (j, stream), under the seed's halves."""
    seed, stream = -0x123456789ABCDEF, 2
    z = reference.standard_normal(torch.tensor([seed]), (3, 5, 7), stream, dtype=torch.float64).flatten()
    for voxel in (0, 1, 2, 3, 4, 50, 104):
        words = reference.philox(tuple(map(torch.tensor, (voxel // 4, 0, stream, 0))),  # type: ignore[arg-type]
                                 tuple(map(torch.tensor, (seed % 2**32, (seed >> 32) % 2**32))))  # type: ignore[arg-type]
        pair = reference.box_muller(*words[:2]) if voxel % 4 < 2 else reference.box_muller(*words[2:])
        assert z[voxel] == pair[voxel % 2]


FAR = 2**32 - 30
"""A counter whose high word is 0 and that of the 30th after it 1: of a voxel beyond the 2^34th, which no test has memory for."""
FAR_SEED = -0x123456789ABCDEF


def far_normals(stream: int) -> torch.Tensor:
    return reference.normals(FAR_SEED, stream, FAR + torch.arange(64))


def test_high_word_of_the_counter() -> None:
    z = far_normals(2)
    for i, low, high in ((0, FAR, 0), (29, 2**32 - 1, 0), (30, 0, 1), (63, 33, 1)):
        words = reference.philox(tuple(map(torch.tensor, (low, high, 2, 0))),  # type: ignore[arg-type]
                                 tuple(map(torch.tensor, (FAR_SEED % 2**32, (FAR_SEED >> 32) % 2**32))))  # type: ignore[arg-type]
        assert z[i].tolist() == [float(v) for pair in (words[:2], words[2:]) for v in reference.box_muller(*pair)]


def test_high_word_of_tritons_counter() -> None:
    found = normals_of_triton(FAR_SEED, 2, FAR, 64)
    torch.testing.assert_close(found.double(), far_normals(2), rtol=0, atol=NORMAL)


def test_high_word_of_the_native_counter(tmp_path: Path) -> None:
    """By its function for 64 counters, compiled for this test: no call of the library comes that far."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or pytest.skip("no C++ compiler")
    kernels = Path(__file__).parents[1] / "kernels" / "intensity_chain"
    source, path = tmp_path / "far.cpp", tmp_path / "far.so"
    source.write_text('#include "native.cpp"\n'
                      'extern "C" void far(int64_t seed, uint32_t stream, uint64_t counter, float* out) {\n'
                      "  static_assert(kBatch == 64);\n  normals(Key(seed), stream, counter, out);\n}\n")
    done = subprocess.run([compiler, "-std=c++17", "-O1", "-Wno-unknown-pragmas", "-fPIC", "-shared", f"-I{kernels}",
                           str(source), "-o", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.empty(64, 4)
    ctypes.CDLL(str(path)).far(
        ctypes.c_int64(FAR_SEED), ctypes.c_uint32(2), ctypes.c_uint64(FAR), ctypes.c_void_p(found.data_ptr()))
    torch.testing.assert_close(found.double(), far_normals(2), rtol=0, atol=NORMAL)


def test_radius_and_angle() -> None:
    """By hand: where the words are at the ends of what they stand for."""
    def normals(first: int, second: int) -> tuple[float, float]:
        a, b = reference.box_muller(torch.tensor(first), torch.tensor(second))
        return float(a), float(b)

    longest = (64 * torch.tensor(2.0).log().double().item()) ** 0.5  # u = 2^-32: never 0
    assert normals(0, 0) == pytest.approx((longest, 0), rel=1e-6)
    assert normals(0, 2**30) == pytest.approx((0, longest), abs=1e-6)
    assert normals(0, 2**31) == pytest.approx((-longest, 0), abs=1e-6)
    assert normals(0, 3 * 2**30) == pytest.approx((0, -longest), abs=1e-6)
    assert normals(0, 2**29) == pytest.approx((longest / 2**0.5,) * 2, rel=1e-6)
    assert normals(2**32 - 1, 123) == (0, 0)  # u = 1
    assert normals(2**31, 0) == pytest.approx((1.17741002, 0), rel=1e-6)  # u = 1/2


@pytest.mark.parametrize("shape", [(1,), (2,), (5,), (2, 3, 5, 7), (1, 16, 16, 16), (1027,)])
@pytest.mark.parametrize("stream", [0, 1, 2])
def test_backends_agree(backend: str, shape: tuple[int, ...], stream: int) -> None:
    found = standard_normal(SEEDS, shape, stream, backend=backend)
    assert found.dtype == torch.float32
    assert found.shape == (3, *shape)
    wanted = reference.standard_normal(SEEDS, shape, stream, dtype=torch.float64)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=NORMAL)


def test_native_far_along() -> None:
    """Every voxel of a field of many chunks; and small normals to their own rounding, for a logarithm near 1 is hard."""
    found = standard_normal(SEEDS[:1], (400_003,), 0, backend="native").double()
    wanted = reference.standard_normal(SEEDS[:1], (400_003,), 0, dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=NORMAL)
    # Neighbours share a radius: where it is small both are, and the error with it.
    pairs, error = wanted[:, :-1].view(-1, 2), (found - wanted)[:, :-1].view(-1, 2).abs().amax(1)
    assert (error / pairs.norm(dim=1)).max() <= 8 * U


def test_a_prefix_does_not_depend_on_what_follows(backend: str) -> None:
    long = standard_normal(SEEDS, (40, 50), 1, backend=backend).flatten(1)
    assert standard_normal(SEEDS, (1001,), 1, backend=backend).equal(long[:, :1001])


def test_threads_change_nothing() -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(standard_normal(SEEDS, (100_001,), 0, backend="native"))
    finally:
        torch.set_num_threads(before)
    assert found[0].equal(found[1])


@pytest.fixture(scope="module")
def fields() -> torch.Tensor:
    """(seeds, streams, voxels) float64: seeds that differ in one bit, low or high, and streams 0 to 2."""
    seeds = torch.tensor([0, 1, 1 << 32, 12345])
    return torch.stack([standard_normal(seeds, (COUNT,), stream, backend="native").double() for stream in range(3)], 1)


def test_moments(fields: torch.Tensor) -> None:
    """Of each field: the first four of a standard normal, within their standard errors 1, √2, √15 (raw), √96 over √n."""
    for field in fields.flatten(0, 1):
        for power, mean, spread in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
            assert abs(float((field**power).mean()) - mean) < SIGMAS * spread / COUNT**0.5
        assert field.abs().max() <= 6.67


def test_distribution(fields: torch.Tensor) -> None:
    for field in fields[:, 0]:
        assert scipy.stats.kstest(field[:1 << 17].numpy(), "norm").pvalue > 1e-4
    # The tails: as many beyond 3 and 4 standard deviations as there should be.
    for limit in (3.0, 4.0):
        wanted = 2 * scipy.stats.norm.sf(limit) * fields.numel()
        assert abs(float((fields.abs() > limit).sum()) - wanted) < SIGMAS * wanted**0.5


def test_fields_are_independent(fields: torch.Tensor) -> None:
    """Of each other, for streams and for seeds; of themselves, shifted; and so are their squares, which share a radius."""
    flat = fields.flatten(0, 1)
    for values in (flat, (flat.square() - 1) / 2**0.5):
        found = values @ values.T / COUNT
        found.fill_diagonal_(0)
        assert found.abs().max() < SIGMAS / COUNT**0.5
        for lag in (1, 2, 3, 4, 5, 128, 128 * 128):
            assert (values[:, lag:] * values[:, :-lag]).mean(1).abs().max() < SIGMAS / (COUNT - lag)**0.5


@pytest.mark.parametrize(("call", "words"), [
    (lambda: standard_normal(torch.zeros(1), (3,), 0), r"seed must be a tensor \(N,\) torch.int64 on cpu, N ≥ 1"),
    (lambda: standard_normal(torch.zeros(0, dtype=torch.int64), (3,), 0), "N ≥ 1"),
    (lambda: standard_normal(torch.zeros(1, 1, dtype=torch.int64), (3,), 0), "seed must be"),
    (lambda: standard_normal(5, (3,), 0), "seed must be a tensor .* got int"),  # type: ignore[arg-type]
    (lambda: standard_normal(SEEDS, (3, 0), 0), r"shape must be whole numbers ≥ 1, got \(3, 0\)"),
    (lambda: standard_normal(SEEDS, (3,), -1), "stream must be a whole number"),
    (lambda: standard_normal(SEEDS, (3,), 2**31), "stream must be a whole number"),
    (lambda: standard_normal(SEEDS, (3,), 0, backend="numpy"), "backend must be one of"),
])
def test_what_does_not_fit_is_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_more_seeds_than_a_grid_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An axis of a grid that is not the first ends at 65535."""
    assert triton_backend.MOST_PROGRAMS <= 65535
    monkeypatch.setattr(triton_backend, "MOST_PROGRAMS", 2)  # the interpreter would take long, were they not refused
    with pytest.raises(RuntimeError, match=r"it takes 2 samples .* what can: native, reference"):
        standard_normal(SEEDS, (1,), 0, backend="triton")


def test_triton_that_cannot_be_had_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="it runs on a GPU"):
        standard_normal(SEEDS, (3,), 0, backend="triton")
