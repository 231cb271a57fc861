"""Parts of any source, by suffixes of its name: ``cifar10@imbalance=100@repeat=4,shift=2``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from crosslevel.data.duplicates.sets import unique
from crosslevel.data.images import Images
from crosslevel.data.subsets.bursts import bursts
from crosslevel.data.subsets.lists import classes_of, listed
from crosslevel.data.subsets.repeat import repeat
from crosslevel.data.subsets.select import first_frames, long_tailed, pareto, some_tracks, take
from crosslevel.data.uri import ALONE, FILES, Suffix
from crosslevel.utils.errors import SourceError, UserError, did_you_mean
from crosslevel.utils.rng import seeded


def applied(images: Images, suffixes: Sequence[Suffix], name: str) -> Images:
    """Apply the ``suffixes`` to ``images``, one after the other; the result is called ``name``.

    Raises:
        SourceError: a wrong key or value, or fewer than 2 images left.

    """
    for suffix in suffixes:
        make = SUFFIXES[suffix.key]
        try:
            images = make(images, *_arguments(make, suffix))
        except SourceError:
            raise
        except UserError as error:
            raise SourceError(f"{name}: {error}") from error
        if len(images) < 2:
            raise SourceError(f"{name}: {suffix} leaves {len(images)} images: needs at least 2")
    images.name = name
    return images


def _imbalance(images: Images, imbalance: float, seed: int = 0) -> Images:
    return take(images, long_tailed(_labels(images), imbalance, seeded(seed)))


def _pareto(images: Images, pareto_power: float, most: int = 1280, least: int = 5, seed: int = 0) -> Images:
    return take(images, pareto(_labels(images), pareto_power, most, least, seeded(seed)))


def _frames(images: Images, frames: int) -> Images:
    return take(images, first_frames(_tracks(images), frames))


def _some_tracks(images: Images, tracks: int, seed: int = 0) -> Images:
    return take(images, some_tracks(_tracks(images), tracks, seeded(seed)))


# Each takes the images, then the value, then the other keys by name.
SUFFIXES: dict[str, Callable[..., Images]] = {
    "imbalance": _imbalance,
    "pareto": _pareto,
    "list": listed,
    "classes": classes_of,
    "repeat": repeat,
    "frames": _frames,
    "tracks": _some_tracks,
    "unique": unique,
    "bursts": bursts,
}


def _labels(images: Images) -> torch.Tensor:
    if images.labels is None:
        raise UserError("there are no labels to make a long tail from: put each class into a folder of its own")
    return images.labels


def _tracks(images: Images) -> torch.Tensor:
    if images.tracks is None:
        raise UserError("there are no tracks: videos, turntable and @repeat have some, @bursts makes some")
    return images.tracks


def _arguments(make: Callable[..., Images], suffix: Suffix) -> list[Any]:
    """Parse a suffix's text into arguments for ``make``, in the order of its parameters after the images."""
    _, first, *optional = inspect.signature(make, eval_str=True).parameters.values()
    if suffix.key in FILES:
        if not suffix.value and suffix.key not in ALONE:
            raise UserError(f"@{suffix.key}= names no file")
        return [suffix.value]
    number, options = suffix.parts()
    options_by_key: dict[str, str] = {}
    for key, text in options:
        if key in options_by_key:
            raise UserError(f"@{suffix.key} has {key} twice: give it once")
        options_by_key[key] = text or ""
    names = [parameter.name for parameter in optional]
    for key in options_by_key:
        if key not in names:
            hint = did_you_mean(key, names, f"it takes {' and '.join(names) or 'no other'}")
            raise UserError(f"@{suffix.key} has no key {key!r}: {hint}")
    numbers: list[Any] = [_number(suffix.key, number, first.annotation)]
    for parameter in optional:
        key, value = parameter.name, options_by_key.get(parameter.name)
        numbers.append(parameter.default if value is None else _number(key, value, parameter.annotation))
    return numbers


def _number(key: str, text: str, convert: Callable[[str], float]) -> float:
    try:
        number = convert(text)
    except ValueError:
        kind = "a whole number" if convert is int else "a number"
        raise UserError(f"{key}={text}: needs {kind}") from None
    if convert is int and abs(number) >= 2**31:
        raise UserError(f"{key}={text}: needs a number below 2^31")
    return number
