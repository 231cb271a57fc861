"""A function's signature is its command line."""

import re
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from crosslevel import cli
from crosslevel.settings.command import Command
from crosslevel.settings.help import of_command
from crosslevel.settings.parser import run
from crosslevel.settings.trust import method_class
from crosslevel.training.train import train
from crosslevel.utils.errors import NotFinite, UserError

ITS_OWN = {
    "temperature": 0.1, "temperature_max": None, "temperature_period": None, "head": "mlp", "out_features": 128,
    "hidden": None, "batch_norm": True,
}  # fmt: skip
"""SimCLR's settings where none are given."""


def test_every_setting_of_every_part_is_an_option():
    text = of_command(Command.of_function(train), "all")
    for option in ("--epochs", "--encoder.small_images", "--cld.groups", "--views.blur", "--method", "--resume"):
        assert option in text
    assert "passes over the images" in text
    assert "--cld.in_features" not in text


@pytest.mark.parametrize("name", ["MoCo", "moco", "MOCO"])
def test_a_method_is_found_in_any_case(name):
    assert method_class(name) == "crosslevel.methods.moco.MoCo"


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean NPID"):
        method_class("npd")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"class": "SimCLR", "temperature": 0.1}),
        (["--method.temperature", "0.3"], {"class": "SimCLR", "temperature": 0.3}),
        (["--method", "moco"], {"class": "MoCo", "temperature": 0.2}),
        (["--method=npid"], {"class": "NPID", "temperature": 0.1}),
        (["--method", "simclr", "--method.temperature=0.4"], {"class": "SimCLR", "temperature": 0.4}),
    ],
)
def test_a_method_has_its_own_defaults(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        run(train, ["photos", *arguments, "--print_config"])
    assert stop.value.code == 0
    method = yaml.safe_load(capsys.readouterr().out)["method"]
    assert method["class_path"].rsplit(".", 1)[1] == expected["class"]
    assert method["init_args"]["temperature"] == expected["temperature"]


def test_a_config_with_another_method_does_not_inherit_the_default_ones_settings(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("method:\n  class_path: crosslevel.methods.NPID\n")
    with pytest.raises(SystemExit):
        run(train, ["photos", f"--config={tmp_path}/c.yaml", "--print_config"])
    told = yaml.safe_load(capsys.readouterr().out)["method"]["init_args"]
    assert told["temperature"] == 0.1
    assert "batch_norm" not in told


@pytest.mark.parametrize("source", ["--recipe=cifar10-moco-cld", "--config={c}"])
@pytest.mark.parametrize("named", [["--method", "simclr"], ["--method=crosslevel.methods.SimCLR"]])
def test_another_method_does_not_inherit_a_configs_settings(tmp_path, source, named, capsys):
    """Neither temperature nor head of the config's MoCo; what is not the method's stays."""
    (tmp_path / "c.yaml").write_text("method:\n  class_path: moco\n  init_args: {temperature: 0.07, head: linear}\n")
    given = source.format(c=tmp_path / "c.yaml")
    told = resolved(["photos", given, *named, "--method.out_features=64"], capsys)
    assert told["method"]["class_path"].endswith("SimCLR")
    assert told["method"]["init_args"] == {**ITS_OWN, "out_features": 64}
    assert told["weight_decay"] == (0.0008 if "recipe" in source else None)
    same = resolved(["photos", given, "--method=moco"], capsys)["method"]["init_args"]
    assert (same["temperature"], same["head"]) == (0.07, "linear")


def test_of_several_methods_the_last_one_counts(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("method:\n  class_path: NPID\n")
    told = resolved(["photos", "--recipe=cifar10-moco-cld", f"--config={tmp_path}/c.yaml"], capsys)["method"]
    assert (told["class_path"].rsplit(".", 1)[1], told["init_args"]["temperature"]) == ("NPID", 0.1)
    assert told["init_args"]["online"] == 1
    told = resolved(["photos", "--method=simclr", f"--config={tmp_path}/c.yaml"], capsys)["method"]
    assert (told["class_path"].rsplit(".", 1)[1], told["init_args"]["temperature"]) == ("NPID", 0.1)


@pytest.mark.parametrize(
    "text",
    ["method: simclr", "method:\n  class_path: SIMCLR\n", "method: {class_path: crosslevel.methods.simclr.simclr}"],
)
def test_a_config_names_a_method_as_the_command_line_does(tmp_path, text, capsys):
    (tmp_path / "c.yaml").write_text(f"{text}\nweight_decay: 1e-6\n".replace("\n\n", "\n"))
    told = resolved(["photos", f"--config={tmp_path}/c.yaml", "--method.hidden=7"], capsys)
    assert told["method"]["class_path"].endswith(".SimCLR")
    assert told["method"]["init_args"] == {**ITS_OWN, "hidden": 7}
    assert told["weight_decay"] == 1e-6


@pytest.mark.parametrize(
    "text", ["method: simcrl", "method: {class_path: simcrl}", "method: {class_path: crosslevel.methods.SimCRL}"]
)
def test_a_configs_unknown_method_names_the_nearest(tmp_path, text, capsys):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        run(train, ["photos", f"--config={tmp_path}/c.yaml"])
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1)
    assert "is unknown: did you mean SimCLR?" in said


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        (["--epohcs", "2"], "did you mean --epochs?"),
        (["--cld.wieght=3"], "did you mean --cld.weight?"),
        (["--zzzz=1"], "there is no option --zzzz=1\n"),
    ],
)
def test_an_option_that_there_is_not_names_the_nearest(option, hint, capsys):
    with pytest.raises(SystemExit) as stop:
        run(train, ["photos", *option])
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1)
    assert hint in said


def test_the_overview_and_the_version(capsys):
    cli.main(["--help"])
    said = capsys.readouterr().out
    assert all(verb in said for verb in ("train", "evaluate", "embed", "demo"))
    cli.main(["--version"])
    assert capsys.readouterr().out == f"crosslevel {version('crosslevel')}\n"


def test_an_unknown_command_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["trian"])
    assert stop.value.code == 2
    assert "trian" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "evaluate", "embed", "demo"])
def test_every_command_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    assert f"usage: crosslevel {verb}" in capsys.readouterr().out


def test_the_installed_command_answers():
    out = subprocess.run(
        [sys.executable, "-c", "from crosslevel.cli import main; main(['embed'])"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 2
    assert out.stderr.count("\n") == 1
    assert "RUN is missing" in out.stderr


def resolved(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        run(train, [*arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("spelling", [["--data-root=d"], ["--data-root", "d"], ["--data_root", "d"]])
def test_an_option_may_be_written_with_dashes(spelling, capsys):
    assert resolved(["cifar10", *spelling], capsys)["data_root"] == "d"


def test_a_value_keeps_its_dashes(capsys):
    assert resolved(["photos", "--cld.grouping=normalized-cut"], capsys)["cld"]["grouping"] == "normalized-cut"
    assert resolved(["photos", "--cld.head", "norm-mlp"], capsys)["cld"]["head"] == "norm-mlp"


def echo(images: str, epochs: int = 1, resume: str | None = None) -> tuple[str, int]:
    """Show what arrives."""
    return images, epochs


@pytest.mark.parametrize(
    ("arguments", "images"),
    [
        (["--config", "{c}"], "here"),
        (["--config={c}", "--epochs", "3"], "here"),
        (["--config={c}", "there"], "there"),
        (["there", "--config={c}"], "there"),
        (["--resume={d}"], "here"),
        (["there", "--resume", "{d}"], "there"),
        (["--epochs", "3", "there", "--resume", "{d}"], "there"),
    ],
)
def test_a_config_names_the_images_unless_the_command_line_does(tmp_path, arguments, images):
    (tmp_path / "config.yaml").write_text("images: here\nepochs: 2\n")
    given = [a.format(c=tmp_path / "config.yaml", d=tmp_path) for a in arguments]
    assert run(echo, given) == (images, 3 if "3" in given else 2)


def test_a_warning_is_one_line_without_its_place_in_the_code(monkeypatch, capsys):
    def careless(images: str) -> None:
        """Warn."""
        warnings.warn(f"{images}: its\nlabels are left out", stacklevel=1)

    def shown(*told):
        print(warnings.formatwarning(*told), end="", file=sys.stderr)

    before = warnings.formatwarning
    monkeypatch.setattr(warnings, "showwarning", shown)  # pytest's own would only record
    run(careless, ["photos"])
    assert capsys.readouterr().err == "crosslevel careless: warning: photos: its labels are left out\n"
    assert warnings.formatwarning is before


def test_ctrl_c_ends_in_one_line(capsys):
    def interrupted(images: str) -> None:
        """Wait for ever."""
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run(interrupted, ["photos"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "crosslevel interrupted: stopped\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["train", "photos", "--epochs", "abc"], "--epochs abc: needs a number"),
        (["train", "photos", "--batch-size", "abc"], "--batch_size abc: needs a whole number"),
        (["train", "photos", "--seed=1.5"], "--seed 1.5: needs a whole number"),
        (["train", "photos", "--lr=fast"], "--lr fast: needs a number"),
        (["train", "photos", "--report_html=maybe"], "there is no argument after IMAGES: 'maybe' is one too many"),
        (["train", "photos", "--views.scale=[0.1]"], "--views.scale [0.1]: needs [a number, a number]"),
        (["train", "photos", "--optimizer", "adam"], "needs one of sgd, adamw, lars (or none): did you mean adamw?"),
        (["train", "photos", "--method=moco", "--method.queue=many"], "--method.queue many: needs a whole number"),
        (["train", "photos", "--method=simclr", "--method.queue=3"], "SimCLR has no setting 'queue': there are temp"),
        (["train", "photos", "--epochs"], "--epochs: give a value"),
        (["train"], "IMAGES is missing: a folder, a .txt list of files"),
        (["train", "photos", "more"], "there is no argument after IMAGES: 'more' is one too many"),
        (["train", "photos", "--range", "-5:x"], "range=-5:x: needs the smallest and the largest value"),
        (["train", "--help", "encodr"], "did you mean encoder?"),
        (["export", "run", "--format", "tflite"], "tflite: needs one of torchvision, timm, detectron2, onnx"),
        (["evaluate", "r", "i", "--linear.lrs=[1,x]"], "--linear.lrs [1,x]: needs a number"),
        (["train", "photos", "--lr="], "--lr is empty: needs a number"),
        (["train", "photos", "--method=moco", "--method.queue="], "--method.queue is empty: needs a whole number"),
        (["train", "photos", "--device", "gpu"], "--device gpu: needs one of auto, cpu, cuda, mps: did you mean cuda?"),
        (["train", "photos", "--config", "nope/x.yaml"], "--config nope/x.yaml: there is no such file\n"),
        (["train", "photos", "--config", "/"], "--config /: this is a folder: give a YAML file"),
        (["version"], "there is no command 'version': did you mean --version?"),
        (["-v"], "there is no command '-v': did you mean --version?"),
        (["complete"], "did you mean completion?"),
        (["xyzzy"], "subset, completion, --version, --help"),
    ],
)
def test_errors_are_in_the_users_words(line, said, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(line)
    shown = capsys.readouterr().err
    assert (stop.value.code, shown.count("\n")) == (2, 1), shown
    assert said in shown
    assert "class '" not in shown


def test_a_verb_that_there_is_not_names_the_nearest(capsys):
    with pytest.raises(SystemExit):
        cli.main(["trian"])
    assert "did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (UserError("photos: nothing here"), 2, 1),
        (NotFinite("the loss is nan"), 1, 1),
        (OSError(28, "No space left on device"), 2, 1),
        (ValueError("of another library"), 70, 4),
        (RuntimeError("of another library"), 70, 4),
        (ImportError("broken"), 70, 4),
    ],
)
def test_only_what_the_user_can_mend_is_one_line(error, status, lines, capsys):
    def failing(images: str) -> None:
        """Fail."""
        raise error

    with pytest.raises(SystemExit) as stop:
        run(failing, ["photos"])
    said = capsys.readouterr().err
    assert stop.value.code == status
    assert str(error) in said
    assert (said.count("\n") == 1) == (lines == 1), said
    assert ("Traceback" in said) == ("fault of Crosslevel's" in said) == (status == 70)


def test_our_code_raises_nothing_that_would_pass_for_a_fault():
    """An error for the user is a UserError or one of its kinds: any other ValueError ends in a traceback."""
    root = Path(cli.__file__).parent
    wrong = re.compile(r"^\s*raise (ValueError|FileNotFoundError|ImportError|ModuleNotFoundError)\(", re.MULTILINE)
    assert [str(file) for file in root.rglob("*.py") if wrong.search(file.read_text(encoding="utf-8"))] == []


def test_the_order_of_files_and_options_counts(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("epochs: 7\nviews: {size: 24}\n")
    given = [f"--config={tmp_path}/c.yaml", "--epochs=3"]
    assert resolved(["photos", *given], capsys)["epochs"] == 3
    assert resolved(["photos", *reversed(given)], capsys)["epochs"] == 7
    assert resolved(["photos", *given, "--views.flip=0.1"], capsys)["views"]["size"] == 24


@pytest.mark.parametrize(
    ("line", "crops"),
    [([], None), (["--crops"], 0.1), (["--crops=true"], 0.1), (["--crops", "photos"], 0.1),
     (["--crops.margin=0.3"], 0.3),
     (["--crops", "--crops=false"], None), (["--crops={margin: 0.2}"], 0.2)],
)  # fmt: skip
def test_crops_alone_takes_the_usual_settings(line, crops, capsys):
    told = resolved([*line] if "photos" in line else ["photos", *line], capsys)
    assert told["images"] == "photos"
    assert (told["crops"] and told["crops"]["margin"]) == crops


@pytest.mark.parametrize(
    "line",
    [
        ("subset", "turntable", "--output=s3://bucket/subset.txt"),
        ("embed", "runs/photos", "turntable", "--output=s3://bucket/f.parquet"),
        ("tune", "turntable", "--output=gs://bucket/tuned"),
    ],
)
def test_outputs_of_most_verbs_are_no_addresses(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(line))
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert "is to lie on this machine: give a folder" in told
    assert told.count("\n") == 1
