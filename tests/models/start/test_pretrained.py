"""Weights by name: from a hub on this machine in the true format, by files, and what is refused."""

import json

import pytest
import timm
import torch
from hub_samples import local_hub, weights
from reference import normal
from timm.models import save_for_hf

from crosslevel.models.encoder import Encoder, load_encoder
from crosslevel.models.named import open_encoder
from crosslevel.utils.errors import UserError

TINY = "test_vit.r160_in1k"


def images(size, seed=0):
    return normal(seed, 2, 3, size, size, dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs():
    return weights("test_vit")


@pytest.fixture(scope="module")
def hub(theirs, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, local_hub(patch, tmp_path_factory.mktemp("hub")) as (hub, _):
        hub.put(f"timm/{TINY}", model__safetensors=theirs[1])
        hub.put("timm/test_vit2.r160_in1k", pytorch_model__bin=b"a pickle")
        yield hub


def pooled(model, shown):
    return model.forward_head(model.forward_features(shown), pre_logits=True)


def test_timms_name_gives_timms_features_and_its_view(hub, theirs):
    encoder = open_encoder(f"timm:{TINY}")
    config = timm.get_pretrained_cfg(TINY)
    assert encoder.view == (160, config.mean, config.std)
    assert torch.equal(encoder(images(160)), pooled(theirs[0], images(160)))
    assert encoder.licence == "apache-2.0"
    assert encoder.loaded == f"78 tensors from timm/{TINY} on the hub; licence apache-2.0"
    assert not encoder.training


def test_position_embeddings_follow_the_size_either_way(hub, theirs):
    """As timm resamples them when it loads the same weights into a model built for that size."""
    state = {key: value for key, value in theirs[0].state_dict().items() if not key.startswith("head")}
    model = timm.create_model("test_vit", num_classes=0, img_size=96).eval()
    model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(dict(state), model))
    expected = model(images(96))
    adapted = Encoder(TINY, pretrained=True)
    adapted.adapt(96)
    named, asked = open_encoder(f"timm:{TINY},size=96"), Encoder(TINY, pretrained=True, image_size=96)
    for encoder in (adapted.eval(), named, asked.eval()):
        torch.testing.assert_close(encoder(images(96)), expected)
        assert (encoder.view.size, encoder.fixed_size) == (96, 96)


def test_a_hub_repository_in_timms_format(hub, tmp_path):
    """With another pooling, mean and size than the architecture has, as its config says, and the card's licence."""
    model, _ = weights("test_vit", 1, num_classes=0, img_size=64, reg_tokens=2)
    save_for_hf(model, tmp_path, safe_serialization=True, data_config={"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)})
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model\n")
    files = {name.replace(".", "__"): (tmp_path / name).read_bytes() for name in ("config.json", "model.safetensors")}
    hub.put("somebody/tiny", README__md=(tmp_path / "README.md").read_bytes(), **files)
    for name in ("hf-hub:somebody/tiny", "hf-hub:somebody/tiny@main", "hf:somebody/tiny", str(tmp_path)):
        encoder = open_encoder(name)
        assert encoder.view == (64, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        assert encoder.licence == "cc-by-nc-4.0"
        assert torch.equal(encoder(images(64)), model(images(64)))
    file = encoder.save(tmp_path / "encoder.safetensors")
    again = load_encoder(file)
    assert torch.equal(again(images(64)), model(images(64)))
    assert again.licence == "cc-by-nc-4.0"


def test_a_local_file_in_place_of_the_named_weights(hub, theirs, tmp_path):
    (tmp_path / "mine.safetensors").write_bytes(theirs[1])
    asked = len(hub.seen)
    encoder = Encoder("test_vit", pretrained=str(tmp_path / "mine.safetensors"), image_size=160).eval()
    assert torch.equal(encoder(images(160)), pooled(theirs[0], images(160)))
    assert len(hub.seen) == asked
    with pytest.raises(UserError, match=r"encoder.pretrained=.*no\.safetensors: give true, or a \.safetensors file"):
        Encoder("test_vit", pretrained=str(tmp_path / "no.safetensors"))


@pytest.mark.parametrize("name", ["test_convnext.r160_in1k", "test_resnet.r160_in1k"])
def test_other_families(hub, name):
    model, file = weights(name.partition(".")[0], 2)
    hub.put(f"timm/{name}", model__safetensors=file)
    encoder = Encoder(name, pretrained=True)
    encoder.adapt(128)
    assert torch.equal(encoder.eval()(images(128)), pooled(model, images(128)))
    assert encoder.small_images is False


def test_a_vits_feature_is_the_class_token_or_the_mean_of_the_others(hub, theirs):
    tokens = theirs[0].forward_features(images(160))
    assert torch.equal(Encoder(TINY, pretrained=True, pool="token").eval()(images(160)), tokens[:, 0])
    mean = Encoder(TINY, pretrained=True, pool="avg").eval()
    torch.testing.assert_close(mean(images(160)), tokens[:, 1:].mean(1))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("timm:test_vitt", "encoder.name='test_vitt' is not a timm model: did you mean test_vit"),
        ("timm:test_vit.none", r"timm has no such weights of test_vit: there are test_vit\.r160_in1k"),
        ("timm:test_vit3.r160_in1k", r"the hub knows no timm/test_vit3\.r160_in1k: check the name"),
        ("timm:test_vit2.r160_in1k", r"has no weights as safetensors \(model\.safetensors or .*are not read"),
        ("hf-hub:nobody/nothing", "the hub knows no nobody/nothing"),
        ("hf-hub:no/na/me", "no/na/me' is no name of the hub's: give owner/name"),
        ("hf-hub:nobody/gated", r"given out on terms: accept them at http://127\.0\.0\.1:\d+/nobody/gated"),
        (f"hf-hub:timm/{TINY}", r"the repository has no config\.json of timm's"),
        (f"hf-hub:timm/{TINY}@other", "has no revision 'other'"),
        (f"timm:{TINY},side=3", "'side=3' is no setting of it: give size=PIXELS or weights=FILE"),
        (f"timm:{TINY},size=100", "takes images of whole patches of 16 pixels, not 100: give 96"),
        ("local-dir:/nowhere", r"there is no /nowhere/config\.json"),
    ],
)
def test_a_name_that_cannot_be_had_is_one_line(hub, name, what):
    hub.put("nobody/gated", config__json=b"{}")
    hub.gated.add("nobody/gated")
    with pytest.raises(UserError, match=what) as error:
        open_encoder(name)
    assert "\n" not in str(error.value)


def test_without_network_the_cache_serves_and_else_a_line_says_so(hub, monkeypatch):
    open_encoder(f"timm:{TINY}")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    open_encoder(f"timm:{TINY}")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9 cannot be reached, and timm/test_vit3.* is not in"):
        open_encoder("timm:test_vit3.r160_in1k")


def test_what_a_config_may_not_say(tmp_path, theirs):
    """A stranger's repository builds networks by sizes; it names no file, no class and no address."""
    (tmp_path / "model.safetensors").write_bytes(theirs[1])
    for extra in ({"checkpoint_path": "/etc/passwd"}, {"pretrained_cfg": {"url": "http://x"}}, {"img_size": {"a": 1}}):
        config = {"architecture": "test_vit", "num_classes": 1000, "pretrained_cfg": {}, "model_args": extra}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=f"encoder.arguments: {next(iter(extra))}=.* is no argument that a network"):
            open_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "os.system"}))
    with pytest.raises(UserError, match=r"it holds 'os.system', which is no model of timm"):
        open_encoder(str(tmp_path))


def test_weights_of_another_network_and_damaged_ones(tmp_path, theirs):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit2", "num_classes": 1000}))
    (tmp_path / "model.safetensors").write_bytes(theirs[1])
    with pytest.raises(UserError, match="its weights are not those of test_vit2"):
        open_encoder(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(theirs[1][:999])
    with pytest.raises(UserError, match="is damaged, or no safetensors file"):
        open_encoder(str(tmp_path))
