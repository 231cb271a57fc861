"""The column of losses: by its formula, of the views that the run drew, and the same however the work is split."""

import csv
import json
import re
import shutil
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from reference import unit

import crosslevel
from crosslevel.cli import main
from crosslevel.data.open import open_images
from crosslevel.exploration.explore import gather
from crosslevel.features.columns.loss import Encoded, ImageLosses, Objective, losses_of
from crosslevel.runs import Run
from crosslevel.settings.parser import run
from crosslevel.transforms.philox import Counted
from crosslevel.transforms.views import Views
from crosslevel.utils.console import printer
from crosslevel.utils.device import choose
from crosslevel.utils.rng import generator

COPIES, UNIQUE = 4, 24
GENTLE = {"brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "hue": 0.0}
OPTIONS = ["--device=cpu", "--precision=fp32", "--workers=0"]


def pattern(seed):
    """A picture of its own: blocks of colours."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3))
    return np.kron(blocks, np.ones((5, 5, 1))).astype(np.uint8)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """24 pictures that differ, 3 with 4 copies each, and a run that was trained on them for a moment."""
    folder = tmp_path_factory.mktemp("loss")
    (folder / "photos").mkdir()
    for i in range(UNIQUE):
        Image.fromarray(pattern(i)).save(folder / "photos" / f"{i:02}-unique.png")
    for i in range(3):
        for copy in range(COPIES):
            Image.fromarray(pattern(100 + i)).save(folder / "photos" / f"{i:02}-copy-{copy}.png")
    crosslevel.train(
        str(folder / "photos"), run=str(folder / "run"), epochs=40, batch_size=12, quiet=True, report_html=False,
        device="cpu", precision="fp32", workers=0, cld=None, lr=0.3,
        encoder={"width": 0.0625, "small_images": True},
        views={"size": 16, "scale": (0.8, 1.0), "flip": 0.0, "grayscale": 0.0, "jitter": 1.0, **GENTLE},
        method={"class_path": "SimCLR", "init_args": {"temperature": 0.25, "out_features": 8}},
    )  # fmt: skip
    return folder


def embedded(home, output, *options, rows=8, trained="run"):
    made = [str(home / trained), str(home / "photos"), "-o", str(output), "--loss=true", *OPTIONS, *options]
    return pq.read_table(run(crosslevel.embed, made, rows=rows))


@pytest.fixture(scope="module")
def table(home):
    return embedded(home, home / "f.parquet")


def equation(a, b, others, temperature):
    """Eq. 1 of Chen et al. in float64, of one image's two views among the views ``others``, both ways."""
    a, b, others = (np.asarray(x, np.float64) for x in (a, b, others))
    values = []
    for x, y in ((a, b), (b, a)):
        exponents = np.exp(np.array([x @ y, *(x @ z for z in others)]) / temperature)
        values.append(-np.log(exponents[0] / exponents.sum()))
    return np.mean(values)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_loss_is_the_equation(temperature):
    """Of images that are among the others, 1 and 3, and of one that is not: each is compared with three others."""
    draws = np.random.default_rng(0)
    others, own = (unit(draws.standard_normal((2, 2, n, 5))) for n in (4, 3))
    others[:, :, 1], others[:, :, 3] = own[:, :, 0], own[:, :, 2]
    left_out = {11: 1, 99: 3, 13: 3}
    expected = [
        np.mean([
            equation(*own[d, :, row], np.delete(others[d], left, axis=1).reshape(-1, 5), temperature) for d in range(2)
        ])
        for row, left in enumerate(left_out.values())
    ]  # fmt: skip
    images = Encoded(torch.tensor(list(left_out)), torch.tensor(own, dtype=torch.float32))
    batch = Encoded(torch.tensor([10, 11, 12, 13]), torch.tensor(others, dtype=torch.float32))
    np.testing.assert_allclose(losses_of(images, batch, temperature), expected, rtol=1e-5)


def test_the_column_is_of_the_runs_views_head_and_temperature(home, table):
    """Each image alone, by the run's own parts: crops of the loader, colours of the step, encoder and head."""
    trained, source = Run(home / "run"), open_images(str(home / "photos"))
    encoder, head, settings = trained.load_encoder(), trained.load_branches()["instance branch"], trained.settings()
    views = Views(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings["views"].items()})
    z = np.zeros((len(source), 4, 2, 8))
    for i, draw in np.ndindex(len(source), 4):
        crops = views.crops(source[i][0], generator(settings["seed"], draw, i)).unsqueeze(0)
        for v, view in enumerate(views(crops, Counted(settings["seed"], draw, torch.tensor([i])))):
            with torch.no_grad():
                z[i, draw, v] = head(encoder(view))[0].numpy()
    z = unit(z)
    expected = [
        np.mean([equation(*z[i, d], np.delete(z[:, d], i, axis=0).reshape(-1, 8), 0.25) for d in range(4)])
        for i in range(len(source))
    ]
    assert table["path"].to_pylist() == list(source.paths)
    np.testing.assert_allclose(table["loss"].to_numpy(), expected, rtol=1e-4)
    said = json.loads(table.schema.metadata[b"crosslevel"])["loss"]
    assert said == {
        "of": "the instance branch's features", "temperature": 0.25, "seed": 0, "draws": 4, "batch": 256,
    }  # fmt: skip


def test_images_with_copies_have_the_higher_losses(table):
    losses, paths = table["loss"].to_numpy(), table["path"].to_pylist()
    is_copy = np.array(["copy" in path for path in paths])
    assert losses[is_copy].min() > losses[~is_copy].max()


def test_the_losses_are_the_same_however_the_work_is_split(home, table, tmp_path):
    for number, (rows, options) in enumerate([(64, ["--batch_size=5"]), (3, ["--workers=1"]), (8, OPTIONS)]):
        other = embedded(home, tmp_path / f"{number}.parquet", *options, rows=rows)
        np.testing.assert_allclose(other["loss"].to_numpy(), table["loss"].to_numpy(), rtol=1e-5, atol=1e-6)
    assert other.equals(table)


def test_all_are_compared_in_the_same_batch_where_there_are_more_images_than_it_has(home):
    """Whichever images are asked for, and in which order."""
    source, objective = open_images(str(home / "photos")), Objective.of(str(home / "run"))
    make = partial(ImageLosses, Run(home / "run").load_encoder(), source, objective, choose("cpu", "fp32"), 1, batch=6)
    whole = make()(range(len(source))).to_numpy()
    order = [35, 3, 17, 0]
    np.testing.assert_allclose(make()(order).to_numpy(), whole[order], rtol=1e-5)
    assert make(draws=1)(order).to_pylist() != make(draws=2)(order).to_pylist()


def test_without_heads_and_temperature_shared_features_are_compared_at_the_usual_one(home, table):
    shutil.copytree(home / "run", home / "bare")
    (home / "bare" / "instance.safetensors").unlink()
    config = home / "bare" / "config.yaml"
    config.write_text(config.read_text().replace("    temperature: 0.25\n", ""))
    objective = Objective.of(str(home / "bare"))
    assert (objective.head, objective.temperature) == (None, 0.2)
    bare = embedded(home, home / "bare.parquet", trained="bare")
    assert json.loads(bare.schema.metadata[b"crosslevel"])["loss"]["of"] == "shared features"
    assert not np.allclose(bare["loss"].to_numpy(), table["loss"].to_numpy(), rtol=1e-2)


def test_without_others_that_can_be_read_there_is_no_loss(home, tmp_path):
    for i in range(2):
        Image.fromarray(pattern(i)).save(tmp_path / f"{i}.png")
    source = open_images(str(tmp_path))
    (tmp_path / "1.png").unlink()
    trained = Run(home / "run").load_encoder()
    made = ImageLosses(trained, source, Objective.of(str(home / "run")), choose("cpu", "fp32"))
    assert made([0, 1]).to_pylist() == [None, None]


def test_an_image_that_cannot_be_read_has_no_row_and_is_compared_with_none(home, table, tmp_path):
    shutil.copytree(home / "photos", tmp_path / "photos")
    shutil.copytree(home / "run", tmp_path / "run")
    (tmp_path / "photos" / "zz.png").write_bytes(b"no image")
    losses = embedded(tmp_path, tmp_path / "f.parquet")["loss"].to_numpy()
    assert len(losses) == len(table)
    np.testing.assert_allclose(losses, table["loss"].to_numpy(), rtol=1e-5, atol=1e-6)


def test_explore_colours_and_filters_by_it_and_a_manifest_has_it(home, table):
    column = gather(str(home / "f.parquet"), None, 100, 0, printer(quiet=True)).columns["loss"]
    assert not column.names
    np.testing.assert_array_equal(column.values, table["loss"].to_numpy())
    run(crosslevel.embed, [str(home / "run"), str(home / "photos"), f"-o={home}/f.npy", "--loss=true", *OPTIONS])
    with (home / "f.csv").open() as file:
        values = [float(row["loss"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(values, table["loss"].to_numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": "timm:test_vit.r160_in1k"}, "timm:test_vit.r160_in1k was not trained here, and has no views"),
        ({"run": "lost"}, "has no config.yaml that says how views were drawn"),
        ({"run": "odd"}, "odd/config.yaml does not say how views were drawn"),
        ({"-o": "folder"}, "losses need a table in one file, made on this machine"),
    ],
)
def test_what_has_no_loss_is_refused_in_one_line(home, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(home)
    (home / "lost").mkdir(exist_ok=True)
    shutil.copy(home / "run" / "encoder.safetensors", home / "lost")
    shutil.copytree(home / "run", home / "odd", dirs_exist_ok=True)
    config = home / "odd" / "config.yaml"
    config.write_text(re.sub(r"  preset: .*", "  preset: none-such", config.read_text()))
    line = {"run": "run", "-o": "x.parquet"} | changes
    with pytest.raises(SystemExit) as ended:
        main(["embed", line["run"], "photos", "-o", line["-o"], "--loss", "true"])
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (2, 1), error
    assert message in error
