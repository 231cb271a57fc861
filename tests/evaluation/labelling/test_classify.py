"""Labels from labelled images: right, sure as often as they are right, and unknown for what is none of them."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from run_samples import write_images
from table_samples import write_encoder

from crosslevel.cli import main
from crosslevel.evaluation.labelling.classify import classify
from crosslevel.settings.parser import run

QUIET = {"device": "cpu", "quiet": True, "workers": 0, "precision": "fp32"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Red cats and blue dogs to learn from, others of them to label, and checkerboards that are neither."""
    folder = tmp_path_factory.mktemp("classify")
    write_images(folder / "labelled", count=40)
    write_images(folder / "asked", count=10, seed=1)
    draws = np.random.default_rng(2)
    for i in range(10):
        board = 255 * (np.indices((16, 16)).sum(0) // 4 % 2)[..., None] + draws.integers(-9, 9, (16, 16, 3))
        (folder / "strange").mkdir(exist_ok=True)
        Image.fromarray(board.clip(0, 255).astype(np.uint8)).save(folder / "strange" / f"{i}.png")
    write_encoder(folder / "run")
    return folder


@pytest.mark.parametrize("how", ["knn", "linear", "auto"])
def test_known_classes_are_labelled_and_strange_ones_unknown(home, how):
    made = classify(str(home / "run"), str(home / "labelled"), str(home / "asked"), how=how, **QUIET)
    right = [label == path.split("/")[0] for path, label in zip(made.paths, made.labels, strict=True)]
    assert np.mean(right) >= 0.95
    assert made.unknown.float().mean() <= 0.25
    assert made.about["how"] in ("knn", "linear")
    assert ((made.probability > 0.5) & (made.probability <= 1)).all()
    strange = classify(str(home / "run"), str(home / "labelled"), str(home / "strange"), how=how, **QUIET)
    assert strange.unknown.all()
    none = classify(str(home / "run"), str(home / "labelled"), str(home / "strange"), how=how, reject=0.0, **QUIET)
    assert not none.unknown.any()


def test_the_table_has_a_row_for_each_image(home, tmp_path, capsys):
    output = tmp_path / "p.parquet"
    line = [str(home / part) for part in ("run", "labelled", "asked")]
    made = run(classify, [*line, "-o", str(output), "--device=cpu", "--workers=0"])
    table = pq.read_table(output)
    assert table.column_names == ["path", "label", "probability", "unknown", "distance"]
    assert table["path"].to_pylist() == made.paths
    assert table["label"].to_pylist() == made.labels
    assert table["unknown"].to_pylist() == made.unknown.tolist()
    said = capsys.readouterr().out
    assert f"20 images: {int(made.unknown.sum())} unknown" in said
    assert "held-out images are right" in said


def test_wrong_use_ends_in_one_line(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one" / "cat").mkdir(parents=True)
    (tmp_path / "two").mkdir()
    for i, name in enumerate(["one/cat/0", "one/cat/1", "two/0", "two/1"]):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(tmp_path / f"{name}.png")
    parts = [str(home / part) for part in ("run", "labelled", "asked")]
    cases = [
        (["nowhere", *parts[1:]], "nowhere"),
        ([parts[0], "two", parts[2]], "has no labels"),
        ([*parts[:2], "nowhere"], "nowhere"),
        ([*parts, "-o", "x.csv"], "must end in .parquet"),
        ([*parts, "--reject=1"], "reject=1"),
        (parts[:2], "IMAGES is missing"),
    ]
    for line, named in cases:
        with pytest.raises(SystemExit) as stop:
            main(["classify", *line, "--device=cpu"])
        said = capsys.readouterr().err
        assert (stop.value.code, said.count("\n")) == (2, 1), said
        assert named in said, (line, said)
