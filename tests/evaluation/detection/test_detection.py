"""Detection: what an encoder learns to detect, its start from a file, its precision, damaged images and wrong use."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from detection_samples import CLASSES, CPU, QUICK, SMALL, annotated_copy, draw, keep, narrow, noise, write_voc
from rich.console import Console
from torch import nn

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.sources.annotated.open import annotated
from crosslevel.data.uri import parse
from crosslevel.evaluation.detection import benchmark as protocol
from crosslevel.evaluation.detection.benchmark import Settings, detection
from crosslevel.evaluation.detection.model import Sizes, detector
from crosslevel.evaluation.detection.training import (
    Diverged,
    Schedule,
    reseed,
)
from crosslevel.models import numerics
from crosslevel.models.encoder import Encoder
from crosslevel.models.export import export
from crosslevel.utils.device import Hardware
from crosslevel.utils.errors import SourceError


@pytest.fixture(scope="module")
def trained():
    """An encoder that tells the shapes apart, whatever their colour."""
    rng, encoder = np.random.default_rng(7), narrow()
    pictures, kinds = [], torch.from_numpy(rng.integers(0, 3, 400))
    for kind in kinds:
        picture, side = noise(rng, 32), int(rng.integers(16, 32))
        x, y = (int(v) for v in rng.integers(0, 33 - side, 2))
        colour = rng.integers(0, 40, 3) + 200 * int(rng.integers(2))
        draw(picture, CLASSES[kind], (x, y, x + side, y + side), tuple(map(int, colour)))
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    mean, std = (torch.tensor(v)[:, None, None] for v in encoder.view[1:])
    images = (torch.stack(pictures).float() / 255 - mean) / std
    head = nn.Linear(encoder.num_features, 3)
    optimizer = torch.optim.SGD([*encoder.parameters(), *head.parameters()], 0.1, 0.9, weight_decay=1e-3)
    for _ in range(100):
        index = torch.randint(len(images), (32,))
        loss = nn.functional.cross_entropy(head(encoder(images[index])), kinds[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.eval()


class NoTraining(Console):
    """Where nobody is to be told of a training's progress."""

    def print(self, *what, **how):
        if "iterations/s" in str(what):
            raise RuntimeError(what[0])
        super().print(*what, **how)


@pytest.mark.slow
def test_a_trained_encoder_learns_to_detect_and_finished_figures_are_kept(
    pycocotools, shapes, trained, tmp_path, capsys, monkeypatch
):
    settings = Settings(Schedule(70, 4, 0.5), sizes=SMALL, regions=16)
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    options = {"settings": settings, "hardware": CPU, "workers": 1, "folder": tmp_path}
    figures = detection(trained, *shapes, console=Console(width=120), **options)
    assert list(figures) == ["random initialization", "trained encoder"]
    # 55 to 97 over three seeds and instruction sets, after one iteration 2 (docs/numerics.md, "In the tests").
    assert figures["trained encoder"]["AP50"] > 15
    assert figures["trained encoder"]["AP50"] >= figures["trained encoder"]["AP75"] > 0
    said = capsys.readouterr().out
    assert said.count("iterations/s") == 20
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())

    options["console"] = NoTraining(file=io.StringIO())
    assert detection(trained, *shapes, **options) == figures
    assert [file.name for file in tmp_path.iterdir()] == ["detection.json"]
    # Another encoder has figures of its own; those of the random start still hold.
    with pytest.raises(RuntimeError, match="trained encoder"):
        detection(narrow(1), *shapes, **options)
    with pytest.raises(RuntimeError, match="random initialization"):
        detection(trained, *shapes, **options, seed=1)


@torch.no_grad()
def test_an_exported_file_gives_the_same_start(trained, tmp_path):
    trained.save(tmp_path / "encoder.safetensors")
    images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(2))]
    outputs = []
    for ending in ("safetensors", "pth"):
        file = export(str(tmp_path), "timm", str(tmp_path / f"again.{ending}"))
        again = Encoder("resnet18", True, 0.125, weights=str(file))
        again.view = trained.view
        for encoder in (trained, again):
            reseed(3)
            model = detector(encoder, 3, sizes=SMALL).eval()
            outputs.append(model(images)[0])
    for found in outputs[1:]:
        assert all(torch.equal(value, found[key]) for key, value in outputs[0].items())


def test_bfloat16_stays_inside_the_network(trained):
    reseed(0)
    plain = detector(trained, 3, sizes=SMALL).eval()
    reseed(0)
    mixed = detector(trained, 3, sizes=SMALL, hardware=Hardware(torch.device("cpu"), "bf16", "")).eval()
    image = torch.rand(1, 3, 48, 48)
    with torch.no_grad():
        expected, found = plain.backbone(image), mixed.backbone(image)
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("kind", ["c4", "fpn"])
def test_layers_that_bfloat16_gets_wrong_are_told_once_for_both_detectors(tmp_path, pycocotools, monkeypatch, kind):
    write_voc(tmp_path, "train", 2, 0)
    data = annotated(parse(f"{tmp_path}:train"))
    measured, avoided = set(), set()

    def wrong(layer, x, hardware):
        measured.add(layer)
        return "output" if tuple(layer.weight.shape[:2]) == (64, 64) else ""

    monkeypatch.setattr(numerics, "_wrong", wrong)
    monkeypatch.setattr(numerics, "_in_float32", lambda layer, x: avoided.add(layer) or type(layer).forward(layer, x))
    console = Console(file=io.StringIO(), width=500)
    figures = detection(
        narrow(), data, data, console=console, workers=1,
        settings=QUICK._replace(kind=kind, schedule=Schedule(1, 2, 0.1), sizes=Sizes((16,), 16, 32)),
        hardware=Hardware(torch.device("cpu"), "bf16", ""),
    )  # fmt: skip
    assert console.file.getvalue().count("bf16 is wrong on this processor: the output of ") == 1
    assert {tuple(layer.weight.shape[:2]) for layer in avoided} == {(64, 64)}
    assert len(avoided) == 2 * 3  # conv5's last three, in each detector
    assert len(measured) > 20
    assert len(figures) == 2


def test_unreadable_images_are_recorded_and_others_take_their_place(tmp_path, pycocotools):
    write_voc(tmp_path, "train", 4, 0)
    write_voc(tmp_path, "test", 4, 1)
    for key in ("train001", "test002"):
        (tmp_path / "JPEGImages" / f"{key}.png").write_bytes(b"no picture")
    bad_files = BadFiles()
    train, test = annotated(parse(f"{tmp_path}:train")), annotated(parse(f"{tmp_path}:test"))
    known = sorted(train.names() & test.names())
    test.objects = [keep(o, [test.classes.index(name) for name in known]) for o in test.objects]
    figures = detection(narrow(), train, test, settings=QUICK, hardware=CPU, bad_files=bad_files)
    assert all(set(row) == {"AP", "AP50", "AP75"} for row in figures.values())
    assert sorted(path.rpartition("/")[2] for path in bad_files.reasons) == ["test002.png", "train001.png"]


def test_a_loss_that_is_no_number_is_named(pycocotools, shapes):
    settings = QUICK._replace(schedule=Schedule(30, 2, 1e12, warmup=0))
    with pytest.raises(Diverged, match=r"detection, random initialization: (loss_\w+ is nan,? )+in iteration 3: lower"):
        detection(narrow(), *shapes, settings=settings, hardware=CPU)


def test_wrong_use_ends_in_one_line(pycocotools, shapes, monkeypatch):
    train, test = shapes
    fewer = annotated_copy(train, objects=[keep(o, [0, 1]) for o in train.objects])
    nothing = annotated_copy(test, objects=[o._replace(ignored=torch.ones_like(o.ignored)) for o in test.objects])
    vit = Encoder("vit_tiny_patch16_224", image_size=32)
    wrong = [
        ((narrow(), fewer, test), QUICK, SourceError, "lacks: triangle"),
        ((narrow(), nothing, test), QUICK, SourceError, "has an object that is not ignored"),
        ((narrow(), train, nothing), QUICK, SourceError, "nothing to find"),
        ((vit, train, test), QUICK, ValueError, "not vit_tiny_patch16_224"),
        ((narrow(), train, test), QUICK._replace(schedule=Schedule(0)), ValueError, "iterations=0"),
        ((narrow(), train, test), QUICK._replace(sizes=Sizes(())), ValueError, "sizes.train=0"),
        ((narrow(), train, test), QUICK._replace(schedule=Schedule(rate=-1.0)), ValueError, "rate=-1.0"),
    ]
    for arguments, settings, kind, named in wrong:
        with pytest.raises(kind) as caught:
            detection(*arguments, settings=settings, hardware=CPU)
        assert named in str(caught.value)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError, match=r"pip install 'crosslevel\[detection\]'"):
        detection(narrow(), train, test, settings=QUICK, hardware=CPU)


def test_a_damaged_record_is_measured_again(tmp_path):
    store = protocol.FigureStore(tmp_path)
    store.keep("a", "key", {"AP": 1.0})
    assert store.result("a", "key") == {"AP": 1.0}
    assert store.result("a", "another") is None
    assert json.loads((tmp_path / "detection.json").read_text())["a"]["figures"] == {"AP": 1.0}
    (tmp_path / "detection.json").write_text("{")
    assert store.result("a", "key") is None
