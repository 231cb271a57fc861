"""Files that cannot be read, and features that are cached."""

import pytest
import torch
from cache_samples import Killed, by_hand, computed, draw

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.open import open_images
from crosslevel.utils.errors import SourceError


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
    other, bad_files = draw(tmp_path / "test", 12, 1), BadFiles()
    expected = broken(photos)
    computed(encoder, photos, tmp_path / "run", bad_files=bad_files)
    computed(encoder, other, tmp_path / "run", bad_files=bad_files)
    assert bad_files.reasons == expected
    known, bad_files = computed(encoder, other, tmp_path / "run")
    assert len(known.labels) == 12
    assert bad_files.reasons == {}


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
