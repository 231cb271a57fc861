"""One trial: what is held out and scored, and that no label is read."""

import csv
import json

import pytest
import torch
from forked import forked_training
from tune_samples import IMAGES, Told, annotated, base, photos

from crosslevel.data.images import ImageView, InMemoryImages
from crosslevel.data.open import open_images
from crosslevel.data.sources.turntable.dataset import Turntable
from crosslevel.data.subsets.select import take, unlabelled
from crosslevel.tuning import trial

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["named", "files"])
def test_no_label_is_read(tmp_path, guarded, kind):
    """A source whose labels cannot be read without an error, through a whole trial, its scores included."""
    source = IMAGES if kind == "named" else str(photos(tmp_path / "photos"))
    with pytest.raises(AssertionError, match="labels were read"):
        _ = open_images(source).labels
    told = Told()
    trial.trained(source, base(tmp_path), tmp_path / "run", [], told)
    scores = [json.loads(line) for line in told.out.getvalue().splitlines()]
    assert len(scores) == 2
    assert all(0 <= one["combined"] <= 1 for one in scores)
    assert not any(row["knn"] for row in csv.DictReader((tmp_path / "run" / "metrics.csv").open()))


def test_unlabelled_images_are_the_same_images():
    source = Turntable(classes=2, objects=4, frames=3, size=16, imbalance=1)
    bare = unlabelled(source)
    assert (bare.labels, bare.classes) == (None, None)
    assert source.labels is not None
    assert torch.equal(bare.tracks, source.tracks)
    assert torch.equal(bare[5][0], source[5][0])
    assert bare[5][1] == -1
    assert unlabelled(ImageView(source, torch.tensor([3])))[0][1] == -1


def test_what_is_held_out_is_whole_tracks_and_not_trained_on():
    source = open_images(IMAGES)
    held = trial.HeldOut(0, Told())
    rest = held.part(source)
    assert len(rest) + len(held.held_out_images) == len(source) == 80
    assert not set(rest.tracks.tolist()) & set(held.held_out_images.tracks.tolist())
    assert 16 <= len(held.held_out_images) < 20
    assert rest.labels is None
    other = trial.HeldOut(0, Told())
    other.part(source)
    assert other.held_out_images.paths == held.held_out_images.paths
    with pytest.raises(ValueError, match="12 images are too few to tune on: at least 64"):
        held.part(take(source, torch.arange(12)))


@pytest.mark.parametrize(("films", "frames", "held"), [(1, 100, 16), (3, 300, 90), (20, 300, 600), (4, 20_001, 2000)])
def test_of_films_stretches_are_held_out_that_can_be_told_apart(films, frames, held):
    count = films * frames
    source = InMemoryImages(
        torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(count, 3, 1, 1), [str(i) for i in range(count)]
    )
    source.tracks = torch.arange(count) // frames
    rest, out = trial.divided(source, 0)
    assert len(rest) + len(out) == count
    longest = held // 4
    assert held - longest < len(out) < held + longest
    assert len(out) <= 2000
    numbers = torch.tensor([int(path) for path in out.paths])
    for track in out.tracks.unique():
        own = numbers[out.tracks == track]
        assert len(own) <= longest
        assert torch.equal(own, torch.arange(int(own[0]), int(own[0]) + len(own)))
        assert len((own // frames).unique()) == 1
    assert len(out.tracks.unique()) >= 4


@pytest.mark.parametrize(("tracks", "frames"), [(38, 26), (33, 30), (25, 8), (270, 20)])
def test_tracks_are_not_cut_where_enough_of_them_are_held_out_whole(tracks, frames):
    count = tracks * frames
    source = InMemoryImages(
        torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(count, 3, 1, 1), [str(i) for i in range(count)]
    )
    source.tracks = torch.arange(count) // frames
    rest, out = trial.divided(source, 0)
    owners = [{int(path) // frames for path in part.paths} for part in (rest, out)]
    assert not owners[0] & owners[1]
    assert len(out.tracks.unique()) == len(owners[1]) >= 3


def test_scores_do_not_depend_on_a_trials_own_views(tmp_path):
    """A trial with weaker views would have found its task easier: seen through one network, all scores are equal.

    It learns nothing, and has no batch normalization that would remember its views.
    """
    same = ["--encoder.name=vit_tiny_patch16_224", "--encoder.image_size=16", "--encoder.width=1", "--lr=1e-30"]
    seen = []
    for preset in ("none", "simclr"):
        told = Told()
        options = [f"--views.preset={preset}", "--cld.weight=0", "--epochs=1", *same]
        trial.trained(IMAGES, base(tmp_path), tmp_path / preset, options, told)
        seen.append(json.loads(told.out.getvalue()))
        del seen[-1]["instance_rank"]  # of the trial's own heads
    assert seen[0] == seen[1]
    assert seen[0]["alignment"] > 0


def test_a_training_that_cannot_start_says_why(tmp_path):
    steps = forked_training(IMAGES, base(tmp_path), ["--cld.groups=99"], tmp_path / "run", 1)
    with pytest.raises(trial.Failed, match=r"^cld.groups=99 exceeds the batch of 8 images") as error:
        list(steps)
    assert error.value.kind == "refused"


def test_objects_of_annotated_images_are_searched_without_their_classes(tmp_path, guarded):
    """With --crops it is objects that are held out and scored; their classes are not read."""
    source = annotated(tmp_path / "coco")
    crops = {"margin": 0.1, "min_size": 4, "square": True}
    told = Told()
    trial.trained(str(source), base(tmp_path, crops=crops), tmp_path / "run", ["--epochs=1"], told)
    assert 0 <= json.loads(told.out.getvalue())["combined"] <= 1


def test_a_full_disk_is_no_fault_of_the_settings(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("crosslevel train: [Errno 28] No space left on device: '/x'\n")
    assert trial.failure_of(2, log).kind == "failed"
    log.write_text("crosslevel train: cld.groups=99 exceeds the batch of 8 images\n")
    assert trial.failure_of(2, log).kind == "refused"


def test_a_trial_whose_images_are_read_by_workers_comes_to_its_end(tmp_path):
    """They are forked while a thread waits for the search's answer."""
    steps = forked_training(
        str(photos(tmp_path / "photos")), base(tmp_path, workers=2, memory=0.0), ["--epochs=2"], tmp_path / "run", 1
    )
    assert len(list(steps)) == 2
