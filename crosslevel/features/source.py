"""Images for an encoder: read in the same way as its training images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from crosslevel.data.decoding.reading import USUAL, Reading
from crosslevel.data.images import Images
from crosslevel.data.open import open_images
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.uri import Source, parse
from crosslevel.models.encoder import Encoder
from crosslevel.utils.errors import UserError
from crosslevel.utils.files import CONFIG
from crosslevel.utils.trees import regular, yaml_tree

STORED = ("channels", "range")
"""The reading settings that an encoder stores."""


def reads_of(reading: Reading) -> dict[str, str]:
    """The reading settings that an encoder trained on such images stores; empty if all are the default."""
    return {name: str(getattr(reading, name)) for name in STORED if getattr(reading, name) != getattr(USUAL, name)}


def suited(source: Source, encoder: Encoder) -> Source:
    """``source`` with the encoder's reading settings where it has none; data sets by name stay as they are."""
    if source.kind == "name":
        return source
    settings = reads_of(source.reading)
    missing = {name: value for name, value in encoder.reads.items() if name in STORED and name not in settings}
    return source.read_as(missing) if missing else source


def reading_of(encoder: Encoder) -> Reading:
    """The reading settings of single images for an encoder."""
    return parse("images").read_as({name: value for name, value in encoder.reads.items() if name in STORED}).reading


def open_for(encoder: Encoder, source: Source, data_root: str | None = None, crops: Crops | None = None) -> Images:
    """The images of ``source``, in the channels that the encoder takes.

    Raises:
        UserError: they have others.
        SourceError: as from `open_images`.

    """
    opened = open_images(suited(source, encoder), data_root=data_root, crops=crops)
    check_channels(encoder, opened.channels, source.text)
    return opened


def check_channels(encoder: Encoder, channels: int, name: str) -> None:
    """Refuse images, or further encoders, with other channels than this encoder's.

    Raises:
        UserError: they have others.

    """
    expected = encoder.view.channels
    if channels != expected:
        raise UserError(f"{name}: images of {channels} channels, where {encoder.name} takes {expected}")


def settings_of(run_dir: Path) -> dict[str, Any]:
    """The settings that a run was trained with; empty where its folder does not have them."""
    try:
        tree = yaml_tree(regular(run_dir / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}
