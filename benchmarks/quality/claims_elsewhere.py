"""What other programs' records say of the claims: a long tail, correlated images, and settings found without labels."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

TUNED = {
    "turntable": "turntable turntable,objects=270,size=24 turntable:test,size=24,test_objects=200",
    "cifar10-lt": ("cifar10-lt DATA/cifar10-jpeg/train DATA/cifar10-jpeg/test --imbalance 100 --most 2200"),
}  # collections and sources of what is in tune.json; its options are there


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half of its interval of 95 %; infinite for a single one."""
    if len(values) < 2:
        return statistics.mean(values), math.inf
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(half)


def elsewhere(name: str, results: Path) -> list[str]:
    """A sentence of another record about this claim; nothing where there is none."""
    sentences = {"long-tail": long_tail, "correlated": correlated}
    text = sentences[name](results) if name in sentences else ""
    return [text, ""] if text else []


def long_tail(results: Path) -> str:
    """What CLD adds to each method in the long trainings on a long tail."""
    rows = {(row["method"], row["cld"]): row for row in _of(results / "cifar10-lt.json", "rows")}
    added = {
        method: (row["knn"]["mean"] - rows[method, "off"]["knn"]["mean"], row["seeds"])
        for (method, cld), row in rows.items() if cld == "on" and (method, "off") in rows
    }  # fmt: skip
    if not added:
        return ""
    figures = ", ".join(f"{method} {difference:+.1f}" for method, (difference, _) in sorted(added.items()))
    seeds = min(count for _, count in added.values())
    return (
        f"Longer trainings, of 30 epochs at imbalance 100 and {seeds} seeds each (`benchmarks/quality/paper.py`, "
        f"`benchmarks/results/cifar10-lt.md`): CLD adds, by kNN accuracy of the shared features, {figures}."
    )


def correlated(results: Path) -> str:
    """What CLD adds where images of a batch are much alike, and where they are shuffled."""
    cells = list(_of(results / "correlated.json", "cells", {}).values())
    by_place: dict[tuple[str, str], dict[str, list[float]]] = {}
    for cell in cells:
        by_groups = by_place.setdefault((cell["source"], cell["order"]), {})
        by_groups.setdefault(cell["groups"], []).append(cell["figures"]["knn"])
    figures = [
        f"{statistics.mean(with_cld) - statistics.mean(by_groups['off']):+.1f} on {source}, {order}"
        for (source, order), by_groups in by_place.items()
        if (with_cld := by_groups.get("3/4 of the batch")) and "off" in by_groups
    ]
    if not figures:
        return ""
    seeds = len({cell["seed"] for cell in cells})
    return (
        f"With MoCo, 3 epochs and {'one seed, which decides nothing' if seeds == 1 else f'{seeds} seeds'} "
        "(`benchmarks/quality/correlated.py`, `benchmarks/results/correlated.md`) CLD adds, by kNN accuracy of the "
        f"shared features, {'; '.join(figures)}."
    )


def tuning(results: Path) -> list[str]:
    """The section of the search for settings: `crosslevel tune` and random search against the settings as given."""
    lines = ["## Settings chosen without labels (`crosslevel tune`)", ""]
    cells = list(_of(results / "tune.json", "cells", {}).values())
    sentences, rows = [], []
    for name in sorted({cell["name"] for cell in cells}):
        by_way: dict[str, dict[int, float]] = {}
        for cell in (cell for cell in cells if cell["name"] == name):
            by_way.setdefault(cell["way"], {})[cell["seed"]] = cell["knn"]
        options = next(cell["about"]["options"] for cell in cells if cell["name"] == name)
        lines += [f"`python benchmarks/quality/tune.py {TUNED[name]} -- {' '.join(options)}`", ""]
        for way in ("given", "random", "tune"):
            mean, half = interval(list(by_way[way].values()))
            difference = "-"
            if way != "given":
                added, error = interval([by_way[way][seed] - by_way["given"][seed] for seed in by_way["given"]])
                difference = f"{added:+.2f} ± {error:.2f}"
                better = "better" if added > 0 else "worse"
                verdict = better if abs(added) > error else "not told apart from nothing"
                sentences.append(f"{way} against given on {name}: {difference}, {verdict}.")
            rows.append(f"| {name} | {way} | {len(by_way[way])} | {mean:.2f} ± {half:.2f} | {difference} |")
    if not cells:
        return [*lines, "No record of it.", ""]
    head = ["| collection | settings from | seeds | kNN accuracy, % | difference to given |", "|---|---|---|---|---|"]
    note = "Of each seed the mean of four trainings; a search has the cost of twelve trainings at most."
    return [*lines, *sentences, "", *head, *rows, "", note, ""]


def _of(file: Path, key: str, default: Any = ()) -> Any:
    return json.loads(file.read_text())[key] if file.is_file() else default
