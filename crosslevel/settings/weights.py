"""``--encoder.name`` wherever an encoder is used: another spelling of timm:NAME in place of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crosslevel.settings.kinds import FALSE, NOTHING, TRUE, read
from crosslevel.settings.signature import Option
from crosslevel.utils.errors import UserError

OPTIONS = (
    Option("encoder.name", ("str",), None, "in place of a run, weights by name: a timm model's, such as "
           "vit_small_patch14_dinov2.lvd142m, hf-hub:owner/name or local-dir:FOLDER"),
    Option("encoder.pretrained", ("str",), None, "true takes the weights that the hub has under this name; or a "
           ".safetensors file of them (default: true)"),
    Option("encoder.image_size", ("int",), None, "pixels of the images that it takes; the weights' own unless given"),
)  # fmt: skip
VERBS = ("embed", "evaluate", "inspect", "search", "explore", "curate", "classify", "export")
"""The verbs that use an encoder, whoever trained it."""
RUNS = ("run", "table")
"""Their settings that name an encoder."""


def by_name(options: Mapping[str, Sequence[str]]) -> str | None:
    """The encoder that these options name, in one text as `crosslevel.models.named.open_encoder` takes it.

    Args:
        options: the value of each of `OPTIONS`, by its name; empty if it was not given.

    Raises:
        UserError: the name is missing, or weights are turned off.

    """
    values: dict[str, Any] = {}
    for option in OPTIONS:
        for text in options.get(option.name, ()):
            values[option.name] = read(option.kind, text, f"--{option.name} {text}")
    if not values:
        return None
    name, file, size = (values.get(option.name) for option in OPTIONS)
    if name is None:
        raise UserError(f"--{next(iter(values))} needs --encoder.name, such as vit_small_patch14_dinov2.lvd142m")
    word = str(file or "true").lower()
    if word in FALSE + NOTHING:
        raise UserError(f"--encoder.pretrained {file}: an encoder without weights tells nothing: give true, or a file")
    fields = [name if ":" in name else f"timm:{name}"]
    fields += [] if word in TRUE else [f"weights={file}"]
    fields += [] if size is None else [f"size={size}"]
    return ",".join(fields)
