"""Golden losses: twenty steps of ERM and of DropGen from fixed weights and batches, as they were when this was written.

``python tests/test_golden.py`` writes them anew, after a change that is meant to change them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dropgen_fast.config import TrainConfig
from dropgen_fast.distributed import Ranks
from dropgen_fast.losses import build_loss
from dropgen_fast.model import FusionConfig, Method, ModelConfig, build_model
from dropgen_fast.step import TrainingStep

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = Path(__file__).parent / "golden_losses.json"
METHODS: tuple[Method, ...] = ("erm", "dropgen")
STEPS, CLASSES, SIDE = 20, 4, 16


def batch(number: int) -> tuple[Tensor, Tensor]:
    """Two patches of waves in [0, 1] and their level sets, by formula: no generator has a part in them."""
    z, y, x = torch.meshgrid(*[torch.arange(SIDE, dtype=torch.float64)] * 3, indexing="ij")
    waves = [torch.sin(0.3 * (z + k) + 0.2 * y + 0.1 * number) + torch.cos(0.25 * x * (1 + 0.1 * k)) for k in range(2)]
    image = torch.stack([(wave - wave.min()) / (wave.max() - wave.min()) for wave in waves])[:, None]
    return image.float(), (image * CLASSES).clamp(max=CLASSES - 1).to(torch.uint8)


def losses(method: Method, perturbation: int = 0) -> list[float]:
    """Of each step; `perturbation` > 0 seeds a change of every voxel by some 1e-7 of itself."""
    settings = ModelConfig(method=method, fusion=FusionConfig(p=(0.5,)), precision="fp32",
                           network_options=("base_channels=8", "downsamplings=1"))
    torch.manual_seed(0)
    model = build_model(settings, image_channels=1, classes=CLASSES, patch=(SIDE,) * 3).train()
    config = TrainConfig(store=Path(), out=Path(), model=settings, steps=STEPS, learning_rate=1e-3, warmup_steps=3, clip_norm=5.0)
    step = TrainingStep(model, build_loss(config.loss, (), CLASSES), config, Ranks())
    noise = torch.Generator().manual_seed(perturbation)
    found = []
    for number in range(STEPS):
        image, label = batch(number)
        if perturbation:
            image = image * (1 + 1e-7 * torch.randn(image.shape, generator=noise))
        found.append(float(step([(image, label)], number)))
    return found


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_what_they_were(method: Method) -> None:
    """As far as rounding lets two trainings agree: ten times what a change of the images by 1e-7 does (see test_step.py)."""
    golden = np.array(json.loads(GOLDEN.read_text())[method])
    plain = np.array(losses(method))
    apart = np.max([np.abs(np.array(losses(method, seed)) / plain - 1) for seed in (1, 2, 3)], 0)
    tolerance = 10 * np.maximum.accumulate(apart) + 1e-6
    assert tolerance.max() < 2e-2
    assert (np.abs(plain / golden - 1) <= tolerance).all(), (plain.tolist(), golden.tolist(), tolerance.tolist())
    assert golden[-1] < 0.8 * golden[0]


def test_the_methods_are_told_apart() -> None:
    golden = json.loads(GOLDEN.read_text())
    assert np.abs(np.array(golden["erm"]) / np.array(golden["dropgen"]) - 1).max() > 0.05


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({method: losses(method) for method in METHODS}, indent=1) + "\n")
    sys.exit(f"{GOLDEN} is written")
