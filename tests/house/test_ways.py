"""How far a parameter travels: a newcomer who follows it opens few files, and never goes back upwards.

Followed is the value itself, from the call of `train` on: a file counts where one of its functions is handed it. What
does not count, and why:

- Objects that hold it (`Optimization`, `Job`, a loss): functions are handed these for the other things in them, too.
- `settings/`: it reads, checks and writes every value alike, so nobody who follows one of them has to read it. The
  command line is parsed there, before `train` is called.
- `training/defaults.py`: rules that choose another parameter by this one.
- Functions whose name begins with check: they only refuse.
"""

import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from embed_samples import random_encoder
from torchvision.io import write_png

import crosslevel
from crosslevel.cld.loss import CrossLevel
from crosslevel.data.uri import Source
from crosslevel.methods import MoCo
from crosslevel.models.encoder import Encoder
from crosslevel.training.train import train
from crosslevel.transforms.views import Views

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "crosslevel"
LAYERS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
HEIGHT = {room.strip(): -n for n, layer in enumerate(LAYERS) for room in layer.split("|")}
TEXT = "photos@imbalance=1"


class Number(int):
    """An int that can be told from others of its value."""


BATCH, GROUPS, TEMPERATURE = Number(8), Number(4), float("0.3137")
yaml.SafeDumper.add_representer(Number, yaml.SafeDumper.represent_int)


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, pixels in zip("ab", torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8), strict=True):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for i in range(6):
            write_png(pixels, str(folder / f"{i}.png"))


def followed(belongs, **given):
    """The functions of the package that are handed what ``belongs``, each with the file that handed it on."""
    stays = []

    def file_of(frame):
        while frame is not None and not frame.f_code.co_filename.startswith(f"{PACKAGE}/"):
            frame = frame.f_back
        return None if frame is None else str(Path(frame.f_code.co_filename).relative_to(PACKAGE))

    def watch(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(f"{PACKAGE}/"):
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            if any(belongs(frame.f_locals.get(name)) for name in names):
                stays.append((file_of(frame), code.co_name, file_of(frame.f_back)))

    usual = {
        "encoder": partial(Encoder, "resnet18", width=0.0625), "views": partial(Views, "cifar", 16), "epochs": 1,
        "batch_size": BATCH, "device": "cpu", "workers": 0, "report_html": False, "monitor_every": 0, "quiet": True,
        "run": "run",
    }  # fmt: skip
    sys.setprofile(watch)
    try:
        train(TEXT, **usual | given)
    finally:
        sys.setprofile(None)
    return stays


def rooms(stays):
    """The files that count, as the head of this file says, in the order in which they are entered."""
    kept = [file for file, function, _ in stays if not function.lstrip("_").startswith("check")]
    return list(dict.fromkeys(f for f in kept if not f.startswith("settings/") and f != "training/defaults.py"))


def handed_up(stays):
    """Files that were handed it from a lower layer."""
    return [(into, out) for into, _, out in stays if out and height(into) > height(out)]


def height(file):
    return HEIGHT[file.split("/")[0].removesuffix(".py")]


def test_a_source_is_parsed_once_and_visits_eight_rooms():
    """Its text, and the object that is made of it."""
    stays = followed(lambda value: isinstance(value, Source) or value == TEXT if isinstance(value, str | Source) else 0)
    assert len(rooms(stays)) <= 8
    assert rooms(stays)[:3] == ["training/train.py", "data/uri.py", "data/open.py"]
    assert not handed_up(stays)
    text = followed(lambda value: isinstance(value, str) and value == TEXT, run="again")
    assert [stay for stay in text if stay[1] == "parse"] == [("data/uri.py", "parse", "training/train.py")]


@pytest.mark.parametrize(
    ("value", "given", "first"),
    [
        (BATCH, {}, "training/train.py"),
        (GROUPS, {"cld": partial(CrossLevel, groups=GROUPS)}, "cld/loss.py"),
        (TEMPERATURE, {"cld": partial(CrossLevel, temperature=TEMPERATURE)}, "cld/loss.py"),
        (TEMPERATURE, {"method": partial(MoCo, queue=8, temperature=TEMPERATURE)}, "methods/moco.py"),
    ],
    ids=["batch_size", "groups", "temperature", "method.temperature"],
)
def test_a_number_visits_three_rooms(value, given, first):
    """From where it is a parameter: what reads the command line reads every value alike."""
    stays = followed(lambda argument: argument is value, **given)
    assert rooms(stays)[0] == first
    assert len(rooms(stays)) <= 3, stays
    assert not handed_up(stays)


def parsed_by(call):
    """The texts that are parsed as sources, in order."""
    texts, before = [], sys.gettrace()

    def watch(frame, event, argument):  # called at calls alone, as it returns nothing
        code = frame.f_code
        if code.co_name == "parse" and code.co_filename == f"{PACKAGE}/data/uri.py":
            texts.extend(text for text in (frame.f_locals["text"],) if not isinstance(text, Source))

    sys.settrace(watch)
    try:
        call()
    finally:
        sys.settrace(before)
    return texts


OPTIONS = {"device": "cpu", "workers": 0, "quiet": True}


@pytest.mark.parametrize(
    ("call", "sources"),
    [
        (lambda run: crosslevel.embed(run, TEXT, **OPTIONS), [TEXT]),
        (lambda run: crosslevel.embed(run, TEXT, output="features.parquet", **OPTIONS), [TEXT]),
        (lambda run: crosslevel.embed(run, TEXT, output="features", **OPTIONS), [TEXT]),
        (lambda run: crosslevel.evaluate(run, "photos", TEXT, **OPTIONS), ["photos", TEXT]),
        (lambda run: crosslevel.inspect(TEXT, **OPTIONS), [TEXT]),
        (lambda run: crosslevel.inspect("photos", run=run, beside=TEXT, **OPTIONS), ["photos", TEXT]),
        (lambda run: crosslevel.pack(TEXT, "packed", size=16, workers=0, quiet=True), [TEXT]),
        (lambda run: crosslevel.subset(TEXT, "part.txt", quiet=True), [TEXT]),
    ],
    ids=["embed", "embed-file", "embed-folder", "evaluate", "inspect", "inspect-run", "pack", "subset"],
)
def test_a_verb_parses_each_source_once(tmp_path, call, sources):
    """At its entrance: from there on only the object travels."""
    run = str(random_encoder(tmp_path / "run"))
    assert parsed_by(lambda: call(run)) == sources


@pytest.mark.parametrize(
    "call",
    [
        lambda run: crosslevel.curate(run, images="photos", outliers="keep", quiet=True),
        lambda run: crosslevel.search(run, "photos/a/0.png", images="photos", quiet=True),
        lambda run: crosslevel.explore(run, images="photos", export="page", quiet=True),
    ],
    ids=["curate", "search", "explore"],
)
def test_a_verb_that_has_embed_make_its_table_parses_the_source_once_and_embed_does(tmp_path, call):
    """Afterwards the table is there; what its metadata names is parsed where pictures are read."""
    run = str(random_encoder(tmp_path / "run"))
    full = str(tmp_path / "photos")
    assert parsed_by(lambda: call(run))[:2] == ["photos", full]
    assert parsed_by(lambda: call(run)).count("photos") == 1


def test_a_search_parses_its_source_once():
    """Each trial is a process of its own, which is handed the text."""

    def scores(*given):
        yield {"combined": 0.5, "effective_rank": 5.0, "mrr": 0.5}

    images = "turntable:train,classes=2,objects=20,frames=4,size=16,imbalance=2"
    less = {"trials": 1, "epochs": 1, "device": "cpu", "quiet": True}
    assert parsed_by(lambda: crosslevel.tune(images, output="search", training=scores, **less)) == [images]
