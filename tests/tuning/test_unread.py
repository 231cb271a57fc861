"""Files that cannot be read are named at a search's end, whichever part of it should have read them."""

import pytest
import torch
import yaml
from forked import forked_training
from PIL import Image

pytest.importorskip("optuna", reason="needs optuna: pip install 'crosslevel[tune]'")

from crosslevel.data.open import open_images
from crosslevel.settings.parser import run
from crosslevel.tuning import trial
from crosslevel.tuning.tune import tune

pytestmark = pytest.mark.slow


TINY = {"encoder": {"width": 0.0625}, "views": {"size": 16}, "batch_size": 8, "device": "cpu", "epochs": 2, "seed": 0}


@pytest.fixture
def photos(tmp_path):
    """Noisy pictures, and the paths of two that are none: one to train on, one held out."""
    noise = torch.Generator().manual_seed(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(70):
        pixels = torch.randint(0, 255, (16, 16, 3), generator=noise, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:03}.png")
    trained_on, held = trial.divided(open_images(str(folder)), 0)
    broken = [trained_on.paths[3], held.paths[2]]
    for path in broken:
        (folder / path).write_bytes(b"no picture")
    return folder, sorted(broken)


def listed(file):
    return [line.split("\t")[0] for line in file.read_text().splitlines()]


def test_broken_files_are_named_whether_trained_on_or_held_out(photos, tmp_path, capsys):
    folder, broken = photos
    search = tmp_path / "search"
    tiny = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=8", "--device=cpu", "--epochs=1"]
    run(tune, [str(folder), *tiny, "--budget=1", f"--output={search}"], training=forked_training)
    told = " ".join(capsys.readouterr().out.split())
    assert f"skipped 2 of 70 images that could not be read (listed in {search}/bad_files.txt)" in told
    assert listed(search / "bad_files.txt") == broken


def test_a_trial_that_is_stopped_has_named_them(photos, tmp_path):
    folder, broken = photos
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(TINY | {"method": {"class_path": "crosslevel.methods.MoCo"}}))
    steps = forked_training(str(folder), base, [], tmp_path / "run", 1)
    next(steps)
    steps.close()
    assert listed(tmp_path / "run" / "bad_files.txt") == broken
