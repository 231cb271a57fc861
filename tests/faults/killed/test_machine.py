"""A machine that is short of something, for real: a /dev/shm that is too small, and a folder where nothing is written.

Mounted for one process alone, which needs to be root on Linux.
"""

import shutil
import tempfile
from pathlib import Path

import pytest
from forks import can_mount, ended, frozen, mounted
from run_samples import write_images

from crosslevel.data.pack import pack
from crosslevel.evaluation.evaluate import evaluate
from crosslevel.features.embed import embed
from crosslevel.runs import Run
from crosslevel.settings.parser import run
from crosslevel.training.train import train
from crosslevel.tuning.tune import tune

TINY = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=8", "--device=cpu", "--precision=fp32"]
FAST = [*TINY, "--monitor_every=0", "--report_html=false", "--epochs=1", "--workers=0"]


@pytest.fixture
def tmp_path():
    """Not in /dev/shm, where the other tests' folders may be: it is what is made small here."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def home():
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        if not can_mount(folder):
            pytest.skip("nothing can be mounted here: needs root on Linux")
        write_images(folder / "photos", count=36, size=(200, 200))
        run(train, [str(folder / "photos"), *FAST, f"--run={folder}/r"])
        yield folder


VERBS = {
    "train": (train, "{photos} {fast} --run={out}/s"),
    "resume": (train, "{photos} --resume={out}/r --epochs=2"),
    "embed": (embed, "{run} {photos} -o {out}/f.parquet --device=cpu --workers=0"),
    "embed to an array": (embed, "{run} {photos} -o {out}/f.npy --device=cpu --workers=0"),
    "pack": (pack, "{photos} -o {out}/p --workers=0"),
    "tune": (tune, "{photos} {tiny} --trials=1 -o {out}/t"),
    "evaluate": (evaluate, "{out}/r {photos} --test={photos} --device=cpu --workers=0"),
}


def line(verb, home, out, more=()):
    places = {"photos": home / "photos", "run": home / "r", "out": out, "tiny": " ".join(TINY), "fast": " ".join(FAST)}
    return [*VERBS[verb][1].format(**places).split(), *more]


@pytest.mark.parametrize("verb", VERBS)
def test_where_nothing_can_be_written_one_line_says_so(home, tmp_path, verb):
    (tmp_path / "place").mkdir()

    def call():
        mounted(tmp_path / "place", "64m")
        shutil.copytree(home / "r", tmp_path / "place" / "r")
        frozen(tmp_path / "place")
        run(VERBS[verb][0], line(verb, home, tmp_path / "place"))

    code, said = ended(tmp_path, call)
    assert code == 2, said
    assert "Traceback" not in said
    *warnings, error = said.splitlines()
    assert "Read-only file system" in error
    assert str(tmp_path / "place") in error
    assert all("cannot be locked (Read-only file system)" in warning for warning in warnings)


@pytest.mark.parametrize("verb", ["train", "embed", "pack", "evaluate"])
def test_a_small_dev_shm_is_said_in_one_line(home, tmp_path, verb):
    shutil.copytree(home / "r", tmp_path / "r")

    def call():
        mounted("/dev/shm", "64k")
        batch = [] if verb == "pack" else ["--batch_size=64"]
        run(VERBS[verb][0], line(verb, home, tmp_path, ["--workers=2", *batch]))

    code, said = ended(tmp_path, call)
    assert code == 2, said
    assert "Traceback" not in said
    assert "a process that decodes images has died: /dev/shm is full: enlarge it" in said.splitlines()[-1]
    assert not Run(tmp_path / "s").last.exists()
