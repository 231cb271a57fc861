"""YOLO's layout: boxes and polygons as shares of the image, classes by number, and what is wrong named in one line."""

import numpy as np
import pytest
import torch
from PIL import Image

from crosslevel.data.open import open_images
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.sources.annotated.open import annotated
from crosslevel.data.uri import parse
from crosslevel.utils.errors import SourceError


@pytest.fixture
def data(tmp_path):
    """Two images of 40 x 20 pixels and one turned by EXIF, in the layout of Ultralytics."""
    rng = np.random.default_rng(0)
    for name in ("images/train/a.png", "images/train/b.png", "images/val/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (20, 40, 3), np.uint8))
        exif = image.getexif()
        if name.endswith("jpg"):
            exif[0x0112] = 6
        image.save(tmp_path / name, exif=exif)
    for name, lines in {
        "labels/train/a.txt": "0 0.5 0.5 0.5 0.4\n1 0.125 0.25 0.25 0.5\n",
        "labels/val/c.txt": "1 0.1 0.2 0.9 0.2 0.5 0.8\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(lines)
    (tmp_path / "data.yaml").write_text("path: .\ntrain: images/train\nval: [images/val]\nnames: {0: cat, 1: dog}\n")
    return tmp_path


def test_boxes_are_shares_of_the_image_and_polygons_have_theirs(data):
    found = annotated(parse(f"{data}/data.yaml:train"))
    assert [file.rsplit("/", 1)[1] for file in found.files] == ["a.png", "b.png"]
    assert (found.classes, found.sizes) == (["cat", "dog"], [(20, 40)] * 2)
    assert torch.equal(found.objects[0].boxes, torch.tensor([[10.0, 6, 30, 14], [0, 0, 10, 10]]))
    assert (found.objects[0].labels.tolist(), len(found.objects[1].labels)) == ([0, 1], 0)
    turned = annotated(parse(f"{data}/data.yaml:val"))
    torch.testing.assert_close(turned.objects[0].boxes, torch.tensor([[2.0, 8, 18, 32]]))
    image, _ = turned[0]
    assert image.shape == (3, 40, 20)


def test_crops_are_the_pixels_of_the_boxes(data):
    crops = open_images(f"{data}/data.yaml:train", crops=Crops(margin=0.0, min_size=1, square=False))
    assert crops.classes == ["cat", "dog"]
    whole = torch.from_numpy(np.array(Image.open(data / "images/train/a.png"))).permute(2, 0, 1)
    places = {label: image for image, label in (crops[i] for i in range(len(crops)))}
    assert torch.equal(places[0], whole[:, 6:14, 10:30])
    assert torch.equal(places[1], whole[:, :10, :10])


def test_a_list_of_files_and_names_in_a_list(data):
    (data / "some.txt").write_text("./images/train/a.png\n")
    (data / "data.yaml").write_text("train: some.txt\nnames: [cat, dog]\n")
    found = annotated(parse(f"{data}/data.yaml:train"))
    assert len(found) == 1
    assert found.objects[0].labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("file", "text", "what"),
    [
        ("labels/train/a.txt", "2 0.5 0.5 0.5 0.5", r"a\.txt, line 1: class 2 of 2: correct it, or names"),
        ("labels/train/a.txt", "0 0.5 0.5 0.5", r"line 1: 3 numbers after the class: a box has 4"),
        ("labels/train/a.txt", "0 0.5 x 0.5 1", r"line 1: not numbers"),
        ("labels/train/a.txt", "0 0.9 0.5 0.5 0.5", r"line 1: box .* lies outside its image of 40x20"),
        ("data.yaml", "train: images/none\nnames: [a]", r"there is no folder or list .*images/none"),
        ("data.yaml", "val: images/val\nnames: [a, b]", r"the name of a split is missing, as .*:train; there are: val"),
        ("data.yaml", "train: images/train", "it has no names of classes"),
        ("data.yaml", "train: images/train\nnames: {1: a}", "names must number the classes from 0 to 0"),
        ("data.yaml", "train: [", "not a YAML file"),
    ],
)
def test_what_is_wrong_is_one_line(data, file, text, what):
    (data / file).write_text(text)
    with pytest.raises(SourceError, match=what) as error:
        annotated(parse(f"{data}/data.yaml:train"))
    assert "\n" not in str(error.value)
