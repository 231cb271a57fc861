"""A small set for detection, made of CIFAR-10's photographs, on which the detector's starting weights matter.

python benchmarks/quality/scenes.py CIFAR10 OUT [--train 150] [--test 150]
crosslevel evaluate RUN OUT:train --test OUT:test --protocol detection --detection.short_side 96

A scene has 96 x 96 pixels: one to three photographs of the ten classes, of 24 to 44 pixels and faded out towards their
edges, before pieces of further photographs in all sizes, which are clutter. Positions say little: a detector must know
what an object is, from about 20 examples of a class. The photographs of training scenes are not among the first
``--without`` of each class, on which the encoders were trained; those of test scenes are CIFAR-10's test images. The
layout is that of Pascal VOC. Detectors are those of `crosslevel evaluate`, on a short schedule.
"""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models.detection import FasterRCNN

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images, InMemoryImages
from crosslevel.data.loaders.batches import pack
from crosslevel.data.open import open_images
from crosslevel.data.sources.annotated.open import annotated
from crosslevel.data.uri import parse
from crosslevel.evaluation.detection.benchmark import FIGURES, RANDOM, TRAINED, Settings, detection, fine_tuned
from crosslevel.evaluation.detection.model import Sizes
from crosslevel.evaluation.detection.training import Schedule
from crosslevel.evaluation.finetune import new_classifier
from crosslevel.evaluation.supervised import Training, train_classifier
from crosslevel.features.extract import Runtime
from crosslevel.models.copies import untrained
from crosslevel.models.encoder import Encoder, load_encoder
from crosslevel.utils.device import choose

sys.path.append(str(Path(__file__).parents[1]))

from shared import records

SIDE, CLUTTER = 96, 40
COUNTS = 150, 150  # scenes to train and to test on
SUPERVISED = "supervised encoder"
SETTINGS = Settings(Schedule(250, 8, 0.16), sizes=Sizes((SIDE,), SIDE, 2 * SIDE), regions=16)


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("cifar10", help="the folder with train/ and test/")
    parser.add_argument("out")
    parser.add_argument("--train", type=int, default=COUNTS[0])
    parser.add_argument("--test", type=int, default=COUNTS[1])
    parser.add_argument("--without", type=int, default=1000)
    arguments = parser.parse_args()
    write(Path(arguments.out), arguments.cifar10, arguments.train, arguments.test, arguments.without)


def write(root: Path, cifar10: str, train: int, test: int, without: int) -> None:
    """Both sets below ``root``, unless they are there: the same ones every time."""
    if (root / "whole").is_file():
        return
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for part, (split, count, first) in enumerate((("train", train, without), ("test", test, 0))):
        images, rng = open_images(f"{cifar10}/{split}"), np.random.default_rng((22, part))
        indices = usable(images, first)
        keys = [f"{split}{n:05}" for n in range(count)]
        for key in keys:
            pixels, objects = scene(images, indices, rng)
            Image.fromarray(pixels).save(root / "JPEGImages" / f"{key}.png")
            (root / "Annotations" / f"{key}.xml").write_text(annotation(f"{key}.png", objects))
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(keys) + "\n")
    (root / "whole").touch()


def usable(images: Images, first: int) -> torch.Tensor:
    """All images but the ``first`` of each class; all images if none would be left."""
    labels = images.labels
    assert labels is not None
    later = torch.cat([(labels == c).nonzero().squeeze(1)[first:] for c in labels.unique()])
    return later if len(later) else torch.arange(len(labels))


def scene(
    images: Images, indices: torch.Tensor, rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple[str, tuple[int, int, int, int]]]]:
    """The pixels (96, 96, 3) of one scene, and each object's class and box (x1, y1, x2, y2)."""
    canvas = np.full((SIDE, SIDE, 3), rng.uniform(60, 200, 3), np.float32)
    for number in range(CLUTTER):
        if number % 4 == 0:
            picture, _ = photograph(images, indices, rng)
        side = int(rng.integers(10, 40))
        x, y = rng.integers(-side // 2, SIDE - side // 2, 2)
        left, top = rng.integers(0, 24, 2)  # a piece of 8 pixels, which shows nothing whole
        paste(canvas, picture.crop((left, top, left + 8, top + 8)), int(x), int(y), side)
    objects: list[tuple[str, tuple[int, int, int, int]]] = []
    for _ in range(int(rng.integers(1, 4))):
        side = int(rng.integers(24, 45))
        x, y = (int(v) for v in rng.integers(0, SIDE - side + 1, 2))
        box = (x, y, x + side, y + side)
        if any(min(a[2], box[2]) > max(a[0], box[0]) and min(a[3], box[3]) > max(a[1], box[1]) for _, a in objects):
            continue
        picture, name = photograph(images, indices, rng)
        paste(canvas, picture, x, y, side)
        objects.append((name, box))
    return canvas.clip(0, 255).astype(np.uint8), objects


def photograph(images: Images, indices: torch.Tensor, rng: np.random.Generator) -> tuple[Image.Image, str]:
    """A photograph, and its class."""
    pixels, label = images[int(indices[rng.integers(len(indices))])]
    return Image.fromarray(pixels.permute(1, 2, 0).numpy()), (images.classes or [])[label]


def paste(canvas: np.ndarray, picture: Image.Image, x: int, y: int, side: int) -> None:
    """Put a picture on the canvas, faded out over the outer eighth; what reaches over the edge is cut."""
    pixels = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    ramp = np.minimum(np.arange(side), np.arange(side)[::-1]) / max(1, side / 8)
    fade = np.minimum(ramp[:, None], ramp[None]).clip(0, 1)[..., None]
    rows, columns = slice(max(0, y), min(SIDE, y + side)), slice(max(0, x), min(SIDE, x + side))
    own = (slice(rows.start - y, rows.stop - y), slice(columns.start - x, columns.stop - x))
    canvas[rows, columns] += fade[own] * (pixels[own] - canvas[rows, columns])


def annotation(file: str, objects: list[tuple[str, tuple[int, int, int, int]]]) -> str:
    """One image's XML, as Pascal VOC has it: pixels count from 1, and the last one is in the box."""
    items = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax>"
        f"<ymax>{y2}</ymax></bndbox></object>"
        for name, (x1, y1, x2, y2) in objects
    )
    size = f"<size><width>{SIDE}</width><height>{SIDE}</height><depth>3</depth></size>"
    return f"<annotation><filename>{file}</filename>{size}{items}</annotation>\n"


def precision(
    run: Path,
    scenes: Path,
    labelled: str,
    *,
    seed: int,
    epochs: int,
    settings: Settings = SETTINGS,
    trained: Callable[..., FasterRCNN] = fine_tuned,
) -> dict[str, float]:
    """AP50 in percent of detectors that start from a run's encoder, from random weights, and from supervised ones.

    The latter two are the same for all runs of a seed, and trained once, beside ``scenes``.

    Args:
        run: the folder of the run.
        scenes: as `write` writes them.
        labelled: the images that the run was trained on, with labels.
        seed: of everything random.
        epochs: of the supervised training, on the same images as the run's.
        settings: of the detectors.
        trained: the detector of an encoder.

    """
    encoder, hardware = load_encoder(run), choose()
    train, test = (annotated(parse(f"{scenes}:{split}")) for split in ("train", "test"))
    first = scenes.parent / f"{scenes.name}-supervised-{seed}"
    teacher = supervised(encoder, labelled, seed, epochs, first)
    measured = partial(
        detection, train=train, test=test, settings=settings, hardware=hardware, seed=seed, trained=trained
    )
    with_labels = measured(teacher, folder=first)
    (run / "detection").mkdir(exist_ok=True)
    if not (run / "detection" / FIGURES).is_file():  # random weights are the same for both
        shutil.copy(first / FIGURES, run / "detection" / FIGURES)
    of_run = measured(encoder, folder=run / "detection")
    return {TRAINED: of_run[TRAINED]["AP50"], RANDOM: of_run[RANDOM]["AP50"], SUPERVISED: with_labels[TRAINED]["AP50"]}


def supervised(encoder: Encoder, labelled: str, seed: int, epochs: int, folder: Path) -> Encoder:
    """The same network from random weights, trained by cross-entropy; kept in ``folder``."""
    file = folder / "encoder.safetensors"
    if file.is_file():
        return load_encoder(file)
    hardware = choose()
    images: InMemoryImages = pack(open_images(labelled), encoder.view.size, bad_files=BadFiles())
    network = copy.deepcopy(untrained(encoder, seed)).to(hardware.device).to(memory_format=torch.channels_last).train()
    classifier = new_classifier(encoder.num_features, len(images.classes or []), seed).to(hardware.device)
    modules, config = nn.ModuleList([network, classifier]), Training(epochs, 128, "cosine", 5e-4, seed, folder)
    train_classifier(
        lambda views: classifier(network(views).float()), [{"params": list(modules.parameters()), "lr": 0.1}], modules,
        images, encoder, config, Runtime(hardware), BadFiles(),
    )  # fmt: skip
    network.cpu().save(file)
    return network


if __name__ == "__main__":
    main()
