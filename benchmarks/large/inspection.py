"""`crosslevel inspect` on a large folder: seconds of its parts, memory, and the planted duplicates that it finds.

python benchmarks/large/inspection.py --images 100000
"""

from __future__ import annotations

import functools
import io
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from crosslevel.data.duplicates import detect
from crosslevel.inspection import inspect as verb
from crosslevel.inspection import scan
from crosslevel.metrics import long_tail

sys.path.append(str(Path(__file__).parents[1]))

from large.million import Memory
from shared import records
from shared.beside import machine

FEW = 2000
SIZE, ROOM, FOLDERS = 64, 4, 100
# Of a hundred images: 80 different ones, 5 of these once more as they are, 5 of them in 3 frames more.
DIFFERENT, COPIED, FILMED, FRAMES = 80, 5, 5, 3
PARTS = {
    "decoding": (verb, "scan"),
    "hashes": (detect, "perceptual_hash"),
    "near hashes": (detect, "near_pairs"),
    "descriptors": (scan, "describe"),
    "neighbours": (detect, "neighbours"),
    "pixels": (detect, "alike"),
    "edges": (detect, "agreement"),
    "groups": (long_tail, "grouped"),
    "sets": (verb, "duplicate_sets"),
    "page": (verb, "_write"),
}


def main() -> None:
    parser = records.measuring(__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(Path(arguments.measure))
        return
    with records.folder(arguments.where) as folder:
        environment = {"CROSSLEVEL_CACHE": str(folder / "cache")}
        measurements = []
        for count in (FEW, arguments.images):
            generate(folder / str(count), count)
            answer = records.again(__file__, "--measure", str(folder / str(count)), environment=environment)
            measurements.append(json.loads(answer.splitlines()[-1]))
        print(f"{machine()}; JPEG files of {SIZE} x {SIZE}; OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}")
        print(table(measurements))


def generate(root: Path, count: int) -> None:
    """``count`` JPEG files: noise whose strength falls with the frequency, as it does in photographs; some repeated."""
    folders = [root / f"{f:03}" for f in range(FOLDERS)]
    for folder in folders:
        folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    number, side = 0, 2 * ROOM + 1
    for _ in range(count // 100):
        for i, picture in enumerate(pictures(DIFFERENT, generator)):
            # All places but the middle one, in any order: no frame is a copy of another.
            order = torch.randperm(side**2, generator=generator)
            shifts = [divmod(n, side) for n in order[order != side**2 // 2][:FRAMES].tolist()]
            offsets = [(ROOM, ROOM), *(shifts if COPIED <= i < COPIED + FILMED else ())]
            times = 2 if i < COPIED else 1
            for y, x in offsets:
                data = encoded(picture[y : y + SIZE, x : x + SIZE], quality=95 if (y, x) == (ROOM, ROOM) else 80)
                for _ in range(times):
                    (folders[number % FOLDERS] / f"{number:07}.jpg").write_bytes(data)
                    number += 1


def pictures(count: int, generator: torch.Generator) -> UInt8[Tensor, "count side side 3"]:
    """Pictures of random colours and contrast, each larger than a file by some pixels on every side."""
    side = SIZE + 2 * ROOM
    down, across = torch.fft.fftfreq(side).unsqueeze(1), torch.fft.rfftfreq(side)
    frequency = torch.hypot(down, across).clamp(min=1 / side)
    strength: Float[Tensor, "side half"] = frequency**-1.2
    spectrum = torch.randn(count, 3, side, len(across), 2, generator=generator)
    # Most of what differs in a photograph is light, and not colour.
    spectrum = spectrum.mean(1, keepdim=True) * 1.5 + 0.5 * spectrum
    waves = torch.fft.irfft2(torch.view_as_complex(spectrum.contiguous()) * strength, s=(side, side))
    waves = waves / waves.flatten(1).std(1).view(-1, 1, 1, 1)
    contrast, colour = torch.rand(count, 1, 1, 1, generator=generator), torch.rand(count, 3, 1, 1, generator=generator)
    scaled = 0.25 + 0.5 * colour + (0.1 + 0.15 * contrast) * waves
    return (scaled.clamp(0, 1) * 255).byte().movedim(1, -1).contiguous()


def encoded(picture: UInt8[Tensor, "h w 3"], quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture.numpy()).save(file, "JPEG", quality=quality)
    return file.getvalue()


def measure(root: Path) -> None:
    """One line of JSON: what `inspect` found, the seconds of its parts, and the most memory."""
    seconds: dict[str, float] = defaultdict(float)
    for name, (module, function) in PARTS.items():
        timed(module, function, name, seconds)
    watch, began = Memory(), time.perf_counter()
    report = verb.inspect(str(root), output=str(root.parent / f"{root.name}.json"), device="cpu")
    total = time.perf_counter() - began
    duplicates = {"exact": report["exact_duplicates"]["superfluous"], **report["near_duplicates"]}
    measurement = {"count": report["count"], "whole": total, "seconds": seconds, "peak": watch.stop()[0]}
    print(json.dumps({**measurement, **duplicates}))


def timed(module: ModuleType, function: str, name: str, seconds: dict[str, float]) -> None:
    """Time every further call of ``module.function``."""
    original = getattr(module, function)

    @functools.wraps(original)
    def timing(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return original(*arguments, **options)
        finally:
            seconds[name] += time.perf_counter() - began

    setattr(module, function, timing)


def table(measurements: list[dict[str, Any]]) -> str:
    """What was measured, one column for each collection."""
    rows = [("images", [f"{t['count']:,}" for t in measurements])]
    rows.append(("seconds in all", [f"{t['whole']:.1f}" for t in measurements]))
    rows += [(f"  {part}", [f"{t['seconds'].get(part, 0):.1f}" for t in measurements]) for part in PARTS]
    rows.append(("  the rest", [f"{t['whole'] - sum(t['seconds'].values()):.1f}" for t in measurements]))
    rows.append(("peak memory, all processes", [f"{t['peak']:,.0f} MB" for t in measurements]))
    for name, key, each in (
        ("exact copies found / there", "exact", COPIED),
        ("images in tracks / there", "images_in_tracks_of_several", 2 * COPIED + (1 + FRAMES) * FILMED),
        ("tracks / there", "tracks", DIFFERENT),
    ):
        rows.append((name, [f"{t[key]:,} / {t['count'] // 100 * each:,}" for t in measurements]))
    rows.append(("largest track / there", [f"{t['largest_track']} / {1 + FRAMES}" for t in measurements]))
    wide = max(len(value) for _, values in rows for value in values)
    return "\n".join(f"{name:<28}" + "".join(f"  {value:>{wide}}" for value in values) for name, values in rows)


if __name__ == "__main__":
    main()
