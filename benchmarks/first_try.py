"""The accuracy of `crosslevel train FOLDER` with its defaults on many collections: the defaults' standing benchmark.

python benchmarks/first_try.py DATA [--budgets 1 4 16] [--seeds 0 1] [--only clothing] [--voc VOC2007:trainval]

DATA holds cifar10-jpeg/train, cifar10-jpeg/test and clothing/train, clothing/test. A budget is 40,000 images seen (a
few minutes of two cores; of views of 128 pixels a quarter as many), four times and sixteen times that; the second seed
is trained at the smallest. Every cell is one training in its own process, by the default command with --epochs and
--encoder.width 0.25 (and, as the column says, --cld.weight 0 or the best options that anybody found for that
collection, `BEST`). Cells that the record has with the same command and the same rules (`rules`) are not run again; a
killed training continues; one that fails is named at the end. benchmarks/results/first_try.json is the record,
first_try.md the table. Two calls with different --only share the work.

The row "lightly" is the SimCLR tutorial of lightly 1.5 (ResNet-18 of the same width, its transform with
gaussian_blur=0, vf_prob=0.5 and rr_prob=0.5, batch 256, SGD 0.06, decay 5e-4, cosine) on the clothing photographs, for
the seconds that the default took there by the record; it needs pip install lightly.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from quality.paper import trained
from shared import records
from shared.beside import machine
from shared.collection_list import IMAGES_SEEN, Collection, collections

from crosslevel import CrossLevel, Encoder, load_encoder
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images
from crosslevel.data.loaders.batches import pack
from crosslevel.data.open import open_images
from crosslevel.evaluation.linear import Linear, choose
from crosslevel.evaluation.session import labelled_pair
from crosslevel.features.extract import Features, extract, pixels
from crosslevel.methods import SimCLR
from crosslevel.metrics.knn import weighted_knn
from crosslevel.models.copies import untrained
from crosslevel.training import defaults
from crosslevel.training.train import train
from crosslevel.transforms.views import Views
from crosslevel.utils.device import choose as device

COLUMNS = {"raw pixels": None, "untrained": None, "default, no CLD": ["--cld.weight=0"], "default": [], "best": None}
FORMER = ["--views.scale=[0.2,1]", "--method.temperature=0.2", "--encoder.zero_init_last=true", "--views.flip=0.5"]
BEST: dict[str, list[str]] = {
    "CIFAR-10 (JPEG)": FORMER,
    "500 images": FORMER,
    "turntable": [
        "--method=MoCo", "--method.online=2", "--method.queue=1024", "--method.momentum=0.99",
        "--method.temperature=0.1", "--optimizer=adamw", "--lr=0.002", "--batch_size=64",
    ],
}  # fmt: skip
"""Options that were better than the default in some training (benchmarks/results/defaults.json), by collection."""

FIGURES = ("knn", "knn_balanced", "linear", "linear_balanced", "few_shot")
SHOTS, DRAWS = 5, 20


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("data")
    parser.add_argument("-o", "--output", default="benchmarks/results/first_try")
    parser.add_argument("--budgets", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1], help="all at the smallest budget, the first at all"
    )
    parser.add_argument("--only", nargs="+", help="names of collections")
    parser.add_argument("--voc", help="annotated images with --crops, as crosslevel train takes them")
    parser.add_argument("--voc_test")
    parser.add_argument("--runs", default="runs/first_try")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(json.loads(arguments.one))
        return
    record = Path(arguments.output).with_suffix(".json")
    selected = collections(
        Path(arguments.data), Path(arguments.runs), arguments.only, arguments.voc, arguments.voc_test
    )
    failed = []
    for cell in cells(selected, arguments):
        done = records.read(record, "cells")
        before = done.get(cell["name"], {})
        if all(before.get(key) == cell[key] for key in ("line", "rules")):
            continue
        try:
            result = in_a_process(cell, done)
        except (subprocess.CalledProcessError, KeyError) as error:
            failed.append(cell["name"])
            print(f"{cell['name']}: {error!r}", flush=True)
            continue
        records.add(record, "cells", cell["name"], result, {})
        record.with_suffix(".md").write_text(table(records.read(record, "cells")))
        print(cell["name"], {k: round(result[k], 1) for k in FIGURES if k in result}, flush=True)
    if failed:
        sys.exit(f"failed, see above: {'; '.join(failed)}")


def in_a_process(cell: dict[str, Any], done: dict[str, Any]) -> dict[str, Any]:
    """What the record keeps of a cell, which is trained and judged in a process of its own."""
    figures_file = Path(cell["folder"]).with_suffix(".json")
    figures_file.parent.mkdir(parents=True, exist_ok=True)
    more = {"seconds": done[cell["seconds_of"]]["seconds"]} if "seconds_of" in cell else {}
    records.again(__file__, "-", "--one", json.dumps({**cell, **more, "to": str(figures_file)}), show=True)
    kept = ("collection", "budget", "column", "seed", "line", "rules")
    return {**json.loads(figures_file.read_text()), **{key: cell[key] for key in kept}, "machine": machine()}


def cells(selected: dict[str, Collection], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All cells, the smallest budget and the first seed first."""
    smallest = min(arguments.budgets)
    for budget, seed in itertools.product(sorted(arguments.budgets), arguments.seeds):
        if seed != arguments.seeds[0] and budget != smallest:
            continue
        for (name, c), (column, column_options) in itertools.product(selected.items(), COLUMNS.items()):
            extra = BEST.get(name) if column == "best" else column_options
            if extra is None and (column == "best" or budget != smallest or seed != arguments.seeds[0]):
                continue  # no training: one figure for all budgets
            images = len(open_images(c.train))
            epochs = c.seen * budget / images
            line = [f"--epochs={epochs:g}", "--encoder.width=0.25", f"--seed={seed}"]
            line += [*c.options, *(extra or []), "--report_html=false", "--monitor_every=0"]
            key = f"{name} | {budget} | {column} | {seed}"
            folder = Path(arguments.runs) / key.replace(" | ", "/").replace(" ", "-").replace(",", "")
            yield {
                "name": key, "collection": name, "budget": budget, "column": column, "seed": seed, "line": line,
                "train": c.train, "bank": c.bank, "test": c.test, "folder": str(folder), "trains": extra is not None,
                "rules": rules(images, epochs) if extra is not None else "",
            }  # fmt: skip
            if name == "clothing" and column == "default" and seed == arguments.seeds[0]:
                yield lightly_cell(c, budget, key, folder, rules(images, epochs))


def rules(images: int, epochs: float, by: Any = defaults) -> str:
    """A hash that changes with a value that the rules choose for a training, or with a default of what it is made of.

    Views of 32 and of 128 pixels stand for all sizes. Another reason, name or type changes nothing.
    """
    batch = by.batch_size(images, epochs).value
    steps = max(1, round(epochs * (images // batch)))
    chosen = [
        *(rule(view) for rule in (by.preset, by.crop_scale) for view in (32, 128)),
        *(rule(epochs) for rule in (by.flip, by.warmup_epochs)),
        by.groups(batch), by.learning_rate("sgd", SimCLR.sgd_rate, batch), by.weight_decay("sgd"),
        by.momentum(steps), by.queue(images, batch), by.hold_out(images),
    ]  # fmt: skip
    values = [batch, *(choice.value for choice in chosen)]
    made_of = (train, SimCLR, CrossLevel, Views, Encoder)
    arguments = [(p.name, p.default) for one in made_of for p in inspect.signature(one).parameters.values()]
    unset = (None, inspect.Parameter.empty)
    given = [(name, default) for name, default in arguments if not any(default is value for value in unset)]
    return hashlib.sha256(repr((values, given)).encode()).hexdigest()[:16]


def lightly_cell(c: Collection, budget: int, key: str, folder: Path, of_default: str) -> dict[str, Any]:
    """The tutorial's training for as many seconds as the default's took."""
    other = key.replace("default", "lightly")
    return {
        "name": other, "collection": "clothing", "budget": budget, "column": "lightly", "seed": 0, "line": ["lightly"],
        "train": c.train, "bank": c.bank, "test": c.test, "folder": str(folder) + "-lightly", "trains": True,
        "seconds_of": key, "rules": of_default,
    }  # fmt: skip


def one(cell: dict[str, Any]) -> None:
    """Train if the column is a training, evaluate, and write the figures."""
    folder, seconds = Path(cell["folder"]), 0.0
    bank, queries = labelled_pair(cell["bank"], cell["test"])
    if cell["column"] == "lightly":
        seconds = cell["seconds"]
        encoder = lightly_tutorial(open_images(cell["train"]), seconds, cell["seed"])
    elif cell["trains"]:
        with clock(folder) as spent:
            trained(cell["train"], cell["line"], folder, rules=cell["rules"])
        encoder, seconds = load_encoder(folder), spent()
    else:
        encoder = any_encoder(cell)
    if cell["column"] == "raw pixels":
        size = min(encoder.view.size, 32)
        features = [pixels(part, size) for part in (bank, queries)]
    else:
        packed = [pack(part, encoder.view.size, bad_files=BadFiles()) for part in (bank, queries)]
        features = [extract(encoder, part, hardware=device()) for part in packed]
    Path(cell["to"]).write_text(json.dumps({**judged(*features), "seconds": seconds}))


@contextmanager
def clock(folder: Path, every: float = 5.0) -> Iterator[Callable[[], float]]:
    """Seconds that a training takes, with those before it was killed: a file beside its folder, as `trained` has."""
    file, ends, last = folder.with_name(f"{folder.name}.seconds"), threading.Event(), time.monotonic()

    def spent() -> float:
        return float(file.read_text()) if file.is_file() else 0.0

    def add() -> None:
        nonlocal last
        now = time.monotonic()
        (part := file.with_suffix(".part")).write_text(str(spent() + now - last))
        part.replace(file)  # whole at any time
        last = now

    def count() -> None:
        while not ends.wait(every):
            add()

    counting = threading.Thread(target=count, daemon=True)
    counting.start()
    try:
        yield spent
    finally:
        ends.set()
        counting.join()
        add()


def any_encoder(cell: dict[str, Any]) -> Any:
    """The network that the default command would train, before its first step."""
    from rich.console import Console

    from crosslevel.models.encoder import View
    from crosslevel.training.inputs import prepared

    size = next((int(o.split("=")[1]) for o in cell["line"] if o.startswith("--views.size=")), None)
    encoder, views = Encoder("resnet18", width=0.25), Views(size=size)
    prepared(open_images(cell["train"]), encoder, views, 4.0, BadFiles(), Console(quiet=True))
    assert isinstance(encoder.view, View)
    return untrained(encoder, cell["seed"])


def judged(bank: Features, queries: Features) -> dict[str, float]:
    """Accuracies in percent on the test images: kNN, a linear classifier, and nearest means of 5 images a class."""
    classes = int(max(bank.labels.max(), queries.labels.max())) + 1
    votes = weighted_knn(bank.features, bank.labels, queries.features, classes, k=min(200, len(bank.labels) // 10))
    generator = torch.Generator().manual_seed(0)
    # Of thousands of pixels twelve classifiers take longer than a training: fewer passes.
    settings = Linear(epochs=30 if bank.features.shape[1] <= 1024 else 6)
    linear = choose(bank.features, bank.labels, classes, settings, generator)
    scores = linear.classifier.scores(queries.features)[:, 0]
    out = {}
    for name, predicted in (("knn", votes.argmax(1)), ("linear", scores.argmax(1))):
        right = (predicted == queries.labels).double()
        out[name] = 100 * float(right.mean())
        out[f"{name}_balanced"] = 100 * statistics.mean(
            float(right[queries.labels == c].mean()) for c in queries.labels.unique()
        )
    return out | {"few_shot": few_shot(bank, queries, classes)}


def few_shot(bank: Features, queries: Features, classes: int) -> float:
    """Balanced accuracy, in percent, of the nearest class mean by cosine; mean over 20 draws of 5 images a class."""
    a, b = (torch.nn.functional.normalize(f.features, dim=1) for f in (bank, queries))
    accuracies, generator = [], torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        order = torch.randperm(len(bank.labels), generator=generator)
        shots = [order[bank.labels[order] == c][:SHOTS] for c in range(classes)]
        means = torch.stack([a[rows].mean(0) if len(rows) else a.new_zeros(a.shape[1]) for rows in shots])
        right = ((b @ torch.nn.functional.normalize(means, dim=1).T).argmax(1) == queries.labels).double()
        accuracies.append(balanced(right, queries.labels))
    return statistics.mean(accuracies)


def balanced(right: torch.Tensor, labels: torch.Tensor) -> float:
    """The mean of the classes' accuracies, in percent."""
    return 100 * statistics.mean(float(right[labels == c].mean()) for c in labels.unique())


def lightly_tutorial(images: Images, seconds: float, seed: int) -> Any:
    """lightly's SimCLR tutorial (docs, tutorial 3) on the clothing photographs, stopped after ``seconds``."""
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
    from torch.utils.data import DataLoader

    from crosslevel.models.encoder import View

    torch.manual_seed(seed)
    encoder = Encoder("resnet18", width=0.25)
    encoder.view = View(128)
    head = SimCLRProjectionHead(encoder.num_features, encoder.num_features, 128)
    transform = SimCLRTransform(input_size=128, vf_prob=0.5, rr_prob=0.5, gaussian_blur=0.0)
    root = Path(images.paths[0]) if Path(images.paths[0]).is_absolute() else Path(images.name)
    loader = DataLoader(
        LightlyDataset(str(root if root.is_dir() else root.parents[1]), transform=transform),
        batch_size=256, shuffle=True, drop_last=True, num_workers=2,
    )  # fmt: skip
    optimizer = torch.optim.SGD([*encoder.parameters(), *head.parameters()], lr=6e-2, momentum=0.9, weight_decay=5e-4)
    criterion, ends = NTXentLoss(), time.monotonic() + seconds
    began = time.monotonic()
    while True:
        for (a, b), *_ in loader:
            rate = 0.5 * (1 + torch.cos(torch.tensor(min(1.0, (time.monotonic() - began) / seconds) * torch.pi)))
            for group in optimizer.param_groups:
                group["lr"] = 6e-2 * float(rate)  # its cosine, along the time that there is
            loss = criterion(head(encoder(a)), head(encoder(b)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if time.monotonic() >= ends:
                return encoder.eval()


def table(cells: dict[str, Any]) -> str:
    """One row a collection and budget: balanced kNN, linear and few-shot by column, means over seeds."""
    names = [*COLUMNS, "lightly"]
    lines = [
        f"{'; '.join(sorted({c['machine'] for c in cells.values()}))}; ResNet-18 x 0.25; test accuracy in %, balanced: "
        f"kNN / linear / 5 labels a class; a budget of 1 is {IMAGES_SEEN:,} images seen, of 128 pixels a quarter; "
        "means over seeds",
        "",
        "| collection | budget | " + " | ".join(names) + " | CLD adds (kNN) |",
        "|---|---|" + "---|" * (len(names) + 1),
    ]
    rows = dict.fromkeys((c["collection"], c["budget"]) for c in cells.values())
    for collection, budget in rows:
        texts, knn = [], {}
        for column in names:
            fixed = column in ("raw pixels", "untrained")
            matching = [
                c for c in cells.values()
                if c["collection"] == collection and c["column"] == column and (fixed or c["budget"] == budget)
            ]  # fmt: skip
            if not matching:
                texts.append("-")
                continue
            means = [statistics.mean(c[k] for c in matching) for k in ("knn_balanced", "linear_balanced", "few_shot")]
            knn[column] = means[0]
            seeds = f" ({len(matching)})" if len(matching) > 1 else ""
            texts.append(" / ".join(f"{v:.1f}" for v in means) + seeds)
        gain = f"{knn['default'] - knn['default, no CLD']:+.1f}" if {"default", "default, no CLD"} <= set(knn) else "-"
        lines.append(f"| {collection} | {budget} | {' | '.join(texts)} | {gain} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
