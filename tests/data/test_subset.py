"""``crosslevel subset``, and parts of a source in the other verbs."""

import pytest
import torch
import yaml
from PIL import Image

from crosslevel.cli import main
from crosslevel.data.open import open_images

SMALL = "turntable:train,classes=3,objects=20,frames=4,size=32,imbalance=2"
TINY = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=8", "--device=cpu", "--report_html=false"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with 8 + 8 photos."""
    monkeypatch.chdir(tmp_path)
    for c in "ab":
        for i in range(8):
            (tmp_path / "my photos" / c).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (20 * i, 9, 200)).save(tmp_path / "my photos" / c / f"{i} x.png")
    return tmp_path


def test_a_part_is_written_counted_and_read_back(here, capsys):
    main(["subset", "my photos@imbalance=4,seed=1", "-o", "tail.txt"])
    said = capsys.readouterr().out
    assert "10 images of my photos@imbalance=4,seed=1 in tail.txt" in said
    assert "2 classes: largest a 8, smallest b 2, imbalance 4" in said
    assert "next: crosslevel train 'my photos@list=tail.txt'" in said
    part, again = open_images("my photos@imbalance=4,seed=1"), open_images("my photos@list=tail.txt")
    assert list(part.paths) == list(again.paths)
    assert torch.equal(part.labels, again.labels)
    assert [line.split("\t")[0] for line in (here / "tail.txt").read_text().splitlines()] == list(part.paths)


def test_unlabelled_sources_have_no_counts(here, capsys):
    main(["subset", "my photos/a@repeat=2", "--output=twice.txt"])
    said = capsys.readouterr().out
    assert "16 images" in said
    assert "classes" not in said
    assert "'my photos/a@repeat=2@list=twice.txt'" in said
    assert open_images("my photos/a@repeat=2@list=twice.txt").labels is None


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("my photos@imbalence=4", "did you mean imbalance?"),
        ("list.txt@repeat=2", "--output list.txt is what list.txt@repeat=2 is read from"),
        ("my photos@list=list.txt", "--output list.txt is what"),
    ],
)
def test_what_cannot_be_ends_in_one_line(here, source, says, capsys):
    (here / "list.txt").write_text("my photos/a/1 x.png\nmy photos/b/1 x.png\n")
    with pytest.raises(SystemExit) as stop:
        main(["subset", source, "-o", "list.txt"])
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1)
    assert says in said
    assert (here / "list.txt").read_text().startswith("my photos/a/1 x.png\n")


def test_a_run_on_a_part_keeps_its_list_and_names_it(here, capsys):
    main(["train", f"{SMALL}@imbalance=4@frames=2", *TINY, "--epochs=1", "--order=natural"])
    (run,) = (here / "runs").iterdir()
    assert run.name == "turntable-train-imbalance4-frames2-simclr-cld"
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["images"] == f"{SMALL}@imbalance=4@frames=2"
    assert saved["order"] == "natural"
    part = open_images(f"{SMALL}@imbalance=4@frames=2")
    again = open_images(f"{SMALL}@list={run / 'subset.txt'}")
    assert torch.equal(again.data, part.data)
    assert torch.equal(again.labels, part.labels)
    capsys.readouterr()
    main(["evaluate", str(run), f"{SMALL}@list={run / 'subset.txt'}", "--test", f"{SMALL}@frames=1", "--device=cpu"])
    assert "trained encoder" in capsys.readouterr().out
    main(["embed", str(run), f"{SMALL}@tracks=3", "-o", "features.parquet", "--device=cpu"])
    assert "12 features" in capsys.readouterr().out


def test_paths_of_a_part_are_kept_absolute(here):
    (here / "list.txt").write_text("".join(f"a/{i} x.png 0\n" for i in range(8)))
    main(["train", "my photos@list=list.txt", *TINY, "--epochs=1", "--run=r"])
    assert yaml.safe_load((here / "r" / "config.yaml").read_text())["images"] == (
        f"{here / 'my photos'}@list={here / 'list.txt'}"
    )
    assert (here / "r" / "subset.txt").read_text() == "".join(f"a/{i} x.png\t0\n" for i in range(8))


def test_a_whole_source_leaves_no_list(here):
    main(["train", "my photos", *TINY, "--epochs=1", "--run=r"])
    assert not (here / "r" / "subset.txt").exists()


def test_a_run_that_goes_on_with_other_images_says_so(here, capsys):
    main(["train", "my photos@imbalance=2", *TINY, "--epochs=1", "--run=r"])
    capsys.readouterr()
    main(["train", "--resume", "r", "--epochs=2"])
    assert "has changed" not in capsys.readouterr().out
    (here / "my photos" / "a" / "new.png").write_bytes((here / "my photos" / "a" / "1 x.png").read_bytes())
    main(["train", "--resume", "r", "--epochs=3"])
    said = capsys.readouterr().out
    assert "has changed since the run began (" in said
    assert " images then, " in said
