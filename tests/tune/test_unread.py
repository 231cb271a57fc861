"""Files that cannot be read are named at a search's end, whichever part of it should have read them."""

import pytest
import torch
from PIL import Image

pytest.importorskip("optuna", reason="needs optuna: pip install 'crosslevel[tune]'")

from crosslevel import images
from crosslevel.commands import run
from crosslevel.tune import trial, tune

pytestmark = pytest.mark.slow


def test_broken_files_are_named_whether_trained_on_or_held_out(tmp_path, monkeypatch, capsys):
    noise = torch.Generator().manual_seed(0)
    photos, search = tmp_path / "photos", tmp_path / "search"
    photos.mkdir()
    for i in range(70):
        pixels = torch.randint(0, 255, (16, 16, 3), generator=noise, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(photos / f"{i:03}.png")
    trained_on, held = trial.divided(images.open(str(photos)), 0)
    broken = [trained_on.paths[3], held.paths[2]]
    for path in broken:
        (photos / path).write_bytes(b"no picture")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=8", "--device=cpu", "--epochs=1"]
    run(tune, [str(photos), *tiny, "--budget=1", f"--output={search}"])
    told = " ".join(capsys.readouterr().out.split())
    assert f"skipped 2 of 70 images that could not be read (listed in {search}/bad_files.txt)" in told
    listed = (search / "bad_files.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == sorted(broken)
