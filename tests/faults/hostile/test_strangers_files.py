"""What comes from a stranger (a run's folder, a checkpoint, a cache, a table) runs and imports nothing."""

import pickle
import shutil
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from strangers import TINY, Evil, refused

from crosslevel.data.open import open_images
from crosslevel.data.sources.cifar import Cifar10
from crosslevel.features.embed import embed
from crosslevel.models.encoder import Encoder, load_encoder
from crosslevel.runs import load_branches
from crosslevel.settings.parser import run
from crosslevel.training.train import train
from crosslevel.utils.errors import SourceError
from crosslevel.utils.tensors import load_tensors


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "photos").mkdir()
    for i in range(16):
        Image.new("RGB", (16, 16), (16 * i, 90, 40)).save(folder / "photos" / f"{i}.png")
    run(train, [str(folder / "photos"), *TINY, f"--run={folder}/r"])
    return folder


def test_our_checkpoints_hold_tensors_and_plain_values(trained):
    """So they are read without unpickling anything else, here and by Lightning."""
    for name in ("last.ckpt", "best.ckpt"):
        state = load_tensors(trained / "r" / "checkpoints" / name)
        assert plain(state), state.keys()
        assert state["global_step"] == 2
    run(train, [f"--resume={trained}/r", "--epochs=2"])
    assert load_tensors(trained / "r" / "checkpoints" / "last.ckpt")["global_step"] == 4


def plain(value):
    if isinstance(value, dict):
        return all(plain(k) and plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return value is None or type(value) in (bool, int, float, str, torch.Tensor)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["alone", "in callbacks", "in an optimizer"])
def test_no_checkpoint_runs_code(scene, trained, legacy, where, capsys):
    state = torch.load(trained / "r" / "checkpoints" / "last.ckpt", weights_only=True)
    if where == "alone":
        state = {"x": Evil(scene.canary)}
    elif where == "in callbacks":
        state["callbacks"]["Checkpoints"]["best"] = Evil(scene.canary)
    else:
        state["optimizer_states"][0]["param_groups"][0]["lr"] = Evil(scene.canary)
    (scene.folder / "r" / "checkpoints").mkdir(parents=True)
    (scene.folder / "r" / "config.yaml").write_text((trained / "r" / "config.yaml").read_text())
    torch.save(state, scene.folder / "r/checkpoints/last.ckpt", _use_new_zipfile_serialization=not legacy)
    said = refused(train, ["photos", "--resume=r"], capsys)
    assert "last.ckpt is not read: " in said
    assert "tensors and plain values" in said


@pytest.mark.parametrize("content", [{"x": 1}, [1], None])
def test_a_checkpoint_that_is_none_is_named(scene, trained, content, capsys):
    (scene.folder / "r" / "checkpoints").mkdir(parents=True)
    (scene.folder / "r" / "config.yaml").write_text((trained / "r" / "config.yaml").read_text())
    torch.save(content, scene.folder / "r/checkpoints/last.ckpt")
    assert "is no checkpoint of a run: it lacks " in refused(train, ["photos", "--resume=r"], capsys)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.ckpt", "w.npy"])
def test_no_file_of_weights_runs_code(scene, name, capsys):
    scene.before.add(name)
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1), "x": Evil(scene.canary)}}, scene.folder / name)
    said = refused(train, ["photos", f"--encoder.weights={name}", *TINY, "--run=r"], capsys)
    assert f"encoder.weights={name}: not a file of weights" in said


@pytest.mark.parametrize("old", [False, True])
def test_no_file_of_tensors_runs_code(scene, old):
    """Caches of evaluations, kept states of fine-tunings and detectors: all go this way."""
    file = scene.folder / "r"
    torch.save({"epoch": 1, "key": "k", "model": Evil(scene.canary)}, file, _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=r"is not read: it asks for posix\.system, which could run code"):
        load_tensors(file)
    file.write_bytes(pickle.dumps(Evil(scene.canary)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one line, and no advice of PyTorch before it
        with pytest.raises(ValueError, match=r"is not read: damaged, or none of PyTorch's \(UnpicklingError\)"):
            load_tensors(file)


def test_no_run_folder_runs_code(scene, trained, capsys):
    """Pickles in the place of its tensors, and a config.yaml with classes and tags."""
    shutil.copytree(trained / "r", scene.folder / "r")
    for text in (
        "cld: {class_path: stranger.Method}",
        "cld: !!python/object/apply:os.system ['touch CANARY']",
        "cld: [1]",
        "{}",
    ):
        (scene.folder / "r" / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config\.yaml does not say how to build cld\.safetensors"):
            load_branches(scene.folder / "r")
    for file in ("encoder.safetensors", "cld.safetensors", "instance.safetensors"):
        (scene.folder / "r" / file).write_bytes(pickle.dumps(Evil(scene.canary)))
    for read in (load_encoder, load_branches):
        with pytest.raises(ValueError, match=r"safetensors is not read: it is damaged, or no safetensors file"):
            read(scene.folder / "r")
    assert "encoder.safetensors is not read" in refused(embed, ["r", "photos", "-o", "CANARY.parquet"], capsys)


def test_no_cifar_file_runs_code(scene):
    folder = scene.folder / "r"
    (folder / "cifar-10-batches-py").mkdir(parents=True)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["batches.meta"]:
        (folder / "cifar-10-batches-py" / name).write_bytes(pickle.dumps({b"data": Evil(scene.canary)}))
    with pytest.raises(SourceError, match=r"it asks for posix\.system"):
        Cifar10(data_root=str(folder))


def test_no_array_of_a_cifar_file_is_of_objects(scene):
    """A pickled dtype can say that its objects are plain bytes, which NumPy then takes for addresses."""
    folder = scene.folder / "r"
    (folder / "cifar-10-batches-py").mkdir(parents=True)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["batches.meta"]:
        content = {b"data": np.array([[None] * 3072]), b"labels": [0]}
        (folder / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(content))
    with pytest.raises(SourceError, match=r"damaged|no uint8"):
        Cifar10(data_root=str(folder))


def test_no_table_runs_code(scene):
    """Pickled metadata, a pickled extension type and columns of pickles stay bytes."""
    evil = pickle.dumps(Evil(scene.canary))
    pictures = [(scene.folder / "photos" / f"{i}.png").read_bytes() for i in range(3)]
    marks = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": evil}
    fields = [pa.field("image", pa.binary()), pa.field("label", pa.int64(), metadata=marks), pa.field("x", pa.binary())]
    about = {b"pandas": evil, b"huggingface": evil, b"PANDAS_ATTRS": evil}
    table = pa.table([pictures, [0, 1, 2], [evil] * 3], schema=pa.schema(fields, metadata=about))
    (scene.folder / "r").mkdir()
    pq.write_table(table, scene.folder / "r" / "x.parquet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = open_images(f"{scene.folder}/r/x.parquet")
        assert len(source) == 3
        assert source[1][0].shape == (3, 16, 16)
    pq.write_table(pa.table({"image": [evil] * 3}), scene.folder / "r" / "x.parquet")
    with pytest.raises(Exception, match=r"x\.parquet"):
        _ = open_images(f"{scene.folder}/r/x.parquet")[0]


@pytest.mark.parametrize("content", ["pickle", "npy", "torch"])
def test_no_index_and_no_pack_runs_code(scene, content, monkeypatch):
    """Each file of a pack and of the cache in turn is a stranger's: it is refused or made anew, never run."""
    from crosslevel.data.pack import pack

    monkeypatch.setenv("CROSSLEVEL_CACHE", str(scene.folder / "r"))
    scene.before.add("packed")
    pack(str(scene.folder / "photos"), str(scene.folder / "packed"), workers=0)
    open_images(str(scene.folder / "packed"))
    files = [f for root in ("packed", "r") for f in (scene.folder / root).rglob("*") if f.is_file()]
    assert files
    for file in files:
        whole = file.read_bytes()
        if content == "pickle":
            file.write_bytes(pickle.dumps(Evil(scene.canary)))
        elif content == "npy":
            with file.open("wb") as stream:
                np.save(stream, np.array([Evil(scene.canary)]), allow_pickle=True)
        else:
            torch.save({"x": Evil(scene.canary)}, file)
        try:
            source = open_images(str(scene.folder / "packed"))
            _ = [source[i] for i in range(len(source))]
        except (ValueError, OSError, SafetensorError):
            assert file.exists()  # it is refused, and left for its owner to look at
        file.write_bytes(whole)
        scene.untouched()


@pytest.mark.parametrize(
    "address", ["reference://x.tar::{v}", "simplecache::https://h/x.tar", "filecache://x::file://{v}", "dask://h/x.tar",
                "github://o:r@main/x.tar", "zip://x.tar::file://{v}", "generic://h/x.tar", "dir://x.tar"],
)  # fmt: skip
def test_an_address_of_a_config_only_reads_bytes(scene, address):
    """fsspec has protocols that render templates, run services or unpickle what a file brings along."""
    pytest.importorskip("fsspec")
    with pytest.raises(SourceError, match=r"is not read: give https|no such file"):
        open_images(address.replace("{v}", str(scene.victim)), streams=True)


def test_an_encoder_of_any_name_is_built_from_timms_list_alone(scene):
    for name in ("stranger.Method", "os.system"):
        with pytest.raises(ValueError, match="is not a timm model"):
            Encoder(name)


@pytest.mark.parametrize("name", ["hf-hub:stranger/model", "local-dir:r", "timm:test_vit", "stranger.Method"])
def test_an_encoder_file_fetches_and_imports_nothing(tmp_path, name):
    """Only who calls may name a hub: a file that does would have its reader ask a stranger's server."""
    encoder = Encoder(width=0.0625)
    encoder.architecture = name
    encoder.save(tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match="says how to build another network than it holds"):
        load_encoder(tmp_path / "encoder.safetensors")
