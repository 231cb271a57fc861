"""Ray casting in closed form: pictures of solids on a turntable, all frames of a video at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from crosslevel.data.sources.turntable.shapes import Array, Solid, corners

LENS = 0.27  # half the picture's width over the distance: a 30 degree lens
_Map = Float[Tensor, "F H W"]
_Vector = Sequence[Tensor]  # its three coordinates


class Motion(NamedTuple):
    """The parameters of each frame, in the object's coordinates (which turn with the table)."""

    eye: Array  # (F, 3)
    basis: Array  # (F, 3, 3): right, up and forward of the camera
    sun: Array  # (F, 3): unit vector to the light
    key: Array  # (F, 3): colour of the light
    fill: Array  # (F, 3): colour of the light from everywhere
    pan: Array  # (F, 2): where the backdrop is


class Paint(NamedTuple):
    """The look of an object's surfaces."""

    palette: Array  # (4, 3): one colour a slot; the fourth is the pattern's
    pattern: int
    wave: Array  # (3, 3): directions times frequencies of the pattern
    contrast: float
    gloss: float


class Studio(NamedTuple):
    """The surroundings in which objects are filmed."""

    ground: Array  # (3, 3): table, disc, marks
    grain: Array  # (3,): depth and two frequencies of the table's grain
    disc: float
    edge: float
    marks: int
    backdrop: Array  # (3, 24, 48)


def _column(values: Array) -> Tensor:
    """(F,) or (F, n) numbers as float32 (F, 1, 1) or (F, n, 1, 1)."""
    return torch.from_numpy(values).float()[..., None, None]


def _directions(basis: Array, xs: Tensor, ys: Tensor) -> _Vector:
    """The rays through the pixels (ys, xs): forward + x right + y up, a sum of a row and a column."""
    right, up, ahead = (_column(basis[:, i]) for i in range(3))
    return tuple((ahead[:, i] + xs * right[:, i]) + ys[:, None] * up[:, i] for i in range(3))


def _dot(a: _Vector, b: _Vector) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def render(
    solids: list[Solid], floor: float, paint: Paint, motion: Motion, size: int
) -> tuple[Float[Tensor, "F 3 S S"], Float[Tensor, "F 1 S S"]]:
    """The object alone, sampled at 2 x 2 points a pixel: colour times cover, and cover in [0, 1]."""
    fine = ((torch.arange(2 * size) + 0.5) / size - 1) * LENS
    depth, normal, slot = _cast(solids, motion, fine)
    hit = depth < torch.inf
    rays = _directions(motion.basis, fine, -fine)
    colour = _shade(torch.where(hit, depth, 0), normal, slot, rays, paint, motion, floor)
    return F.avg_pool2d(colour.mul_(hit[:, None]), 2), F.avg_pool2d(hit[:, None].float(), 2)


def _cast(solids: list[Solid], motion: Motion, fine: Tensor) -> tuple[_Map, Float[Tensor, "3 F H W"], Tensor]:
    """Distance to the nearest solid along each ray (inf: none), the normal there (any length), and its slot."""
    shape = (len(motion.eye), len(fine), len(fine))
    depth, normal, slot = (
        torch.full(shape, torch.inf),
        torch.zeros(3, *shape),
        torch.zeros(shape, dtype=torch.int64),
    )
    for solid in solids:
        rows, columns = _window(solid, motion, len(fine))
        inverse = np.linalg.inv(solid.transform[:, :3])
        origin = _column(np.einsum("ij,fj->fi", inverse, motion.eye - solid.transform[:, 3])).unbind(1)
        rays = _directions(np.einsum("ij,fkj->fki", inverse, motion.basis), fine[columns], -fine[rows])
        t, gradient = HITS[solid.kind](origin, rays, solid)
        view = (slice(None), rows, columns)
        nearer = t < depth[view]
        depth[view] = torch.where(nearer, t, depth[view])
        slot[view] = slot[view].masked_fill(nearer, solid.slot)
        for j in range(3):
            component = sum(gradient[i] * float(inverse[i, j]) for i in range(3) if abs(inverse[i, j]) > 1e-9)
            normal[j][view] = torch.where(nearer, component, normal[j][view])
    return depth, normal, slot


def _window(solid: Solid, motion: Motion, pixels: int) -> tuple[slice, slice]:
    """The rows and columns of the picture that ``solid`` can touch in any of the frames."""
    projected = np.einsum("fij,fcj->fci", motion.basis, corners(solid) - motion.eye[:, None])
    across = (projected[..., :2] / projected[..., 2:] / LENS * [1, -1] + 1) / 2 * pixels
    low, high = np.floor(across.min((0, 1))) - 1, np.ceil(across.max((0, 1))) + 1
    (x0, y0), (x1, y1) = np.clip(low, 0, pixels - 1).astype(int), np.clip(high, 1, pixels).astype(int)
    return slice(y0, y1), slice(x0, x1)


def _hit_ball(o: _Vector, d: _Vector, solid: Solid) -> tuple[Tensor, _Vector]:
    a, b, c = _dot(d, d), _dot(o, d), _dot(o, o) - 1
    t = -(b + (b * b - a * c).sqrt()) / a
    return t, (o[0] + t * d[0], o[1] + t * d[1], o[2] + t * d[2])


def _hit_box(o: _Vector, d: _Vector, solid: Solid) -> tuple[Tensor, _Vector]:
    near, far = [], []
    for i in range(3):
        inverse = 1 / d[i]
        middle, half = -o[i] * inverse, inverse.abs()
        near.append(middle - half)
        far.append(middle + half)
    t = torch.maximum(torch.maximum(near[0], near[1]), near[2])
    out = torch.minimum(torch.minimum(far[0], far[1]), far[2])
    return torch.where(t <= out, t, torch.inf), tuple((side == t).float() for side in near)


def _hit_rod(o: _Vector, d: _Vector, solid: Solid) -> tuple[Tensor, _Vector]:
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


def _hit_ring(o: _Vector, d: _Vector, solid: Solid) -> tuple[Tensor, _Vector]:
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


HITS = {"ball": _hit_ball, "box": _hit_box, "rod": _hit_rod, "ring": _hit_ring}


def _shade(
    t: _Map,
    normal: Float[Tensor, "3 F H W"],
    slot: Tensor,
    rays: _Vector,
    paint: Paint,
    motion: Motion,
    floor: float,
) -> Float[Tensor, "F 3 H W"]:
    """Lambert and Phong, darker towards the floor."""
    eye, sun, key, fill = (_column(track).unbind(1) for track in (motion.eye, motion.sun, motion.key, motion.fill))
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
        colour = palette[:, c][slot]
        colour = colour + mix * (palette[3, c] - colour)
        planes.append(colour * (lambert * key[c] + soft * fill[c]) + shine * key[c])
    return torch.stack(planes, 1)


def _pattern(at: list[Tensor], paint: Paint) -> _Map:
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


def scene(solids: list[Solid], floor: float, studio: Studio, motion: Motion, size: int) -> Float[Tensor, "F 3 S S"]:
    """The background: the turntable on a table with the object's shadow, and a blurred backdrop."""
    coarse = ((torch.arange(size) + 0.5) * 2 / size - 1) * LENS
    rays = _directions(motion.basis, coarse, -coarse)
    eye, sun, key, fill = (_column(track).unbind(1) for track in (motion.eye, motion.sun, motion.key, motion.fill))
    t = (floor - eye[1]) / rays[1].clamp_max(-1e-3)
    x, z = eye[0] + t * rays[0], eye[2] + t * rays[2]
    ahead = _column(motion.basis[:, 2] / np.linalg.norm(motion.basis[:, 2, ::2], axis=1, keepdims=True)).unbind(1)
    deep, aside = x * ahead[0] + z * ahead[2], x * ahead[2] - z * ahead[0]
    on_table = ((studio.edge - deep) * 8).sigmoid_()
    radius = (x * x + z * z).sqrt()
    on_disc = ((studio.disc - radius) * 25).sigmoid_()
    on_mark = ((radius - 0.86 * studio.disc) * 30).sigmoid_() * (
        (torch.atan2(z, x) * studio.marks).sin() * 3
    ).sigmoid_()
    depth, slow, fast = studio.grain.tolist()
    wood = 1 + depth * (fast * aside + (slow * deep).sin() * 2).sin()
    lit = _shadow(solids, floor, motion, x, z).mul_(sun[1])
    grid = torch.stack(
        [(coarse / LENS * 0.5).expand(size, size), (coarse / LENS * 0.5)[:, None].expand(size, size)], -1
    )
    wall = torch.from_numpy(studio.backdrop).float().expand(len(t), -1, -1, -1)
    wall = F.grid_sample(wall, grid + torch.from_numpy(motion.pan).float()[:, None, None], align_corners=False)
    table, disc, marks = studio.ground.tolist()
    planes = []
    for c in range(3):
        ground = table[c] * wood
        ground = ground + on_disc * ((disc[c] + on_mark * (marks[c] - disc[c])) - ground)
        ground = ground * (lit * key[c] + fill[c])
        back = wall[:, c] * (0.5 * key[c] + fill[c])
        planes.append(back + on_table * (ground - back))
    return torch.stack(planes, 1)


def _shadow(solids: list[Solid], floor: float, motion: Motion, x: _Map, z: _Map) -> _Map:
    """The share of light that reaches the floor, in [0, 1]: each solid dims where the way to the sun nears it."""
    light = torch.ones_like(x)
    for solid in solids:
        inverse = np.linalg.inv(solid.transform[:, :3])
        towards = _column(np.einsum("ij,fj->fi", inverse, motion.sun)).unbind(1)
        start = (inverse @ (np.array([0, floor, 0]) - solid.transform[:, 3])).tolist()
        at = [start[i] + float(inverse[i, 0]) * x + float(inverse[i, 2]) * z for i in range(3)]
        along = (-_dot(at, towards) / _dot(towards, towards)).clamp_min(0)
        miss = sum((at[i] + along * towards[i]) ** 2 for i in range(3))
        light *= ((miss - 0.4) * 0.8).clamp(0.15, 1)
    return light
