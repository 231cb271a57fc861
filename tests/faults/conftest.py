"""What the tests of strangers' files share."""

import shutil

import pytest
from run_samples import write_images
from strangers import Scene
from training_samples import FAST

from crosslevel.runs import Run
from crosslevel.settings.parser import run
from crosslevel.training.train import train


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    made = Scene(tmp_path)
    yield made
    made.untouched()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Larger than the views: decoded by workers, where there are any."""
    return write_images(tmp_path_factory.mktemp("photos"), size=(40, 40))


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """A run of two epochs of three steps."""
    folder = tmp_path_factory.mktemp("trained") / "r"
    run(train, [str(photos), *FAST, "--epochs=2", f"--run={folder}"])
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    return Run(shutil.copytree(trained, tmp_path / "r"))
