"""What the command line says of itself: help, what a shell completes, and the nearest file of settings."""

import shutil
import subprocess

import pytest

from crosslevel import cli
from crosslevel.methods import SimCLR
from crosslevel.settings.signature import methods, of_method


def test_help_shows_fifteen_options_and_all_of_them_where_asked(capsys):
    def options(*topic):
        with pytest.raises(SystemExit):
            cli.main(["train", "photos", "--help", *topic])
        said = capsys.readouterr().out
        assert not any(word in said for word in ("Optional[", "Callable", "lambda", "<class"))
        return [line.split()[0] for line in said.splitlines() if line.startswith("  --")]

    assert len(options()) == 15
    everything = options("all")
    assert len(everything) > 60
    assert set(options()) - {"--method"} < set(everything) | {"--method"}
    assert all(name.startswith("--views.") for name in options("views"))


@pytest.mark.parametrize(
    "line", [["train", "photos", "--method.help", "MoCo"], ["train", "--method.help=moco", "photos"]]
)
def test_a_methods_settings_are_listed_with_images_given(line, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(line)
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--method.queue N" in said
    assert "(default: mlp)" in said


@pytest.mark.parametrize("path", [*methods().values(), f"{__name__}.Narrow"])
def test_every_setting_of_a_method_is_described(path):
    """By its own docstring, or by that of the class that it is made from."""
    assert not [option.name for option in of_method(path) if not option.help]


class Narrow(SimCLR):
    def __init__(self, encoder, images=None, *, head="linear", temperature_max=None, out_features=8):
        """A method of a user's.

        Args:
            out_features: few of them.

        """


def test_a_methods_own_words_count_more():
    said = {option.name: option.help for option in of_method(f"{__name__}.Narrow")}
    shared = {option.name: option.help for option in of_method(methods()["MoCo"])}
    assert said["out_features"] == "few of them."
    assert (said["head"], said["temperature_max"]) == (shared["head"], shared["temperature_max"])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_verbs_and_options(shell, capsys):
    cli.main(["completion", shell])
    said = capsys.readouterr().out
    assert all(word in said for word in ("evaluate", "epochs", "cld.weight", "data-root"))
    checks = {"bash": ["bash", "-n"], "zsh": ["zsh", "-n"], "fish": ["fish", "--no-execute"]}
    if shutil.which(shell):
        subprocess.run([*checks[shell], "/dev/stdin"], input=said, text=True, check=True)


def test_a_file_of_settings_that_there_is_not_names_the_nearest(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("epochs: 1\n")
    with pytest.raises(SystemExit):
        cli.main(["train", "photos", "--config", str(tmp_path / "nine.yaml")])
    said = capsys.readouterr().err
    assert f"--config {tmp_path}/nine.yaml: there is no such file: did you mean {tmp_path}/mine.yaml?" in said
