"""The types of settings, and the conversion of texts and of values from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosslevel.utils.errors import UserError, near_hint
from crosslevel.utils.trees import yaml_tree

NUMBERS = {"int": "a whole number", "float": "a number"}
OTHER_NAMES = {
    "gpu": "cuda", "nvidia": "cuda", "metal": "mps", "bfloat16": "bf16", "float16": "fp16", "half": "fp16",
    "float32": "fp32", "float": "fp32",
}  # fmt: skip
"""What users call a choice, and its name here."""
TRUE, FALSE, NOTHING = ("true", "yes", "on"), ("false", "no", "off"), ("null", "none", "~")


@dataclass(frozen=True)
class Choices:
    """One of these words."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class Many:
    """Several values: as many as ``items``, or any number of the first of them; a list or a tuple."""

    items: tuple[Kind, ...]
    any_number: bool
    is_list: bool


Member = str | Choices | Many
Kind = tuple[Member, ...]
"""Any of these: str, int, float, bool, None, or ``any`` for an annotation that is not understood here."""


def takes(kind: Kind, name: str) -> bool:
    """Whether ``name``, such as int, is one of the kinds."""
    return name in kind


def is_list(kind: Kind) -> bool:
    """Whether an option can be given several times, to collect its values."""
    return any(isinstance(member, Many) and member.is_list for member in kind)


def read(kind: Kind, value: Any, context: str) -> Any:
    """Convert ``value``, a text of the command line or a value of a file, to ``kind``.

    Args:
        kind: the type of the setting.
        value: the text, or a value from YAML.
        context: the setting as the user wrote it, for the error.

    Raises:
        UserError: the value does not fit; the message says what is needed.

    """
    for member in sorted(kind, key=_order):
        done, result = _as(member, value, context)
        if done:
            return result
    raise UserError(f"{context}: needs {describe(kind)}{_hint(kind, value)}")


def plain(value: Any) -> Any:
    """Convert ``value`` to plain YAML: tuples become lists, paths become strings."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def describe(kind: Kind) -> str:
    """Describe a setting's type in the user's words."""
    words = [_word(member) for member in kind if member != "None"]
    return " or ".join(words) + (" (or none)" if "None" in kind else "")


def short(kind: Kind) -> str:
    """The placeholder behind an option's name in its help."""
    marks = {"int": "N", "float": "X", "str": "TEXT", "bool": "true|false", "any": "VALUE"}
    for member in kind:
        if isinstance(member, Choices):
            return "|".join(member.words)
        if isinstance(member, Many):
            inner = [short(item) for item in member.items]
            return f"{inner[0]}" if member.is_list else f"[{','.join(inner)}{',...' if member.any_number else ''}]"
        if member != "None":
            return marks[member]
    return "VALUE"


def _order(member: Member) -> int:
    """The order of trying types: None and listed words first, str last, since every value is a text."""
    order = {"None": 0, "bool": 2, "int": 3, "float": 4, "any": 6, "str": 7}
    return order[member] if isinstance(member, str) else 1 if isinstance(member, Choices) else 5


def _as(member: Member, value: Any, context: str) -> tuple[bool, Any]:
    """Whether ``value`` is of this type, and the converted value."""
    text = value.strip().lower() if isinstance(value, str) else None
    if isinstance(member, Choices):
        return value in member.words, value
    if isinstance(member, Many):
        return _many(member, value, context)
    if member == "None":
        return value is None or text in NOTHING, None
    if member == "bool":
        return isinstance(value, bool) or text in TRUE + FALSE, value if text is None else text in TRUE
    return (True, _loaded(value)) if member == "any" else _plain(member, value)


def _plain(member: str, value: Any) -> tuple[bool, Any]:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return False, None
    if member == "str":
        return True, str(value)
    try:
        if member == "float":
            return True, float(value)
        return (True, int(value)) if not isinstance(value, float) else (False, None)
    except ValueError:
        return False, None


def _many(member: Many, value: Any, context: str) -> tuple[bool, Any]:
    items = _loaded(value) if isinstance(value, str) and value.lstrip().startswith(("[", "(")) else value
    if isinstance(items, str):
        items = [items] if member.is_list else [part.strip() for part in items.strip("()").split(",")]
    if not isinstance(items, Sequence) or (not member.any_number and len(items) != len(member.items)):
        return False, None
    kinds = [member.items[0]] * len(items) if member.any_number else member.items
    values = [read(kind, item, context) for kind, item in zip(kinds, items, strict=True)]
    return True, values if member.is_list else tuple(values)


def _loaded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    import yaml  # noqa: PLC0415

    try:
        return yaml_tree(value.replace("(", "[").replace(")", "]") if value[:1] == "(" else value)
    except yaml.YAMLError:
        return value


def _word(member: Member) -> str:
    if isinstance(member, Choices):
        return f"one of {', '.join(member.words)}" if len(member.words) > 1 else member.words[0]
    if isinstance(member, Many):
        inner = describe(member.items[0])
        return f"a list, each {inner}" if member.any_number else f"[{', '.join(map(describe, member.items))}]"
    return {"bool": "true or false", "str": "a text", "any": "a value", **NUMBERS}[member]


def _hint(kind: Kind, value: Any) -> str:
    words = [word for member in kind if isinstance(member, Choices) for word in member.words]
    other = OTHER_NAMES.get(str(value).lower())
    return f": did you mean {other}?" if other in words else near_hint(str(value), words)
