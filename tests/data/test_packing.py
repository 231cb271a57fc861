"""``crosslevel pack``: whole after a kill, anew after a change, and survivor of what real folders hold."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from forks import started, waited_for
from packing_samples import failing_at, full_at_the_end, packed, write
from PIL import Image

from crosslevel.data import pack
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.loaders.batches import TrainBatches
from crosslevel.data.open import open_images
from crosslevel.settings.parser import run
from crosslevel.utils.errors import SourceError


@pytest.fixture
def photos(tmp_path):
    return write(tmp_path / "photos")


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def test_the_command_line(photos, tmp_path):
    import crosslevel

    code = "from crosslevel.cli import main; main()"
    command = [sys.executable, "-c", code, "pack", str(photos), "-o", str(tmp_path / "p"), "--size", "20"]
    environment = {**os.environ, "PYTHONPATH": str(Path(crosslevel.__file__).parents[1])}
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert "24 images: needs about 0.00 GB" in told
    assert f"24 images in {tmp_path}/p" in told
    assert sorted(contents(tmp_path / "p")) == ["00000.bin", "index.safetensors", "pack.json"]
    assert len(open_images(tmp_path / "p")) == 24


def test_killed_at_any_moment_it_ends_in_the_same_bytes(photos, tmp_path, capsys):
    """After the pixels of the fourth part, before the file that counts it."""
    packed(photos, tmp_path / "whole")
    want = contents(tmp_path / "whole")
    assert len([name for name in want if name.endswith(".bin")]) > 1
    reading, writing = os.pipe()

    def call():
        replace = os.replace

        def waiting(file, target):
            if Path(target).name == "part-000003.safetensors":
                os.write(writing, b"x")
                time.sleep(300)
            replace(file, target)

        os.replace = waiting
        packed(photos, tmp_path / "cut")

    child = started(tmp_path, call)
    os.close(writing)
    with open(reading, "rb") as there:
        assert there.read(1) == b"x", (tmp_path / "err").read_text()
    os.kill(child, signal.SIGKILL)
    assert waited_for(tmp_path, child)[0] == -signal.SIGKILL
    assert not (tmp_path / "cut" / "pack.json").exists()
    with pytest.raises(SourceError, match="not finished: run the same crosslevel pack again"):
        open_images(tmp_path / "cut")
    capsys.readouterr()
    packed(photos, tmp_path / "cut")
    assert "continuing at image 12" in capsys.readouterr().out
    assert contents(tmp_path / "cut") == want


class Killed(BaseException):
    """Stands for a kill: nothing of the program's own code gets to act on it."""


@pytest.mark.parametrize("at", range(0, 40, 13))  # `tests/faults/killed/test_kills.py` tries the others
def test_killed_before_any_step_on_disk(photos, tmp_path, monkeypatch, at):
    """Whatever the last file was that was put in its place, deleted or written to."""
    packed(photos, tmp_path / "whole")
    steps = [0]

    def dying(function):
        def step(*arguments, **options):
            steps[0] += 1
            if steps[0] > at:
                raise Killed
            return function(*arguments, **options)

        return step

    with monkeypatch.context() as patch:
        for module, name in ((os, "replace"), (Path, "unlink"), (os, "fsync")):
            patch.setattr(module, name, dying(getattr(module, name)))
        try:
            packed(photos, tmp_path / "cut")
        except Killed:
            assert steps[0] > at
    packed(photos, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_bytes_behind_the_last_part_and_parts_without_bytes_are_dropped(photos, tmp_path):
    packed(photos, tmp_path / "whole")
    with full_at_the_end(), pytest.raises(SystemExit):
        packed(photos, tmp_path / "cut")
    shards = sorted((tmp_path / "cut").glob("*.bin"))
    os.truncate(shards[0], shards[0].stat().st_size - 10)
    packed(photos, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_workers_gives_the_same_bytes(photos, tmp_path, workers):
    packed(photos, tmp_path / "one")
    packed(photos, tmp_path / "two", f"--workers={workers}")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_nothing_is_done_twice_and_a_change_is_noticed(photos, tmp_path, capsys):
    packed(photos, tmp_path / "p")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "p").iterdir()}
    capsys.readouterr()
    packed(photos, tmp_path / "p")
    assert "is complete: 24 images" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "p").iterdir()} == before
    Image.new("RGB", (40, 30), (1, 2, 3)).save(photos / "a" / "000.png")  # the same name: its folder has not changed
    packed(photos, tmp_path / "p")
    assert "has changed since (24 readable images then, 24 files now): packed anew" in capsys.readouterr().out
    assert open_images(tmp_path / "p")[0][0][:, 0, 0].tolist() == [1, 2, 3]
    run(pack.pack, [str(photos), f"--output={tmp_path}/p", "--size=10", "--workers=0"])
    assert "it was packed with --size 20: packed anew" in capsys.readouterr().out
    assert min(open_images(tmp_path / "p")[0][0].shape[1:]) == 10


def test_what_is_packed_again_without_a_change_is_not_told_of_again(photos, tmp_path, capsys):
    packed(photos, tmp_path / "p")
    pixels = (tmp_path / "p" / "00000.bin").stat().st_mtime_ns
    (photos / "a" / "new.png").touch()
    (photos / "a" / "new.png").unlink()  # the folder is another, the images are the same
    with pytest.warns(UserWarning, match="has changed since it was packed: crosslevel pack again"):
        open_images(tmp_path / "p")
    packed(photos, tmp_path / "p")
    assert "is complete: 24 images" in capsys.readouterr().out
    assert (tmp_path / "p" / "00000.bin").stat().st_mtime_ns == pixels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_images(tmp_path / "p")) == 24


def test_a_source_that_has_moved_is_watched_where_it_is(photos, tmp_path, capsys):
    packed(photos, tmp_path / "p")
    moved = photos.rename(tmp_path / "moved")
    packed(moved, tmp_path / "p")
    assert "is complete: 24 images" in capsys.readouterr().out
    (moved / "a" / "000.png").unlink()
    with pytest.warns(UserWarning, match="moved has changed since it was packed: crosslevel pack again"):
        open_images(tmp_path / "p")


def test_an_unfinished_pack_of_other_images_is_begun_again(photos, tmp_path, capsys):
    with full_at_the_end(), pytest.raises(SystemExit):
        packed(photos, tmp_path / "p")
    (photos / "a" / "000.png").unlink()
    capsys.readouterr()
    packed(photos, tmp_path / "p")
    told = capsys.readouterr().out
    assert "has changed since: packed anew" in told
    assert "continuing" not in told
    packed(photos, tmp_path / "fresh")
    assert contents(tmp_path / "p") == contents(tmp_path / "fresh")


def test_ctrl_c_says_how_to_go_on(photos, tmp_path, capsys):
    third = "part-000002.safetensors"
    with failing_at(third, KeyboardInterrupt()), pytest.raises(SystemExit) as stop:
        packed(photos, tmp_path / "p")
    assert stop.value.code == 130
    assert "8 images are done; the same command continues there\n" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_vanishes_during_the_epoch_is_named(photos, workers):
    bad_files, source = BadFiles(), open_images(photos)
    batches = TrainBatches(source, 4, seed=0, bad_files=bad_files, resize=16, workers=workers)
    gone = int(batches.order(0)[-1])
    read = 0
    for batch in batches:
        if read == 0:
            (photos / source.paths[gone]).unlink()
            time.sleep(0.05)
        assert len(batch.index) == 4
        read += 1
    assert read == 6
    batches.epoch = 1
    assert all(gone not in batch.index for batch in batches)
    assert list(bad_files.reasons) == [source.paths[gone]]
    assert bad_files.reasons[source.paths[gone]] == "cannot be opened: No such file or directory"


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--size=0", "--size 0: give at least 1 pixel"),
        ("--output=PHOTOS/packed", "lies inside"),
        ("--output=FULL", "there is something else in it"),
        ("--output=FILE", "it is a file: give a folder"),
        ("--output=BROKEN", "needs at least 2 images, only 1 of 3 can be read"),
    ],
)
def test_wrong_use_ends_in_one_line(photos, tmp_path, capsys, option, says):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").touch()
    broken = write(tmp_path / "broken", 1)
    for n in range(2):
        (broken / f"{n}.png").touch()
    places = {"PHOTOS": photos, "FULL": tmp_path / "full", "FILE": tmp_path / "file"}
    given = re.sub("PHOTOS|FULL|FILE", lambda found: str(places[found[0]]), option)
    source = broken if "BROKEN" in option else photos
    given = given.replace("BROKEN", str(tmp_path / "p"))
    for part in ("", "@repeat=2") if says == "lies inside" else ("",):
        with pytest.raises(SystemExit) as stop:
            run(pack.pack, [f"{source}{part}", "--workers=0", given])
        assert stop.value.code == 2
        told = capsys.readouterr().err
        assert says in told
        assert told.count("\n") == 1
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_a_full_disk_is_noticed_before(photos, tmp_path, monkeypatch, capsys):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(SystemExit):
        packed(photos, tmp_path / "p")
    assert "24 images: needs about 0.00 GB" in capsys.readouterr().err
