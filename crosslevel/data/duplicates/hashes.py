"""Perceptual hashes, and pairs of similar ones without comparing all with all.

Ours: imagehash takes one PIL image at a time and finds no pairs; here a batch of tensors is hashed at once, and
near pairs among many are found by equal pieces.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from crosslevel.data.duplicates.descriptor import LUMA, SIDE
from crosslevel.utils.errors import UserError

RADIUS = 8  # bits of a hash that may differ at most, of 64
BITS = 64
CROWD = 128  # hashes that one is compared with, where many share the same pieces
_PAIRS = 2**20  # pairs compared at a time: about 50 MB
MANY = 2**17  # number of hashes from which on a pair has to share one piece more


def perceptual_hash(images: UInt8[Tensor, "B 3 32 32"]) -> Int64[Tensor, " B"]:
    """64 bits for each image: which of its lowest frequencies lie above their median (Zauner 2010, section 3.2.1).

    The frequencies are those of the discrete cosine transform of the gray image, 1 to 8 in each direction: the mean
    brightness is not among them. Resizing, compression, slight shifts and changes of brightness flip few bits.

    Raises:
        ValueError: the images are not uint8 of 32 x 32 pixels.

    """
    if images.dtype != torch.uint8 or images.shape[1:] != (3, SIDE, SIDE):
        raise UserError(f"images are {images.dtype} {tuple(images.shape)}: give uint8 (B, 3, {SIDE}, {SIDE})")
    gray = torch.einsum("bchw,c->bhw", images.double(), torch.tensor(LUMA, dtype=torch.float64, device=images.device))
    positions = torch.arange(SIDE, dtype=torch.float64, device=images.device)
    waves = torch.cos(math.pi / (2 * SIDE) * (2 * positions + 1) * positions[1:9].unsqueeze(1))
    frequencies = (waves @ gray @ waves.T).flatten(1)
    # Of a flat image only rounding errors are left, which would be random bits.
    frequencies = torch.where(frequencies.abs() < 1e-6, 0.0, frequencies)
    return packed(frequencies > frequencies.median(dim=1, keepdim=True).values)


def packed(bits: Bool[Tensor, "B 64"]) -> Int64[Tensor, " B"]:
    """64 bits as one number, the first bit the lowest; the last one is the sign."""
    return (bits.long() << torch.arange(BITS, device=bits.device)).sum(1)


def hamming(a: Int64[Tensor, " P"], b: Int64[Tensor, " P"]) -> Int64[Tensor, " P"]:
    """How many of the 64 bits differ."""
    x = a ^ b
    # Sums of neighbouring bits, then pairs, then nibbles (the shift keeps the sign: it is masked away).
    x = (x & 0x5555555555555555) + ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return sum(((x >> shift) & 0xFF for shift in range(0, BITS, 8)), torch.zeros_like(x))


def near_pairs(
    hashes: Int64[Tensor, " N"],
    radius: int,
    groups: Int64[Tensor, " N"] | None = None,
    crowd: int = CROWD,
    many: int = MANY,
    at_once: int = _PAIRS,
) -> Int64[Tensor, "P 2"]:
    """Pairs (i, j), i < j, whose hashes differ in at most ``radius`` bits; equal hashes form a chain, not all pairs.

    The 64 bits are cut into radius + 2 pieces. Hashes that differ in ``radius`` bits agree in two pieces or more, so
    only those are compared (Norouzi, Punjani and Fleet, CVPR 2012, who use one of radius + 1 pieces). Above ``many``
    hashes they have to agree in three of radius + 3 pieces. Where very many agree, as frames of a fixed camera do, each
    is compared only with the next ``crowd`` in order, so that time does not grow with the square.

    Args:
        hashes: of the images.
        radius: bits that may differ.
        groups: the known track of each image: pairs within a track are left out.
        crowd: hashes that one is compared with, where many share the same pieces.
        many: number of hashes from which on a pair has to share one piece more.
        at_once: pairs compared at a time.

    Raises:
        ValueError: a radius outside 0 to 16: beyond, the pieces are so short that nearly all pairs are compared.

    """
    if not 0 <= radius <= 16:
        raise UserError(f"radius={radius}: choose 0 to 16 of the 64 bits")
    unique, owner = hashes.unique(return_inverse=True)
    order = owner.argsort(stable=True)
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = owner[order[1:]] != owner[order[:-1]]
    chunks = [torch.stack([order[:-1], order[1:]], dim=1)[~first[1:]]]
    one = order[first]  # of each hash its first image
    groups = torch.arange(len(hashes)) if groups is None else groups
    for i, j in _close(unique, radius, crowd, 2 if len(unique) <= many else 3, at_once) if radius else []:
        chunks.append(torch.stack([one[i], one[j]], dim=1)[groups[one[i]] != groups[one[j]]])
    pairs = torch.cat(chunks)
    different: Tensor = pairs[groups[pairs[:, 0]] != groups[pairs[:, 1]]].sort(dim=1).values
    return different


def _close(
    hashes: Int64[Tensor, " U"], radius: int, crowd: int, shared: int, at_once: int
) -> Iterator[tuple[Int64[Tensor, " P"], Int64[Tensor, " P"]]]:
    """Indices of distinct hashes that share ``shared`` pieces and differ in at most ``radius`` bits, each pair once."""
    edges = torch.linspace(0, BITS, radius + shared + 1).round().long().tolist()
    pieces = [(low, (1 << (high - low)) - 1) for low, high in itertools.pairwise(edges)]
    for combination in itertools.combinations(range(len(pieces)), shared):
        key = torch.zeros_like(hashes)
        for low, mask in (pieces[piece] for piece in combination):
            key = key * (mask + 1) + (hashes >> low & mask)
        for i, j in _within(key, crowd, at_once):
            near = hamming(hashes[i], hashes[j]) <= radius
            a, b = i[near], j[near]
            bits = hashes[a] ^ hashes[b]
            # A pair that agrees in more pieces is found by the first of them.
            before = sum((bits >> low & mask == 0 for low, mask in pieces[: combination[-1]]), torch.zeros_like(bits))
            yield a[before == shared - 1], b[before == shared - 1]


def _within(
    key: Int64[Tensor, " N"], crowd: int, at_once: int
) -> Iterator[tuple[Int64[Tensor, " P"], Int64[Tensor, " P"]]]:
    """Pairs of indices with equal keys, in chunks; each index is paired with at most the next ``crowd`` ones."""
    order = key.argsort(stable=True)
    _, counts = key[order].unique_consecutive(return_counts=True)
    ends = counts.cumsum(0).repeat_interleave(counts)
    after = (ends - torch.arange(len(key)) - 1).clamp(max=crowd)  # how many indices each one is compared with
    start = 0
    total = after.cumsum(0)
    while start < len(key):
        done = int(total[start - 1]) if start else 0
        stop = max(start + 1, int(torch.searchsorted(total, done + at_once, right=True)))
        here = torch.arange(start, stop)
        counts_here = after[start:stop]
        i = here.repeat_interleave(counts_here)
        step = torch.arange(len(i)) - (counts_here.cumsum(0) - counts_here).repeat_interleave(counts_here)
        yield order[i], order[i + 1 + step]
        start = stop
