"""How well `inspect` finds duplicates, over seeds: edited copies, look-alikes, copies among these, bursts of frames.

It is compared with a plain perceptual hash (imagehash.phash, at most 8 bits apart) and with the former rule: pixels
that differ by a root mean square of at most 0.05 after a small shift, chained by single links. Nothing was chosen on
these seeds; the thresholds were chosen on seeds 0, 5 and 6.

python benchmarks/quality/duplicates.py --seeds 101 102 103
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import imagehash
import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2] / "tests" / "data" / "duplicates"))
from duplicates_samples import EDITS, look_alikes, recompressed, scene, small

from crosslevel.data.duplicates.descriptor import alike
from crosslevel.data.duplicates.detect import duplicate_pairs, tracks
from crosslevel.data.duplicates.hashes import near_pairs
from crosslevel.data.sources.turntable.dataset import Turntable

sys.path.append(str(Path(__file__).parents[1]))

from shared import records
from shared.beside import machine

SCENES = 40
FORMER, RADIUS = 0.05, 8


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--look_alikes", type=int, default=900)
    parser.add_argument("--objects", type=int, default=100, help="of ten frames each")
    arguments = parser.parse_args()
    print(f"{machine()}; seeds {arguments.seeds}; OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}\n")
    edits = [edited(seed) for seed in arguments.seeds]
    print(f"| of {SCENES} edited copies, found | here | plain hash | former rule |\n|---|---|---|---|")
    for row in (*EDITS, "wrong pairs"):
        print(
            f"| {row} | " + " | ".join(cell([figures[row][k] for figures in edits]) for k in range(3)) + " |",
            flush=True,
        )
    print("\n| collection | here | plain hash | former rule |\n|---|---|---|---|", flush=True)
    alike_rows = [among_look_alikes(seed, arguments.look_alikes) for seed in arguments.seeds]
    burst_rows = [bursts(seed, arguments.objects) for seed in arguments.seeds]
    for rows in (alike_rows, burst_rows):
        for row in rows[0]:
            print(
                f"| {row} | " + " | ".join(cell([figures[row][k] for figures in rows]) for k in range(3)) + " |",
                flush=True,
            )


def cell(values: list[float]) -> str:
    """The values of all seeds, or the one where they are equal."""
    return f"{values[0]:,g}" if len(set(values)) == 1 else ", ".join(f"{value:,g}" for value in values)


def three_ways(data: Tensor, hashes: list[imagehash.ImageHash]) -> list[Tensor]:
    """Pairs found here, by the plain hash, and by the former rule, of a collection small enough to compare all."""
    bits = torch.from_numpy(np.stack([hash.hash.ravel() for hash in hashes]))
    codes = (bits.long() << torch.arange(64)).sum(1)
    every = torch.combinations(torch.arange(len(data))) if len(data) <= 100 else near_pairs(codes, RADIUS)
    candidates = torch.cat([every, nearest(data)]).unique(dim=0)
    distance = (bits[every[:, 0]] != bits[every[:, 1]]).sum(1)
    return [duplicate_pairs(data).images, every[distance <= RADIUS], candidates[alike(data, candidates, FORMER)]]


def nearest(data: Tensor) -> Tensor:
    """Each picture with the six nearest at 8 x 8 pixels."""
    coarse = torch.nn.functional.avg_pool2d(data.float(), 4).flatten(1)
    neighbours = torch.cdist(coarse, coarse).fill_diagonal_(torch.inf).topk(6, largest=False).indices
    row = torch.arange(len(data)).unsqueeze(1).expand_as(neighbours)
    return (
        torch.stack([torch.minimum(row, neighbours), torch.maximum(row, neighbours)], dim=2).flatten(0, 1).unique(dim=0)
    )


def edited(seed: int) -> dict[str, list[int]]:
    """The number of copies found of each edit, and of pairs found of different scenes."""
    generator = np.random.default_rng(seed)
    scenes = [scene(generator) for _ in range(SCENES)]
    result: dict[str, list[int]] = {}
    wrong = [0, 0, 0]
    for name, edit in EDITS.items():
        images = [*scenes, *map(edit, scenes)]
        ways = three_ways(torch.stack([small(image) for image in images]), [imagehash.phash(image) for image in images])
        right = [int((pairs[:, 1] - pairs[:, 0] == SCENES).sum()) for pairs in ways]
        result[name] = right
        wrong = [w + len(pairs) - r for w, pairs, r in zip(wrong, ways, right, strict=True)]
    return {**result, "wrong pairs": wrong}


def among_look_alikes(seed: int, count: int) -> dict[str, list[float]]:
    """Different objects of three kinds, and recompressed copies of a tenth of them."""
    images = look_alikes(count, seed)
    all_images = [*images, *(recompressed(image, 60) for image in images[: count // 10])]
    data, hashes = torch.stack([small(image) for image in all_images]), [imagehash.phash(image) for image in all_images]
    result: dict[str, list[float]] = {"look-alikes: % of the images in a track": [], "look-alikes: largest track": []}
    for pairs in three_ways(data[:count], hashes[:count]):
        sizes = tracks(count, pairs).bincount()
        result["look-alikes: % of the images in a track"].append(round(100 * float(sizes[sizes > 1].sum()) / count, 1))
        result["look-alikes: largest track"].append(int(sizes.max()))
    row = "recompressed copies of look-alikes: % found"
    result[row] = []
    for pairs in three_ways(data, hashes):
        matches = int((pairs[:, 1] - pairs[:, 0] == count).sum())
        result[row].append(round(100 * matches / (count // 10), 1))
    return result


def bursts(seed: int, objects: int) -> dict[str, list[float]]:
    """Ten frames of each object on a turntable."""
    turntable = Turntable(classes=8, objects=objects, frames=10, imbalance=5, size=32, seed=seed)
    owner = turntable.tracks
    assert owner is not None
    hashes = [imagehash.phash(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in turntable.data]
    names = ("% of the frames in a track", "% of the pairs right", "largest track (of 10)")
    result: dict[str, list[float]] = {f"bursts: {name}": [] for name in names}
    for pairs in three_ways(turntable.data, hashes):
        sizes = tracks(len(turntable), pairs).bincount()
        right = owner[pairs[:, 0]] == owner[pairs[:, 1]]
        values = (
            100 * float(sizes[sizes > 1].sum()) / len(turntable),
            100 * float(right.float().mean()),
            int(sizes.max()),
        )
        for name, value in zip(names, values, strict=True):
            result[f"bursts: {name}"].append(round(value, 1))
    return result


if __name__ == "__main__":
    main()
