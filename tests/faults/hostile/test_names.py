"""Names of files that steer a terminal, and addresses with passwords: no verb prints them as they are."""

import contextlib
import hashlib
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from strangers import TINY

from crosslevel.cli import main
from crosslevel.settings.parser import run
from crosslevel.training.train import train
from crosslevel.tuning.tune import tune

HOSTILE = "a\x1b]0;owned\x07\x1b[2J\r\x9b31m[red]"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images of two classes, one that cannot be read among them, and a run: each with a name that steers a terminal."""
    home = tmp_path_factory.mktemp("names")
    draws = np.random.default_rng(0)
    for i in range(64):
        file = home / HOSTILE / f"{'xy'[i % 2]}{HOSTILE}" / f"{i:02}{HOSTILE}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (16, 16, 3), np.uint8)).save(file)
    shutil.copy(file, file.with_name("copy" + file.name))
    file.with_name("bad" + file.name).write_bytes(b"\x89PNG\r\n\x1a\n")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        run(train, [str(home / HOSTILE), *TINY, "--method=SimCLR", f"--run={home / f'run{HOSTILE}'}"])
    (home / "said").write_text(said.getvalue())
    return home


def harmless(said):
    assert r"\x1b]0;owned" in said
    assert [c for c in said if not c.isprintable() and c not in "\n\t"] == []


VERBS = {
    "train a bad config": "{photos} --config={photos}",
    "pack": "{photos} -o {out} --workers=0",
    "inspect": "{photos} -o {out}",
    "embed": "{run} {photos} -o {out}.parquet --device=cpu --workers=0",
    "evaluate": "{run} {photos} --test={photos} --device=cpu --workers=0 --batch_size=64",
    "export": "{run} --format=timm -o {out}.safetensors",
    "compare": "{run} {run}2 -o {out}",
    "subset": "{photos} -o {out}.txt",
    "embed what is not there": "{run} {photos}/none -o {out}.parquet",
}


@pytest.mark.parametrize("verb", list(VERBS))
def test_no_verb_prints_a_name_that_steers_the_terminal(place, tmp_path, capsys, verb, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    parts = {"photos": place / HOSTILE, "run": place / f"run{HOSTILE}", "out": tmp_path / f"out{HOSTILE}"}
    arguments = [word.format(**parts) for word in VERBS[verb].split()]
    if verb == "compare":
        evaluated(parts["run"])
        shutil.copytree(parts["run"], f"{parts['run']}2", dirs_exist_ok=True)
    capsys.readouterr()
    refused = verb.startswith(("train a", "embed what"))
    with pytest.raises(SystemExit, match="2") if refused else contextlib.nullcontext():
        main([verb.split()[0], *arguments])
    harmless("".join(capsys.readouterr()))


def test_train_prints_no_name_that_steers_the_terminal(place):
    harmless((place / "said").read_text())


def evaluated(folder):
    told = {"protocol": "knn", "images": "i", "test": "t", "settings": {}, "seconds": 1}
    figures = {"accuracy_percent": {"trained encoder": {"top1": 50.0}}, "interval_percent": {}}
    (folder / "evaluation.json").write_text(json.dumps({"results": [told | figures]}))


def test_tune_prints_no_name_that_steers_the_terminal(place, tmp_path, capsys):
    def training(images, base, options, folder, threads):
        for epoch in (1, 2):
            score = int(hashlib.sha256(repr(options).encode()).hexdigest()[:4], 16)
            yield {"combined": score * epoch, "effective_rank": 5.0, "collapse": "", "symptoms": HOSTILE}

    images, out = str(place / HOSTILE), str(tmp_path / HOSTILE)
    run(
        tune, [images, "--search=lr=0.01,0.1", "--trials=2", "--epochs=2", "--device=cpu", "-o", out], training=training
    )
    harmless("".join(capsys.readouterr()))


@pytest.mark.parametrize(
    "storage",
    ["postgres//bob:PW@h", "postgres:bob:PW@h", "bob:PW@h/d", "postgres://bob:PW@h:port/d", "nosuch://bob:PW@h/d"],
)
def test_no_mistyped_address_tells_its_password(place, tmp_path, capsys, storage):
    with pytest.raises(SystemExit, match="2"):
        run(tune, [str(place / HOSTILE), f"--storage={storage}", "-o", str(tmp_path / "t"), "--trials=1"])
    said = "".join(capsys.readouterr())
    assert said
    assert "PW" not in said


@pytest.mark.parametrize("images", ["s3://key:PW@bucket/x.tar", "https://bob:PW@127.0.0.1:1/x.tar", "s3//key:PW@b/x"])
def test_no_address_of_images_tells_its_password(tmp_path, capsys, images):
    with pytest.raises(SystemExit, match="2"):
        run(train, [images, f"--run={tmp_path / 'r'}", "--device=cpu"])
    said = "".join(capsys.readouterr())
    assert said
    assert "PW" not in said
