"""``crosslevel demo``: train the same method with and without CLD on the same images, and compare them on a page."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from crosslevel import report
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.loaders.batches import TrainBatches, pack
from crosslevel.data.open import open_images
from crosslevel.evaluation.protocols import PIXELS, Kind, Row, Subject, knn
from crosslevel.evaluation.results import COLUMNS, columns, measured, print_table
from crosslevel.evaluation.scores import Scores
from crosslevel.evaluation.session import labelled_pair
from crosslevel.features.extract import Runtime
from crosslevel.metrics.knn import neighbours
from crosslevel.models.copies import untrained
from crosslevel.models.encoder import Encoder, load_encoder
from crosslevel.runs import load_cld
from crosslevel.settings.parts import public
from crosslevel.training import defaults
from crosslevel.training import report as pages
from crosslevel.training.plan import MEASURED_WITH, seconds_a_step
from crosslevel.training.train import train
from crosslevel.transforms.views import Views
from crosslevel.utils.console import printer
from crosslevel.utils.device import Device, Hardware, Precision, choose
from crosslevel.utils.files import REPORT

RUNS = {"without CLD": "plain", "with CLD": "cld"}

MINUTES, LEAST, MOST = 4, 2, 12
"""Minutes for both trainings, and the least and most epochs of each."""


def demo(
    images: str = "turntable",
    test: str = "turntable:test",
    folder: str = "runs/demo",
    epochs: int | None = None,
    width: float = 0.25,
    device: Device = "auto",
    precision: Precision = "auto",
    seed: int = 0,
    quiet: bool = False,
    *,
    training: Callable[..., object] | None = None,
) -> Path:
    """Train with and without CLD with the same budget, and evaluate both.

    Each run does exactly what the printed command does: crosslevel.train with its defaults, for a few epochs, on a
    narrow network. Both see the same views of the same images in the same steps, on equal networks; only the group
    branch differs. A table compares them with raw pixels and an untrained encoder; the page report.html shows curves,
    groups, neighbours and a map. The better one is printed, whichever it is.

    Args:
        images: labelled images; the labels are used for the comparison only.
        test: labelled images to classify.
        folder: the folder for both runs and the page; an earlier demo there is kept, and the next one gets a number.
        epochs: passes over the images in each run. Unless given, as many as both runs can do in four minutes, by a
            measurement of a few steps: 2 to 12.
        width: of the ResNet-18.
        device: auto takes CUDA, then Apple's MPS, then the CPU.
        precision: auto takes bfloat16 where the hardware computes it.
        seed: of both runs.
        quiet: print nothing.
        training: trains, with the arguments of crosslevel.train; no option.

    Returns:
        the page.
    """
    console, start_time = printer(quiet), time.monotonic()
    run_dir, hardware = free_folder(Path(folder)), choose(device, precision)
    if epochs is None:
        epochs, rate = affordable(images, width, hardware)
        more = f"; --epochs {MOST} takes longer and shows more" if epochs < MOST else ""
        speed = f"this machine trains about {rate:,.0f} images a second"
        console.print(f"{epochs} epochs: {speed}{more}", highlight=False, markup=False)
    shared: dict[str, Any] = {"epochs": epochs, "encoder": {"width": width}, "seed": seed, "device": device}
    shared |= {"precision": precision, "report_html": False}
    for name, subfolder in RUNS.items():
        settings = {**shared, **({"cld": {"weight": 0}} if subfolder == "plain" else {}), "run": run_dir / subfolder}
        console.rule(name)
        line = shlex.join([images, *_options(settings)])
        console.print(f"crosslevel train {line}", highlight=False, markup=False, style="dim")
        # This is crosslevel.train; by that name it would bring the rooms beside this one (`make lint` refuses that).
        (training or public(train))(images, **settings, quiet=quiet)
    console.rule("kNN")
    encoders = {name: load_encoder(run_dir / subfolder) for name, subfolder in RUNS.items()}
    first = encoders["without CLD"]
    kinds: dict[str, Kind] = {"raw pixels": PIXELS, "untrained encoder": untrained(first, seed), **encoders}
    bank, queries = labelled_pair(images, test)
    subject = Subject(kinds, bank, queries, Runtime(hardware), console=console)
    row = knn(subject).popitem()[1]
    print_table(console, f"kNN accuracy (k = {neighbours(len(bank))}; {len(queries):,} test images)", row)
    limits = "" if subject.split is None else subject.split.describe()
    verdict = verdict_of(row)
    console.print(*filter(None, (limits, verdict)), sep="\n", highlight=False)
    compared = _blocks(run_dir, row, limits, len(bank), epochs)
    feature_blocks = pages.feature_blocks(
        encoders["with CLD"], load_cld(run_dir / RUNS["with CLD"]), bank, hardware, seed
    )
    minutes = (time.monotonic() - start_time) / 60
    subtitle = f"{images} · {hardware.reason} · {time.strftime('%Y-%m-%d')} · {minutes:.1f} minutes"
    page = report.page(run_dir / REPORT, "With and without CLD", [*compared, *feature_blocks], subtitle, verdict)
    console.print(f"{minutes:.1f} minutes; look at {page}; next: crosslevel train PATH-TO-YOUR-IMAGES", highlight=False)
    return page


def _options(settings: Mapping[str, Any], group: str = "") -> Iterator[str]:
    """The same settings as options of the command line, for people: those of a part as --PART.NAME."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _options(value, f"{name}.")
        else:
            yield f"--{group}{name}={str(value).lower() if isinstance(value, bool) else value}"


def affordable(
    images: str, width: float, hardware: Hardware, measure: Callable[..., float] = seconds_a_step
) -> tuple[int, float]:
    """Epochs of two runs in `MINUTES`, at least `LEAST` and at most `MOST`, and this machine's images a second.

    ``measure`` returns the seconds of a step, as `seconds_a_step` does.
    """
    source, size = open_images(images), Views().size
    packed = pack(source, size, bad_files=BadFiles())
    with torch.random.fork_rng(devices=[]):
        encoder = Encoder("resnet18", True, width)
    batch = min(MEASURED_WITH, len(packed))
    seconds = measure(encoder, Views(size=size), TrainBatches(packed, batch, seed=0, bad_files=BadFiles()), hardware)
    epochs = defaults.affordable_epochs(MINUTES / 2, batch / seconds, len(packed)).value
    return max(LEAST, min(MOST, int(epochs))), batch / seconds


def free_folder(folder: Path) -> Path:
    """``folder``, or the same name with the first number that is free."""
    tries = [folder, *(folder.with_name(f"{folder.name}-{n}") for n in range(2, 10_000))]
    return next(candidate for candidate in tries if not candidate.exists())


def _blocks(run_dir: Path, row: Row, limits: str, images: int, epochs: int) -> list[report.Block]:
    """The page's blocks: the comparison, the table, the curves, and next steps."""
    names = columns(row)
    return [
        report.text(
            "What was compared",
            f"Two networks were trained on {images:,} images without their labels, for {epochs} epochs each, on the "
            "same views in the same steps, by the defaults. One has the group branch (CLD) beside the instance branch.",
        ),
        report.table(
            "kNN accuracy, %",
            ["features", *(COLUMNS[name] for name in names)],
            [
                [kind, *(measured(scores.figures, scores.intervals, name) for name in names)]
                for kind, scores in row.items()
            ],
            note=f"±: half of the 95 % interval, by bootstrap over the test images. {limits}",
        ),
        report.commands(
            "Next, on your own folder",
            ["crosslevel train PHOTOS --run runs/photos", "crosslevel embed runs/photos PHOTOS -o features.parquet"],
        ),
        *pages.curve_blocks({name: run_dir / subfolder for name, subfolder in RUNS.items()}),
    ]


def verdict_of(row: Row) -> str:
    """Summarize the balanced accuracies in sentences: CLD against none, and both against raw pixels.

    A difference within the interval of both does not count. The interval is the root of the sum of the squared half
    widths, as for two independent measurements; on the same images they are dependent, so that the true interval is
    narrower.
    """
    plain, cld, pixels = (row[name] for name in ("without CLD", "with CLD", "raw pixels"))
    gain, margin = _difference(cld, plain)
    accuracies = f"{cld.figures['balanced']:.1f} % against {plain.figures['balanced']:.1f} %"
    comparison = f"{abs(gain):.1f} points {'higher' if gain > 0 else 'lower'} (±{margin:.1f})"
    if abs(gain) <= margin:
        comparison = f"not different beyond chance ({gain:+.1f} ±{margin:.1f})"
    sentences = [f"With CLD, balanced accuracy is {comparison}: {accuracies}."]
    for name in ("with CLD", "without CLD"):
        over, around = _difference(row[name], pixels)
        if over <= around:
            word = "win" if over < -around else "are as good"
            sentences.append(f"Raw pixels {word}: {pixels.figures['balanced']:.1f} % beside the network {name}.")
    return " ".join(sentences)


def _difference(first: Scores, second: Scores) -> tuple[float, float]:
    """The difference of balanced accuracies, and half of its 95 % interval."""
    halves = [(high - low) / 2 for low, high in (s.intervals["balanced"] for s in (first, second) if s.intervals)]
    return first.figures["balanced"] - second.figures["balanced"], math.hypot(*halves)
