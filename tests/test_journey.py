"""From a collection to one that is searched, looked at, cleaned and labelled, as the six commands of docs/use.md."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image
from table_samples import write_encoder

from crosslevel.cli import main
from crosslevel.data.open import open_images
from crosslevel.features.table import open_table

TURNTABLE = "classes=3,objects=12,imbalance=1,size=16,test_objects=4"
ON_CPU = ("--device=cpu", "--workers=0")
TINY = (
    "--encoder.width=0.0625", "--batch_size=12", "--epochs=2", "--views.size=16", "--cld.groups=4",
    "--report_html=false", "--monitor_every=0",
)  # fmt: skip


def photographs(folder, count, seed):
    """Pieces of two photographs, each in a folder of its name."""
    draws = np.random.default_rng(seed)
    for name in ("china", "flower"):
        photo = load_sample_image(f"{name}.jpg")
        (folder / name).mkdir(parents=True)
        for i in range(count):
            top, left = draws.integers(0, photo.shape[0] - 64), draws.integers(0, photo.shape[1] - 96)
            Image.fromarray(photo[top : top + 64, left : left + 96]).save(folder / name / f"{i:02}.jpg", quality=95)
    return folder


@pytest.fixture(params=["turntable", "photographs"])
def sources(request, tmp_path, monkeypatch):
    """A run's folder, images to learn from, others, and a query of the first; the run of photographs is ready."""
    monkeypatch.chdir(tmp_path)
    if request.param == "turntable":
        images = f"turntable,frames=4,{TURNTABLE}"
        main(["train", images, "--run", "run", *TINY, *ON_CPU])
        return "run", images, f"turntable:test,frames=4,{TURNTABLE}", open_images(images).paths[5]
    write_encoder(tmp_path / "run")
    photographs(tmp_path / "photos", 20, seed=0)
    photographs(tmp_path / "new", 8, seed=1)
    return "run", "photos", "new", "photos/china/05.jpg"


def test_six_commands_lead_from_images_to_their_use(sources, tmp_path):
    run, images, others, query = sources
    opened = open_images(images)
    main(["embed", run, images, "-o", "features.parquet", "--thumbnails", "32", *ON_CPU])
    table = open_table("features.parquet")
    assert table.paths == list(opened.paths)
    assert {"feature", "image"} <= set(table.names)

    main(["search", "features.parquet", query, "-k", "5", "-o", "found", *ON_CPU])
    (result,) = json.loads((tmp_path / "found" / "search.json").read_text())["results"]
    paths = [match["path"] for match in result["matches"]]
    assert len(set(paths) & set(opened.paths)) == 5
    assert not any(query.endswith(path) for path in paths)
    page = (tmp_path / "found" / "search.html").read_text()
    assert page.count("data:image/png") == 6
    assert all(path in page for path in paths)

    main(["explore", "features.parquet", "--export", "page", "--device=cpu"])
    written = {file.relative_to(tmp_path / "page").as_posix() for file in (tmp_path / "page").rglob("*")}
    assert {"index.html", "explore.js", "explore.css", "data.js"} <= written

    main(["curate", "features.parquet", "-n", "6", "--outliers=keep", "-o", "few.txt", "--device=cpu"])
    part = open_images(f"{images}@list=few.txt")
    assert len(part) == len(set(part.paths) & set(opened.paths)) == 6
    assert {(tmp_path / f"few.{kind}").is_file() for kind in ("csv", "html")} == {True}

    main(["classify", run, images, others, "-o", "predictions.parquet", *ON_CPU])
    predictions = pq.read_table("predictions.parquet").to_pydict()
    assert predictions["path"] == list(open_images(others).paths)
    assert set(predictions["label"]) <= set(opened.classes)
    assert all(0 < probability <= 1 for probability in predictions["probability"])
    if images == "photos":  # of the turntable, two epochs tell nothing
        right = [name in path for name, path in zip(predictions["label"], predictions["path"], strict=True)]
        assert np.mean(right) > 0.8
