"""What is measured while a run goes on."""

import torch
from run_samples import losses, metrics, watching_encoders, write_images
from train_samples import FAST, same_weights

from crosslevel.data.images import InMemoryImages
from crosslevel.settings.parser import run
from crosslevel.training import monitor
from crosslevel.training.train import train


def test_the_monitor_never_influences_the_run(photos, tmp_path):
    for name, every in (("with", 1), ("without", 0)):
        options = ["--epochs=2", f"--monitor_every={every}", f"--run={tmp_path}/{name}"]
        run(train, [str(photos), *FAST, *options])
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert same_weights(tmp_path / "with", tmp_path / "without")
    assert sum(bool(r["knn"]) for r in metrics(tmp_path / "with")) == 2
    assert not any(r["knn"] for r in metrics(tmp_path / "without"))


def test_each_epochs_line_shows_its_own_figures(photos, tmp_path, capsys):
    run(train, [str(photos), f"--run={tmp_path / 'r'}", "--epochs=3", "--monitor_every=1", *FAST])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    shown = [(line.split()[1], line.split("kNN")[1].split()[0]) for line in lines]
    measured = [
        (f"{float(row['epoch']):.0f}/3", f"{float(row['knn']):.1f}") for row in metrics(tmp_path / "r") if row["knn"]
    ]
    assert shown == measured
    assert len(shown) == 3


def test_the_monitor_looks_at_images_of_the_views_size(photos, tmp_path):
    seen = []

    def note(encoder, images):
        if not encoder.training:
            seen.append((encoder.view.size, images.shape[2:]))

    with watching_encoders(before=note):
        run(train, [str(photos), f"--run={tmp_path / 'r'}", "--epochs=1", *FAST])
    assert set(seen) == {(16, (16, 16))}


def test_unlabelled_images_have_no_knn(tmp_path):
    folder = write_images(tmp_path / "one", classes=("",), count=16)
    run(train, [str(folder), *FAST, "--epochs=1", f"--run={tmp_path}/r"])
    assert not any(r["knn"] for r in metrics(tmp_path / "r"))


def test_an_epochs_line_has_no_older_epochs_knn(photos, tmp_path, capsys):
    run(train, [str(photos), f"--run={tmp_path / 'r'}", "--epochs=4", "--monitor_every=2", *FAST])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert ["kNN" in line for line in lines] == [False, True, False, True]


def test_no_track_is_on_both_sides_of_the_monitor():
    tracks = torch.arange(40).repeat_interleave(7)
    source = InMemoryImages(torch.zeros(280, 3, 1, 1, dtype=torch.uint8), [str(i) for i in range(280)])
    source.tracks = tracks
    queries, others = monitor.queries_and_keys(source, seed=0)
    assert len(queries) == 6 * 7
    assert len(queries) + len(others) == 280
    assert not set(tracks[queries].tolist()) & set(tracks[others].tolist())
