"""The step on a GPU: no host synchronisation, and a CUDA graph of the whole gives what single kernels give. `pytest -m gpu`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dropgen_fast.config import TrainConfig
from dropgen_fast.distributed import Ranks
from dropgen_fast.losses import build_loss
from dropgen_fast.model import FusionConfig, ModelConfig, build_model
from dropgen_fast.step import GRAPH_WARM_UP, TrainingStep

pytestmark = pytest.mark.gpu
CLASSES, PATCH, STEPS = 4, (32, 32, 32), 10


def one_step(**settings: Any) -> TrainingStep:
    fusion = FusionConfig(p=(0.5,), p_start=(0.1,), p_ramp_steps=STEPS)  # rates that change from step to step
    model_config = ModelConfig(network_options=("base_channels=8", "downsamplings=2"), fusion=fusion)
    torch.manual_seed(0)
    torch.cuda.manual_seed(0)
    model = build_model(model_config, image_channels=1, classes=CLASSES, patch=PATCH).to("cuda").train()
    config = TrainConfig(store=Path("store"), out=Path("out"), model=model_config, steps=STEPS, warmup_steps=4,
                         **{"compile": False, "clip_norm": 1.0, "ema_decay": 0.9, **settings})
    return TrainingStep(model, build_loss("dice_ce", (), CLASSES).to("cuda"), config, Ranks(device=torch.device("cuda:0")))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.rand(2, 1, *PATCH, device="cuda", generator=generator),
            torch.randint(CLASSES, (2, 1, *PATCH), device="cuda", generator=generator, dtype=torch.uint8))


@pytest.mark.parametrize("settings", [{}, {"compile": True}, {"cuda_graph": True}, {"cuda_graph": True, "compile": True}],
                         ids=["eager", "compiled", "graph", "compiled graph"])
def test_no_step_waits_for_the_gpu(settings: dict[str, bool]) -> None:
    """torch raises where an operation would wait for the device; the first steps may, while libraries choose and compile."""
    step = one_step(**settings)
    batches = [batch(n) for n in range(STEPS)]
    warm = GRAPH_WARM_UP + 2
    for number in range(warm):
        step([batches[number]], number)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [step([batches[number]], number).clone() for number in range(warm, STEPS)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(loss.isfinite() for loss in losses)


def test_the_profile_of_a_step_has_no_synchronisation() -> None:
    """The same, seen by the profiler: no call of the driver that waits, and no copy to the host."""
    step = one_step()
    batches = [batch(n) for n in range(STEPS)]
    for number in range(5):
        step([batches[number]], number)
    torch.cuda.synchronize()
    with warnings.catch_warnings(), torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profile:
        warnings.simplefilter("ignore")
        for number in range(5, 8):
            step([batches[number]], number)
    names = {event.key for event in profile.key_averages()}
    assert any("fuse" in name for name in names)
    waits = {n for n in names if n in ("cudaStreamSynchronize", "cudaEventSynchronize") or "Memcpy DtoH" in n}
    assert not waits


@pytest.mark.parametrize("compiled", [False, True])
def test_a_graph_of_the_step_is_the_step(compiled: bool) -> None:
    """Drop rates, learning rate and the average's weight change from step to step, and the dropout is drawn anew.

    bfloat16 arithmetic in the same kernels: the losses agree to some 1e-2 (a replay may take another algorithm of a convolution),
    and are far from those of a graph that would repeat its first step.
    """
    found: dict[bool, list[float]] = {}
    for graph in (False, True):
        step = one_step(cuda_graph=graph, compile=compiled)
        found[graph] = [float(step([batch(n)], n)) for n in range(STEPS)]
        assert step.take()["steps"] == STEPS
        assert float(step.optimizer.param_groups[0]["lr"]) == pytest.approx(step.learning_rate(STEPS - 1), rel=1e-6)
    assert found[True] == pytest.approx(found[False], rel=2e-2)


def test_a_step_that_is_not_finite_changes_nothing_in_a_graph() -> None:
    step = one_step(cuda_graph=True)
    for number in range(GRAPH_WARM_UP + 2):
        step([batch(number)], number)
    before = {name: value.clone() for name, value in step.state()["network"].items()}
    image, label = batch(9)
    image[0, 0, 3, 3, 3] = torch.nan
    step([(image, label)], GRAPH_WARM_UP + 2)
    assert all(torch.equal(value, before[name]) for name, value in step.state()["network"].items())
    assert step.take()["skipped"] == 1
    assert step([batch(10)], GRAPH_WARM_UP + 3).isfinite()


def test_a_restored_graph_goes_on() -> None:
    whole = one_step(cuda_graph=True)
    for number in range(4):
        whole([batch(number)], number)
    resumed = one_step(cuda_graph=True)
    resumed.restore(whole.state())
    torch.cuda.manual_seed(1)
    ours = [float(resumed([batch(n)], n)) for n in range(4, STEPS)]
    assert all(torch.tensor(ours).isfinite())
    assert float(resumed.take()["steps"]) == STEPS
