"""The optimizer step: against the method's recipe in plain torch, and each of its own parts."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dropgen_fast.bench.recipe import Recipe
from dropgen_fast.config import TrainConfig
from dropgen_fast.distributed import Ranks
from dropgen_fast.errors import InputError
from dropgen_fast.features import load_extractor
from dropgen_fast.fusion import StreamFusion
from dropgen_fast.kernels.fuse_streams.draw import draw_scale
from dropgen_fast.losses import build_loss
from dropgen_fast.model import DropGen
from dropgen_fast.networks import UNet
from dropgen_fast.step import TrainingStep

CLASSES, PATCH, BATCH = 3, 16, 2


def model(*, erm: bool = False, p: float = 0.5, normalization: str = "batch", backend: str = "auto",
          downsamplings: int = 2) -> DropGen:
    torch.manual_seed(0)
    channels = 1 if erm else 13
    network = UNet(channels, CLASSES, base_channels=4, downsamplings=downsamplings,
                   normalization=normalization)  # type: ignore[arg-type]
    fusion = StreamFusion(0.0 if erm else p, image_norm="none", dtype=torch.float32, backend=backend,
                          memory_format=torch.channels_last_3d)
    return DropGen(network.to(memory_format=torch.channels_last_3d), None if erm else load_extractor("mind"), fusion).train()


def step(of: DropGen, **settings: Any) -> TrainingStep:
    config = TrainConfig(store=Path("store"), out=Path("out"), **{"steps": 20, "learning_rate": 1e-3, **settings})
    return TrainingStep(of, build_loss("dice_ce", (), CLASSES), config, Ranks())


def batch(seed: int, samples: int = BATCH) -> tuple[Tensor, Tensor]:
    """Level sets of smooth noise as classes: something that can be learned."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(samples, 1, 4, 4, 4, generator=generator)
    image = nn.functional.interpolate(coarse, size=(PATCH,) * 3, mode="trilinear")
    image = (image - image.amin((1, 2, 3, 4), keepdim=True)) / (image.amax((1, 2, 3, 4), keepdim=True)
                                                                 - image.amin((1, 2, 3, 4), keepdim=True))
    label = (image * CLASSES).clamp(max=CLASSES - 1).to(torch.uint8)
    return image, label


def recipe_losses(of: DropGen, count: int, perturbation: int = 0, draws: int = 5, **settings: Any) -> np.ndarray:
    """Losses of the method's recipe in plain torch; `perturbation` > 0 seeds a change of every voxel by some 1e-7 of itself."""
    erm = of.extractor is None
    plain = Recipe(copy.deepcopy(of.network), of.extractor, **{"p": 0.5, "steps": 20, **settings}, bf16=False)
    torch.manual_seed(draws)
    noise = torch.Generator().manual_seed(perturbation)
    losses = []
    for number in range(count):
        image, label = batch(number)
        if perturbation:
            image = image * (1 + 1e-7 * torch.randn(image.shape, generator=noise))
        keep = None if erm else draw_scale(BATCH, 1, 12, (0.5, 0.5)) > 0
        losses.append(float(plain.step(image, label, keep)))
    return np.array(losses)


def our_losses(of: DropGen, steps: int) -> np.ndarray:
    one_step = step(of, learning_rate=2e-4)
    torch.manual_seed(5)
    return np.array([float(one_step([batch(number)], number)) for number in range(steps)])


def rounding(of: DropGen, steps: int) -> np.ndarray:
    """How far apart, relative, rounding alone may bring two trainings up to each step.

    AdamW makes a whole step of a gradient that is nearly 0, whatever its sign, so rounding grows from step to step. How fast is
    found by training the recipe anew with images changed by 1e-7; ten times the largest difference of three such trainings.
    """
    plain = recipe_losses(of, steps)
    apart = np.max([np.abs(recipe_losses(of, steps, seed) / plain - 1) for seed in (1, 2, 3)], 0)
    return 10 * np.maximum.accumulate(apart) + 1e-6


@pytest.mark.parametrize(("erm", "backend"), [(True, "native"), (False, "native"), (False, "triton")])
def test_follows_the_recipe_loss_by_loss(erm: bool, backend: str) -> None:
    """The same weights, batches and draws: our step and the recipe in plain torch go the same way."""
    steps = 20 if backend == "native" else 6
    ours = model(erm=erm, backend=backend)
    tolerance = rounding(ours, steps)
    assert tolerance.max() < 5e-3
    wanted = recipe_losses(ours, steps)
    found = our_losses(ours, steps)
    assert (np.abs(found / wanted - 1) <= tolerance).all(), (found, wanted, tolerance)


@pytest.mark.parametrize("wrong", [{"draws": 6}, {"learning_rate": 2.4e-4}, {"steps": 10}])
def test_another_recipe_is_told_apart(wrong: dict[str, Any]) -> None:
    """That the comparison above can fail."""
    ours = model()
    apart = np.abs(recipe_losses(ours, 20, **wrong) / recipe_losses(ours, 20) - 1)
    assert (apart > rounding(ours, 20)).any()


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    ours = model(p=0.0)
    one_step = step(ours, ema_decay=0.9)
    one_step([batch(0)], 0)
    before = copy.deepcopy(one_step.state())
    image, label = batch(1)
    image[0, 0, 3, 3, 3] = math.nan
    loss = one_step([(image, label)], 1)
    assert not loss.isfinite()
    after = one_step.state()
    for part in ("network", "ema"):
        for name, value in before[part].items():
            if part == "network" or "num_batches" in name:
                torch.testing.assert_close(after[part][name], value, rtol=0, atol=0, msg=f"{part} {name}")
    for name, value in before["optimizer"]["state"].items():
        assert all(torch.equal(after["optimizer"]["state"][name][k], v) for k, v in value.items())
    assert one_step.take() == {"loss": pytest.approx(before["counts"]["loss"]), "steps": 1, "skipped": 1, "in_a_row": 1}
    one_step([(image, label)], 2)
    assert one_step.take()["in_a_row"] == 2
    assert one_step([batch(2)], 3).isfinite()
    counts = one_step.take()
    assert (counts["skipped"], counts["in_a_row"], counts["steps"]) == (2, 0, 1)


def test_accumulated_batches_are_one_large_batch() -> None:
    """Without BatchNorm a step on two batches is the step on both at once, but for the order of sums: some 1e-6 a gradient."""
    image, label = batch(0, 4)
    results = []
    for batches in ([(image, label)], [(image[:2], label[:2]), (image[2:], label[2:])]):
        ours = model(p=0.0, normalization="instance")
        one_step = step(ours, accumulate=len(batches))
        loss = one_step(batches, 0)
        results.append((loss, [p.grad.clone() for p in ours.network.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(a.abs().max()) + 1e-7)


def test_clipping_scales_the_gradients_to_the_norm() -> None:
    norms = {}
    for clip in (0.0, 1e-3):
        ours = model(p=0.0)
        step(ours, clip_norm=clip)([batch(0)], 0)
        norms[clip] = float(nn.utils.get_total_norm([p.grad for p in ours.network.parameters()]))
    assert norms[0.0] > 1e-2
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-2)  # torch divides by the norm + 1e-6


def test_averaged_weights() -> None:
    """mean ← d mean + (1 - d) weights, d = min(decay, (1 + step) / (10 + step)); buffers are the last ones."""
    ours = model(p=0.0)
    one_step = step(ours, ema_decay=0.3)
    wanted = [p.detach().double() for p in ours.network.parameters()]
    for number in range(5):
        one_step([batch(number)], number)
        decay = min(0.3, (1 + number) / (10 + number))
        wanted = [decay * w + (1 - decay) * p.detach().double() for w, p in zip(wanted, ours.network.parameters(), strict=True)]
    trained = ours.network
    with one_step.averaged():
        assert ours.network is not trained
        for mean, want in zip(ours.network.parameters(), wanted, strict=True):
            torch.testing.assert_close(mean.double(), want, rtol=1e-5, atol=1e-6)
        for mean, value in zip(ours.network.buffers(), trained.buffers(), strict=True):
            assert torch.equal(mean, value)
    assert ours.network is trained


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    one_step = step(model(), steps=100, warmup_steps=4, learning_rate=1.0)
    rates = [one_step.learning_rate(n) for n in range(101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[52] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    one_step([batch(0)], 2)
    assert one_step.optimizer.param_groups[0]["lr"] == pytest.approx(0.6)


def test_a_restored_step_goes_on_with_the_same_bits() -> None:
    ours = model(p=0.0)
    whole = step(ours, ema_decay=0.9)
    for number in range(2):
        whole([batch(number)], number)
    state = copy.deepcopy(whole.state())
    resumed = step(model(p=0.0), ema_decay=0.9)
    resumed.restore(state)
    for number in range(2, 4):
        assert torch.equal(whole([batch(number)], number), resumed([batch(number)], number))
    for part in ("network", "ema"):
        assert all(torch.equal(v, resumed.state()[part][k]) for k, v in whole.state()[part].items())
    assert whole.take() == resumed.take()


def test_compiled_is_eager() -> None:
    """torch.compile of network and loss: the same losses but for the order of sums in float32."""
    found = {}
    for compiled in (False, True):
        one_step = step(model(p=0.0, downsamplings=0), compile=compiled)
        found[compiled] = [float(one_step([batch(n)], n)) for n in range(3)]
    np.testing.assert_allclose(found[True], found[False], rtol=1e-4)


@pytest.mark.parametrize(("settings", "message"), [({"cuda_graph": True}, "needs one process on a GPU"),
                                                   ({"sync_batchnorm": True}, "needs GPUs")])
def test_what_needs_a_gpu_says_so(settings: dict[str, bool], message: str) -> None:
    with pytest.raises(InputError, match=message):
        step(model(), **settings)
