"""embed by two plain processes, each with half of the images, and by two local Ray nodes of one core each.

Seconds of processor time count: on a machine that does other things as well, wall time says little. The cluster is up
before the clock starts; what its own processes take while it works is counted. What Ray takes does not grow with the
network: its share of the whole depends on --width and --view. Both tables are compared row by row. In a last round one
of the nodes is taken away when the first part of the table is there.

python benchmarks/large/cluster.py --images 20000 --rounds 2 --width 1 --view 96
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from crosslevel import Encoder
from crosslevel.models.encoder import View

sys.path.append(str(Path(__file__).parents[1]))

from shared import records
from shared.beside import machine

OPTIONS = ["--device=cpu", "--precision=fp32", "--quiet"]


def main() -> None:
    parser = records.measuring(__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--width", type=float, default=0.5, help="of the ResNet-18")
    parser.add_argument("--view", type=int, default=96, help="pixels")
    arguments = parser.parse_args()
    print(f"{machine()}; ResNet-18 x {arguments.width:g}, views of {arguments.view} pixels", flush=True)
    with records.folder(arguments.where) as folder:
        furnish(folder, arguments.images, arguments.width, arguments.view)
        for number in range(arguments.rounds):
            report("two processes", arguments.images, measured(partial(plain, folder, number)))
            with_cluster(folder, number, arguments.images)
        with_cluster(folder, arguments.rounds, arguments.images, lose=True)


def furnish(folder: Path, count: int, width: float, view: int) -> None:
    """JPEG files of 128 pixels, lists of them, and an encoder of random weights."""
    (folder / "photos").mkdir()
    generator = np.random.default_rng(0)
    names = [str(folder / "photos" / f"{i:06}.jpg") for i in range(count)]
    for name in names:
        coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(np.kron(coarse, np.ones((16, 16, 1), np.uint8))).save(name, quality=85)
    for list_, part in (("a", names[: count // 2]), ("b", names[count // 2 :]), ("all", names)):
        (folder / f"{list_}.txt").write_text("\n".join(part) + "\n")
    torch.manual_seed(0)
    encoder = Encoder("resnet18", False, width)
    encoder.view = View(view)
    (folder / "run").mkdir()
    encoder.save(folder / "run" / "encoder.safetensors")


def started(folder: Path, list_: str, output: str, *options: str) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "crosslevel", "embed", str(folder / "run"), str(folder / f"{list_}.txt")]
    return subprocess.Popen([*line, "-o", str(folder / output), *OPTIONS, *options])


def plain(folder: Path, number: int) -> None:
    processes = [started(folder, list_, f"{list_}-{number}.parquet", "--workers=0") for list_ in "ab"]
    if any([process.wait() for process in processes]):
        sys.exit("a process failed")


def with_cluster(folder: Path, number: int, images: int, lose: bool = False) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for _ in range(2):
        node = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False)
    os.environ["RAY_ADDRESS"] = cluster.address
    time.sleep(5)
    output = folder / f"ray-{number}.parquet"

    def embed() -> None:
        process = started(folder, "all", output.name, "--engine=ray")
        if lose:
            while process.poll() is None and not list(Path(f"{output}.parts").glob("0*.parquet")):
                time.sleep(0.1)
            cluster.remove_node(node, allow_graceful=False)
        if process.wait():
            sys.exit("the command failed")

    report("two Ray nodes, one taken away" if lose else "two Ray nodes", images, measured(embed))
    cluster.shutdown()
    compare(folder, output)


def compare(folder: Path, output: Path) -> None:
    """The rows of Ray's table beside those of the two processes' first tables, one after the other."""
    tables = [pq.read_table(folder / f"{part}-0.parquet") for part in "ab"]
    expected, result = pa.concat_tables(tables), pq.read_table(output)
    same = expected["path"].equals(result["path"])
    features = [np.stack(table["feature"].to_numpy()) for table in (expected, result)]
    distance = np.abs(features[0] - features[1]).max() if same else np.nan
    print(
        f"    {len(result):,} rows, {'the same' if same else 'OTHER'} paths, features at most {distance:.1e} apart",
        flush=True,
    )


def measured(work: Callable[[], None]) -> tuple[float, dict[str, float]]:
    """Seconds on the wall, and of the processor by kind of process: commands, Ray's workers, and Ray itself."""
    spent: dict[tuple[int, float], tuple[str, float]] = {}
    before = look(spent)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.25):
            look(spent)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    work()
    wall = time.perf_counter() - began
    ended.set()
    watcher.join()
    after = look(spent)
    return wall, {kind: after[kind] - before[kind] for kind in after}


def look(spent: dict[tuple[int, float], tuple[str, float]]) -> dict[str, float]:
    """Record the time of each process so far; a process that has ended keeps its last value."""
    for process in psutil.Process().children(recursive=True):
        try:
            times, line = process.cpu_times(), " ".join(process.cmdline())
        except psutil.Error:
            continue
        kind = "workers" if "ray::_Worker" in line else "commands" if "crosslevel" in line else "Ray"
        key = process.pid, process.create_time()
        if spent.get(key, ("",))[0] == "workers":
            kind = "workers"  # whatever it is called when it ends
        spent[key] = (kind, times.user + times.system)
    total: dict[str, float] = defaultdict(float)
    for kind, seconds in spent.values():
        total[kind] += seconds
    return total


def report(name: str, images: int, measurement: tuple[float, dict[str, float]]) -> None:
    wall, spent = measurement
    total, by_kind = sum(spent.values()), ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in sorted(spent.items()))
    print(
        f"{name}: {images:,} images, {total:.1f} s of the processor ({by_kind}), {wall:.0f} s on the wall",
        flush=True,
    )


if __name__ == "__main__":
    main()
