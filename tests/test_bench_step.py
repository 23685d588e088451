"""The suite "step": what it compares, its rows, its options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dropgen_fast.bench import run as bench
from dropgen_fast.bench import step
from dropgen_fast.bench.measure import Spread, Times
from dropgen_fast.cli import run
from dropgen_fast.step import PARTS

TINY = ["--suite", "step", "--quick", "--device", "cpu", "--rounds", "2", "--step.patch", "16", "16", "16"]


def test_a_run_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows_file, picture = tmp_path / "rows.jsonl", tmp_path / "step.png"
    assert bench.main([*TINY, "--step.variants", "plain", "cached", "--json", str(rows_file), "--picture", str(picture)]) == 0
    rows = {row["name"]: row for row in map(json.loads, rows_file.read_text().splitlines())}
    assert {"step.dropgen_over_erm", "step.dropgen_over_erm.stride2", "step.x_recipe"} <= set(rows)
    assert {"step.dropgen_over_erm.plain", "step.dropgen_over_erm.cached"} <= set(rows)
    ratio = rows["step.dropgen_over_erm"]
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert (ratio["unit"], ratio["rounds"], ratio["case"]["patch"]) == ("ratio", 2, [16, 16, 16])
    assert isinstance(ratio["claim"], bool)
    assert {"device", "commit", "torch", "threads"} <= set(ratio)
    assert rows["step.ms.erm"]["unit"] == "ms"
    parts = [rows[f"step.ms.dropgen.{part}"]["value"] for part in PARTS]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(rows["step.ms.dropgen"]["value"], rel=0.5)  # medians of parts are not parts of a median
    assert "dropgen_over_erm" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_way_trains_and_erm_sees_the_image_alone() -> None:
    config = step.resolved(step.StepConfig(patch=(16, 16, 16), network_options=("base_channels=4", "downsamplings=2")),
                           torch.device("cpu"))
    cpu, marks = torch.device("cpu"), []
    batches = step.ready_batches(config, cpu)
    ways = {"erm": step._ours(config, cpu, "erm", 1, batches), "dropgen": step._ours(config, cpu, "dropgen", 2, batches),
            "recipe": step._recipe(config, cpu, batches, compiled=False)}
    for name, way in ways.items():
        marks.clear()
        way(0, 0, lambda: marks.append(None))
        assert len(marks) == (2 if name == "recipe" else 1 + len(PARTS))
    training = step.training_step(config, cpu, "dropgen", 2)
    before = [p.clone() for p in training.model.network.parameters()]
    losses = [float(training([batches[0]], number)) for number in range(30)]
    assert losses[-1] < losses[0]
    assert not any(torch.equal(p, old) for p, old in zip(training.model.network.parameters(), before, strict=True))
    image = batches[0][0]
    models = {method: step._model(config, torch.device("cpu"), method, 1)[0] for method in ("erm", "dropgen")}
    assert models["erm"].extractor is None
    assert models["dropgen"].fused(image).shape[1] == 13


@pytest.mark.parametrize("name", ["mind", "anatomix"])
def test_variants_train_as_the_step_does(name: str) -> None:
    """The same draw, the same loss but for the extractor's rounding; cached, the extractor is not called."""
    cpu = torch.device("cpu")
    options = ("base_channels=4", "downsamplings=2")
    config = step.resolved(step.StepConfig(patch=(32, 32, 32), extractor=name, network_options=options), cpu)
    (image, label), *_ = step.ready_batches(config, cpu)
    losses = []
    for variant in (None, "plain", "cached"):
        training = step.training_step(config, cpu, "dropgen", 1, plain=variant == "plain")
        batch = (image, label)
        if variant == "cached":
            batch = (image, label, step._features(training.model, image))  # type: ignore[assignment]
            training.model.extractor = None
        torch.manual_seed(1)
        losses.append(float(training([batch], 0)))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-4)


def test_ratios_are_taken_within_rounds() -> None:
    """The second round is ten times as slow for all: no ratio changes."""
    config = step.StepConfig(strides=(1, 2))
    times = Times({name: [[0, ms / 2, ms], [0, 5 * ms, 10 * ms]] for name, ms in
                   {"erm": 10.0, "dropgen": 15.0, "dropgen_stride2": 11.0, "recipe": 45.0, "recipe_compile": 30.0}.items()})
    ratios = step._ratios(config, times)
    assert {name: spread.median for name, spread in ratios.items()} == pytest.approx(
        {"dropgen_over_erm": 1.5, "dropgen_over_erm.stride2": 1.1, "x_recipe": 3.0, "x_recipe_compile": 2.0})
    assert all(spread.low == pytest.approx(spread.high) for spread in ratios.values())


def test_a_ratio_that_its_spread_does_not_allow_is_not_printed() -> None:
    def result(spread: Spread) -> str:
        return step.screen(step.StepResult(step.StepConfig(patch=(8, 8, 8)), {}, {}, {"x_recipe": spread}, {}, 5))

    assert "2.00" in result(Spread(2.0, 1.9, 2.1))
    assert "1.30" not in result(Spread(1.3, 1.05, 1.6))
    assert "unclear" in result(Spread(1.3, 1.05, 1.6))
    assert "≈ 1" in result(Spread(1.0, 0.9, 1.1))


@pytest.mark.parametrize(("words", "message"), [
    (["--step.precision", "fp8"], "--step.precision must be bf16 or fp32, got 'fp8'"),
    (["--step.classes", "1"], "--step.classes must be at least 2"),
    (["--step.strides", "2"], "--step.strides must hold 1"),
    (["--step.patch", "20", "16", "16"], "cannot take a patch"),
    (["--step.extractor", "dino"], "no extractor 'dino'"),
    (["--step.extractor", "torch.nn:Identity", "--step.variants", "plain"], "torch.nn:Identity has no plain definition"),
])
def test_wrong_options_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", bench.main, [*TINY, *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dropgen-fast bench: error: ")
    assert message in error
