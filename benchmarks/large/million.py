"""A folder of very many files: seconds to list it, and memory while training on it, beside the same run on few files.

python benchmarks/large/million.py --files 1000000
"""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console

from crosslevel import CrossLevel, Encoder
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.index_cache import cache_folder
from crosslevel.data.loaders.batches import TrainBatches
from crosslevel.data.open import open_images
from crosslevel.methods import MoCo
from crosslevel.training.loop.fit import fit
from crosslevel.training.loop.module import Pretrain
from crosslevel.transforms.views import Views
from crosslevel.utils.device import choose

sys.path.append(str(Path(__file__).parents[1]))

from shared import records
from shared.beside import dated

FOLDERS, WORKERS, BATCH, STEPS = 1000, 2, 64, 10
FEW = 2000
LINKS = 30_000  # to one file: ext4 allows 65,000


def main() -> None:
    parser = records.measuring(__doc__)
    parser.add_argument("--files", type=int, default=1_000_000)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
        return
    with records.folder(arguments.where) as folder:
        environment = {"CROSSLEVEL_CACHE": str(folder / "cache")}
        print(dated())
        print(f"{'files':>9}  first listing  cached listing  steps  peak memory  of it parent  in the cache")
        peaks = []
        for count in (FEW, arguments.files):
            generate(folder / str(count), count)
            time.sleep(2.5)  # a folder that has just changed is not taken from the cache
            answer = records.again(__file__, "--measure", str(folder / str(count)), environment=environment)
            first, cached, peak, parent, kept = map(float, answer.splitlines()[-1].split())
            peaks.append(peak)
            print(
                f"{count:>9,}  {first:>11.2f} s  {cached:>12.2f} s  {STEPS:>5}  {peak:>8.0f} MB  {parent:>9.0f} MB  "
                f"{kept:>9.1f} MB",
                flush=True,
            )
        print(f"{arguments.files - FEW:,} more files take {peaks[1] - peaks[0]:,.0f} MB more at the peak")


def generate(root: Path, count: int) -> None:
    """``count`` names of a few small JPEG files in many folders."""
    seeds = root.with_name(f"{root.name}.seeds")
    seeds.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for n in range(count // LINKS + 1):
        pixels = torch.randint(256, (6, 6, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels).resize((48, 36), Image.Resampling.BICUBIC).save(seeds / f"{n}.jpg")
    folders = [root / f"class{f:04}" for f in range(FOLDERS)]
    for folder in folders:
        folder.mkdir(parents=True)
    for n in range(count):
        os.link(seeds / f"{n // LINKS}.jpg", folders[n % FOLDERS] / f"photo-{n:08}.jpg")


def measure(root: str) -> None:
    """One line: seconds of the first and the cached listing, peak memory (PSS) of all and of the parent, the cache."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    watch = Memory()
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        source = open_images(root)
        seconds.append(time.perf_counter() - began)
    encoder = Encoder("resnet18", True, 0.25)
    method, cld = MoCo(encoder, len(source)), CrossLevel(encoder.num_features, 16)
    method.online = 2  # CLD compares two views that the trained network has seen
    views = Views("cifar", 32)
    views.count, views.small, views.plain = method.views, method.small_views, method.plain_views
    batches = Few(source, BATCH, seed=0, bad_files=BadFiles(), crops=views.crops, workers=WORKERS)
    module = Pretrain(
        encoder, method, cld, views, steps=STEPS, warmup_steps=1, optimizer="sgd", lr=0.01, weight_decay=0.0, seed=0
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as run:
        fit(module, batches, Path(run), hardware=choose(), console=Console(file=io.StringIO()))
    peak, parent = watch.stop()
    cached = sum(file.stat().st_size for file in cache_folder().glob("*")) / 1e6
    print(*seconds, peak, parent, cached)


class Few(TrainBatches):
    """Its epoch is over after ``STEPS`` batches; the order is of all images."""

    def __len__(self) -> int:
        return STEPS


class Memory(threading.Thread):
    """The most memory that this process and its children took together, pages that they share counted once (PSS)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = self.parent = 0.0
        self._end = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._end.wait(0.2):
            sizes = [proportional(process) for process in family(os.getpid())]
            self.peak, self.parent = max(self.peak, sum(sizes)), max(self.parent, sizes[0])

    def stop(self) -> tuple[float, float]:
        """Megabytes of all processes, of the parent alone."""
        self._end.set()
        self.join()
        return self.peak, self.parent


def family(process: int) -> list[int]:
    """A process and all below it."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
    processes = [process]
    for member in processes:
        processes += sorted(child for child, parent in parents.items() if parent == member)
    return processes


def proportional(process: int) -> float:
    """Megabytes; 0 if it has ended."""
    try:
        match = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0.0
    return int(match[1]) / 1000 if match else 0.0


if __name__ == "__main__":
    main()
