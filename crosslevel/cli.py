"""The command ``crosslevel``: one verb each, and what it does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any

COMMANDS = {
    "demo": (
        "crosslevel.demo",
        "MoCo with and without CLD on generated images, and a page that shows both",
    ),
    "train": ("crosslevel.training.train", "images without labels in, a trained encoder out"),
    "tune": ("crosslevel.tuning.tune", "better settings for images without labels, found without labels"),
    "evaluate": (
        "crosslevel.evaluation.evaluate",
        "what the features are good for: kNN, linear, semi-supervised, transfer, detection, ...",
    ),
    "compare": ("crosslevel.evaluation.compare", "the evaluations of several runs side by side"),
    "inspect": (
        "crosslevel.inspection.inspect",
        "what is in a collection: sizes, damage, duplicates, the long tail; settings for it",
    ),
    "recipes": ("crosslevel.settings.recipes", "the settings of published results, and their figures"),
    "export": ("crosslevel.models.export", "the encoder's weights for torchvision, timm, detectron2 or ONNX"),
    "pack": ("crosslevel.data.pack", "images decoded and resized once, to be read at memory speed"),
    "embed": ("crosslevel.features.embed", "a table of features, one row an image"),
    "subset": (
        "crosslevel.data.subset",
        "a long-tailed, listed or otherwise chosen part of a source, written to a file",
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Run one command: ``crosslevel VERB ...``."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] == "--version":
        print(f"crosslevel {version('crosslevel')}")
        return
    verb = given[0] if given else "--help"
    if verb in ("-h", "--help"):
        print(_overview())
        return
    if verb not in COMMANDS:
        print(f"crosslevel: there is no command {verb!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    # Each verb is imported when it is used: --help of one need not wait for the rest.
    function: Callable[..., Any] = getattr(import_module(COMMANDS[verb][0]), verb)
    import_module("crosslevel.settings.parser").run(function, given[1:])


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {verb:<{width}}  {what}" for verb, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: crosslevel COMMAND ...",
            "",
            "Visual features from natural, unlabelled images.",
            "",
            *lines,
            "",
            "crosslevel COMMAND --help lists a command's options; crosslevel --version says which this is.",
        ]
    )
