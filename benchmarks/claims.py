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
import time
from pathlib import Path
from typing import Any

from quality.claims_list import BASELINES, CLAIMS, FIGURES, Claim, key_of
from quality.claims_page import page
from shared import records

ROOT = Path(__file__).resolve().parents[1]
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
    from quality.claims_views import of_views

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


if __name__ == "__main__":
    main()
