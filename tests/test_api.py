"""The verbs from Python: the names, defaults and errors of the command line, and returned values in place of exits."""

import copy
import inspect
import os
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from run_samples import write_images
from table_samples import noise_pictures, write_table

import crosslevel
from crosslevel.cld.loss import CrossLevel
from crosslevel.cli import COMMANDS, main
from crosslevel.methods import SimCLR
from crosslevel.models.encoder import Encoder
from crosslevel.settings.command import Command
from crosslevel.settings.kinds import describe, plain
from crosslevel.settings.parser import prepared, read_line, run, settings_of
from crosslevel.settings.parts import completed
from crosslevel.settings.signature import REQUIRED, Group
from crosslevel.training.train import train
from crosslevel.transforms.views import Views
from crosslevel.tuning.tune import tune
from crosslevel.utils.errors import UserError

SMALL = {"epochs": 1, "batch_size": 8, "device": "cpu", "report_html": False, "monitor_every": 0, "workers": 0}
PARTS = {"encoder": {"width": 0.0625}, "views": {"size": 16}, "cld": {"groups": 4}}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("photos"), count=16, size=(16, 16))


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "api"
    return crosslevel.train(photos, method="simclr", run=folder, quiet=True, **SMALL, **PARTS)


def test_a_run_of_python_is_that_of_the_command_line(photos, trained, tmp_path, capsys):
    """The seed too: the same weights, and the same settings in config.yaml."""
    line = [str(photos), "--method=SimCLR", f"--run={tmp_path}/r", "--encoder.width=0.0625", "--views.size=16"]
    line += ["--cld.groups=4", *(f"--{name}={value}".lower() for name, value in SMALL.items())]
    run(train, line)
    theirs, ours = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (tmp_path / "r", trained))
    assert theirs == ours
    for name in ("encoder", "cld", "instance"):
        file = f"{name}.safetensors"
        assert (tmp_path / "r" / file).read_bytes() == (trained / file).read_bytes()
    capsys.readouterr()


@pytest.mark.parametrize(
    "parts",
    [
        {"encoder": partial(Encoder, width=0.0625), "method": partial(SimCLR, temperature=0.4)},
        {
            "encoder": partial(Encoder, width=0.0625),
            "method": {"class_path": "SimCLR", "init_args": {"temperature": 0.4}},
        },
    ],
)
def test_a_part_is_given_in_any_form(photos, tmp_path, parts, capsys, caplog):
    folder = crosslevel.train(photos, run=tmp_path / "r", quiet=True, **SMALL, **{**PARTS, **parts})
    told = yaml.safe_load((folder / "config.yaml").read_text())
    assert (told["encoder"]["width"], told["method"]["init_args"]["temperature"]) == (0.0625, 0.4)
    assert (*capsys.readouterr(), caplog.records) == ("", "", [])  # as quiet=True has it


def test_what_is_handed_in_stays_as_it_is(photos, tmp_path):
    """A training works on copies: weights, buffers, and what it sets on its own."""
    handed = {"encoder": Encoder(width=0.0625), "cld": CrossLevel(32, groups=4), "views": Views("cifar", 16)}
    before = {name: copy.deepcopy(part) for name, part in handed.items()}
    crosslevel.train(photos, run=tmp_path / "r", quiet=True, method="moco", **SMALL, **handed)
    for name, part in handed.items():
        state, unchanged = part.state_dict(), before[name].state_dict()
        assert all(torch.equal(value, unchanged[key]) for key, value in state.items()), name
        simple = [key for key, value in vars(part).items() if isinstance(value, int | float | str | tuple | None)]
        assert {key: vars(part)[key] for key in simple} == {key: vars(before[name])[key] for key in simple}, name


@pytest.mark.parametrize(
    ("verb", "arguments", "what"),
    [
        ("train", {"seed": "many"}, "seed='many': needs a whole number"),
        ("train", {"method": "simcrl"}, "did you mean SimCLR"),
        ("train", {"encoder": {"widht": 1}}, "encoder has no setting 'widht': did you mean width"),
        ("train", {"encoder": {"width": "wide"}}, "encoder.width='wide': needs a number"),
        ("train", {"method": {"class_path": "SimCLR", "init_args": {"queue": 3}}}, "method has no setting 'queue'"),
        (
            "train",
            {"optimizer": "adam"},
            "optimizer='adam': needs one of sgd, adamw, lars .or none.: did you mean adamw",
        ),
        ("pack", {"crops": {"margn": 1}}, "crops has no setting 'margn': did you mean margin"),
        ("embed", {"run": "nowhere"}, "nowhere"),
    ],
)
def test_errors_are_those_of_the_command_line(photos, tmp_path, monkeypatch, verb, arguments, what):
    monkeypatch.chdir(tmp_path)
    given = {"images": photos, **({"run": "r"} if verb == "embed" else {}), **arguments}
    with pytest.raises(UserError, match=what):
        getattr(crosslevel, verb)(**given)
    assert not list(tmp_path.iterdir())


def test_a_search_takes_the_settings_of_train_as_arguments_of_its_own(photos):
    """The same tree as on the command line, and the same errors."""
    command = Command.of("crosslevel.tuning.tune", "tune")
    line = [str(photos), "--budget=3", "--epochs=2", "--method=MoCo", "--method.queue=64", "--encoder.width=0.5"]
    settings = prepared(command, line)
    theirs = {argument.name: plain(settings[argument.name]) for argument in command.inherited}
    method = {"class_path": "MoCo", "init_args": {"queue": 64}}
    ours = completed(tune, (photos,), {"budget": 3, "epochs": 2, "method": method, "encoder": {"width": 0.5}})
    assert ours.pop("settings") == theirs
    assert ours == {"images": str(photos), "budget": 3}
    with pytest.raises(UserError, match="epochs: many: needs a number"):
        crosslevel.tune(photos, epochs="many")
    with pytest.raises(UserError, match="encoder has no setting 'widht': did you mean width"):
        crosslevel.tune(photos, encoder={"widht": 1})


def test_an_argument_that_there_is_not_is_pythons_error(photos):
    with pytest.raises(TypeError, match="epohcs"):
        crosslevel.train(photos, epohcs=3)


def test_nothing_is_printed_by_a_quiet_verb(photos, trained, tmp_path, capsys):
    crosslevel.pack(photos, output=tmp_path / "packed", size=16, quiet=True, workers=0)
    crosslevel.inspect(photos, device="cpu", quiet=True, workers=0)
    crosslevel.subset(photos, output=tmp_path / "s.txt", quiet=True)
    crosslevel.export(trained, quiet=True)
    table = crosslevel.embed(trained, photos, device="cpu", quiet=True)
    figures = crosslevel.evaluate(trained, photos, test=photos, k=3, device="cpu", quiet=True, workers=0)
    assert capsys.readouterr() == ("", "")
    assert table.features.shape == (32, 32)
    assert np.isfinite(table.features).all()
    assert 0 <= figures["kNN, k = 3, T = 0.1"]["trained encoder"]["top1"] <= 100


def test_every_verb_is_there_but_those_that_only_show_something():
    assert set(COMMANDS) - {"demo", "recipes"} <= set(crosslevel.__all__) <= set(dir(crosslevel))


def line_of(verb, trained, photos, home):
    """A small call of a verb that prints its end; what it needs is made."""
    table = write_table(home / "f.parquet", np.eye(8), [f"cat/{i:03}.png" for i in range(8)], noise_pictures(8))
    lines = {
        "train": [photos, f"--run={home}/r", "--encoder.width=0.0625", "--views.size=16", "--epochs=1",
                  "--device=cpu", "--report_html=false", "--monitor_every=0", "--workers=0", "--batch_size=8"],
        "evaluate": [trained, photos, "--test", photos, "--device=cpu", "--workers=0", "-k=3"],
        "compare": [trained, home / "copy", "-o", home / "table"],
        "inspect": [photos, "-o", home / "inspect", "--device=cpu", "--workers=0"],
        "recipes": [],
        "export": [trained, "-o", home / "weights.pth"],
        "push": [home / "whole", "hf:me/tiny", "-o", home / "card"],
        "pack": [photos, "-o", home / "packed", "--workers=0"],
        "embed": [trained, photos, "-o", home / "e.parquet", "--device=cpu"],
        "search": [table, "cat/003.png"],
        "explore": [table, "--export", home / "page"],
        "curate": [table, "-n=3", "-o", home / "part.txt"],
        "classify": [trained, photos, photos, "-o", home / "labels.parquet", "--device=cpu"],
        "subset": [photos, "-o", home / "s.txt"],
    }  # fmt: skip
    if verb == "compare":
        crosslevel.evaluate(trained, photos, test=photos, k=3, device="cpu", quiet=True, workers=0)
        shutil.copytree(trained, home / "copy")
    elif verb == "push":
        (home / "whole").mkdir()
        Encoder("resnet18", small_images=False).save(home / "whole" / "encoder.safetensors")
    return [verb, *map(str, lines[verb])]


@pytest.mark.parametrize("verb", [verb for verb in COMMANDS if verb != "demo"])  # which test_demo has run
def test_every_verb_ends_with_what_comes_next(verb, trained, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda fallback=(): os.terminal_size((80, 24)))
    if verb == "tune":
        pytest.importorskip("optuna", reason="needs optuna: pip install 'crosslevel[tune]'")
        scores = {"combined": 0.5, "effective_rank": 5.0, "mrr": 0.5}
        line = ["--trials=1", "--epochs=1", "--batch_size=4", "--encoder.width=0.0625", "--views.size=16"]
        line += ["--device=cpu", f"--output={tmp_path}/search"]
        run(
            tune,
            [str(write_images(tmp_path / "more", count=40)), *line],
            training=lambda *given: (each for each in [scores]),
        )
    else:
        main(line_of(verb, trained, photos, tmp_path))
    end = capsys.readouterr().out.rstrip().splitlines()[-4:]
    assert any("next:" in line for line in end), end


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_command_line_reads_every_signature_whole(verb):
    """Each setting has a kind and a line of help, and the default that the function has."""
    module = __import__(COMMANDS[verb][0], fromlist=[verb])
    command, parameters = Command.of(COMMANDS[verb][0], verb), inspect.signature(getattr(module, verb)).parameters
    for name, option in command.options.items():
        assert option.help, name
        assert "any" not in option.kind or name == "encoder.arguments", name  # whatever timm takes
        assert describe(option.kind), name
        if name in parameters:
            default = parameters[name].default
            assert option.default == (REQUIRED if default is inspect.Parameter.empty else default), name
    for part in command.arguments:
        if isinstance(part, Group):
            kind = getattr(__import__(part.made_of[0], fromlist=["x"]), part.made_of[1])
            own = inspect.signature(kind).parameters
            assert {o.name for o in part.options} == set(own) - {"in_features"}
            default = parameters[part.name].default if part.name in parameters else None
            for option in part.options:
                given = (
                    getattr(default, option.name, own[option.name].default)
                    if not callable(default)
                    else own[option.name].default
                )
                assert option.default == given, option.name


def test_defaults_that_differ_on_the_command_line_are_marked():
    command = Command.of("crosslevel.features.embed", "embed")
    assert settings_of(command, read_line(command, ["r", "photos"]))["output"] == "features.parquet"


def test_several_devices_are_the_commands(photos, tmp_path):
    with pytest.raises(UserError, match="run crosslevel train IMAGES --devices 2"):
        crosslevel.train(photos, run=tmp_path / "r", devices=2, **SMALL)
    assert not list(tmp_path.iterdir())
