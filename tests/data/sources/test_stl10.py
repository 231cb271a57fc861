"""STL-10 files that the tests write themselves, column by column as the official ones are."""

import json

import numpy as np
import pytest
import torch

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.loaders.batches import EvalBatches, TrainBatches
from crosslevel.data.open import open_images
from crosslevel.data.sources import stl10
from crosslevel.data.sources.stl10 import Stl10
from crosslevel.evaluation.session import labelled_pair
from crosslevel.settings.parser import run
from crosslevel.training.train import train
from crosslevel.utils.errors import SourceError

COUNTS = {"train": 5, "test": 4, "unlabeled": 7}
NAMES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A small set, the folder above it, and the images as (N, 96, 96, 3) rows."""
    monkeypatch.setattr(stl10, "COUNTS", COUNTS)
    folder, wrote, draws = tmp_path / "stl10_binary", {}, np.random.default_rng(0)
    folder.mkdir()
    (folder / "class_names.txt").write_text("\n".join(NAMES) + "\n")
    for split, count in COUNTS.items():
        wrote[split] = draws.integers(0, 256, (count, 96, 96, 3), np.uint8)
        # The official description: channel by channel, each in column-major order.
        with open(folder / f"{split}_X.bin", "wb") as file:
            for image in wrote[split]:
                for channel in range(3):
                    file.write(image[:, :, channel].tobytes(order="F"))
    for split in ("train", "test"):
        wrote[f"{split}_y"] = draws.integers(1, 11, COUNTS[split]).astype(np.uint8)
        (folder / f"{split}_y.bin").write_bytes(wrote[f"{split}_y"].tobytes())
    return tmp_path, wrote


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_labelled_splits(written, split):
    root, wrote = written
    for place in (root, root / "stl10_binary"):
        got = open_images(f"stl10:{split}", data_root=str(place))
        assert np.array_equal(got.data.permute(0, 2, 3, 1).numpy(), wrote[split])
        assert got.labels.tolist() == (wrote[f"{split}_y"].astype(int) - 1).tolist()
        assert got.classes == NAMES
        assert got.paths[0] == f"{split}/000000"
    assert open_images("stl10", data_root=str(root)).name == "stl10"


def test_unlabelled_images_have_no_labels_and_are_not_evaluated_on(written):
    root, wrote = written
    for split, want in (
        ("unlabeled", wrote["unlabeled"]),
        ("train+unlabeled", np.concatenate([wrote["train"], wrote["unlabeled"]])),
    ):
        got = Stl10(split, data_root=str(root))
        assert np.array_equal(got.data.permute(0, 2, 3, 1).numpy(), want)
        assert got.labels is None
        assert got.classes is None
        assert got[0][1] == -1
        with pytest.raises(SourceError, match="has no labels"):
            labelled_pair(f"stl10:{split}", "stl10:test", str(root))


def test_mapped_images_come_in_batches(written):
    root, wrote = written
    mapped = Stl10("unlabeled", data_root=str(root))
    batches = TrainBatches(mapped, 3, seed=0, bad_files=BadFiles())
    for batch in batches:
        assert batch.images.is_contiguous()
        assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), wrote["unlabeled"][batch.index.numpy()])
    (whole,) = EvalBatches(mapped, 10, 96, bad_files=BadFiles())
    assert torch.equal(whole.images, mapped.data)


def test_the_file_is_left_as_it_is(written):
    """The mapping is private: what is written into the tensor stays in memory."""
    root, wrote = written
    Stl10("unlabeled", data_root=str(root)).data.zero_()
    again = Stl10("unlabeled", data_root=str(root))
    assert np.array_equal(again.data.permute(0, 2, 3, 1).numpy(), wrote["unlabeled"])


def test_the_official_sizes():
    assert stl10.COUNTS["train"] * stl10.BYTES == 138_240_000
    assert stl10.COUNTS["unlabeled"] * stl10.BYTES == 2_764_800_000


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("train_X.bin", b"short", "5 bytes, not 138,240"),
        ("train_X.bin", None, "No such file"),
        ("train_y.bin", b"\x01" * 6, "6 bytes, not 5"),
        ("train_y.bin", b"\x00" * 5, "labels outside of 1 to 10"),
        ("class_names.txt", b"cat dog", "2 names of classes"),
        ("class_names.txt", None, "No such file"),
    ],
)
def test_damaged_files_are_named_in_one_line(written, file, content, says):
    root, _ = written
    (root / "stl10_binary" / file).unlink()
    if content is not None:
        (root / "stl10_binary" / file).write_bytes(content)
    with pytest.raises(SourceError, match=says) as caught:
        Stl10("train", data_root=str(root))
    assert str(root / "stl10_binary" / file) in str(caught.value)
    assert "stl10_binary.tar.gz" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_and_a_wrong_split(tmp_path):
    with pytest.raises(SourceError, match="--data-root is missing"):
        Stl10()
    with pytest.raises(SourceError, match="is not there: unpack"):
        Stl10(data_root=str(tmp_path))
    (tmp_path / "stl10_binary.tar.gz").touch()
    with pytest.raises(SourceError, match="still packed: tar -xzf"):
        Stl10(data_root=str(tmp_path))
    with pytest.raises(SourceError, match="split=valid: use train or test or unlabeled"):
        open_images("stl10:valid", data_root=str(tmp_path))
    with pytest.raises(SourceError, match=r"no split 'valid'"):
        Stl10("valid", data_root=str(tmp_path))


def test_its_recipes_train_without_another_word_on_the_official_files(written, tmp_path):
    root, _ = written
    small = [
        "--epochs=1",
        "--warmup_epochs=0",
        "--batch_size=4",
        "--views.size=32",
        "--encoder.width=0.0625",
        "--report_html=false",
    ]
    small += ["--cld.groups=2", "--method.queue=8", "--device=cpu", "--workers=0", f"--run={tmp_path / 'run'}"]
    run(train, ["--recipe=stl10-moco-cld", f"--data-root={root}", *small])
    told = json.loads((tmp_path / "run" / "images.json").read_text())
    assert 12 in told.values()
