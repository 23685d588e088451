"""benchmarks/extractor_quality.py: what it prints, and what it says of input that is wrong."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

PROGRAM = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "extractor_quality.py"))


def test_it_prints_a_row_for_each_approximation(capsys: pytest.CaptureFixture[str]) -> None:
    assert PROGRAM["main"](["--size", "32", "40", "32", "--strides", "1", "2"]) == 0
    out = capsys.readouterr().out
    assert "mind, 32 × 40 × 32 voxels" in out
    found = re.findall(r"^(\S+(?: \d)?) +([-.\d]+) +([-.\d]+)$", out, re.M)
    rows = {name: (float(mean), float(low)) for name, mean, low in found}
    assert rows["bfloat16"] == rows["stride 1"] == (1.0, 1.0)  # MIND is float32 whatever the autocast
    assert 0.2 < rows["stride 2"][0] < 1
    assert rows["stride 2"][1] < rows["stride 2"][0]


def test_the_cosine_is_taken_over_channels_and_inside() -> None:
    a, b = torch.randn(2, 1, 5, 4, 4, 4).unbind()
    inside = torch.zeros(4, 4, 4, dtype=torch.bool)
    inside[1, 2, 3] = True
    wanted = float((a[0, :, 1, 2, 3] @ b[0, :, 1, 2, 3]) / (a[0, :, 1, 2, 3].norm() * b[0, :, 1, 2, 3].norm()))
    assert PROGRAM["cosine"](a, b, inside)[0] == pytest.approx(wanted, abs=1e-5)


def test_the_features_are_what_the_network_sees() -> None:
    def extractor(image: torch.Tensor) -> torch.Tensor:
        return torch.cat((image, image * 3 + 2), 1)[..., ::2, ::2, ::2]

    seen = PROGRAM["seen"](extractor, torch.rand(1, 1, 8, 8, 8))
    assert seen.shape == (1, 2, 8, 8, 8)
    torch.testing.assert_close(seen, F.instance_norm(seen), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(seen[:, 0], seen[:, 1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("arguments", "words"), [
    (["--size", "500", "32", "32"], "--size must be at most (197, 233, 189), got (500, 32, 32)"),
    (["--extractor", "dino"], "no extractor 'dino'"),
    (["--extractor", "anatomix", "--weights", "gone.pth"], "weights gone.pth do not exist"),
])
def test_wrong_input_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert PROGRAM["main"](arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
