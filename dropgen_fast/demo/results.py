"""What the demonstration found: the numbers of both methods by domain and tissue, as a dictionary, a table, a sentence."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from dropgen_fast.demo.cohort import CLASSES, DOMAINS, SOURCE, TARGETS, domain_of
from dropgen_fast.errors import InputError
from dropgen_fast.evaluate import PER_CASE, Score, mean_foreground_dice, read_scores

METHODS = {"erm": "ERM", "dropgen": "DropGen"}
PACKAGES = ("dropgen_fast", "torch", "triton", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "monai", "numpy", "scipy",
            "nibabel", "nilearn")

Scores = Mapping[str, Sequence[Score]]
"""By method."""


def load_scores(out: Path) -> dict[str, list[Score]]:
    """The scores that `evaluate` wrote for each method."""
    return {method: read_scores(out / method / "evaluation" / PER_CASE) for method in METHODS}


def of_domain(scores: Sequence[Score], *domains: str) -> list[Score]:
    """The scores of the cases of some domains."""
    return [s for s in scores if domain_of(s.case) in domains]


def collect(scores: Scores) -> dict[str, Any]:
    """Mean foreground Dice by source and target, by domain and by tissue, and HD95, each {"erm": x, "dropgen": y}.

    The target is the mean over the cases of all domains but the source, which all have as many cases.
    """
    def dice(*domains: str) -> dict[str, float]:
        return {method: _mean_dice(of_domain(scores[method], *domains), domains) for method in METHODS}

    def tissue(domain: str, name: str) -> dict[str, float]:
        return {method: _mean_dice([s for s in of_domain(scores[method], domain) if s.class_name == name], (domain, name))
                for method in METHODS}

    def hd95(domain: str) -> dict[str, float | None]:
        """Over the cases and tissues that have one: a tissue that a method never finds has none."""
        found = {method: [s.hd95_mm for s in of_domain(scores[method], domain) if s.hd95_mm is not None] for method in METHODS}
        return {method: statistics.fmean(values) if values else None for method, values in found.items()}

    return {
        "source": dice(SOURCE),
        "target": dice(*TARGETS),
        "per_domain": {domain: dice(domain) for domain in DOMAINS},
        "per_tissue": {domain: {name: tissue(domain, name) for name in CLASSES[1:]} for domain in DOMAINS},
        "hd95_mm": {domain: hd95(domain) for domain in DOMAINS},
        "hd95_undefined": {domain: {method: sum(s.hd95_undefined for s in of_domain(scores[method], domain))
                                    for method in METHODS} for domain in DOMAINS},
        "cases": {domain: len({s.case for s in of_domain(scores["erm"], domain)}) for domain in DOMAINS},
    }


def environment() -> dict[str, str]:
    """Versions and machine that the numbers were made with."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "cpu_count": str(os.cpu_count())}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # one of the two DALI builds, or a package that runs from its source folder
    return found


def variant_name(mode: str, p: Sequence[float]) -> str:
    """What kind of DropGen was trained, in words."""
    rates = [f"{100 * rate:g} %" for rate in p]
    if mode == "stream":
        dropped = f"image dropped {rates[0]}, features " + (f"dropped {rates[1]}" if len(p) == 2 and p[1] > 0 else "never")
        return f"stream dropout ({dropped}), MIND features; a variant of the paper's channel dropout"
    rate = f"p = {p[0]:g}" if len(p) == 1 else f"p = {p[0]:g} for the image, {p[1]:g} for the features"
    return f"channel dropout as in the paper ({rate}), MIND features"


def sentence(results: Mapping[str, Any]) -> str:
    """What DropGen costs on the source and gains on the targets, as the numbers say, either way."""
    def part(key: str, where: str) -> str:
        erm, dropgen = results[key]["erm"], results[key]["dropgen"]
        change = dropgen - erm
        against = f"({dropgen:.2f} against ERM's {erm:.2f})"
        if abs(change) < 0.005:
            return f"makes no difference {where} {against}"
        return f"{'gains' if change > 0 else 'costs'} {abs(change):.2f} Dice {where} {against}"

    return (f"DropGen {part('source', 'on the source contrast')} and {part('target', 'on contrasts never seen in training')}.")


def table(results: Mapping[str, Any]) -> str:
    """The results for a terminal: a row per domain, Dice of each method over all tissues, and of both for each tissue."""
    rows = [("mean Dice", *METHODS.values(), *(f"{name} ({' / '.join(METHODS.values())})" for name in CLASSES[1:]))]
    for domain, title in DOMAINS.items():
        tissues = results["per_tissue"][domain]
        rows.append((title.title, *(f"{results['per_domain'][domain][m]:.3f}" for m in METHODS),
                     *(" / ".join(f"{tissues[name][m]:.3f}" for m in METHODS) for name in CLASSES[1:])))
    rows.append(("all targets", *(f"{results['target'][m]:.3f}" for m in METHODS), *[""] * len(CLASSES[1:])))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
             for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def _mean_dice(scores: list[Score], what: Sequence[str]) -> float:
    mean = mean_foreground_dice(scores)
    if mean is None:
        raise InputError(f"the evaluation has no score for {' '.join(what)}; run the demo again with --overwrite")
    return mean
