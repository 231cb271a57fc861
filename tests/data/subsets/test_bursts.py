"""Tracks made of folders, or of what an inspection found."""

import pytest
import torch
from run_samples import write_images

from crosslevel.data.open import open_images
from crosslevel.utils.errors import SourceError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two bursts of three, and one image alone."""
    folder = write_images(tmp_path_factory.mktemp("photos"), count=3, classes=("a", "b/1"))
    return write_images(folder, count=1, classes=("b/2",))


def test_images_of_one_folder_are_a_track(photos):
    images = open_images(f"{photos}@bursts")
    assert len(images) == 7
    groups = {}
    for path, track in zip(images.paths, images.tracks.tolist(), strict=True):
        groups.setdefault(track, set()).add(path.rpartition("/")[0])
    assert sorted(map(sorted, groups.values())) == [["a"], ["b/1"], ["b/2"]]
    assert torch.equal(images.labels, open_images(str(photos)).labels)
    assert len(open_images(f"{photos}@bursts@frames=1")) == 3


def test_sets_of_an_inspection_are_tracks(photos, tmp_path):
    paths = open_images(str(photos)).paths
    file = tmp_path / "duplicates.csv"
    file.write_text(f"set,path,kind,distance,keep\n1,{paths[0]},,,yes\n1,{paths[6]},near,0.1,no\n")
    tracks = open_images(f"{photos}@bursts={file}").tracks
    assert tracks[0] == tracks[6]
    assert len(tracks.unique()) == 6


def test_no_bursts(photos, tmp_path):
    with pytest.raises(SourceError, match="no two images are together"):
        open_images(f"{write_images(tmp_path / 'single', count=1)}@bursts")
    file = tmp_path / "duplicates.csv"
    file.write_text("set,path,kind,distance,keep\n1,zzz.png,,,yes\n")
    with pytest.raises(SourceError, match="names no image of"):
        open_images(f"{photos}@bursts={file}")
    file.write_text("path,keep\nzzz.png,yes\n")
    with pytest.raises(SourceError, match="the column set"):
        open_images(f"{photos}@bursts={file}")
