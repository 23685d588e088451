"""Where a run's settings come from, how they are told, and what each preset makes of a store."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from nifti_factory import write_cohort

from dropgen_fast import prepare, train
from dropgen_fast.cli import run
from dropgen_fast.config import TrainConfig, choose_subjects, flat, plain
from dropgen_fast.data.augmentation import AugmentationConfig
from dropgen_fast.data.store import Store
from dropgen_fast.errors import InputError
from dropgen_fast.presets import load_preset, preset_names
from dropgen_fast.presets.generic import PATCH_VOXELS, generic_preset
from dropgen_fast.settings import parse, resolve


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared without a preset; a class of it is a side."""
    folder = tmp_path_factory.mktemp("cohort")
    cohort = write_cohort(folder / "nifti", {"train": 3, "val": 1}, shape=(20, 90, 18), classes=2)
    content = json.loads((cohort / "dataset.json").read_text())
    (cohort / "dataset.json").write_text(json.dumps({**content, "labels": {"background": 0, "left kidney": 1}}))
    assert prepare.main(["--source", str(cohort), "--store", str(folder / "store"), "--workers", "1"]) == 0
    return folder / "store"


def arguments(store: Path, *more: str) -> list[str]:
    return ["--store", str(store), "--out", "run", *more]


def file_of(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "settings.yaml").write_text(text)
    return ["--config", str(tmp_path / "settings.yaml")]


def test_each_layer_goes_before_the_one_below(store: Path, tmp_path: Path) -> None:
    file = file_of(tmp_path, """
        steps: 1000
        learning_rate: 1e-3
        model: {method: erm, network_options: {base_channels: 8, strides: [1, 2]}}
        fusion.p: [0.5, 0.25]
        augmentation: {gamma: [0.9, 1.1], mirror: true}
        compile: false
        wandb: null
    """)
    command = arguments(store, *file, "--preset", "amos", "--learning-rate=2e-3", "--augmentation.no-like-monai",
                        "--ema_decay", "0.9")
    found = resolve(command)
    config, source = found.config, found.sources
    assert (config.steps, source["steps"]) == (1000, str(tmp_path / "settings.yaml"))
    assert (config.learning_rate, source["learning_rate"]) == (2e-3, "command line")
    assert (config.ema_decay, source["ema_decay"]) == (0.9, "command line")
    assert (config.batch_size, source["batch_size"]) == (4, "default")
    assert (config.patch, source["patch"]) == ((192, 192, 128), "preset amos")
    assert (config.model.method, source["model.method"]) == ("erm", str(tmp_path / "settings.yaml"))
    assert config.model.network_options == ("base_channels=8", "strides=[1, 2]")
    assert config.model.fusion.p == (0.5, 0.25)
    assert (config.compile, config.wandb) == (False, None)
    assert config.augmentation is not None
    assert config.augmentation.gamma == (0.9, 1.1)
    assert config.augmentation.mirror  # amos says no, the file yes
    assert source["augmentation.mirror"] == source["augmentation.gamma"] == str(tmp_path / "settings.yaml")
    assert source["augmentation.like_monai"] == "command line"
    assert source["augmentation.noise_std"] == "default"
    assert set(source) == set(flat(plain(config)))


def test_the_preset_and_the_recipe_decide_the_augmentation(store: Path, tmp_path: Path) -> None:
    def augmentation(*more: str) -> AugmentationConfig:
        found = parse(arguments(store, *more)).augmentation
        assert found is not None
        return found

    assert augmentation("--preset", "brats") == AugmentationConfig()
    assert augmentation("--preset", "amos") == AugmentationConfig(mirror=False)
    assert augmentation("--preset", "amos", "--augmentation.mirror").mirror is True
    flat_patch = ["--patch", "16", "64", "64", "--augmentation.gamma", "0.9", "1.1"]
    wanted = dataclasses.replace(AugmentationConfig.nnunet((16, 64, 64)), mirror=False, gamma=(0.9, 1.1))
    assert augmentation("--preset", "amos", "--recipe", "nnunet", *flat_patch) == wanted
    in_a_file = file_of(tmp_path, "preset: amos\nrecipe: nnunet\npatch: [16, 64, 64]\naugmentation.gamma: [0.9, 1.1]\n")
    assert augmentation(*in_a_file) == wanted
    assert augmentation(*file_of(tmp_path, "recipe: off\n"), "--preset", "brats") == AugmentationConfig.none()
    off = resolve(arguments(store, "--preset", "brats", "--recipe", "off"))
    assert off.sources["augmentation.gamma_probability"] == "recipe off"
    config = dataclasses.replace(parse(arguments(store, "--preset", "amos")), augmentation=None, patch=None,
                                 out=tmp_path / "run", device="cpu", model=dataclasses.replace(
                                     parse(arguments(store)).model, method="erm", network_options=("base_channels=2",)))
    assert train.Trainer(config).config.augmentation == AugmentationConfig(mirror=False)  # one made in code, too


def test_without_a_preset_the_store_decides(store: Path) -> None:
    """Volumes of 20 × 90 × 18 voxels: padded to what the network takes; a side is a class, so nothing is mirrored."""
    found = resolve(arguments(store))
    assert (found.config.patch, found.sources["patch"]) == ((64, 96, 64), "derived from the store")
    assert found.config.augmentation == AugmentationConfig(mirror=False)
    assert found.sources["augmentation.mirror"] == "derived from the store"
    assert resolve(arguments(store, "--patch", "32", "32", "32")).sources["patch"] == "command line"


@pytest.mark.parametrize(("shapes", "spacing_mm", "patch"), [
    ([(240, 240, 155)] * 3, (1, 1, 1), (128, 128, 128)),
    ([(330, 330, 54)], (1.09, 1.09, 4.4), (160, 192, 64)),
    ([(50, 60, 70), (10, 10, 10), (55, 64, 65)], (1, 1, 1), (64, 64, 96)),
    ([(512, 512, 40)], (0.5, 0.5, 5), (160, 192, 64)),
])
def test_the_generic_patch_is_as_near_to_a_cube_as_the_volumes_allow(
    shapes: list[tuple[int, int, int]], spacing_mm: tuple[float, float, float], patch: tuple[int, int, int],
) -> None:
    found = generic_preset(("background", "cleft"), spacing_mm, shapes)
    assert found.patch == patch
    assert patch[0] * patch[1] * patch[2] <= PATCH_VOXELS
    assert found.augmentation == {}


def test_what_is_printed_is_a_file_that_gives_the_same(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = arguments(store, "--preset", "hvsmr", "--fusion.p", "0.5", "--network-options", "base_channels=8",
                        "--method", "erm")
    assert train.main([*command, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^patch: \[128, 160, 128\] +# preset hvsmr$", printed, re.MULTILINE)
    assert re.search(r"^    p: \[0.5\] +# command line$", printed, re.MULTILINE)
    assert re.search(r"^steps: 250000 +# default$", printed, re.MULTILINE)
    assert yaml.safe_load(printed) == plain(parse(command))
    (tmp_path / "printed.yaml").write_text(printed)
    assert parse(["--config", str(tmp_path / "printed.yaml")]) == parse(command)
    assert not (tmp_path / "run").exists()
    assert train.main(["--preset", "brats", "--print-config"]) == 0  # to look at, before there is a store
    assert re.search(r"^store: '?\?'? +# must be given$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(("words", "message"), [
    (["--stesp", "5"], "there is no setting --stesp; did you mean --steps?"),
    (["--fusion.mode", "channel"], "there is no setting --fusion.mode; did you mean --fusion.p?"),
    (["--augmentation.no-miror"], "did you mean --augmentation.no-mirror?"),
    (["--batchsize=2"], "there is no setting --batchsize; did you mean --batch-size?"),
    (["--model.method", "erm"], "did you mean --method?"),
    (["--xqzw"], "there is no setting --xqzw; dropgen-fast train --help lists them"),
])
def test_an_unknown_word_is_one_line_with_the_nearest(
    store: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str,
) -> None:
    assert run("train", train.main, arguments(store, *words)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("text", "message"), [
    ("stesp: 5", "has no setting to give as stesp; did you mean steps?"),
    ("fusion: {q: 0.5}", "has no setting to give as model.fusion.q; did you mean"),
    ("model: {metod: erm}", "has no setting to give as model.metod; did you mean model.method?"),
    ("augmentation: {miror: false}", "did you mean augmentation.mirror?"),
    ("steps: many", "--steps"),
    ("steps: 0", "steps must be at least 1"),
    ("patch: [1, 2]", "--patch"),
    ("[1, 2]", "must hold a mapping of settings, got list"),
    ("a: [", "is not readable YAML"),
    ("preset: heart", "no preset 'heart'"),
])
def test_a_wrong_file_is_one_line(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str,
) -> None:
    assert run("train", train.main, arguments(store, *file_of(tmp_path, text))) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_file_that_is_not_there(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", train.main, arguments(store, "--config", "gone.yaml")) == 2
    assert "--config gone.yaml cannot be read: No such file" in capsys.readouterr().err


def test_few_shot_draws_subjects() -> None:
    cases = [f"sub-{name}_ses-{k}" for name in ("01", "02", "03", "04") for k in (1, 2)] + ["heart_7"]
    pattern = TrainConfig(store=Path(), out=Path()).subject_pattern
    draws = {count: choose_subjects(cases, count, 5, pattern) for count in range(1, 6)}
    assert draws[5] == sorted(cases)
    for count in range(1, 5):
        assert set(draws[count]) < set(draws[count + 1])  # a smaller draw is part of a larger one
        subjects = {case.split("_")[0] for case in draws[count]}
        assert len(subjects) == count
        assert set(draws[count]) == {case for case in cases if case.split("_")[0] in subjects}  # subjects are whole
    assert len({tuple(choose_subjects(cases, 1, seed, pattern)) for seed in range(30)}) == 5  # every subject has its turn
    with pytest.raises(InputError, match="num_subjects is 6, and the store has 5 training subjects"):
        choose_subjects(cases, 6, 0, pattern)


def test_few_shot_trains_on_the_subjects_drawn(store: Path, tmp_path: Path) -> None:
    config = parse(["--store", str(store), "--out", str(tmp_path / "run"), "--num-subjects", "2", "--subject-pattern", "_[0-9]+",
                    "--patch", "16", "16", "16", "--network-options", "base_channels=2", "downsamplings=2", "--device", "cpu",
                    "--batch-size", "1", "--method", "erm"])
    trainer = train.Trainer(config)
    wanted = choose_subjects([case.id for case in Store.open(store).cases("train")], 2, 0, "_[0-9]+")
    assert {next(trainer.data).cases[0] for _ in range(8)} == set(wanted)


def test_a_wrong_pattern(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", train.main, arguments(store, "--subject-pattern", "(")) == 2
    assert "subject_pattern '(' is no regular expression" in capsys.readouterr().err


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_trains(name: str, tmp_path: Path) -> None:
    """Two steps on tiny random volumes of its spacing and class count, through the store; the configuration is the preset's."""
    preset = load_preset(name)
    assert preset.classes is not None
    assert preset.spacing_mm is not None
    cohort = write_cohort(tmp_path / "cohort", {"train": 2, "val": 1}, shape=(20, 18, 22), classes=len(preset.classes),
                          spacing_mm=preset.spacing_mm, dataset_json=False)
    assert prepare.main(["--source", str(cohort), "--store", str(tmp_path / "store"), "--workers", "1", "--preset", name]) == 0
    prepared = Store.open(tmp_path / "store")
    assert prepared.spacing_mm == pytest.approx(preset.spacing_mm)
    command = ["--store", str(tmp_path / "store"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    resolved = resolve(command)
    assert (resolved.config.patch, resolved.sources["patch"]) == (preset.patch, f"preset {name}")
    assert resolved.config.augmentation == preset.augmentation_config(preset.patch)
    assert train.main([*command, "--patch", "16", "16", "16", "--network-options", "base_channels=4", "downsamplings=2",
                       "--batch-size", "2", "--steps", "2", "--log-every", "1", "--validate-every", "2"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("loss") is not None] == [1, 2]
    assert list(rows[-1]["per_class"]) == list(preset.classes[1:])
    settings = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert settings["augmentation"]["mirror"] == resolved.config.augmentation.mirror
