"""Features are computed once, for exactly these weights, images and precision, and are whole after a kill."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from run_samples import watching_encoders

from crosslevel import Encoder
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images
from crosslevel.data.open import open_images
from crosslevel.data.sources.folder import Files
from crosslevel.features import cache
from crosslevel.features.cache import FeatureCache
from crosslevel.features.extract import Runtime
from crosslevel.models.encoder import View
from crosslevel.utils.device import choose
from crosslevel.utils.errors import SourceError

PLACE = Runtime(choose("cpu", "fp32"), workers=0, batch_size=4)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    encoder = Encoder("resnet18", True, 0.0625)
    encoder.view = View(16)
    return encoder


@pytest.fixture
def photos(tmp_path):
    """Twelve pictures of noise in two classes."""
    return draw(tmp_path / "photos", 12, 0)


@pytest.fixture
def encoded():
    """How many images went through an encoder, pass by pass; ``encoded.most`` of them kill the process."""

    class Encoded(list):
        most = None

    counts = Encoded()

    def counting(encoder, shown):
        if counts.most is not None and sum(counts) + len(shown) > counts.most:
            raise Killed
        counts.append(len(shown))

    with watching_encoders(counting):
        yield counts


class Killed(BaseException):
    """What no handler of errors catches."""


def draw(folder, count, seed):
    rng = np.random.default_rng(seed)
    for i in range(count):
        file = folder / "ab"[i % 2] / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    return folder


def computed(encoder, source, home, name="trained", place=PLACE, bad=None, **sizes):
    """What a new process finds: nothing but the folder is shared between calls."""
    source = open_images(source) if not isinstance(source, Images) else source
    bad = BadFiles() if bad is None else bad
    return FeatureCache(home, place, bad, **sizes).features(name, encoder, source), bad


def by_hand(encoder, source):
    """Features and labels by path, one image at a time; the mean and deviation are ImageNet's."""
    mean, std = np.array([0.485, 0.456, 0.406])[:, None, None], np.array([0.229, 0.224, 0.225])[:, None, None]
    rows = {}
    for file in sorted(source.rglob("*.png")):
        try:
            pixels = np.asarray(Image.open(file)).transpose(2, 0, 1) / 255
        except OSError:
            continue
        with torch.no_grad():
            shown = torch.tensor((pixels - mean) / std, dtype=torch.float32)[None]
            rows[file.relative_to(source).as_posix()] = (encoder.eval()(shown)[0], "ab".index(file.parent.name))
    return rows


def same(known, other):
    tracks = [k.tracks is None or k.tracks for k in (known, other)]
    return (
        torch.equal(known.features, other.features)
        and torch.equal(known.labels, other.labels)
        and (tracks[0] is tracks[1] is True or torch.equal(*tracks))
    )


def folders(home):
    return {folder.name for folder in (home / "features").iterdir()}


@pytest.mark.parametrize("in_memory", [True, False])
def test_each_readable_image_has_its_own_feature_and_label(encoder, photos, tmp_path, in_memory):
    sizes = {"decoded_once": 1e9 if in_memory else 0, "rows": 5}
    (photos / "a" / "04.png").write_bytes(b"\x89PNG broken")
    expected = by_hand(encoder, photos)
    assert len(expected) == 11
    for home in (None, tmp_path / "run", tmp_path / "run"):
        known, bad = computed(encoder, photos, home, **sizes)
        features, labels = zip(*expected.values(), strict=True)
        torch.testing.assert_close(known.features, torch.stack(features), rtol=1e-4, atol=1e-5)
        assert known.labels.tolist() == list(labels)
        assert known.tracks is None
        assert list(bad.reasons) == ["a/04.png"]


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


def broken(photos):
    (photos / "a" / "00.png").write_bytes(b"\x89PNG broken")
    (photos / "b" / "05.png").write_bytes(b"")
    return {"a/00.png": "not an image, or the beginning of one is damaged", "b/05.png": "empty file"}


@pytest.mark.parametrize("in_memory", [True, False])
def test_unreadable_files_are_named_again_from_the_cache(encoder, photos, tmp_path, encoded, in_memory):
    sizes = {"decoded_once": 1e9 if in_memory else 0}
    expected = broken(photos)
    assert computed(encoder, photos, tmp_path / "run", **sizes)[1].reasons == expected
    assert sum(encoded) == 10
    assert computed(encoder, photos, tmp_path / "run", **sizes)[1].reasons == expected
    assert sum(encoded) == 10


@pytest.mark.parametrize("in_memory", [True, False])
def test_unreadable_files_are_named_after_a_kill_too(encoder, photos, tmp_path, encoded, in_memory):
    """The file was met before the kill, in a piece that is not computed again."""
    sizes = {"decoded_once": 1e9 if in_memory else 0, "rows": 4}
    expected = broken(photos)
    encoded.most = 4
    with pytest.raises(Killed):
        computed(encoder, photos, tmp_path / "run", **sizes)
    encoded.most = None
    for _ in ("continued", "cached"):
        assert computed(encoder, photos, tmp_path / "run", **sizes)[1].reasons == expected


def test_a_bad_file_is_not_held_against_another_source_with_a_file_of_its_name(encoder, photos, tmp_path):
    """A run reads its training and its test images, and both have an a/00.png."""
    other, bad = draw(tmp_path / "test", 12, 1), BadFiles()
    expected = broken(photos)
    computed(encoder, photos, tmp_path / "run", bad=bad)
    computed(encoder, other, tmp_path / "run", bad=bad)
    assert bad.reasons == expected
    known, bad = computed(encoder, other, tmp_path / "run")
    assert len(known.labels) == 12
    assert bad.reasons == {}


@pytest.mark.parametrize("in_memory", [True, False])
def test_nothing_readable_is_one_error(encoder, photos, tmp_path, in_memory):
    sizes = {"decoded_once": 1e9 if in_memory else 0, "rows": 5}
    for file in photos.rglob("*.png"):
        file.write_bytes(b"\x89PNG broken")
    for _ in range(2):
        with pytest.raises(SourceError, match=r"of .*12.* can be read") as error:
            computed(encoder, photos, tmp_path / "run", **sizes)
        assert str(error.value).startswith(str(photos))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("in_memory", [True, False])
def test_tracks_and_labels_stay_with_their_images(encoder, photos, tmp_path, in_memory):
    """Every image has a track and a label of its own, and whole pieces may be unreadable."""
    sizes = {"decoded_once": 1e9 if in_memory else 0, "rows": 2}
    source = open_images(photos)
    for i in (0, 1, 4, 11):
        (photos / source.paths[i]).write_bytes(b"\x89PNG broken")
    source.tracks, source.labels = torch.arange(100, 112), torch.arange(12).flip(0)
    source.classes = [f"class {c}" for c in range(12)]
    readable = [i for i in range(12) if i not in (0, 1, 4, 11)]
    expected = by_hand(encoder, photos)
    for _ in ("computed", "cached"):
        known, _ = computed(encoder, source, tmp_path / "run", **sizes)
        assert known.tracks.tolist() == [100 + i for i in readable]
        assert known.labels.tolist() == [11 - i for i in readable]
        features = torch.stack([expected[source.paths[i]][0] for i in readable])
        torch.testing.assert_close(known.features, features, rtol=1e-4, atol=1e-5)


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


def test_small_images_are_decoded_once_for_all_encoders(encoder, photos, monkeypatch):
    source, found = open_images(photos), FeatureCache(None, PLACE, BadFiles())
    read = []
    original = Files.__getitem__
    monkeypatch.setattr(Files, "__getitem__", lambda self, i: read.append(i) or original(self, i))
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
