"""Every verb that uses an encoder takes weights by name, in either spelling; so does `crosslevel.load`."""

import json
import pickle
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
import torchvision
from hub_samples import local_hub, weights
from PIL import Image
from run_samples import write_images
from table_samples import write_encoder

import crosslevel
import crosslevel.features.collection  # before a verb is replaced
from crosslevel.cli import COMMANDS, main
from crosslevel.features.engines import Sent
from crosslevel.features.extract import normalize
from crosslevel.features.table import open_table
from crosslevel.models.encoder import Encoder, View
from crosslevel.models.named import open_encoder
from crosslevel.settings.weights import VERBS

NAME = "timm:test_convnext.r160_in1k"
COMMANDS_BY_NAME = {COMMANDS[verb][0] + f".{verb}": verb for verb in VERBS}


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
    assert "fp32 (as set)" in said
    assert "licence apache-2.0" in said
    table = pq.read_table(tmp_path / "t.parquet").to_pydict()
    pixels = [torch.from_numpy(np.array(Image.open(photos / path))).permute(2, 0, 1) for path in table["path"]]
    config = timm.get_pretrained_cfg(NAME.removeprefix("timm:"))
    model, view = theirs[0], View(160, config.mean, config.std)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(normalize(torch.stack(pixels), view)), pre_logits=True)
    np.testing.assert_allclose(np.array(table["feature"]), features.numpy(), rtol=1e-4, atol=1e-5)


def test_what_other_machines_are_sent_is_the_same_encoder():
    """Of whatever size, and without the hub, by its file alone."""
    for name in (NAME, f"{NAME},size=128"):
        encoder = open_encoder(name)
        sent = pickle.loads(pickle.dumps(Sent.of(encoder))).open()
        assert (sent.view, sent.num_features) == (encoder.view, encoder.num_features)
        x = torch.randn(2, 3, sent.view.size, sent.view.size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(sent(x), encoder(x))


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


def test_the_names_of_train_are_another_spelling_for_every_verb(monkeypatch):
    asked = []
    for module, verb in COMMANDS_BY_NAME.items():
        monkeypatch.setattr(module, lambda verb=verb, **given: asked.append((verb, given)))
    given = ["--encoder.name", "resnet50.a1_in1k", "--encoder.pretrained", "true", "--encoder.image_size=64"]
    by_name = "timm:resnet50.a1_in1k,size=64"
    main(["embed", *given, "photos"])
    main(["evaluate", "photos", "--test=t", *given])
    main(["inspect", "photos", *given])
    main(["search", *given, "q.png", "--images=photos"])
    main(["search", "t.parquet", "q.png", *given])
    main(["explore", *given, "--images=photos"])
    main(["curate", "--encoder.name=hf-hub:owner/name", "--images=photos"])
    main(["classify", "labelled", "photos", "--encoder.name=resnet50", "--encoder.pretrained=w.safetensors"])
    main(["export", *given])
    found = [
        (verb, {k: v for k, v in all_given.items() if k in ("run", "table", "images")}) for verb, all_given in asked
    ]
    assert found == [
        ("embed", {"run": by_name, "images": "photos"}),
        ("evaluate", {"run": by_name, "images": "photos"}),
        ("inspect", {"run": by_name, "images": "photos"}),
        ("search", {"table": by_name, "run": None, "images": "photos"}),
        ("search", {"table": "t.parquet", "run": by_name, "images": None}),
        ("explore", {"table": by_name, "images": "photos"}),
        ("curate", {"table": "hf-hub:owner/name", "images": "photos"}),
        ("classify", {"run": "timm:resnet50,weights=w.safetensors", "images": "photos"}),
        ("export", {"run": by_name}),
    ]


def test_each_verb_tells_the_licence_once_and_keeps_it(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CROSSLEVEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    name, query = f"{NAME},size=64", str(photos / "cat" / "003.png")
    on_cpu = ["--device=cpu", "--workers=0"]
    for line in [
        ["embed", name, str(photos), "-o", "t.parquet", *on_cpu],
        ["search", "t.parquet", query, *on_cpu],
        ["inspect", str(photos), "--run", name, *on_cpu],
        ["inspect", str(photos), "--encoder.name", NAME.removeprefix("timm:"), "--encoder.image_size=64", *on_cpu],
        ["classify", name, str(photos), str(photos), "-o", "p.parquet", *on_cpu],
        ["search", name, query, "--images", str(photos), *on_cpu],  # which makes a table,
        ["search", name, query, "--images", str(photos), *on_cpu],  # and reads it
        ["curate", name, "--images", str(photos), "--outliers=keep", "--device=cpu"],
        ["explore", name, "--images", str(photos), "--export=page", "--device=cpu"],
    ]:
        main(line)
        assert capsys.readouterr().out.count("licence apache-2.0") == 1, line
    assert open_table("t.parquet").metadata["licence"] == "apache-2.0"
    about = pq.read_schema("p.parquet").metadata
    assert (about[b"licence"], about[b"run"]) == (b"apache-2.0", name.encode())


def test_export_takes_it_too(theirs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["export", NAME])
    said = capsys.readouterr().out
    assert said.count("licence apache-2.0") == 1
    assert "timm.create_model('test_convnext.r160_in1k'" in said
    network = timm.create_model("test_convnext.r160_in1k", num_classes=0, checkpoint_path="encoder-timm.safetensors")
    reference = {key: value for key, value in theirs[0].state_dict().items() if not key.startswith("head.fc")}
    assert network.state_dict().keys() == reference.keys()
    assert all(torch.equal(value, reference[key]) for key, value in network.state_dict().items())
    main(["export", "--encoder.name", NAME, "-o", "again.safetensors"])
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "encoder-timm.safetensors").read_bytes()


def test_a_resnet_by_name_goes_to_torchvision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other, data = weights("resnet18", 7)
    (tmp_path / "w.safetensors").write_bytes(data)
    file = crosslevel.export("timm:resnet18.a1_in1k,weights=w.safetensors", "torchvision", quiet=True)
    state = torch.load(file, weights_only=True)
    network = torchvision.models.resnet18()
    assert network.load_state_dict(state, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in state.items())


def test_load_tells_the_licence_unless_it_is_to_be_quiet(capsys):
    crosslevel.load(NAME, device="cpu")
    assert capsys.readouterr().out.count("licence apache-2.0") == 1
    crosslevel.load(NAME, device="cpu", quiet=True)
    assert capsys.readouterr().out == ""


def test_the_licence_of_a_teacher_is_told_and_kept_in_the_run(photos, tmp_path, capsys):
    line = [
        "--method=Distill", f"--method.teacher={NAME},size=64", "--encoder.width=0.0625", "--batch_size=8",
        "--minutes=0.01", "--device=cpu", "--workers=0", "--report_html=false", "--monitor_every=0", "--views.size=16",
        f"--run={tmp_path / 'r'}",
    ]  # fmt: skip
    main(["train", str(photos), *line])
    says = f"teacher {NAME},size=64: 99 tensors from timm/test_convnext.r160_in1k on the hub; licence apache-2.0"
    said = capsys.readouterr().out
    assert (said.count(says), said.count("licence apache-2.0")) == (1, 1), said
    assert f"# weights: {says}\n" in (tmp_path / "r" / "config.yaml").read_text()


def test_search_explore_and_curate_share_one_table_of_its_features(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CROSSLEVEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    named = ["--encoder.name", f"{NAME.removeprefix('timm:')}", "--encoder.pretrained", "true", "--images", str(photos)]
    query = shutil.copy(photos / "cat" / "003.png", tmp_path)
    main(["search", *named, str(query), "-o", "found.json", "--device=cpu"])
    said = capsys.readouterr().out
    (made,) = (tmp_path / "cache" / "collections").glob("*.parquet")
    assert f"making {made}" in " ".join(said.split()).replace("/ ", "/")
    match = json.loads((tmp_path / "found.json").read_text())["results"][0]["matches"][0]
    assert (match["path"], match["distance"]) == ("cat/003.png", pytest.approx(0, abs=1e-5))
    when = made.stat().st_mtime_ns
    main(["explore", *named, "--export", "page", "--device=cpu"])
    assert len(list((tmp_path / "page").iterdir())) > 1
    main(["curate", *named, "-n", "4", "-o", "few.txt", "--device=cpu", "--outliers=keep"])
    assert len((tmp_path / "few.txt").read_text().splitlines()) == 4
    main(["curate", NAME, "--images", str(photos), "-n", "3", "-o", "few.txt", "--device=cpu", "--outliers=keep"])
    assert len((tmp_path / "few.txt").read_text().splitlines()) == 3
    assert made.stat().st_mtime_ns == when
    assert "the features are those in" in capsys.readouterr().out


def test_a_table_that_is_kept_follows_its_images(tmp_path, monkeypatch, capsys):
    photos = write_images(tmp_path / "photos", count=2)
    run = write_encoder(tmp_path / "run")
    query = shutil.copy(photos / "cat" / "000.png", tmp_path)
    options = {"images": str(photos), "k": 9, "device": "cpu", "workers": 0}
    assert len(crosslevel.search(str(run), str(query), **options)[0]["matches"]) == 4
    write_images(tmp_path / "photos", count=3)
    assert len(crosslevel.search(str(run), str(query), **options)[0]["matches"]) == 6
    assert "images have come, gone or changed" in capsys.readouterr().out
    (photos / "dog" / "001.png").unlink()
    assert len(crosslevel.search(str(run), str(query), **options)[0]["matches"]) == 5


def test_a_file_of_weights_stands_for_those_of_the_hub(theirs, photos, tmp_path):
    other, data = weights("test_convnext", 5)
    (tmp_path / "w.safetensors").write_bytes(data)
    found = crosslevel.load(f"{NAME},weights={tmp_path / 'w.safetensors'},size=64", device="cpu")
    assert found.view.size == 64
    assert torch.equal(found.encoder.backbone.state_dict()["stem.0.weight"], other.state_dict()["stem.0.weight"])


def test_what_is_wrong_with_a_name_ends_the_command_in_one_line(photos, capsys):
    for line, what in [
        (["embed", "timm:resnet19", str(photos)], "is not a timm model"),
        (["inspect", str(photos), "--run", "hf-hub:no/such"], "the hub knows no no/such"),
        (["search", NAME, "q.png"], "is an encoder, not a table: give --images"),
        (["explore", "--encoder.name=resnet19", f"--images={photos}"], "is not a timm model"),
        (["curate", "--encoder.pretrained=true"], "--encoder.pretrained needs --encoder.name"),
        (["embed", str(photos), "--encoder.name=resnet18", "--encoder.pretrained=false"], "without weights"),
        (["embed", "runs/a", str(photos), "--encoder.name=resnet18"], "one encoder, runs/a another"),
        (["explore", "t.parquet", "--encoder.name=resnet18"], "one encoder, t.parquet another"),
        (["inspect", str(photos), "--run=runs/a", "--encoder.name=resnet18"], "one encoder, runs/a another"),
        (["embed", "--encoder.name=resnet18"], "IMAGES is missing"),
        (["push", "runs/a", "hf:a/b", "--encoder.name=resnet18"], "there is no option --encoder.name"),
        (["embed", "timm:test_convnext,size=0", str(photos)], "give size=PIXELS or weights=FILE"),
    ]:
        with pytest.raises(SystemExit) as status:
            main(line)
        told = capsys.readouterr().err
        assert (status.value.code, told.count("\n")) == (2, 1)
        assert what in told
