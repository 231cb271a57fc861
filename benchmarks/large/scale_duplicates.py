"""How duplicates are found among very many pictures: seconds, memory, and the share of planted copies found.

Pictures of 32 x 32 pixels whose spectrum falls as that of photographs does (1/f, Field 1987), of random contrast, light
and colours; one in eleven is a copy of another, two of one original: recompressed, lighter, of more contrast, without
colours, cropped, shifted or mirrored, made at 64 x 64 pixels. Recall is the share of copies that are in one track with
their original, precision the share of the pairs found whose two pictures are of one original. Decoding is not measured:
`inspect` does that once.

--features D does the same with features of D values in place of pictures, as `inspect --run` compares them
(`mutual_pairs`, a cosine of at least 0.9): clusters of sizes by a Zipf law, in each a spectrum that falls; a copy
is its original and noise of 0.1 to 0.35 of its length.

A line a minute on standard error shows the progress. --record FILE stores the finished rows: called again, the program
prints these and measures the others; an interrupted row is measured from its beginning.

python benchmarks/large/scale_duplicates.py --counts 1000000 --threads 2 --record scale_duplicates.json 2>> scale.log
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg
from torchvision.transforms.v2 import functional as tvf

from crosslevel.data.duplicates.descriptor import SIDE
from crosslevel.data.duplicates.detect import duplicate_pairs, tracks
from crosslevel.inspection.scan import NEIGHBOURS
from crosslevel.metrics.nearest import mutual_pairs

sys.path.append(str(Path(__file__).parents[1]))

from shared import records
from shared.beside import machine

PART = 5000
THRESHOLD = 0.9  # the least cosine of copies among features
NOISES = ("noise 0.1", "noise 0.2", "noise 0.3", "noise 0.35")
SHARE = 10  # other pictures for each copy


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--seed", type=int, default=101)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--features", type=int, metavar="D", help="compare features of D values, not pictures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    where = f"{machine()}; seed {arguments.seed}; OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}"
    if arguments.features:
        where += f"; features of {arguments.features} values"
    print(f"{where}\n")
    print("| images | copies planted | seconds | of one core | peak memory, GB | recall | precision | worst edit |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    threading.Thread(target=tell_each_minute, args=(threading.get_ident(),), daemon=True).start()
    for count in arguments.counts:
        done, name = {} if arguments.record is None else records.read(arguments.record, "rows"), f"{count} on {where}"
        row = done.get(name) or measured(count, arguments.seed, arguments.features)
        if arguments.record is not None:
            records.add(arguments.record, "rows", name, row, {})
        print("| " + " | ".join(row) + " |", flush=True)


def tell_each_minute(thread: int) -> None:
    """Print which functions the thread is in, and its time and memory."""
    began = time.monotonic()
    while True:
        time.sleep(60)
        frame, inside = sys._current_frames().get(thread), []
        while frame is not None:
            if Path(frame.f_code.co_filename).stem in ("scale_duplicates", "detect", "neighbours", "hashes"):
                inside.append(frame.f_code.co_name)
            frame = frame.f_back
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        where = " > ".join(inside[-2::-1])
        print(f"{time.monotonic() - began:,.0f} s, peak {peak:.1f} GB: {where}", file=sys.stderr, flush=True)


def measured(count: int, seed: int, width: int | None = None) -> tuple[str, ...]:
    names = tuple(EDITS) if width is None else NOISES
    compared, original, edit = collection(count, seed) if width is None else clusters(count, width, seed)
    began, worked = time.perf_counter(), time.process_time()
    pairs = duplicate_pairs(compared).images if width is None else mutual_pairs(compared, THRESHOLD, NEIGHBOURS)
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    owner = tracks(count, pairs)
    copies = (edit >= 0).nonzero()[:, 0]
    recalled = owner[copies] == owner[original[copies]]
    right = original[pairs[:, 0]] == original[pairs[:, 1]]
    rates = {name: float(recalled[edit[copies] == number].float().mean()) for number, name in enumerate(names)}
    worst = min(rates, key=lambda name: rates[name])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    recall, precision = float(recalled.float().mean()), float(right.float().mean())
    return (
        f"{count:,}", f"{len(copies):,}", f"{seconds:,.0f}", f"{cpu:,.0f}", f"{peak:.1f}", f"{recall:.4f}",
        f"{precision:.4f}", f"{worst} {rates[worst]:.3f}",
    )  # fmt: skip


def collection(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures in random order, the index of each one's original, and the number of its edit (-1: none)."""
    generator = torch.Generator().manual_seed(seed)
    planted = count // (SHARE + 1)
    plain = count - planted
    pictures = torch.empty(count, 3, SIDE, SIDE, dtype=torch.uint8)
    order = torch.randperm(count, generator=generator)
    for first in range((planted + 1) // 2, plain, PART):
        these = order[first : min(first + PART, plain)]
        pictures[these] = natural(len(these), SIDE, generator)
    original, edit = torch.arange(count), torch.full((count,), -1)
    names = list(EDITS)
    for first in range(0, planted, PART):
        which = torch.arange(first, min(first + PART, planted))
        large = natural((len(which) + 1) // 2, 2 * SIDE, generator)
        pictures[order[which[::2] // 2]] = tvf.resize(large, [SIDE, SIDE], antialias=True)
        for number, name in enumerate(names):
            edited = which % len(names) == number
            if edited.any():
                changed = EDITS[name](large[(which[edited] - first) // 2])
                pictures[order[plain + which[edited]]] = tvf.resize(changed, [SIDE, SIDE], antialias=True)
                edit[order[plain + which[edited]]] = number
        original[order[plain + which]] = order[which // 2]
    return pictures, original, edit


def clusters(count: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features of clusters in random order, the index of each one's original, and its level of noise (-1: no copy)."""
    generator = torch.Generator().manual_seed(seed)
    planted = count // (SHARE + 1)
    plain, sizes = count - planted, 1 / torch.arange(1, 1001.0)
    spectrum = 1 / torch.arange(1, width + 1.0).sqrt()
    centres = torch.randn(len(sizes), width, generator=generator) * spectrum
    features, order = torch.empty(count, width), torch.randperm(count, generator=generator)
    for these in order[:plain].split(PART):
        of = torch.multinomial(sizes, len(these), replacement=True, generator=generator)
        offsets = torch.randn(len(these), width, generator=generator) * spectrum
        features[these] = F.normalize(centres[of] + offsets, dim=1)
    original, edit, number = torch.arange(count), torch.full((count,), -1), torch.arange(planted)
    copies, originals = order[plain:], order[number // 2]
    level = number % len(NOISES)
    noise = F.normalize(torch.randn(planted, width, generator=generator), dim=1)
    length = torch.tensor([float(name.split()[1]) for name in NOISES])[level].unsqueeze(1)
    features[copies] = F.normalize(features[originals] + length * noise, dim=1)
    original[copies], edit[copies] = originals, level
    return features, original, edit


def natural(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Noise with the amplitudes of photographs: 1 / frequency, the luminance stronger than the colours."""
    down, across = torch.fft.fftfreq(side), torch.fft.rfftfreq(side)
    frequency = torch.hypot(down.unsqueeze(1), across.unsqueeze(0))
    frequency[0, 0] = torch.inf
    noise = torch.randn(count, 4, side, side, generator=generator)
    planes = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(side, side))
    planes = planes / planes.std((2, 3), keepdim=True)
    colourful = torch.rand(count, 1, 1, 1, generator=generator) * 0.6
    coloured = planes[:, :1] + colourful * planes[:, 1:]
    contrast = 0.08 + 0.17 * torch.rand(count, 1, 1, 1, generator=generator)
    light = 0.3 + 0.4 * torch.rand(count, 1, 1, 1, generator=generator)
    light = light + 0.08 * torch.randn(count, 3, 1, 1, generator=generator)
    return (255 * (light + contrast * coloured)).round().clamp(0, 255).byte()


def recompressed(images: Tensor) -> Tensor:
    return torch.stack([decode_jpeg(code) for code in encode_jpeg(list(images), quality=60)])


def cropped(images: Tensor) -> Tensor:
    return tvf.resize(images[:, :, 2:-2, 2:-2], [2 * SIDE, 2 * SIDE], antialias=True)


EDITS = {
    "recompressed": recompressed,
    "lighter": lambda images: tvf.adjust_brightness(images, 1.15),
    "contrast": lambda images: tvf.adjust_contrast(images, 1.25),
    "gray": lambda images: tvf.rgb_to_grayscale(images, 3),
    "cropped": cropped,
    "shifted": lambda images: images.roll(2, 3),
    "mirrored": lambda images: images.flip(3),
}


if __name__ == "__main__":
    main()
