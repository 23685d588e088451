"""`intensity_chain` on a GPU: Triton's kernels against the definition in float64, and nothing that waits for the device."""

from __future__ import annotations

import pytest
import torch
from intensity_chain_cases import NORMAL, STAGES, check, draw, draw_image, expected, only

from dropgen_fast.kernels.intensity_chain import IntensityParameters, intensity_chain, reference, standard_normal

pytestmark = pytest.mark.gpu
SIZES = ((2, 1, (64, 48, 40)), (3, 2, (17, 19, 23)), (1, 3, (3, 1, 50)), (2, 2, (1, 1, 1)))


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
