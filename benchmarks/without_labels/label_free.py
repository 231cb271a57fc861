"""Do label-free scores predict accuracy? Many short trainings with different settings, then rank correlations.

python benchmarks/without_labels/label_free.py -o benchmarks/results/label_free --cifar TRAIN TEST \
    [--collections cifar turntable ...]

TRAIN and TEST are CIFAR-10 as class-per-folder JPEGs. Every setting of `SETTINGS` trains a small ResNet-18 with SimCLR
and CLD on every collection of `COLLECTIONS`, but for the images that `crosslevel tune` would hold out too: a tenth,
whole tracks at a time. The features of two views of these are kept in the ignored runs/ folder, and kNN and linear
accuracy on a balanced test set in OUTPUT.json. A run that is there is not repeated, so that a killed benchmark goes on;
``--scores`` computes scores anew from features that are kept, and the tables. Trains with one thread; a process for
each of ``--collections`` may run beside others, into the same file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from crosslevel.cld.loss import CrossLevel
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images, InMemoryImages
from crosslevel.data.loaders.batches import TrainBatches, pack
from crosslevel.data.open import open_images
from crosslevel.data.subsets.select import long_tailed, take
from crosslevel.features.extract import extract
from crosslevel.methods import SimCLR
from crosslevel.metrics import label_free
from crosslevel.metrics.knn import weighted_knn
from crosslevel.models.encoder import Encoder, View
from crosslevel.report import read_metrics
from crosslevel.training.loop.fit import fit
from crosslevel.training.loop.module import Pretrain
from crosslevel.transforms.views import Views
from crosslevel.tuning.trial import divided
from crosslevel.utils.device import Hardware
from crosslevel.utils.errors import NotFinite

sys.path.append(str(Path(__file__).parents[1]))

from shared import records
from shared.beside import machine
from shared.records import add, read
from without_labels.label_free_settings import BASE, BATCH, SETTINGS, SIZE, STEPS
from without_labels.label_free_tables import tables

HARDWARE = Hardware(torch.device("cpu"), "fp32", "one thread")
BRANCHES = ("backbone", "instance", "group")
PROBES = ("cifar", "simclr", "none")
"""Presets of the views that are scored: the same for all runs, whatever views a run trains on."""


class Collection(NamedTuple):
    """``images`` and ``test`` judge by their labels; ``part`` is trained on without labels, and ``held`` is scored."""

    images: InMemoryImages
    test: InMemoryImages
    part: Images
    held: Images
    epochs: int


def collected(images: InMemoryImages, test: InMemoryImages) -> Collection:
    part, held = divided(images, seed=0)
    return Collection(images, test, part, held, epochs=math.ceil(STEPS * BATCH / len(part)))


def options(about: str | None, name: str, collections: Sequence[str]) -> argparse.ArgumentParser:
    """The command line of programs with these trainings; default paths have ``name``."""
    parser = records.options(about)
    parser.add_argument("-o", "--output", default=f"benchmarks/results/{name}")
    parser.add_argument("--cifar", nargs=2, metavar=("TRAIN", "TEST"))
    parser.add_argument("--collections", nargs="*", default=list(collections), choices=list(collections))
    parser.add_argument("--runs", default=f"runs/{name}", help="where features go")
    return parser


def main() -> None:
    parser = options(__doc__, "label_free", list(COLLECTIONS))
    parser.add_argument("--repeat", type=int, default=0, help="number of a training of the same settings, by its seed")
    parser.add_argument("--scores", action="store_true", help="compute scores and tables of what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record = Path(arguments.output).with_suffix(".json")
    record.parent.mkdir(parents=True, exist_ok=True)
    if not arguments.scores:
        train_all(arguments, record)
    for key, run in read(record, "runs").items() if arguments.scores else ():
        folder = folder_of(Path(arguments.runs), key)
        if (folder / "features.pt").is_file():
            add(record, "runs", key, {**run, "scores": kept_scores(folder)}, {})
    text = tables(read(record, "runs"), list(COLLECTIONS))
    record.with_suffix(".md").write_text(text)
    print(text)


def kept_scores(folder: Path) -> dict[str, float]:
    """The scores of the kept features: known tracks are left out of the ranking and, in a second one, are in it."""
    features = torch.load(folder / "features.pt", weights_only=True)

    def views(name: str) -> tuple[Tensor, Tensor]:
        return features[f"{name}/a"].float(), features[f"{name}/b"].float()

    backbone, group, tracks = views("cifar/backbone"), views("cifar/group"), features["tracks"]
    z_a, z_b = views("cifar/instance")
    result = label_free.scores(*backbone, *group, tracks, instance_a=z_a, instance_b=z_b)
    result["mrr, simclr views"] = label_free.retrieval(*views("simclr/backbone"), tracks)["mrr"]
    if tracks is not None:
        result["mrr, tracks unknown"] = label_free.retrieval(*backbone)["mrr"]
        result["mrr of other frames"] = frames(features["none/backbone/a"].float(), tracks)
    return result


def frames(features: Tensor, tracks: Tensor) -> float:
    """Mean reciprocal rank of the other frames of an image's track, each among the images of other tracks."""
    unit = torch.nn.functional.normalize(features, dim=1)
    similarity, same_track = unit @ unit.T, tracks[:, None] == tracks
    reciprocal_ranks = []
    for i, row in enumerate(similarity):
        rivals, other_frames = row[~same_track[i]], same_track[i].clone()
        other_frames[i] = False
        ranks = 1 + (rivals >= row[other_frames][:, None]).sum(1)
        reciprocal_ranks.append(float((1 / ranks.double()).mean()))
    return mean(reciprocal_ranks)


def folder_of(runs_dir: Path, key: str) -> Path:
    """The folder of a run, by its key in the record: collection, setting and the number of a repeated training."""
    collection, setting, *number = key.replace(" ", "-").replace(",", "").split("/")
    return runs_dir / collection / "~".join([setting, *number])


def train_all(arguments: argparse.Namespace, record: Path, only: Sequence[str] = tuple(SETTINGS)) -> None:
    """Train and judge every setting on every collection, those that are not in the record."""
    opened: dict[str, Collection] = {}
    # In steps through the list, what is done of a killed benchmark has good and bad settings of every kind.
    order = [setting for start in range(7) for setting in list(SETTINGS)[start::7] if setting in only]
    for setting, name in itertools.product(order, arguments.collections):
        done = read(record, "runs")
        key = f"{name}/{setting}" + (f"/{arguments.repeat}" if arguments.repeat else "")
        values = {**BASE, **SETTINGS[setting]}
        if key in done and done[key]["setting"] == json.loads(json.dumps(values)):
            continue
        if name not in opened:
            opened[name] = COLLECTIONS[name](arguments)
        began, folder = time.monotonic(), folder_of(Path(arguments.runs), key)
        result = one_run(values, opened[name], folder, arguments.repeat)
        result |= {} if "failed" in result else {"scores": kept_scores(folder)}
        about = {"collection": name, "name": setting, "setting": values, "seed": arguments.repeat}
        run = {**about, "machine": machine(), **result}
        add(record, "runs", key, run, {})
        figures = {k: round(v, 2) for k, v in result.items() if isinstance(v, float)}
        print(f"{time.strftime('%H:%M')} {key}: {figures} {time.monotonic() - began:.0f} s", flush=True)


def one_run(setting: dict[str, Any], collection: Collection, folder: Path, seed: int) -> dict[str, Any]:
    """Train, keep the features of two views of the probed images, and judge."""
    torch.manual_seed(seed)
    encoder = Encoder("resnet18", small_images=False, width=0.25)
    views = Views(size=SIZE, **setting["views"])
    encoder.view = View(SIZE, views.mean, views.std)
    method = SimCLR(encoder, temperature=setting["temperature"], hidden=encoder.num_features, batch_norm=False)
    cld = CrossLevel(
        encoder.num_features, setting["groups"], setting["group_temperature"], setting["weight"]
    )  # fmt: skip
    batches = TrainBatches(collection.part, BATCH, seed=seed, bad_files=BadFiles())
    module = Pretrain(
        encoder, method, cld if cld.weight else None, views, steps=collection.epochs * len(batches),
        warmup_steps=len(batches) // 2, optimizer="sgd", lr=setting["lr"], weight_decay=5e-4, seed=seed,
    )  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with open(os.devnull, "w") as nowhere:
        try:
            if not fit(module, batches, folder, hardware=HARDWARE, console=Console(file=nowhere)).finished:
                raise SystemExit("stopped; the same command goes on from here")
        except NotFinite as error:
            return {"failed": str(error)}
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "tensorboard")
    module.eval()
    torch.save(probe(encoder, method, cld, collection.held), folder / "features.pt")
    losses = [value for epoch, value in read_metrics(folder / "metrics.csv")["loss"] if epoch > collection.epochs - 1]
    return {"loss": sum(losses) / len(losses), **judge(encoder, collection)}


@torch.no_grad()
def probe(encoder: Encoder, method: SimCLR, cld: CrossLevel, images: Images) -> dict[str, Any]:
    """Features of two views of the held-out images, drawn alike in every run: backbone, instance and group branch."""
    part = pack(images, SIZE, bad_files=BadFiles()).batch(torch.arange(len(images)))
    features: dict[str, Any] = {"tracks": images.tracks}
    for preset in PROBES:
        view_pair = Views(preset, SIZE)(part, torch.Generator().manual_seed(0))
        for name, view in zip("ab", view_pair, strict=True):
            h = torch.cat([encoder(x.contiguous(memory_format=torch.channels_last)) for x in view.split(500)])
            features[f"{preset}/backbone/{name}"] = h.half()
            features[f"{preset}/instance/{name}"] = method.project(h).half()
            features[f"{preset}/group/{name}"] = cld.project(h).half()
    return features


def judge(encoder: Encoder, collection: Collection) -> dict[str, float]:
    """Accuracy in percent on the balanced test set: kNN (k = 200, T = 0.1) and logistic regression."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    bank, queries = (extract(encoder, part, hardware=HARDWARE) for part in (collection.images, collection.test))
    votes = weighted_knn(bank.features, bank.labels, queries.features, len(collection.test.classes or []))
    scale = StandardScaler().fit(bank.features.numpy())
    linear = LogisticRegression(C=0.01, class_weight="balanced", max_iter=100)
    linear.fit(scale.transform(bank.features.numpy()), bank.labels.numpy())
    return {
        "knn": 100 * float((votes.argmax(1) == queries.labels).double().mean()),
        "linear": 100 * float(linear.score(scale.transform(queries.features.numpy()), queries.labels.numpy())),
    }


def cifar(arguments: argparse.Namespace, imbalance: float, seed: int = 0) -> Collection:
    """CIFAR-10 made long-tailed, judged on half of the test set, balanced as all of it."""
    if not arguments.cifar:
        raise SystemExit("--cifar TRAIN TEST: name the folders of CIFAR-10's images")
    whole, test = (open_images(path) for path in arguments.cifar)
    assert whole.labels is not None
    part = take(whole, long_tailed(whole.labels, imbalance, torch.Generator().manual_seed(seed)))
    images = pack(part, SIZE, bad_files=BadFiles())
    half = take(test, torch.arange(0, len(test), 2))
    return collected(images, pack(half, SIZE, bad_files=BadFiles()))


def turntable(arguments: argparse.Namespace, imbalance: float, seed: int = 0) -> Collection:
    """Turntable, judged on other objects than those trained on."""
    images, test = (
        open_images(f"turntable:{split},imbalance={imbalance:g},seed={seed},size={SIZE},test_objects=60")
        for split in ("train", "test")
    )
    assert isinstance(images, InMemoryImages)
    assert isinstance(test, InMemoryImages)
    return collected(images, test)


COLLECTIONS = {
    "cifar": lambda arguments: cifar(arguments, 100),
    "turntable": lambda arguments: turntable(arguments, 20),
    # Not used to find the score:
    "cifar, imbalance 10": lambda arguments: cifar(arguments, 10, seed=1),
    "turntable, imbalance 5, seed 1": lambda arguments: turntable(arguments, 5, seed=1),
}


if __name__ == "__main__":
    main()
