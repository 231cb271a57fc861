"""Files of a stranger that are small and ask for much, lead elsewhere, or never end: each is refused in one line."""

import json
import os
import struct

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save
from strangers import TINY, refused

from crosslevel.data.open import open_images
from crosslevel.data.pack import pack
from crosslevel.data.sources.annotated.open import annotated
from crosslevel.data.uri import parse
from crosslevel.evaluation.compare import compare
from crosslevel.features.embed import embed
from crosslevel.models.encoder import Encoder, View, load_encoder
from crosslevel.runs import load_branches
from crosslevel.settings.parser import run
from crosslevel.training.train import train
from crosslevel.utils import trees
from crosslevel.utils.errors import SourceError, UserError

DEEP = "[" * 20_000
LAUGHS = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"a{i}: &a{i} [{', '.join(10 * [f'*a{i - 1}'])}]\n" for i in range(1, 12)
)
YAML = {
    "a billion laughs": f"{LAUGHS}epochs: *a11\n",
    "a billion laughs in a name": f"{LAUGHS}method: {{class_path: *a11}}\n",
    "a billion laughs in a key": f"{LAUGHS}? *a11\n: 1\n",
    "merged a billion times": "a0: &a0 {x: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{', '.join(10 * [f'*a{i - 1}'])}]}}\n" for i in range(1, 12)),
    "itself": "epochs: &x [*x]\n",
    "deep": f"epochs: {DEEP}",
    "deep in a text": f"views: {{scale: '{DEEP}'}}",
    "laughing in a text": "views:\n  scale: |\n    [" + LAUGHS.replace("\n", "\n    "),
    "a date that is none": "epochs: 2001-99-99\n",
    "binary": "epochs: !!binary ///\n",
    "a number of a million digits": f"epochs: {'9' * 1_000_000}\n",
    "NULs": "epochs: \0\n",
}


@pytest.mark.parametrize("kind", YAML)
@pytest.mark.parametrize("way", ["config", "resume"])
def test_no_config_is_larger_than_it_looks(scene, capsys, kind, way):
    (scene.folder / "r").mkdir()
    for file in ("config.yaml", "r/config.yaml"):
        (scene.folder / file).write_text(YAML[kind])
    said = refused(train, ["photos", "--config=config.yaml" if way == "config" else "--resume=r", *TINY], capsys)
    assert len(said) < 1000


def test_what_is_usual_in_yaml_is_read_as_before():
    text = "a: &x {b: [1, 2.5, null, 'x']}\nc: *x\nd: {<<: *x, e: 2001-01-01}\n"
    assert trees.yaml_tree(text) == yaml.safe_load(text)
    assert trees.yaml_tree("") is None
    with pytest.raises(yaml.YAMLError):
        trees.yaml_tree("!!python/name:os.system")


def test_a_config_may_come_from_a_shell(capsys):
    reading, writing = os.pipe()
    os.write(writing, b"epochs: 7\n")
    os.close(writing)
    with pytest.raises(SystemExit, match="0"):
        run(train, ["photos", f"--config=/dev/fd/{reading}", "--print_config"])
    os.close(reading)
    assert yaml.safe_load(capsys.readouterr().out)["epochs"] == 7


def test_no_heads_are_built_by_a_laughing_config(scene):
    Encoder("resnet18", True, 0.0625).save(scene.folder / "r")
    (scene.folder / "r").rename(scene.folder / "t")
    (scene.folder / "r").mkdir()
    (scene.folder / "t").rename(scene.folder / "r" / "cld.safetensors")
    for kind in ("a billion laughs", "itself", "deep", "NULs"):
        (scene.folder / "r" / "config.yaml").write_text(YAML[kind])
        with pytest.raises(UserError) as told:
            load_branches(scene.folder / "r")
        assert len(str(told.value)) < 1000


@pytest.fixture
def tiny(scene):
    encoder = Encoder("resnet18", True, 0.0625)
    encoder.view = View(16)
    encoder.save(scene.folder / "runs")
    return scene.folder / "runs"


def test_deep_json_is_refused_wherever_it_is_read(scene, tiny, capsys, monkeypatch):
    """A pack, an evaluation, the notes of a run, an encoder's metadata, annotations, marks of pieces."""
    monkeypatch.setenv("CROSSLEVEL_CACHE", str(scene.folder / "t"))
    folder = scene.folder / "r"
    pack("photos", str(folder), workers=0)
    (folder / "pack.json").write_text(DEEP)
    with pytest.raises(SourceError, match="nested too deeply"):
        open_images(str(folder))
    for name in ("evaluation.json", "config.yaml"):
        (folder / name).write_text(DEEP)
    assert "evaluation.json is damaged" in refused(compare, [str(folder), str(folder)], capsys)
    with pytest.raises(SourceError, match="not a JSON file"):
        annotated(parse(f"{folder}/evaluation.json"))
    (folder / "deep.safetensors").write_bytes(save({"x": torch.zeros(1)}, {"crosslevel": DEEP}))
    with pytest.raises(UserError, match="says how to build another network"):
        load_encoder(folder / "deep.safetensors")
    (folder / "f.parquet.parts").mkdir()
    (folder / "f.parquet.parts" / "joined.json").write_text(DEEP)
    run(embed, [str(tiny), "photos", "-o", str(folder / "f.parquet"), "--device=cpu", "--workers=0"])
    assert (folder / "f.parquet").exists()


@pytest.mark.parametrize(
    "results",
    [
        5, {"a": 1}, [5], [[]], "x",
        [{"protocol": 1, "accuracy_percent": 5, "interval_percent": {}}],
        [{"protocol": "p", "accuracy_percent": {"trained encoder": {"top1": "x"}}, "interval_percent": {}}],
        [{"protocol": "p", "accuracy_percent": {"trained encoder": 5}, "interval_percent": {}}],
        [{"protocol": "p", "accuracy_percent": {}, "interval_percent": 5}],
        [{"protocol": "p", "accuracy_percent": {}, "interval_percent": {"trained encoder": {"top1": [1]}}}],
        [{"protocol": "p", "accuracy_percent": {}, "interval_percent": {"trained encoder": {"top1": "ab"}}}],
    ],
)  # fmt: skip
def test_no_result_of_a_stranger_ends_in_a_traceback(scene, capsys, results):
    for name in ("r", "t"):
        (scene.folder / name).mkdir()
        (scene.folder / name / "evaluation.json").write_text(json.dumps({"results": results}))
    said = refused(compare, ["r", "t", "-o", "runs"], capsys)
    assert "evaluation.json is damaged" in said or "no evaluation in common" in said


def test_an_encoder_says_only_how_its_network_is_built(scene):
    whole = {"name": "resnet18", "view": {"size": 16, "mean": [0, 0, 0], "std": [1, 1, 1]}}
    for more in ({"weights": str(scene.folder / "evil.pkl")}, {"pretrained": True}, {"self": 1}, {"width": 1e18}):
        (scene.folder / "r").write_bytes(save({"x": torch.zeros(1)}, {"crosslevel": json.dumps(whole | more)}))
        with pytest.raises(UserError, match="says how to build another network"):
            load_encoder(scene.folder / "r")
        (scene.folder / "r").unlink()


def headed(tree, length=None):
    """A safetensors file with nothing but a header."""
    head = tree if isinstance(tree, bytes) else json.dumps({"x": tree}).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head


HEADERS = {
    "a header of 2 GB": headed(b"{" + bytes(100), 2**31),
    "a header of 2^63": headed(b"{}", 2**63),
    "a deep header": headed(DEEP.encode()),
    "a tensor of 2^60": headed({"dtype": "F32", "shape": [2**58], "data_offsets": [0, 2**60]}),
    "a shape that overflows": headed({"dtype": "F32", "shape": [2**33, 2**33, 0], "data_offsets": [0, 0]}),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_safetensors_header_that_lies_is_refused(scene, capsys, kind):
    (scene.folder / "r").mkdir()
    (scene.folder / "r" / "encoder.safetensors").write_bytes(HEADERS[kind])
    said = refused(embed, ["r", "photos", "-o", "t.parquet", "--device=cpu"], capsys)
    assert "encoder.safetensors" in said


def test_an_annotation_with_a_billion_laughs_is_refused(tmp_path):
    for name in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    entities = "".join(f'<!ENTITY l{i} "{10 * f"&l{i - 1};"}">' for i in range(1, 12))
    head = f'<!DOCTYPE x [<!ENTITY l0 "lol">{entities}<!ENTITY f SYSTEM "file:///etc/passwd">]>'
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "JPEGImages" / "a.png")
    for inside in ("&l11;", "&f;"):
        (tmp_path / "Annotations" / "a.xml").write_text(f"{head}<annotation><filename>{inside}</filename></annotation>")
        with pytest.raises(SourceError, match=r"a\.xml"):
            annotated(parse(f"{tmp_path}:train"))
