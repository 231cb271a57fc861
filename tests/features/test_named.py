"""Every verb that takes a run takes weights by name: `embed`, `evaluate`, `inspect` and `crosslevel.load`."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from hub_samples import local_hub, weights
from PIL import Image
from run_samples import write_images

import crosslevel
from crosslevel.cli import main
from crosslevel.features.extract import normalize
from crosslevel.models.encoder import Encoder, View

NAME = "timm:test_convnext.r160_in1k"


@pytest.fixture(scope="module")
def theirs():
    return weights("test_convnext", 3)


@pytest.fixture(scope="module", autouse=True)
def _hub(theirs, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, local_hub(patch, tmp_path_factory.mktemp("hub")) as (hub, _):
        hub.put("timm/test_convnext.r160_in1k", model__safetensors=theirs[1])
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("photos"), size=(160, 160))


def test_embed_writes_timms_own_features_in_float32(theirs, photos, tmp_path, capsys):
    main(["embed", NAME, str(photos), "-o", str(tmp_path / "t.parquet"), "--workers=0", "--device=cpu"])
    said = capsys.readouterr().out
    assert "fp32 (as asked)" in said
    assert "licence apache-2.0" in said
    table = pq.read_table(tmp_path / "t.parquet").to_pydict()
    pixels = [torch.from_numpy(np.array(Image.open(photos / path))).permute(2, 0, 1) for path in table["path"]]
    config = timm.get_pretrained_cfg(NAME.removeprefix("timm:"))
    model, view = theirs[0], View(160, config.mean, config.std)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(normalize(torch.stack(pixels), view)), pre_logits=True)
    np.testing.assert_allclose(np.array(table["feature"]), features.numpy(), rtol=1e-4, atol=1e-5)


def test_load_is_the_same_encoder(photos):
    table = crosslevel.embed(NAME, photos, device="cpu", workers=0, quiet=True)
    model = crosslevel.load(NAME, device="cpu", precision="fp32")
    assert model.view.size == 160
    found = model.transform([photos / path for path in table.paths])
    np.testing.assert_allclose(found, table.features, rtol=1e-5, atol=1e-6)


def test_a_table_goes_on_only_with_the_same_weights(photos, tmp_path):
    from crosslevel.models.named import mark_of, open_encoder

    first, again = (open_encoder(NAME) for _ in range(2))
    smaller = open_encoder(f"{NAME},size=64")
    assert mark_of(NAME, first) == mark_of(NAME, again) != mark_of(f"{NAME},size=64", smaller)


def test_evaluate_judges_it_alone_and_beside_a_run(photos, tmp_path, capsys):
    line = [str(photos), "--test", str(photos), "--workers=0", "--device=cpu"]
    main(["evaluate", NAME, *line, "--output", str(tmp_path / "e.json")])
    assert "next:" not in capsys.readouterr().out
    alone = json.loads((tmp_path / "e.json").read_text())["results"][0]["accuracy_percent"]
    assert list(alone) == ["raw pixels", "untrained encoder", NAME]
    run = tmp_path / "run"
    run.mkdir()
    encoder = Encoder("resnet18", width=0.0625, small_images=True)
    encoder.view = View(16)
    encoder.save(run / "encoder.safetensors")
    found = crosslevel.evaluate(str(run), str(photos), test=str(photos), beside=[NAME], workers=0, quiet=True)
    assert list(next(iter(found.values()))) == ["raw pixels", "untrained encoder", NAME, "trained encoder"]
    assert next(iter(found.values()))[NAME] == alone[NAME]
    main(["evaluate", str(run), *line, "--beside", NAME, "--beside", str(run), "--damaged=keep"])
    kept = json.loads((run / "evaluation.json").read_text())["results"][-1]["accuracy_percent"]
    assert list(kept) == ["raw pixels", "untrained encoder", NAME, "run", "trained encoder"]
    assert kept["run"] == kept["trained encoder"]


def test_inspect_groups_by_its_features(photos):
    found = crosslevel.inspect(photos, run=f"{NAME},size=64", workers=0, device="cpu", quiet=True)
    assert f"the features of {NAME},size=64" in json.dumps(found)


def test_what_is_wrong_with_a_name_ends_the_command_in_one_line(photos, capsys):
    for line in (["embed", "timm:resnet19", str(photos)], ["inspect", str(photos), "--run", "hf-hub:no/such"]):
        with pytest.raises(SystemExit) as status:
            main(line)
        assert status.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
