"""A plan on paper for a collection of very many images: each figure is from a file in results/, none from such a run.

python benchmarks/scale.py --plan 1e9
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parents[1] / "results"
# Of crosslevel.data.duplicates: a small picture, an outline's values, a cell's points.
SIDE, OUTLINE, CELL = 32, 64, 512
ROUNDS, SAMPLED = 4, 32  # of k-means, and the points of a cell that it is made of
# Multiplications of a forward pass at 224 pixels (He et al., CVPR 2016, table 1: 3.8e9; timm's has 4.1).
RESNET50 = 4.1e9
FEATURES, VIEWS = 2048, 2  # ResNet-50's; those of a step


class Measured(NamedTuple):
    """Bytes of an image; seconds of a core, or of a GPU, for one; rates of a GPU and of a store."""

    kilobytes: tuple[float, float]
    decode: tuple[float, float]
    compare: float
    list: float
    listed_bytes: float
    view: float
    train: float
    multiply: float
    more: tuple[float, float]
    store: float


class Row(NamedTuple):
    """One line of the plan; ``gpu`` are hours that have a price."""

    what: str
    figure: str
    because: str
    gpu: float = 0.0


def measured() -> Measured:
    """The figures that the plan is computed from, read from the files."""
    wall, cores = _numbers("input.txt", r"files of .*?, (\d+) kB each; (\d+) workers")
    rate = _numbers("input.txt", r"^JPEG files +([\d,]+) images/s")[0]
    decode, size = _numbers("scale.md", r"cutting ([\d.]+) ms of a core an image of (\d+) kB")
    hours = _numbers("scale.md", r"^\| 1 \| [\d,]+ \| [\d.]+ \| ([\d,]+) \|")[0]
    store = _numbers("scale.md", r"a store of ([\d.]+) GB/s")[0]
    compare = _numbers("scale_duplicates.md", r"^\| 1,000,000 \| [\d,]+ \| [\d,]+ \| ([\d,]+) \|")[0]
    listing = _numbers("million.txt", r"^1,000,000 +([\d.]+) s")[0]
    more, megabytes = _numbers("million.txt", r"^([\d,]+) more files take (\d+) MB")
    batch, step = _numbers(
        "step_gpu.txt", r"^resnet50 x 1, batch (\d+) of 224x224.*?encoder alone, same views +([\d.]+) ms"
    )
    view = step / 1e3 / batch / VIEWS
    plain, ray = (
        re.findall(rf"^two {kind}: .*?, ([\d.]+) s of the", _text("cluster.txt"), re.M)
        for kind in ("processes", "Ray nodes")
    )
    shares = sorted(float(b) / float(a) - 1 for a, b in zip(plain, ray, strict=True))
    return Measured(
        kilobytes=(wall, size),
        decode=(cores / rate, decode / 1e3),
        compare=compare / 1e6,
        list=listing / 1e6,
        listed_bytes=megabytes * 1e6 / more,
        view=view,
        train=hours * 3600 / 1e9,
        multiply=3 * RESNET50 / view,
        more=(shares[0], shares[-1]),
        store=store * 1e9,
    )


def _text(name: str) -> str:
    return (RESULTS / name).read_text()


def _numbers(name: str, pattern: str) -> list[float]:
    match = re.search(pattern, _text(name), re.M | re.S)
    assert match, f"{name} has no {pattern}"
    return [float(text.replace(",", "")) for text in match.groups()]


def lines(images: float, price: float | None = None) -> list[str]:
    """The plan of so many images as a table; with the price of a GPU's hour, what the GPUs cost."""
    priced = price is not None
    heading = "| what | of it | because |" + (" cost |" if priced else "")
    table = [heading, "|---" * (3 + priced) + "|"]
    for row in rows(images, measured()):
        cost = f" {row.gpu * price:,.0f} |" if price is not None and row.gpu else " |" if priced else ""
        table.append(f"| {row.what} | {row.figure} | {row.because} |{cost}")
    return table


def rows(images: float, m: Measured) -> list[Row]:
    """The lines of the plan, in the order in which the work is done."""
    return [*_reading(images, m), *_duplicates(images, m), *_features(images, m)]


def _reading(images: float, m: Measured) -> list[Row]:
    return [
        Row(
            "shards",
            _range([images * 1e3 * k for k in m.kilobytes], _bytes),
            f"{m.kilobytes[0]:.0f} and {m.kilobytes[1]:.0f} kB an image: `input.txt`, `scale.md`",
        ),
        Row(
            "reading them once",
            _range([images * 1e3 * k / m.store / 3600 for k in m.kilobytes], "{:.1f}".format) + " hours",
            f"a store of {m.store / 1e9:.0f} GB/s, as `scale.md` assumes",
        ),
        Row(
            "a list of single files",
            f"{_bytes(images * m.listed_bytes)} of memory, {images * m.list / 3600:.1f} hours",
            f"{m.listed_bytes:.0f} bytes and {1e6 * m.list:.1f} us a file: `million.txt`; shards instead",
        ),
        Row(
            "decoding",
            _range([images * seconds / 3600 for seconds in m.decode], "{:,.0f}".format) + " core hours",
            f"{1e3 * m.decode[0]:.1f} and {1e3 * m.decode[1]:.1f} ms of a core an image: `input.txt`, `scale.md`",
        ),
        Row(
            "`--engine ray` on top",
            f"{100 * m.more[0]:.0f} to {100 * m.more[1]:.0f} %",
            "core seconds beside plain processes: `cluster.txt`",
        ),
    ]


def _duplicates(images: float, m: Measured) -> list[Row]:
    record, cells = 3 * SIDE**2 + 4 * 8, images / CELL
    assigned = images * cells * OUTLINE / m.multiply / 3600
    grouped = ROUNDS * SAMPLED * cells * cells * OUTLINE / m.multiply / 3600
    return [
        Row(
            "sketches of `inspect --full_scan`",
            _bytes(images * 16),
            "16 bytes: a checksum, a number; counts of sizes and formats do not grow",
        ),
        Row(
            "records of all images",
            _bytes(images * record),
            f"{record:,} bytes: a picture of {SIDE} x {SIDE}, its size, a checksum, a number",
        ),
        Row("outlines", _bytes(images * OUTLINE * 4), f"{OUTLINE} values of 4 bytes"),
        Row("cells", f"{cells:,.0f}", f"{CELL} outlines each"),
        Row(
            "their centres",
            f"{grouped:.1f} GPU hours",
            f"{ROUNDS} rounds of k-means on {SAMPLED} outlines a cell, at {m.multiply / 1e12:.0f} T multiplications/s: "
            "ResNet-50's in `step_gpu.txt`",
            grouped,
        ),
        Row(
            "outlines to their cells",
            f"{assigned:.1f} GPU hours",
            f"{images:.0e} x {cells:.1e} x {OUTLINE} multiplications, which grow with the square",
            assigned,
        ),
        Row(
            "comparing within cells",
            f"{images * m.compare / 3600:,.0f} core hours",
            f"{1e3 * m.compare:.2f} ms an image: a million in `scale_duplicates.md`; larger numbers have no row",
        ),
        Row(
            "exchanged for it",
            _bytes(images * (record + OUTLINE * 4)),
            "each record and outline goes once to the machine of its cell",
        ),
    ]


def _features(images: float, m: Measured) -> list[Row]:
    return [
        Row(
            "embedding by ResNet-50",
            f"at most {images * m.view / 3600:,.0f} GPU hours",
            f"{1e3 * m.view:.2f} ms a view, forward and backward: `step_gpu.txt`",
            images * m.view / 3600,
        ),
        Row(
            "its features",
            _bytes(images * FEATURES * 4),
            f"{FEATURES:,} values of 4 bytes, written by those that make them",
        ),
        Row(
            "one epoch of training",
            f"{images * m.train / 3600:,.0f} GPU hours",
            "`scale.md`, up to the GPUs that the store feeds",
            images * m.train / 3600,
        ),
    ]


def _range(ends: Sequence[float], written: Callable[[float], str]) -> str:
    low, high = ends
    return f"{written(low)} to {written(high)}"


def _bytes(count: float) -> str:
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1, "B"))
    unit, name = next((size, name) for size, name in units if count >= size)
    return f"{count / unit:,.0f} {name}" if count / unit >= 10 else f"{count / unit:.1f} {name}"
