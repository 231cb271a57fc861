"""The examples in the docstrings of the public functions run as printed, on small images, and no help shows them."""

import doctest
import inspect
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from run_samples import write_images

import crosslevel
from crosslevel.cli import COMMANDS
from crosslevel.settings import help as texts
from crosslevel.settings.command import Command

NAMES = ("CrossLevel", "classify", "curate", "embed", "evaluate", "inspect", "load", "pack", "search", "train")
QUICK = {"device": "cpu", "workers": 0, "quiet": True}
SMALL = {
    "train": {
        **QUICK, "epochs": 1, "batch_size": 8, "monitor_every": 0, "report_html": False,
        "encoder": {"width": 0.0625}, "views": {"size": 16}, "cld": {"groups": 4},
    },
    "curate": {"device": "cpu", "quiet": True},
    "pack": {"workers": 0, "quiet": True},
}  # fmt: skip
"""What is set in a call for speed, in place of the example's own values."""


def quick(name, *positional, **keywords):
    function = getattr(crosslevel, name)
    inspect.signature(function).bind(*positional, **keywords)
    return function(*positional, **{**keywords, **SMALL.get(name, QUICK)})


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A user's folder, with what the examples name."""
    folder = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("photos", "labelled/train", "labelled/test"):
            write_images(folder / name, count=8)
        for name in ("a.jpg", "b.jpg"):
            shutil.copy(folder / "photos" / "cat" / "000.png", folder / name)
        quick("train", "photos/", run="runs/photos")
        quick("embed", "runs/photos", "photos/", output="features.parquet")
        yield folder


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_as_printed(name, user, capsys):
    assert user.is_dir()
    verbs = {other: partial(quick, other) for other in NAMES if other != "CrossLevel"}
    ours = SimpleNamespace(**verbs, CrossLevel=crosslevel.CrossLevel, load_encoder=crosslevel.load_encoder)
    text = inspect.getdoc(getattr(crosslevel, name))
    example = doctest.DocTestParser().get_doctest(text, {"crosslevel": ours, "torch": torch}, name, None, None)
    assert example.examples
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0, capsys.readouterr().out


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_shows_no_example(verb):
    help_text = texts.of_command(Command.of(COMMANDS[verb][0], verb), "all")
    assert ">>>" not in help_text
    assert "Examples:" not in help_text
