"""docs/dice_ce.md: its code runs as it stands, and what it says of nnU-Net's and MONAI's losses is so."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from monai.losses import DiceCELoss

PAGE = Path(__file__).parent.parent / "docs" / "dice_ce.md"


def run(title: str) -> dict[str, Any]:
    """Run a section's one block of Python."""
    section = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert section is not None
    block, = re.findall(r"^```python\n(.*?)^```$", section[1], re.DOTALL | re.MULTILINE)
    namespace: dict[str, Any] = {"__name__": "page"}
    exec(compile(block, str(PAGE), "exec"), namespace)
    return namespace


def test_every_block_is_run() -> None:
    assert len(re.findall(r"^```\w+$", PAGE.read_text(), re.MULTILINE)) == 2


def test_loop() -> None:
    """The scores are bfloat16, and the loss is MONAI's of them in float32, but for its sums of 4096 voxels."""
    page = run("In a loop of your own, and with MONAI")
    assert page["scores"].dtype == torch.bfloat16
    wanted = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)(page["scores"].detach().double(), page["label"])
    assert page["loss"].dtype == torch.float32
    assert page["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert page["network"].weight.grad.any()


@pytest.mark.parametrize("deep", [False, True])
def test_nnunet(deep: bool) -> None:
    """nnU-Net's own loss plus 1, with its gradient; in a trainer that has been given no more than the loss asks for."""
    pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed (extra: test)")
    page = run("In an nnU-Net v2 trainer")
    trainer = page["nnUNetTrainerFusedLoss"].__new__(page["nnUNetTrainerFusedLoss"])
    trainer.label_manager = SimpleNamespace(has_regions=False, ignore_label=None)
    trainer.configuration_manager = SimpleNamespace(batch_dice=False, pool_op_kernel_sizes=[[1] * 3, *[[2] * 3] * 3])
    trainer.enable_deep_supervision, trainer.is_ddp, trainer.device = deep, False, torch.device("cpu")
    fused, own = trainer._build_loss(), page["nnUNetTrainer"]._build_loss(trainer)
    g = torch.Generator().manual_seed(0)
    sides = (16, 8, 4)
    outputs = [torch.randn(2, 4, side, side, side, generator=g).requires_grad_() for side in sides]
    labels = [torch.randint(0, 4, (2, 1, side, side, side), generator=g, dtype=torch.int16) for side in sides]
    arguments = (outputs, labels) if deep else (outputs[0], labels[0])
    values = fused(*arguments), own(*arguments)
    torch.testing.assert_close(values[0], values[1] + 1, rtol=1e-5, atol=0)
    ours, theirs = (torch.autograd.grad(value, outputs, allow_unused=True) for value in values)
    assert sum(gradient is not None for gradient in ours) == (2 if deep else 1)  # nnU-Net gives the coarsest no weight
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    trainer.configuration_manager.batch_dice = True
    with pytest.raises(ValueError, match="no batch Dice"):
        trainer._build_loss()


def test_bytes() -> None:
    """The formula of the table, and the two numbers beneath it."""
    text = PAGE.read_text()
    voxels = 192 * 192 * 128
    for size, forward, backward in ((4, "4 C + 1", "8 C + 1"), (2, "2 C + 1", "4 C + 1")):
        assert forward in text
        assert backward in text
        assert f"{voxels * (3 * 16 * size + 2):,}" in text
