"""Distillation against its equation in NumPy, its teacher untouched, and a student that learns."""

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import gradient, normal, numpy, unit
from run_samples import metrics, write_images
from safetensors.torch import load_file

from crosslevel.cli import main
from crosslevel.methods import Distill
from crosslevel.models.encoder import Encoder, View
from crosslevel.utils.errors import UserError

seeds = st.integers(0, 2**31 - 1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The encoder of a run, with views of its own size and colours."""
    torch.manual_seed(3)
    encoder = Encoder("test_vit", image_size=32)
    encoder.view = View(32, (0.2, 0.3, 0.4), (0.5, 0.6, 0.7))
    return encoder.save(tmp_path_factory.mktemp("teacher") / "encoder.safetensors")


def student():
    torch.manual_seed(0)
    encoder = Encoder("resnet18", width=0.0625, small_images=True, zero_init_last=True)
    encoder.view = View(16, (0.1, 0.1, 0.1), (0.9, 0.8, 0.7))
    return encoder


def equation(q, t, centre):
    return (2 - 2 * (unit(q) * unit(t - centre)).sum(1)).mean()


@settings(max_examples=4)
@given(seed=seeds, batch=st.integers(2, 5), centred=st.booleans())
def test_loss_and_gradient_are_the_equation(teacher, seed, batch, centred):
    """Over three steps, so that the average of the teacher's features is one of several."""
    method = Distill(student(), teacher=str(teacher), head="linear", centred=centred, momentum=0.75).double()
    centre = None
    for step in range(3):
        views = [normal(seed + 10 * step + i, batch, 3, 16, 16) for i in range(2)]
        h = [normal(seed + 10 * step + 5 + i, batch, 32).requires_grad_() for i in range(2)]
        loss, kept = method(views, h, torch.arange(batch))
        loss.backward()
        t = [numpy(method.ask(view)) for view in views]
        mean = np.concatenate(t).mean(0)
        used = (mean if centre is None else centre) * centred
        weight, bias = numpy(method.branch[0].weight), numpy(method.branch[0].bias)
        terms = [equation(numpy(x) @ weight.T + bias, goal, used) for x, goal in zip(h, t, strict=True)]
        assert loss.item() == pytest.approx(sum(terms) / 2, rel=1e-6)

        def one(x, t=t, used=used, weight=weight, bias=bias):
            return equation(x @ weight.T + bias, t[0], used) / 2

        slope = gradient(one, numpy(h[0]))
        np.testing.assert_allclose(numpy(h[0].grad), slope, rtol=1e-6, atol=1e-6 * np.abs(slope).max() + 1e-12)
        method.after_step(0.0, kept)
        centre = mean if centre is None else 0.75 * centre + 0.25 * mean
        np.testing.assert_allclose(numpy(method.centre), centre, rtol=1e-6)


def test_the_teacher_sees_the_view_in_its_own_size_and_colours(teacher):
    method = Distill(student(), teacher=str(teacher))
    pixels = torch.rand(2, 3, 16, 16)
    seen = (pixels - torch.tensor([0.1] * 3).view(3, 1, 1)) / torch.tensor([0.9, 0.8, 0.7]).view(3, 1, 1)
    larger = torch.nn.functional.interpolate(pixels, (32, 32), mode="bicubic", antialias=True)
    wanted = (larger - torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    with torch.no_grad():
        expected = method.taught_by[0](wanted)
    torch.testing.assert_close(method.ask(seen), expected, rtol=1e-4, atol=1e-5)


def test_the_teacher_is_neither_trained_nor_saved(teacher):
    method = Distill(student(), teacher=str(teacher))
    names = [name for name, _ in method.named_parameters()] + list(method.state_dict())
    assert all(name.startswith(("branch.", "centre", "steps")) for name in names)
    method.train()
    assert not method.taught_by[0].training
    assert not any(p.requires_grad for p in method.taught_by[0].parameters())
    assert next(method.double().taught_by[0].parameters()).dtype == torch.float64


def test_what_is_no_teacher_says_so():
    with pytest.raises(UserError, match=r"Distill needs a teacher: --method\.teacher RUN, or weights by name"):
        Distill(student())
    with pytest.raises(UserError, match=r"/nowhere has no encoder\.safetensors"):
        Distill(student(), teacher="/nowhere")


def test_a_student_learns_what_the_teacher_sees(teacher):
    """Of images that it was not trained on, its head points where the teacher does; at the start, to nowhere."""
    torch.manual_seed(1)
    colours = torch.rand(40, 3, 1, 1)
    images = (colours + 0.1 * torch.randn(40, 3, 16, 16)).clamp(0, 1)
    encoder = student()
    method = Distill(encoder, teacher=str(teacher))
    seen, new = images[:32], images[32:]
    optimizer = torch.optim.AdamW([*encoder.parameters(), *method.parameters()], lr=3e-3)

    def held_out():
        encoder.eval(), method.eval()
        with torch.no_grad():
            goal = method.ask(new) - method.centre
            found = torch.nn.functional.cosine_similarity(method.branch(encoder(new)), goal).mean()
        encoder.train(), method.train()
        return float(found)

    _, kept = method([seen], [encoder(seen)], torch.arange(32))
    method.after_step(0.0, kept)
    before = held_out()
    for _ in range(60):
        optimizer.zero_grad()
        loss, kept = method([seen], [encoder(seen)], torch.arange(32))
        loss.backward()
        optimizer.step()
        method.after_step(0.0, kept)
    assert abs(before) < 0.3
    assert held_out() > 0.6


def test_the_command_distils_beside_cld(teacher, tmp_path):
    photos = write_images(tmp_path / "photos", count=8, size=(16, 16))
    line = [
        f"--method.teacher={teacher}", "--method=Distill", "--encoder.width=0.0625", "--batch_size=8", "--epochs=1",
        "--device=cpu", "--workers=0", "--report_html=false", "--monitor_every=0", "--cld.groups=4", "--quiet=true",
        f"--run={tmp_path / 'r'}", "--views.size=16",
    ]  # fmt: skip
    main(["train", str(photos), *line])
    last = metrics(tmp_path / "r")[-1]
    assert 0 < float(last["instance_loss"]) < 4
    assert float(last["group_loss"]) > 0
    kept = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    assert kept["method"]["init_args"]["teacher"] == str(teacher)
    state = load_file(tmp_path / "r" / "encoder.safetensors")
    assert state.keys() == Encoder("resnet18", width=0.0625, small_images=True).backbone.state_dict().keys()
