"""A generated collection that is hard in the way road signs are: fine-grained, long-tailed, filmed as approaches.

python benchmarks/quality/plates.py FOLDER [--seed 0] writes FOLDER/train and FOLDER/test, a folder a class, PNG of 32
pixels.

43 classes are a shape, a scheme of colours and a sign (a character, an arrow, bars); many share shape and colours and
differ in the sign alone. An approach films one plate for 30 frames: light, background, wear and the plate's tilt are
the approach's; size, place, blur and noise change from frame to frame. Classes have from 3 to 60 approaches; the test
set has 8 other approaches of each class, 5 frames an approach.
"""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path
from typing import NamedTuple

import numpy
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

sys.path.append(str(Path(__file__).parents[1]))

from shared import records

SIDE, LARGE, FRAMES = 32, 128, 30
RED, BLUE, WHITE, BLACK, YELLOW, GREEN = (
    (190, 30, 40), (30, 80, 170), (235, 235, 235), (25, 25, 25), (235, 190, 40), (40, 130, 70)
)  # fmt: skip


class Kind(NamedTuple):
    """The look of a class: the plate's shape, its border, its ground and its ink, and its sign."""

    shape: str
    border: tuple[int, int, int]
    ground: tuple[int, int, int]
    ink: tuple[int, int, int]
    sign: str


def kinds() -> list[Kind]:
    """43 classes, of which most share shape and colours with others."""
    round_red = [Kind("circle", RED, WHITE, BLACK, sign) for sign in ("20", "30", "50", "60", "70", "80", "100", "120")]
    warning = [Kind("triangle", RED, WHITE, BLACK, sign) for sign in "!?AEFHKLMNRSTXZ"]
    blue = [Kind("circle", WHITE, BLUE, WHITE, sign) for sign in ("<", ">", "^", "/", "\\", "v", "Y", "+")]
    others = [
        Kind("diamond", WHITE, YELLOW, BLACK, " "), Kind("diamond", WHITE, YELLOW, BLACK, "/"),
        Kind("octagon", WHITE, RED, WHITE, "STOP"), Kind("octagon", WHITE, RED, WHITE, "-"),
        Kind("circle", BLACK, WHITE, BLACK, "/"), Kind("circle", BLACK, WHITE, BLACK, "80"),
        Kind("square", WHITE, BLUE, WHITE, "P"), Kind("square", WHITE, BLUE, WHITE, "H"),
        Kind("square", WHITE, GREEN, WHITE, "E"), Kind("square", WHITE, GREEN, WHITE, "A"),
        Kind("circle", RED, WHITE, BLACK, " "), Kind("triangle", RED, YELLOW, BLACK, "!"),
    ]  # fmt: skip
    return round_red + warning + blue + others


CORNERS = {"triangle": (3, -90), "square": (4, -45), "diamond": (4, 0), "octagon": (8, 22.5)}


def outline(shape: str, radius: float) -> list[tuple[float, float]]:
    """The corners of a plate around the middle."""
    count, first = CORNERS.get(shape, (48, 0))
    angles = (math.radians(first + 360 * i / count) for i in range(count))
    return [(LARGE / 2 + radius * math.cos(a), LARGE / 2 + radius * math.sin(a)) for a in angles]


def plate(kind: Kind) -> Image.Image:
    """One class's plate, face on, on a transparent ground."""
    image = Image.new("RGBA", (LARGE, LARGE))
    canvas = ImageDraw.Draw(image)
    canvas.polygon(outline(kind.shape, 60), fill=(*kind.border, 255))
    canvas.polygon(outline(kind.shape, 46), fill=(*kind.ground, 255))
    size = {1: 56, 2: 48, 3: 36, 4: 26}[len(kind.sign)]
    middle = LARGE / 2 + (8 if kind.shape == "triangle" else 0)
    font = ImageFont.load_default(size if kind.shape != "triangle" else size * 0.75)
    canvas.text((LARGE / 2, middle), kind.sign, fill=(*kind.ink, 255), font=font, anchor="mm", stroke_width=2,
               stroke_fill=(*kind.ink, 255))  # fmt: skip
    return image


ENHANCE = (ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Brightness)


def scenery(rng: random.Random) -> Image.Image:
    """The background of a plate: a few blurred patches of sky, leaves, walls."""
    tones = [(150, 180, 220), (90, 110, 60), (60, 80, 50), (140, 130, 120), (90, 90, 95), (180, 170, 150)]
    image = Image.new("RGB", (LARGE, LARGE), rng.choice(tones))
    canvas = ImageDraw.Draw(image)
    for _ in range(rng.randint(4, 12)):
        x, y, w, h = (rng.uniform(-30, LARGE) for _ in range(4))
        tone = tuple(max(0, min(255, c + rng.randint(-40, 40))) for c in rng.choice(tones))
        canvas.rectangle((x, y, x + abs(w), y + abs(h)), fill=tone)
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(2, 10)))


def approach(kind: Kind, rng: random.Random, count: int) -> list[Image.Image]:
    """``count`` frames of one plate, coming nearer."""
    sign, behind = plate(kind), scenery(rng)
    light, contrast, colour = rng.uniform(0.25, 1.3), rng.uniform(0.5, 1.1), rng.uniform(0.3, 1.2)
    tilt, squeeze, blur = rng.gauss(0, 6), rng.uniform(0.75, 1.0), rng.uniform(0, 1.5)
    cast = [rng.uniform(0.85, 1.15) for _ in range(3)]
    worn = sign.rotate(tilt, resample=Image.Resampling.BICUBIC)
    frames = []
    for i in range(count):
        share = (0.7 + 0.2 * i / max(1, count - 1)) * rng.uniform(0.97, 1.03)
        wide, high = max(8, round(LARGE * share * squeeze)), max(8, round(LARGE * share))
        resized = worn.resize((wide, high), Image.Resampling.BILINEAR)
        scene = behind.copy()
        left, top = (round((LARGE - side) / 2 + rng.gauss(0, 3)) for side in (wide, high))
        scene.paste(resized, (left, top), resized)
        # Far plates have few pixels of their own.
        own = round(14 + 34 * i / max(1, count - 1))
        scene = scene.filter(ImageFilter.GaussianBlur(1 + blur * rng.uniform(0.5, 1.5)))
        scene = scene.resize((own, own), Image.Resampling.BOX).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        for enhance, factor in zip(ENHANCE, (colour, contrast, light), strict=True):
            scene = enhance(scene).enhance(factor * rng.uniform(0.95, 1.05))
        grain = numpy.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(0, 8), (SIDE, SIDE, 3))
        values = numpy.asarray(scene, dtype=float) * cast + grain
        frames.append(Image.fromarray(values.round().clip(0, 255).astype("uint8")))
    return frames


def approaches(rank: int, classes: int) -> int:
    """The number of approaches of a class in the training set: from 60 down to 3."""
    return round(60 * (3 / 60) ** (rank / (classes - 1)))


def write(folder: Path, seed: int = 0) -> Path:
    """Make the collection where it is not yet complete."""
    if (folder / "done").exists():
        return folder
    classes = kinds()
    ranks = list(range(len(classes)))
    random.Random(seed).shuffle(ranks)
    for number, kind in enumerate(classes):
        rng = random.Random(f"{seed} {number}")
        for part, count, frames in (("train", approaches(ranks[number], len(classes)), FRAMES), ("test", 8, 5)):
            target = folder / part / f"{number:02}"
            target.mkdir(parents=True, exist_ok=True)
            for track in range(count):
                for i, frame in enumerate(approach(kind, rng, frames)):
                    frame.save(target / f"{track:04}_{i:02}.png")
    (folder / "done").touch()
    return folder


if __name__ == "__main__":
    parser = records.options(__doc__)
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(write(Path(arguments.folder), arguments.seed))
