"""`intensity_chain`: every backend against the definition in float64, layouts, in place, threads, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from intensity_chain_cases import STAGES, U, check, draw, draw_image, expected, only
from torch import Tensor

from dropgen_fast.kernels import library
from dropgen_fast.kernels.intensity_chain import (
    IntensityParameters,
    available_backends,
    intensity_chain,
    reference,
    standard_normal,
)
from dropgen_fast.kernels.intensity_chain import triton as triton_backend

SIZES = ((2, 1, (8, 6, 8)), (3, 2, (5, 7, 9)), (1, 3, (3, 1, 50)))  # N, C, (D, H, W)
KERNELS = ("native", "triton")
# Lanes of a tile beyond its channel are computed and not stored; NumPy, which Triton's interpreter runs on, tells of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def test_backends_are_here() -> None:
    assert available_backends() == {"native": "", "triton": "", "reference": ""}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("samples", "channels", "size"), SIZES)
def test_a_stage_alone(backend: str, stage: str, samples: int, channels: int, size: tuple[int, ...]) -> None:
    image, parameters = draw_image(samples, channels, size), only(draw(samples, channels), stage)
    check(intensity_chain(image, parameters, backend=backend), *expected(image, parameters))


@pytest.mark.parametrize("pair", list(itertools.combinations(STAGES, 2)), ids="+".join)
def test_stages_in_pairs(backend: str, pair: tuple[str, ...]) -> None:
    """Of one sample the pair, of the next all others, of the last none: a sample's stages are its own."""
    all_on, neutral = draw(3, 2, seed=2), IntensityParameters.neutral(3, 2)
    mixed = {"seed": all_on.seed}
    for stage in STAGES:
        on = torch.tensor([stage in pair, stage not in pair, False])
        values = getattr(all_on, stage)
        mixed[stage] = torch.where(on.view(-1, *(1,) * (values.dim() - 1)), values, getattr(neutral, stage))
    image = draw_image(3, 2, (4, 3, 11))
    check(intensity_chain(image, IntensityParameters(**mixed), backend=backend), *expected(image, IntensityParameters(**mixed)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int16])
@pytest.mark.parametrize(("samples", "channels", "size"), [SIZES[1], (1, 1, (25, 40, 23)), (2, 2, (1, 1, 1)), (1, 1, (12, 1, 1))])
def test_all_stages(backend: str, dtype: torch.dtype, samples: int, channels: int, size: tuple[int, ...]) -> None:
    """Of one chunk and of several, of no whole number of anything."""
    image, parameters = draw_image(samples, channels, size, dtype), draw(samples, channels, seed=3)
    check(intensity_chain(image, parameters, backend=backend), *expected(image, parameters))


@pytest.mark.parametrize("size", [(12, 16, 16), (17, 13, 11)])
def test_chunks_of_several_tiles(monkeypatch: pytest.MonkeyPatch, size: tuple[int, ...]) -> None:
    """As large volumes have, where a program's sums run over several tiles."""
    monkeypatch.setattr(triton_backend, "CHUNKS", 2)
    image, parameters = draw_image(1, 2, size), draw(1, 2)
    check(intensity_chain(image, parameters, backend="triton"), *expected(image, parameters))


def test_one_channel_neutral(backend: str) -> None:
    """Brightness and contrast are switched off channel by channel."""
    all_on = draw(2, 3)
    off = torch.tensor([[True, False, False], [False, False, True]])
    for rescale in (False, True):
        parameters = dataclasses.replace(
            only(all_on), brightness=torch.where(off, 1.0, all_on.brightness), contrast=torch.where(off, 1.0, all_on.contrast),
            rescale=torch.tensor([rescale, rescale]))
        image = draw_image(2, 3, (4, 5, 6)) + torch.tensor([0.0, 3.0, -2.0])[:, None, None, None]
        result = intensity_chain(image, parameters, backend=backend)
        check(result, *expected(image, parameters))
        if not rescale:
            assert result[0, 0].equal(image[0, 0])
            assert result[1, 2].equal(image[1, 2])


def test_zero_factors(backend: str) -> None:
    """Brightness 0 is black, contrast 0 the mean."""
    image = draw_image(1, 2, (4, 5, 6))
    neutral = IntensityParameters.neutral(1, 2)
    dark = dataclasses.replace(neutral, brightness=torch.tensor([[0.0, 1.0]]))
    assert not intensity_chain(image, dark, backend=backend)[0, 0].any()
    flat = dataclasses.replace(neutral, contrast=torch.tensor([[0.0, 1.0]]))
    check(intensity_chain(image, flat, backend=backend), *expected(image, flat))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int16])
def test_neutral_converts(backend: str, dtype: torch.dtype) -> None:
    image = draw_image(2, 3, (3, 5, 7), dtype)
    result = intensity_chain(image, IntensityParameters.neutral(2, 3), backend=backend)
    assert result.dtype == torch.float32
    if dtype != torch.int16:
        assert result.equal(image.float())
        return
    torch.testing.assert_close(result, (image.double() / 32767).float(), rtol=2 * U, atol=0)
    ends = torch.tensor([0, 32767, -32767], dtype=torch.int16).view(1, 1, 1, 1, 3)
    assert intensity_chain(ends, IntensityParameters.neutral(1, 1), backend=backend).flatten().tolist() == [0.0, 1.0, -1.0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "transposed": lambda x: x.transpose(2, 4).contiguous().transpose(2, 4),
    "crop": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 1, 2, 1))[..., 2:-1, 3:-1, 1:-2],
    "expanded": lambda x: x[:1, :1, :, :, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, layout: str) -> None:
    image = LAYOUTS[layout](draw_image(2, 2, (5, 4, 9)))
    assert not image.is_contiguous()
    parameters = draw(2, 2)
    result = intensity_chain(image, parameters, backend=backend)
    assert result.is_contiguous()
    assert result.equal(intensity_chain(image.contiguous(), parameters, backend=backend))


@pytest.mark.parametrize("stages", [STAGES, ("bias", "gamma", "contrast"), ("noise_std",), ("contrast",), ("brightness",), ()])
def test_out(backend: str, stages: tuple[str, ...]) -> None:
    """Into a tensor, and in place."""
    image, parameters = draw_image(2, 2, (5, 6, 8)), only(draw(2, 2), *stages)
    wanted = intensity_chain(image, parameters, backend=backend)
    before = image.clone()
    out = torch.full_like(image, torch.nan)
    assert intensity_chain(image, parameters, out=out, backend=backend) is out
    assert out.equal(wanted)
    assert image.equal(before)
    assert intensity_chain(image, parameters, out=image, backend=backend) is image
    assert image.equal(wanted)


def test_in_place_of_half_the_batch(backend: str) -> None:
    """In place where one sample is left as it is and the other is not."""
    image, p = draw_image(2, 1, (5, 6, 8)), draw(2, 1)
    first = torch.tensor([True, False])
    neutral = IntensityParameters.neutral(2, 1)
    mixed = IntensityParameters(**{name: torch.where(
        first.view(-1, *(1,) * (getattr(p, name).dim() - 1)), getattr(p, name), getattr(neutral, name))
        for name in ("seed", *STAGES)})
    before = image.clone()
    intensity_chain(image, mixed, out=image, backend=backend)
    check(image, *expected(before, mixed))
    assert image[1].equal(before[1])


@pytest.mark.parametrize("stage", ["brightness", "contrast"])
def test_in_place_of_some_channels(backend: str, stage: str) -> None:
    """Of a sample with channels that stay as they are, the others do not; of the next sample all stay."""
    image = draw_image(2, 3, (4, 5, 6))
    factors = torch.tensor([[1.0, 1.3, 1.0], [1.0, 1.0, 1.0]])
    parameters = dataclasses.replace(IntensityParameters.neutral(2, 3), **{stage: factors})
    before = image.clone()
    intensity_chain(image, parameters, out=image, backend=backend)
    check(image, *expected(before, parameters))
    assert not image[0, 1].equal(before[0, 1])


def test_threads_change_nothing() -> None:
    image, parameters = draw_image(2, 2, (33, 34, 35)), draw(2, 2)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(intensity_chain(image, parameters, backend="native"))
    finally:
        torch.set_num_threads(before)
    assert results[0].equal(results[1])


@pytest.mark.parametrize("level", ["0", "1"])
def test_lesser_instruction_sets(level: str, tmp_path: Path) -> None:
    """What this CPU runs is tested above; the library has code for lesser ones, too."""
    program = (
        "import sys, torch; sys.path.insert(0, sys.argv[3])\n"
        "from pathlib import Path; from dropgen_fast.kernels import library; library.PATHS['cpu'] = Path(sys.argv[1])\n"
        "from dropgen_fast.kernels.intensity_chain import intensity_chain; from intensity_chain_cases import draw, draw_image\n"
        "torch.save([intensity_chain(draw_image(2, 2, (9, 11, 21), d), draw(2, 2), backend='native')\n"
        "            for d in (torch.float32, torch.float16, torch.int16)], sys.argv[2])")
    path = tmp_path / "results.pt"
    subprocess.run([sys.executable, "-c", program, str(library.PATHS["cpu"]), str(path), str(Path(__file__).parent)], check=True,
                   env={**os.environ, "DROPGEN_FAST_CPU_LEVEL": level})
    for dtype, result in zip((torch.float32, torch.float16, torch.int16), torch.load(path), strict=True):
        check(result, *expected(draw_image(2, 2, (9, 11, 21), dtype), draw(2, 2)))


def test_stages_follow_one_another() -> None:
    """The definition is what its stages are one after the other, in the order of the fields."""
    assert ("seed", *STAGES) == tuple(field.name for field in dataclasses.fields(IntensityParameters))
    image, parameters = draw_image(2, 2, (4, 5, 6)), draw(2, 2)
    one_by_one, _ = expected(image, parameters)
    assert reference.intensity_chain(image, parameters, dtype=torch.float64).equal(one_by_one)


def test_constant_samples(backend: str) -> None:
    """No range: gamma and contrast leave a constant where it is, rescale makes it 0."""
    image = torch.full((2, 2, 4, 5, 6), 0.3)
    image[1] = -7.0
    p = draw(2, 2)
    left = intensity_chain(image, only(p, "gamma", "contrast"), backend=backend)
    torch.testing.assert_close(left, image, rtol=2 * U, atol=0)
    assert not intensity_chain(image, only(p, "gamma", "contrast", "rescale"), backend=backend).any()
    tiny = torch.tensor([0.0, 1e-40]).view(1, 1, 1, 1, 2)  # a range that has no reciprocal in float32
    assert not intensity_chain(tiny, only(draw(1, 1), "rescale"), backend=backend).any()


@pytest.mark.parametrize("stages", [("rescale",), ("contrast", "rescale"), ("gamma", "contrast", "rescale"), STAGES[3:]])
@pytest.mark.parametrize("backend", KERNELS)
def test_a_large_mean_costs_nothing(backend: str, stages: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the range: results depend on distances, which are exact; means are summed as such. Gamma is below 4.5."""
    monkeypatch.setattr(triton_backend, "CHUNKS", 1)  # one lane's sum of many voxels
    image = (draw_image(1, 1, (21, 30, 31)) + 30000) * 0.7
    assert (image.amax() - image.amin()).log2() % 1 != 0  # where the reciprocal is exact, so is gain · x + offset
    parameters = only(dataclasses.replace(draw(1, 1), contrast=torch.tensor([[1.5]])), *stages)  # where it clips shows the mean
    wanted = reference.intensity_chain(image.double(), parameters, dtype=torch.float64)
    result = intensity_chain(image, parameters, backend=backend)
    torch.testing.assert_close(result.double(), wanted, rtol=0, atol=(8 * 4.5 + 8) * U)


def test_rescaled_to_exactly_the_unit_interval(backend: str) -> None:
    for seed in range(3):
        image = draw_image(2, 2, (3, 8, 9), seed=seed)
        for stages in (("rescale",), ("gamma", "rescale"), STAGES):
            result = intensity_chain(image, only(draw(2, 2, seed=seed), *stages), backend=backend).flatten(1)
            assert result.amin(1).tolist() == pytest.approx([0, 0], abs=8 * U)
            assert result.amax(1).tolist() == pytest.approx([1, 1], abs=8 * U)
            assert result.min() >= 0
            assert result.max() <= 1


def test_contrast_keeps_the_range(backend: str) -> None:
    image = draw_image(1, 2, (7, 8, 9))
    parameters = dataclasses.replace(IntensityParameters.neutral(1, 2), contrast=torch.tensor([[1.5, 2.0]]))
    result = intensity_chain(image, parameters, backend=backend)
    assert result.amin((2, 3, 4)).equal(image.amin((2, 3, 4)))
    assert result.amax((2, 3, 4)).equal(image.amax((2, 3, 4)))


@pytest.mark.parametrize("gamma", [0.2, 0.5, 4.5, 20.0])
def test_gamma_is_accurate_to_a_millionth_of_the_range(backend: str, gamma: float) -> None:
    """Also near 0, where the power is steep, and at it."""
    t = torch.cat((torch.zeros(1), torch.logspace(-30, 0, 400, dtype=torch.float64).float()))
    parameters = dataclasses.replace(IntensityParameters.neutral(1, 1), gamma=torch.tensor([gamma]))
    result = intensity_chain(t.view(1, 1, 1, 1, -1), parameters, backend=backend).flatten()
    # 4 roundings of t grow by gamma (at t = 1), the rest adds 8.
    torch.testing.assert_close(result.double(), (t.double() / (1 + 1e-7)) ** torch.tensor(gamma).double(), rtol=0,
                               atol=min(1e-6, (4 * gamma + 8) * U) if gamma < 4 else (4 * gamma + 8) * U)
    assert result[0] == 0


def test_gamma_of_a_small_range(backend: str) -> None:
    """Beside which the 1e-7 that is added to it counts: at the top 0.83 of the range is left."""
    x = torch.linspace(0, 1, 101, dtype=torch.float32).view(1, 1, 1, 1, -1) * 1e-6
    parameters = dataclasses.replace(IntensityParameters.neutral(1, 1), gamma=torch.tensor([2.0]))
    result = intensity_chain(x, parameters, backend=backend)
    span = float(x.max())
    torch.testing.assert_close(result.double(), (x.double() / (span + 1e-7)) ** 2 * span, rtol=0, atol=(4 * 2 + 8) * U * span)


@pytest.mark.parametrize("gamma", [1e3, 1e9])
def test_gamma_however_large(backend: str, gamma: float) -> None:
    """Leaves nothing below the top, which it does not exceed: not either where (x - min) / range is rounded to above 1."""
    x = (torch.rand(64, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([-10.0, 50.0, 100.0]))
    low, high = x[:, 0], x[:, 2]
    assert ((high - low) * (1 / (high.double() - low + 1e-7)).float() > 1).any()
    parameters = dataclasses.replace(IntensityParameters.neutral(64, 1), gamma=torch.full((64,), gamma))
    result = intensity_chain(x.view(64, 1, 1, 1, 3), parameters, backend=backend).view(64, 3)
    rounding = 4 * U * 111  # of numbers of that size
    assert (result[:, :2] - low[:, None]).abs().max() <= rounding
    assert (low - result[:, 2]).max() <= rounding
    assert (result[:, 2] - high).max() <= rounding


@pytest.mark.parametrize(("size", "stages"), [(1e17, STAGES), (1e-17, tuple(name for name in STAGES if name != "gamma"))])
def test_large_and_small_values(backend: str, size: float, stages: tuple[str, ...]) -> None:
    """The squares of Rician noise are float32s; gamma would take what is small beside 1e-7 to nothing."""
    p = draw(2, 2)
    p = only(dataclasses.replace(p, noise_std=p.noise_std * size, rician_std=p.rician_std * size), *stages)
    image = draw_image(2, 2, (4, 5, 6)) * size
    check(intensity_chain(image, p, backend=backend), *expected(image, p))


@pytest.mark.parametrize("default", ["device", "dtype"])
def test_defaults_of_torch_change_nothing(backend: str, default: str, request: pytest.FixtureRequest) -> None:
    parameters, neutral = draw(2, 2), IntensityParameters.neutral(2, 2)
    images = [draw_image(2, 2, (4, 5, 6), dtype) for dtype in (torch.float32, torch.int16)]
    calls: list[Callable[[], Tensor]] = [partial(intensity_chain, image, parameters, backend=backend) for image in images]
    calls.append(partial(standard_normal, parameters.seed, (3, 5), 1, backend=backend))
    calls.append(partial(reference.to_values, images[1], torch.float64))
    wanted = [call() for call in calls]
    if default == "device":
        request.addfinalizer(lambda: torch.set_default_device(None))
        torch.set_default_device("meta")
    else:
        request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
        torch.set_default_dtype(torch.float64)
    for call, result in zip(calls, wanted, strict=True):
        assert call().equal(result)
    again = IntensityParameters.neutral(2, 2)
    for field in dataclasses.fields(again):
        assert getattr(again, field.name).equal(getattr(neutral, field.name))


def test_seeds_are_of_samples(backend: str) -> None:
    """Equal seeds give equal noise, whatever the place in the batch."""
    p = only(draw(3, 1), "noise_std", "rician_std")
    p = dataclasses.replace(p, seed=torch.tensor([7, 8, 7]), noise_std=torch.full((3,), 0.1), rician_std=torch.full((3,), 0.1))
    result = intensity_chain(torch.zeros(3, 1, 4, 5, 6), p, backend=backend)
    assert result[0].equal(result[2])
    assert not result[0].equal(result[1])


def neutral_with(**changes: Any) -> Callable[[], object]:
    return lambda: dataclasses.replace(IntensityParameters.neutral(2, 3), **changes)


def chain_with(image: Any = None, parameters: Any = None, **options: Any) -> Callable[[], object]:
    image = torch.zeros(2, 3, 4, 4, 4) if image is None else image
    return lambda: intensity_chain(image, parameters or IntensityParameters.neutral(2, 3), **options)


@pytest.mark.parametrize(("call", "words"), [
    (neutral_with(seed=torch.zeros(2)), r"seed must be \(2,\) torch.int64 on cpu, got \(2,\) torch.float32"),
    (neutral_with(noise_std=torch.zeros(3)), r"noise_std must be \(2,\) torch.float32"),
    (neutral_with(noise_std=[0.0, 0.0]), "noise_std must be a tensor"),
    (neutral_with(rician_std=torch.tensor([0.0, -0.1])), "rician_std must be at least 0"),
    (neutral_with(noise_std=torch.tensor([0.0, torch.nan])), "noise_std must be finite"),
    (neutral_with(bias=torch.zeros(2, 10)), r"bias must be \(2, 20\)"),
    (neutral_with(bias=torch.full((2, 20), 5.0)), "bias must have coefficients whose sizes sum to at most 80"),
    (neutral_with(gamma=torch.tensor([1.0, 0.0])), "gamma must be above 0"),
    (neutral_with(gamma=torch.tensor([1.0, torch.inf])), "gamma must be finite"),
    (neutral_with(brightness=torch.zeros(2)), r"brightness must be \(N, C\)"),
    (neutral_with(brightness=-torch.ones(2, 3)), "brightness must be at least 0"),
    (neutral_with(brightness=None), r"brightness must be a tensor \(N, C\)"),
    (neutral_with(contrast=torch.ones(2, 2)), r"contrast must be \(2, 3\)"),
    (neutral_with(contrast=torch.ones(2, 3, dtype=torch.float64)), r"contrast must be \(2, 3\) torch.float32"),
    (neutral_with(rescale=torch.zeros(2)), r"rescale must be \(2,\) torch.bool"),
    (neutral_with(rescale=torch.zeros(2, dtype=torch.bool, device="meta")), "rescale must be .* on cpu, got .* on meta"),
    (chain_with(torch.zeros(2, 3, 4, 4)), r"image must be \(N, C, D, H, W\)"),
    (chain_with(torch.zeros(2, 3, 0, 4, 4)), "no empty axis"),
    (chain_with([1]), "image must be a dense tensor"),
    (chain_with(torch.zeros(2, 3, 4, 4, 4).to_sparse()), "image must be a dense tensor"),
    (chain_with(torch.zeros(2, 3, 4, 4, 4, dtype=torch.float64)), "image must be float32, float16 or int16, got torch.float64"),
    (chain_with(torch.zeros(2, 3, 4, 4, 4, requires_grad=True)), "must not require a gradient"),
    (chain_with(parameters=IntensityParameters.neutral(2, 1)), "2 samples and 3 channels, got 2 and 1"),
    (chain_with(parameters={"seed": 1}), "parameters must be IntensityParameters, got dict"),
    (chain_with(out=torch.zeros(2, 3, 4, 4, 5)), r"out must be \(2, 3, 4, 4, 4\) torch.float32 on cpu"),
    (chain_with(out=torch.zeros(2, 3, 4, 4, 4, dtype=torch.float16)), "out must be .* got .* torch.float16"),
    (chain_with(out=torch.zeros(2, 4, 4, 4, 3).permute(0, 4, 1, 2, 3)), "out must be contiguous"),
    (chain_with(out=3), "out must be a tensor, got int"),
    (chain_with(backend="cuda"), "backend must be one of auto, native, reference, triton, got 'cuda'"),
])
def test_what_does_not_fit_is_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_backend_that_cannot_be_had_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match=r"'triton' cannot take this call: it runs on a GPU .* what can: native, reference"):
        chain_with(backend="triton")()


@pytest.mark.parametrize(("shape", "words"), [
    ((2**15 + 1, 1, 1, 1, 1), "it takes 32768 samples and as many channels, and a tensor has (32769, 1)"),
    ((1, 2**15 + 1, 1, 1, 1), "it takes 32768 samples and as many channels, and a tensor has (1, 32769)"),
    ((1, 1, 2048, 1024, 1024), "it counts the voxels of a channel in 32 bits, and a tensor has (2048, 1024, 1024)"),
    ((2**15, 2, 2047, 1024, 1024), ""),
])
def test_what_triton_refuses(shape: tuple[int, ...], words: str) -> None:
    assert triton_backend.refuses(torch.empty(1).expand(shape)) == words


def test_auto_is_native_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    image, parameters = draw_image(1, 1, (4, 5, 6)), draw(1, 1)
    wanted = {name: intensity_chain(image, parameters, backend=name) for name in ("native", "reference")}
    assert not wanted["native"].equal(wanted["reference"])  # the last bits tell them apart
    assert intensity_chain(image, parameters).equal(wanted["native"])
    monkeypatch.setattr("dropgen_fast.kernels.intensity_chain.native.MISSING", "not built")
    assert intensity_chain(image, parameters).equal(wanted["reference"])
