"""Every block of the documentation is run, or its command line read by the real parser and its files opened."""

import argparse
import ctypes
import json
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
from doc_samples import BLOCKS, FILM, INLINE, ROOT, furnish

import crosslevel
from crosslevel.cli import COMMANDS, main
from crosslevel.data.open import open_images
from crosslevel.data.uri import parse
from crosslevel.models.encoder import Encoder
from crosslevel.models.start.pretrained import is_named
from crosslevel.settings.command import Command
from crosslevel.settings.parser import prepared, read_line
from crosslevel.settings.parts import as_argument

TINY = {"epochs": 1, "batch_size": 8, "device": "cpu", "workers": 0, "monitor_every": 0, "report_html": False}
PARTS = {"encoder": {"name": "resnet18", "width": 0.0625}, "cld": {"groups": 4}, "views": {"size": 16}}
LESS = {
    "train": [
        *(f"--{name}={value}".lower() for name, value in TINY.items()),
        *(f"--{part}.{name}={value}" for part, settings in PARTS.items() for name, value in settings.items()),
    ],
    "inspect": ["--device=cpu", "--workers=0"],
    "embed": ["--device=cpu"],
    "evaluate": ["--device=cpu", "--workers=0", "--linear.epochs=2", "--k=3"],
}
"""What is added to a command that is run, by its verb, so that it takes a second."""

RUN = {
    "README.md": ("inspect", "train", "embed", "evaluate"),
    "evaluation.md": ("compare",),
    "settings.md": ("recipes",),
}
"""Of which page which verbs are run, the first of each; all other lines are read, and their files opened."""

LEFT = {
    "README.md": ("inspection/duplicates.csv", "features.parquet"),
    "evaluation.md": ("comparison.md", "comparison.html"),
}
RUN_ELSEWHERE = {
    "demo": "tests/test_demo.py",
    "tune": "tests/tuning/test_tune.py",
    "export": "tests/models/test_export.py",
    "pack": "tests/data/test_packing.py",
    "push": "tests/evaluation/test_push.py",
    "subset": "tests/data/test_subset.py",
    "search": "tests/retrieval/test_search.py",
    "explore": "tests/exploration/test_explore.py",
    "curate": "tests/curation/test_curate.py",
    "classify": "tests/evaluation/labelling/test_classify.py",
}
EXEMPT = {
    "make": "sets up an environment; the Makefile has the target",
    "pip": "installs packages; the extra is in pyproject.toml",
    "pre-commit": "a program of its own",
    "sbatch": "needs SLURM; what follows the script's arguments are options of train",
}
NOT_RUN = {"class SimCLRWithCLD(SimCLR):": "needs solo-learn; the page says that it is not run"}
REMOTE = ("https://", "s3://", "hf://")

SHELL = [block for block in BLOCKS if block.kind == "shell"]
PYTHON = [block for block in BLOCKS if block.kind == "python" and block.page != "other-loops.md"]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A user's folder, with one run in it."""
    folder = tmp_path_factory.mktemp("user")
    furnish(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        crosslevel.train("photos/", run="runs/photos", quiet=True, **TINY, **PARTS)
        shutil.copytree("runs/photos", "runs/tune/photos")
        crosslevel.evaluate("runs/photos", "labelled/train", test="labelled/test", k=3, device="cpu", quiet=True)
        shutil.copytree("runs/photos", "runs/plain")
        crosslevel.embed("runs/photos", "photos/", output="features.parquet", thumbnails=96, device="cpu", quiet=True)
        crosslevel.curate("features.parquet", n=8, output="to-label.txt", outliers="keep", quiet=True)
        yield folder
    sys.modules.pop("mypackage.mymodule", None)


@pytest.fixture
def copy(scratch, tmp_path, monkeypatch):
    """The same for one test alone, in which it may write."""
    shutil.copytree(scratch, tmp_path / "user")
    monkeypatch.chdir(tmp_path / "user")


def lines(verb=None):
    for block in SHELL:
        for words in block.commands:
            if words[0] == "crosslevel" and verb in (None, words[1]):
                yield pytest.param(words[1:], id=f"{block}-{' '.join(words[1:4])}".replace("/", "."))


def first(page, verb):
    """The first command of a verb on a page."""
    return next(w[1:] for b in SHELL if b.page == page for w in b.commands if w[:2] == ["crosslevel", verb])


@pytest.mark.parametrize("words", list(lines()))
def test_a_command_is_read_whole_and_its_files_are_there(scratch, words):
    if any("videos/" in word for word in words) and not Path(FILM).exists():
        pytest.skip("needs PyAV: pip install 'crosslevel[video]'")
    command = Command.of(COMMANDS[words[0]][0], words[0])
    settings = prepared(command, words[1:])
    ours = {part.name: as_argument(part, settings[part.name]) for part in command.arguments if part.name in settings}
    for name in ("images", "test"):
        source = settings.get(name)
        if source is None or source.startswith("turntable"):
            continue
        if source.startswith(REMOTE):
            assert parse(source).kind in ("stream", "hub")
        else:
            assert len(open_images(source, data_root=settings.get("data_root"), crops=ours.get("crops"))) > 1
    for run in (
        [settings.get("run")] if words[0] in ("evaluate", "embed", "export", "push") else settings.get("runs", [])
    ):
        assert is_named(run) or Path(run, "encoder.safetensors").exists()


@pytest.mark.parametrize("page", RUN)
def test_commands_run_one_after_the_other(copy, page, capsys):
    """The README's begin with nothing but images; what they are said to leave is there afterwards, and named."""
    if page == "README.md":
        shutil.rmtree("runs")
    for verb in RUN[page]:
        main([*first(page, verb), *LESS.get(verb, [])])
    out = capsys.readouterr().out
    for file in LEFT.get(page, ()):
        assert Path(file).stat().st_size
        assert (Path(file).parent.name or Path(file).name) in out
    if page == "README.md":
        protocols = {row["protocol"].split(",")[0] for row in results("runs/photos")["results"]}
        assert protocols >= {"kNN", "linear"}


def results(run):
    return json.loads(Path(run, "evaluation.json").read_text())


def test_every_verb_is_run_by_some_test():
    run = {verb for verbs in RUN.values() for verb in verbs}
    assert run | set(RUN_ELSEWHERE) == set(COMMANDS)
    for verb, file in RUN_ELSEWHERE.items():
        assert re.search(rf"\b{verb}\(|run\({verb}|\"{verb}\"", (ROOT / file).read_text()), verb


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


def test_other_programs_are_ours_and_take_these_options(scratch, monkeypatch):
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
            elif program == "sbatch":
                assert (ROOT / words[0]).exists()
                prepared(Command.of(COMMANDS["train"][0], "train"), [words[1], "--run", *words[2:]])
            else:
                assert program == "crosslevel" or program in EXEMPT, block
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
