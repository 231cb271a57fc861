"""The tables of `label_free.py`: how each score ranks the settings, and what choosing by it would have cost."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from statistics import mean, variance
from typing import Any

from without_labels.label_free_settings import BASE, BATCH, SETTINGS, SIZE, STEPS

from crosslevel.metrics import label_free

GOOD = {"uniformity": -1, "alignment": -1, "loss": -1}
"""Where lower is better; alpha-ReQ is judged by how near to 1 it is."""


def tables(runs: dict[str, Any], collections: Sequence[str]) -> str:
    """For each collection the rank correlation of every score with accuracy, and the cost of choosing by it.

    Both are given among all settings, and among those that train on the views of `BASE`, which are scored.
    """
    machines = "; ".join(dict.fromkeys(run["machine"] for run in runs.values()))
    about = f"{STEPS} steps of {BATCH} images of {SIZE} pixels in float32, SimCLR, ResNet-18 x 0.25; accuracy in %."
    lines = [f"{machines}; {about}"]
    for name in collections:
        settings: dict[str, list[dict[str, Any]]] = {}
        for run in runs.values():
            if run["collection"] == name:
                settings.setdefault(run["name"], []).append(run)
        judged = {key: repeats for key, repeats in settings.items() if not any("failed" in run for run in repeats)}
        if len(judged) < 3:
            continue
        failed = [key for key in settings if key not in judged]
        repeats = min(len(repeats) for repeats in judged.values())
        judged = {key: repeated[:repeats] for key, repeated in judged.items()}  # as many of each
        alike = {
            key: r for key, r in judged.items() if r[0]["setting"]["views"] == json.loads(json.dumps(BASE["views"]))
        }
        knn = [mean(run["knn"] for run in repeats) for repeats in judged.values()]
        diverged = f"; diverged: {', '.join(failed)}" if failed else ""
        again = f", each trained {repeats} times, which is averaged" if repeats > 1 else ""
        noise = noise_of(list(judged.values())) if repeats > 1 else ""
        head = f"**{name}**: {len(judged)} of {len(SETTINGS)} settings{again}"
        lines += ["", f"{head}; kNN {min(knn):.1f} to {max(knn):.1f}{diverged}{noise}", ""]
        columns = "Spearman, kNN | linear | its choice | kNN below the best | linear"
        lines += [
            f"| | all settings | | | | | the {len(alike)} with the views that are scored | | | | |",
            f"|{'---|' * 11}",
            f"| **score** | {columns} | {columns} |",
        ]
        scores = dict.fromkeys(score for repeated in judged.values() for run in repeated for score in all_scores(run))
        for score in scores:
            counts = [sum(score in all_scores(run) for run in repeated) for repeated in judged.values()]
            if min(counts):
                choices = [choice(part, score) for part in (judged, alike)]
                fewer = f" (of {min(counts)} of {repeats} trainings)" if min(counts) < repeats else ""
                lines.append(f"| {score}{fewer} | {' | '.join(choices)} |")
    return "\n".join(lines) + "\n"


def choice(judged: dict[str, list[dict[str, Any]]], score: str) -> str:
    """How the score ranks the settings, which one it picks, and how far that lies below the best."""
    by_setting = [
        [scores[score] for scores in map(all_scores, repeats) if score in scores] for repeats in judged.values()
    ]
    values = [mean(row) for row in by_setting]
    knn, linear = ([mean(run[x] for run in repeats) for repeats in judged.values()] for x in ("knn", "linear"))
    rho = [correlation(values, figures) for figures in (knn, linear)]
    best = max(range(len(values)), key=values.__getitem__)
    lost = [max(figures) - figures[best] for figures in (knn, linear)]
    return f"{rho[0]:.2f} | {rho[1]:.2f} | {list(judged)[best]} | {lost[0]:.2f} | {lost[1]:.2f}"


def noise_of(judged: list[list[dict[str, Any]]]) -> str:
    """How far trainings of one setting differ, and how the score of one ranks with the accuracy of the others."""
    knn = [[run["knn"] for run in repeats] for repeats in judged]
    spread = math.sqrt(mean(variance(row) for row in knn))
    pairs = itertools.combinations(zip(*knn, strict=True), 2)
    alike = mean(correlation(list(first), list(second)) for first, second in pairs)
    scores = [[all_scores(run)["combined"] for run in repeats] for repeats in judged]
    better = sorted(scores, key=mean)[len(scores) // 2 :]
    relative = 100 * math.sqrt(mean(variance(row) / mean(row) ** 2 for row in better))
    single: dict[str, list[float]] = {}
    for name in ("knn", "linear"):
        single[name] = []
        for i, column in enumerate(zip(*scores, strict=True)):
            accuracies = [mean(run[name] for j, run in enumerate(repeats) if j != i) for repeats in judged]
            single[name].append(correlation(list(column), accuracies))
    ranges = ", ".join(f"{name} {min(rho):.2f} to {max(rho):.2f}" for name, rho in single.items())
    return (
        f"; of trainings of one setting kNN differs by {spread:.1f} (standard deviation), with rho {alike:.2f}, and "
        f"combined, of the better half, by {relative:.0f} %; Spearman of combined by one training with the accuracy of "
        f"the others: {ranges}"
    )


FEATURES = 128


def all_scores(run: dict[str, Any]) -> dict[str, float]:
    """Every score of one run so that more is better, ablations of ours first; alpha-ReQ by its distance from 1."""
    scores = run["scores"]
    mrr, ami, rank = scores["mrr"], max(0.0, scores["ami"]), scores["effective_rank"]
    first = {
        "combined": label_free.combine(mrr, rank, FEATURES),
        "local alone (mrr)": mrr,
        "spread alone (effective rank)": rank,
        "global alone (ami)": ami,
        "local x spread^0.25": mrr * (rank - 1) ** 0.25,
        "local x spread^0.5": mrr * (rank - 1) ** 0.5,
        "local x global (the former score)": mrr * ami,
        "local x global by nmi": mrr * scores["nmi"],
        "local x levels (ami_levels)": max(0.0, mrr * scores["ami_levels"]),
        "local x global x spread": mrr * ami * rank,
    }
    rest = {**scores, "loss": run["loss"], "alpha_req": -abs(scores["alpha_req"] - 1)}
    renamed = ("mrr", "ami", "effective_rank", "combined")  # above, under other names
    return first | {name: GOOD.get(name, 1) * value for name, value in rest.items() if name not in renamed}


def correlation(a: list[float], b: list[float]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)
