"""Blocks of the documentation in Python are run, commands of other programs are read; those of Crosslevel's run in
`test_first_lines.py` and `test_further_lines.py`.
"""

import argparse
import ctypes
import re
import runpy
import shutil
import sys
import tomllib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from doc_samples import BLOCKS, INLINE, PARTS, ROOT, TINY

import crosslevel
from crosslevel.cli import COMMANDS
from crosslevel.models.encoder import Encoder
from crosslevel.settings.command import Command
from crosslevel.settings.parser import read_line

EXEMPT = {
    "make": "sets up an environment; the Makefile has the target",
    "pip": "installs packages; the extra is in pyproject.toml",
    "embedding-atlas": "a program of its own; tests/features/test_table_formats.py calls it where it is installed",
}
RUN = ("crosslevel", "srun", "sbatch")
"""Programs whose lines other files run."""

SHELL = [block for block in BLOCKS if block.kind == "shell"]
PYTHON = [block for block in BLOCKS if block.kind == "python" and block.page != "other-loops.md"]
"""`test_docs.py` runs those of that page."""


@pytest.mark.parametrize(
    "words", [pytest.param(w, id=f"{page}-{' '.join(w[1:4])}".replace("/", ".")) for page, w in INLINE]
)
def test_the_options_of_a_command_within_a_sentence_exist(words):
    if words[1] in COMMANDS:
        command, given = Command.of(COMMANDS[words[1]][0], words[1]), words[2:]
        value = ["1"] if given[-1].startswith("--") else []  # a sentence may name an option alone
        read_line(command, [*given, *value])
    else:
        assert words[1] == "completion"


class _Read(Exception):
    pass


def test_other_programs_are_ours_and_take_these_options(monkeypatch):
    """Benchmarks are read by their own parsers; what is not ours is named with the reason."""
    parse_args = argparse.ArgumentParser.parse_args

    def read(parser, *given):
        parse_args(parser, *given)
        raise _Read

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", read)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for block in SHELL:
        for program, *words in block.commands:
            if program == "python":
                monkeypatch.setattr(sys, "argv", words)
                with pytest.raises(_Read):
                    runpy.run_path(str(ROOT / words[0]), run_name="__main__")
            elif program == "make":
                assert set(words) <= set(targets), block
            else:
                assert program in RUN or program in EXEMPT, block
    named = {words[0] for block in SHELL for words in block.commands}
    assert set(EXEMPT) <= named
    for name in ("shared.beside", "shared.records", "quality.paper", "quality.tune"):
        sys.modules.pop(name, None)


def test_extras_that_the_pages_name_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    named = set(re.findall(r"crosslevel\[(\w+)\]", pages))
    assert named
    assert named <= set(extras)


@pytest.mark.parametrize("page", sorted({block.page for block in PYTHON}))
def test_python_blocks_run_as_printed(copy, monkeypatch, page, capsys):
    """A page's blocks one after the other, in one namespace; only ``crosslevel.train`` is made small."""
    train = crosslevel.train
    monkeypatch.setattr(crosslevel, "train", lambda images, **given: train(images, **smaller(given)))
    for name in "ab":
        shutil.copy(next(Path("photos").rglob("*.png")), f"{name}.jpg")
    if page == "encoder.md":
        Encoder("resnet18", small_images=False).save(Path("runs/photos/encoder.safetensors"))
    space = given_names()
    try:
        for block in (block for block in PYTHON if block.page == page):
            exec(compile(block.text, str(block), "exec"), space)
    finally:
        if page == "numerics.md":
            ctypes.CDLL(None).mallopt(-6, 0)  # as glibc has it, for the tests after this one
    capsys.readouterr()
    if page == "python.md":
        assert space["table"].features.shape == (16, 32)
        assert Path("features.parquet").exists()
        assert Path("packed").is_dir()
        assert {row.split(",")[0] for row in space["figures"]} == {"kNN", "linear"}
        assert space["summary"]["count"] == 16


def smaller(given):
    """The settings of a training, made small; objects that build a part build a narrow one."""
    parts = {name: {**settings, **given[name], **settings} if isinstance(given.get(name), dict) else settings
             for name, settings in PARTS.items()}  # fmt: skip
    if callable(given.get("encoder")):
        parts["encoder"] = partial(given["encoder"], width=0.0625)
    return {**given, **TINY, **parts}


def given_names():
    """What a block takes as there: of a training loop the loss and features, of a program its arrays."""
    return {
        "crosslevel": crosslevel, "h_a": torch.randn(256, 512, requires_grad=True), "h_b": torch.randn(256, 512),
        "instance_loss": torch.tensor(1.0), "array": np.zeros((2, 16, 16, 3), np.uint8),
    }  # fmt: skip
