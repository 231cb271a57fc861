"""A user's folder, in which what the pages name exists, and beside it a hub, a web server and a store."""

import shutil
import sys

import pytest
from doc_samples import PARTS, TINY, furnish
from hub_samples import local_hub, narrow
from line_samples import NARROW, Outside, bucket, put_weights, web

import crosslevel


@pytest.fixture(scope="session")
def furnished(tmp_path_factory):
    """A user's folder, with one run in it, of which tests take copies."""
    folder = tmp_path_factory.mktemp("furnished")
    furnish(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        crosslevel.train("photos/", run="runs/photos", quiet=True, **TINY, **PARTS)
        shutil.copytree("runs/photos", "runs/tune/photos")
        crosslevel.evaluate("runs/photos", "labelled/train", test="labelled/test", k=3, device="cpu", quiet=True)
        shutil.copytree("runs/photos", "runs/plain")
        crosslevel.embed("runs/photos", "photos/", output="features.parquet", thumbnails=96, device="cpu", quiet=True)
        crosslevel.curate("features.parquet", n=8, output="to-label.txt", outliers="keep", quiet=True)
    return folder


@pytest.fixture
def copy(furnished, tmp_path, monkeypatch):
    """The same for one test alone, in which it may write."""
    shutil.copytree(furnished, tmp_path / "user")
    monkeypatch.chdir(tmp_path / "user")


@pytest.fixture(scope="module")
def user(furnished, tmp_path_factory):
    """The same for the tests of a file, which find what those before them have left."""
    folder = tmp_path_factory.mktemp("user") / "user"
    shutil.copytree(furnished, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield folder
    sys.modules.pop("mypackage.mymodule", None)


@pytest.fixture(scope="module")
def outside(user, tmp_path_factory):
    """A hub with weights, and a server of shards."""
    shards = tmp_path_factory.mktemp("web")
    for i in range(100):
        (shards / f"train-{i:03}.tar").symlink_to(user / "shards" / f"train-{i % 10:03}.tar")
    with (
        pytest.MonkeyPatch.context() as patch,
        local_hub(patch, tmp_path_factory.mktemp("hub")) as (hub, _),
        web(shards) as address,
    ):
        patch.setenv("HF_TOKEN", "hf_token")
        narrow(patch, NARROW)
        put_weights(hub, user)
        yield Outside(hub, address)


@pytest.fixture(scope="module")
def store(user):
    """A bucket with shards in it."""
    with bucket(sorted((user / "shards").glob("*.tar"))[:3]) as store:
        yield store
