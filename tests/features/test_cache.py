"""Features are computed once, for exactly these weights, images and precision, and are whole after a kill."""

import os
import shutil

import numpy as np
import pytest
import torch
from cache_samples import PLACE, Killed, by_hand, computed, draw, folders, same
from PIL import Image

from crosslevel import Encoder
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.open import open_images
from crosslevel.data.sources.folder import Files
from crosslevel.features import cache
from crosslevel.features.cache import FeatureCache
from crosslevel.models.encoder import View
from crosslevel.utils.device import choose


@pytest.mark.parametrize("in_memory", [True, False])
def test_each_readable_image_has_its_own_feature_and_label(encoder, photos, tmp_path, in_memory):
    sizes = {"decoded_once": 1e9 if in_memory else 0, "rows": 5}
    (photos / "a" / "04.png").write_bytes(b"\x89PNG broken")
    expected = by_hand(encoder, photos)
    assert len(expected) == 11
    for home in (None, tmp_path / "run", tmp_path / "run"):
        known, bad_files = computed(encoder, photos, home, **sizes)
        features, labels = zip(*expected.values(), strict=True)
        torch.testing.assert_close(known.features, torch.stack(features), rtol=1e-4, atol=1e-5)
        assert known.labels.tolist() == list(labels)
        assert known.tracks is None
        assert list(bad_files.reasons) == ["a/04.png"]


def test_features_are_computed_once(encoder, photos, tmp_path, encoded):
    source = open_images(photos)
    first = FeatureCache(tmp_path / "run", PLACE, BadFiles())
    known = first.features("trained", encoder, source)
    assert sum(encoded) == 12
    assert same(first.features("trained", encoder, source), known)
    assert same(computed(encoder, photos, tmp_path / "run")[0], known)
    assert sum(encoded) == 12


def test_without_a_folder_they_are_kept_in_memory_alone(encoder, photos, tmp_path, encoded):
    source, found = open_images(photos), FeatureCache(None, PLACE, BadFiles())
    assert same(found.features("trained", encoder, source), found.features("trained", encoder, source))
    assert sum(encoded) == 12
    computed(encoder, photos, None)
    assert sum(encoded) == 24
    assert {path.name for path in tmp_path.iterdir()} == {"photos"}


def a_weight(encoder, photos, place):
    encoder.backbone.conv1.weight.data[1, 2, 0, 1] += 0.1
    return open_images(photos), place


def the_view(encoder, photos, place):
    encoder.view = View(16, mean=(0.5, 0.5, 0.5))
    return open_images(photos), place


def an_image(encoder, photos, place):
    Image.new("RGB", (16, 16), (255, 0, 0)).save(photos / "b" / "03.png")
    return open_images(photos), place


def the_list(encoder, photos, place):
    draw(photos, 13, 0)
    return open_images(photos), place


def the_order(encoder, photos, place):
    found = open_images(photos)
    return Files(str(photos), found.paths[::-1], found.labels.flip(0), found.classes), place


def a_label(encoder, photos, place):
    found = open_images(photos)
    return Files(str(photos), found.paths, found.labels.flip(0), found.classes), place


def the_precision(encoder, photos, place):
    return open_images(photos), place._replace(hardware=choose("cpu", "bf16"))


@pytest.mark.parametrize("change", [a_weight, the_view, an_image, the_list, the_order, a_label, the_precision])
def test_a_change_computes_them_again(encoder, photos, tmp_path, encoded, change):
    old, _ = computed(encoder, photos, tmp_path / "run")
    encoded.clear()
    source, place = change(encoder, photos, PLACE)
    new, _ = computed(encoder, source, tmp_path / "run", place=place)
    assert sum(encoded) == len(source)
    assert not same(new, old)
    fresh, _ = computed(encoder, source, None, place=place)
    assert same(new, fresh)


def test_a_source_that_was_moved_is_still_the_same(encoder, photos, tmp_path, encoded):
    known, _ = computed(encoder, photos, tmp_path / "run")
    photos.rename(tmp_path / "elsewhere")
    assert same(computed(encoder, tmp_path / "elsewhere", tmp_path / "run")[0], known)
    assert sum(encoded) == 12


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("most", [0, 3, 5, 9, 10])
def test_a_killed_extraction_continues_and_is_the_uninterrupted_one(
    encoder, photos, tmp_path, encoded, most, in_memory
):
    sizes = {"decoded_once": 1e9 if in_memory else 0, "rows": 5}
    whole, _ = computed(encoder, photos, None, **sizes)
    encoded.clear()
    encoded.most = most
    with pytest.raises(Killed):
        computed(encoder, photos, tmp_path / "run", **sizes)
    encoded.clear()
    encoded.most = None
    continued, _ = computed(encoder, photos, tmp_path / "run", **sizes)
    assert same(continued, whole)
    assert sum(encoded) == 12 - most // 5 * 5  # nothing that was on disk is computed again


@pytest.mark.parametrize("written", [None, b"", b'{"a/'], ids=["missing", "empty", "cut"])
def test_a_kill_before_the_last_word_loses_no_piece(encoder, photos, tmp_path, encoded, written):
    """The mark that all pieces are there is missing, or was begun and not finished."""
    whole, _ = computed(encoder, photos, tmp_path / "run")
    (mark,) = (tmp_path / "run").rglob(cache.COMPLETE)
    mark.unlink()
    if written is not None:
        mark.write_bytes(written)
    assert same(computed(encoder, photos, tmp_path / "run")[0], whole)
    assert sum(encoded) == 12


@pytest.mark.parametrize("damage", ["gone", "cut", "empty"])
def test_a_missing_or_damaged_piece_is_computed_again(encoder, photos, tmp_path, encoded, damage):
    """So for instance if a kill came while the features of an earlier encoder were deleted."""
    sizes = {"rows": 5}
    whole, _ = computed(encoder, photos, tmp_path / "run", **sizes)
    last = sorted((tmp_path / "run").rglob("*.safetensors"))[-1]
    if damage == "gone":
        last.unlink()
    else:
        last.write_bytes(last.read_bytes()[:-5] if damage == "cut" else b"")
    encoded.clear()
    assert same(computed(encoder, photos, tmp_path / "run", **sizes)[0], whole)
    assert sum(encoded) == 2


def test_pieces_of_other_images_are_not_continued(encoder, photos, tmp_path, encoded):
    sizes = {"rows": 4}
    encoded.most = 8
    with pytest.raises(Killed):
        computed(encoder, photos, tmp_path / "run", **sizes)
    encoded.clear()
    encoded.most = None
    Image.new("RGB", (16, 16)).save(photos / "a" / "00.png")
    known, _ = computed(encoder, photos, tmp_path / "run", **sizes)
    assert sum(encoded) == 12
    assert same(known, computed(encoder, photos, None, **sizes)[0])


def test_a_former_encoders_features_are_deleted_and_no_others(encoder, photos, tmp_path, encoded):
    home, other = tmp_path / "run", draw(tmp_path / "test", 6, 1)
    computed(encoder, photos, home)
    computed(encoder, other, home)
    computed(encoder, photos, home, name="trained encoder")
    kept = folders(home)
    assert len(kept) == 3
    former = Encoder("resnet18", True, 0.0625)
    former.load_state_dict(encoder.state_dict())
    former.view = encoder.view
    a_weight(encoder, photos, PLACE)
    computed(encoder, photos, home)
    assert len(folders(home)) == 3
    assert len(kept - folders(home)) == 1
    encoded.clear()
    computed(encoder, photos, home)
    computed(former, other, home)
    computed(former, photos, home, name="trained encoder")
    assert sum(encoded) == 0
    computed(former, photos, home)
    assert sum(encoded) == 12


def test_small_images_are_decoded_once_for_all_encoders(encoder, photos):
    read = []

    class Watched(Files):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    source, found = Watched.from_folder(str(photos)), FeatureCache(None, PLACE, BadFiles())
    found.features("trained", encoder, source)
    a_weight(encoder, photos, PLACE)
    found.features("other", encoder, source)
    assert sorted(read) == list(range(12))
    packed = found.decoded(source, 16)
    pixels = [np.asarray(Image.open(photos / path)).transpose(2, 0, 1) for path in source.paths]
    np.testing.assert_array_equal(packed.data.numpy(), np.stack(pixels))


def test_progress_counts_the_images_of_the_whole_source(encoder, photos, tmp_path, encoded):
    sizes = {"rows": 5}
    told = []
    encoded.most = 5
    with pytest.raises(Killed):
        computed(encoder, photos, tmp_path / "run", **sizes)
    encoded.most = None
    FeatureCache(tmp_path / "run", PLACE, BadFiles(), **sizes).features(
        "trained", encoder, open_images(photos), lambda done, of: told.append((done, of))
    )
    assert told == [(9, 12), (10, 12), (12, 12)]


def test_a_copied_run_brings_its_features_along(encoder, photos, tmp_path, encoded):
    known, _ = computed(encoder, photos, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "run")
    assert same(computed(encoder, photos, tmp_path / "copy")[0], known)
    assert sum(encoded) == 12
    assert not any(name.endswith(".tmp") for _, _, files in os.walk(tmp_path) for name in files)
