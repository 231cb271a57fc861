"""``crosslevel train``: a folder of images goes in, a trained encoder comes out."""

from __future__ import annotations

import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from torch import nn

from crosslevel import report
from crosslevel.cld.loss import CrossLevel
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images
from crosslevel.data.open import open_images, open_unlabelled
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.sources.containers.stream import ImageStream
from crosslevel.data.subsets.lists import write_list
from crosslevel.data.uri import Source, parse
from crosslevel.methods import METHODS, Method
from crosslevel.models.encoder import FILE, Encoder
from crosslevel.runs import Unreadable, changed_images, claim, keep_images, next_commands, save_branches
from crosslevel.settings import describe as settings
from crosslevel.training import report as pages
from crosslevel.training.assemble import assemble
from crosslevel.training.fit import Outcome, fit
from crosslevel.training.inputs import (
    LOOKED_AT,
    Order,
    batches_of,
    counted,
    length,
    prepared,
    say,
    usual_monitor,
    watching,
)
from crosslevel.training.module import Optimizer, Pretrain
from crosslevel.training.monitor import Measure, Which
from crosslevel.training.verdict import verdict
from crosslevel.transforms.views import Views
from crosslevel.utils.device import Device, Hardware, Precision, choose
from crosslevel.utils.distributed import wait
from crosslevel.utils.errors import SourceError


class Watch(Protocol):
    """Another program's eye on a run."""

    def part(self, source: Images) -> Images:
        """What of ``source``, which has no labels, is trained on."""

    def monitor(
        self, encoder: Encoder, method: Method, cld: CrossLevel | None, hardware: Hardware, unreadable: Unreadable
    ) -> Measure | None:
        """What is measured at the end of an epoch, and logged; ``unreadable`` takes what cannot be read for it."""


def train(
    images: str,
    encoder: Encoder,
    cld: CrossLevel,
    views: Views,
    method: Callable[[nn.Module, int | None], Method] | None = None,
    run: str | None = None,
    epochs: float | None = None,
    minutes: float | None = None,
    epoch_size: int | None = None,
    batch_size: int | None = None,
    optimizer: Optimizer = "sgd",
    lr: float | None = None,
    weight_decay: float | None = None,
    warmup_epochs: float | None = None,
    device: Device = "auto",
    devices: int = 1,
    share_hidden: bool = False,
    sync_batchnorm: bool = False,
    precision: Precision = "auto",
    workers: int | None = None,
    memory: float = 4.0,
    order: Order = "shuffled",
    data_root: str | None = None,
    crops: Crops | None = None,
    seed: int = 0,
    log_every: int = 10,
    monitor: Which | None = None,
    monitor_every: int | None = None,
    checkpoint_minutes: float = 10,
    report_html: bool = True,
    resume: str | None = None,
    *,
    watch: Watch | None = None,
) -> Path:
    """Train an encoder on images without labels.

    Leaves in the run's folder: config.yaml (the whole tree of settings), metrics.csv and tensorboard/, checkpoints/,
    encoder.safetensors, report.html, bad_files.txt where a file could not be read, and subset.txt where the source
    has suffixes: the images of that part, which @list=FILE reads back.

    Args:
        images: a folder, a .txt list of files, .tar shards, Parquet files, hf://owner/name, videos, annotations (with
            --crops), cifar10, cifar100, stl10 or turntable; suffixes such as @imbalance=100 or @list=FILE take a part
            (crosslevel subset --help has all). Tar shards as a stream by their address, such as
            https://host/train-{000..009}.tar or s3://bucket/train-*.tar, or as stream:data/*.tar.
        encoder: the network.
        cld: the group branch (CLD); --cld.weight 0 turns it off.
        views: how random views are drawn.
        method: the instance branch: SimCLR (the default), MoCo, InfoMin, BYOL or NPID; --method.help MoCo lists its
            settings.
        run: the run's folder; runs/ and a name made of source and method unless given.
        epochs: passes over the images, or a part of one; chosen by their number unless given (as is all that has no
            default here: the first lines say what was chosen and why, and so does config.yaml).
        minutes: in place of epochs, how long the training may take; a few steps on this machine tell how many epochs
            that is.
        epoch_size: images that count as an epoch of a stream, which has no known number of images.
        batch_size: images a step, on each device; at most 256, fewer of a small collection, unless given.
        optimizer: sgd (momentum 0.9), adamw or lars.
        lr: the highest learning rate; all devices' batch / 256 times 0.001 (adamw), 0.3 (lars), or for sgd 0.06 (as in
            the recipes of Wang et al. 2021; SimCLR: 0.5), unless given.
        weight_decay: 0.0005 (sgd), 0.05 (adamw) or 0.000001 (lars) unless given.
        warmup_epochs: epochs of linear warm-up; a tenth of all, at most 5, unless given.
        device: auto takes CUDA, then Apple's MPS, then the CPU.
        devices: how many of them; several train distributed.
        share_hidden: the instance and the group head, both MLPs, have their hidden layer in common, as in the ImageNet
            recipes.
        sync_batchnorm: normalize over the batches of all devices.
        precision: auto takes bfloat16 where the hardware computes it.
        workers: processes that decode images larger than a view; one a core, at most 8, unless given.
        memory: gigabytes that decoded images may take; more are decoded anew in each epoch.
        order: shuffled, or natural: batches are runs of consecutive images, as a camera delivers them.
        data_root: folder with the official files of cifar10, cifar100 and stl10.
        crops: objects cut out of annotated images, such as VOC2007:trainval; --crops alone takes its usual settings.
        seed: of everything random: the same seed gives the same run.
        log_every: steps between rows of metrics.csv.
        monitor: figures of the features in the log that never influence the training: knn (accuracy, by the source's
            labels), label_free (scores of two views of 2,000 of the images, not removed from the training) or both; knn
            where the source has labels, label_free elsewhere, unless given.
        monitor_every: epochs between these figures; a tenth of all unless given; 0 for none.
        checkpoint_minutes: most minutes between checkpoints within an epoch.
        report_html: write report.html at the end.
        resume: folder of a run to continue, with its own settings.
        watch: what is trained on, and what is measured in place of kNN accuracies; no option.

    Returns:
        the run's folder.

    """
    given, began, origin = dict(locals()), time.monotonic(), parse(images)
    console = Console(soft_wrap=True)
    hardware = choose(device, precision)
    _announce(console, hardware, encoder)
    opened = source = _opened(origin, data_root, crops, watch)
    bad = BadFiles() if isinstance(source, ImageStream) else source.bad_files()
    total = length(source, epoch_size)
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    source = prepared(source, encoder, views, memory, bad, console)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    plan = assemble(
        source, encoder, cld, views, method, epoch_size=epoch_size, epochs=epochs, minutes=minutes,
        batch_size=batch_size, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs,
        devices=devices, share=share_hidden, hardware=hardware, rank=rank,
        made=lambda size: batches_of(
            source, views, size, epoch_size, order, seed=seed, bad=bad, workers=workers, rank=rank, world=devices
        ),
    )  # fmt: skip
    chosen, branch, batches = plan.method, plan.cld, plan.batches
    every = max(1, int(plan.settings["epochs"]) // 10) if monitor_every is None else monitor_every
    folder = Path(resume) if resume else claim(run, origin.short, _kind(chosen, branch), rank)
    if resume:
        say(console, changed_images(folder, opened))
    elif rank == 0:
        resolved = {
            "images": origin.absolute().text,
            "workers": workers,
            "monitor": monitor or usual_monitor(source),
            "monitor_every": every,
            "precision": hardware.precision,
        }
        tree = _tree({**given, **plan.settings, **resolved})
        settings.write(tree, folder / "config.yaml", [f"chosen: {choice}" for choice in plan.choices])
        _keep_images(origin, opened, folder)
    module = Pretrain(
        encoder, chosen, branch, views, steps=plan.steps, warmup_steps=plan.warmup_steps, optimizer=optimizer,
        lr=plan.settings["lr"], weight_decay=plan.settings["weight_decay"], seed=seed,
    )  # fmt: skip
    say(
        console,
        f"{counted(source)}, {len(batches):,} steps an epoch, {views.count} views of {views.size} pixels; "
        f"{type(chosen).__name__}{' + CLD' if branch else ''} on {encoder.name}; run: {folder}",
    )
    for choice in () if resume else plan.choices:
        say(console, f"chosen: {choice}")
    unreadable = Unreadable(bad, folder, rank, resume is not None)
    try:
        outcome = fit(
            module, batches, folder, hardware=hardware, devices=devices, sync_batchnorm=sync_batchnorm,
            log_every=log_every, checkpoint_minutes=checkpoint_minutes, saved=unreadable.keep,
            resume=resume is not None, console=console, monitor_every=every,
            monitor=_watched(watch, encoder, chosen, branch, hardware, unreadable) if watch or not every else
            watching(monitor, encoder, chosen, branch, source, hardware, seed),
        )  # fmt: skip
    finally:
        unreadable.keep()
    wait()
    following = next_commands(
        folder, "IMAGES" if total is None else images, source.labels is not None, data_root, crops
    )
    if rank == 0:
        encoder.save(folder / FILE)
        save_branches(folder, chosen.branch, chosen.head, branch)
        unreadable.merge()
        if len(bad):
            say(console, bad.summary(total))
        if outcome.finished and watch is None:
            _say_the_truth(encoder, source, hardware, seed, console)
        if outcome.finished and report_html:
            _write_report(folder, encoder, branch, source, hardware, seed, following)
        _farewell(folder, chosen, following, outcome, module.steps, time.monotonic() - began, console)
    if outcome.signal is not None:
        sys.exit(128 + outcome.signal)
    return folder


def _opened(images: Source, data_root: str | None, crops: Crops | None, watch: Watch | None) -> Images | ImageStream:
    if watch is not None:
        return watch.part(open_unlabelled(images, data_root=data_root, crops=crops))
    return open_images(images, data_root=data_root, crops=crops, streams=True)


def _announce(console: Console, hardware: Hardware, encoder: Encoder) -> None:
    say(console, f"device: {hardware.why}")
    if encoder.weights is not None:
        say(console, f"{encoder.weights}: {encoder.loaded}")


def _kind(method: Method, cld: CrossLevel | None) -> str:
    return f"{type(method).__name__.lower()}{'' if cld is None else '-cld'}"


def _keep_images(images: Source, source: Images | ImageStream, folder: Path) -> None:
    """Note which images the run begins with, and of a part the list: it outlives a change of what it is drawn from."""
    keep_images(folder, source)
    if isinstance(source, Images) and images.has_subset:
        write_list(source, folder / "subset.txt")


def _watched(
    watch: Watch | None,
    encoder: Encoder,
    method: Method,
    cld: CrossLevel | None,
    hardware: Hardware,
    unreadable: Unreadable,
) -> Measure | None:
    return watch.monitor(encoder, method, cld, hardware, unreadable) if watch else None


def _tree(values: dict[str, Any]) -> dict[str, Any]:
    """The run's settings as the command line has them, with everything that was chosen filled in."""
    return {
        **{k: v for k, v in values.items() if k not in ("run", "resume", "watch")},
        "crops": None if values["crops"] is None else settings.describe(values["crops"]),
        "encoder": settings.describe(values["encoder"]),
        "cld": settings.describe(values["cld"], skip=("in_features",)),
        "views": settings.describe(values["views"]),
    }


def _write_report(
    folder: Path,
    encoder: Encoder,
    cld: CrossLevel | None,
    source: Images | ImageStream,
    hardware: Hardware,
    seed: int,
    following: list[str],
) -> None:
    if cld is not None:
        cld.gather = False  # the other ranks are not here
    blocks = [
        *pages.warning_blocks(folder),
        *pages.curve_blocks({"run": folder}),
        *_feature_blocks(encoder, cld, source, hardware, seed),
        report.commands("Next", following),
        report.settings("Settings", (folder / "config.yaml").read_text(encoding="utf-8")),
    ]
    subtitle = f"{counted(source)} of {source.name} · {hardware.why} · {time.strftime('%Y-%m-%d')}"
    report.page(folder / "report.html", f"Training run {folder.name}", blocks, subtitle)


def _say_the_truth(
    encoder: Encoder, source: Images | ImageStream, hardware: Hardware, seed: int, console: Console
) -> None:
    try:
        shown = source.some(LOOKED_AT) if isinstance(source, ImageStream) else source
        found = verdict(encoder, shown, hardware, seed)
    except SourceError as error:
        warnings.warn(f"the features are not compared with raw pixels: {error}", stacklevel=2)
        return
    if found is not None:
        say(console, found.line())


def _feature_blocks(
    encoder: Encoder, cld: CrossLevel | None, source: Images | ImageStream, hardware: Hardware, seed: int
) -> list[report.Block]:
    try:
        shown = source.some(LOOKED_AT) if isinstance(source, ImageStream) else source
    except SourceError as error:
        warnings.warn(f"report.html goes without pictures: {error}", stacklevel=2)
        return []
    return pages.feature_blocks(encoder, cld, shown, hardware, seed)


def _farewell(
    folder: Path, method: Method, following: list[str], outcome: Outcome, steps: int, seconds: float, console: Console
) -> None:
    if not outcome.finished:
        say(
            console,
            f"stopped at step {outcome.steps:,} of {steps:,}; the encoder so far is {folder / FILE}; to go on:",
        )
        own = "" if type(method) in METHODS.values() else f" --method {type(method).__module__}.{type(method).__name__}"
        say(console, f"  crosslevel train --resume {shlex.quote(str(folder))}{own}")
        return
    left = [folder / FILE, *folder.glob("report.html")]
    say(console, f"done in {seconds / 60:.1f} min: {', '.join(map(str, left))}; next:")
    for line in following:
        say(console, f"  {line}")
