"""Throughput and cost of 1 to 256 GPUs, computed from measured parts; the first bottleneck; and a check of the model.

This program measures four parts of a training with ResNet-50 at 224 x 224 pixels and batches of 128 a GPU (weak
scaling): the core seconds to decode and cut a photograph of 500 x 375 pixels, its bytes, the bytes of the gradients,
and the seconds of a checkpoint. The seconds of a step on a GPU are those of results/step_gpu.txt. The options describe
the cluster: none of it is measured here, nor are stragglers, failures or a network that others use.

A step takes the longest of: computing and the part of the all-reduce that it does not hide; decoding; reading.
Gradients are reduced within a machine and then between machines, each GPU by its own port; half of the step, the
backward pass, hides them (torch's DDP). All wait for a checkpoint every ten minutes.

The check: seconds of a core that `fit` takes for a step of a small network in 1, 2 and 4 processes (gloo), all of them
together, beside the sum of parts measured alone: the step without any loop, decoding, an all-reduce of as many bytes.

python benchmarks/scale.py
python benchmarks/scale.py --plan 1e9  # a plan on paper, from files in results/ (`scale_plan.py`)
"""

from __future__ import annotations

import io
import itertools
import math
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from large import scale_plan
from PIL import Image
from rich.console import Console
from shared import records
from shared.beside import dated, median, plain_step

from crosslevel import CrossLevel, Encoder
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.loaders.batches import TrainBatches
from crosslevel.data.loaders.lanes import rows_of, shared
from crosslevel.data.open import open_images
from crosslevel.methods import SimCLR
from crosslevel.runs import Run
from crosslevel.training.loop import checkpoints
from crosslevel.training.loop.fit import fit
from crosslevel.training.loop.module import Pretrain
from crosslevel.transforms.views import Views
from crosslevel.utils.device import choose
from crosslevel.utils.processes import world

BUCKET, HIDDEN, BETWEEN_CHECKPOINTS = 25 * 2**20, 0.5, 600.0  # bytes; share of a step; seconds
SHARD = 10_000  # images
STEPS, BATCH, SIDE = 8, 16, 64  # of the check, on each process


class Parts(NamedTuple):
    """Seconds of a GPU's step, of a core for an image, of a checkpoint; bytes of an image and of the gradients."""

    step: float
    decode: float
    checkpoint: float
    image: float
    gradients: float


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--machine", type=int, default=8, help="GPUs of one")
    parser.add_argument("--cores", type=float, default=8, help="for each GPU")
    parser.add_argument("--inside", type=float, default=200, help="GB/s of a GPU to the others of its machine")
    parser.add_argument("--between", type=float, default=25, help="GB/s of a GPU to other machines")
    parser.add_argument("--latency", type=float, default=20, help="microseconds of one message")
    parser.add_argument("--store", type=float, default=10, help="GB/s of the store that all read from")
    parser.add_argument("--images", type=float, default=1e8, help="of the collection, in shards of 10,000")
    parser.add_argument("--price", type=float, help="of a GPU's hour: what the images cost as well")
    parser.add_argument("--plan", type=float, help="only print what a collection of so many images takes, on paper")
    parser.add_argument("--gpu", type=Path, default=Path(__file__).parent / "results" / "step_gpu.txt")
    parser.add_argument("--check", action=records.argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    if options.plan:
        print("\n".join(scale_plan.lines(options.plan, options.price)))
        return
    torch.set_num_threads(1)
    print(dated())
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder) / "large", 24, (375, 500))
        photographs(Path(folder) / "few", 2 * BATCH, (96, 128))
        photographs(Path(folder) / "small", 4 * STEPS * BATCH, (96, 128))
        if options.check:  # its processes are forks: before this one computes
            check(Path(folder))
        step, batch = step_of(options.gpu)
        parts = measured(Path(folder), step)
    print(
        f"\na GPU's step {1e3 * parts.step:.1f} ms ({batch} images, {options.gpu.name}); decoding and cutting "
        f"{1e3 * parts.decode:.2f} ms of a core an image of {parts.image / 1e3:.0f} kB; gradients "
        f"{parts.gradients / 1e6:.0f} MB; checkpoint {parts.checkpoint:.2f} s"
    )
    print(
        f"assumed: {options.machine} GPUs a machine, {options.cores:g} cores each, {options.inside:g} GB/s inside, "
        f"{options.between:g} GB/s a GPU between machines, {options.latency:g} us a message, a store of "
        f"{options.store:g} GB/s\n"
    )
    table(options, parts, batch)


def table(options: Any, parts: Parts, batch: int) -> None:
    cost = "" if options.price is None else " cost of 1e9 images |"
    print("| GPUs | images/s | of linear | GPU hours for 1e9 images | all-reduce, ms | ", end="")
    print("of it not hidden | read | longest |" + cost)
    print("|---|---|---|---|---|---|---|---|" + ("---|" if cost else ""))
    for count in options.gpus:
        reduce, again = all_reduce(parts, count, options), read_again(count, batch, options)
        exposed = max(0.0, reduce - HIDDEN * parts.step)
        longest = {
            "computing": parts.step + exposed,
            "decoding": batch * parts.decode / options.cores,
            "reading": count * batch * parts.image * again / (options.store * 1e9),
        }
        limit = max(longest, key=lambda name: longest[name])
        step = longest[limit] * (1 + parts.checkpoint / BETWEEN_CHECKPOINTS)
        rate = count * batch / step
        print(
            f"| {count} | {rate:,.0f} | {rate * parts.step / (count * batch):.3f} | {1e9 / rate * count / 3600:,.0f} | "
            f"{1e3 * reduce:.1f} | {1e3 * exposed:.1f} | {rate * parts.image * again / 1e9:.2f} GB/s | {limit} |"
            + (f" {1e9 / rate * count / 3600 * options.price:,.0f} |" if cost else "")
        )
    rate = batch / parts.step
    print("\n| what starves first | where |\n|---|---|")
    print(f"| decoding | fewer than {rate * parts.decode:.1f} cores a GPU; packed, square images need nearly none |")
    print(f"| reading | more than {options.store * 1e9 / (rate * parts.image):,.0f} GPUs at {options.store:g} GB/s |")
    slow = 2 * parts.gradients / options.machine / (HIDDEN * parts.step)
    print(f"| all-reduce between machines | less than {slow / 1e9:.2f} GB/s a GPU |")
    print(f"| checkpoints | {100 * parts.checkpoint / BETWEEN_CHECKPOINTS:.2f} % of the time, at any number |")


def all_reduce(parts: Parts, count: int, options: Any) -> float:
    """Seconds: rings inside machines, and between them, each GPU with its part; a tree's steps for each bucket."""
    inside = min(count, options.machine)
    machines = math.ceil(count / options.machine)
    seconds = 2 * (inside - 1) / inside * parts.gradients / (options.inside * 1e9)
    seconds += 2 * (machines - 1) / machines * parts.gradients / inside / (options.between * 1e9)
    messages = math.ceil(parts.gradients / BUCKET) * 2 * math.log2(count)
    return seconds + messages * options.latency * 1e-6


def read_again(count: int, batch: int, options: Any) -> float:
    """The number of GPUs that read an image of a stream, on average, in the lanes that the loader would make."""
    spans = rows_of([1] * int(options.images / SHARD), count * batch)
    reads = sum(len(shared(spans, range(rank * batch, (rank + 1) * batch))) for rank in range(count))
    return reads / len(spans)


def step_of(file: Path) -> tuple[float, int]:
    """Seconds of a GPU's step with ResNet-50, and its images."""
    match = re.search(
        r"^resnet50 .*?batch (\d+) of 224x224.*?^whole training step +([\d.]+) ms", file.read_text(), re.M | re.S
    )
    assert match, f"{file} has no step of resnet50 at 224 pixels"
    return float(match[2]) / 1e3, int(match[1])


def measured(folder: Path, step: float) -> Parts:
    encoder = Encoder("resnet50")
    encoder.adapt(224)
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    gradients = 4 * sum(value.numel() for value in encoder.parameters())
    run = Run(folder / "run")
    run.checkpoints.mkdir(parents=True)
    whole = {"state_dict": state, "optimizer_states": [state], "callbacks": {}, "epoch": 0, "global_step": 0}
    checkpoint = median([clocked(time.perf_counter, lambda: checkpoints.write(run, whole, False)) for _ in range(3)])
    files = list((folder / "large").iterdir())
    size = sum(file.stat().st_size for file in files) / len(files)
    return Parts(step, decoding(folder / "large", 224, len(files)), checkpoint, size, gradients)


def decoding(folder: Path, side: int, batch: int) -> float:
    """Seconds of a core for an image's two crops."""
    images = open_images(folder)
    batches = TrainBatches(images, batch, seed=0, bad_files=BadFiles(), crops=Views("mocov2", side).crops)
    list(batches)
    return median([clocked(time.process_time, lambda: list(batches)) for _ in range(5)]) / len(images)


def clocked(clock: Callable[[], float], work: Callable[[], object]) -> float:
    began = clock()
    work()
    return clock() - began


def photographs(folder: Path, count: int, size: tuple[int, int]) -> None:
    """JPEG files of noise of several scales, of quality 90."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        picture = np.zeros((*size, 3))
        for scale in (1, 4, 16, 64):
            coarse = generator.normal(0, 8 * scale**0.5, (-(-size[0] // scale), -(-size[1] // scale), 3))
            picture += np.kron(coarse, np.ones((scale, scale, 1)))[: size[0], : size[1]]
        Image.fromarray((128 + picture).clip(0, 255).astype(np.uint8)).save(folder / f"{i:03}.jpg", quality=90)


# The check


def check(folder: Path) -> None:
    print(f"\nthe check: ResNet-18, {SIDE} x {SIDE} pixels, {BATCH} images a process, seconds of a core a step\n")
    print("| processes | step | decoding | all-reduce | sum | measured | sum / measured |")
    print("|---|---|---|---|---|---|---|")
    for count in (1, 2, 4):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.start_processes(process, (count, port, str(folder)), nprocs=count, start_method="fork")
        rows = [torch.load(folder / f"{count}-{rank}.pt") for rank in range(count)]
        step, decode, reduce, measured_s = (sum(column) for column in zip(*rows, strict=True))
        total = step + decode + reduce
        print(
            f"| {count} | {step:.3f} | {decode:.3f} | {reduce:.3f} | {total:.3f} | {measured_s:.3f} | "
            f"{total / measured_s:.2f} |",
            flush=True,
        )


def process(rank: int, count: int, port: int, folder: str) -> None:
    """One of the processes; leaves core seconds a step of the parts, and of the whole."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "x",
    }  # fmt: skip
    module, views = training()
    decode = BATCH * decoding(Path(folder) / "few", SIDE, BATCH)
    step = alone(module, views, Path(folder) / "few")
    module, views = training()
    batches = Timed(
        open_images(Path(folder) / "small"), BATCH, seed=0, bad_files=BadFiles(), crops=views.crops,
        rank=rank, world=count,
    )  # fmt: skip
    fit(
        module, batches, Path(folder) / f"run{count}", hardware=choose("cpu", "fp32"), ranks=world(1, 1),
        log_every=1000, console=Console(file=io.StringIO()), checkpoint_minutes=60,
    )  # fmt: skip
    # Not the first one, nor the last ones, whose batches have been decoded before.
    whole = median([after - before for before, after in itertools.pairwise(batches.times)][1:-2])
    reduce = 0.0
    if count > 1:
        gradients = torch.zeros(sum(p.numel() for p in module.parameters() if p.requires_grad))
        reduce = median([clocked(time.process_time, lambda: dist.all_reduce(gradients)) for _ in range(5)])
    torch.save((step, decode, reduce, whole), f"{folder}/{count}-{rank}.pt")


class Timed(TrainBatches):
    """Records the core seconds at which each batch is requested."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            self.times = [*getattr(self, "times", []), time.process_time()]
            yield batch


def training() -> tuple[Pretrain, Views]:
    torch.manual_seed(0)
    encoder = Encoder("resnet18", True, 0.25)
    method = SimCLR(encoder, out_features=64)
    views = Views("cifar", SIDE)
    views.count = method.views
    module = Pretrain(
        encoder, method, CrossLevel(encoder.num_features, groups=8), views, steps=STEPS, warmup_steps=1,
        optimizer="sgd", lr=0.03, weight_decay=0.0, seed=0,
    )  # fmt: skip
    return module, views


def alone(module: Pretrain, views: Views, folder: Path) -> float:
    """Core seconds of a step without any loop, its batch at hand."""
    batch = next(iter(TrainBatches(open_images(folder), BATCH, seed=0, bad_files=BadFiles(), crops=views.crops)))
    module, optimizer = module.to(memory_format=torch.channels_last), module.configure_optimizer()
    step = partial(plain_step(module, optimizer), batch)
    step()
    return median([clocked(time.process_time, step) for _ in range(4)])


if __name__ == "__main__":
    main()
