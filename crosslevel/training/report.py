"""The page of a run: curves, CLD's groups, neighbours, a map of the features."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import torch
from torch import Tensor

from crosslevel import report
from crosslevel.cld.loss import CrossLevel
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images, InMemoryImages
from crosslevel.data.loaders.batches import pack
from crosslevel.data.sources.containers.stream import ImageStream
from crosslevel.data.sources.folder import files_of
from crosslevel.data.subsets.select import sample, take
from crosslevel.features.extract import extract
from crosslevel.models.encoder import Encoder
from crosslevel.runs import Run
from crosslevel.training.inputs import STREAM_SAMPLE, size_of
from crosslevel.utils.device import Hardware
from crosslevel.utils.errors import SourceError
from crosslevel.utils.rng import seeded

MAPPED = 1500  # images on the map: t-SNE of them takes seconds
BATCH = 256  # images for which CLD's groups are shown, as many as in a training step


def write(
    run: Run,
    encoder: Encoder,
    cld: CrossLevel | None,
    source: Images | ImageStream,
    hardware: Hardware,
    seed: int,
    following: list[str],
    verdict: str = "",
) -> None:
    """Write the run's page: the verdict, warnings, curves, features of some images, and the ``following`` commands."""
    blocks = [
        *warning_blocks(run.path),
        *curve_blocks({"run": run.path}),
        *_sampled_blocks(encoder, cld, source, hardware, seed),
        report.commands("Next", following),
        report.settings("Settings", run.config.read_text(encoding="utf-8")),
    ]
    subtitle = f"{size_of(source)} of {source.name} · {hardware.reason} · {time.strftime('%Y-%m-%d')}"
    report.page(run.report, f"Training run {run.path.name}", blocks, subtitle, verdict)


def _sampled_blocks(
    encoder: Encoder, cld: CrossLevel | None, source: Images | ImageStream, hardware: Hardware, seed: int
) -> list[report.Block]:
    try:
        subset = source.sample(STREAM_SAMPLE) if isinstance(source, ImageStream) else source
    except SourceError as error:
        warnings.warn(f"report.html goes without pictures: {error}", stacklevel=2)
        return []
    return feature_blocks(encoder, cld, subset, hardware, seed)


def warning_blocks(folder: Path) -> list[report.Block]:
    """The run's warnings, if there are any."""
    file = Run(folder).warnings
    lines = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    return [report.text("Warnings", lines)] if lines else []


def curve_blocks(runs: dict[str, Path]) -> list[report.Block]:
    """Loss and kNN curves of one or several runs, read from each folder's metrics.csv."""
    metrics = {name: report.read_metrics(Run(folder).metrics) for name, folder in runs.items()}
    several = len(runs) > 1
    blocks = []
    for column, heading, label in (
        ("instance_loss" if several else "loss", "Instance loss" if several else "Loss", "loss"),
        ("knn", "kNN accuracy during training", "%"),
        ("combined", "Label-free score during training", "score"),
        ("effective_rank", "Effective rank of the features", "directions"),
        ("group_agreement", "Agreement of the two views' groups", "share of images"),
    ):
        series = {name: m[column] for name, m in metrics.items() if m.get(column)}
        if column == "loss" and "group_loss" in next(iter(metrics.values())):
            only = next(iter(metrics.values()))
            series = {
                "total": only["loss"],
                "instance branch": only["instance_loss"],
                "group branch": only["group_loss"],
            }
        if column == "combined" and series and not several:
            only = next(iter(metrics.values()))
            series = {label: only[name] for name, label in PARTS.items() if only.get(name)}
        if series:
            blocks.append(report.curves(heading, series, "epoch", label, NOTES.get(column, "")))
    return blocks


PARTS = {
    "combined": "combined", "mrr": "retrieval of the other view", "ami": "agreement of clusterings, views",
    "ami_levels": "agreement of clusterings, branches",
}  # fmt: skip
NOTES = {
    "combined": "Of two views of the same images, without labels: how surely one is found by the other (mean "
    "reciprocal rank) times a root of the share of directions in which features differ (effective rank); our "
    "own. Beside it, how far clusterings of both views, and of both branches, agree (adjusted mutual information).",
    "effective_rank": "In how many directions the features differ; near 1 they have collapsed.",
    "knn": "A monitor on a sample of the training images; it never influences the training. Near-duplicates that are "
    "not known as frames of one track make it higher than the accuracy on new images.",
    "group_agreement": "How often an image's most similar group in its other view is that view's own group for it.",
}


def feature_blocks(
    encoder: Encoder, cld: CrossLevel | None, images: Images, hardware: Hardware, seed: int = 0
) -> list[report.Block]:
    """Groups, neighbours and map of a random sample of ``images``."""
    generator = seeded(seed)
    indices = sample(images, MAPPED, generator)
    packed = pack(take(images, indices), encoder.view.size, bad_files=BadFiles())
    features = extract(encoder, packed, hardware=hardware).features
    blocks, files = [], files_of(packed)
    if cld is not None:
        blocks.append(_groups(cld, packed, features, generator, files))
    queries = torch.randperm(len(packed), generator=generator)[:8].tolist()
    tracks = images.tracks[indices] if images.tracks is not None and len(packed) == len(indices) else None
    rows = report.neighbour_rows(
        packed.data, features, queries, labels=packed.labels, classes=packed.classes, exclude=tracks,
        files=files,
    )  # fmt: skip
    exclusion = " Other frames of the query's own track are left out." if tracks is not None else ""
    blocks.append(report.image_rows("Nearest neighbours", rows, f"By cosine similarity of the features.{exclusion}"))
    blocks.append(
        report.map2d(
            "Map of the features",
            report.project(features, seed=seed),
            packed.data,
            packed.labels,
            packed.classes,
            note=f"t-SNE of {len(packed):,} images: near each other means similar features.",
            paths=packed.paths,
        )
    )
    return blocks


def _groups(
    cld: CrossLevel,
    images: InMemoryImages,
    features: Tensor,
    generator: torch.Generator,
    files: list[tuple[str, str | None]],
) -> report.Block:
    batch = torch.randperm(len(images), generator=generator)[:BATCH].sort().values
    device = next(cld.parameters()).device
    with torch.no_grad():
        z = cld.project(features[batch].to(device))
        groups = cld.group(z)
        similarity = (z * groups.centroids[groups.assignment]).sum(1)
    rows = report.group_rows(
        images.data[batch], groups.assignment.cpu(), similarity.cpu(), files=[files[i] for i in batch.tolist()]
    )
    note = (
        f"One batch of {len(batch)} images in {int((groups.sizes > 0).sum())} groups by {groups.solver}: the local "
        "groups that each image's other view is compared with."
    )
    return report.image_rows("Groups that CLD finds", rows, note)
