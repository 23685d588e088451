"""`intensity_chain` on a GPU: Triton's kernels against the definition in float64, and nothing that waits for the device."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from intensity_chain_cases import NORMAL, STAGES, U, check, draw, draw_image, expected, normals_of_triton, only

from dropgen_fast.kernels.intensity_chain import IntensityParameters, intensity_chain, reference, standard_normal
from dropgen_fast.kernels.intensity_chain import triton as triton_backend

pytestmark = pytest.mark.gpu
SIZES = ((2, 1, (64, 48, 40)), (3, 2, (17, 19, 23)), (1, 3, (3, 1, 50)), (2, 2, (1, 1, 1)), (1, 1, (1, 1, 1)))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("samples", "channels", "size"), SIZES)
def test_a_stage_alone(stage: str, samples: int, channels: int, size: tuple[int, ...]) -> None:
    image, parameters = draw_image(samples, channels, size), only(draw(samples, channels), stage)
    check(intensity_chain(image.cuda(), parameters, backend="triton"), *expected(image, parameters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int16])
@pytest.mark.parametrize(("samples", "channels", "size"), [*SIZES, (2, 1, (128, 128, 128))])
def test_all_stages(dtype: torch.dtype, samples: int, channels: int, size: tuple[int, ...]) -> None:
    image, parameters = draw_image(samples, channels, size, dtype), draw(samples, channels, seed=3)
    found = intensity_chain(image.cuda(), parameters)
    check(found, *expected(image, parameters))
    assert found.equal(intensity_chain(image.cuda(), parameters))  # the same from call to call


@pytest.mark.parametrize("stages", [
    ("bias", "gamma"), ("bias", "contrast"), ("bias", "gamma", "contrast"), ("bias", *STAGES[3:])])
@pytest.mark.parametrize(("samples", "channels", "size"), SIZES)
def test_without_noise(stages: tuple[str, ...], samples: int, channels: int, size: tuple[int, ...]) -> None:
    """Where the bias field is computed once more by each pass."""
    image, parameters = draw_image(samples, channels, size), only(draw(samples, channels), *stages)
    check(intensity_chain(image.cuda(), parameters, backend="triton"), *expected(image, parameters))


@pytest.mark.parametrize("size", [(16, 17, 20), (9, 11, 13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_at_an_odd_offset(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    """Contiguous, and no vector of 128 bits begins where one could be read or written."""
    source, parameters = draw_image(2, 2, size, dtype), draw(2, 2)
    image = torch.empty(source.numel() + 1, dtype=dtype, device="cuda")[1:].view(source.shape)
    out = torch.empty(source.numel() + 1, dtype=torch.float32, device="cuda")[1:].view(source.shape)
    image.copy_(source)
    assert image.is_contiguous()
    assert image.data_ptr() % 16 != 0
    assert intensity_chain(image, parameters, out=out, backend="triton") is out
    check(out, *expected(source, parameters))


def test_more_than_2_to_the_31_voxels() -> None:
    """The last of them, too, are where they belong: noise, and with statistics."""
    shape = (1, 2, 1040, 1024, 1024)
    voxels = 2 * 1040 * 2**20
    if torch.cuda.mem_get_info()[0] < 26 * 2**30:
        pytest.skip("needs 26 GiB of a GPU's memory")
    image = torch.zeros(shape, dtype=torch.int16, device="cuda")
    one = torch.ones(1, dtype=torch.float32)
    noise = dataclasses.replace(IntensityParameters.neutral(1, 2), seed=torch.tensor([5]), noise_std=one)
    plain = intensity_chain(image, noise, backend="triton")
    for first in (0, 2**31 - 64, 2**31, voxels // 2 - 32, voxels - 64):
        wanted = reference.normals(5, 0, first // 4 + torch.arange(16)).flatten()
        torch.testing.assert_close(plain.view(-1)[first:first + 64].cpu().double(), wanted, rtol=0, atol=NORMAL)
    low, high = plain.amin(), plain.amax()
    scaled = intensity_chain(image, dataclasses.replace(noise, rescale=torch.tensor([True])), backend="triton")
    assert scaled.amin().item() == pytest.approx(0, abs=8 * U)
    assert scaled.amax().item() == pytest.approx(1, abs=8 * U)
    # Another kernel drew these normals: each may be twice NORMAL from the first's, a voxel, the minimum and the maximum.
    atol = 6 * NORMAL / float(high - low) + 8 * U
    for channel in range(2):
        for plane in (0, 511, 1039):
            wanted_plane = (plain[0, channel, plane].double() - low) / (high.double() - low)
            torch.testing.assert_close(scaled[0, channel, plane].double(), wanted_plane, rtol=0, atol=atol)


def test_high_word_of_the_counter() -> None:
    first = 2**32 - 30
    wanted = reference.normals(-5, 2, first + torch.arange(64))
    torch.testing.assert_close(normals_of_triton(-5, 2, first, 64, "cuda").cpu().double(), wanted, rtol=0, atol=NORMAL)


def test_more_seeds_than_a_grid_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """"auto" takes the definition; the limit is lowered, for that goes seed by seed."""
    monkeypatch.setattr(triton_backend, "MOST_PROGRAMS", 2)
    seeds = torch.arange(3)
    assert standard_normal(seeds, (7,), 0, "cuda").equal(standard_normal(seeds, (7,), 0, "cuda", backend="reference"))
    with pytest.raises(RuntimeError, match="it takes 2 samples"):
        standard_normal(seeds, (7,), 0, "cuda", backend="triton")


SLEEP = 500_000_000
"""Cycles: a fraction of a second, long beside the time that it takes to queue a few calls behind it."""


def test_on_a_side_stream() -> None:
    """Kernels run on the current stream: they read what it wrote before them, behind a wait."""
    source, parameters = draw_image(2, 1, (32, 32, 32)).cuda(), draw(2, 1)
    wanted = intensity_chain(source, parameters)
    wanted_noise = standard_normal(parameters.seed, (33,), 1, "cuda")
    image = torch.full_like(source, torch.nan)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        intensity_chain(source, parameters)  # the memory that the next call takes on this stream: to ask for it may wait
        standard_normal(parameters.seed, (33,), 1, "cuda")
        side.synchronize()
        torch.cuda._sleep(SLEEP)
        image.copy_(source)
        found = intensity_chain(image, parameters)
        noise = standard_normal(parameters.seed, (33,), 1, "cuda")
        assert not side.query()  # it still sleeps
    side.synchronize()
    assert found.equal(wanted)
    assert noise.equal(wanted_noise)


def test_calls_that_queue_up_keep_their_own_parameters() -> None:
    """Behind a wait: the memory that parameters are sent from is not used again before they have arrived."""
    image = draw_image(2, 2, (8, 9, 12)).cuda()
    draws = [draw(2, 2, seed=seed) for seed in range(50)]
    wanted = []
    for parameters in draws:
        wanted.append(intensity_chain(image, parameters))
        torch.cuda.synchronize()
    found = [torch.empty_like(image) for _ in draws]
    pinned = [triton_backend.pack(parameters, in_place=False).table.pin_memory() for parameters in draws]
    del pinned  # torch keeps that memory for the calls: to ask for it may wait
    torch.cuda._sleep(SLEEP)
    for parameters, out in zip(draws, found, strict=True):
        intensity_chain(image, parameters, out=out)
    assert not torch.cuda.current_stream().query()  # it still sleeps
    torch.cuda.synchronize()
    for seed, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one.equal(other), seed


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_device_than_the_current() -> None:
    image, parameters = draw_image(2, 1, (16, 17, 20)), draw(2, 1)
    with torch.cuda.device(0):
        found = intensity_chain(image.to("cuda:1"), parameters, backend="triton")
        noise = standard_normal(parameters.seed, (33,), 1, "cuda:1", backend="triton")
        assert torch.cuda.current_device() == 0
    assert found.device == noise.device == torch.device("cuda:1")
    check(found, *expected(image, parameters))
    wanted = reference.standard_normal(parameters.seed, (33,), 1, dtype=torch.float64)
    torch.testing.assert_close(noise.cpu().double(), wanted, rtol=0, atol=NORMAL)


def test_auto_is_triton() -> None:
    image, parameters = draw_image(1, 1, (16, 16, 16)).cuda(), draw(1, 1)
    assert intensity_chain(image, parameters).equal(intensity_chain(image, parameters, backend="triton"))
    with pytest.raises(RuntimeError, match="'native' cannot take this call: it runs on the CPU"):
        intensity_chain(image, parameters, backend="native")


@pytest.mark.parametrize("stages", [STAGES, ("bias", "gamma", "contrast"), ("noise_std",), ()])
def test_in_place(stages: tuple[str, ...]) -> None:
    image, parameters = draw_image(2, 2, (33, 40, 36)).cuda(), only(draw(2, 2), *stages)
    wanted = intensity_chain(image, parameters)
    assert intensity_chain(image, parameters, out=image) is image
    assert image.equal(wanted)


def test_layouts() -> None:
    image, parameters = draw_image(2, 2, (16, 17, 20)).cuda(), draw(2, 2)
    wanted = intensity_chain(image, parameters)
    assert intensity_chain(image.contiguous(memory_format=torch.channels_last_3d), parameters).equal(wanted)


@pytest.mark.parametrize("shape", [(1,), (2, 3, 5, 7), (1, 128, 128, 128)])
def test_noise(shape: tuple[int, ...]) -> None:
    seeds = torch.tensor([5, -7])
    for stream in range(3):
        found = standard_normal(seeds, shape, stream, "cuda", backend="triton")
        wanted = reference.standard_normal(seeds, shape, stream, dtype=torch.float64)
        torch.testing.assert_close(found.cpu().double(), wanted, rtol=0, atol=NORMAL)
        defined = standard_normal(seeds, shape, stream, "cuda", backend="reference")
        torch.testing.assert_close(defined.cpu().double(), wanted, rtol=0, atol=NORMAL)


def test_nothing_waits_for_the_device() -> None:
    image, parameters = draw_image(2, 1, (64, 64, 64)).cuda(), draw(2, 1)
    neutral = IntensityParameters.neutral(2, 1)
    intensity_chain(image, parameters)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for p in (parameters, neutral):
            intensity_chain(image, p)
        standard_normal(parameters.seed, (64, 64, 64), 0, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
