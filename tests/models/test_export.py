"""Exported files: other programs build the same network from them."""

import json
import pickle
import re

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file

from crosslevel.models.encoder import Encoder, View, load_encoder
from crosslevel.models.export import export, for_detectron2
from crosslevel.settings.parser import run

VIEW = View(64, (0.4, 0.5, 0.45), (0.2, 0.25, 0.3))


def save(folder, *arguments, **options):
    """A run's folder with an encoder whose batch normalizations have something to say."""
    torch.manual_seed(0)
    encoder = Encoder(*arguments, **options)
    encoder.view = VIEW
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, (low, high) in zip(
                (module.weight, module.bias, module.running_mean, module.running_var),
                ((0.5, 1.5), (-0.2, 0.2), (-0.2, 0.2), (0.5, 1.5)),
                strict=True,
            ):
                torch.nn.init.uniform_(tensor, low, high)
    folder.mkdir(exist_ok=True)
    encoder.save(folder / "encoder.safetensors")
    return folder


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run") / "resnet18", "resnet18", False)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run") / "narrow", "resnet18", True, 0.125)


@torch.no_grad()
def features(network, count=3):
    images = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return network.eval()(images)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2"])
def test_torchvision_computes_the_same_features(name, tmp_path):
    home = save(tmp_path / name, name, False)
    file = export(str(home), "torchvision", str(tmp_path / "weights.pth"))
    theirs = torchvision.models.get_model(name, weights=None)
    missing, unexpected = theirs.load_state_dict(torch.load(file, weights_only=True), strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"]
    assert unexpected == []
    theirs.fc = torch.nn.Identity()
    torch.testing.assert_close(features(theirs), features(load_encoder(home)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_timm_computes_the_same_features(resnet18, tmp_path, ending):
    file = export(str(resnet18), "timm", str(tmp_path / f"weights.{ending}"))
    theirs = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(file))
    assert torch.equal(features(theirs), features(load_encoder(resnet18)))


def test_the_file_for_timm_starts_the_next_run(narrow, tmp_path):
    file = export(str(narrow), "timm", str(tmp_path / "weights.safetensors"))
    again = Encoder("resnet18", True, 0.125, weights=str(file))
    assert torch.equal(features(again), features(load_encoder(narrow)))
    assert load_file(file).keys() == again.backbone.state_dict().keys()


def test_the_line_for_a_changed_network_loads_it(narrow, tmp_path, capsys):
    export(str(narrow), "timm", str(tmp_path / "weights.safetensors"))
    said = " ".join(capsys.readouterr().out.split())
    assert "timm alone builds no resnet18 with a stem for small images and a width of 0.125: load the file with" in said
    call = re.search(r"crosslevel\.(Encoder\(.*?\))", said)[1]
    assert torch.equal(features(eval(call, {"Encoder": Encoder})), features(load_encoder(narrow)))


def moco_converter_name(key):
    """The names of github.com/facebookresearch/moco, detection/convert-pretrain-to-detectron2.py, as its rules read:
    the stem is marked, stages count from 2, norms belong to convolutions, projections are shortcuts."""
    key = key if key.startswith("layer") else f"stem.{key}"
    key = re.sub(r"layer(\d)", lambda found: f"res{int(found[1]) + 1}", key)
    key = re.sub(r"bn(\d)", r"conv\1.norm", key)
    return re.sub(r"downsample\.([01])", lambda found: "shortcut" + (".norm" if found[1] == "1" else ""), key)


@pytest.mark.parametrize(("name", "width"), [("resnet18", 1.0), ("resnet50", 0.25)])
def test_detectron2_finds_the_names_of_moco_s_converter(name, width, tmp_path):
    home = save(tmp_path / name, name, False, width)
    file = export(str(home), "detectron2", str(tmp_path / "weights.pkl"))
    with file.open("rb") as stream:
        content = pickle.load(stream, encoding="latin1")
    assert content["matching_heuristics"] is True
    assert content["__author__"]
    state = load_encoder(home).backbone.state_dict()
    assert set(content["model"]) == {moco_converter_name(key) for key in state}
    for key, value in state.items():
        found = content["model"][moco_converter_name(key)]
        assert isinstance(found, np.ndarray)
        assert np.array_equal(found, value.numpy())
    expected = {
        "stem.conv1.weight",
        "stem.conv1.norm.running_mean",
        "res2.0.conv1.norm.weight",
        "res3.0.shortcut.weight",
    }
    assert expected | {"res3.0.shortcut.norm.running_var", "res5.1.conv2.weight"} <= set(content["model"])


def test_the_file_for_detectron2_needs_no_numpy_2(resnet18):
    """NumPy 1.26 has this module under both names."""
    content = pickle.dumps(for_detectron2(load_encoder(resnet18)), protocol=4)
    assert set(re.findall(rb"numpy[\w.]*", content)) <= {b"numpy", b"numpy._core.multiarray", b"numpy.core.multiarray"}


def test_the_call_says_how_detectron2_builds_the_network(tmp_path, capsys):
    home = save(tmp_path / "r", "resnext50_32x4d", False)
    export(str(home), "detectron2", str(tmp_path / "w.pkl"))
    said = capsys.readouterr().out
    assert "DEPTH 50, STRIDE_IN_1X1 False, STEM_OUT_CHANNELS 64, RES2_OUT_CHANNELS 256, NUM_GROUPS 32" in said
    assert "PIXEL_MEAN [102.0, 127.5, 114.75]" in said


@pytest.fixture(scope="module")
def onnxruntime():
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module, reason="needs onnx: pip install 'crosslevel[export]'")
    return pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'crosslevel[export]'")


@pytest.mark.parametrize("inside", [False, True])
def test_onnx_computes_the_same_features_for_any_batch(narrow, tmp_path, onnxruntime, inside):
    file = export(str(narrow), "onnx", str(tmp_path / "encoder.onnx"), normalize=inside)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    says = session.get_modelmeta().custom_metadata_map
    assert json.loads(says["view"])["size"] == 64
    assert ("RGB in [0, 1] minus" in says["input"]) is not inside
    encoder = load_encoder(narrow)
    mean, std = (torch.tensor(v)[:, None, None] for v in VIEW[1:])
    for count in (1, 4):
        images = torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(count))
        given = images if inside else (images - mean) / std
        (found,) = session.run(["features"], {"images": given.numpy()})
        with torch.no_grad():
            expected = encoder((images - mean) / std).numpy()
        assert found.shape == (count, encoder.num_features)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert [other.name for other in tmp_path.iterdir()] == ["encoder.onnx"]


def test_a_pytorch_program_computes_the_same_features_for_any_batch(narrow, tmp_path):
    program = torch.export.load(export(str(narrow), "torch", str(tmp_path / "encoder.pt2"), normalize=True)).module()
    encoder, (mean, std) = load_encoder(narrow), (torch.tensor(v)[:, None, None] for v in VIEW[1:])
    for count in (1, 4):
        images = torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            found, expected = program(images), encoder((images - mean) / std)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [other.name for other in tmp_path.iterdir()] == ["encoder.pt2"]


def test_an_onnx_file_with_other_features_is_not_kept(narrow, tmp_path, onnxruntime, monkeypatch):
    session = onnxruntime.InferenceSession

    class Wrong(session):
        def run(self, *arguments):
            return [found * 1.001 for found in super().run(*arguments)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    with pytest.raises(ValueError, match="differ from the encoder's"):
        export(str(narrow), "onnx", str(tmp_path / "encoder.onnx"))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_named(narrow, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'crosslevel\[export\]'"):
        export(str(narrow), "onnx", str(tmp_path / "encoder.onnx"))


def test_without_a_name_the_file_lies_beside_the_encoder(resnet18):
    assert run(export, [str(resnet18), "--format=torchvision"]) == resnet18 / "encoder-torchvision.pth"
    assert run(export, [str(resnet18 / "encoder.safetensors"), "--format", "timm"]).parent == resnet18


def test_wrong_use_ends_in_one_line(resnet18, narrow, tmp_path, capsys):
    vit = save(tmp_path / "vit", "vit_tiny_patch16_224", image_size=32)
    half = save(tmp_path / "half", "resnet18", False, 0.5)
    out = str(tmp_path / "weights.pth")
    wrong = [
        ([resnet18, "--format=tensorflow"], "tensorflow"),
        ([resnet18, "--format=timm", "-o", str(tmp_path / "x.bin")], "ends in .safetensors or .pth"),
        ([resnet18, "--format=timm", "-o", str(tmp_path / "nowhere" / "x.pth")], "there is no folder"),
        ([resnet18, "--format=timm", "-o", str(resnet18 / "encoder.safetensors")], "the encoder itself"),
        ([resnet18, "--format=timm", "--normalize=true", "-o", out], "--normalize is for onnx and torch"),
        ([tmp_path, "--format=timm"], "has no encoder.safetensors"),
        ([vit, "--format=torchvision"], "vit_tiny_patch16_224 has no counterpart in torchvision"),
        ([vit, "--format=detectron2"], "vit_tiny_patch16_224 has no counterpart in detectron2"),
        ([half, "--format=torchvision"], "torchvision builds resnet18 in full width only, not encoder.width=0.5"),
        ([half, "--format=detectron2"], "detectron2 builds resnet18 in full width only"),
        ([narrow, "--format=torchvision"], "no stem for small images"),
        ([narrow, "--format=detectron2"], "no stem for small images"),
    ]
    for arguments, named in wrong:
        with pytest.raises(SystemExit) as stop:
            run(export, [str(argument) for argument in arguments])
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert said.count("\n") == 1
        assert named in said
    assert not (tmp_path / "weights.pth").exists()
