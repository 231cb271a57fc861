"""YAML and JSON that may come from anybody: only plain values, with limited depth and size."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosslevel.utils.errors import UserError

if TYPE_CHECKING:
    import yaml

MOST = 100_000
"""The most values of a YAML text, counted as often as aliases repeat them."""


def regular(file: str | os.PathLike[str]) -> Path:
    """Check that a path is a regular file, or a file that a shell has opened (``<(...)``).

    Raises:
        OSError: there is no such file.
        UserError: it is a pipe or a device, which may never end.

    """
    mode = os.stat(file).st_mode
    if os.fspath(file).startswith(("/dev/fd/", "/dev/stdin")):
        return Path(file)
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode) or stat.S_ISBLK(mode):
        raise UserError(f"{os.fspath(file)} is not a file, but a pipe or a device")
    return Path(file)


def yaml_tree(text: str) -> Any:
    """Plain values of a YAML text, without tags.

    Raises:
        yaml.YAMLError: it is invalid, or has more than `MOST` values: a few aliases of aliases can mean billions.

    """
    import yaml  # noqa: PLC0415

    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            if _count(root, {}) > MOST:
                raise yaml.YAMLError(f"it has more than {MOST:,} values")
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, OverflowError, TypeError) as error:  # an invalid number or date
        raise yaml.YAMLError(str(error)) from error


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """The number of a node's values, with repetitions by aliases; more than `MOST` for a node that contains itself."""
    if node.id == "scalar":
        return 1
    if id(node) not in counts:
        counts[id(node)] = MOST + 1  # until it is computed: coming here again means that the node contains itself
        children = [part for pair in node.value for part in pair] if node.id == "mapping" else node.value
        counts[id(node)] = 1 + sum(_count(part, counts) for part in children)
    return counts[id(node)]


def json_tree(text: str | bytes) -> Any:
    """Values of a JSON text.

    Raises:
        ValueError: it is invalid, or nested too deeply.

    """
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError("it is nested too deeply") from None
