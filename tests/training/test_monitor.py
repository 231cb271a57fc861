"""Figures of the features during training, and the collapse that they show."""

import csv
import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from crosslevel.cld.loss import CrossLevel
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import InMemoryImages
from crosslevel.data.loaders.batches import TrainBatches
from crosslevel.data.sources.turntable.dataset import Turntable
from crosslevel.methods import SimCLR
from crosslevel.methods.byol import distance
from crosslevel.metrics.label_free import NAMES
from crosslevel.metrics.spectrum import effective_rank
from crosslevel.models.encoder import Encoder, View
from crosslevel.runs import Run
from crosslevel.settings.parser import run
from crosslevel.training.loop.fit import fit
from crosslevel.training.loop.guards.collapse import CollapseWatch, symptoms
from crosslevel.training.loop.module import Pretrain
from crosslevel.training.monitor import (
    label_free_monitor,
    labelled_split,
    monitor_of,
    near_tracks,
    tracks_for_scores,
)
from crosslevel.training.train import train
from crosslevel.transforms.views import Views
from crosslevel.utils.device import Hardware

CPU = Hardware(torch.device("cpu"), "fp32", "")
TINY = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=16", "--log_every=1", "--device=cpu"]


@pytest.fixture(scope="module")
def images():
    return Turntable(classes=3, objects=12, frames=8, imbalance=2, size=16)


def small():
    encoder = Encoder("resnet18", width=0.0625, small_images=True, zero_init_last=True)
    encoder.view = View(16)
    return encoder


class Alignment(SimCLR):
    """Two views attract each other, and nothing repels."""

    def forward(self, views, features, index):
        return distance(*(self.project(h) for h in features[:2])), None


def pretrained(folder, images, method, encoder, lr, cld=None):
    batches = TrainBatches(images, 16, seed=0, bad_files=BadFiles())
    module = Pretrain(
        encoder, method, cld, Views(size=16), steps=6 * len(batches), warmup_steps=2, optimizer="sgd", lr=lr,
        weight_decay=0.0, seed=0,
    )  # fmt: skip
    with (folder / "log.txt").open("w") as log:
        fit(
            module, batches, folder, hardware=CPU, log_every=2, monitor_every=2, console=Console(file=log, width=300),
            monitor=label_free_monitor(encoder, method, cld, images, CPU, seed=0),
        )  # fmt: skip
    return (folder / "log.txt").read_text()


@pytest.mark.parametrize(
    ("method", "lr", "seed", "kind"),
    # Of SimCLR either may come first; at this seed it is the features for every rate from 50 to 200.
    [(Alignment, 0.5, 0, "the instance branch collapses"), (SimCLR, 100.0, 5, "the features collapse")],
)
def test_a_collapse_is_named_once_while_it_happens(tmp_path, images, method, lr, seed, kind):
    torch.manual_seed(seed)
    encoder = small()
    log = pretrained(tmp_path, images, method(encoder, head="mlp", temperature=0.2), encoder, lr=lr)
    lines = [line for line in (tmp_path / "warnings.txt").read_text().splitlines() if kind in line]
    assert len(lines) == log.count(kind) == 1
    assert "effective rank 1." in lines[0]
    assert "lower --lr (now " in lines[0]
    assert int(lines[0].split(":")[0].removeprefix("step ")) < 36  # not at the end


def test_the_scores_are_in_tensorboard(tmp_path, images):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    torch.manual_seed(0)
    encoder = small()
    pretrained(tmp_path, images, SimCLR(encoder), encoder, lr=0.03, cld=CrossLevel(encoder.num_features, groups=8))
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["combined"]]
    for name in (*NAMES, "instance_rank", "group_rank"):
        assert [one.step for one in found.Scalars(name)] == [int(row["step"]) for row in rows]
        assert [one.value for one in found.Scalars(name)] == pytest.approx([float(row[name]) for row in rows], rel=1e-4)


def test_a_healthy_run_is_not_warned_of(tmp_path, images):
    torch.manual_seed(0)
    encoder = small()
    cld = CrossLevel(encoder.num_features, groups=8, weight=0.25)
    log = pretrained(tmp_path, images, SimCLR(encoder), encoder, lr=0.03, cld=cld)
    assert "collapse" not in log
    assert not (tmp_path / "warnings.txt").exists()
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["combined"]]
    assert len(rows) == 3
    assert all(row[name] for row in rows for name in NAMES)


@pytest.mark.parametrize(
    ("figures", "kinds"),
    [
        ({"effective_rank": 1.2, "lr": 0.06}, {"features"}),
        ({"effective_rank": 6.0, "largest_group": 20.0}, set()),
        ({"largest_group": 250.0, "group_agreement": 1.0}, {"groups"}),
        ({"effective_rank": 1.0, "largest_group": 256.0}, {"features", "groups"}),
        ({"instance_rank": 1.0}, {"instance branch"}),
        ({"group_rank": 1.1, "largest_group": 5.0, "group_agreement": 0.3}, {"groups"}),
        ({"group_agreement": 0.004}, set()),
        ({}, set()),
    ],
)
def test_symptoms_are_told_apart(figures, kinds):
    assert set(symptoms(figures, 256, 512, 128)) == kinds


def test_a_large_group_of_two_or_of_a_run_without_groups_is_none():
    assert not symptoms({"largest_group": 250.0, "group_rank": 1.5}, 256, 512, 2)
    assert not symptoms({"largest_group": 250.0}, 256, 512, None)


def test_features_that_are_alike_but_for_noise_fall_into_even_groups_and_are_named():
    """By their rank; neither the groups' sizes nor a batch's agreement tells."""
    torch.manual_seed(0)
    cld = CrossLevel(16, groups=16, out_features=64)
    cld.branch = torch.nn.Identity()
    for noise, collapsed in ((0.1, True), (10.0, False)):
        z = [torch.ones(64, 64) + noise * torch.randn(64, 64) for _ in range(2)]
        cld(*z)
        figures = {"largest_group": float(cld.last.a.sizes.max()), "group_rank": effective_rank(z[0])}
        assert figures["largest_group"] < 32
        assert ("groups" in symptoms(figures, 64, 16, 16)) == collapsed


def test_one_long_film_is_not_easier_to_tell_apart_than_many(images):
    """With all frames in one track nothing would be left to rank against, and any features would be perfect."""
    film = InMemoryImages(images.data, images.paths)
    film.tracks = torch.zeros(len(images), dtype=torch.long)
    encoder = small()
    found = label_free_monitor(encoder, None, None, film, CPU, 0)()
    assert found["mrr"] < 0.9
    apart = InMemoryImages(images.data, images.paths)
    apart.tracks = torch.arange(len(images)) // (len(images) // 4)
    assert found == label_free_monitor(encoder, None, None, apart, CPU, 0)()
    apart.tracks = torch.arange(len(images)) // (len(images) // 3)
    assert torch.equal(tracks_for_scores(apart), apart.tracks)  # of three films two are left to rank against


def test_the_views_are_the_same_each_time_and_the_encoder_is_left_alone(images):
    encoder, cld = small().train(), CrossLevel(32)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    measure = label_free_monitor(encoder, SimCLR(encoder), cld, images, CPU, seed=0)
    torch.manual_seed(1)
    first, state = measure(), torch.get_rng_state()
    assert measure() == first
    assert set(first) == {*NAMES, "instance_rank", "group_rank"}
    assert torch.equal(torch.get_rng_state(), state)
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    other = label_free_monitor(encoder, SimCLR(encoder), cld, images, CPU, seed=1)()
    assert other != first


def test_copies_in_a_folder_without_tracks_do_not_count_as_wrong(images):
    """Each image twice, one copy a pixel aside: without a word of tracks the scores are as with them."""
    whole = InMemoryImages(
        torch.cat([images.data, images.data.roll(1, 3)]), [*images.paths, *(f"copy/{p}" for p in images.paths)]
    )
    assert whole.tracks is None
    found = near_tracks(whole)
    half = len(images)
    assert (found[:half] == found[half:]).float().mean() > 0.95
    encoder = small()
    seen = label_free_monitor(encoder, None, None, whole, CPU, 0)()
    known = InMemoryImages(whole.data, whole.paths)
    known.tracks = torch.arange(2 * half)  # as if all were different
    fooled = label_free_monitor(encoder, None, None, known, CPU, 0)()
    assert fooled["mrr"] < seen["mrr"]


def test_without_labels_the_scores_are_the_default_and_knn_is_refused(images):
    unlabelled = InMemoryImages(images.data, images.paths)
    assert "combined" in monitor_of(None, small(), None, None, unlabelled, CPU, 0)()
    assert set(monitor_of(None, small(), None, None, images, CPU, 0)()) == {"knn", "effective_rank"}
    assert {"combined", "knn"} <= set(monitor_of("both", small(), None, None, images, CPU, 0)())
    with pytest.raises(ValueError, match="--monitor both needs labels"):
        monitor_of("both", small(), None, None, unlabelled, CPU, 0)


def test_knn_has_all_digits_of_the_share_of_right_queries(images):
    """The guard of pretrained weights compares it with the start's less a margin."""
    torch.manual_seed(0)
    knn, queries = monitor_of("knn", small(), None, None, images, CPU, 0)()["knn"], labelled_split(images, 0).queries
    assert knn in [100 * (right / queries) for right in range(1, queries)]


def test_features_that_are_no_numbers_are_left_to_the_loss(images):
    encoder = small()
    torch.nn.init.constant_(encoder.backbone.conv1.weight, torch.nan)
    assert label_free_monitor(encoder, None, None, images, CPU, 0)() == {}


def test_the_command_shows_scores_and_draws_their_curves(tmp_path, capsys):
    source = "turntable:train,classes=3,objects=12,frames=4,imbalance=2,size=16"
    run(train, [source, f"--run={tmp_path / 'r'}", "--epochs=2", "--monitor=label_free", *TINY])
    with (tmp_path / "r" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["combined"]]
    assert len(rows) == 2
    assert not any(row["knn"] for row in rows)
    shown = capsys.readouterr().out
    assert all(f"score {float(row['combined']):.3f}" in shown for row in rows)
    page = Path(tmp_path / "r" / "report.html").read_text()
    assert "Label-free score during training" in page
    assert "monitor: label_free" in (tmp_path / "r" / "config.yaml").read_text()


@pytest.mark.parametrize(("step", "named"), [(1, False), (20, False), (21, True)])
def test_the_first_steps_are_not_judged(tmp_path, step, named):
    """However short the warm-up is: here it has no step."""
    console = Console(file=io.StringIO())
    module = SimpleNamespace(step=step, warmup_steps=0, cld=None, encoder=SimpleNamespace(num_features=32))
    log = SimpleNamespace(recorded=step, newest={"effective_rank": 1.0})
    CollapseWatch(log, Run(tmp_path), module, console).look(8)
    assert ("the features collapse" in console.file.getvalue()) == named
    assert (tmp_path / "warnings.txt").exists() == named


def test_a_folder_of_one_step_an_epoch_is_not_warned_of(tmp_path, capsys):
    """From the first step to the last, the settings being those that the rules choose."""
    source = "turntable:train,classes=4,objects=12,frames=4,imbalance=1,size=16"
    less = [option for option in TINY if "batch" not in option]
    run(train, [source, f"--run={tmp_path / 'r'}", "--epochs=25", "--batch_size=48", "--monitor_every=4", *less])
    shown = capsys.readouterr().out
    assert "1 step an epoch" in shown
    assert "collapse" not in shown
    assert not (tmp_path / "r" / "warnings.txt").exists()
