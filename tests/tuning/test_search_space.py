"""What is searched: every form of a range, names checked against train's settings, and the default."""

import contextlib
import io
from functools import cache

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from crosslevel.settings.command import Command
from crosslevel.settings.parser import run
from crosslevel.training.train import train
from crosslevel.tuning import search_space as ranges
from crosslevel.tuning.search_space import Numbers
from crosslevel.tuning.tune import tune


@cache
def settings(*options):
    """The whole tree, as `train` resolves it."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        run(train, ["photos", *options, "--print_config"])
    return yaml.safe_load(said.getvalue())


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("cld.weight=0:1", "cld.weight", Numbers(0.0, 1.0)),
        ("cld.groups=16:256:log", "cld.groups", Numbers(16, 256, log=True, integral=True)),
        ("lr=1e-4:1e-1:log", "lr", Numbers(1e-4, 1e-1, log=True)),
        ("--lr=-1:1", "lr", Numbers(-1.0, 1.0)),
        ("views.preset=cifar,simclr", "views.preset", ("cifar", "simclr")),
        ("views.scale=[0.2,1],[0.4,1]", "views.scale", ("[0.2,1]", "[0.4,1]")),
        ("method.queue=256,1024", "method.queue", ("256", "1024")),
        ("method.temperature=0.05:1:log", "method.temperature", Numbers(0.05, 1.0, log=True)),
        ("cld.normalize_centroids=true,false", "cld.normalize_centroids", ("true", "false")),
    ],
)
def test_a_range_is_read_as_it_is_written(text, name, expected):
    assert ranges.parse([text], settings("--method=moco")) == {name: expected}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cld.gruops=2:8", "train has no setting 'cld.gruops': did you mean cld.groups or cld.grouping?"),
        ("temperature=0.1:1", "did you mean gh.temperature or cld.temperature or method.temperature?"),
        ("method.tau=0.9:1", "train has no setting 'method.tau'"),
        ("epochs=1:9", "epochs is not searched"),
        ("lr", "give NAME=RANGE"),
        ("lr=", "give NAME=RANGE"),
        ("lr=0.1", "at least two different choices"),
        ("lr=0.1,0.1", "at least two different choices"),
        ("lr=1:0.1", "the first number must be smaller"),
        ("lr=0:1:log", "a logarithmic range begins above 0"),
        ("lr=0:1:lgo", "'lgo' is not log"),
        ("lr=a:b", "the ends must be numbers"),
        ("lr=0:inf", "the first number must be smaller"),
        ("cld.groups=1.5:8", "the ends must be whole numbers"),
        ("views.preset=1:2", "it is no number"),
        ("optimizer=sgd,adma", "adma"),
    ],
)
def test_a_wrong_range_ends_in_one_line_that_helps(text, said):
    with pytest.raises(ValueError, match=r"^--search ") as error:
        ranges.parse([text], settings())
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_is_searched_twice():
    with pytest.raises(ValueError, match="searched twice"):
        ranges.parse(["lr=0:1", "lr=0:2"], settings())


@pytest.mark.parametrize("method", ["MoCo", "SimCLR", "BYOL", "NPID", "InfoMin"])
def test_the_default_ranges_hold_the_settings_as_given_and_end_at_the_batch(method):
    tree = settings("--method", method, "--batch_size=64", "--cld.weight=1.5")
    found = ranges.default_space(tree, 10_000)
    assert ("method.temperature" in found) == (method != "BYOL")
    assert set(found) >= {"cld.weight", "cld.groups", "cld.temperature", "lr"}
    assert all(ranges.value_at(tree, name) in searched for name, searched in found.items())
    assert found["cld.groups"] == Numbers(4, 64, log=True, integral=True)
    assert ranges.default_space(tree, 50)["cld.groups"].high == 50


@given(st.floats(1e-6, 1e6), st.floats(1.01, 1e3), st.booleans())
def test_a_range_survives_being_shown(low, factor, log):
    shown = ranges.range_text(Numbers(low, low * factor, log))
    again = ranges.parse([f"lr={shown}"], settings())["lr"]
    assert again.log == log
    assert again.low == pytest.approx(low, rel=1e-5)
    assert again.high == pytest.approx(low * factor, rel=1e-5)


def test_all_options_of_train_are_options_of_tune():
    def own(function):
        return set(Command.of_function(function).options)

    assert own(train) - own(tune) == {"run", "resume"}
    assert {"search", "output", "budget", "trials", "jobs", "storage"} <= own(tune) - own(train)
    assert "settings" not in own(tune)
    assert "watch" not in own(train)
