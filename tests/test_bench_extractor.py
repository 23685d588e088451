"""The suite "extractor": its ways compute the same, its rows agree, wrong options are told. Tiny sizes; no speed is asserted."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from dropgen_fast.bench import extractor as suite
from dropgen_fast.bench import measure
from dropgen_fast.bench.measure import Meter
from dropgen_fast.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that takes no time, and no compiler."""
    monkeypatch.setattr(measure, "COPY_BYTES", {"cpu": 1 << 20, "cuda": 1 << 20})
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)


def test_the_ways_compute_the_same() -> None:
    image = torch.rand(1, 1, 64, 64, 64, generator=torch.Generator().manual_seed(0))
    for name in ("anatomix", "mind"):
        ours, eager, _ = (way(image) for way in suite.ways(name, CPU).values())
        assert (ours - eager).square().mean().sqrt() <= 1e-3 * eager.square().mean().sqrt()


def test_rows_agree_with_the_times() -> None:
    result = suite.run(suite.ExtractorConfig(size=(32, 32, 32), precision="bf16"), Meter(CPU, rounds=1), 0.1)
    rows = suite.values(result)
    assert set(rows) == {f"extractor.{name}.{what}" for name in ("anatomix", "mind")
                         for what in ("ours.ms", "eager.ms", "compile.ms", "x_plain", "x_eager")}
    for name in ("anatomix", "mind"):
        for row, way in (("x_plain", "compile"), ("x_eager", "eager")):
            ratio, ms = rows[f"extractor.{name}.{row}"][0], rows[f"extractor.{name}.{way}.ms"][0]
            assert ratio.median == pytest.approx(ms.median / rows[f"extractor.{name}.ours.ms"][0].median)
    assert "1 images of 32 × 32 × 32, bf16, 1 rounds" in suite.screen(result)
    assert imread(io.BytesIO(suite.picture(result))).std() > 0.05


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(module: Any, **_: Any) -> Any:
        def way(image: Any) -> Any:
            raise RuntimeError("no working\ncompiler here")

        return way

    monkeypatch.setattr(torch, "compile", no_compiler)
    result = suite.run(suite.ExtractorConfig(names=("mind",), size=(8, 8, 8)), Meter(CPU, rounds=1), 0.1)
    assert "mind.compile could not be run: no working compiler here" in suite.screen(result)
    assert "extractor.mind.x_plain" not in suite.values(result)


@pytest.mark.parametrize(("options", "message"), [
    ({"names": ("dino",)}, "--extractor.names must be of anatomix, anatomix-dev, mind, got dino"),
    ({"names": ()}, "--extractor.names must be of"),
    ({"precision": "fp8"}, "--extractor.precision must be bf16 or fp32, got 'fp8'"),
    ({"size": (96, 90, 96)}, "sizes must be multiples of 16"),
])
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        suite.run(suite.ExtractorConfig(**options), Meter(CPU, rounds=1), 0.1)
