"""Frames of videos that the tests write themselves: each shows its own number in black and white stripes."""

import gc
import os
import random
import signal
import struct
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from video_samples import FRAMES, KINDS, packets, reopened, seen, write

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.loaders.batches import TrainBatches
from crosslevel.data.open import open_images
from crosslevel.data.sources.video import decoder
from crosslevel.data.sources.video.frames import Pace

av = pytest.importorskip("av", reason="needs PyAV: pip install 'crosslevel[video]'")


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
    source = open_images(f"{films['b.mp4']},stride=1")
    source.kept_bytes = kept
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
    got = Pace(fps=fps).select(times).tolist()
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


def test_workers_give_the_same_batches(films):
    source = open_images(f"{films['b.mp4']},stride=1")
    seen(source, 30)  # open, before processes are forked
    batches = [
        list(TrainBatches(source, 8, seed=0, bad_files=BadFiles(), resize=32, workers=workers)) for workers in (0, 2)
    ]
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
