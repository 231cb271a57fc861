"""``crosslevel demo``: the same method with and without CLD on the same images, and a page that shows both."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import torch
from rich.console import Console

from crosslevel import report
from crosslevel.data.open import open_images
from crosslevel.evaluation.evaluate import labelled_pair
from crosslevel.evaluation.protocols import PIXELS, Kind, Row, Subject, knn
from crosslevel.evaluation.results import COLUMNS, columns, measured, print_table
from crosslevel.features.extract import Runtime
from crosslevel.models.encoder import Encoder, load_encoder, untrained
from crosslevel.runs import load_cld
from crosslevel.settings import parser as commands
from crosslevel.training import report as pages
from crosslevel.training.train import train
from crosslevel.utils.device import Device, Hardware, Precision, choose

RUNS = {"MoCo": "moco", "MoCo + CLD": "moco-cld"}

MINUTES, LEAST, MOST = 4, 2, 6
"""What both trainings may take, and the bounds of their epochs."""

TIMED = 4  # steps, of which a slow machine does a few in a second

# A thousand steps are few: AdamW, a fast moving average and a short queue learn in them what the recipes' SGD, 0.999
# and 4,096 keys learn in many thousands. Both runs have all of it.
SHORT = [
    "--method=moco",
    "--method.online=2",
    "--method.queue=1024",
    "--method.momentum=0.99",
    "--method.temperature=0.1",
    "--optimizer=adamw",
    "--lr=0.002",
    "--encoder.zero_init_last=false",
    "--views.scale=[0.4,1]",
]


def demo(
    images: str = "turntable",
    test: str = "turntable:test",
    folder: str = "runs/demo",
    epochs: int | None = None,
    batch_size: int = 64,
    width: float = 0.25,
    weight: float = 0.25,
    groups: int | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
    seed: int = 0,
) -> Path:
    """Train MoCo and MoCo + CLD with the same budget, and show what each is good for.

    Both runs see the same views of the same images in the same steps, on equal networks; they differ in the group
    branch alone. One table compares them with raw pixels and an untrained encoder, and one page, report.html, shows
    curves, groups, neighbours and a map. Whichever wins is printed.

    Args:
        images: labelled images; their labels serve the comparison only.
        test: labelled images to classify.
        folder: where both runs and the page go; an earlier demo there is kept and the next gets a number.
        epochs: passes over the images, of each run; as many as both can do in four minutes unless given, by a
            measurement of a few steps: 2 to 6.
        batch_size: images a step.
        width: of the ResNet-18.
        weight: of the group branch.
        groups: of the group branch; three quarters of the batch unless given.
        device: auto takes CUDA, then Apple's MPS, then the CPU.
        precision: auto takes bfloat16 where the hardware computes it.
        seed: of both runs.

    Returns:
        the page.
    """
    console, began = Console(soft_wrap=True), time.monotonic()
    home, hardware = _free(Path(folder)), choose(device, precision)
    if epochs is None:
        source = open_images(images)
        rate = images_per_second(hardware, batch_size, width)
        epochs = affordable(rate, len(source))
        more = f"; --epochs {MOST} takes longer and shows more" if epochs < MOST else ""
        speed = f"this machine trains about {rate:,.0f} images a second"
        console.print(f"{epochs} epochs: {speed}{more}", highlight=False, markup=False)
    shared = [images, *SHORT, "--report_html=false"]
    shared += [f"--epochs={epochs}", f"--batch_size={batch_size}", f"--encoder.width={width}", f"--seed={seed}"]
    shared += [f"--device={device}", f"--precision={precision}"]
    for name, place in RUNS.items():
        own = ["--cld.weight=0"] if place == "moco" else [f"--cld.weight={weight}", f"--cld.groups={groups or 'null'}"]
        line = [*shared, *own, f"--run={home / place}"]
        console.rule(name)
        console.print(f"crosslevel train {shlex.join(line)}", highlight=False, markup=False, style="dim")
        commands.run(train, line)
    console.rule("kNN")
    encoders = {name: load_encoder(home / place) for name, place in RUNS.items()}
    first = encoders["MoCo"]
    kinds: dict[str, Kind] = {"raw pixels": PIXELS, "untrained encoder": untrained(first, seed), **encoders}
    bank, queries = labelled_pair(images, test)
    subject = Subject(kinds, bank, queries, Runtime(hardware), console=console)
    row = knn(subject).popitem()[1]
    print_table(console, f"kNN accuracy (k = 200; {len(queries):,} test images)", row)
    limits = "" if subject.split is None else subject.split.describe()
    verdict = _verdict(row)
    console.print(*filter(None, (limits, verdict)), sep="\n", highlight=False)
    told = _blocks(home, row, limits, len(bank), epochs, verdict)
    shown = pages.feature_blocks(encoders["MoCo + CLD"], load_cld(home / RUNS["MoCo + CLD"]), bank, hardware, seed)
    minutes = (time.monotonic() - began) / 60
    subtitle = f"{images} · {hardware.why} · {time.strftime('%Y-%m-%d')} · {minutes:.1f} minutes"
    page = report.page(home / "report.html", "MoCo with and without CLD", [*told, *shown], subtitle)
    console.print(f"{minutes:.1f} minutes; look at {page}, then: crosslevel train PATH-TO-YOUR-IMAGES", highlight=False)
    return page


def images_per_second(hardware: Hardware, batch_size: int, width: float) -> float:
    """What a training takes for an image of 32 pixels: two views forward and backward and one forward, no more."""
    encoder = Encoder("resnet18", True, width).to(hardware.device).to(memory_format=torch.channels_last)
    view = torch.randn(batch_size, 3, 32, 32, device=hardware.device).contiguous(memory_format=torch.channels_last)

    def step() -> float:
        with hardware.autocast():
            loss = torch.stack([encoder(view).float().square().mean() for _ in range(2)]).mean()
            with torch.no_grad():
                key = encoder(view).float().mean()
        loss.backward()
        return float(key)  # and so waits for the device

    step()
    began = time.perf_counter()
    for _ in range(TIMED):
        step()
    return TIMED * batch_size / (time.perf_counter() - began)


def affordable(rate: float, images: int) -> int:
    """Epochs of two runs in `MINUTES`, at least `LEAST` and at most `MOST`."""
    return max(LEAST, min(MOST, int(60 * MINUTES * rate / (2 * images))))


def _free(folder: Path) -> Path:
    """``folder``, or the same name with the first number that is free."""
    tries = [folder, *(folder.with_name(f"{folder.name}-{n}") for n in range(2, 10_000))]
    return next(place for place in tries if not place.exists())


def _blocks(home: Path, row: Row, limits: str, images: int, epochs: int, verdict: str) -> list[report.Block]:
    """What was compared, the table, the curves, and what to do next."""
    names = columns(row)
    return [
        report.text(
            "What was compared",
            [
                f"Two networks were trained on {images:,} images without their labels, for {epochs} epochs each, on "
                "the same views in the same steps. One has the group branch (CLD) beside the instance branch (MoCo).",
                verdict,
            ],
        ),
        report.table(
            "kNN accuracy, %",
            ["features", *(COLUMNS[name] for name in names)],
            [
                [kind, *(measured(judged.figures, judged.intervals, name) for name in names)]
                for kind, judged in row.items()
            ],
            note=f"±: half of the 95 % interval, by bootstrap over the test images. {limits}",
        ),
        report.commands(
            "Next, on your own folder",
            ["crosslevel train PHOTOS --run runs/photos", "crosslevel embed runs/photos PHOTOS -o features.parquet"],
        ),
        *pages.curve_blocks({name: home / place for name, place in RUNS.items()}),
    ]


def _verdict(row: Row) -> str:
    """Which of the two runs is better, by balanced accuracy, in a sentence."""
    with_cld, without = (row[name].figures["balanced"] for name in ("MoCo + CLD", "MoCo"))
    gain = with_cld - without
    if abs(gain) < 0.05:
        return f"With and without CLD, balanced accuracy is the same: {without:.1f} %."
    better = "higher" if gain > 0 else "lower"
    return f"With CLD, balanced accuracy is {abs(gain):.1f} points {better}: {with_cld:.1f} % against {without:.1f} %."
