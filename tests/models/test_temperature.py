"""Temperature schedules against their equation, in losses, in tensors, and through a run that is continued."""

import csv

import numpy as np
import pytest
import torch
import yaml
from reference import TinyEncoder, linear, normal, nt_xent, numpy
from run_samples import write_images

import crosslevel
from crosslevel import CrossLevel
from crosslevel.methods import METHODS, SimCLR
from crosslevel.models.schedules.temperature import Temperature
from crosslevel.runs import Run


def equation(low, high, epoch, period):
    """Kukleva et al. 2023, algorithm 1."""
    return (high - low) * (1 + np.cos(2 * np.pi * epoch / period)) / 2 + low


@pytest.mark.parametrize("epoch", [0, 0.25, 3, 7.5, 12, 1000.125])
def test_the_value_is_the_equation_as_a_number_and_as_a_tensor(epoch):
    schedule = Temperature(0.1, 1.0, 6)
    schedule.follow(epoch)
    assert isinstance(schedule.value, float)
    assert schedule.value == pytest.approx(equation(0.1, 1.0, epoch, 6), rel=1e-9)
    schedule.follow(torch.tensor(epoch))
    assert isinstance(schedule.value, torch.Tensor)
    assert float(schedule.value) == pytest.approx(equation(0.1, 1.0, epoch, 6), rel=1e-4)


def test_it_begins_high_is_low_at_half_the_period_and_returns():
    schedule = Temperature(0.1, 1.0, 6)
    seen = []
    for epoch in (0, 3, 6):
        schedule.follow(epoch)
        seen.append(schedule.value)
    assert seen == pytest.approx([1.0, 0.1, 1.0])


def test_without_a_schedule_it_stays():
    schedule = Temperature(0.3)
    schedule.follow(5)
    assert schedule.value == 0.3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0.0,), "temperature=0.0 must be positive"),
        ((0.5, 0.5), "temperature_max=0.5 must be above temperature=0.5"),
        ((0.5, 1.0, 0), "temperature_period=0 must be positive"),
        ((0.5, None, 3), "temperature_period=3 is of a schedule: give temperature_max"),
    ],
)
def test_what_makes_no_schedule_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        Temperature(*arguments)
    names = ("temperature", "temperature_max", "temperature_period")
    with pytest.raises(ValueError, match=said):
        CrossLevel(4, **dict(zip(names, arguments, strict=False)))


def test_a_schedule_without_a_period_is_refused_when_it_is_asked():
    with pytest.raises(ValueError, match="temperature_period"):
        Temperature(0.1, 1.0).follow(0)


@pytest.mark.parametrize("epoch", [0.0, 1.5, 4.0])
def test_the_loss_is_that_of_the_temperature_of_the_moment(epoch):
    method = SimCLR(TinyEncoder(), head="linear", out_features=4, temperature=0.2, temperature_max=0.9,
                    temperature_period=8).double()  # fmt: skip
    h = [normal(i, 6, 5) for i in range(2)]
    method.begin_step(epoch)
    expected = nt_xent(*(linear(numpy(v), method.branch) for v in h), equation(0.2, 0.9, epoch, 8))
    assert method([], h, torch.arange(6))[0].item() == pytest.approx(expected, rel=1e-6)


SCHEDULED = [name for name in METHODS if name != "distill" and METHODS[name](TinyEncoder(), 20).schedule is not None]


def test_every_method_with_a_temperature_has_one():
    """BYOL, SimSiam, VICReg and distillation divide nothing by a temperature."""
    assert {"dino", "infomin", "moco", "npid", "simclr", "swav"} == set(SCHEDULED)


@pytest.mark.parametrize("name", [*SCHEDULED, "cld"])
def test_every_loss_follows_its_schedule(name):
    """At a moment of the schedule the loss is that of the same weights at the fixed temperature of the moment."""
    found = []
    for arguments, epoch in (
        ({"temperature": 0.2, "temperature_max": 0.8, "temperature_period": 4}, 1.0),
        ({"temperature": 0.5}, 0.0),
        ({"temperature": 0.2}, 0.0),
    ):
        torch.manual_seed(0)
        if name == "cld":
            loss = CrossLevel(5, groups=3, **arguments)
            inputs = [normal(i, 8, 5, dtype=torch.float32) for i in range(2)]
        else:
            loss = METHODS[name](TinyEncoder(), 20, **arguments, **({"jigsaw": 0} if name == "infomin" else {}))
            views = [normal(i, 8, 3, 2, 2, dtype=torch.float32) for i in range(loss.views)]
            inputs = [views, [loss.encoder(view) for view in views[: loss.online]], torch.arange(8)]
        loss.begin_step(epoch)
        torch.manual_seed(1)
        out = loss(*inputs)
        found.append((out if name == "cld" else out[0]).item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert abs(found[0] - found[2]) > 1e-3


def test_a_run_chooses_the_period_writes_it_down_and_logs_the_value(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", count=16, size=(16, 16))
    run = crosslevel.train(
        "photos", run="r", epochs=5, batch_size=8, quiet=True, report_html=False, device="cpu", log_every=1,
        encoder={"width": 0.0625, "small_images": True}, views={"size": 16}, cld={"temperature_max": 0.6},
        method={"class_path": "MoCo", "init_args": {"temperature": 0.1, "temperature_max": 1.0}},
    )  # fmt: skip
    settings = yaml.safe_load(Run(run).config.read_text())
    periods = [settings["method"]["init_args"]["temperature_period"], settings["cld"]["temperature_period"]]
    assert periods == [1.0, 1.0]
    with Run(run).metrics.open() as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    assert len(rows) == 5 * 4  # two classes of 16 images, 8 a step
    for row in rows:
        epoch = (int(row["step"]) - 1) / 4
        assert float(row["temperature"]) == pytest.approx(equation(0.1, 1.0, epoch, 1.0), rel=1e-4)
        assert float(row["group_temperature"]) == pytest.approx(equation(0.2, 0.6, epoch, 1.0), rel=1e-4)
