"""All checks that need a GPU, in one call.

python benchmarks/gpu.py DATA --minutes 9 [-o FOLDER] [--stages capture cell speed]

First the capture of the next cell's own method, then that cell, then what there is time for: speed, other captures.

- capture: whether a step that is captured as one CUDA graph trains as the usual one does. The same 12 steps of every
  method with CLD, in float32; beside the largest difference of their losses stands the one that other batches make:
  "yes" where the first is less than a tenth of the second.
- cell: the next cell of benchmarks/paper_gpu.py, captured only if its method passed.
- speed: benchmarks/step.py with everything compiled, at 32 and at 224 pixels.

FOLDER gets captured.md, step_gpu.txt, paper_gpu.json and paper_gpu.md, each as soon as it is there; a stage that fails,
or takes longer than it may, does not stop the others. A cell that is whole in FOLDER's paper_gpu.json is not trained
again; where FOLDER has none, that of benchmarks/results/ is copied there. The same call once more goes on with a cell
that was cut off, as long as runs/paper_gpu is there.

paper_gpu.py explains DATA and the packages that are needed. For a machine with PyTorch that cannot download anything,
put the images (18.5 MB) and what is missing there into a folder that git ignores,

    mkdir -p build/carried && cp cifar10-jpeg.tar.xz build/carried/
    pip download --no-deps -d build/carried filelock==4.2.12

which is copied beside the tree. There, with the results in OUT:

    pip install --no-deps --target build/packages build/carried/*.whl
    PYTHONPATH=build/packages python benchmarks/gpu.py build/carried/cifar10-jpeg.tar.xz --minutes 9 -o OUT

`--compile auto` can be the default of `crosslevel train` once captured.md says "yes" for every method.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from paper_gpu import wanted
from shared import records

HERE = Path(__file__).parent
METHODS = ["npid", "moco", "simclr", "infomin", "byol", "simsiam", "vicreg", "swav", "dino"]  # the cells' two first
SMALL = ["--width", "1", "--steps", "195"]  # a round is an epoch of CIFAR-10: a checkpoint hardly counts
SPEEDS = [
    (120, [*SMALL, "--method", "NPID", "--cld"]),
    (120, [*SMALL, "--method", "MoCo", "--cld"]),
    (120, SMALL),
    (240, ["--width", "1", "--steps", "48", "--backbone", "resnet50", "--size", "224", "--epochs", "5"]),
]
"""Seconds that each may take, and its options."""

STEPS, BATCH = 12, 64
STAGES = ["capture", "cell", "speed"]
LEFT = 30  # seconds without which nothing is begun
RECORD = HERE / "results" / "paper_gpu.json"
HEAD = [
    "| method | captured | largest difference of losses | with other batches | where, when | the same training |",
    "|---|---|---|---|---|---|",
]


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("data")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all stages")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("-o", "--output", default="benchmarks/results")
    parser.add_argument("--runs", default="runs/paper_gpu")
    parser.add_argument("--compare", help="only print the row of one method")
    arguments = parser.parse_args()
    if arguments.compare:
        print(compared(arguments.compare))
        return
    stages(arguments, RECORD)


def stages(arguments: argparse.Namespace, record: Path) -> None:
    """Run what was chosen; ``record`` has the cells that are done."""
    out, stop = Path(arguments.output), time.monotonic() + 60 * arguments.minutes
    out.mkdir(parents=True, exist_ok=True)
    own = out / record.name
    if record.is_file() and not own.exists():
        shutil.copyfile(record, own)
    cells = wanted(["next"], own, []) if "cell" in arguments.stages else []
    first = [name.partition("-")[0] for name in cells]
    rows: list[str] = []
    if "capture" in arguments.stages:
        rows = capture(arguments.data, first, rows, out, stop)
    if cells:
        cell(arguments, own, stop, captured=all(row.endswith("| yes |") for row in rows))
    if "speed" in arguments.stages:
        speed(out, stop)
    if "capture" in arguments.stages:
        capture(arguments.data, [name for name in METHODS if name not in first], rows, out, stop)


def cell(arguments: argparse.Namespace, record: Path, stop: float, captured: bool) -> None:
    """Train the next cell while there is time."""
    left = (stop - time.monotonic()) / 60 - 1.5  # a cell has a minute to write its checkpoint
    line = [str(HERE / "paper_gpu.py"), arguments.data, "--minutes", f"{left:.2f}", "--runs", arguments.runs]
    line += ["-o", str(record.with_suffix("")), *([] if captured else ["--", "--compile=off"])]
    if left > 0:
        print(limited(line, 60 * (left + 1.5)), flush=True)


def speed(out: Path, stop: float) -> None:
    """Time the step while there is time; what an earlier call measured is replaced."""
    for number, (seconds, line) in enumerate(SPEEDS):
        left = stop - time.monotonic()
        if left < LEFT:
            break
        output = limited([str(HERE / "step.py"), *line], min(seconds, left))
        with (out / "step_gpu.txt").open("a" if number else "w") as file:
            file.write(output)
        print(output, flush=True)


def limited(line: list[str], seconds: float) -> str:
    """The output of one of our programs within its time, or the reason that it failed."""
    try:
        done = subprocess.run(
            [sys.executable, *line], capture_output=True, text=True, timeout=max(1.0, seconds), check=False
        )
    except subprocess.TimeoutExpired:
        return f"{Path(line[0]).name} {' '.join(line[1:])}: not done in {seconds:.0f} s\n"
    failed = f"exit status {done.returncode}: {done.stderr.strip()[-2000:]}\n" if done.returncode else ""
    return done.stdout + failed


def capture(data: str, names: list[str], rows: list[str], out: Path, stop: float) -> list[str]:
    """The rows with those of ``names``, each from a process of its own, while there is time; the table is written."""
    for name in names:
        left = stop - time.monotonic()
        if left < LEFT:
            break
        output = limited([__file__, data, "--compare", name], min(120, left)).strip()
        failed = f"| {name} | failed: {' '.join(output.split())} | - | - | - | no |"
        rows = [*rows, output if output.startswith("| ") else failed]
        (out / "captured.md").write_text("\n".join([*HEAD, *rows]) + "\n")
        print(rows[-1], flush=True)
    return rows


def compared(name: str, kind: str = "cuda", **options: Any) -> str:
    """A row: the losses of captured steps against those of the usual ones, and of the usual ones in another order.

    ``options`` go to `Captured`.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False
    eager, _ = losses(name, kind, captured=False)
    other, _ = losses(name, kind, captured=False, first=1)
    graph, reason = losses(name, kind, captured=True, **options)
    far, near = float((eager - other).abs().max()), float((eager - graph).abs().max())
    same = not reason and near < far / 10
    where = f"{torch.cuda.get_device_name() if kind == 'cuda' else kind}, {time.strftime('%Y-%m-%d')}"
    return f"| {name} | {reason or 'yes'} | {near:.2g} | {far:.2g} | {where} | {'yes' if same else 'no'} |"


def losses(name: str, kind: str, *, captured: bool, first: int = 0, **options: Any) -> tuple[Any, str]:
    """The losses of `STEPS` steps of always the same network, from batch ``first`` on; and why it was not captured."""
    import torch
    from rich.console import Console
    from shared.beside import plain_step, two_query_method

    from crosslevel import CrossLevel, Encoder
    from crosslevel.data.loaders.batches import Batch
    from crosslevel.training.loop import graph
    from crosslevel.training.loop.module import Pretrain
    from crosslevel.transforms.views import Views
    from crosslevel.utils.device import Hardware

    torch.manual_seed(0)
    device, count = torch.device(kind), BATCH * (STEPS + 1)
    encoder = Encoder("resnet18", small_images=True, width=0.25)
    method = two_query_method(name, encoder, count)
    views = Views(name if name in ("infomin", "byol", "swav", "dino") else "cifar", size=32)
    views.count, views.small, views.plain = method.views, method.small_views, method.plain_views
    module = Pretrain(
        encoder, method, CrossLevel(encoder.num_features, groups=BATCH // 2), views, steps=STEPS, warmup_steps=0,
        optimizer="sgd", lr=0.03, weight_decay=5e-4, seed=0,
    ).to(device).to(memory_format=torch.channels_last)  # fmt: skip
    optimizer = module.configure_optimizer()
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))  # all of them look different
    pictures = (255 * torch.nn.functional.interpolate(coarse, size=32, mode="bilinear")).to(torch.uint8)

    step = plain_step(module, optimizer)
    output = io.StringIO()
    console, hardware = Console(file=output, soft_wrap=True), Hardware(device, "fp32", "")
    run_step = graph.Captured(module, optimizer, hardware, console, step, **options) if captured else step
    values = []
    for number in range(first, first + STEPS):
        index = torch.arange(BATCH * number, BATCH * (number + 1))
        run_step(Batch(pictures[index].to(device), index.to(device), index.to(device)))
        values.append(float(module.losses["loss"]))
    return torch.tensor(values), " ".join(output.getvalue().split())


if __name__ == "__main__":
    main()
