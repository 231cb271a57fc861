"""``crosslevel train``: a folder of images goes in, a trained encoder comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from crosslevel.cld.harmonization import Harmonization
from crosslevel.cld.loss import CrossLevel
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.uri import is_remote, parse
from crosslevel.methods import Method
from crosslevel.models.encoder import Encoder
from crosslevel.runs import Run, Unreadable, claimed, restarted
from crosslevel.training.cluster.launch import Launcher, Request, by_ray
from crosslevel.training.finish import finish, resume_command
from crosslevel.training.inputs import Order, watching
from crosslevel.training.job import Job, keep_settings, prepare
from crosslevel.training.loop.fit import Loggers, Outcome, fit
from crosslevel.training.loop.graph import Compile
from crosslevel.training.loop.loggers import logger_names
from crosslevel.training.loop.module import Optimizer, Pretrain
from crosslevel.training.loop.sharding import Strategy
from crosslevel.training.monitor import Measure, Watch, Which
from crosslevel.training.options import Data, Logging, Makers, Optimization, Runtime, check_numbers
from crosslevel.transforms.views import Views
from crosslevel.utils.console import printer, say
from crosslevel.utils.device import Device, Precision, choose
from crosslevel.utils.distributed import wait
from crosslevel.utils.errors import Interrupted, MachineError, UserError
from crosslevel.utils.marks import verb
from crosslevel.utils.processes import launched, world


@verb(
    "method", "run", "epochs", "minutes", "batch_size", "recipe", "config", "resume", "encoder.name", "views.preset",
    "cld.weight", "lr", "device", "devices", "seed",
)  # fmt: skip
def train(
    images: str,
    encoder: Callable[[], Encoder] = Encoder,
    cld: Callable[[int], CrossLevel] | None = CrossLevel,
    views: Callable[[], Views] = Views,
    method: Callable[[nn.Module, int | None], Method] | None = None,
    run: str | None = None,
    epochs: float | None = None,
    minutes: float | None = None,
    epoch_size: int | None = None,
    batch_size: int | None = None,
    optimizer: Optimizer | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    warmup_epochs: float | None = None,
    device: Device = "auto",
    devices: int = 1,
    nodes: int = 1,
    strategy: Strategy = "ddp",
    launcher: Launcher = "local",
    max_failures: int = 3,
    share_hidden: bool = False,
    sync_batchnorm: bool = False,
    precision: Precision = "auto",
    compile: Compile = "off",
    workers: int | None = None,
    memory: float = 4.0,
    order: Order = "shuffled",
    track_positives: float = 0.0,
    hold_out: int | None = None,
    data_root: str | None = None,
    crops: Crops | None = None,
    seed: int = 0,
    log_every: int = 10,
    monitor: Which | None = None,
    monitor_every: int | None = None,
    checkpoint_minutes: float = 10,
    report_html: bool = True,
    resume: str | None = None,
    quiet: bool = False,
    gh: Callable[[int], Harmonization] | None = Harmonization,
    encoder_rate: float | None = None,
    layer_decay: float | None = None,
    stop_fall: bool = True,
    logger: str | None = None,
    accumulate: int = 1,
    *,
    watch: Watch | None = None,
    loggers: Sequence[Any] = (),
    callbacks: Sequence[Any] = (),
) -> Path:
    """Train an encoder on images without labels.

    Leaves in the run's folder: config.yaml (the whole tree of settings), metrics.csv, tensorboard/ where it is
    installed, checkpoints/, encoder.safetensors, report.html, bad_files.txt where a file could not be read, and
    subset.txt where the source has suffixes: the images of that part, which @list=FILE reads back.

    Args:
        images: a folder, a .txt list of files, .tar shards, Parquet files, hf://owner/name, videos, annotations (with
            --crops), cifar10, cifar100, stl10 or turntable; suffixes such as @imbalance=100 or @list=FILE take a part
            (crosslevel subset --help has all). Tar shards as a stream by their address, such as
            https://host/train-{000..009}.tar or s3://bucket/train-*.tar, or as stream:data/*.tar.
        encoder: the network.
        cld: the group branch (CLD); --cld.weight 0 turns it off.
        views: how random views are drawn.
        method: the instance branch: SimCLR (the default), MoCo, InfoMin, BYOL, NPID, SimSiam, VICReg, SwAV, DINO or
            Distill; --method.help MoCo lists its settings.
        run: the run's folder, which may be in an object store (s3://bucket/runs/photos); runs/ and a name made of
            source and method unless given.
        epochs: passes over the images, or a part of one; chosen by their number unless given. All settings without a
            default here are chosen: the first lines and config.yaml say what was chosen, and why.
        minutes: in place of epochs, how long the training may take; a few measured steps on this machine give the
            number of epochs.
        epoch_size: images that count as an epoch of a stream, which has no known number of images.
        batch_size: images a step, on each device; at most 256, fewer of a small collection, unless given.
        optimizer: sgd (momentum 0.9), adamw or lars; adamw for ViTs, ConvNeXts and the like, else lars for VICReg and
            sgd for all other methods, unless given.
        lr: the highest learning rate; all devices' batch / 256 times 0.001 (adamw), 0.3 (lars), or for sgd 0.06 (as in
            the recipes of Wang et al. 2021; SimCLR: 0.5, SimSiam: 0.05, DINO: 0.03), unless given.
        weight_decay: 0.0005 (sgd), 0.05 (adamw) or 0.000001 (lars) unless given.
        warmup_epochs: epochs of linear warm-up; a tenth of all, at most 5, unless given.
        device: auto takes CUDA, then Apple's MPS, then the CPU.
        devices: how many of them on each machine; several train distributed.
        nodes: machines, each with one such command, which find each other by SLURM's variables, or by NODE_RANK,
            MASTER_ADDR and MASTER_PORT; under torchrun leave both out. Name the run (--run), on a disk that all share.
        strategy: for several devices: ddp has the whole model on each; fsdp (FSDP2) has a part of the encoder's
            weights, gradients and optimizer state on each, for an encoder that does not fit, with sharded checkpoints.
            The losses are the same.
        launcher: ray has a Ray cluster (RAY_ADDRESS, or this machine) start the commands of all machines, and all of
            them again from the last checkpoint when one is lost. Name the run (--run); all machines must be able to
            reach run and images.
        max_failures: the most restarts by the launcher.
        share_hidden: the instance and the group head, both MLPs, share their hidden layer, as in the ImageNet recipes.
        sync_batchnorm: normalize over the batches of all devices.
        precision: auto takes bfloat16 where the hardware computes it.
        compile: off by default, until tests on a GPU have shown equal results; auto makes the step one CUDA graph, with
            a compiled encoder, on one CUDA device in a run that is long enough to pay for it; on compiles in any case
            (on a CPU the encoder).
        workers: processes that decode images larger than a view; one a core that this process may use, at most 8,
            unless given.
        memory: gigabytes that decoded images may take; more are decoded anew in each epoch.
        order: shuffled, or natural: batches are runs of consecutive images, as a camera delivers them.
        track_positives: probability that the second view of an image is drawn from another image of its track
            (Pantazis et al. 2021); videos, turntable and @repeat have tracks, @bursts makes some of folders or of a
            duplicates.csv.
        hold_out: images that are not trained on, to evaluate the features at the end. Unless given, a twentieth, at
            most 500, if there are 1,000 images or more without labels, else none. Tracks stay together.
        data_root: folder with the official files of cifar10, cifar100 and stl10.
        crops: objects cut out of annotated images, such as VOC2007:trainval; --crops alone takes its usual settings.
        seed: of everything random: the same seed gives the same run.
        log_every: steps between rows of metrics.csv.
        monitor: figures of the features in the log that never influence the training: knn (accuracy, by the source's
            labels), label_free (scores of two views of 2,000 of the images, not removed from the training) or both; knn
            where the source has labels, label_free elsewhere, unless given.
        monitor_every: epochs between these figures; a tenth of all unless given; 0 for none.
        checkpoint_minutes: most minutes between checkpoints; one is written after each epoch, too, unless writing takes
            a twentieth of the time since the last one or more.
        report_html: write report.html at the end.
        resume: folder of a run to continue, with its own settings.
        quiet: print nothing.
        gh: geometric harmonization of the instance features, for a long tail (Zhou et al. 2023), beside CLD or alone;
            off unless --gh.weight is given, 1 in the paper.
        encoder_rate: the encoder's share of the learning rate; 0.1 where it starts from weights, else 1, unless given.
        layer_decay: each layer's learning rate as a share of that of the layer above it; 0.75 for a ViT or ConvNeXt
            that starts from weights, else 1, unless given.
        stop_fall: for an encoder that starts from weights: when the monitor's figure falls clearly below that of the
            start, the training ends with the best encoder so far.
        logger: loggers beside metrics.csv: tensorboard, wandb or mlflow, or several joined by commas; csv for
            metrics.csv alone. Unless given, TensorBoard if it is installed.
        accumulate: parts of each device's batch that are computed one after the other, for a batch that does not fit;
            their gradients make one step. Batch normalization, CLD's groups and losses that compare the batch's images
            see a part.
        watch: another program that chooses the training images and measures in place of the monitor; no option.
        loggers: further loggers, objects with Lightning's ``log_metrics``, ``log_hyperparams`` and ``finalize``; no
            option.
        callbacks: objects of which ``on_train_start(run, module)``, ``on_log(step, figures, module)`` and
            ``on_train_end(run, module)`` are called where they have them; no option.

    From Python, ``encoder``, ``cld``, ``gh`` and ``views`` are factories of these parts, such as
    ``functools.partial(Encoder, "resnet50")``, so that ``seed`` determines their initial weights; a part itself is
    copied with its weights.

    Returns:
        the run's folder.

    Raises:
        Interrupted: a signal ended the run; it is saved, and can be resumed.
        NotFinite: the loss is no longer a number.
        ValueError: settings or images do not fit; the message says what to change.
        OSError: something cannot be read or written.

    Examples:
        >>> run = crosslevel.train("photos/", epochs=100, method="MoCo", cld={"groups": 128})
        >>> encoder = crosslevel.load_encoder(run)

    """
    data = Data(
        images=parse(images), data_root=data_root, crops=crops, epoch_size=epoch_size, order=order,
        track_positives=track_positives, hold_out=hold_out, memory=memory, workers=workers,
    )  # fmt: skip
    steps = Optimization(
        epochs=epochs, minutes=minutes, batch_size=batch_size, optimizer=optimizer, lr=lr, weight_decay=weight_decay,
        warmup_epochs=warmup_epochs, encoder_rate=encoder_rate, layer_decay=layer_decay, accumulate=accumulate,
    )  # fmt: skip
    logging = Logging(
        log_every=log_every, monitor=monitor, monitor_every=monitor_every, checkpoint_minutes=checkpoint_minutes,
        report_html=report_html, stop_fall=stop_fall, logger=logger,
    )  # fmt: skip
    check_numbers(data, steps, logging, seed)
    if launcher == "ray" and not launched():
        if run is None and resume is None:
            raise UserError("--launcher ray: give the run a name that all machines know: --run runs/NAME")
        return by_ray(Request(resume or run or "", devices, nodes, device), max_failures, printer(quiet))
    ranks, boards = world(devices, nodes), Loggers(logger_names(logger), loggers)
    resume = restarted(run, resume, ranks)
    runtime = Runtime(
        device=device, hardware=choose(device, precision), world=ranks, sync_batchnorm=sync_batchnorm, seed=seed,
        compile=compile, strategy=strategy, launcher=launcher, max_failures=max_failures,
    )  # fmt: skip
    if strategy == "fsdp" and ranks.nodes > 1 and is_remote(resume or run or ""):
        raise UserError("--strategy fsdp on several machines: give --run a folder on a disk that they share")
    makers = Makers(encoder=encoder, cld=cld, views=views, method=method, gh=gh, share_hidden=share_hidden)
    job = prepare(data, steps, runtime, logging, makers, watch, printer(quiet), resume is not None)
    with claimed(run, job.name, resume, runtime.world.rank) as folder:
        unreadable = _begin(job, folder)
        outcome = _learn(job, folder, unreadable, boards, callbacks)
        wait()
        if runtime.world.rank == 0:
            finish(job, folder, outcome, unreadable)
    if outcome.signal is not None and not outcome.finished:
        raise Interrupted(outcome.signal, str(folder))
    return folder.path


def _begin(job: Job, folder: Run) -> Unreadable:
    """Print what the training will do, and record in a new run's folder what it begins with.

    Raises:
        UserError: a continued run has other images, and its method does not allow that.

    """
    if job.resumed:
        say(job.console, job.changed_images(folder))
        say(job.console, job.changed_batch(folder))
    elif job.runtime.world.rank == 0:
        keep_settings(job, folder)
    say(job.console, f"{job.overview}; run: {folder}")
    for line in () if job.resumed else job.notes:
        say(job.console, line)
    return Unreadable(job.feed.bad_files, folder.path, job.runtime.world.rank, job.resumed)


def _learn(job: Job, folder: Run, unreadable: Unreadable, loggers: Loggers, callbacks: Sequence[Any]) -> Outcome:
    """Run all the steps."""
    runtime, logging, module = job.runtime, job.logging, _module(job)

    def saved() -> None:
        unreadable.keep()
        if runtime.world.rank == 0:
            _send(job, folder)

    try:
        return fit(
            module, job.plan.batches, folder.path, hardware=runtime.hardware, ranks=runtime.world,
            sync_batchnorm=runtime.sync_batchnorm, log_every=logging.log_every,
            checkpoint_minutes=logging.checkpoint_minutes, monitor=_measure(job, unreadable),
            monitor_every=logging.monitor_every or 0, resume=job.resumed, saved=saved, console=job.console,
            compile=runtime.compile, stop_fall=logging.stop_fall, loggers=loggers, callbacks=callbacks,
            strategy=runtime.strategy,
        )  # fmt: skip
    except OSError:
        if module.step and folder.last.exists():
            say(job.console, f"to continue what was saved: {resume_command(folder, job.components)}")
        raise
    finally:
        unreadable.keep()


def _send(job: Job, folder: Run) -> None:
    """Send a checkpoint to the object store, if the run lies in one; after a failure, the next one tries again."""
    try:
        folder.send()
    except MachineError as error:
        say(job.console, f"{error}; tried again with the next checkpoint")


def _measure(job: Job, unreadable: Unreadable) -> Measure | None:
    """The measurement between epochs."""
    components, runtime = job.components, job.runtime
    if job.watch is not None:
        return job.watch.monitor(components.encoder, components.method, components.cld, runtime.hardware, unreadable)
    if not job.logging.monitor_every:
        return None
    return watching(
        job.logging.monitor,
        components.encoder,
        components.method,
        components.cld,
        job.feed.source,
        runtime.hardware,
        runtime.seed,
    )


def _module(job: Job) -> Pretrain:
    components, plan, rates = job.components, job.plan, job.plan.optimization
    return Pretrain(
        components.encoder, components.method, components.cld, components.views, steps=plan.steps,
        warmup_steps=plan.warmup_steps, optimizer=rates.optimizer, lr=rates.lr, weight_decay=rates.weight_decay,
        seed=job.runtime.seed, epoch_steps=len(plan.batches), gh=components.gh, encoder_rate=rates.encoder_rate,
        layer_decay=rates.layer_decay, accumulate=rates.accumulate,
    )  # fmt: skip
