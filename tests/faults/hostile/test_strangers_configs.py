"""What a stranger's config, run or search names is not run and not imported; what the command line names is."""

import os
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from strangers import TINY, ended, refused

from crosslevel.cli import COMMANDS
from crosslevel.evaluation.evaluate import evaluate
from crosslevel.settings import recipes
from crosslevel.settings.parser import run
from crosslevel.training.train import train
from crosslevel.tuning import trial
from crosslevel.tuning.tune import tune

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
    "crosslevel.settings.trust.set_parsing_settings": {"import_path_allowlist": ["os.system"]},
    "crosslevel.training.train.os.system": {"command": "touch {c}"},
    "crosslevel.methods.os.system": {"command": "touch {c}"},
    "crosslevel.methods.base.Method": {},
    "jsonargparse.set_parsing_settings": {"import_path_allowlist": ["os.system"]},
    "torch.nn.Linear": {"in_features": 1, "out_features": 1},
}


WAYS = ["config", "resume", "recipe", "tune", "tune's recipe", "a trial's settings"]


@pytest.fixture(autouse=True)
def _recipes(scene, monkeypatch):
    """The folder of recipes holds what a stranger put there."""
    (scene.folder / "recipes" / "cifar10").mkdir(parents=True)
    scene.before.add("recipes")
    monkeypatch.setattr(recipes, "files", lambda package: scene.folder / "recipes")


def put(scene, text):
    """Write ``text`` in the place of each file that settings are read from."""
    (scene.folder / "r").mkdir(exist_ok=True)
    head = "# A stranger's\n# Published: nothing\n# Settings: his\n"
    for file in ("config.yaml", "r/config.yaml", "recipes/cifar10/cifar10-his.yaml"):
        (scene.folder / file).write_text(head + text)


def ways(scene):
    """What reads settings from a file that `put` writes."""
    photos, config = str(scene.folder / "photos"), str(scene.folder / "config.yaml")
    searching = [*TINY, "-o", "t", "--trials=1"]
    return {
        "config": partial(run, train, [photos, "--config", config, *TINY, "--run=r"]),
        "resume": partial(run, train, [photos, "--resume=r", *TINY]),
        "recipe": partial(run, train, [photos, "--recipe=cifar10-his", *TINY, "--run=r"]),
        "tune": partial(run, tune, [photos, f"--config={config}", *searching]),
        "tune's recipe": partial(run, tune, [photos, "--recipe=cifar10-his", *searching]),
        "a trial's settings": partial(trial.trained, photos, Path(config), Path("r"), TINY, trial.Channel(None, None)),
    }


def laid(scene, tree):
    """The same for a tree of settings."""
    put(scene, yaml.safe_dump(tree))
    return ways(scene)


def test_there_are_as_many_callables_as_were_measured():
    assert len(CALLABLES) >= 46


@pytest.mark.parametrize("way", WAYS)
def test_no_callable_of_a_file_is_run_or_imported(scene, way, capsys):
    """Each is refused by its name in one line, and no module is imported for it."""
    for name, arguments in CALLABLES.items():
        for form in ({"class_path": name, "init_args": scene.filled(arguments)}, name)[: 2 if way == "config" else 1]:
            if form == "stranger":
                continue  # a method's short name, which is said to be unknown: see below
            before = set(sys.modules)
            said = ended(laid(scene, {"method": form})[way], capsys)
            assert repr(name) in said, (name, said)
            imported = {name.rpartition(".")[0]} & (set(sys.modules) - before)
            assert not imported, name
            scene.untouched()


@pytest.mark.parametrize("way", WAYS)
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
    ended(laid(scene, tree)[way], capsys)


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
@pytest.mark.parametrize("way", WAYS)
def test_no_yaml_text_runs_code(scene, way, text, capsys):
    """Tags, interpolation, and files that a file names."""
    evil = "{class_path: stranger.Method}\n" if ":" in text else ""
    (scene.folder / "other.yaml").write_text(f"method: {evil}class_path: stranger.Method\n")
    scene.before.add("other.yaml")
    put(scene, text.replace("{c}", str(scene.canary)))
    ended(ways(scene)[way], capsys)


@pytest.mark.parametrize("name", ["os.system", "stranger.Method", "../config", "/etc/passwd", "config.yaml"])
def test_a_recipe_is_named_and_is_no_file_and_no_callable(scene, name, capsys):
    put(scene, "method: stranger.Method\n")
    for verb, more in ((train, ["--run=r"]), (tune, ["-o", "t"])):
        said = refused(verb, ["photos", f"--recipe={name}", *TINY, *more], capsys)
        assert f"recipe={name!r} is unknown" in said


def test_no_part_is_read_from_a_file_that_names_a_class(scene, capsys):
    """A file that is given for a part of the settings, and an option that is cut short."""
    (scene.folder / "config.yaml").write_text("class_path: stranger.Method\n")
    for option in ("--method", "--encoder", "--cld", "--views", "--crops"):
        refused(train, ["photos", option, "config.yaml", *TINY], capsys)
    (scene.folder / "config.yaml").write_text("method:\n  class_path: stranger.Method\n")
    refused(train, ["photos", "--conf", "config.yaml", *TINY], capsys)
    for name in ("embed", "export", "inspect", "pack", "subset"):
        command = getattr(import_module(COMMANDS[name][0]), name)
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


@pytest.mark.slow
def test_a_search_trains_a_method_of_the_users_own(scene, own, capsys, monkeypatch):
    """Its trials are processes of their own, which read the settings from a file that the search writes."""
    pytest.importorskip("optuna")
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
