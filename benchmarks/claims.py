"""The paper's abstract, claim by claim, at a size that two cores can do; docs/claims.md is what this program writes.

python benchmarks/claims.py DATA [--only NAME ...] [--seeds 0 1 2] [--minutes M]   train what is missing, and write
python benchmarks/claims.py --list                                                 the claims and their commands
python benchmarks/claims.py --write                                                docs/claims.md from the record alone

DATA holds cifar10-jpeg/train, cifar10-jpeg/test and clothing/train, clothing/test. A claim is a few arms, each a
training with options of its own, compared with the first arm over the same seeds; arms that several claims have in
common are trained once. A training that was killed goes on where it was; benchmarks/results/claims.json has every one,
and none is done twice. --minutes ends the program after the training in which they are over. Intervals are of 95 %, by
Student's t over seeds: of each arm's mean, and of the difference to the first arm, paired by seed.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import time
from pathlib import Path
from typing import Any

from quality.claims_list import CLAIMS, ELSEWHERE, FIGURES, Claim
from shared import records

ROOT = Path(__file__).resolve().parents[1]
BASELINES = ("raw pixels", "untrained encoder", "random initialization", "supervised encoder")
RECORD, PAGE = ROOT / "benchmarks/results/claims.json", ROOT / "docs/claims.md"


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("data", nargs="?")
    parser.add_argument("--only", nargs="+", choices=list(CLAIMS), default=list(CLAIMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=5_000, help="of CIFAR-10, before a long tail is made of them")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--runs", default="runs/claims")
    parser.add_argument("--record", default=str(RECORD))
    parser.add_argument("--page", default=str(PAGE))
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.list:
        for name, claim in CLAIMS.items():
            print(f"{name}: {claim.says} ({FIGURES[claim.figure]}; {claim.source})")
            for arm, line in claim.arms.items():
                print(f"    {arm}: crosslevel train ... {line}")
        return
    if not arguments.write:
        if not arguments.data:
            parser.error("DATA: give the folder with cifar10-jpeg and clothing")
        train_missing(arguments)
    Path(arguments.page).write_text(page(records.read(Path(arguments.record), "cells")))


def size_of(arguments: argparse.Namespace) -> str:
    """The options that all trainings share."""
    return (
        f"--epochs={arguments.epochs} --batch_size={arguments.batch_size} --encoder.width={arguments.width:g} "
        f"--monitor_every=0 --report_html=false"
    )


def key_of(source: str, line: str, seed: int) -> str:
    """A training's name in the record: claims that need the same training share it."""
    return f"{source} | {line} | {seed}"


def train_missing(arguments: argparse.Namespace) -> None:
    """Add every training and figure that the claims need and the record lacks, seed by seed."""
    start, record, size = time.monotonic(), Path(arguments.record), size_of(arguments)
    for seed in arguments.seeds:
        for name in arguments.only:
            claim = CLAIMS[name]
            for line in claim.arms.values():
                key = key_of(claim.source, line, seed)
                recorded = records.read(record, "cells").get(key)
                if recorded is None or (recorded["size"], recorded["images"]) != (size, arguments.images):
                    recorded = {"figures": {}, "failed": {}}
                if claim.figure in {*recorded["figures"], *recorded["failed"]}:
                    continue
                if time.monotonic() - start > 60 * arguments.minutes:
                    return
                value = one(arguments, claim, line, seed, key) | {"size": size, "images": arguments.images}
                value = {**value, "figures": {**recorded["figures"], **value["figures"]}}
                records.add(record, "cells", key, value, {"program": Path(__file__).name})
                print(f"{key}: {value['figures'] or value['failed']}", flush=True)


def one(arguments: argparse.Namespace, claim: Claim, line: str, seed: int, key: str) -> dict[str, Any]:
    """Train one arm with one seed, and measure the claim's figure."""
    import hashlib

    from quality.paper import trained
    from shared.beside import machine

    from crosslevel.evaluation.detection.training import Diverged

    source = source_of(arguments, claim.source)
    digest = hashlib.sha256(f"{key}{size_of(arguments)}".encode()).hexdigest()
    folder = Path(arguments.runs) / digest[:16]
    options = [*shlex.split(size_of(arguments)), *shlex.split(line), f"--seed={seed}"]
    about = {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
    try:
        trained(source, options, folder)
    except SystemExit as stop:
        if stop.code != 1:  # 1: the loss is no longer a number, which is a result
            raise
        return {**about, "figures": {}, "failed": dict.fromkeys(FIGURES, "the loss is no longer a number")}
    try:
        return {**about, "figures": measured(arguments, folder, claim.figure, seed), "failed": {}}
    except Diverged as error:
        return {**about, "figures": {}, "failed": {claim.figure: str(error)}}


def source_of(arguments: argparse.Namespace, kind: str) -> str:
    """A collection to train on, as the command line names it: balanced, long-tailed or correlated."""
    from quality.paper import long_tailed_list

    whole, most = f"{arguments.data}/cifar10-jpeg/train", arguments.images // 10
    if kind == "long-tailed":
        return long_tailed_list(whole, 20, Path(f"claims-tail-{most}.txt"), most)
    balanced = long_tailed_list(whole, 1, Path(f"claims-{most}.txt"), most)
    return balanced if kind == "balanced" else f"{balanced}@repeat=4,shift=2"


def measured(arguments: argparse.Namespace, folder: Path, figure: str, seed: int) -> dict[str, float]:
    """The figure of a run, and its further figures."""
    from crosslevel import evaluate

    bank, test = source_of(arguments, "balanced"), f"{arguments.data}/cifar10-jpeg/test"
    if figure in ("contrast", "agreement"):
        return of_views(folder, test)
    if figure == "detection":
        return of_detectors(arguments, folder, bank, seed)
    protocol, images = ("knn", bank) if figure == "knn" else (figure.split(maxsplit=1)[0], bank)
    more: dict[str, Any] = {}
    if protocol == "linear":
        collection = figure.split()[1]
        images, test = (
            ("turntable", "turntable:test") if collection == "turntable"
            else tuple(f"{arguments.data}/{collection}/{part}" for part in ("train", "test"))
        )  # fmt: skip
    if protocol == "semi":
        from crosslevel.evaluation.finetune import Semi

        more["semi"] = Semi(fractions=(float(figure.split()[1]) / 100,))
    results = evaluate(str(folder), images, test, protocol, seed=seed, quiet=True, **more)
    (rows,) = results.values()
    baselines = {f"{figure}: {name}": rows[name]["top1"] for name in BASELINES if name in rows}
    return {figure: rows["trained encoder"]["top1"], **baselines}


def of_detectors(arguments: argparse.Namespace, folder: Path, bank: str, seed: int) -> dict[str, float]:
    """The precision of detectors that start from the run, from random weights and from supervised ones."""
    from quality import scenes

    most, size = arguments.images // 10, f"{arguments.epochs}-{arguments.width:g}"
    scenes_dir = Path(arguments.runs) / f"scenes-{most}-{size}"
    scenes.write(scenes_dir, f"{arguments.data}/cifar10-jpeg", *scenes.COUNTS, most)
    precisions = scenes.precision(folder, scenes_dir, bank, seed=seed, epochs=arguments.epochs)
    trained = precisions.pop(scenes.TRAINED)
    return {"detection": trained, **{f"detection: {name}": value for name, value in precisions.items()}}


def of_views(folder: Path, test: str) -> dict[str, float]:
    """How the instance branch compares two views of 1,000 test images, which are the same for all runs."""
    import torch
    import torch.nn.functional as F

    from crosslevel.data.bad_files import BadFiles
    from crosslevel.data.loaders.batches import pack
    from crosslevel.data.open import open_images
    from crosslevel.data.subsets.select import take
    from crosslevel.models.encoder import load_encoder
    from crosslevel.runs import load_branches
    from crosslevel.transforms.philox import Counted
    from crosslevel.transforms.views import Views

    encoder, head = load_encoder(folder), load_branches(folder)["instance branch"]
    images = open_images(test)
    sample = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:1000]
    packed = pack(take(images, sample.sort().values), encoder.view.size, bad_files=BadFiles())
    views = Views("cifar", encoder.view.size, mean=encoder.view.mean, std=encoder.view.std)
    with torch.inference_mode():
        a, b = (
            F.normalize(head(torch.cat([encoder(part) for part in view.split(250)])), dim=1)
            for view in views(packed.data, Counted(0, 0, torch.arange(len(packed))))
        )
        cosine = a @ b.T
        own = cosine.diagonal()
        others = cosine.masked_fill(torch.eye(len(cosine), dtype=torch.bool), -1).amax(1)
    return {"contrast": float((own - others).mean()), "agreement": 100 * float((own > others).float().mean())}


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half of its interval of 95 %; infinite for a single one."""
    if len(values) < 2:
        return statistics.mean(values), math.inf
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(half)


def page(cells: dict[str, dict[str, Any]]) -> str:
    """The record as a page: a section a claim. It has only trainings of the most frequent size."""
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
    lines += overview(cells)
    for name, claim in CLAIMS.items():
        lines += [
            f"## {claim.says[0].upper()}{claim.says[1:]}",
            "",
            f"`python benchmarks/claims.py DATA --only {name}`",
            "",
        ]
        lines += section(claim, cells)
    for title, text in ELSEWHERE.items():
        lines += [f"## {title}", "", text, ""]
    return "\n".join(lines).rstrip() + "\n"


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
        "A row of one seed decides nothing. Methods need budgets of their own: this is one budget for all.", "",
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


if __name__ == "__main__":
    main()
