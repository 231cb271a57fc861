"""Frames of videos that the tests write themselves: each shows its own number in black and white stripes."""

import gc
import os
import random
import signal
import struct
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from crosslevel import cli
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.loaders.batches import TrainBatches
from crosslevel.data.open import open_images
from crosslevel.data.sources.video import decoder, timeline
from crosslevel.data.sources.video.frames import Pace
from crosslevel.data.uri import parse
from crosslevel.utils.errors import BadImage, SourceError

av = pytest.importorskip("av", reason="needs PyAV: pip install 'crosslevel[video]'")

FRAMES = 40
KINDS = {
    "b.mp4": ("libx264", {"g": "12", "bf": "2"}),
    "open.mkv": ("libx264", {"g": "12", "bf": "2", "x264-params": "open-gop=1"}),
    "b.avi": ("mpeg4", {"g": "12", "bf": "2"}),
    "hidden.webm": ("libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "16", "b": "200k"}),
    "stream.mpg": ("mpeg2video", {"g": "12", "bf": "2"}),
    "stream.m2ts": ("libx264", {"g": "12", "bf": "2"}),
    "single.mov": ("mjpeg", {}),
}


def stripes(number):
    """Stripe b is white if bit b of ``number`` is set."""
    picture = np.zeros((48, 64, 3), np.uint8)
    for bit in range(8):
        if number >> bit & 1:
            picture[:, 8 * bit : 8 * bit + 8] = 255
    return picture


def number(picture):
    return sum(int(picture[1, 24, 8 * bit + 4] > 127) << bit for bit in range(8))


def write(file, frames=FRAMES, codec="mpeg4", options=None, times=None, **container):
    """A video of 25 frames a second, or of frames at ``times`` in milliseconds."""
    clock = Fraction(1, 1000)
    with av.open(str(file), "w", options=container) as target:
        stream = target.add_stream(codec, rate=25, options=options or {"g": "12"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if times:
            stream.time_base = stream.codec_context.time_base = clock
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(stripes(i), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[i], clock
            for packet in stream.encode(frame):
                target.mux(packet)
        for packet in stream.encode():
            target.mux(packet)
    return str(file)


def packets(file):
    with av.open(file) as source:
        return [(p.pos, p.size, p.is_keyframe) for p in source.demux(source.streams.video[0]) if p.size]


def seen(source, i):
    """The number that image i shows, or why there is none."""
    try:
        return number(source[i][0])
    except BadImage as error:
        return error.path, error.reason


def reopened(source):
    """The same source as a new process has it."""
    copy = object.__new__(type(source))
    copy.__setstate__(source.__getstate__())
    return copy


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    root = tmp_path_factory.mktemp("films")
    return {name: write(root / name, codec=codec, options=options) for name, (codec, options) in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_is_the_right_one_in_any_order(films, name):
    source = open_images(f"{films[name]},stride=1")
    assert len(source) == FRAMES
    assert [seen(source, i) for i in range(FRAMES)] == list(range(FRAMES))
    assert source[0][0].shape == (3, 48, 64)
    assert source[0][0].dtype == torch.uint8
    order = [*range(FRAMES), *range(FRAMES)]
    random.Random(0).shuffle(order)
    other = reopened(source)
    assert [seen(other, i) for i in order] == order
    assert [seen(reopened(source), i) for i in range(FRAMES)] == list(range(FRAMES))


@given(order=st.lists(st.integers(-FRAMES, FRAMES - 1), max_size=30), kept=st.sampled_from([0, 10_000, 10**9]))
def test_order_and_memory_change_nothing(films, order, kept):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "KEPT_BYTES", kept)
        source = open_images(f"{films['b.mp4']},stride=1")
        assert [seen(source, i) for i in order] == [i % FRAMES for i in order]


def test_decoded_once_in_order(films, monkeypatch):
    begun = []
    begin = decoder.Decoder._begin
    monkeypatch.setattr(decoder.Decoder, "_begin", lambda self, group: begun.append(group) or begin(self, group))
    source = open_images(f"{films['b.mp4']},stride=2")
    for i in range(len(source)):
        source[i]
    assert begun == [0]


def test_a_block_asked_for_in_any_order_is_decoded_twice_at_most(films, monkeypatch):
    source = open_images(f"{films['b.mp4']},stride=1")
    begun = []
    begin = decoder.Decoder._begin
    monkeypatch.setattr(decoder.Decoder, "_begin", lambda self, group: begun.append(group) or begin(self, group))
    rng = random.Random(1)
    for block in rng.sample(source.blocks, len(source.blocks)):
        for i in rng.sample(block, len(block)):
            assert seen(source, i) == i
    assert all(begun.count(group) <= 2 for group in begun)


def test_blocks_are_the_frames_of_one_keyframe(films):
    source = open_images(f"{films['b.mp4']},stride=1")
    keys = [i for i, (_, _, key) in enumerate(packets(films["b.mp4"])) if key]
    assert [block.start for block in source.blocks] == keys
    assert [i for block in source.blocks for i in block] == list(range(FRAMES))
    assert open_images(f"{films['single.mov']},stride=1").blocks is None


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ("", [0, 25]),
        (",fps=1", [0, 25]),
        (",fps=5", list(range(0, 40, 5))),
        (",fps=25", list(range(40))),
        (",fps=1000", list(range(40))),
        (",stride=13", [0, 13, 26, 39]),
    ],
)
def test_which_frames_are_taken(films, settings, want):
    for name in ("b.mp4", "open.mkv"):
        source = open_images(films[name] + settings)
        assert [seen(source, i) for i in range(len(source))] == want
        assert list(source.paths) == [f"{name}#t={i / 25:.3f}" for i in want]
        assert source.name == films[name] + settings


@given(gaps=st.lists(st.integers(1, 900), min_size=1, max_size=30), fps=st.sampled_from([0.5, 1, 3, 29.97, 400]))
def test_the_nearest_frame_is_taken_whatever_the_gaps(gaps, fps):
    times = torch.tensor([0, *gaps]).cumsum(0).double() / 1000
    wanted = [k / fps for k in range(10_000) if k / fps <= float(times[-1]) + 0.04999 / fps]
    distances = [(times - t).abs() for t in wanted]
    got = Pace(fps=fps).chosen(times).tolist()
    assert got == sorted(set(got))
    # Of two equally near ones either will do.
    assert len(got) <= len(wanted)
    for distance in distances:
        assert any(float(distance[i]) <= float(distance.min()) + 1e-9 for i in got)


@settings(max_examples=4)
@given(gaps=st.lists(st.integers(20, 400), min_size=11, max_size=11))
def test_variable_frame_rates(tmp_path_factory, gaps):
    times = np.cumsum([0, *gaps]).tolist()
    file = write(tmp_path_factory.mktemp("v") / "v.mkv", 12, "libx264", {"g": "5", "bf": "2"}, times)
    source = open_images(f"{file},stride=1")
    assert [seen(source, i) for i in (*range(12), 7, 2)] == [*range(12), 7, 2]
    assert [float(path.split("=")[1]) for path in source.paths] == pytest.approx([t / 1000 for t in times], abs=2e-3)


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
    bad = BadFiles()
    batches = TrainBatches(source, 8, seed=0, bad=bad, resize=32)
    assert sum(len(batch.index) for batch in batches) == FRAMES
    assert set(bad.reasons) == {got[i][0] for i in lost}


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


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (270, 3)])
def test_frames_are_turned_as_the_film_says(tmp_path, degrees, turns):
    """The matrix in an MP4's track header (ISO 14496-12, 8.3.2) for a picture to be turned counterclockwise."""
    file = tmp_path / "turned.mp4"
    upright = open_images(write(file, 26))[1][0]
    cos, sin = round(np.cos(np.deg2rad(degrees))), round(np.sin(np.deg2rad(degrees)))
    data = bytearray(file.read_bytes())
    struct.pack_into(
        ">9i", data, data.index(b"tkhd") + 44, *(v << 16 for v in (cos, -sin, 0, sin, cos, 0, 0, 0)), 1 << 30
    )
    file.write_bytes(data)
    turned = open_images(str(file))[1][0]
    torch.testing.assert_close(turned, torch.rot90(upright, turns, (1, 2)), rtol=0, atol=0)


@pytest.mark.parametrize(("full", "kr", "kb"), [(False, 0.2126, 0.0722), (True, 0.2126, 0.0722), (False, 0.299, 0.114)])
def test_colours_follow_the_films_own_matrix(tmp_path, full, kr, kb):
    """ITU-R BT.709 and BT.601, in video and full range, from the definition of Y'CbCr."""
    space, file = 1 if kr == 0.2126 else 6, str(tmp_path / "c.mp4")
    with av.open(file, "w") as target:
        stream = target.add_stream(
            "libx264", rate=25, options={"crf": "1", "colorspace": "bt709" if space == 1 else "smpte170m"}
        )
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.codec_context.color_range = 2 if full else 1
        for _ in range(2):
            frame = av.VideoFrame(32, 32, "yuv420p")
            for plane, value in zip(frame.planes, (100, 90, 200), strict=True):
                plane.update(bytes([value]) * plane.buffer_size)
            for packet in stream.encode(frame):
                target.mux(packet)
        for packet in stream.encode():
            target.mux(packet)
    luma, scale = (100 / 255, 255) if full else ((100 - 16) / 219, 224)
    blue, red = (90 - 128) / scale, (200 - 128) / scale
    r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
    want = torch.tensor([r, (luma - kr * r - kb * b) / (1 - kr - kb), b]).clamp(0, 1) * 255
    got = open_images(f"{file},stride=1")[0][0][:, 9, 9].float()
    torch.testing.assert_close(got, want, rtol=0, atol=3)


def test_where_the_frames_are_is_found_out_once(tmp_path, monkeypatch):
    file = write(tmp_path / "film.mp4", 26)
    assert len(open_images(file)) == 2
    calls = []
    found = timeline._demuxed
    monkeypatch.setattr(timeline, "_demuxed", lambda path: calls.append(path) or found(path))
    assert seen(open_images(f"{file},stride=3"), 2) == 6
    assert calls == []
    write(file, 51)
    assert len(open_images(file)) == 3
    assert calls == [file]


def test_workers_give_the_same_batches(films):
    source = open_images(f"{films['b.mp4']},stride=1")
    seen(source, 30)  # open, before processes are forked
    batches = [list(TrainBatches(source, 8, seed=0, bad=BadFiles(), resize=32, workers=workers)) for workers in (0, 2)]
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.index, other.index)


def test_a_fork_can_drop_what_its_parent_decoded_with(films):
    """Converters with threads of their own would be waited for in the forked process, which has none of them."""
    source = open_images(f"{films['b.mp4']},stride=1")
    seen(source, 30)
    child = os.fork()
    if child == 0:
        del source
        gc.collect()
        os._exit(0)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done == child
    assert status == 0


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
    assert (tmp_path / "features.csv").read_text().splitlines()[1] == "film.mp4#t=0.000"
