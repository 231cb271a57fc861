"""Pictures of a report: enlarged without blur, and on the map the image of each point."""

import io
import json
from base64 import b64decode

import numpy as np
import pytest
import torch
from page_samples import clusters, random_images
from PIL import Image

from crosslevel import report
from crosslevel.report import pictures


def decoded(uri):
    return np.array(Image.open(io.BytesIO(b64decode(uri.split(",")[1]))))


@pytest.mark.parametrize(
    ("size", "shown", "tolerance"),
    [(8, 64, 0), (28, 56, 0), (32, 64, 0), (40, 40, 0), (64, 64, 0), (128, 64, 1), (256, 64, 1)],
)
def test_pictures_are_the_images_enlarged_by_whole_factors(size, shown, tolerance):
    image = random_images(1, size)[0]
    picture = report.image_rows("i", [report.ImageRow("c", [image])]).content["rows"][0]["pictures"][0]
    assert (picture["width"], picture["height"], picture["pixelated"]) == (shown, shown, size < 64)
    want = Image.fromarray(image.permute(1, 2, 0).numpy())
    got = decoded(picture["src"]).astype(int)
    assert np.abs(got - np.array(want.resize(got.shape[:2], Image.Resampling.BOX))).max() <= tolerance


def test_a_picture_of_one_channel_is_gray():
    gray = random_images(1)[0][:1]
    shown = [
        report.image_rows("i", [report.ImageRow("c", [image])]).content["rows"][0]["pictures"][0]["src"]
        for image in (gray, gray.expand(3, -1, -1))
    ]
    assert shown[0] == shown[1]


@pytest.mark.parametrize("bad", [torch.zeros(3, 8, 8), torch.zeros(8, 8, dtype=torch.uint8)])
def test_pictures_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match=r"need torch\.uint8"):
        report.image_rows("i", [report.ImageRow("c", [bad])])
    with pytest.raises(ValueError, match="1 images, 2 marks"):
        report.image_rows("i", [report.ImageRow("c", [random_images(1)[0]], ["a", "b"])])


def test_map_hover_and_atlas_belong_to_the_points():
    images, (features, labels) = random_images(1, 32).repeat(10, 1, 1, 1), clusters(10)
    images = images // 255 + torch.arange(10, dtype=torch.uint8)[:, None, None, None] * 20
    block = report.map2d("m", features[:, :2], images, labels, list("abcd"))
    hover, atlas = json.loads(block.content["hover"]), decoded(block.content["atlas"])
    assert hover["kind"] == labels.tolist()
    for i in range(10):
        top, left = i // hover["columns"] * 32, i % hover["columns"] * 32
        assert abs(atlas[top : top + 32, left : left + 32].mean() - images[i].float().mean()) < 2
    got, want = torch.tensor(hover["points"]).double(), features[:, :2].double()
    scale = (want[:, 0].max() - want[:, 0].min()) / (got[:, 0].max() - got[:, 0].min())
    assert torch.allclose((got - got[0]) * scale, want - want[0], atol=2 * float(scale))
    entries = [(entry["name"], entry["value"]) for entry in block.content["legend"]]
    assert entries == [("a", "3"), ("b", "3"), ("c", "2"), ("d", "2")]


def test_map_pictures_do_not_overlap():
    g = torch.Generator().manual_seed(0)
    place, tiles = torch.rand(300, 2, generator=g) * 0.9 + 0.05, random_images(300, 32)
    montage = pictures.montage(place, tiles)
    whole = 0
    for (x, y), tile in zip((place * 640 - 16).round().long().tolist(), tiles, strict=True):
        whole += torch.equal(montage[:3, y : y + 32, x : x + 32], tile)
    assert whole > 60
    assert int((montage[3] == 255).sum()) == whole * 32 * 32


def test_map_takes_few_points_many_points_and_many_classes():
    for n in (0, 1, 3):
        report.map2d("m", torch.ones(n, 2), random_images(n) if n else None)
    block = report.map2d("m", torch.rand(6000, 2), note="Note.")
    assert block.content["note"] == "Note. Drawn: 2,000 of 6,000 images."
    labels = torch.arange(60) - 1
    legend = report.map2d("m", torch.rand(60, 2), labels=labels).content["legend"]
    assert [e["name"] for e in legend] == ["unknown", *(f"label {c}" for c in range(48)), "further classes"]
    assert legend[-1]["value"] == "11"
    assert len({(e["symbol"], e["colour"]) for e in legend[1:]}) == 49
    with pytest.raises(ValueError, match="3 points, 2 labels"):
        report.map2d("m", torch.ones(3, 2), labels=torch.zeros(2, dtype=torch.int64))
