"""Presets and the command line."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from dropgen_fast import cli
from dropgen_fast.data.augmentation import AugmentationConfig
from dropgen_fast.errors import InputError
from dropgen_fast.presets import load_preset, preset_names

# The table of the method: classes, spacing in mm, patch, window, whether mirroring is allowed.
TABLE = {
    "brats": (4, (1, 1, 1), (128, 128, 128), None, True),
    "amos": (16, (1, 1, 1.5), (192, 192, 128), (-1024, 1024), False),
    "hvsmr": (9, (0.77, 0.72, 0.72), (128, 160, 128), None, True),
    "cow": (14, (0.3, 0.3, 0.6), (192, 160, 128), (-1024, 1024), False),
    "prostate": (2, (0.51, 0.52, 0.125), (256, 256, 64), None, True),
    "pancreas": (2, (1.09, 1.09, 4.4), (256, 256, 64), None, True),
}


@pytest.mark.parametrize("name", sorted(TABLE))
def test_presets_are_the_papers(name: str) -> None:
    preset = load_preset(name)
    assert preset.classes is not None
    assert preset.classes[0] == "background"
    assert len(set(preset.classes)) == len(preset.classes)
    augmentation = preset.augmentation_config()
    assert (len(preset.classes), preset.spacing_mm, preset.patch, preset.intensity_window, augmentation.mirror) == TABLE[name]
    assert dataclasses.replace(augmentation, mirror=True) == AugmentationConfig()


def test_there_are_no_others() -> None:
    assert preset_names() == sorted(TABLE)


@pytest.mark.parametrize(("text", "message"), [
    ("patches: [1, 2, 3]", r"unknown settings \['patches'\]; a preset has"),
    ("patch: [16, 16]", r"patch must be three positive whole numbers, got \(16, 16\)"),
    ("patch: [16, 16, 1.5]", "patch must be three positive whole"),
    ("spacing_mm: [1, 0, 1]", "spacing_mm must be three positive numbers"),
    ("intensity_window: [5, 5]", "intensity_window must be two numbers, low < high"),
    ("classes: [background]", "classes must be at least two names"),
    ("recipe: best", "recipe must be one of dropgen, nnunet, off, got 'best'"),
    ("augmentation: {mirror: maybe}", "augmentation: mirror must be true or false"),
    ("augmentation: {mirrors: false}", r"augmentation has unknown settings \['mirrors'\]"),
    ("augmentation: [1]", "augmentation must be a mapping"),
    ("[1, 2]", "must be a mapping"),
    ("a: [", "not readable YAML"),
])
def test_wrong_presets(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_preset(str(path))


def test_a_preset_says_what_is_on(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("recipe: nnunet\npatch: [40, 192, 160]\naugmentation: {gamma: [0.8, 1.2], elastic_probability: 0.2}\n")
    preset = load_preset(str(path))
    found = preset.augmentation_config(preset.patch)
    assert found == dataclasses.replace(AugmentationConfig.nnunet((40, 192, 160)), gamma=(0.8, 1.2), elastic_probability=0.2)
    assert preset.augmentation_config(recipe="off").elastic_probability == 0.2


def test_a_preset_can_switch_all_augmentation_off(tmp_path: Path) -> None:
    """YAML reads off as false."""
    for text in ("recipe: off", 'recipe: "off"'):
        (tmp_path / "p.yaml").write_text(text)
        assert load_preset(str(tmp_path / "p.yaml")).augmentation_config() == AugmentationConfig.none()


def test_absent_presets() -> None:
    with pytest.raises(InputError, match="no preset 'liver'; there are amos, brats"):
        load_preset("liver")
    with pytest.raises(InputError, match=r"gone.yaml does not exist"):
        load_preset("gone.yaml")


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_is_a_program(command: str) -> None:
    program = [sys.executable, "-m", f"dropgen_fast.{command}", "--help"]
    told = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    assert f"dropgen-fast {command}" in told
    if command == "evaluate":  # by the other way too; one whose start takes little time
        other = [sys.executable, "-m", "dropgen_fast", command, "--help"]
        assert subprocess.run(other, capture_output=True, text=True, check=True).stdout == told


def test_no_command_waits_for_monai_to_say_what_it_takes() -> None:
    """It takes longer to import than all else; the bench and nothing else has it at the top."""
    imports = "".join(f"import dropgen_fast.{command}\n" for command in sorted(cli.COMMANDS) if command != "bench")
    program = f"import sys\n{imports}print('monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"


def test_command_line_names_what_it_has(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["dropgen-fast"])
    assert cli.main() == 0
    told = capsys.readouterr().out
    assert all(name in told for name in cli.COMMANDS)
    monkeypatch.setattr(sys, "argv", ["dropgen-fast", "trian"])
    assert cli.main() == 2
    assert "no command 'trian'; the commands are prepare, train" in capsys.readouterr().err
