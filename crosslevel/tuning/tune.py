"""``crosslevel tune``: search for better settings for an unlabelled collection."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console

from crosslevel.data.images import Images
from crosslevel.data.open import open_unlabelled
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.uri import Source, parse
from crosslevel.settings import describe as settings
from crosslevel.settings import trust
from crosslevel.training import defaults
from crosslevel.training.train import train
from crosslevel.tuning import report as results
from crosslevel.tuning import search_space as ranges
from crosslevel.tuning import trial
from crosslevel.tuning.plan import Effort, Plan, url
from crosslevel.utils.console import printer, say
from crosslevel.utils.device import choose
from crosslevel.utils.errors import MissingExtra, UserError
from crosslevel.utils.locks import HAS_LOCKS
from crosslevel.utils.marks import verb, with_options_of
from crosslevel.utils.processes import keeping

if TYPE_CHECKING:
    from crosslevel.tuning.study import Search


@with_options_of(train, but=("images", "run", "resume"))
@verb(
    "search", "output", "budget", "trials", "jobs", "storage", "finalists", "method", "recipe", "config", "epochs",
    "batch_size", "encoder.name", "device", "seed",
)  # fmt: skip
def tune(
    images: str,
    search: list[str] | None = None,
    output: str | None = None,
    budget: float | None = None,
    trials: int | None = None,
    jobs: int = 1,
    storage: str | None = None,
    sampler: Literal["tpe", "random"] = "tpe",
    pruning: bool = True,
    finalists: int | None = None,
    *,
    settings: dict[str, Any],
    training: trial.Training = trial.training,
) -> Path:
    """Search for better settings of crosslevel train, without labels.

    Every trial is a training on nine tenths of the images. After each epoch its features of two views of the other
    tenth are scored, without labels; trials that fall behind are stopped. All options of crosslevel train are options
    here too, and hold for all trials. The first trial has the given settings, or the nearest ones in the ranges; the
    second has them without CLD. The same command continues a killed search; several such commands at once share the
    work. Leaves in the folder: config.yaml (the best settings, for crosslevel train --config), trials.csv, report.html,
    study.db, and trials/ with a run each.

    Args:
        images: as for crosslevel train; labels are not read.
        search: a setting of train and its range, NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B,C; may be given several
            times, such as --search cld.weight=0:1 --search lr=1e-3:1:log --search views.preset=cifar,simclr. Unless
            given: cld.weight, cld.groups, cld.temperature, method.temperature and lr, around the settings given.
        output: the search's folder (-o); unless given, runs/tune/ and a name made of source, method and the identity of
            the images.
        budget: the number of full trainings that the whole search may cost, all workers together; a stopped trial costs
            its share. 12 unless this or trials is given.
        trials: the most trials, including stopped ones, without the finalists' second trainings.
        jobs: trials at a time in this call, sharing the processor's cores.
        storage: a database that workers on several machines share, postgresql://USER:PASSWORD@HOST/DATABASE; they are
            called with the same --output name. A file in the folder unless given.
        sampler: tpe learns from earlier trials, random does not.
        pruning: stop trials that are behind after a ninth and a third of the epochs (successive halving).
        finalists: this many of the best trials, and the settings as given, are trained once more with another seed at
            the end, within the budget, and the mean score decides: a single training's score is partly luck. Unless
            given, one for every four full trainings of the budget, minus one: 2 of 12.
        settings: the settings of train, as a tree; no option. From Python each of them is a separate argument, as in
            train().
        training: a function that trains with a trial's settings and yields its scores; no option.

    Returns:
        the folder.

    """
    study = _study()
    console = printer(settings.get("quiet", False))
    effort = Effort(budget, trials, sampler, pruning, finalists)
    source = parse(images)
    plan = _plan(source, search, output, storage, effort, settings, console)
    if jobs < 1:
        raise UserError(f"jobs={jobs}: give at least 1")
    searching = study.Search(plan)
    try:
        say(console, f"{plan.folder}: {results.summary(searching.study, plan)}")
        for name, searched in plan.space.items():
            say(console, f"  {name}={ranges.range_text(searched)}")
        with keeping(lambda: _progress(searching)):
            try:
                _work(searching, images, settings, jobs, console, training)
            except BaseException:
                # The results so far are shown, whatever ended the search.
                with contextlib.suppress(ValueError):
                    results.leave(searching.study, plan, source, settings, console)
                raise
            results.leave(searching.study, plan, source, settings, console)
    finally:
        searching.close()
    return plan.folder


def _progress(searching: Search) -> str:
    """Describe a stopped search's progress; empty if its database is unreachable."""
    try:
        ended = len(results.ended(searching.study))
    except Exception:  # any library behind the study may fail, and the search ends anyway
        return "the same command continues there"
    return f"{ended:,} trials have ended and are kept; the same command continues there"


def _study() -> Any:
    if not HAS_LOCKS:
        raise UserError("crosslevel tune tells living workers by the locks of Linux and macOS: run it on one of them")
    try:
        from crosslevel.tuning import study  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{error.name} is missing: pip install 'crosslevel[tune]'") from error
    return study


def _plan(
    source: Source,
    search: list[str] | None,
    output: str | None,
    storage: str | None,
    effort: Effort,
    config: dict[str, Any],
    console: Console,
) -> Plan:
    """The plan of all workers; ``config`` gets the epochs and the batch size that all trials share."""
    budget, finalists = effort.settled(config["epochs"], config["minutes"])
    crops = None if config["crops"] is None else Crops(**config["crops"])
    images = open_unlabelled(source, data_root=config["data_root"], crops=crops)
    part, _ = trial.divided(images, config["seed"])
    _choose_length(config, len(part))
    epochs, warmup = config["epochs"], config["warmup_epochs"]
    space = ranges.parse(search, config) if search else ranges.default_space(config, len(part))
    identity = _identity(source, images)
    folder = Path(output) if output else Path("runs") / "tune" / f"{_name(source, config)}-{identity[-6:]}"
    starts, as_given = _starts(space, config, console)
    agreed = {
        **{name: value for name, value in config.items() if name not in ranges.MACHINE},
        "images": identity,
        "search": {name: ranges.range_text(searched) for name, searched in space.items()},
        "sampler": effort.sampler,
        "pruning": effort.pruning,
    }
    bad_files = images.bad_files()
    if len(bad_files):
        say(console, bad_files.summary(len(images)))
    return Plan(
        folder=folder, storage=url(storage, folder), space=space, start=starts, epochs=epochs, budget=budget,
        trials=effort.trials, sampler=effort.sampler, pruning=effort.pruning, seed=config["seed"], agreed=agreed,
        as_given=as_given, finalists=finalists, images=len(images), bad_files=bad_files,
        warmup=max(defaults.warmup_epochs(epochs).value if warmup is None else warmup, epochs / 3),
    )  # fmt: skip


def _choose_length(config: dict[str, Any], images: int) -> None:
    """Choose epochs and batch size by the number of a trial's training images: they are the same for all trials."""
    config["epochs"] = epochs = math.ceil(config["epochs"] or defaults.epochs(images).value)
    batch = defaults.batch_size(images, epochs, config["devices"], choose(config["device"]).device.type)
    config["batch_size"] = config["batch_size"] or batch.value


def _starts(
    space: dict[str, ranges.Range], config: dict[str, Any], console: Console
) -> tuple[list[dict[str, Any]], bool]:
    """The first trials' parameters: as given or the nearest, and without CLD; and whether the first are as given."""
    values = {name: ranges.value_at(config, name) for name in space}
    start, beyond = ranges.clipped(space, values), ranges.outside(space, values)
    for name in beyond:
        first = f"trial 0 has {start[name]}" if name in start else "trial 0 has one by chance"
        setting = f"{name} is left open" if values[name] is None else f"{name}={values[name]}"
        say(console, f"{setting}, which is not in {ranges.range_text(space[name])}: {first}")
    if searched := [name for name in space if name.startswith("views.")]:
        say(console, f"{', '.join(searched)}: the score compares settings with different views less surely than others")
    starts = [start]
    if isinstance(space.get("cld.weight"), ranges.Numbers) and 0.0 in space["cld.weight"]:
        starts.append({**start, "cld.weight": 0.0})
    return starts, not beyond


def _identity(source: Source, images: Images) -> str:
    """The identity of the collection: the number of its images, and a hash of their names.

    For a data set by name, the name counts as well, since its file names do not depend on its settings. Nothing that
    may differ between machines with the same images counts.
    """
    digest = hashlib.sha256("\n".join(images.paths).encode(errors="surrogateescape"))
    if source.kind == "name":
        digest.update(source.text.encode())
    return f"{len(images)} images, {digest.hexdigest()[:12]}"


def _name(source: Source, config: dict[str, Any]) -> str:
    text = source.text
    stem = Path(text).resolve().stem if os.path.exists(text) else text.split(",", maxsplit=1)[0]
    name = re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "images"
    return f"{name}-{ranges.method_of(config).__name__.lower()}"


def _work(
    searching: Search, images: str, config: dict[str, Any], jobs: int, console: Console, training: trial.Training
) -> None:
    """Run trial after trial in ``jobs`` threads; each waits for a training in another process."""
    plan = searching.plan
    base = plan.folder / "workers" / f"{searching.worker}.yaml"
    settings.write(
        {k: v for k, v in config.items() if k not in ("images", "monitor", "monitor_every", "report_html")}, base
    )
    threads = None if jobs == 1 else max(1, torch.get_num_threads() // jobs)
    failures: list[BaseException] = []

    def one(number: int, parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
        method_option = trust.option_for(config["method"]["class_path"])
        options = [*method_option, *(f"--{name}={value}" for name, value in parameters.items())]
        return training(images, base, options, plan.folder / "trials" / f"{number:04}", threads)

    def work() -> None:
        try:
            searching.work(one, lambda ended: say(console, results.line(ended, plan)))
        except BaseException as error:
            failures.append(error)
            plan.stop.set()

    workers = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:
        searching.abandon()
        raise
    finally:
        base.unlink(missing_ok=True)
    if failures:
        raise failures[0]
