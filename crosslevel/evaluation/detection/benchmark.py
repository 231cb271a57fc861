"""Object detection: fine-tune Faster R-CNN from an encoder, and from random weights beside it (He et al. 2020, MoCo).

Published for Pascal VOC: 24,000 iterations of 16 images, SGD with momentum 0.9 and weight decay 1e-4 (none on batch
normalizations), learning rate 0.02 after a linear warm-up of 100 iterations, a tenth of it after 18,000 and again after
22,000, sides of 480 to 800 pixels to train and 800 to test, horizontal flips. For COCO: 180,000, 120,000 and 160,000
iterations ("2x"), a warm-up of 1,000, sides of 640 to 800; MoCo's COCO detector also learns masks, this one does not.

Batch normalizations are trained over the batch of one device; the paper has the same batch on several devices and
normalizes over all of them. Before the test their statistics are estimated anew (detectron2's PRECISE_BN). Average
precision is COCO's (101 points, best match first), for VOC too; it differs a little from that of VOC's own development
kit.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.sources.annotated.annotations import Annotated, Ignored, Objects
from crosslevel.evaluation.detection.model import BatchNorm, Kind, Sizes, detector, glance
from crosslevel.evaluation.detection.training import (
    Checkpoint,
    Schedule,
    TrainingData,
    fine_tune,
    own_random_numbers,
    reseed,
    settle,
)
from crosslevel.models.copies import untrained
from crosslevel.models.encoder import Encoder
from crosslevel.models.numerics import avoid_faults, say_once
from crosslevel.utils.console import progress_bar
from crosslevel.utils.device import Hardware, choose
from crosslevel.utils.errors import BadImage, MissingExtra, SourceError, UserError
from crosslevel.utils.files import write
from crosslevel.utils.trees import json_tree

RANDOM, TRAINED = "random initialization", "trained encoder"
FIGURES, CHECKPOINT = "detection.json", "detection.ckpt"


class Settings(NamedTuple):
    """All settings that figures depend on, besides images, encoder and seed."""

    schedule: Schedule = Schedule()
    kind: Kind = "c4"
    sizes: Sizes = Sizes()
    regions: int = 512
    batchnorm: BatchNorm = "train"


def published(train: Annotated) -> Settings:
    """The MoCo paper's settings for VOC or COCO, by the layout of ``train``."""
    if train.ignored == "difficult":
        return Settings()
    coco = Schedule(iterations=180_000, steps=(12 / 18, 16 / 18), warmup=1000)
    return Settings(coco, sizes=Sizes(train=tuple(range(640, 801, 32))))


def detection(
    encoder: Encoder,
    train: Annotated,
    test: Annotated,
    *,
    settings: Settings | None = None,
    hardware: Hardware | None = None,
    seed: int = 0,
    workers: int = 4,
    folder: Path | None = None,
    checkpoint_minutes: float = 10,
    bad_files: BadFiles | None = None,
    console: Console | None = None,
    trained: Callable[..., FasterRCNN] | None = None,
) -> dict[str, dict[str, float]]:
    """AP, AP50 and AP75 in percent after fine-tuning from random weights and from the encoder's.

    Both detectors have the same new layers, images, order, sizes and flips, all drawn from (seed, iteration). On a CPU
    the same call gives the same figures; CUDA sums gradients of regions in varying order.

    Args:
        encoder: a ResNet; it is left as it is.
        train: images to train on; those without an object that is not ignored are left out.
        test: images to test on.
        settings: schedule, detector, sizes; those of the MoCo paper for the layout of ``train`` unless given.
        hardware: device and precision; fp16, which needs its losses scaled, is taken as float32.
        seed: of everything random.
        workers: threads that decode.
        folder: stores finished figures, which an equal call reads again, and a checkpoint to continue from.
        checkpoint_minutes: the most minutes between checkpoints.
        bad_files: collects images that cannot be read: others take their place in training, the test leaves them out.
        console: where progress is shown.
        trained: a function that returns the fine-tuned detector of an encoder, with the arguments of `fine_tuned`,
            which is the default.

    Raises:
        ImportError: pycocotools is missing.
        SourceError: no objects to train or test on, or classes in ``test`` that ``train`` lacks.
        ValueError: not a ResNet, or a setting outside its range.
        Diverged: the loss is no longer a number.

    """
    if not all(map(importlib.util.find_spec, ("pycocotools", "torchmetrics"))):
        raise MissingExtra("detection needs pycocotools and torchmetrics to count: pip install 'crosslevel[detection]'")
    settings = _checked(settings or published(train))
    hardware, unread = hardware or choose(), bad_files if bad_files is not None else BadFiles()
    train_set, test_set = train.with_examples(), test.numbered_as(train)
    if not test_set.names():
        raise SourceError(f"{test.name}: not one object that is not ignored in its {len(test)} images: nothing to find")
    store, figures = FigureStore(folder), {}
    fixed = repr((settings, seed, hardware.device.type, hardware.precision))
    shared = (fixed, _digest_of_images(train_set), _digest_of_images(test_set))
    for name, start in ((RANDOM, untrained(encoder, seed)), (TRAINED, encoder)):
        key = hashlib.sha256(repr((*shared, _digest_of_network(start))).encode()).hexdigest()
        precision = store.result(name, key)
        if precision is None:
            checkpoint = Checkpoint(None if folder is None else folder / CHECKPOINT, key, checkpoint_minutes)
            data = TrainingData(train_set, settings.schedule.batch_size, seed, workers, unread)
            with own_random_numbers(hardware.device), _Bar(console, name, settings.schedule.iterations) as bar:
                model = (trained or fine_tuned)(start, data, settings, name, seed, hardware, checkpoint, bar)
                precision = average_precision(*_predictions(model, test_set, hardware.device, unread), test.ignored)
            store.keep(name, key, precision)
            checkpoint.remove()
        figures[name] = precision
    return figures


def fine_tuned(
    start: Encoder,
    data: TrainingData,
    settings: Settings,
    name: str,
    seed: int,
    hardware: Hardware,
    checkpoint: Checkpoint,
    bar: _Bar,
) -> FasterRCNN:
    """A detector that starts from an encoder, trained, with statistics estimated anew, ready for the test."""
    reseed(seed, 0)
    options = settings._asdict()
    schedule = options.pop("schedule")
    model = detector(start, len(data.images.classes), **options, hardware=hardware).to(hardware.device)
    wrong = avoid_faults(model, lambda: glance(model, min(settings.sizes.train)), hardware)
    say_once(bar.console, wrong)
    fine_tune(model, data, schedule, name=name, seed=seed, device=hardware.device, checkpoint=checkpoint, show=bar.show)
    settle(model, data, schedule, seed, hardware.device)
    model.transform.min_size = (settings.sizes.test,)
    return model.eval()


def average_precision(
    predictions: Sequence[dict[str, Tensor]], truth: Sequence[Objects], ignored: Ignored
) -> dict[str, float]:
    """COCO's AP, AP50 and AP75 in percent, by torchmetrics with pycocotools.

    Objects of a crowd do not count as missed, and boxes that overlap a crowd do not count as false. A difficult object
    does not count either way, but a box has to fit it as well as any other object.

    Args:
        predictions: of each image: ``boxes`` (K, 4), ``scores`` (K,), ``labels`` (K,).
        truth: the objects of each image.
        ignored: the kind of the ignored objects.

    """
    from torchmetrics.detection import MeanAveragePrecision  # noqa: PLC0415 - takes a second to import

    # COCO's own thresholds; torchmetrics rounds its to float32, and counts a recall of just 0.7 as less.
    overlaps, recalls = np.linspace(0.5, 0.95, 10).tolist(), np.linspace(0, 1, 101).tolist()
    metric = MeanAveragePrecision(
        iou_type="bbox", iou_thresholds=overlaps, rec_thresholds=recalls, backend="pycocotools"
    )
    for predicted, objects in zip(predictions, truth, strict=True):
        metric.update([predicted], [_target(predicted, objects, ignored)])
    result = metric.compute()
    names = {"AP": "map", "AP50": "map_50", "AP75": "map_75"}
    return {name: 100 * float(result[key]) for name, key in names.items()}


def _target(predictions: dict[str, Tensor], objects: Objects, ignored: Ignored) -> dict[str, Tensor]:
    if ignored == "crowd":
        return {"boxes": objects.boxes, "labels": objects.labels, "iscrowd": objects.ignored.long()}
    # COCO's evaluation has no difficult objects, but it ignores objects larger than any image. Each can be matched once
    # only, while any number of boxes may match VOC's: hence a copy for each box of the class.
    boxes_of_class = (objects.labels[:, None] == predictions["labels"][None]).sum(1).clamp(min=1)
    copies = torch.where(objects.ignored, boxes_of_class, 1)
    area = torch.where(objects.ignored, 1e12, 0.0)  # 0: computed from the box
    rows = {"boxes": objects.boxes, "labels": objects.labels, "area": area}
    return {key: value.repeat_interleave(copies, 0) for key, value in rows.items()}


def _checked(settings: Settings) -> Settings:
    schedule, sizes = settings.schedule, settings.sizes
    least = {"iterations": schedule.iterations, "batch_size": schedule.batch_size, "regions": settings.regions}
    least |= {"sizes.test": sizes.test, "sizes.train": min(sizes.train, default=0)}
    for name, value in least.items():
        if value < 1:
            raise UserError(f"{name}={value}: at least 1")
    if not 0 < schedule.rate < math.inf:
        raise UserError(f"rate={schedule.rate}: give a learning rate above 0")
    return settings


@torch.no_grad()
def _predictions(
    model: FasterRCNN, test: Annotated, device: torch.device, bad_files: BadFiles
) -> tuple[list[dict[str, Tensor]], list[Objects]]:
    """Predictions and objects of each readable test image, one at a time, so that none is padded."""
    predictions, truth = [], []
    for i in range(len(test)):
        try:
            pixels, objects = test[i]
        except BadImage as error:
            bad_files.add(error.path, error.reason)
            continue
        (output,) = model([pixels.to(device).float() / 255])
        output["labels"] -= 1
        predictions.append({key: value.cpu() for key, value in output.items()})
        truth.append(objects)
    if not truth:
        raise SourceError(f"{test.name}: none of its {len(test)} images can be read")
    return predictions, truth


class FigureStore:
    """Finished figures, one entry for each initialization, with a key of all that they depend on."""

    def __init__(self, folder: Path | None) -> None:
        self.file = None if folder is None else folder / FIGURES
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def result(self, name: str, key: str) -> dict[str, float] | None:
        """The figures called ``name``, if they are those of ``key``."""
        entry = self._read().get(name, {})
        return entry["figures"] if entry.get("key") == key else None

    def keep(self, name: str, key: str, figures: dict[str, float]) -> None:
        """Add figures to the file; a kill at any moment leaves the old file or the new one."""
        if self.file is None:
            return
        text = json.dumps({**self._read(), name: {"key": key, "figures": figures}}, indent=2)
        write(self.file, text + "\n")

    def _read(self) -> dict[str, Any]:
        if self.file is None or not self.file.is_file():
            return {}
        try:
            return dict(json_tree(self.file.read_text(encoding="utf-8")))
        except ValueError:
            return {}


def _digest_of_images(images: Annotated) -> str:
    """A digest of the files, their objects and their classes."""
    digest = hashlib.sha256(repr((images.classes, images.ignored)).encode())
    for file, objects in zip(images.files, images.objects, strict=True):
        status = os.stat(file)
        digest.update(f"{file} {status.st_size} {status.st_mtime_ns}".encode("utf-8", "surrogateescape"))
        for column in objects:
            digest.update(column.numpy().tobytes())
    return digest.hexdigest()


def _digest_of_network(encoder: Encoder) -> str:
    """A digest of the weights and the view."""
    digest = hashlib.sha256(repr((encoder.name, encoder.small_images, encoder.width, encoder.view)).encode())
    for name, value in encoder.backbone.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class _Bar:
    """Progress with loss and speed: a bar on a terminal, elsewhere ten lines."""

    def __init__(self, console: Console | None, name: str, total: int) -> None:
        self.console, self.name, self.total = console, name, total
        self.progress = progress_bar(console)
        self.task = self.progress.add_task(name, total=total)
        self.start_time, self.first = time.monotonic(), 0

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def show(self, done: int, loss: float) -> None:
        """The newest figures."""
        if self.first == 0:  # a continued training starts later
            self.first, self.start_time = done, time.monotonic()
        speed = (done - self.first) / max(time.monotonic() - self.start_time, 1e-9)
        text = f"{self.name}  loss {loss:.3f}  {speed:.1f} iterations/s"
        self.progress.update(self.task, completed=done, description=text)
        tenth = done * 10 // self.total > (done - 1) * 10 // self.total
        if self.console is not None and not self.console.is_terminal and tenth:
            self.console.print(f"{text}  ({done:,} of {self.total:,})", highlight=False)
