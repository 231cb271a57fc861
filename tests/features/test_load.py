"""`crosslevel.load`: any form of an image has the features that `crosslevel embed` gives its file."""

import numpy as np
import pytest
import torch
from PIL import Image
from run_samples import write_images

import crosslevel
from crosslevel.models.encoder import Encoder
from crosslevel.utils.errors import BadImage, UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    encoder = Encoder("resnet18", small_images=True, width=0.0625)
    encoder.view = encoder.view._replace(size=24, mean=(0.4, 0.5, 0.6))
    encoder.save(folder / "encoder.safetensors")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("photos"), count=5, size=(40, 30), classes=("",))


@pytest.fixture(scope="module")
def model(run):
    return crosslevel.load(run, device="cpu", precision="fp32")


def test_every_form_has_the_features_of_the_table(run, photos, model):
    table = crosslevel.embed(run, photos, device="cpu", precision="fp32", quiet=True)
    assert table.features.shape == (5, model.num_features)
    assert (table.labels, table.features.dtype) == (None, np.float32)
    files = [photos / path for path in table.paths]
    images = [Image.open(file) for file in files]
    arrays = [np.array(image) for image in images]
    forms = {
        "paths": files,
        "texts": list(map(str, files)),
        "pillow": images,
        "arrays": arrays,
        "one array": np.stack(arrays),
        "floats": [array / 255 for array in arrays],
        "tensors": [torch.from_numpy(array).permute(2, 0, 1) for array in arrays],
        "one tensor": torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255,
        "a generator": (image for image in images),
    }
    for name, form in forms.items():
        np.testing.assert_allclose(model.transform(form), table.features, rtol=1e-5, atol=1e-6, err_msg=name)
    for one in (files[2], images[2], arrays[2], forms["tensors"][2]):
        np.testing.assert_allclose(model(one), table.features[2:3], rtol=1e-5, atol=1e-6)


def test_colours_are_made_of_what_has_none(model):
    gray = np.random.default_rng(0).integers(0, 256, (30, 30), np.uint8)
    np.testing.assert_array_equal(model(gray), model(np.stack([gray] * 3, -1)))
    np.testing.assert_array_equal(model(Image.fromarray(gray)), model(gray))
    clear = Image.new("RGBA", (30, 30), (9, 9, 9, 0))
    np.testing.assert_array_equal(model(clear), model(Image.new("RGB", (30, 30), "white")))


@pytest.mark.parametrize(
    ("images", "what"),
    [
        ([], "there are no images"),
        ([3], "image 0 is a int: give a path"),
        (5, "this is no image, but of type int: give a path"),
        (b"pixels", "this is no image, but of type bytes: give a path"),
        (np.zeros((4, 5, 6, 7)), r"has the shape \(5, 6, 7\)"),
        (torch.zeros(8, 8, 3), r"has the shape \(8, 8, 3\): give an array \(H, W, 3\)"),
        (
            torch.full((3, 8, 8), 255.0),
            r"image 0 has float32 values from 255 to 255: give bytes, or floats in \[0, 1\]",
        ),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "image 0 has int64 values"),
    ],
)
def test_what_is_no_image_is_named(model, images, what):
    with pytest.raises(UserError, match=what):
        model.transform(images)


def test_a_folder_is_not_one_image(model, photos):
    for images in (photos, [str(photos)]):
        with pytest.raises(UserError, match=r"photos\d* is a folder: list its images"):
            model.transform(images)


def test_a_file_that_cannot_be_read_is_named(model, photos, tmp_path):
    (tmp_path / "no.jpg").write_bytes(b"no picture")
    with pytest.raises(BadImage, match=r"no\.jpg: not an image"):
        model.transform(
            [photos / "0.png", tmp_path / "no.jpg"] if (photos / "0.png").exists() else [tmp_path / "no.jpg"]
        )
    with pytest.raises(BadImage, match=r"absent\.png: cannot be opened"):
        model.transform(tmp_path / "absent.png")
