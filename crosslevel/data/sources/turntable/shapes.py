"""The shapes of the turntable data set: families of objects built of four kinds of solids."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Uniform = Callable[[float, float], float]


class Solid(NamedTuple):
    """One solid: canonical coordinates times ``transform`` (3, 4) are the object's; y is up, the floor y = 0.

    ball: |p| <= 1. box: |p|_max <= 1. rod: |y| <= 1, radius 1 + ``shape`` y, hollow inside ``hole`` times that.
    ring: a torus around y of radius 1, its tube of radius ``shape``.
    """

    kind: Literal["ball", "box", "rod", "ring"]
    transform: Array
    slot: int
    shape: float = 0.0
    hole: float = 0.0


_Point = tuple[float, float, float]


def _ball(at: _Point, radii: _Point, slot: int = 0) -> Solid:
    return Solid("ball", np.column_stack([np.diag(radii), at]), slot)


def _box(at: _Point, half: _Point, slot: int = 0, turn: float = 0.0) -> Solid:
    """A box with half edges ``half``, turned by ``turn`` radians about z."""
    c, s = math.cos(turn), math.sin(turn)
    return Solid("box", np.column_stack([np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) * half, at]), slot)


def _axes(along: Array, across: float) -> Array:
    """Columns x, y, z: y is ``along``, the other two of length ``across`` and perpendicular."""
    helper = np.array([0.0, 0.0, 1.0]) if abs(along[2]) < 0.9 * np.linalg.norm(along) else np.array([1.0, 0.0, 0.0])
    x = np.cross(along, helper)
    x *= across / np.linalg.norm(x)
    z = np.cross(x, along)
    return np.column_stack([x, along, z * (across / np.linalg.norm(z))])


def _rod(a: _Point, b: _Point, r0: float, r1: float | None = None, slot: int = 0, hole: float = 0.0) -> Solid:
    """A frustum from ``a`` (radius r0) to ``b`` (radius r1), a pipe if ``hole`` > 0."""
    low, high, end = np.array(a), np.array(b), r0 if r1 is None else r1
    transform = np.column_stack([_axes((high - low) / 2, (r0 + end) / 2), (high + low) / 2])
    return Solid("rod", transform, slot, (end - r0) / (end + r0), hole)


def _ring(at: _Point, normal: _Point, radius: float, tube: float, slot: int = 0) -> Solid:
    transform = np.column_stack([_axes(np.array(normal) * radius, radius), at])
    return Solid("ring", transform, slot, tube / radius)


def _mug(u: Uniform) -> list[Solid]:
    h, r, grip = u(1.1, 2.2), u(0.6, 0.95), u(0.25, 0.36)
    top = r * u(0.85, 1.3)
    return [
        _rod((0, 0, 0), (0, h, 0), r, top, 0, 0.86),
        _rod((0, 0, 0), (0, 0.85 * h, 0), 0.9 * r, 0.9 * (r + 0.85 * (top - r)), 2),
        _ring(((r + top) / 2 + 0.25 * h * grip, h / 2, 0), (0, 0, 1), h * grip, h * u(0.05, 0.08), 1),
    ]


def _bottle(u: Uniform) -> list[Solid]:
    h, r, neck = u(1.2, 2.2), u(0.4, 0.75), u(0.14, 0.24)
    slope, long = u(0.25, 0.7), u(0.3, 0.8)
    end = h + slope + long
    return [
        _rod((0, 0, 0), (0, h, 0), r, r * u(0.85, 1.1)),
        _rod((0, h, 0), (0, h + slope, 0), r, neck),
        _rod((0, h + slope, 0), (0, end, 0), neck),
        _rod((0, end - 0.22, 0), (0, end + 0.08, 0), 1.25 * neck, None, 1),
    ]


def _legs(w: float, d: float, h: float, r: float, splay: float, slot: int) -> list[Solid]:
    return [_rod((x * w * splay, 0, z * d * splay), (x * w, h, z * d), r, None, slot) for x in (-1, 1) for z in (-1, 1)]


def _chair(u: Uniform) -> list[Solid]:
    w, d, h, back, thick = u(0.55, 0.8), u(0.55, 0.8), u(0.7, 1.2), u(0.8, 1.4), u(0.05, 0.1)
    seat = _box((0, h, 0), (w, thick, d), 0)
    backrest = [_box((0, h + back * (0.5 + 0.5 * u(0, 1)), thick - d), (w, back * u(0.2, 0.5), thick), 0)]
    posts = [_rod((x * 0.9 * w, h, thick - d), (x * 0.9 * w, h + back, thick - d), 0.07, None, 1) for x in (-1, 1)]
    return [seat, *backrest, *posts, *_legs(0.85 * w, 0.85 * d, h, u(0.05, 0.1), u(1, 1.2), 1)]


def _car(u: Uniform) -> list[Solid]:
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


def _lamp(u: Uniform) -> list[Solid]:
    h, foot, wide, tall = u(1.2, 2.2), u(0.4, 0.7), u(0.6, 1.0), u(0.5, 0.9)
    return [
        _rod((0, 0, 0), (0, u(0.08, 0.2), 0), foot, foot * u(0.6, 1), 1),
        _rod((0, 0, 0), (0, h + 0.3 * tall, 0), u(0.05, 0.1), None, 1),
        _rod((0, h, 0), (0, h + tall, 0), wide, wide * u(0.35, 0.8), 0, 0.95),
    ]


def _duck(u: Uniform) -> list[Solid]:
    long, h, wide, head = u(0.85, 1.2), u(0.5, 0.75), u(0.5, 0.75), u(0.32, 0.5)
    x, y = long * u(0.5, 0.8), 2 * h * 0.8 + head * u(0.5, 1.2)
    return [
        _ball((0, h * 0.95, 0), (long, h, wide), 0),
        _ball((x, y, 0), (head, head, head), 0),
        _rod((x + 0.8 * head, y, 0), (x + head * u(1.5, 2), y - 0.05, 0), 0.45 * head, 0.08, 1),
        _rod((-0.75 * long, h, 0), (-1.25 * long, h * u(1.4, 1.9), 0), 0.3 * h, 0.04, 0),
        _ball((x + 0.6 * head, y + 0.4 * head, 0), (0.2 * head, 0.2 * head, 0.9 * head), 2),
    ]


def _table(u: Uniform) -> list[Solid]:
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


def _tree(u: Uniform) -> list[Solid]:
    trunk, r, tier, shrink = u(0.3, 0.7), u(0.6, 1.0), u(0.6, 0.95), u(0.65, 0.85)
    step = tier * u(0.5, 0.75)
    tiers = [
        _rod((0, trunk + i * step, 0), (0, trunk + i * step + tier, 0), r * shrink**i, 0.02, 0)
        for i in range(2 + int(u(0, 2.99)))
    ]
    return [_rod((0, 0, 0), (0, trunk, 0), u(0.1, 0.22), None, 1), *tiers]


def _house(u: Uniform) -> list[Solid]:
    w, d, h, rise = u(0.6, 0.95), u(0.7, 1.3), u(0.4, 0.8), u(0.5, 0.9)
    ridge = _box((0, 0, 0), (1, 1, 1), 1, math.pi / 4).transform
    slopes = np.diag([1.12 * w / 2**0.5, rise / 2**0.5, 1.08 * d]) @ ridge + [
        [0, 0, 0, 0],
        [0, 0, 0, 2 * h],
        [0] * 4,
    ]
    return [
        _box((0, h, 0), (w, h, d), 0),
        Solid("box", slopes, 1),
        _box((0.5 * w, 2 * h + 0.6 * rise, u(-0.6, 0.6) * d), (0.12, 0.5 * rise, 0.12), 2),
        _box((u(-0.3, 0.3) * w, 0.5 * h, d), (0.2 * w, 0.5 * h, 0.03), 2),
        _box((w, h, 0), (0.03, 0.3 * h, 0.5 * d), 2),
    ]


def _gear(u: Uniform) -> list[Solid]:
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


def _dumbbell(u: Uniform) -> list[Solid]:
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


def _mushroom(u: Uniform) -> list[Solid]:
    h, r, cap = u(0.7, 1.4), u(0.16, 0.35), u(0.65, 1.1)
    return [
        _rod((0, 0, 0), (0, h, 0), r * u(1, 1.5), r, 1),
        _ball((0, h, 0), (cap, cap * u(0.4, 0.8), cap), 0),
    ]


FAMILIES: dict[str, Callable[[Uniform], list[Solid]]] = {
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


def centred(solids: list[Solid]) -> tuple[list[Solid], float]:
    """The solids around the origin and of radius about 1, and the height of the floor there."""
    points = np.concatenate([corners(solid) for solid in solids])
    low, high = points.min(0), points.max(0)
    middle, scale = (low + high) / 2, 1 / np.linalg.norm((high - low) / 2)
    shift = np.column_stack([np.zeros((3, 3)), middle])
    return [solid._replace(transform=(solid.transform - shift) * scale) for solid in solids], float(-middle[1] * scale)


def corners(solid: Solid) -> Array:
    """(8, 3) corners of a box around ``solid``."""
    wide = {"rod": 1 + abs(solid.shape), "ring": 1 + solid.shape}.get(solid.kind, 1.0)
    tall = solid.shape if solid.kind == "ring" else 1.0
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    return (signs * [wide, tall, wide]) @ solid.transform[:, :3].T + solid.transform[:, 3]
