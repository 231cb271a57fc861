"""Packing images at one size, and the fitting it is made of."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from picture_samples import Numbered, is_bad
from PIL import Image

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import InMemoryImages
from crosslevel.data.loaders.batches import TrainBatches, fit, pack
from crosslevel.data.sources.folder import Files
from crosslevel.utils.errors import SourceError


@given(st.integers(4, 40), st.integers(4, 40), st.integers(4, 24), st.integers(0, 99))
def test_fit_equals_pillow(height, width, size, seed):
    smooth = torch.randint(0, 256, (3, 6, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    picture = Image.fromarray(smooth.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BICUBIC)
    got = fit(torch.from_numpy(np.array(picture)).permute(2, 0, 1), size)
    short = min(height, width)
    picture = picture.resize((size * width // short, size * height // short), Image.Resampling.BILINEAR)
    left, top = round((picture.width - size) / 2), round((picture.height - size) / 2)
    want = np.asarray(picture.crop((left, top, left + size, top + size))).astype(int)
    assert got.shape == (3, size, size)
    assert np.abs(got.permute(1, 2, 0).numpy() - want).max() <= 1


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_pack_equals_reading_one_by_one(photos, workers):
    bad_files, seen = BadFiles(), []
    packed = pack(
        photos, 24, bad_files=bad_files, workers=workers, progress=lambda done, total: seen.append((done, total))
    )
    good = [i for i in range(12) if not is_bad(photos, i)]
    assert packed.data.shape == (10, 3, 24, 24)
    for row, i in enumerate(good):
        assert torch.equal(packed.data[row], fit(photos[i][0], 24))
        assert packed.paths[row] == photos.paths[i]
        assert packed.labels[row] == photos.labels[i]
    assert packed.classes == ["a", "b"]
    assert packed.name == photos.name
    assert set(bad_files.reasons) == {photos.paths[i] for i in range(12) if is_bad(photos, i)}
    assert seen[-1] == (12, 12)
    assert all(0 < done <= total for done, total in seen)


@pytest.mark.parametrize("readable", [0, 1])
def test_pack_needs_two_images(readable):
    images = Numbered(6, bad=range(6 - readable))
    with pytest.raises(SourceError, match=rf"only {readable} of 6 can be read \(the first: n/0: broken on purpose\)"):
        pack(images, 4, bad_files=BadFiles(), workers=0)


def test_images_of_the_right_size_stay_as_they_are(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
    for i in range(3):
        Image.fromarray(pixels[i]).save(tmp_path / f"{i}.png")
    packed = pack(Files.from_folder(str(tmp_path)), 16, bad_files=BadFiles())
    np.testing.assert_array_equal(packed.data.permute(0, 2, 3, 1).numpy(), pixels)
    assert packed.labels is None
    assert pack(packed, 16, bad_files=BadFiles()) is packed
    smaller = pack(packed, 8, bad_files=BadFiles())
    assert torch.equal(smaller.data, torch.stack([fit(image, 8) for image in packed.data]))


def test_batches_of_images_elsewhere_are_cut_out_there():
    """A meta device stands for a GPU: only the numbers of a batch travel."""
    data = torch.arange(6 * 3 * 16, dtype=torch.uint8).view(6, 3, 4, 4)
    images = InMemoryImages(data, list("abcdef"), torch.arange(6) % 2, ["x", "y"], "six")
    images.tracks, images.blocks = torch.arange(6) // 2, [range(3), range(3, 6)]
    batches = TrainBatches(images, 2, seed=0, bad_files=BadFiles())
    here = list(batches)
    batches.images = images.on(torch.device("meta"))
    assert batches.images.data.device.type == "meta"
    for before, after in zip(here, batches, strict=True):
        assert (after.images.device.type, after.images.shape) == ("meta", before.images.shape)
        assert torch.equal(after.index, before.index)
        assert torch.equal(after.labels, before.labels)
    same = images.on(torch.device("cpu"))
    assert torch.equal(same.batch(torch.tensor([4, 1])), data[[4, 1]])
    assert (same.paths, same.classes, same.name, same.blocks) == (images.paths, images.classes, "six", images.blocks)
    assert torch.equal(same.tracks, images.tracks)
