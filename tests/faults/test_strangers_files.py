"""What comes from a stranger (a config, a run's folder, a checkpoint, a cache, a table) runs and imports nothing."""

import json
import os
import pickle
import sys
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError

from crosslevel import images as image_sources
from crosslevel.commands import run
from crosslevel.embed import embed
from crosslevel.encoder import Encoder, load_encoder
from crosslevel.evaluate import evaluate
from crosslevel.folder import load_branches
from crosslevel.images.cifar import Cifar10
from crosslevel.images.sources import SourceError
from crosslevel.tensors import load_tensors
from crosslevel.train import train

TINY = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=8", "--epochs=1", "--device=cpu"]
TINY += ["--report_html=false", "--monitor_every=0", "--workers=0", "--precision=fp32"]

# What each would do if it were called: {c} is the canary, {v} a victim that is there.
CALLABLES = {
    "os.system": {"command": "touch {c}"},
    "os.remove": {"path": "{v}"},
    "os.unlink": {"path": "{v}"},
    "os.rename": {"src": "{v}", "dst": "{c}"},
    "os.replace": {"src": "{v}", "dst": "{c}"},
    "os.truncate": {"path": "{v}", "length": 0},
    "os.mkdir": {"path": "{c}"},
    "os.makedirs": {"name": "{c}"},
    "os.mkfifo": {"path": "{c}"},
    "os.symlink": {"src": "{v}", "dst": "{c}"},
    "os.link": {"src": "{v}", "dst": "{c}"},
    "os.popen": {"cmd": "touch {c}"},
    "os.putenv": {"name": "CANARY", "value": "1"},
    "posix.system": {"command": "touch {c}"},
    "os.execv": {"path": "/bin/touch", "argv": ["touch", "{c}"]},
    "os.posix_spawn": {"path": "/bin/touch", "argv": ["touch", "{c}"], "env": {}},
    "subprocess.call": {"args": ["touch", "{c}"]},
    "subprocess.check_call": {"args": ["touch", "{c}"]},
    "subprocess.check_output": {"args": ["touch", "{c}"]},
    "subprocess.run": {"args": ["touch", "{c}"]},
    "subprocess.Popen": {"args": ["touch", "{c}"]},
    "subprocess.getoutput": {"cmd": "touch {c}"},
    "runpy.run_path": {"path_name": "{s}"},
    "runpy.run_module": {"mod_name": "stranger"},
    "shutil.rmtree": {"path": "{v}"},
    "shutil.move": {"src": "{v}", "dst": "{c}"},
    "shutil.copy": {"src": "{v}", "dst": "{c}"},
    "shutil.copyfile": {"src": "{v}", "dst": "{c}"},
    "builtins.eval": {"source": "open('{c}', 'w')"},
    "builtins.exec": {"source": "open('{c}', 'w')"},
    "builtins.compile": {"source": "1", "filename": "x", "mode": "eval"},
    "builtins.open": {"file": "{c}", "mode": "w"},
    "builtins.__import__": {"name": "stranger"},
    "io.open": {"file": "{c}", "mode": "w"},
    "importlib.import_module": {"name": "stranger"},
    "pkgutil.resolve_name": {"name": "stranger"},
    "pydoc.locate": {"path": "stranger"},
    "pickle.load": {"file": "{p}"},
    "pickle.loads": {"data": "{p}"},
    "pickle.Unpickler": {"file": "{p}"},
    "torch.load": {"f": "{p}", "weights_only": False},
    "torch.hub.load": {"repo_or_dir": "{d}", "model": "x", "source": "local"},
    "torch.jit.load": {"f": "{p}"},
    "torch.save": {"obj": 1, "f": "{c}"},
    "numpy.load": {"file": "{p}", "allow_pickle": True},
    "numpy.save": {"file": "{c}", "arr": [1]},
    "pandas.read_pickle": {"filepath_or_buffer": "{p}"},
    "joblib.load": {"filename": "{p}"},
    "yaml.unsafe_load": {"stream": "!!python/object/apply:os.system ['touch {c}']"},
    "ctypes.CDLL": {"name": "{v}"},
    "webbrowser.open": {"url": "file://{v}"},
    "code.interact": {"banner": "x"},
    "timeit.timeit": {"stmt": "open('{c}', 'w')"},
    "cProfile.run": {"statement": "open('{c}', 'w')"},
    "urllib.request.urlretrieve": {"url": "file://{v}", "filename": "{c}"},
    "venv.create": {"env_dir": "{c}"},
    "zipfile.ZipFile": {"file": "{c}", "mode": "w"},
    "sqlite3.connect": {"database": "{c}"},
    "antigravity.geohash": {},
    "stranger.Method": {},
    "stranger": {},
    "crosslevel.trust.set_parsing_settings": {"import_path_allowlist": ["os.system"]},
    "crosslevel.train.os.system": {"command": "touch {c}"},
    "crosslevel.methods.os.system": {"command": "touch {c}"},
    "crosslevel.methods.base.Method": {},
    "jsonargparse.set_parsing_settings": {"import_path_allowlist": ["os.system"]},
    "torch.nn.Linear": {"in_features": 1, "out_features": 1},
}


class Evil:
    """Its pickle touches the canary when it is read."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


class Scene:
    """A folder of images, files of a stranger, and what must be as it was afterwards."""

    def __init__(self, folder):
        sys.modules.pop("stranger", None)  # of a test that failed
        self.folder, self.canary, self.victim = folder, folder / "CANARY", folder / "victim"
        self.victim.write_text("here")
        (folder / "stranger.py").write_text(f"open({str(self.canary)!r}, 'w').close()\nclass Method: pass\n")
        (folder / "evil.pkl").write_bytes(pickle.dumps(Evil(self.canary)))
        (folder / "photos").mkdir()
        for i in range(16):
            Image.new("RGB", (16, 16), (16 * i, 90, 40)).save(folder / "photos" / f"{i}.png")
        self.before = set(os.listdir(folder)) | {"r", "config.yaml", "runs", "t"}

    def filled(self, arguments):
        places = {"c": self.canary, "v": self.victim, "s": self.folder / "stranger.py", "d": self.folder}
        places |= {"p": self.folder / "evil.pkl"}
        text = json.dumps(arguments)
        for name, path in places.items():
            text = text.replace(f"{{{name}}}", str(path))
        return json.loads(text)

    def untouched(self):
        assert not self.canary.exists()
        assert self.victim.read_text() == "here"
        assert set(os.listdir(self.folder)) <= self.before
        assert "stranger" not in sys.modules


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    made = Scene(tmp_path)
    yield made
    made.untouched()


def refused(function, arguments, capsys):
    """The one line with which a command refuses what it is given."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(function, arguments)
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1), said
    return said


def ways(scene, tree):
    """The command lines that read ``tree`` from a file."""
    from crosslevel.tune import tune

    (scene.folder / "r").mkdir(exist_ok=True)
    for file in ("config.yaml", "r/config.yaml"):
        (scene.folder / file).write_text(yaml.safe_dump(tree))
    photos, config = str(scene.folder / "photos"), str(scene.folder / "config.yaml")
    return {
        "config": (train, [photos, "--config", config, *TINY, "--run=r"]),
        "config=": (train, [photos, *TINY, f"--config={config}", "--run=r"]),
        "resume": (train, [photos, "--resume=r", *TINY]),
        "tune": (tune, [photos, f"--config={config}", *TINY, "-o", "t", "--trials=1"]),
    }


def test_there_are_as_many_callables_as_were_measured():
    assert len(CALLABLES) >= 46


@pytest.mark.parametrize("way", ["config", "resume", "tune"])
def test_no_callable_of_a_file_is_run_or_imported(scene, way, capsys):
    """Each is refused by its name in one line, and no module is imported for it."""
    for name, arguments in CALLABLES.items():
        for form in ({"class_path": name, "init_args": scene.filled(arguments)}, name)[: 2 if way == "config" else 1]:
            if form == "stranger":
                continue  # a method's short name, which is said to be unknown: see below
            before = set(sys.modules)
            said = refused(*ways(scene, {"method": form})[way], capsys)
            assert repr(name) in said, (name, said)
            imported = {name.rpartition(".")[0]} & (set(sys.modules) - before)
            assert not imported, name
            scene.untouched()


@pytest.mark.parametrize("way", ["config", "resume", "tune"])
@pytest.mark.parametrize(
    "tree",
    [
        {"method.class_path": "stranger.Method"},
        {"method": {"class_path": "MoCo", "init_args": {"head": {"class_path": "stranger.Method"}}}},
        {"method": {"class_path": ["stranger.Method"]}},
        {"method": [{"class_path": "stranger.Method"}]},
        {"method": "stranger"},
        {"encoder": {"class_path": "stranger.Method"}},
        {"encoder": {"name": {"class_path": "stranger.Method"}}},
        {"cld": {"class_path": "stranger.Method", "init_args": {}}},
        {"views": {"class_path": "stranger.Method"}},
        {"crops": {"class_path": "stranger.Method"}},
        {"epochs": {"class_path": "stranger.Method"}},
        {"watch": {"class_path": "stranger.Method"}},
        {"method": {"class_path": "MoCo", "__path__": "stranger"}},
        {"__default_config__": "stranger.py"},
    ],
)
def test_no_other_setting_of_a_file_names_a_class(scene, way, tree, capsys):
    refused(*ways(scene, tree)[way], capsys)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch {c}']",
        "method: !!python/name:stranger.Method",
        "method: !!python/object/new:stranger.Method []",
        "method: !!python/module:stranger",
        "seed: !!python/object/apply:os.system ['touch {c}']",
        "epochs: ${oc.create:os.system}",
        "epochs: ${oc.env:HOME}",
        "seed: '{{ cycler.__init__ }}'",
        "default_config_files: [stranger.py]",
        "config: other.yaml",
        "method: other.yaml",
        "encoder: other.yaml",
        "cld: other.yaml",
        "method: {class_path: MoCo, init_args: other.yaml}",
    ],
)
@pytest.mark.parametrize("way", ["config", "resume", "tune"])
def test_no_yaml_text_runs_code(scene, way, text, capsys):
    """Tags, interpolation, and files that a file names."""
    function, line = ways(scene, {})[way]
    evil = "{class_path: stranger.Method}\n" if ":" in text else ""
    (scene.folder / "other.yaml").write_text(f"method: {evil}class_path: stranger.Method\n")
    scene.before.add("other.yaml")
    for file in ("config.yaml", "r/config.yaml"):
        (scene.folder / file).write_text(text.replace("{c}", str(scene.canary)))
    refused(function, line, capsys)


def test_no_part_is_read_from_a_file_that_names_a_class(scene, capsys):
    """A file that is given for a part of the settings, and an option that is cut short."""
    (scene.folder / "config.yaml").write_text("class_path: stranger.Method\n")
    for option in ("--method", "--encoder", "--cld", "--views", "--crops"):
        refused(train, ["photos", option, "config.yaml", *TINY], capsys)
    (scene.folder / "config.yaml").write_text("method:\n  class_path: stranger.Method\n")
    refused(train, ["photos", "--conf", "config.yaml", *TINY], capsys)
    for name in ("embed", "export", "inspect", "pack", "subset"):
        command = getattr(__import__(f"crosslevel.{name}", fromlist=[name]), name)
        refused(command, ["photos", "photos", "--config", "config.yaml"][0 if name == "embed" else 1 :], capsys)
    refused(evaluate, ["r", "photos", "--config", "config.yaml"], capsys)


def test_no_variable_of_the_environment_names_a_class(scene, capsys, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    monkeypatch.setenv("CROSSLEVEL_TRAIN_METHOD", "{class_path: stranger.Method}")
    monkeypatch.setenv("CROSSLEVEL_TRAIN__METHOD", "{class_path: stranger.Method}")
    with pytest.raises(SystemExit):
        run(train, ["photos", *TINY, "--print_config"])
    assert "stranger" not in capsys.readouterr().out


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A user's own method, in a module that another one passes on."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("from mine.impl import Own\n")
    (tmp_path / "mine" / "impl.py").write_text(
        "from crosslevel.methods import SimCLR\n"
        "class Own(SimCLR):\n"
        "    def __init__(self, encoder, images, temperature: float = 0.3, stop_after: int = 0):\n"
        "        super().__init__(encoder, images, temperature=temperature)\n"
        "        self.stop_after = stop_after\n"
        "def function(encoder, images) -> SimCLR: return SimCLR(encoder, images)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_method_of_the_users_own_is_trained_and_resumed(scene, own, capsys):
    """By the command line; its run is resumed only by a command line that names it, and is told so in one line."""
    scene.before.add("mine")
    run(train, ["photos", "--method", "mine.Own", "--method.temperature=0.4", *TINY, "--run=r"])
    assert "mine.impl.Own" in (scene.folder / "r" / "config.yaml").read_text()
    said = refused(train, ["--resume=r", "--epochs=2"], capsys)
    assert "add --method mine.impl.Own if you trust it" in said
    for name in ("mine.impl.Own", "mine.Own"):
        run(train, ["--resume=r", "--method", name, "--epochs=2", *TINY[:3]])
    rows = (scene.folder / "r" / "metrics.csv").read_text().splitlines()
    assert rows[-1].startswith("4,")


@pytest.mark.parametrize("name", ["os.system", "mine.function", "mine.impl.function", "mine.absent", "absent.Own"])
def test_the_command_line_names_methods_only(scene, own, name, capsys):
    scene.before.add("mine")
    said = refused(train, ["photos", "--method", name, "--method.command=touch CANARY", *TINY, "--run=r"], capsys)
    assert f"method='{name}'" in said


def test_a_search_trains_a_method_of_the_users_own(scene, own, capsys, monkeypatch):
    """Its trials are processes of their own, which read the settings from a file that the search writes."""
    pytest.importorskip("optuna")
    from crosslevel.tune import tune

    scene.before.add("mine")
    for i in range(64):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(scene.folder / "photos" / f"n{i}.png")
    monkeypatch.setenv("PYTHONPATH", f"{scene.folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    options = [o for o in TINY if "monitor" not in o and "report" not in o]
    run(
        tune,
        ["photos", "--method=mine.Own", *options, "--search=lr=0.01:0.1", "--trials=1", "--finalists=0", "-o", "t"],
    )
    best = yaml.safe_load((scene.folder / "t" / "config.yaml").read_text())
    assert best["method"]["class_path"] in ("mine.Own", "mine.impl.Own")


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
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"is not read: it asks for posix\.system"):
        warnings.simplefilter("error")  # one line, and no advice of PyTorch before it
        load_tensors(file)


def test_no_run_folder_runs_code(scene, trained, capsys):
    """Pickles in the place of its tensors, and a config.yaml with classes and tags."""
    import shutil

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
        source = image_sources.open(f"{scene.folder}/r/x.parquet")
        assert len(source) == 3
        assert source[1][0].shape == (3, 16, 16)
    pq.write_table(pa.table({"image": [evil] * 3}), scene.folder / "r" / "x.parquet")
    with pytest.raises(Exception, match=r"x\.parquet"):
        _ = image_sources.open(f"{scene.folder}/r/x.parquet")[0]


@pytest.mark.parametrize("content", ["pickle", "npy", "torch"])
def test_no_index_and_no_pack_runs_code(scene, content, monkeypatch):
    """Each file of a pack and of the cache in turn is a stranger's: it is refused or made anew, never run."""
    from crosslevel.pack import pack

    monkeypatch.setenv("CROSSLEVEL_CACHE", str(scene.folder / "r"))
    scene.before.add("packed")
    pack(str(scene.folder / "photos"), str(scene.folder / "packed"), workers=0)
    image_sources.open(str(scene.folder / "packed"))
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
            source = image_sources.open(str(scene.folder / "packed"))
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
    with pytest.raises(SourceError, match=r"is not read: give https|no such folder, file or data set"):
        image_sources.open(address.replace("{v}", str(scene.victim)), streams=True)


def test_an_encoder_of_any_name_is_built_from_timms_list_alone(scene):
    for name in ("hf-hub:stranger/model", "local-dir:r", "stranger.Method", "os.system"):
        with pytest.raises(ValueError, match="is not a timm model"):
            Encoder(name)
