"""``crosslevel classify``: label images, by a classifier on a run's features that labelled images train."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from rich.console import Console
from torch import Tensor

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.uri import parse
from crosslevel.evaluation.labelling.calibration import Limits, calibration_error, limits, temperature
from crosslevel.evaluation.labelling.tracks import Tracks, hold_out, tracks_of
from crosslevel.evaluation.linear import Linear
from crosslevel.evaluation.linear import choose as chosen_linear
from crosslevel.features.extract import Features, Runtime, extract
from crosslevel.features.pieces import text
from crosslevel.features.source import open_for
from crosslevel.metrics.knn import neighbours, weighted_knn
from crosslevel.metrics.nearest import nearest
from crosslevel.models.encoder import Encoder
from crosslevel.models.named import open_encoder
from crosslevel.utils.console import printer, progress_bar, say
from crosslevel.utils.device import Device, Precision, choose
from crosslevel.utils.errors import UserError
from crosslevel.utils.files import replacing
from crosslevel.utils.marks import verb
from crosslevel.utils.rng import seeded

NEAREST = 5  # labelled images whose mean distance from an image shows how far it is from all known ones

ClassifierName = Literal["auto", "knn", "linear"]


class Predictions(NamedTuple):
    """Path, label, probability, whether it is of no known class, and distance of each of M images.

    ``about``: the classifier, its accuracy and calibration on held-out images, and the limits.
    """

    paths: list[str]
    labels: list[str]
    probability: Float[Tensor, " M"]
    unknown: Bool[Tensor, " M"]
    distance: Float[Tensor, " M"]
    about: dict[str, Any]


class _Classifier(NamedTuple):
    """Probabilities of the C classes from features, and the features that it was made from.

    ``linear`` has the one setting of a linear classifier that was selected.
    """

    kind: str
    logits: Callable[[Float[Tensor, "N D"]], Float[Tensor, "N C"]]
    train_features: Float[Tensor, "M D"]
    t: float = 1.0
    linear: Linear = Linear()

    def probabilities(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        return (self.logits(features).double() / self.t).softmax(1).float()

    def distance(self, features: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        return (1 - nearest(features, self.train_features, NEAREST).values.float()).clamp(min=0).mean(1)


@verb("output", "how", "reject", "device", "precision", output="predictions.parquet")
def classify(
    run: str,
    labelled: str,
    images: str,
    output: str | None = None,
    how: ClassifierName = "auto",
    reject: float = 0.05,
    k: int | None = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    workers: int | None = None,
    batch_size: int = 256,
    data_root: str | None = None,
    crops: Crops | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> Predictions:
    """Label images by similarity to labelled ones: a class with its probability, or unknown for none of the classes.

    About a fifth of the labelled images is not used for training: whole tracks (films, objects; of a plain folder, sets
    of near-duplicates), so that the stated accuracy holds for other tracks. A class of one track is used for training
    only. The held-out images select nearest neighbours or a linear classifier on the run's features, the temperature
    that calibrates the probabilities, and the limits beyond which an image counts as unknown.

    Args:
        run: the folder of a run, or its encoder.safetensors; or weights by name: timm:NAME, hf-hub:owner/name.
        labelled: labelled images: a folder with a sub-folder for each class, or any other source with labels.
        images: the images to label.
        output: the Parquet table to write: path, label, probability, unknown, distance. From Python none is written
            unless it is given.
        how: knn, linear, or auto, which takes the one with the higher accuracy on the held-out images.
        reject: the share of images of known classes that may be labelled unknown: the higher, the more unknown ones are
            found; 0 labels none as unknown.
        k: neighbours that vote; 200 unless given, but at most a tenth of the labelled images.
        device: auto takes CUDA, then Apple's MPS, then the CPU.
        precision: fp32, so that features are the same wherever they are made; auto takes bfloat16 where the hardware
            computes it.
        workers: processes that decode; 0 decodes in one thread; chosen by the size of the images unless given.
        batch_size: images at a time.
        data_root: folder with the official files of cifar10, cifar100 and stl10.
        crops: objects cut out of annotated images, such as VOC2007:trainval; --crops alone takes its usual settings.
        seed: of the choice of held-out images, and of the linear classifier.
        quiet: print nothing.

    Returns:
        the labels, and how reliable they are.

    Examples:
        >>> predictions = crosslevel.classify("runs/photos", "labelled/train", "photos/")
        >>> sure = predictions.probability > 0.9

    """
    if not 0 <= reject < 1:
        raise UserError(f"reject={reject}: a share of at least 0 and below 1")
    if k is not None and k < 1:
        raise UserError(f"k={k}: at least 1")
    if output is not None and Path(output).suffix != ".parquet":
        raise UserError(f"--output {output}: the name must end in .parquet")
    console, encoder = printer(quiet), open_encoder(run)
    say(console, encoder.loaded)
    runtime = Runtime(choose(device, precision), workers, batch_size)
    labelled_images = open_for(encoder, parse(labelled), data_root, crops)
    if labelled_images.labels is None:
        raise UserError(f"{labelled} has no labels: put the images of each class into a folder of its own")
    unlabelled_images = open_for(encoder, parse(images), data_root, crops)
    learnt, names = _features(encoder, labelled_images, runtime, console), _names(labelled_images)
    with progress_bar(console) as bar:
        bar.add_task("comparing labelled images", total=None)
        tracks = tracks_of(labelled_images, learnt.indices, workers)
    classifier, bounds, metadata = _learnt(learnt, tracks, len(names), how, reject, k, seed, console)
    extracted = _features(encoder, unlabelled_images, runtime, console)
    best, predicted = classifier.probabilities(extracted.features).max(1)
    distance = classifier.distance(extracted.features)
    unknown = bounds.unknown(distance, best)
    paths = [unlabelled_images.paths[i] for i in extracted.indices.tolist()]
    predictions = Predictions(paths, [names[c] for c in predicted.tolist()], best, unknown, distance, metadata)
    counts = predicted[~unknown].bincount(minlength=len(names)).tolist()
    largest = sorted(zip(names, counts, strict=True), key=lambda pair: -pair[1])[:10]
    counts_text = ", ".join(f"{name} {count:,}" for name, count in largest if count)
    say(console, f"{len(paths):,} images: {int(unknown.sum()):,} unknown{', ' if counts_text else ''}{counts_text}")
    if output is not None:
        _write(Path(output), predictions, run, encoder.licence)
        say(console, f"written: {output}; next: read it with pandas.read_parquet({output!r})")
    return predictions


def _names(images: Images) -> list[str]:
    assert images.labels is not None
    return images.classes or [str(c) for c in range(int(images.labels.max()) + 1)]


def _features(encoder: Encoder, images: Images, runtime: Runtime, console: Console) -> Features:
    bad_files = BadFiles()
    extracted = extract(
        encoder, images, batch_size=runtime.batch_size, workers=runtime.workers, hardware=runtime.hardware,
        bad_files=bad_files,
    )  # fmt: skip
    if len(bad_files):
        say(console, bad_files.summary(len(images)))
    return extracted


def _learnt(
    learnt: Features,
    tracks: Tracks,
    classes: int,
    how: ClassifierName,
    reject: float,
    k: int | None,
    seed: int,
    console: Console,
) -> tuple[_Classifier, Limits, dict[str, Any]]:
    """The classifier that is best on held-out images, calibrated on them, and then trained again on all images."""
    features, labels = learnt.features, learnt.labels
    if (labels < 0).any():
        raise UserError(f"{int((labels < 0).sum()):,} of the labelled images have no label: leave them out")
    if len(labels.unique()) < 2:
        raise UserError("the labelled images are of one class: needs two at least")
    split = hold_out(labels, tracks, seed)
    say(console, split.line)
    validation, owner = split.mask, tracks.owner
    kinds = ["knn", "linear"] if how == "auto" else [how]
    training = features[~validation], labels[~validation], None if owner is None else owner[~validation]
    classifiers = [_fitted(kind, *training, classes, k, seed) for kind in kinds]
    truth, rows = labels[validation], features[validation]
    right = [float((one.logits(rows).argmax(1) == truth).double().mean()) for one in classifiers]
    best = max(range(len(classifiers)), key=right.__getitem__)
    logits = classifiers[best].logits(rows)
    before = calibration_error(logits.double().softmax(1), truth)
    calibrated = classifiers[best]._replace(t=temperature(logits, truth))
    probabilities = calibrated.probabilities(rows)
    after = calibration_error(probabilities, truth)
    bounds = limits(calibrated.distance(rows), probabilities.max(1).values, reject)
    # Another setting would have logits of another size, for which this temperature and these limits are wrong.
    final = _fitted(kinds[best], features, labels, owner, classes, k, seed, calibrated.linear)._replace(t=calibrated.t)
    say(
        console,
        f"{kinds[best]}: {100 * right[best]:.1f} % of {len(truth):,} held-out images are right, calibration error "
        f"{100 * after:.1f} % ({100 * before:.1f} % before); unknown: farther than {bounds.distance:.3f} or a "
        f"probability below {bounds.probability:.2f}",
    )
    metadata = {
        "how": kinds[best], "held_out": len(truth), "held_out_tracks": split.tracks, "accuracy": right[best],
        "calibration_error": after,
        "temperature": calibrated.t, "distance_limit": bounds.distance, "probability_limit": bounds.probability,
        "others": dict(zip(kinds, right, strict=True)),
    }  # fmt: skip
    return final, bounds, metadata


def _fitted(
    kind: str,
    features: Float[Tensor, "N D"],
    labels: Int64[Tensor, " N"],
    tracks: Int64[Tensor, " N"] | None,
    classes: int,
    k: int | None,
    seed: int,
    linear: Linear = Linear(),
) -> _Classifier:
    if kind == "knn":
        voters = k or neighbours(len(features))

        def votes(rows: Float[Tensor, "M D"]) -> Float[Tensor, "M C"]:
            share = weighted_knn(features, labels, rows, classes, voters)
            return (share / share.sum(1, keepdim=True)).clamp(min=1e-6).log()

        return _Classifier(kind, votes, features)
    unit, generator = F.normalize(features, dim=1), seeded(seed)
    sweep, lr, weight_decay, _ = chosen_linear(unit, labels, classes, linear, generator, tracks=tracks)
    selected = Linear(lrs=(lr,), weight_decays=(weight_decay,))
    return _Classifier(kind, lambda rows: sweep.scores(F.normalize(rows, dim=1)).squeeze(1), features, linear=selected)


def _write(file: Path, predictions: Predictions, run: str, licence: str) -> None:
    table = pa.table(
        {
            "path": [text(path) for path in predictions.paths],
            "label": predictions.labels,
            "probability": predictions.probability.numpy(),
            "unknown": predictions.unknown.numpy(),
            "distance": predictions.distance.numpy(),
        }
    )
    origin = {"run": os.path.abspath(run) if os.path.exists(run) else run} | ({"licence": licence} if licence else {})
    metadata = {name: str(value) for name, value in {**origin, **predictions.about}.items()}
    with replacing(file) as opened:
        pq.write_table(table.replace_schema_metadata(metadata), opened)
