"""The intensity chain out of DALI's operators: the definition's voxels, stage by stage and together; memory; the GPU's graph."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from dropgen_fast.data import dali_chain
from dropgen_fast.data.dali_chain import DaliIntensityChain, chain_graph
from dropgen_fast.kernels.intensity_chain import IntensityParameters, standard_normal
from dropgen_fast.kernels.intensity_chain.reference import intensity_chain

ROUNDING = 2.0**-24  # of a float32 near 1; images are in [0, 1]
N, C, SHAPE = 3, 2, (20, 13, 16)


def make_image(samples: int = N) -> Tensor:
    return torch.rand((samples, C, *SHAPE), generator=torch.Generator().manual_seed(1))


def parameters(**values: Tensor) -> IntensityParameters:
    """Neutral but for these."""
    return dataclasses.replace(IntensityParameters.neutral(N, C), seed=torch.tensor([5, -6, 1 << 40]), **values)


def coefficients(total: float) -> Tensor:
    """(N, 20), off for sample 1; a sample's sizes sum to `total`."""
    drawn = torch.rand((N, 20), generator=torch.Generator().manual_seed(2)) - 0.3
    drawn[0, 0] = 0  # on for all that
    return drawn / drawn.abs().sum(1, keepdim=True) * total * torch.tensor([[1.0], [0], [1]])


STAGES = {
    # Sum and product, one rounding each of at most 2, and that of z.
    "noise": (parameters(noise_std=torch.tensor([0.1, 0, 0.03])), 6),
    # The same for the two parts, two squares, a sum and a root.
    "rician": (parameters(rician_std=torch.tensor([0.1, 0, 0.05])), 12),
    # The logarithm, of at most 1: 20 terms of rounded polynomials; its exponential, of at most e, multiplies these errors.
    "bias": (parameters(bias=coefficients(1.0)), 3 * 30),
    # Difference, quotient and their power 4.5, the power's own error, two roundings more.
    "gamma": (parameters(gamma=torch.tensor([4.5, 1, 0.5])), 4.5 * 3 + 4),
    "brightness": (parameters(brightness=torch.tensor([[1.3, 0.7], [1, 1], [1, 1.5]])), 2),
    # The mean: as many roundings as the axes are long; three roundings more.
    "contrast": (parameters(contrast=torch.tensor([[1.5, 0.7], [1, 1], [1, 0.75]])), 0.5 * sum(SHAPE) + 6),
    "rescale": (parameters(rescale=torch.tensor([True, False, True])), 3),
}
"""Each stage alone, on for samples 0 and 2, and the roundings that it takes."""


@pytest.fixture(scope="module")
def chain() -> DaliIntensityChain:
    return DaliIntensityChain(N, C, SHAPE, num_threads=1)


def definition(image: Tensor, p: IntensityParameters) -> Tensor:
    return intensity_chain(image, p, dtype=torch.float64)


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_is_the_definition_s(chain: DaliIntensityChain, stage: str) -> None:
    p, roundings = STAGES[stage]
    image = 0.9 * make_image() + 0.05
    result, expected = chain(image, p), definition(image, p)
    assert torch.equal(result[1], image[1])
    for i in (0, 2):
        assert (expected[i] - image[i]).abs().max() > 0.01
        torch.testing.assert_close(result[i].double(), expected[i], rtol=0, atol=roundings * ROUNDING)


def test_all_stages_together_and_different_ones_for_each_sample(chain: DaliIntensityChain) -> None:
    p = parameters(
        noise_std=torch.tensor([0.1, 0, 0.02]), rician_std=torch.tensor([0.05, 0, 0]), bias=coefficients(0.3),
        gamma=torch.tensor([2.2, 0.5, 1]), brightness=torch.tensor([[1.2, 0.9], [1, 1], [0.8, 1]]),
        contrast=torch.tensor([[1.3, 0.8], [1.2, 1], [1, 1]]), rescale=torch.tensor([True, True, False]))
    image = make_image()
    # Errors of the stages above, each multiplied by what follows: by 1.4 (bias), 2.2 (gamma), 1.2, 1.3 and 2 (range and minimum).
    # Gamma below 1 has no bound of that kind: it is given where nothing comes before it.
    torch.testing.assert_close(chain(image, p).double(), definition(image, p), rtol=0, atol=1200 * ROUNDING)
    off = parameters()
    assert torch.equal(chain(image, off), image)
    torch.testing.assert_close(chain(image, p).double(), definition(image, p), rtol=0, atol=1200 * ROUNDING)


def test_gamma_of_a_small_range_knows_monai_s_epsilon(chain: DaliIntensityChain) -> None:
    """1e-7 beside a range of 1e-6: a tenth."""
    image, p = 1e-6 * make_image(), parameters(gamma=torch.tensor([2.0, 1, 3]))
    torch.testing.assert_close(chain(image, p).double(), definition(image, p), rtol=0, atol=1e-6 * 20 * ROUNDING)


def test_a_constant_sample_becomes_zero_and_infinity_is_never_made(chain: DaliIntensityChain) -> None:
    image = make_image()
    image[0] = 0.7
    image[2] = torch.where(image[2] > 0.5, 1e-42, 0)  # a range whose reciprocal float32 has not
    p = parameters(rescale=torch.ones(N, dtype=torch.bool), gamma=torch.tensor([0.5, 1, 1]), contrast=torch.full((N, C), 1.3))
    result = chain(image, p)
    assert result[0].abs().max() == 0
    assert result[2].abs().max() < 1e-37
    torch.testing.assert_close(result[1].double(), definition(image, p)[1], rtol=0, atol=100 * ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int16])
def test_stored_types(dtype: torch.dtype) -> None:
    image = make_image().half() if dtype == torch.float16 else (make_image() * 32767).round().to(dtype)
    chain = DaliIntensityChain(N, C, SHAPE, dtype=dtype, num_threads=1)
    assert chain(image, parameters()).dtype == torch.float32
    for p in (parameters(), STAGES["brightness"][0], STAGES["rescale"][0]):
        torch.testing.assert_close(chain(image, p).double(), definition(image, p), rtol=0, atol=4 * ROUNDING)


def test_a_batch_may_be_smaller_and_threads_change_nothing() -> None:
    chains = [DaliIntensityChain(4, C, SHAPE, num_threads=n) for n in (1, 3)]
    p, _ = STAGES["contrast"]
    image = make_image()
    first, second = (c(image, p) for c in chains)
    assert torch.equal(first, second)
    alone = IntensityParameters(**{f.name: getattr(p, f.name)[2:] for f in dataclasses.fields(p)})
    assert torch.equal(chains[0](image[2:], alone), first[2:])


# --- memory -------------------------------------------------------------------------------------------------------------


def test_the_image_is_read_where_it_is_and_never_written(chain: DaliIntensityChain, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make_image()
    before = image.clone()
    for p, _ in STAGES.values():
        chain(image, p)
        assert torch.equal(image, before)
    run = chain._pipeline.run
    monkeypatch.setattr(chain._pipeline, "run", lambda stream: (image.add_(1), run(stream))[1])
    assert torch.equal(chain(image, parameters()), before + 1)  # changed after it was fed: DALI has no copy


def test_results_are_new_memory_that_outlives_later_calls_and_the_chain() -> None:
    chain = DaliIntensityChain(N, C, SHAPE, num_threads=1)
    images = [make_image() + k for k in range(6)]
    p = parameters()
    results = [chain(image, p) for image in images]
    for image in images:
        image.add_(100)
    chain(images[0], p)
    del chain
    for k, result in enumerate(results):
        assert result.is_contiguous()
        assert torch.equal(result, make_image() + k)


def test_noise_is_made_for_the_samples_that_get_some(chain: DaliIntensityChain, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[list[int], int]] = []

    def counted(seed: Tensor, shape: Any, stream: int, device: Any) -> Tensor:
        made.append((seed.tolist(), stream))
        return standard_normal(seed, shape, stream, device)

    monkeypatch.setattr(dali_chain, "standard_normal", counted)
    chain(make_image(), parameters(noise_std=torch.tensor([0, 0.1, 0]), rician_std=torch.tensor([0.1, 0, 0.1])))
    assert made == [([-6], 0), ([5, 1 << 40], 1), ([5, 1 << 40], 2)]


def test_any_layout_of_the_image(chain: DaliIntensityChain) -> None:
    image, (p, _) = make_image(), STAGES["contrast"]
    assert torch.equal(chain(image.to(memory_format=torch.channels_last_3d), p), chain(image, p))


# --- the GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int16])
def test_the_gpu_graph_is_a_graph(dtype: torch.dtype) -> None:
    """As far as it goes without a GPU: what DALI checks while a graph is defined, such as arguments that must be on the CPU."""
    graph = chain_graph(shape=SHAPE, dtype=dtype, gpu=True, batch_size=2, num_threads=1, device_id=None)
    assert b"reductions__Mean" in graph.serialize()
    devices: dict[str, set[str]] = {}
    for operator in graph._ops:
        name, device = re.sub(r"^_+|_\d+$", "", operator.name), operator.outputs[0].device
        devices.setdefault(name, set()).add(device)
        assert name != "ArithmeticGenericOp" or {node.device for node in operator.inputs} == {device}  # known when it runs
    assert devices["image"] == devices["z3"] == devices["Min"] == devices["Max"] == devices["Mean"] == devices["Merge"] == {"gpu"}
    assert devices["Sum"] == devices["noisy"] == devices["bias"] == {"cpu"}


@pytest.mark.gpu
def test_a_gpu_gives_the_definition_s_voxels() -> None:
    chain = DaliIntensityChain(N, C, SHAPE, "cuda")
    image = 0.9 * make_image() + 0.05
    for p, roundings in STAGES.values():
        results = [chain(image.cuda() + 0, p) for _ in range(3)]  # inputs that are gone as soon as they may be
        for result in results:
            assert result.is_cuda
            torch.testing.assert_close(result.double().cpu(), definition(image, p), rtol=0, atol=2 * roundings * ROUNDING)


# --- what can be wrong --------------------------------------------------------------------------------------------------


def test_wrong_calls_are_refused(chain: DaliIntensityChain) -> None:
    image = make_image()
    with pytest.raises(ValueError, match=r"image must be \(3 or fewer, 2, 20, 13, 16\), got \(4,"):
        chain(make_image(4), parameters())
    with pytest.raises(ValueError, match=r"image must be \(3 or fewer"):
        chain(image[:, :1], parameters())
    with pytest.raises(ValueError, match=r"must be torch\.float32 on cpu, got torch\.float64"):
        chain(image.double(), parameters())
    with pytest.raises(ValueError, match="parameters must be of 2 samples and 2 channels, got 3 and 2"):
        chain(image[:2], parameters())
    with pytest.raises(ValueError, match=r"dtype must be float32, float16 or int16, got torch\.bfloat16"):
        DaliIntensityChain(N, C, SHAPE, dtype=torch.bfloat16)
