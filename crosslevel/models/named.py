"""Opens an encoder by the user's text: a run, or weights of timm or the hub."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from crosslevel.models.encoder import Encoder, load_encoder
from crosslevel.models.start.pretrained import CONFIG, FOLDER, TIMM, is_named
from crosslevel.utils.errors import UserError
from crosslevel.utils.files import ENCODER


def open_encoder(run: str | os.PathLike[str]) -> Encoder:
    """The encoder that ``run`` names, with its view, in evaluation mode.

    Args:
        run: the folder of a run, or its encoder.safetensors; or, without any training, ``timm:NAME`` such as
            ``timm:vit_small_patch14_dinov2.lvd142m``, ``hf-hub:owner/name``, or a folder with such a repository's
            config.json and model.safetensors. ``,size=224`` after one of these takes images of that size in place of
            the weights' own; ``,weights=FILE`` after timm:NAME the weights in this .safetensors file.

    Raises:
        UserError: there is no such run, no such name, or no network; the message says what to do.

    """
    text = os.fspath(run)
    if not is_by_name(text):
        return load_encoder(text)
    name, size, file = _parsed(text)
    if not is_named(name):
        name = FOLDER + name
    encoder = Encoder(name, pretrained=file or True)
    if size is not None:
        encoder.resize(size)
    return encoder.eval().requires_grad_(False)


def is_by_name(run: str | os.PathLike[str]) -> bool:
    """Whether ``run`` names weights that were not trained here."""
    text = os.fspath(run)
    folder = Path(text.partition(",")[0])
    return is_named(text) or ((folder / CONFIG).is_file() and not (folder / ENCODER).exists())


def run_dir_of(run: str | os.PathLike[str]) -> Path | None:
    """The run's folder, which stores results about it; None for weights by name."""
    if is_by_name(run):
        return None
    return Path(run) if Path(run).is_dir() else Path(run).parent


def title_of(run: str | os.PathLike[str]) -> str:
    """The encoder's title in tables."""
    return os.fspath(run).rstrip("/") if is_by_name(run) else Path(run).name


def mark_of(run: str | os.PathLike[str], encoder: Encoder) -> str:
    """A text that changes when the encoder does; for a run it depends on the file's state, without reading it."""
    if is_by_name(run):
        return hashlib.sha256(encoder.identity().encode()).hexdigest()
    weights = Path(run) / ENCODER if Path(run).is_dir() else Path(run)
    return f"{weights.stat().st_mtime_ns} {weights.stat().st_size}"


def _parsed(text: str) -> tuple[str, int | None, str | None]:
    """The name, the size of the images, and the file of weights."""
    name, *settings = text.split(",")
    size, file = None, None
    for setting in settings:
        key, _, value = setting.partition("=")
        if key == "size" and re.fullmatch(r"[1-9]\d*", value):
            size = int(value)
        elif key == "weights" and value and name.startswith(TIMM):
            file = value
        else:
            of_timm = " or weights=FILE" if name.startswith(TIMM) else ""
            raise UserError(f"{text}: {setting!r} is no setting of it: give size=PIXELS{of_timm}")
    return name, size, file
