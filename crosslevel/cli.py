"""The command ``crosslevel``: one verb each, and what it does."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from crosslevel import __version__
from crosslevel.utils.processes import unread

COMMANDS = {
    "demo": (
        "crosslevel.demo",
        "a training with and without CLD on generated images, and a page that compares them",
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
    "recipes": (
        "crosslevel.settings.recipes",
        "settings by name, method and data set, with the published figure where one is recorded",
    ),
    "export": ("crosslevel.models.export", "the encoder's weights for torchvision, timm, detectron2 or ONNX"),
    "push": ("crosslevel.evaluation.push", "the encoder on the Hugging Face hub, with a model card, for timm"),
    "pack": ("crosslevel.data.pack", "images decoded and resized once, to be read at memory speed"),
    "embed": ("crosslevel.features.embed", "a table of features, one row an image"),
    "search": ("crosslevel.retrieval.search", "the images of a collection that are most like a given one"),
    "explore": (
        "crosslevel.exploration.explore",
        "a collection in the browser: its map, its images, sets chosen by hand",
    ),
    "curate": ("crosslevel.curation.curate", "what of a collection to keep or to label, without labels"),
    "classify": (
        "crosslevel.evaluation.labelling.classify",
        "labels for images, from labelled ones",
    ),
    "subset": (
        "crosslevel.data.subset",
        "a long-tailed, listed or otherwise chosen part of a source, written to a file",
    ),
}
COMPLETION = "completion"


def main(arguments: list[str] | None = None) -> None:
    """Run one command: ``crosslevel VERB ...``."""
    with unread():
        _main(arguments)


def _main(arguments: list[str] | None) -> None:
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] in ("--version", "-V"):
        print(f"crosslevel {__version__}")
        return
    verb = words[0] if words else "--help"
    if verb in ("-h", "--help", "help"):
        print(_overview())
        return
    if verb not in COMMANDS and verb != COMPLETION:
        _unknown(verb)
    with _uncollected(forever=arguments is None):
        from crosslevel.settings.parser import exit_on_error  # noqa: PLC0415

    with exit_on_error(f"crosslevel {verb}"):
        if verb == COMPLETION:
            _completion(words[1:])
        else:
            _run(verb, words[1:], forever=arguments is None)


def _run(verb: str, words: list[str], forever: bool) -> None:
    from crosslevel.settings.command import Command  # noqa: PLC0415
    from crosslevel.settings.parser import call, prepared  # noqa: PLC0415

    module = COMMANDS[verb][0]
    with _uncollected(forever):
        command = Command.of(module, verb)
        settings = prepared(command, words)
        if settings is None:
            sys.exit(0)
        # Imported when the settings are known to be right: help and refusals wait for nothing.
        function = getattr(import_module(module), verb)
    call(command, function, settings)


@contextmanager
def _uncollected(forever: bool) -> Iterator[None]:
    """Imports without the garbage collector, which takes a fifth of their time and finds nothing.

    ``forever``: the collector skips these objects for the rest of the process; for the command line only.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if forever:
            gc.freeze()
            atexit.register(gc.unfreeze)  # at the end it does, or triton's bindings report leaks
        if enabled:
            gc.enable()


def _completion(words: list[str]) -> None:
    from crosslevel.settings.completion import INSTALLATION, script  # noqa: PLC0415

    if words[:1] in ([], ["--help"], ["-h"]):
        print("usage: crosslevel completion bash|zsh|fish\n")
        print("\n".join(f"  {line}" for line in INSTALLATION.values()))
        return
    print(script(words[0], COMMANDS))


def _unknown(verb: str) -> None:
    from crosslevel.utils.errors import did_you_mean  # noqa: PLC0415

    is_version = verb.lower().strip("-") in ("v", "version")
    hint = did_you_mean("--version" if is_version else verb, [*COMMANDS, COMPLETION, "--version", "--help"])
    print(f"crosslevel: there is no command {verb!r}: {hint}", file=sys.stderr)
    sys.exit(2)


def _overview() -> str:
    width = max(map(len, [*COMMANDS, COMPLETION]))
    verbs = [(verb, summary) for verb, (_, summary) in COMMANDS.items()]
    lines = [
        f"  {verb:<{width}}  {summary}"
        for verb, summary in [*verbs, (COMPLETION, "verbs and options for a shell's Tab")]
    ]
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
