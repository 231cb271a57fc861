"""Folders of films: tracks and classes, patterns, damage, and what is no film."""

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from video_samples import FRAMES, packets, reopened, seen, stripes, write

from crosslevel import cli
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.loaders.batches import TrainBatches
from crosslevel.data.open import open_images
from crosslevel.data.uri import parse
from crosslevel.utils.errors import SourceError

av = pytest.importorskip("av", reason="needs PyAV: pip install 'crosslevel[video]'")


def test_each_video_is_a_track_and_its_folder_the_class(tmp_path):
    for name in ("cat/1.mp4", "dog/2.MP4", "dog/.hidden.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name.lower(), 30)
    os.rename(tmp_path / "dog" / "2.mp4", tmp_path / "dog" / "2.MP4")
    (tmp_path / "dog" / "loop").symlink_to(tmp_path)
    source = open_images(f"{tmp_path},stride=10")
    assert list(source.paths) == [f"{f}#t={t}" for f in ("cat/1.mp4", "dog/2.MP4") for t in ("0.000", "0.400", "0.800")]
    assert source.tracks.tolist() == [0, 0, 0, 1, 1, 1]
    assert (source.labels.tolist(), source.classes) == ([0, 0, 0, 1, 1, 1], ["cat", "dog"])
    assert [seen(source, i) for i in (5, 0, 4, 1)] == [20, 0, 10, 10]
    assert len(open_images(tmp_path)) == 4
    assert source.identity() == open_images(f"{tmp_path},stride=10").identity()
    assert source.identity() != open_images(f"{tmp_path},stride=11").identity()


def test_patterns_lists_and_odd_names(tmp_path, monkeypatch):
    names = ["a b.mp4", "new\nline.mp4", "x,fps=3.mp4", "😀.mp4", os.fsdecode(b"latin\xe9.mp4"), "[1].mp4"]
    write(tmp_path / "first.mp4", 26)
    for name in names:
        (tmp_path / name).write_bytes((tmp_path / "first.mp4").read_bytes())
    monkeypatch.chdir(tmp_path)
    for name in names:
        assert list(open_images(name).paths) == [f"{name}#t=0.000", f"{name}#t=1.000"]
        assert seen(open_images(f"{name},fps=1"), 1) == 25
    everything = sorted([*names, "first.mp4"])
    assert open_images("*.mp4,stride=25").tracks.tolist() == [i for i in range(7) for _ in range(2)]
    assert open_images(str(tmp_path)).files == everything
    assert open_images(names).files == names
    (tmp_path / "list.txt").write_text("a b.mp4\n\n😀.mp4\n", "utf-8")
    assert open_images(str(tmp_path / "list.txt") + ",stride=5").tracks.tolist() == [0] * 6 + [1] * 6
    assert parse("a b.mp4,fps=3").absolute().text == f"{tmp_path}/a b.mp4,fps=3"
    assert parse("*.mp4,stride=25").absolute().text == f"{tmp_path}/*.mp4,stride=25"
    assert parse("turntable:test,classes=3").absolute().text == "turntable:test,classes=3"


def test_a_folder_of_images_and_videos(tmp_path):
    for name in ("1.png", "2.png"):
        Image.fromarray(stripes(3)).save(tmp_path / name)
    write(tmp_path / "film.mp4", 26)
    with pytest.warns(
        UserWarning, match=r"images are taken; its videos, such as film.mp4, are left out: .*,fps=1 takes"
    ):
        assert list(open_images(tmp_path).paths) == ["1.png", "2.png"]
    assert open_images(f"{tmp_path},fps=1").files == ["film.mp4"]


def test_damage_costs_the_rest_of_its_group_whatever_the_order(tmp_path):
    file = write(tmp_path / "film.mp4", codec="libx264", options={"g": "10", "bf": "0", "sc_threshold": "0"})
    found = packets(file)
    keys = [i for i, (_, _, key) in enumerate(found) if key]
    hit = keys[2] + 3
    place, size, _ = found[hit]
    with open(file, "r+b") as target:
        target.seek(place + 5)
        target.write(bytes((7 * i) % 251 for i in range(size - 5)))
    source = open_images(f"{file},stride=1")
    got = [seen(source, i) for i in range(FRAMES)]
    lost = range(hit, keys[3])
    assert [x for x in got if isinstance(x, int)] == [i for i in range(FRAMES) if i not in lost]
    assert [got[i][0] for i in lost] == [f"film.mp4#t={i / 25:.3f}" for i in lost]
    assert "cannot be decoded" in got[hit][1]
    order = [*range(FRAMES), *range(FRAMES)]
    random.Random(2).shuffle(order)
    other = reopened(source)
    assert [seen(other, i) for i in order] == [got[i] for i in order]
    bad_files = BadFiles()
    batches = TrainBatches(source, 8, seed=0, bad_files=bad_files, resize=32)
    assert sum(len(batch.index) for batch in batches) == FRAMES
    assert set(bad_files.reasons) == {got[i][0] for i in lost}


def test_a_truncated_film(tmp_path):
    file = write(tmp_path / "film.mp4", movflags="faststart")
    place, size, _ = packets(file)[26]
    os.truncate(file, place + size // 2)
    with pytest.warns(UserWarning, match=r"film.mp4: it ends after 1.0 s of 1.6 s: truncated") as warned:
        source = open_images(f"{file},stride=1")
    assert len(warned) == 1
    (reason,) = source.left_out.values()
    assert str(warned[0].message) == f"{file}: {reason}"
    got = [seen(source, i) for i in range(FRAMES)]
    assert got[:26] == list(range(26))
    assert [path for path, _ in got[26:]] == list(source.paths[26:])
    assert "truncated" in got[30][1]


@pytest.mark.filterwarnings("ignore:.*it is left out")
def test_a_part_names_what_the_whole_leaves_out(tmp_path):
    write(tmp_path / "good.mp4", 60)
    (tmp_path / "empty.mp4").touch()
    left_out = open_images(tmp_path).left_out
    assert list(left_out) == ["empty.mp4"]
    assert open_images(f"{tmp_path}@frames=2@repeat=2").bad_files().reasons == left_out


def test_what_is_no_video_is_named_and_left_out(tmp_path):
    write(tmp_path / "good.mp4", 26)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mkv").write_text("no video")
    with av.open(str(tmp_path / "sound.mp4"), "w") as target:
        stream = target.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        for packet in [*stream.encode(silence), *stream.encode()]:
            target.mux(packet)
    with pytest.warns(UserWarning, match="it is left out") as warned:
        source = open_images(tmp_path)
    assert source.files == ["good.mp4"]
    assert sorted(source.left_out) == ["empty.mp4", "sound.mp4", "text.mkv"]
    assert "there is no picture in it" in source.left_out["sound.mp4"]
    said = sorted(str(w.message) for w in warned)
    assert [os.path.basename(line.split(": ")[0]) for line in said] == ["empty.mp4", "sound.mp4", "text.mkv"]
    assert all(line.endswith("; it is left out") for line in said)
    assert "there is no picture in it" in said[1]
    with pytest.raises(SourceError, match=r"empty.mp4: cannot be decoded: .*\(1 more cannot be read either\)"):
        open_images([tmp_path / "empty.mp4", tmp_path / "text.mkv"])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("one.mp4,fps=0", "fps=0: give how many frames a second, above 0"),
        ("one.mp4,stride=0", "stride=0: 1 takes every frame"),
        ("one.mp4,stride=2,fps=1", "fps=1 and stride=2: give one of them"),
        ("one.mp4,fps=two", "fps=two: needs a number"),
        ("one.mp4,stride=1.5", "stride=1.5: needs a whole number"),
        ("one.mp4,strid=1", "no setting strid=1: did you mean stride?"),
        ("one.mp4,stride=9", "needs at least 2 frames, there is only one"),
        ("gone.mp4", "no such video"),
        ("gone*.mp4,fps=2", "no such video: give a path, or a pattern that matches some"),
        (".,fps=2,stride=3", "give one of them"),
        ("empty,fps=2", "no video found in this folder"),
        ("empty", "no image found"),
        ("h264.avi", "its frames have no times in order: convert it"),
    ],
)
def test_wrong_sources_say_what_to_do_in_one_line(tmp_path, monkeypatch, source, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "one.mp4", 9)
    if "avi" in source:
        write(tmp_path / "h264.avi", 30, "libx264", {"bf": "2"})
    with pytest.raises(SourceError) as caught:
        open_images(source)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_where_the_frames_are_is_found_out_once(tmp_path):
    """Of what looks like the same file, whatever is in it."""
    file = write(tmp_path / "film.mp4", 26)
    assert len(open_images(file)) == 2
    whole, status = Path(file).read_bytes(), os.stat(file)
    Path(file).write_bytes(bytes(len(whole)))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = open_images(f"{file},stride=3")
    Path(file).write_bytes(whole)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert seen(again, 2) == 6
    write(file, 51)
    assert len(open_images(file)) == 3


def test_without_pyav_the_message_is_the_install_command(tmp_path, monkeypatch):
    (tmp_path / "film.mp4").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'crosslevel\[video\]'"):
        open_images(str(tmp_path / "film.mp4"))


def test_training_and_embedding_from_the_command_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "film.mp4", 60)
    tiny = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=4", "--device=cpu", "--report_html=false"]
    cli.main(["train", "film.mp4,fps=5", *tiny, "--epochs=1", "--cld.groups=2", "--workers=0", "--run=run"])
    assert f"images: {tmp_path}/film.mp4,fps=5\n" in (tmp_path / "run" / "config.yaml").read_text()
    cli.main(["embed", "run", "film.mp4,fps=5", "-o", "features.npy", "--workers=0", "--device=cpu"])
    assert np.load("features.npy").shape[0] == 12
    said = capfd.readouterr()
    assert "12 images" in said.out
    assert (tmp_path / "features.csv").read_text().splitlines()[1] == "film.mp4#t=0.000,0"  # and the track
