"""What a former version left still opens: made by the last commit before the package's folders moved.

It trained MoCo with CLD on photos/ for 3 epochs and was stopped in the second one, packed, evaluated and embedded them,
and searched for a weight of CLD with one trial.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from run_samples import metrics

import crosslevel
from crosslevel.data.open import open_images
from crosslevel.methods import MoCo
from crosslevel.models.encoder import Encoder
from crosslevel.settings.parser import run
from crosslevel.training.loop import shards
from crosslevel.training.loop.module import Pretrain
from crosslevel.training.loop.state import NAMED, restore
from crosslevel.training.train import train
from crosslevel.transforms.views import Views
from crosslevel.utils.errors import UserError

FORMER, THERE = Path(__file__).parent / "first_layout.tar.xz", "/tmp/house/made"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("former")
    with tarfile.open(FORMER) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def left(unpacked, tmp_path, monkeypatch):
    """A folder with all of it, whose files name the photos where they are now."""
    folder = shutil.copytree(unpacked, tmp_path / "left")
    for file in (folder / "run" / "config.yaml", folder / "study" / "config.yaml", folder / "pack" / "pack.json"):
        file.write_text(file.read_text().replace(THERE, str(folder)))
    monkeypatch.chdir(folder)
    return folder


def test_a_run_goes_on_where_it_was(left, capsys):
    """Its checkpoint was the Trainer's; the rows it had stay, and the rest of its 21 steps follow."""
    before = metrics(left / "run")
    assert [int(row["step"]) for row in before] == list(range(1, 9))
    run(train, ["--resume", "run", "--report_html=false", "--checkpoint_minutes=1000"])
    after = metrics(left / "run")
    assert [int(row["step"]) for row in after] == list(range(1, 22))
    assert [row["loss"] for row in after[:8]] == [row["loss"] for row in before]
    assert all(np.isfinite(float(row["loss"])) for row in after)
    assert "continues with the images as they are now" not in capsys.readouterr().out


def test_averages_in_parts_go_on_under_their_former_name(tmp_path):
    """A checkpoint of ``--strategy fsdp`` names each tensor of its parts; MoCo's averages were called ``key.twin``."""

    def step():
        encoder = Encoder("resnet18", width=0.0625, small_images=True)
        method = MoCo(encoder, 8, out_features=4, queue=8)
        how = {"steps": 2, "warmup_steps": 0, "optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0, "seed": 0}
        return Pretrain(encoder, method, None, Views("cifar", 16), **how)

    made, restored = step(), step()
    weights = {name.replace(".ema.", ".twin."): value for name, value in made.state_dict().items()}
    in_parts = {f"model.{name}": value for name, value in weights.items() if ".twin." in name}
    assert len(in_parts) > 20
    shards.write(tmp_path / "parts", in_parts, 0)
    tree = {name: value for name, value in weights.items() if ".twin." not in name}
    state = {"state_dict": tree, "optimizer_states": [{NAMED: {}}]}
    optimizer = torch.optim.SGD(restored.encoder.parameters())
    restore(restored, optimizer, state, shards.Shards(tmp_path / "parts"), tmp_path / "last.ckpt")
    for name, value in made.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value), name


def test_an_encoder_gives_the_features_that_it_gave(left):
    table = pq.read_table(left / "table.parquet").to_pydict()
    (name,) = [name for name in table if isinstance(table[name][0], list)]
    found = crosslevel.embed("run", "photos", device="cpu", precision="fp32", workers=0, quiet=True)
    assert [str(path) for path in found.paths] == table["path"]
    np.testing.assert_allclose(found.features, np.array(table[name]), rtol=1e-4, atol=1e-4)


def test_a_pack_has_the_same_pixels_and_labels(left):
    packed, photos = open_images("pack"), open_images("photos")
    assert len(packed) == 120
    assert packed.classes == ["cats", "dogs"]
    for i in range(0, 120, 7):
        pixels, label = packed[i]
        assert label == photos[i][1]
        np.testing.assert_array_equal(
            pixels.permute(1, 2, 0), np.asarray(Image.open(left / "photos" / photos.paths[i]))
        )


def test_kept_features_are_taken_or_computed_again(left):
    """Either way the figures of the run's file come out; the file is read, and gets the new figures."""
    before = json.loads((left / "run" / "evaluation.json").read_text())["results"][0]["accuracy_percent"]
    found = crosslevel.evaluate(
        "run", "photos", "photos", k=200, temperature=0.1, device="cpu", precision="fp32", workers=0, quiet=True
    )
    (figures,) = found.values()
    for kind in ("raw pixels", "trained encoder"):
        assert figures[kind]["top1"] == pytest.approx(before[kind]["top1"], abs=0.01)
    after = json.loads((left / "run" / "evaluation.json").read_text())["results"]
    assert len(after) in (1, 2)


def test_a_study_is_refused_with_what_to_do_or_goes_on(left, capsys):
    """Trials of another version had other defaults: they are not compared with new ones."""
    pytest.importorskip("optuna", reason="needs optuna: pip install 'crosslevel[tune]'")
    settings = {"encoder": {"width": 0.03125}, "views": {"size": 16}, "cld": {"groups": 4}, "monitor_every": 0}
    with pytest.raises(UserError, match="another --output"):
        crosslevel.tune(
            "photos", ["cld.weight=0:1"], "study", trials=1, budget=1, finalists=0, batch_size=16, epochs=3,
            device="cpu", workers=0, **settings,
        )  # fmt: skip
    assert (left / "study" / "trials.csv").read_text().count("\n") == 2


def test_the_settings_of_a_study_and_of_a_run_are_read(left, capsys):
    """The best settings were written for ``train --config``; both name MoCo where it was then."""
    for file in ("study/config.yaml", "run/config.yaml"):
        with pytest.raises(SystemExit, match="0"):
            run(train, ["photos", "--config", file, "--print_config"])
        assert "crosslevel.methods.moco.MoCo" in capsys.readouterr().out


@pytest.mark.parametrize(("source", "kind"), [("photos", "folder"), ("photos.tar", "shard")])
def test_indexes_of_sources_are_made_anew(tmp_path, monkeypatch, source, kind):
    """In their files' places: those of now have columns that the former ones lack, and are taken the next time."""
    monkeypatch.setenv("CROSSLEVEL_CACHE", str(tmp_path / "now"))
    with tarfile.open(FORMER.with_name("index_cache.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    expected = open_images(tmp_path / source)
    (former,) = (tmp_path / "cache").glob(f"{kind}-*.safetensors")
    (kept,) = (tmp_path / "now").glob(f"{kind}-*.safetensors")
    shutil.copyfile(former, kept)
    for is_new in (True, False):
        before = kept.read_bytes(), kept.stat().st_mtime_ns
        images = open_images(tmp_path / source)
        assert ((kept.read_bytes(), kept.stat().st_mtime_ns) != before) == is_new
        assert list(images.paths) == list(expected.paths)
        assert images.labels.tolist() == expected.labels.tolist() == [0] * 4 + [1] * 4
        assert all((images[i][0] == expected[i][0]).all() for i in range(8))
