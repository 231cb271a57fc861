"""The search space: ``--search NAME=RANGE``, checked against the settings of `crosslevel train`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import yaml

from crosslevel.models.build import is_modern
from crosslevel.settings import signature, trust
from crosslevel.settings.command import Command
from crosslevel.settings.kinds import Kind, read, takes
from crosslevel.training import defaults
from crosslevel.training.train import train
from crosslevel.utils.errors import UserError, near_names
from crosslevel.utils.trees import yaml_tree

FORMS = "LOW:HIGH, LOW:HIGH:log or A,B,C"
MACHINE = (
    "images", "device", "precision", "workers", "memory", "data_root", "log_every", "monitor", "monitor_every",
    "checkpoint_minutes", "report_html", "logger",
)  # fmt: skip
"""Settings that may differ between the workers of one study."""

FIXED = (
    *MACHINE, "seed", "run", "resume", "config", "recipe", "epochs", "method", "encoder", "cld", "gh", "views",
    "devices", "nodes",
)  # fmt: skip
"""Settings that cannot be searched: images, machine and length of the training, and whole parts."""

Value = str | float | int


class Numbers(NamedTuple):
    """Numbers from ``low`` to ``high``, whole ones if ``integral``, evenly or, if ``log``, by their logarithm."""

    low: float
    high: float
    log: bool = False
    integral: bool = False

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high


Range = Numbers | tuple[str, ...]
"""Numbers, or the choices in the form of the command line."""


def parse(texts: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Range]:
    """Parse ranges, by the names of their parameters.

    Args:
        texts: such as ``cld.weight=0:1``, ``lr=1e-4:1e-1:log`` and ``views.preset=cifar,simclr``.
        settings: of `train`, as a tree.

    Raises:
        UserError: an unknown parameter (the message has the nearest names), or a range that is invalid or that `train`
            refuses.

    """
    types, space = parameters(settings), {}
    for text in texts:
        name, equals, bounds = text.partition("=")
        name = name.strip().removeprefix("--")
        if not equals or not bounds.strip():
            raise UserError(f"--search {text}: give NAME=RANGE, where the range is {FORMS}")
        if name not in types:
            raise UserError(f"--search {text}: {_unknown(name, types)}")
        if name in space:
            raise UserError(f"--search {text}: {name} is searched twice: give one range for it")
        space[name] = _range(text, bounds.strip(), types[name])
        _check(text, name, types[name], space[name])
    return space


def parameters(settings: Mapping[str, Any]) -> dict[str, Kind]:
    """Every parameter of `train` that can be searched, including those of the chosen method, with its type."""
    kinds = {name: option.kind for name, option in _command().options.items()}
    kinds |= {f"method.{o.name}": o.kind for o in signature.of_method(settings["method"]["class_path"])}
    return {name: kind for name, kind in kinds.items() if name not in FIXED}


def method_of(settings: Mapping[str, Any]) -> Any:
    """The class of the settings' method."""
    return trust.method_of(settings)


def value_at(settings: Mapping[str, Any], name: str) -> Any:
    """A parameter's value in the settings; for an open group count or learning rate, the value that train would choose.

    None if another setting is open, whose rule only the training applies.
    """
    part, _, last = name.rpartition(".")
    tree: Any = settings.get(part, {}) if part else settings
    value = (tree.get("init_args") or {}).get(last) if part == "method" else tree.get(last)
    batch = settings["batch_size"]
    if value is None and name == "optimizer":
        return defaults.optimizer(is_modern(settings["encoder"]["name"]), method_of(settings).usual_optimizer).value
    if value is None and name == "cld.groups":
        return defaults.groups(batch // settings.get("accumulate", 1)).value
    if value is None and name == "lr":
        rate = method_of(settings).sgd_rate
        return defaults.learning_rate(value_at(settings, "optimizer"), rate, batch * settings["devices"]).value
    return value


def default_space(settings: Mapping[str, Any], images: int) -> dict[str, Range]:
    """The default search space, around the given settings.

    The weight of the group branch, its groups (a sixteenth of the batch to all of it) and its temperature, the
    method's temperature if it has one, and the learning rate (a tenth to ten times).
    """
    lr, weight = float(value_at(settings, "lr")), float(value_at(settings, "cld.weight"))
    groups = int(value_at(settings, "cld.groups"))
    batch = min(settings["batch_size"], images) // settings.get("accumulate", 1)
    space: dict[str, Range] = {
        "cld.weight": Numbers(0.0, max(1.0, weight)),
        "cld.groups": Numbers(min(max(2, batch // 16), groups), batch, log=True, integral=True),
    }
    for name in ("cld.temperature", "method.temperature"):
        if name in parameters(settings):
            current = float(value_at(settings, name))
            space[name] = Numbers(min(0.05, current), max(1.0, current), log=True)
    return {**space, "lr": Numbers(lr / 10, lr * 10, log=True)}


def clipped(space: Mapping[str, Range], point: Mapping[str, Any]) -> dict[str, Any]:
    """``point``, or the nearest point in the space, in the study's form: choices as text.

    A value that is neither a number nor one of the choices is left out, as no value is near to it.
    """
    out: dict[str, Any] = {}
    for name, value in point.items():
        searched = space.get(name)
        if isinstance(searched, Numbers):
            if isinstance(value, int | float):
                inside = min(max(value, searched.low), searched.high)
                out[name] = int(inside) if searched.integral else float(inside)
        elif (choice := next((c for c in searched or () if matches(c, value)), None)) is not None:
            out[name] = choice
    return out


def outside(space: Mapping[str, Range], point: Mapping[str, Any]) -> list[str]:
    """The names of the searched parameters whose values in ``point`` lie outside the space."""
    return [
        name
        for name, searched in space.items()
        if not (
            point[name] in searched
            if isinstance(searched, Numbers)
            else any(matches(choice, point[name]) for choice in searched)
        )
    ]


def foreign(space: Mapping[str, Range], parameters: Mapping[str, Any]) -> str:
    """Describe a trial's parameter that this search cannot have suggested; empty if there is none."""
    for name, value in parameters.items():
        if name not in space:
            return f"its study has {name!r}, which is not searched"
        if value not in space[name]:
            return f"its study has {name}={value!r}, which is not in {range_text(space[name])}"
    return ""


def range_text(searched: Range) -> str:
    """A range in the form of the command line."""
    if isinstance(searched, Numbers):
        return f"{searched.low:.6g}:{searched.high:.6g}{':log' if searched.log else ''}"
    return ",".join(searched)


@cache
def _command() -> Command:
    return Command.of_function(train)


def _unknown(name: str, types: Mapping[str, Kind]) -> str:
    if name in MACHINE:
        return f"{name} is not searched: it changes where and how a training runs, not what it learns"
    if name in FIXED:
        return f"{name} is not searched, it is the same for all trials"
    near = near_names(name, types, 0.7, 3)
    near += [full for full in types if full.rpartition(".")[2] == name and full not in near]
    hint = f"did you mean {' or '.join(near)}?" if near else "crosslevel train --help lists the names"
    return f"train has no setting {name!r}: {hint}"


def _range(text: str, bounds: str, kind: Kind) -> Range:
    integral = takes(kind, "int") and not takes(kind, "float")
    if ":" not in bounds:
        choices = tuple(choice.strip() for choice in _split(bounds) if choice.strip())
        if len(set(choices)) < 2 or len(set(choices)) < len(choices):
            raise UserError(f"--search {text}: give at least two different choices, or {FORMS}")
        return choices
    low, high, *more = bounds.split(":")
    if not (takes(kind, "int") or takes(kind, "float")):
        raise UserError(f"--search {text}: it is no number: give choices, A,B,C")
    try:
        first, last = (int(n) if integral else float(n) for n in (low, high))
    except ValueError as error:
        raise UserError(f"--search {text}: the ends must be {'whole ' if integral else ''}numbers: {FORMS}") from error
    numbers = Numbers(first, last, more == ["log"], integral)
    if more not in ([], ["log"]):
        raise UserError(f"--search {text}: {':'.join(more)!r} is not log: give {FORMS}")
    if not (math.isfinite(numbers.low) and math.isfinite(numbers.high) and numbers.low < numbers.high):
        raise UserError(f"--search {text}: the first number must be smaller than the second")
    if numbers.log and numbers.low <= 0:
        raise UserError(f"--search {text}: a logarithmic range begins above 0")
    return numbers


def _split(bounds: str) -> list[str]:
    """Split at the commas that are in no brackets."""
    pieces, depth = [""], 0
    for letter in bounds:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return pieces


def _check(text: str, name: str, kind: Kind, searched: Range) -> None:
    """Check that train accepts the ends of a range, or every choice."""
    for value in map(str, searched[:2]) if isinstance(searched, Numbers) else searched:
        read(kind, value, f"--search {text}: --{name} {value}")


def matches(choice: str, value: object) -> bool:
    """Whether a choice, as text, is this value."""
    return bool(written(choice) == value)


def written(choice: str) -> Any:
    """The value of a choice: YAML as on the command line, where 1e-3 is a number."""
    try:
        value = yaml_tree(choice)
        return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value) else value
    except yaml.YAMLError:
        return choice
