"""The page of the claims: what was measured of each, by `claims.py`, and what other programs' records say of it."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from quality.claims_elsewhere import elsewhere, interval, tuning
from quality.claims_list import BASELINES, CLAIMS, FIGURES, NOT_IN_PAPER, Claim

RESULTS = Path(__file__).resolve().parents[1] / "results"


def page(cells: dict[str, dict[str, Any]], results: Path = RESULTS) -> str:
    """The record as a page: a section a claim, the paper's first. It has only trainings of the most frequent size.

    ``results``: the folder with other programs' records, of which the page tells, too.
    """
    sizes = [(cell["images"], cell["size"]) for cell in cells.values()]
    default = statistics.mode(sizes) if sizes else None
    cells = {key: cell for key, cell in cells.items() if (cell["images"], cell["size"]) == default}
    lines = [
        "# The abstract, claim by claim", "",
        "Written by `python benchmarks/claims.py` from `benchmarks/results/claims.json`. Small trainings on a CPU:",
        "which way a claim points at this size, not the published figures. Intervals are of 95 % over seeds.", "",
    ]  # fmt: skip
    conditions = sorted({f"{cell['images']:,} images, `{cell['size']}`; {cell['machine']}" for cell in cells.values()})
    lines += [f"Trained with: {one}." for one in conditions] + [""] * bool(conditions)
    extra = [name for name, claim in CLAIMS.items() if NOT_IN_PAPER in claim.says]
    for name in (name for name in CLAIMS if name not in extra):
        lines += titled(name, cells, results)
    lines += tuning(results) + overview(cells)
    for name in extra:
        lines += titled(name, cells, results)
    return "\n".join(lines).rstrip() + "\n"


def titled(name: str, cells: dict[str, dict[str, Any]], results: Path) -> list[str]:
    """The section of a claim under its title, with its command and what other records say of it."""
    claim = CLAIMS[name]
    title = [f"## {claim.says[0].upper()}{claim.says[1:]}", "", f"`python benchmarks/claims.py DATA --only {name}`", ""]
    return [*title, *section(claim, cells), *elsewhere(name, results)]


def overview(cells: dict[str, dict[str, Any]]) -> list[str]:
    """One table of the claims that compare a method alone with the method and CLD."""
    rows = []
    for name, claim in CLAIMS.items():
        if list(claim.arms) != ["alone", "with CLD"] or claim.figure != "knn" or claim.rule != "difference":
            continue
        arms, _, baselines = results_of(claim, cells)
        if not all(arms.values()):
            continue
        seeds = sorted(arms["alone"].keys() & arms["with CLD"].keys())
        difference = spread([arms["with CLD"][seed] - arms["alone"][seed] for seed in seeds], "+.2f") if seeds else "-"
        columns = [spread(list(arm.values())) for arm in arms.values()] + [difference] + [
            f"{statistics.mean(baselines[b]):.2f}" if baselines[b] else "-" for b in BASELINES[:2]
        ]  # fmt: skip
        rows.append(f"| {name} | {claim.source} | {len(seeds)} | " + " | ".join(columns) + " |")
    if not rows:
        return []
    head = "| claim | collection | seeds | alone | with CLD | difference | raw pixels | untrained encoder |"
    return [
        f"## All methods beside each other ({FIGURES['knn']})", "",
        head, "|---|---|---|---|---|---|---|---|", *rows, "",
        "A row of one seed decides nothing. All have eight epochs, which suit some methods better than others; of the "
        "long-tailed collection, whose images are a third as many, that is a third of the steps.", "",
    ]  # fmt: skip


def results_of(
    claim: Claim, cells: dict[str, dict[str, Any]]
) -> tuple[dict[str, dict[int, float]], dict[str, int], dict[str, list[float]]]:
    """Each arm's figures by seed, how many of its trainings diverged, and the baselines' figures."""
    arms: dict[str, dict[int, float]] = {}
    failed: dict[str, int] = {}
    baselines: dict[str, list[float]] = {name: [] for name in BASELINES}
    for arm, line in claim.arms.items():
        of_arm = [(int(key.rsplit(" | ", 1)[1]), cell) for key, cell in cells.items()
                if key.rsplit(" | ", 1)[0] == f"{claim.source} | {line}"]  # fmt: skip
        arms[arm] = {seed: cell["figures"][claim.figure] for seed, cell in of_arm if claim.figure in cell["figures"]}
        failed[arm] = sum(claim.figure in cell["failed"] for _, cell in of_arm)
        for name, values in baselines.items():
            values += [v for _, cell in of_arm if (v := cell["figures"].get(f"{claim.figure}: {name}")) is not None]
    return arms, failed, baselines


def section(claim: Claim, cells: dict[str, dict[str, Any]]) -> list[str]:
    """A claim's sentence and table; or that it was not run."""
    arms, failed, baselines = results_of(claim, cells)
    if not any(arms.values()) and not any(failed.values()):
        return ["Not run yet.", ""]
    first = next(iter(arms))
    rows, verdicts = [], []
    for arm, by_seed in arms.items():
        shared = sorted(by_seed.keys() & arms[first].keys())
        mean_text = spread(list(by_seed.values())) if by_seed else "-"
        mean_text += f" ({failed[arm]} of {failed[arm] + len(by_seed)} diverged)" if failed[arm] else ""
        difference = "-"
        if arm != first and shared:
            mean, half = interval([by_seed[seed] - arms[first][seed] for seed in shared])
            difference = f"{mean:+.2f}" + ("" if math.isinf(half) else f" ± {half:.2f}")
            verdicts.append(verdict(claim, arm, first, mean, half, by_seed, arms[first]))
        rows.append(f"| {arm} | {len(by_seed)} | {mean_text} | {difference} |")
    if claim.rule == "trains":
        verdicts = [trains(arms, failed)]
    rows += [f"| {name} | | {statistics.mean(values):.2f} | |" for name, values in baselines.items() if values]
    head = [f"| arm | seeds | {FIGURES[claim.figure]} | difference to {first} |", "|---|---|---|---|"]
    return [*verdicts, "", *head, *rows, ""]


def spread(values: list[float], form: str = ".2f") -> str:
    """A mean with its interval."""
    mean, half = interval(values)
    return f"{mean:{form}}" + ("" if math.isinf(half) else f" ± {half:.2f}")


def verdict(
    claim: Claim, arm: str, first: str, mean: float, half: float, by_seed: dict[int, float], base: dict[int, float]
) -> str:
    """The result as a sentence."""
    if claim.rule == "spread":
        if min(len(by_seed), len(base)) < 2:
            return "One seed has no spread."
        deviation, base_deviation = (statistics.stdev(values.values()) for values in (by_seed, base))
        deviations = f"{deviation:.2f} {arm}, {base_deviation:.2f} {first}"
        return f"Deviation over {len(by_seed)} seeds: {deviations}: too few to tell them apart."
    if math.isinf(half):
        return f"{arm} against {first}: {mean:+.2f} with one seed, which decides nothing."
    if abs(mean) <= half:
        return f"{arm} against {first}: {mean:+.2f} ± {half:.2f}, not told apart from nothing."
    return f"{arm} against {first}: {mean:+.2f} ± {half:.2f}, {'better' if mean > 0 else 'worse'}."


def trains(arms: dict[str, dict[int, float]], failed: dict[str, int]) -> str:
    """The largest rates at which every seed trains: a finite loss, and at least half of the best arm's figure."""
    best = max((statistics.mean(by_seed.values()) for by_seed in arms.values() if by_seed), default=0.0)
    largest: dict[str, str] = {}
    for arm, by_seed in arms.items():
        name, rate = arm.split(", rate ")
        if by_seed and not failed[arm] and min(by_seed.values()) >= best / 2:
            largest[name] = rate
    names = {arm.split(", rate ")[0] for arm in arms}
    return "Largest rate that still trains: " + ", ".join(f"{largest.get(n, 'none')} {n}" for n in sorted(names)) + "."
