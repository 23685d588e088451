"""Where the value of each of a run's settings comes from: defaults < preset < file < command line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from dropgen_fast.config import TrainConfig, flat, plain
from dropgen_fast.data.augmentation import AugmentationConfig
from dropgen_fast.data.store import is_store, read_index
from dropgen_fast.errors import InputError
from dropgen_fast.presets import Preset, load_preset
from dropgen_fast.presets.generic import generic_preset

FLATTENED = "model."
"""Settings of the model have no prefix on the command line, and need none in a file."""
ASKED = ("--help", "-h", "--config", "--print-config", "--no-print-config")
"""Words of the command line that are no setting."""
UNKNOWN = Path("?")
"""Stands for a setting that must be given and was not, where settings are only printed."""
DERIVED = "derived from the store"
SIMILAR = 0.5
"""How alike, by difflib, a name must be to be suggested."""


@dataclass(frozen=True)
class TrainCommand:
    """Train a segmentation network on a prepared store: DropGen, or ERM to compare with."""

    settings: Annotated[TrainConfig, tyro.conf.arg(name="")]
    config: Path | None = None
    """YAML file with settings, such as config.yaml of an earlier run; the command line goes before it, it before the preset."""
    print_config: bool = False
    """Print every setting and where its value comes from, as a file for --config, and train nothing."""


@dataclass(frozen=True)
class Resolved:
    """The settings, and by dotted name where each comes from."""

    config: TrainConfig
    sources: Mapping[str, str]
    print_config: bool = False

    def as_yaml(self) -> str:
        """The settings as YAML, the source of each behind it."""
        return "".join(_yaml_lines(plain(self.config), self.sources))


def parse(argv: Sequence[str]) -> TrainConfig:
    """The settings of a command line."""
    return resolve(argv).config


def resolve(argv: Sequence[str]) -> Resolved:
    """The settings of a command line, and where they come from.

    Raises:
        InputError: a setting that does not exist (the nearest is named), in the file or on the command line; a file or a preset
            that cannot be read.
    """
    basis = _basis(argv)
    file = read_file(basis.config) if basis.config is not None else {}
    store = basis.store or (Path(str(file["store"])) if file.get("store") else UNKNOWN)
    preset, decided = preset_of(basis.preset or file.get("preset"), store)
    base = _base(basis, file, preset)
    given = _check_words(argv, base)
    command = TrainCommand(_with_file(base, basis.config, file), basis.config)
    if "--print-config" in argv:
        command = dataclasses.replace(command, settings=_placed(command.settings))
    command = tyro.cli(TrainCommand, args=argv, prog="dropgen-fast train", default=command)
    config = command.settings
    recipe = f"recipe {config.recipe}" if config.recipe is not None else decided["recipe"]
    usual = flat({"augmentation": plain(AugmentationConfig())})
    sources = {}
    for name, value in flat(plain(config)).items():
        if name in given:
            sources[name] = "command line"
        elif name in file:
            sources[name] = str(basis.config)
        elif name in decided and name != "recipe":
            sources[name] = decided[name]
        elif value == str(UNKNOWN):
            sources[name] = "must be given"
        elif name in usual and value != usual[name]:
            sources[name] = recipe
        else:
            sources[name] = "default"
    return Resolved(config, sources, command.print_config)


def preset_of(name: str | None, store: Path) -> tuple[Preset, dict[str, str]]:
    """The preset of that name, else of that store, completed by what the store's volumes say; and what each setting is from.

    Raises:
        InputError: no such preset.
    """
    index = read_index(store) if is_store(store) else None
    named = name if name is not None else index.preset if index is not None else None
    preset, called = load_preset(named), f"preset {named}"
    decided = {"recipe": called, **{f"augmentation.{setting}": called for setting in preset.augmentation}}
    if preset.patch is not None:
        return preset, decided | {"patch": called}
    if index is None or not index.cases["train"]:
        return preset, decided
    shapes = [json.loads((store / entry.folder / "case.json").read_text())["prepared_shape"]
              for entry in index.cases["train"].values()]
    generic = generic_preset(index.classes, index.spacing_mm, shapes)
    if named is not None:
        return dataclasses.replace(preset, patch=generic.patch), decided | {"patch": DERIVED}
    return generic, dict.fromkeys(["recipe", "patch", *(f"augmentation.{setting}" for setting in generic.augmentation)], DERIVED)


def read_file(path: Path) -> dict[str, Any]:
    """The settings in a YAML file by dotted name; nested mappings and dotted names both do.

    Raises:
        InputError: no such file, not YAML, or a setting that does not exist.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"--config {path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path} is not readable YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"--config {path} must hold a mapping of settings, got {type(content).__name__}")
    known = set(_template())
    groups = {name.rpartition(".")[0] for name in known} - {""}
    found: dict[str, Any] = {}

    def collect(values: Mapping[Any, Any], prefix: str) -> None:
        for key, value in values.items():
            name = _full_name(f"{prefix}{key}".replace("-", "_"), known | groups)
            if isinstance(value, dict) and name in groups:
                collect(value, name + ".")
            elif name in known:
                found[name] = value
            else:
                raise InputError(f"--config {path} has no setting to give as {prefix}{key}"
                                 + _nearest(name, [*known, *(_short(k) for k in known)]))

    collect(content, "")
    return found


@dataclass(frozen=True)
class Basis:
    """What decides the defaults of the other settings."""

    store: Path | None = None
    preset: str | None = None
    recipe: Literal["dropgen", "nnunet", "off"] | None = None
    patch: tuple[int, int, int] | None = None
    config: Path | None = None


def _basis(argv: Sequence[str]) -> Basis:
    """What the command line says of it; nothing where one of the five is wrong: the whole command line is told about it."""
    plainly = [word for word in argv if word not in ("-h", "--help")]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            basis: Basis = tyro.cli(Basis, args=plainly, return_unknown_args=True)[0]
    except SystemExit:
        return Basis()
    return basis


def _base(basis: Basis, file: Mapping[str, Any], preset: Preset) -> TrainConfig:
    """The settings of defaults and preset."""
    patch = basis.patch or file.get("patch") or preset.patch
    recipe = basis.recipe or ("off" if file.get("recipe") is False else file.get("recipe"))  # YAML takes off for false
    augmentation = preset.augmentation_config(patch, recipe)
    return TrainConfig(store=tyro.MISSING, out=tyro.MISSING, patch=preset.patch, augmentation=augmentation)


def _with_file(base: TrainConfig, path: Path | None, file: Mapping[str, Any]) -> TrainConfig:
    """The settings with those of a file, which are read as the command line's are."""
    if not file:
        return base
    words = [word for name, value in file.items() for word in _words(name, value, flat(plain(base))[name])]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(complaint):
            read: TrainConfig = tyro.cli(TrainConfig, args=words, default=_placed(base))
    except SystemExit as error:
        told = " ".join(word for word in complaint.getvalue().split() if not set(word) & set("╭╮╰╯│─"))
        raise InputError(f"--config {path}: {told[:300]}") from error
    return dataclasses.replace(read, store=tyro.MISSING if read.store == UNKNOWN else read.store,
                               out=tyro.MISSING if read.out == UNKNOWN else read.out)


def _placed(config: TrainConfig) -> TrainConfig:
    """The settings with a stand-in for the folders that were not given."""
    return dataclasses.replace(config, store=UNKNOWN if config.store is tyro.MISSING else config.store,
                               out=UNKNOWN if config.out is tyro.MISSING else config.out)


def _words(name: str, value: Any, default: Any) -> list[str]:
    """A setting of a file as words of a command line."""
    flag = _flag(name)
    if isinstance(default, bool) and isinstance(value, bool):
        group, _, last = flag.removeprefix("--").rpartition(".")
        return [flag if value else f"--{group}{'.' if group else ''}no-{last}"]
    if isinstance(value, dict):  # keyword arguments, which are name=value on the command line
        return [flag, *(f"{key}={yaml.safe_dump(v, default_flow_style=True).split(chr(10))[0]}" for key, v in value.items())]
    if name == "recipe" and value is False:
        value = "off"
    return [flag, *map(str, value)] if isinstance(value, list) else [flag, str(value)]


def _check_words(argv: Sequence[str], base: TrainConfig) -> set[str]:
    """The settings that a command line gives; raises InputError for one that does not exist, naming the nearest."""
    by_flag: dict[str, str] = {}
    for name, value in flat(plain(base)).items():
        flag = _flag(name)
        by_flag[flag] = name
        if isinstance(value, bool):
            group, _, last = flag.removeprefix("--").rpartition(".")
            by_flag[f"--{group}{'.' if group else ''}no-{last}"] = name
    given = set()
    for word in argv:
        flag = word.partition("=")[0].replace("_", "-")
        if flag in by_flag:
            given.add(by_flag[flag])
        elif flag.startswith("--") and flag not in ASKED and not flag.startswith("--tyro-"):
            raise InputError(f"there is no setting {word.partition('=')[0]}" + _nearest(flag, [*by_flag, *ASKED]))
    return given


def _template() -> dict[str, Any]:
    """Every setting there is, by dotted name."""
    return flat(plain(TrainConfig(store=UNKNOWN, out=UNKNOWN, augmentation=AugmentationConfig())))


def _flag(name: str) -> str:
    return "--" + _short(name).replace("_", "-")


def _short(name: str) -> str:
    return name.removeprefix(FLATTENED)


def _full_name(name: str, known: Iterable[str]) -> str:
    return FLATTENED + name if name not in known and FLATTENED + name in known else name


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, SIMILAR)
    return f"; did you mean {close[0]}?" if close else "; dropgen-fast train --help lists them"


def _yaml_lines(settings: Mapping[str, Any], sources: Mapping[str, str], prefix: str = "", depth: int = 0) -> list[str]:
    lines = []
    for key, value in settings.items():
        if isinstance(value, dict):
            lines += [f"{'  ' * depth}{key}:\n", *_yaml_lines(value, sources, f"{prefix}{key}.", depth + 1)]
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=10_000).split("\n")[0]
            lines.append(f"{'  ' * depth + f'{key}: {text}':<56}  # {sources[prefix + key]}\n")
    return lines
