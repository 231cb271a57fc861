"""Turntable: generated images of objects, each filmed on a turntable; correlated and long-tailed by design.

Every object is a handful of solids (ellipsoids, frusta, boxes, tori) whose proportions are its own, ray-cast
in closed form; the family of shapes is its class. Colours, patterns, scene, light and camera are drawn
independently of the class, so shape alone tells what an object is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from crosslevel.images.sources import Packed

_Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
_Uniform = Callable[[float, float], float]
_SPLITS = ("train", "test")
_LENS = 0.27  # half the picture's width over the distance: a 30 degree lens
_SCHEMES = 10  # colour schemes: shared by many objects of all classes, as the studios are, so that what tells
_STUDIOS = 4  # objects apart is their shape and pose, and not their paint or surroundings
_NOISE = (0.003, 0.015)  # standard deviation of the sensor's noise
# torch starts threads for tensors beyond 32,768 numbers, once an operation: thousands of times an object, which
# on a busy machine costs far more than it gains. Below it, whole objects run in parallel and stay in the cache.
_RAYS_AT_ONCE = 1 << 15
_WORKERS = 4


class Turntable(Packed):
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
        test_frames: frames of each test object, spread over as long a film as a training object's.
        seed: draws everything.

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
    ) -> None:
        if split not in _SPLITS:
            raise ValueError(f"split={split!r} is not one of {', '.join(_SPLITS)}")
        for name, value, low, high in (
            ("classes", classes, 2, len(FAMILIES)),
            ("frames", frames, 1, 1000),
            ("size", size, 8, 512),
            ("test_objects", test_objects, 1, 100_000),
            ("test_frames", test_frames, 1, 1000),
            ("seed", seed, 0, 2**63 - 1),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name}={value} is out of range: choose {low} to {high}")
        counts = _power_law(classes, objects, imbalance)
        names, first, shown, stride = list(FAMILIES)[:classes], 0, frames, 1.0
        if split == "test":
            counts, first, shown, stride = (
                [test_objects] * classes,
                objects,
                test_frames,
                frames / test_frames,
            )
        owners = [(c, k) for c, count in enumerate(counts) for k in range(count)]
        shared = np.random.default_rng((seed, len(_SPLITS)))
        schemes = [_colours(shared, 4, 0.75) for _ in range(_SCHEMES)]
        studios = [_draw_studio(shared) for _ in range(_STUDIOS)]
        data = torch.empty(len(owners) * shown, 3, size, size, dtype=torch.uint8)

        def film(i: int) -> None:
            c, k = owners[i]
            rng = np.random.default_rng((seed, _SPLITS.index(split), c, k))
            data[i * shown : (i + 1) * shown] = _film_object(
                FAMILIES[names[c]], rng, schemes, studios, shown, stride, size
            )

        with ThreadPoolExecutor(min(_WORKERS, torch.get_num_threads())) as pool:
            list(pool.map(film, range(len(owners))))
        paths = [
            f"{split}/{names[c]}/object-{first + i:04d}/frame-{f:02d}.png"
            for i, (c, _) in enumerate(owners)
            for f in range(shown)
        ]
        labels = torch.tensor([c for c, _ in owners]).repeat_interleave(shown)
        super().__init__(data, paths, labels, names, "turntable")
        self.tracks = torch.arange(first, first + len(owners)).repeat_interleave(shown)


def _power_law(classes: int, objects: int, imbalance: float) -> list[int]:
    """Objects of each class, never increasing, ``objects`` in all (largest remainders)."""
    if not (math.isfinite(imbalance) and imbalance >= 1):
        raise ValueError(f"imbalance={imbalance} is not a ratio of at least 1: 1 gives equal classes")
    weights = [(c + 1) ** (-math.log(imbalance) / math.log(classes)) for c in range(classes)]
    shares = [objects * weight / sum(weights) for weight in weights]
    if shares[-1] < 1:
        raise ValueError(
            f"objects={objects} leaves the rarest of {classes} classes without an object at imbalance={imbalance}: "
            f"raise objects to {math.ceil(sum(weights) / weights[-1])} or lower imbalance"
        )
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(classes), key=lambda c: counts[c] - shares[c])
    for c in by_remainder[: objects - sum(counts)]:
        counts[c] += 1
    return counts


# ---------------------------------------------------------------------------------- solids and families


class _Solid(NamedTuple):
    """One solid: canonical coordinates times ``place`` (3, 4) are the object's; y is up, the floor y = 0.

    ball: |p| <= 1. box: |p|_max <= 1. rod: |y| <= 1, radius 1 + ``shape`` y, hollow inside ``hole`` times that.
    ring: a torus around y of radius 1, its tube of radius ``shape``.
    """

    kind: Literal["ball", "box", "rod", "ring"]
    place: _Array
    slot: int
    shape: float = 0.0
    hole: float = 0.0


_Point = tuple[float, float, float]


def _ball(at: _Point, radii: _Point, slot: int = 0) -> _Solid:
    return _Solid("ball", np.column_stack([np.diag(radii), at]), slot)


def _box(at: _Point, half: _Point, slot: int = 0, turn: float = 0.0) -> _Solid:
    """A box with half edges ``half``, turned by ``turn`` radians about z."""
    c, s = math.cos(turn), math.sin(turn)
    return _Solid("box", np.column_stack([np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) * half, at]), slot)


def _axes(along: _Array, across: float) -> _Array:
    """Columns x, y, z: y is ``along``, the other two of length ``across`` and perpendicular."""
    helper = np.array([0.0, 0.0, 1.0]) if abs(along[2]) < 0.9 * np.linalg.norm(along) else np.array([1.0, 0.0, 0.0])
    x = np.cross(along, helper)
    x *= across / np.linalg.norm(x)
    z = np.cross(x, along)
    return np.column_stack([x, along, z * (across / np.linalg.norm(z))])


def _rod(a: _Point, b: _Point, r0: float, r1: float | None = None, slot: int = 0, hole: float = 0.0) -> _Solid:
    """A frustum from ``a`` (radius r0) to ``b`` (radius r1), a pipe if ``hole`` > 0."""
    low, high, end = np.array(a), np.array(b), r0 if r1 is None else r1
    place = np.column_stack([_axes((high - low) / 2, (r0 + end) / 2), (high + low) / 2])
    return _Solid("rod", place, slot, (end - r0) / (end + r0), hole)


def _ring(at: _Point, normal: _Point, radius: float, tube: float, slot: int = 0) -> _Solid:
    place = np.column_stack([_axes(np.array(normal) * radius, radius), at])
    return _Solid("ring", place, slot, tube / radius)


def _mug(u: _Uniform) -> list[_Solid]:
    h, r, grip = u(1.1, 2.2), u(0.6, 0.95), u(0.25, 0.36)
    top = r * u(0.85, 1.3)
    return [
        _rod((0, 0, 0), (0, h, 0), r, top, 0, 0.86),
        _rod((0, 0, 0), (0, 0.85 * h, 0), 0.9 * r, 0.9 * (r + 0.85 * (top - r)), 2),
        _ring(((r + top) / 2 + 0.25 * h * grip, h / 2, 0), (0, 0, 1), h * grip, h * u(0.05, 0.08), 1),
    ]


def _bottle(u: _Uniform) -> list[_Solid]:
    h, r, neck = u(1.2, 2.2), u(0.4, 0.75), u(0.14, 0.24)
    slope, long = u(0.25, 0.7), u(0.3, 0.8)
    end = h + slope + long
    return [
        _rod((0, 0, 0), (0, h, 0), r, r * u(0.85, 1.1)),
        _rod((0, h, 0), (0, h + slope, 0), r, neck),
        _rod((0, h + slope, 0), (0, end, 0), neck),
        _rod((0, end - 0.22, 0), (0, end + 0.08, 0), 1.25 * neck, None, 1),
    ]


def _legs(w: float, d: float, h: float, r: float, splay: float, slot: int) -> list[_Solid]:
    return [_rod((x * w * splay, 0, z * d * splay), (x * w, h, z * d), r, None, slot) for x in (-1, 1) for z in (-1, 1)]


def _chair(u: _Uniform) -> list[_Solid]:
    w, d, h, back, thick = u(0.55, 0.8), u(0.55, 0.8), u(0.7, 1.2), u(0.8, 1.4), u(0.05, 0.1)
    seat = _box((0, h, 0), (w, thick, d), 0)
    rest = [_box((0, h + back * (0.5 + 0.5 * u(0, 1)), thick - d), (w, back * u(0.2, 0.5), thick), 0)]
    posts = [_rod((x * 0.9 * w, h, thick - d), (x * 0.9 * w, h + back, thick - d), 0.07, None, 1) for x in (-1, 1)]
    return [seat, *rest, *posts, *_legs(0.85 * w, 0.85 * d, h, u(0.05, 0.1), u(1, 1.2), 1)]


def _car(u: _Uniform) -> list[_Solid]:
    long, wide, h, wheel = u(1.2, 1.7), u(0.5, 0.7), u(0.2, 0.34), u(0.24, 0.36)
    cab, shift = long * u(0.35, 0.65), u(-0.4, 0.3)
    wheels = [
        _rod((x * 0.62 * long, wheel, z * wide), (x * 0.62 * long, wheel, 1.12 * z * wide), wheel, None, 2)
        for x in (-1, 1)
        for z in (-1, 1)
    ]
    body = _box((0, wheel + h, 0), (long, h, wide), 0)
    cabin = _box((shift, wheel + 2 * h + 0.25, 0), (cab, u(0.22, 0.36), 0.88 * wide), 1)
    return [body, cabin, *wheels]


def _lamp(u: _Uniform) -> list[_Solid]:
    h, foot, wide, tall = u(1.2, 2.2), u(0.4, 0.7), u(0.6, 1.0), u(0.5, 0.9)
    return [
        _rod((0, 0, 0), (0, u(0.08, 0.2), 0), foot, foot * u(0.6, 1), 1),
        _rod((0, 0, 0), (0, h + 0.3 * tall, 0), u(0.05, 0.1), None, 1),
        _rod((0, h, 0), (0, h + tall, 0), wide, wide * u(0.35, 0.8), 0, 0.95),
    ]


def _duck(u: _Uniform) -> list[_Solid]:
    long, h, wide, head = u(0.85, 1.2), u(0.5, 0.75), u(0.5, 0.75), u(0.32, 0.5)
    x, y = long * u(0.5, 0.8), 2 * h * 0.8 + head * u(0.5, 1.2)
    return [
        _ball((0, h * 0.95, 0), (long, h, wide), 0),
        _ball((x, y, 0), (head, head, head), 0),
        _rod((x + 0.8 * head, y, 0), (x + head * u(1.5, 2), y - 0.05, 0), 0.45 * head, 0.08, 1),
        _rod((-0.75 * long, h, 0), (-1.25 * long, h * u(1.4, 1.9), 0), 0.3 * h, 0.04, 0),
        _ball((x + 0.6 * head, y + 0.4 * head, 0), (0.2 * head, 0.2 * head, 0.9 * head), 2),
    ]


def _table(u: _Uniform) -> list[_Solid]:
    w, d, h, thick = u(0.9, 1.5), u(0.6, 1.0), u(0.8, 1.3), u(0.05, 0.11)
    if u(0, 1) < 0.6:
        return [
            _box((0, h, 0), (w, thick, d), 0),
            *_legs(0.85 * w, 0.85 * d, h, u(0.05, 0.11), u(0.9, 1.15), 1),
        ]
    return [
        _rod((0, h, 0), (0, h + 2 * thick, 0), w, None, 0),
        _rod((0, 0, 0), (0, h, 0), u(0.1, 0.2), None, 1),
        _rod((0, 0, 0), (0, 0.1, 0), 0.5 * w, 0.4 * w, 1),
    ]


def _tree(u: _Uniform) -> list[_Solid]:
    trunk, r, tier, shrink = u(0.3, 0.7), u(0.6, 1.0), u(0.6, 0.95), u(0.65, 0.85)
    step = tier * u(0.5, 0.75)
    tiers = [
        _rod((0, trunk + i * step, 0), (0, trunk + i * step + tier, 0), r * shrink**i, 0.02, 0)
        for i in range(2 + int(u(0, 2.99)))
    ]
    return [_rod((0, 0, 0), (0, trunk, 0), u(0.1, 0.22), None, 1), *tiers]


def _house(u: _Uniform) -> list[_Solid]:
    w, d, h, rise = u(0.6, 0.95), u(0.7, 1.3), u(0.4, 0.8), u(0.5, 0.9)
    ridge = _box((0, 0, 0), (1, 1, 1), 1, math.pi / 4).place
    slopes = np.diag([1.12 * w / 2**0.5, rise / 2**0.5, 1.08 * d]) @ ridge + [
        [0, 0, 0, 0],
        [0, 0, 0, 2 * h],
        [0] * 4,
    ]
    return [
        _box((0, h, 0), (w, h, d), 0),
        _Solid("box", slopes, 1),
        _box((0.5 * w, 2 * h + 0.6 * rise, u(-0.6, 0.6) * d), (0.12, 0.5 * rise, 0.12), 2),
        _box((u(-0.3, 0.3) * w, 0.5 * h, d), (0.2 * w, 0.5 * h, 0.03), 2),
        _box((w, h, 0), (0.03, 0.3 * h, 0.5 * d), 2),
    ]


def _gear(u: _Uniform) -> list[_Solid]:
    r, thick, tooth = 1.0, u(0.15, 0.32), u(0.16, 0.26)
    count, wide, y = 6 + int(u(0, 4.99)), u(0.13, 0.2), 1.2
    angles = [2 * math.pi * i / count for i in range(count)]
    teeth = [
        _box(
            ((r + 0.8 * tooth) * math.cos(a), y + (r + 0.8 * tooth) * math.sin(a), 0),
            (tooth, wide, thick),
            0,
            a,
        )
        for a in angles
    ]
    wheel = _rod((0, y, -thick), (0, y, thick), r, None, 0, u(0.25, 0.7))
    return [wheel, *teeth, _box((0, 0.07, 0), (0.5, 0.07, 0.35), 1)]


def _dumbbell(u: _Uniform) -> list[_Solid]:
    long, r, grip = u(0.7, 1.2), u(0.35, 0.6), u(0.08, 0.16)
    bar = _rod((-long, r, 0), (long, r, 0), grip, None, 1)
    if u(0, 1) < 0.5:
        return [bar, *(_ball((x * long, r, 0), (r, r, r), 0) for x in (-1, 1))]
    ends = [(x, s) for x in (-1, 1) for s in (0.0, 1.0)]
    wide = u(0.12, 0.2)
    return [
        bar,
        *(
            _rod(
                (x * (long - s * 2 * wide), r, 0),
                (x * (long - (2 * s - 1.8) * wide), r, 0),
                r * (1 - 0.25 * s),
            )
            for x, s in ends
        ),
    ]


def _mushroom(u: _Uniform) -> list[_Solid]:
    h, r, cap = u(0.7, 1.4), u(0.16, 0.35), u(0.65, 1.1)
    return [
        _rod((0, 0, 0), (0, h, 0), r * u(1, 1.5), r, 1),
        _ball((0, h, 0), (cap, cap * u(0.4, 0.8), cap), 0),
    ]


FAMILIES: dict[str, Callable[[_Uniform], list[_Solid]]] = {
    "house": _house,
    "table": _table,
    "gear": _gear,
    "car": _car,
    "dumbbell": _dumbbell,
    "chair": _chair,
    "mug": _mug,
    "mushroom": _mushroom,
    "lamp": _lamp,
    "duck": _duck,
    "bottle": _bottle,
    "tree": _tree,
}


# ---------------------------------------------------------------------------------- filming


class _Film(NamedTuple):
    """What changes from frame to frame, in the object's coordinates (which turn with the table)."""

    eye: _Array  # (F, 3)
    basis: _Array  # (F, 3, 3): right, up and forward of the camera
    sun: _Array  # (F, 3): unit vector to the light
    key: _Array  # (F, 3): colour of the light
    fill: _Array  # (F, 3): colour of the light from everywhere
    pan: _Array  # (F, 2): where the backdrop is


class _Paint(NamedTuple):
    """What an object's surfaces look like."""

    palette: _Array  # (4, 3): one colour a slot; the fourth is the pattern's
    pattern: int
    wave: _Array  # (3, 3): directions times frequencies of the pattern
    contrast: float
    gloss: float


class _Studio(NamedTuple):
    """Where objects are filmed."""

    ground: _Array  # (3, 3): table, disc, marks
    grain: _Array  # (3,): depth and two frequencies of the table's grain
    disc: float
    edge: float
    marks: int
    backdrop: _Array  # (3, 24, 48)


def _film_object(
    family: Callable[[_Uniform], list[_Solid]],
    rng: np.random.Generator,
    schemes: list[_Array],
    studios: list[_Studio],
    frames: int,
    stride: float,
    size: int,
) -> UInt8[Tensor, "F 3 S S"]:
    """All frames of the one object that ``rng`` draws."""
    solids, floor = _centred(family(rng.uniform))
    studio, paint = studios[rng.integers(len(studios))], _draw_paint(rng, schemes)
    film = _draw_film(rng, frames, stride)
    noise = torch.from_numpy(rng.standard_normal((frames, 3, size, size), dtype=np.float32)).mul_(rng.uniform(*_NOISE))
    step = max(1, _RAYS_AT_ONCE // (4 * size * size))
    for i in range(0, frames, step):
        some = _Film(*(track[i : i + step] for track in film))
        colour, cover = _render(solids, floor, paint, some, size)
        noise[i : i + step] += colour + (1 - cover) * _scene(solids, floor, studio, some, size)
    return noise.mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def _centred(solids: list[_Solid]) -> tuple[list[_Solid], float]:
    """The solids around the origin and of radius about 1, and the height of the floor there."""
    points = np.concatenate([_corners(solid) for solid in solids])
    low, high = points.min(0), points.max(0)
    middle, scale = (low + high) / 2, 1 / np.linalg.norm((high - low) / 2)
    shift = np.column_stack([np.zeros((3, 3)), middle])
    return [solid._replace(place=(solid.place - shift) * scale) for solid in solids], float(-middle[1] * scale)


def _corners(solid: _Solid) -> _Array:
    """(8, 3) corners of a box around ``solid``."""
    wide = {"rod": 1 + abs(solid.shape), "ring": 1 + solid.shape}.get(solid.kind, 1.0)
    tall = solid.shape if solid.kind == "ring" else 1.0
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    return (signs * [wide, tall, wide]) @ solid.place[:, :3].T + solid.place[:, 3]


def _colours(rng: np.random.Generator, count: int, saturation: float) -> _Array:
    """(count, 3) colours of any hue."""
    hue, tint = rng.uniform(size=(count, 1)), rng.uniform(0.1, 1, (count, 1)) * saturation
    wheel = 0.5 - 0.5 * np.cos(2 * np.pi * (hue + np.array([0, 1 / 3, 2 / 3])))
    colours: _Array = rng.uniform(0.4, 1, (count, 1)) * (1 - tint * wheel)
    return colours


def _draw_paint(rng: np.random.Generator, schemes: list[_Array]) -> _Paint:
    wave = rng.standard_normal((3, 3))
    return _Paint(
        palette=schemes[rng.integers(len(schemes))] * rng.uniform(0.9, 1.1),
        pattern=int(rng.integers(0, 5)),
        wave=wave / np.linalg.norm(wave, axis=1, keepdims=True) * rng.uniform(5, 12),
        contrast=float(rng.uniform(0.2, 0.7)),
        gloss=float(rng.uniform(0, 0.6)),
    )


def _draw_studio(rng: np.random.Generator) -> _Studio:
    backdrop = np.tile(_colours(rng, 1, 0.35)[0][:, None, None], (1, 24, 48))
    for colour in _colours(rng, 14, 0.4):
        x, y, w, h = rng.integers(0, 44), rng.integers(0, 22), rng.integers(4, 14), rng.integers(4, 14)
        backdrop[:, y : y + h, x : x + w] += rng.uniform(0.1, 0.5) * (colour[:, None, None] - backdrop[:, :1, :1])
    for _ in range(3):
        padded = np.pad(backdrop, ((0, 0), (1, 1), (1, 1)), mode="edge")
        backdrop = np.mean([padded[:, i : i + 24, j : j + 48] for i in range(3) for j in range(3)], axis=0)
    ground = _colours(rng, 3, 0.3)
    ground[2] = 0.5 * (ground[1] + ground[2])
    return _Studio(
        ground=ground,
        grain=rng.uniform([0, 1, 3], [0.06, 4, 14]),
        disc=float(rng.uniform(0.9, 1.3)),
        edge=float(rng.uniform(1.2, 3)),
        marks=int(rng.integers(8, 30)),
        backdrop=backdrop,
    )


def _draw_film(rng: np.random.Generator, frames: int, stride: float) -> _Film:
    time = np.arange(frames) * stride

    def drift(low: float, high: float, swing: float) -> _Array:
        """(F,) a slow wave of height ``swing`` around a value between low and high, with a little jitter."""
        wave = np.sin(2 * np.pi * (time / rng.uniform(20, 40) + rng.uniform()))
        value: _Array = rng.uniform(low, high) + swing * (wave + 0.08 * rng.standard_normal(frames))
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
    return _Film(
        eye=aside - ahead / (_LENS * fill),
        basis=np.stack([right, up, ahead], 1),
        sun=sun,
        key=drift(0.55, 0.9, 0.1)[:, None] * (1 + warmth),
        fill=drift(0.35, 0.55, 0.05)[:, None] * (1 - 0.5 * warmth),
        pan=np.stack([drift(-0.4, 0.4, 0.06), drift(-0.3, 0.3, 0.04)], 1),
    )


# ---------------------------------------------------------------------------------- ray casting

_Map = Float[Tensor, "F H W"]
_Vector = Sequence[Tensor]  # its three coordinates


def _column(values: _Array) -> Tensor:
    """(F,) or (F, n) numbers as float32 (F, 1, 1) or (F, n, 1, 1)."""
    return torch.from_numpy(values).float()[..., None, None]


def _directions(basis: _Array, xs: Tensor, ys: Tensor) -> _Vector:
    """The rays through the pixels (ys, xs): forward + x right + y up, a sum of a row and a column."""
    right, up, ahead = (_column(basis[:, i]) for i in range(3))
    return tuple((ahead[:, i] + xs * right[:, i]) + ys[:, None] * up[:, i] for i in range(3))


def _dot(a: _Vector, b: _Vector) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _render(
    solids: list[_Solid], floor: float, paint: _Paint, film: _Film, size: int
) -> tuple[Float[Tensor, "F 3 S S"], Float[Tensor, "F 1 S S"]]:
    """The object alone, sampled at 2 x 2 points a pixel: colour times cover, and cover in [0, 1]."""
    fine = ((torch.arange(2 * size) + 0.5) / size - 1) * _LENS
    depth, normal, slot = _cast(solids, film, fine)
    hit = depth < torch.inf
    rays = _directions(film.basis, fine, -fine)
    colour = _shade(torch.where(hit, depth, 0), normal, slot, rays, paint, film, floor)
    return F.avg_pool2d(colour.mul_(hit[:, None]), 2), F.avg_pool2d(hit[:, None].float(), 2)


def _cast(solids: list[_Solid], film: _Film, fine: Tensor) -> tuple[_Map, Float[Tensor, "3 F H W"], Tensor]:
    """Distance to the nearest solid along each ray (inf: none), the normal there (any length), and its slot."""
    shape = (len(film.eye), len(fine), len(fine))
    depth, normal, slot = (
        torch.full(shape, torch.inf),
        torch.zeros(3, *shape),
        torch.zeros(shape, dtype=torch.int64),
    )
    for solid in solids:
        rows, columns = _window(solid, film, len(fine))
        inverse = np.linalg.inv(solid.place[:, :3])
        origin = _column(np.einsum("ij,fj->fi", inverse, film.eye - solid.place[:, 3])).unbind(1)
        rays = _directions(np.einsum("ij,fkj->fki", inverse, film.basis), fine[columns], -fine[rows])
        t, gradient = _HITS[solid.kind](origin, rays, solid)
        view = (slice(None), rows, columns)
        nearer = t < depth[view]
        depth[view] = torch.where(nearer, t, depth[view])
        slot[view] = slot[view].masked_fill(nearer, solid.slot)
        for j in range(3):
            component = sum(gradient[i] * float(inverse[i, j]) for i in range(3) if abs(inverse[i, j]) > 1e-9)
            normal[j][view] = torch.where(nearer, component, normal[j][view])
    return depth, normal, slot


def _window(solid: _Solid, film: _Film, pixels: int) -> tuple[slice, slice]:
    """The rows and columns of the picture that ``solid`` can touch in any of the frames."""
    seen = np.einsum("fij,fcj->fci", film.basis, _corners(solid) - film.eye[:, None])
    across = (seen[..., :2] / seen[..., 2:] / _LENS * [1, -1] + 1) / 2 * pixels
    low, high = np.floor(across.min((0, 1))) - 1, np.ceil(across.max((0, 1))) + 1
    (x0, y0), (x1, y1) = np.clip(low, 0, pixels - 1).astype(int), np.clip(high, 1, pixels).astype(int)
    return slice(y0, y1), slice(x0, x1)


def _hit_ball(o: _Vector, d: _Vector, solid: _Solid) -> tuple[Tensor, _Vector]:
    a, b, c = _dot(d, d), _dot(o, d), _dot(o, o) - 1
    t = -(b + (b * b - a * c).sqrt()) / a
    return t, (o[0] + t * d[0], o[1] + t * d[1], o[2] + t * d[2])


def _hit_box(o: _Vector, d: _Vector, solid: _Solid) -> tuple[Tensor, _Vector]:
    near, far = [], []
    for i in range(3):
        inverse = 1 / d[i]
        middle, half = -o[i] * inverse, inverse.abs()
        near.append(middle - half)
        far.append(middle + half)
    t = torch.maximum(torch.maximum(near[0], near[1]), near[2])
    out = torch.minimum(torch.minimum(far[0], far[1]), far[2])
    return torch.where(t <= out, t, torch.inf), tuple((side == t).float() for side in near)


def _hit_rod(o: _Vector, d: _Vector, solid: _Solid) -> tuple[Tensor, _Vector]:
    k, wall = solid.shape, torch.full((), torch.inf)
    for s in (1.0, solid.hole) if solid.hole else (1.0,):
        radius = s * (1 + k * o[1])
        a = d[0] * d[0] + d[2] * d[2] - (s * k) ** 2 * d[1] * d[1]
        b = o[0] * d[0] + o[2] * d[2] - s * k * radius * d[1]
        root = (b * b - a * (o[0] * o[0] + o[2] * o[2] - radius * radius)).sqrt()
        for side in (-root, root):
            t = (side - b) / a
            wall = torch.minimum(wall, torch.where((o[1] + t * d[1]).abs() <= 1, t, torch.inf))
    end = torch.where(o[1] > 0, 1.0, -1.0)
    cap = (end - o[1]) / d[1]
    reach = (o[0] + cap * d[0]) ** 2 + (o[2] + cap * d[2]) ** 2
    edge = (1 + k * end) ** 2
    on_cap = (reach <= edge) & (reach >= solid.hole**2 * edge) & (cap < wall)
    t = torch.where(on_cap, cap, wall)
    x, z = o[0] + t * d[0], o[2] + t * d[2]
    slope = -k * (x * x + z * z) / (1 + k * (o[1] + t * d[1])).clamp_min(1e-3)
    return t, (x.masked_fill(on_cap, 0), torch.where(on_cap, end, slope), z.masked_fill(on_cap, 0))


def _hit_ring(o: _Vector, d: _Vector, solid: _Solid) -> tuple[Tensor, _Vector]:
    """Sphere tracing: a torus has no short closed form."""
    speed = _dot(d, d).rsqrt()
    t = (_dot(o, o).sqrt() - 1 - solid.shape) * speed
    for _ in range(32):
        x, y, z = o[0] + t * d[0], o[1] + t * d[1], o[2] + t * d[2]
        axis = (x * x + z * z).sqrt()
        away = ((axis - 1) ** 2 + y * y).sqrt() - solid.shape
        t = t + away * speed
    pull = 1 - 1 / axis.clamp_min(1e-3)
    return torch.where(away < 0.01, t, torch.inf), (x * pull, y, z * pull)


_HITS = {"ball": _hit_ball, "box": _hit_box, "rod": _hit_rod, "ring": _hit_ring}


def _shade(
    t: _Map,
    normal: Float[Tensor, "3 F H W"],
    slot: Tensor,
    rays: _Vector,
    paint: _Paint,
    film: _Film,
    floor: float,
) -> Float[Tensor, "F 3 H W"]:
    """Lambert and Phong, darker towards the floor."""
    eye, sun, key, fill = (_column(track).unbind(1) for track in (film.eye, film.sun, film.key, film.fill))
    at = [eye[i] + t * rays[i] for i in range(3)]
    towards = normal.unbind()
    facing = _dot(towards, rays)
    scale = _dot(towards, towards).clamp_min(1e-12).rsqrt() * torch.where(facing > 0, -1.0, 1.0)
    nx, ny, nz = (component * scale for component in towards)
    lambert = nx * sun[0] + ny * sun[1] + nz * sun[2]
    speed = _dot(rays, rays).rsqrt()
    mirror = (_dot(rays, sun) - 2 * lambert * (facing * scale)) * speed
    shine = paint.gloss * mirror.clamp_min(0).square().square().square().square()
    lambert = lambert.clamp_min(0)
    soft = (0.72 + 0.28 * ny) * (0.45 + 0.55 * ((at[1] - floor) * 2).clamp(0, 1))
    mix = _pattern(at, paint).mul_(paint.contrast * (slot == 0))
    palette = torch.from_numpy(paint.palette).float()
    planes = []
    for c in range(3):
        own = palette[:, c][slot]
        own = own + mix * (palette[3, c] - own)
        planes.append(own * (lambert * key[c] + soft * fill[c]) + shine * key[c])
    return torch.stack(planes, 1)


def _pattern(at: list[Tensor], paint: _Paint) -> _Map:
    """How much of the pattern's colour is where, in [0, 1]: plain, stripes, blobs, checks or marble."""
    if paint.pattern == 0:
        return torch.zeros_like(at[0])
    a, b, c = (at[0] * w[0] + at[1] * w[1] + at[2] * w[2] for w in paint.wave.tolist())
    if paint.pattern == 1:
        value = a.sin()
    elif paint.pattern == 2:
        value = a.sin() + b.sin() + c.sin() - 0.7
    elif paint.pattern == 3:
        value = 2 * a.sin() * b.sin()
    else:
        value = (a + 2 * (b + c.sin()).sin()).sin()
    return torch.sigmoid(4 * value)


def _scene(solids: list[_Solid], floor: float, studio: _Studio, film: _Film, size: int) -> Float[Tensor, "F 3 S S"]:
    """What is behind the object: the turntable on a table with the object's shadow, and a blurred backdrop."""
    coarse = ((torch.arange(size) + 0.5) * 2 / size - 1) * _LENS
    rays = _directions(film.basis, coarse, -coarse)
    eye, sun, key, fill = (_column(track).unbind(1) for track in (film.eye, film.sun, film.key, film.fill))
    t = (floor - eye[1]) / rays[1].clamp_max(-1e-3)
    x, z = eye[0] + t * rays[0], eye[2] + t * rays[2]
    ahead = _column(film.basis[:, 2] / np.linalg.norm(film.basis[:, 2, ::2], axis=1, keepdims=True)).unbind(1)
    deep, aside = x * ahead[0] + z * ahead[2], x * ahead[2] - z * ahead[0]
    on_table = ((studio.edge - deep) * 8).sigmoid_()
    radius = (x * x + z * z).sqrt()
    on_disc = ((studio.disc - radius) * 25).sigmoid_()
    on_mark = ((radius - 0.86 * studio.disc) * 30).sigmoid_() * (
        (torch.atan2(z, x) * studio.marks).sin() * 3
    ).sigmoid_()
    depth, slow, fast = studio.grain.tolist()
    wood = 1 + depth * (fast * aside + (slow * deep).sin() * 2).sin()
    lit = _shadow(solids, floor, film, x, z).mul_(sun[1])
    grid = torch.stack(
        [(coarse / _LENS * 0.5).expand(size, size), (coarse / _LENS * 0.5)[:, None].expand(size, size)], -1
    )
    wall = torch.from_numpy(studio.backdrop).float().expand(len(t), -1, -1, -1)
    wall = F.grid_sample(wall, grid + torch.from_numpy(film.pan).float()[:, None, None], align_corners=False)
    table, disc, marks = studio.ground.tolist()
    planes = []
    for c in range(3):
        ground = table[c] * wood
        ground = ground + on_disc * ((disc[c] + on_mark * (marks[c] - disc[c])) - ground)
        ground = ground * (lit * key[c] + fill[c])
        back = wall[:, c] * (0.5 * key[c] + fill[c])
        planes.append(back + on_table * (ground - back))
    return torch.stack(planes, 1)


def _shadow(solids: list[_Solid], floor: float, film: _Film, x: _Map, z: _Map) -> _Map:
    """The share of light that reaches the floor, in [0, 1]: each solid dims where the way to the sun nears it."""
    light = torch.ones_like(x)
    for solid in solids:
        inverse = np.linalg.inv(solid.place[:, :3])
        towards = _column(np.einsum("ij,fj->fi", inverse, film.sun)).unbind(1)
        start = (inverse @ (np.array([0, floor, 0]) - solid.place[:, 3])).tolist()
        at = [start[i] + float(inverse[i, 0]) * x + float(inverse[i, 2]) * z for i in range(3)]
        along = (-_dot(at, towards) / _dot(towards, towards)).clamp_min(0)
        miss = sum((at[i] + along * towards[i]) ** 2 for i in range(3))
        light *= ((miss - 0.4) * 0.8).clamp(0.15, 1)
    return light
