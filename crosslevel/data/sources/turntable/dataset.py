"""Turntable: generated images of objects, each filmed on a turntable; correlated and long-tailed by design.

Every object is a handful of solids (ellipsoids, frusta, boxes, tori) whose proportions are its own, ray-cast
in closed form; the family of shapes is its class. Colours, patterns, scene, light and camera are drawn
independently of the class, so shape alone tells what an object is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from crosslevel.data.images import InMemoryImages
from crosslevel.data.sources.turntable.rays import LENS, Motion, Paint, Studio, render, scene
from crosslevel.data.sources.turntable.shapes import FAMILIES, Array, Solid, Uniform, centred
from crosslevel.utils.errors import UserError

_SPLITS = ("train", "test")
_SCHEMES = 10  # colour schemes: shared by many objects of all classes, as the studios are, so that objects
_STUDIOS = 4  # differ by their shape and pose, and not by their paint or surroundings
_NOISE = (0.003, 0.015)  # standard deviation of the sensor's noise
# torch starts threads for tensors beyond 32,768 numbers, once an operation: thousands of times an object, which
# on a busy machine costs far more than it gains. Below it, whole objects run in parallel and stay in the cache.
_RAYS_AT_ONCE = 1 << 15
_WORKERS = 4


class Turntable(InMemoryImages):
    """Frames of objects on turntables: near-duplicates within an object, a power law over the classes.

    Class c (from 0) has a share of the training objects proportional to (c + 1)^-a, with a such that the first
    class has ``imbalance`` times the objects of the last (to rounding). The test split is balanced and shows
    other objects. An object depends on ``seed``, its split, class and number alone. The same arguments give
    the same pixels, whatever the number of threads, on one kind of machine with one version of torch and NumPy.

    Args:
        split: ``train`` or ``test``.
        classes: how many shape families, 2 to 12, the most frequent first.
        objects: training objects in all.
        frames: consecutive frames of each training object.
        imbalance: objects in the most frequent class over those in the least frequent, at least 1.
        size: height and width in pixels, 8 to 512.
        test_objects: test objects a class.
        test_frames: frames of each test object, spread over as long a video as a training object's.
        seed: draws everything.
        rays_at_once: rays that a thread casts at a time, whole frames; it changes speed and memory, and no pixel.

    Raises:
        ValueError: a parameter is out of range, or ``objects`` cannot cover all classes.

    """

    def __init__(
        self,
        split: str = "train",
        classes: int = 12,
        objects: int = 540,
        frames: int = 20,
        imbalance: float = 20.0,
        size: int = 32,
        test_objects: int = 28,
        test_frames: int = 6,
        seed: int = 0,
        rays_at_once: int = _RAYS_AT_ONCE,
    ) -> None:
        if split not in _SPLITS:
            raise UserError(f"split={split!r} is not one of {', '.join(_SPLITS)}")
        for name, value, low, high in (
            ("classes", classes, 2, len(FAMILIES)),
            ("frames", frames, 1, 1000),
            ("size", size, 8, 512),
            ("test_objects", test_objects, 1, 100_000),
            ("test_frames", test_frames, 1, 1000),
            ("seed", seed, 0, 2**63 - 1),
        ):
            if not low <= value <= high:
                raise UserError(f"{name}={value} is out of range: choose {low} to {high}")
        counts = power_law_counts(classes, objects, imbalance)
        names, first, per_object, stride = list(FAMILIES)[:classes], 0, frames, 1.0
        if split == "test":
            counts, first, per_object, stride = (
                [test_objects] * classes,
                objects,
                test_frames,
                frames / test_frames,
            )
        owners = [(c, k) for c, count in enumerate(counts) for k in range(count)]
        data = _videos(split, names, owners, per_object, stride, size, seed, rays_at_once)
        paths = [
            f"{split}/{names[c]}/object-{first + i:04d}/frame-{f:02d}.png"
            for i, (c, _) in enumerate(owners)
            for f in range(per_object)
        ]
        labels = torch.tensor([c for c, _ in owners]).repeat_interleave(per_object)
        super().__init__(data, paths, labels, names, "turntable")
        self.tracks = torch.arange(first, first + len(owners)).repeat_interleave(per_object)


def _videos(
    split: str,
    names: list[str],
    owners: list[tuple[int, int]],
    per_object: int,
    stride: float,
    size: int,
    seed: int,
    rays: int,
) -> UInt8[Tensor, "N 3 size size"]:
    """Render ``per_object`` frames of each object (object k of class c)."""
    shared = np.random.default_rng((seed, len(_SPLITS)))
    schemes = [_colours(shared, 4, 0.75) for _ in range(_SCHEMES)]
    studios = [_draw_studio(shared) for _ in range(_STUDIOS)]
    data = torch.empty(len(owners) * per_object, 3, size, size, dtype=torch.uint8)

    def render_video(i: int) -> None:
        c, k = owners[i]
        rng = np.random.default_rng((seed, _SPLITS.index(split), c, k))
        frames = _video_of(FAMILIES[names[c]], rng, schemes, studios, per_object, stride, size, rays)
        data[i * per_object : (i + 1) * per_object] = frames

    with ThreadPoolExecutor(min(_WORKERS, torch.get_num_threads())) as pool:
        list(pool.map(render_video, range(len(owners))))
    return data


def power_law_counts(classes: int, objects: int, imbalance: float) -> list[int]:
    """The number of objects of each class: a power law, rounded by largest remainders.

    Args:
        classes: at least 2.
        objects: of all classes.
        imbalance: how many times as many objects the first class has as the last, before they are rounded; at least 1.

    Returns:
        ``classes`` numbers of at least 1, never increasing, whose sum is ``objects``.

    Raises:
        UserError: there are too few objects for that, or ``imbalance`` is below 1.

    """
    if not (math.isfinite(imbalance) and imbalance >= 1):
        raise UserError(f"imbalance={imbalance} is not a ratio of at least 1: 1 gives equal classes")
    weights = [(c + 1) ** (-math.log(imbalance) / math.log(classes)) for c in range(classes)]
    shares = [objects * weight / sum(weights) for weight in weights]
    if shares[-1] < 1:
        raise UserError(
            f"objects={objects} leaves the rarest of {classes} classes without an object at imbalance={imbalance}: "
            f"raise objects to {math.ceil(sum(weights) / weights[-1])} or lower imbalance"
        )
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(classes), key=lambda c: counts[c] - shares[c])
    for c in by_remainder[: objects - sum(counts)]:
        counts[c] += 1
    return counts


def _video_of(
    family: Callable[[Uniform], list[Solid]],
    rng: np.random.Generator,
    schemes: list[Array],
    studios: list[Studio],
    frames: int,
    stride: float,
    size: int,
    rays: int,
) -> UInt8[Tensor, "F 3 S S"]:
    """All frames of the one object that ``rng`` draws."""
    solids, floor = centred(family(rng.uniform))
    studio, paint = studios[rng.integers(len(studios))], _draw_paint(rng, schemes)
    motion = _draw_motion(rng, frames, stride)
    noise = torch.from_numpy(rng.standard_normal((frames, 3, size, size), dtype=np.float32)).mul_(rng.uniform(*_NOISE))
    step = max(1, rays // (4 * size * size))
    for i in range(0, frames, step):
        segment = Motion(*(track[i : i + step] for track in motion))
        colour, cover = render(solids, floor, paint, segment, size)
        noise[i : i + step] += colour + (1 - cover) * scene(solids, floor, studio, segment, size)
    return noise.mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def _colours(rng: np.random.Generator, count: int, saturation: float) -> Array:
    """(count, 3) colours of any hue."""
    hue, tint = rng.uniform(size=(count, 1)), rng.uniform(0.1, 1, (count, 1)) * saturation
    wheel = 0.5 - 0.5 * np.cos(2 * np.pi * (hue + np.array([0, 1 / 3, 2 / 3])))
    colours: Array = rng.uniform(0.4, 1, (count, 1)) * (1 - tint * wheel)
    return colours


def _draw_paint(rng: np.random.Generator, schemes: list[Array]) -> Paint:
    wave = rng.standard_normal((3, 3))
    return Paint(
        palette=schemes[rng.integers(len(schemes))] * rng.uniform(0.9, 1.1),
        pattern=int(rng.integers(0, 5)),
        wave=wave / np.linalg.norm(wave, axis=1, keepdims=True) * rng.uniform(5, 12),
        contrast=float(rng.uniform(0.2, 0.7)),
        gloss=float(rng.uniform(0, 0.6)),
    )


def _draw_studio(rng: np.random.Generator) -> Studio:
    backdrop = np.tile(_colours(rng, 1, 0.35)[0][:, None, None], (1, 24, 48))
    for colour in _colours(rng, 14, 0.4):
        x, y, w, h = rng.integers(0, 44), rng.integers(0, 22), rng.integers(4, 14), rng.integers(4, 14)
        backdrop[:, y : y + h, x : x + w] += rng.uniform(0.1, 0.5) * (colour[:, None, None] - backdrop[:, :1, :1])
    for _ in range(3):
        padded = np.pad(backdrop, ((0, 0), (1, 1), (1, 1)), mode="edge")
        backdrop = np.mean([padded[:, i : i + 24, j : j + 48] for i in range(3) for j in range(3)], axis=0)
    ground = _colours(rng, 3, 0.3)
    ground[2] = 0.5 * (ground[1] + ground[2])
    return Studio(
        ground=ground,
        grain=rng.uniform([0, 1, 3], [0.06, 4, 14]),
        disc=float(rng.uniform(0.9, 1.3)),
        edge=float(rng.uniform(1.2, 3)),
        marks=int(rng.integers(8, 30)),
        backdrop=backdrop,
    )


def _draw_motion(rng: np.random.Generator, frames: int, stride: float) -> Motion:
    time = np.arange(frames) * stride

    def drift(low: float, high: float, swing: float) -> Array:
        """(F,) a slow wave of height ``swing`` around a value between low and high, with a little jitter."""
        wave = np.sin(2 * np.pi * (time / rng.uniform(20, 40) + rng.uniform()))
        value: Array = rng.uniform(low, high) + swing * (wave + 0.08 * rng.standard_normal(frames))
        return value

    turn = rng.choice([-1, 1]) * np.radians(rng.uniform(2.5, 6)) * (time - time.mean())
    yaw = np.radians(rng.uniform(40, 140)) + turn + np.radians(0.7) * rng.standard_normal(frames)
    rise, roll = np.radians(drift(12, 32, 3)), np.radians(drift(-4, 4, 1.5))
    ahead = np.stack([-np.cos(rise) * np.cos(yaw), -np.sin(rise), -np.cos(rise) * np.sin(yaw)], 1)
    right = np.stack([np.sin(yaw), 0 * yaw, -np.cos(yaw)], 1)
    up = np.cross(right, ahead)
    right, up = (
        np.cos(roll)[:, None] * right + np.sin(roll)[:, None] * up,
        np.cos(roll)[:, None] * up - np.sin(roll)[:, None] * right,
    )
    fill = drift(0.9, 1.15, 0.06)[:, None]
    aside = drift(-0.08, 0.08, 0.04)[:, None] * right + drift(-0.08, 0.08, 0.04)[:, None] * up
    azimuth, height = yaw + np.radians(drift(-90, 90, 20)), np.radians(drift(25, 65, 8))
    sun = np.stack([np.cos(height) * np.cos(azimuth), np.sin(height), np.cos(height) * np.sin(azimuth)], 1)
    warmth = drift(-0.08, 0.08, 0.04)[:, None] * np.array([1, 0, -1])
    return Motion(
        eye=aside - ahead / (LENS * fill),
        basis=np.stack([right, up, ahead], 1),
        sun=sun,
        key=drift(0.55, 0.9, 0.1)[:, None] * (1 + warmth),
        fill=drift(0.35, 0.55, 0.05)[:, None] * (1 - 0.5 * warmth),
        pan=np.stack([drift(-0.4, 0.4, 0.06), drift(-0.3, 0.3, 0.04)], 1),
    )
