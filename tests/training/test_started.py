"""Trainings that start from weights by name: rates, what is trained, the start beside the end, and falls."""

from functools import partial
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from hub_samples import local_hub, weights
from run_samples import metrics, write_images
from safetensors.torch import load_file

import crosslevel
from crosslevel.cld.loss import CrossLevel
from crosslevel.cli import main
from crosslevel.methods import SimCLR
from crosslevel.models.encoder import Encoder, load_encoder
from crosslevel.models.start.trained import merged
from crosslevel.runs import Run
from crosslevel.training.loop.guards.fall import FallGuard
from crosslevel.training.loop.module import Pretrain
from crosslevel.transforms.views import Views
from crosslevel.utils.console import printer
from crosslevel.utils.errors import UserError

NAME = "test_vit.r160_in1k"
LESS = ["--epochs=2", "--batch_size=8", "--device=cpu", "--workers=0", "--report_html=false", "--cld.groups=4"]


@pytest.fixture(scope="module", autouse=True)
def theirs(tmp_path_factory):
    model, file = weights("test_vit")
    with pytest.MonkeyPatch.context() as patch, local_hub(patch, tmp_path_factory.mktemp("hub")) as (hub, _):
        hub.put(f"timm/{NAME}", model__safetensors=file)
        yield model


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("photos"), count=12, size=(32, 32))


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "vit"
    line = [f"--encoder.name={NAME}", "--encoder.pretrained=true", *LESS, f"--run={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "300")
        main(["train", str(photos), *line])
    return folder


def test_what_follows_from_the_weights_is_kept_in_the_run(run):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    config = timm.get_pretrained_cfg(NAME)
    assert (settings["optimizer"], settings["encoder_rate"], settings["layer_decay"]) == ("adamw", 0.1, 0.75)
    assert settings["encoder"] | {"pretrained": True, "image_size": 112, "drop_path": 0.1} == settings["encoder"]
    assert (settings["views"]["size"], settings["views"]["mean"]) == (112, list(config.mean))
    notes = (run / "config.yaml").read_text()
    assert f"# weights: 78 tensors from timm/{NAME} on the hub; licence apache-2.0\n" in notes
    assert "# chosen: --optimizer adamw" in notes
    encoder = load_encoder(run)
    assert (encoder.licence, encoder.view.size, encoder.view.std) == ("apache-2.0", 112, config.std)


def test_the_frozen_start_is_measured_first_and_stands_beside_the_end(run, photos, tmp_path, capsys):
    rows = metrics(run)
    assert rows[0]["step"] == "0"
    assert float(rows[0]["knn"]) >= 0
    main(["evaluate", str(run), str(photos), "--test", str(photos), "--workers=0", "--device=cpu"])
    assert "start (frozen)" in capsys.readouterr().out
    found = crosslevel.evaluate(str(run), str(photos), test=str(photos), workers=0, quiet=True, device="cpu")
    figures = next(iter(found.values()))
    assert list(figures) == ["raw pixels", "untrained encoder", "start (frozen)", "trained encoder"]
    alone = crosslevel.evaluate(
        f"timm:{NAME},size=112", photos, test=photos, workers=0, quiet=True, output=tmp_path / "e.json"
    )
    assert next(iter(alone.values()))[f"timm:{NAME},size=112"] == figures["start (frozen)"]


def test_the_end_is_compared_with_the_frozen_start_in_the_output_and_at_the_head_of_the_page(tmp_path, capsys):
    """By the accuracy of the log's first and last rows, on images of which two classes look alike."""
    photos = write_images(tmp_path / "photos", count=15, size=(32, 32), classes="abcd")
    line = [f"--encoder.name={NAME}", "--encoder.pretrained=true", "--encoder.image_size=32", "--epochs=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "300")
        main(["train", str(photos), *line, "--batch_size=20", "--device=cpu", "--workers=0", f"--run={tmp_path / 'r'}"])
    start, end = (float(row["knn"]) for row in metrics(tmp_path / "r") if row["knn"])
    *_, finding, done, _, _ = capsys.readouterr().out.splitlines()
    told = f"kNN accuracy by the labels of 10 images trained on: trained {end:.1f} %, start (frozen) {start:.1f} %, raw"
    assert told in finding
    assert "done in" in done
    assert told in (tmp_path / "r" / "report.html").read_text().partition("<h2")[0]


def test_a_run_goes_on_as_it_would_have(run, photos, tmp_path):
    half = tmp_path / "half"
    line = [f"--encoder.name={NAME}", "--encoder.pretrained=true", *LESS, f"--run={half}"]
    main(["train", str(photos), *line, "--quiet=true"])
    state = torch.load(half / "checkpoints" / "previous.ckpt", weights_only=True)
    assert state["global_step"] == 3
    (half / "checkpoints" / "previous.ckpt").replace(half / "checkpoints" / "last.ckpt")
    main(["train", "--resume", str(half), "--quiet=true"])
    a, b = (load_file(folder / "encoder.safetensors") for folder in (run, half))
    assert all(torch.equal(a[name], b[name]) for name in a)


def module(encoder, **rates):
    method = SimCLR(encoder)
    rates = {"encoder_rate": 1.0, "layer_decay": 1.0} | rates
    return Pretrain(
        encoder, method, CrossLevel(encoder.num_features, groups=2), Views(size=32), steps=10, warmup_steps=0,
        optimizer="adamw", lr=0.5, weight_decay=0.1, seed=0, **rates,
    )  # fmt: skip


def test_rates_fall_with_depth_and_heads_have_the_whole_rate():
    """In a ViT of n blocks, the last has the encoder's share, each one below decay times as much, as has the stem."""
    encoder = Encoder("test_vit", image_size=32)
    trained = module(encoder, encoder_rate=0.5, layer_decay=0.75)
    optimizer = trained.configure_optimizer()
    trained.begin_step(optimizer)
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(rate) == len(list(trained.parameters()))
    blocks = len(encoder.backbone.blocks)
    for name, parameter in encoder.backbone.named_parameters():
        depth = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else blocks if name.startswith("norm") else 0
        assert rate[id(parameter)] == pytest.approx(0.5 * 0.5 * 0.75 ** (blocks - depth)), name
        plain = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
        assert decay[id(parameter)] == (0.1 if plain else 0.0), name
    assert all(rate[id(p)] == 0.5 for part in (trained.method, trained.cld) for p in part.parameters())


def test_rates_of_a_convnext_fall_with_depth():
    """Block by block through the stages, a stage's first with its downsampling; the last norm is a layer above."""
    network = Encoder("test_convnext").backbone
    places = [(stage, block) for stage, part in enumerate(network.stages) for block in range(len(part.blocks))]
    assert len(places) > len(network.stages)
    trained = module(Encoder("test_convnext"), encoder_rate=0.5, layer_decay=0.75)
    optimizer = trained.configure_optimizer()
    trained.begin_step(optimizer)
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert len(rate) == len(list(trained.parameters()))
    for name, parameter in trained.encoder.backbone.named_parameters():
        part, *rest = name.split(".")
        depth = {"stem": 0, "head": len(places) + 1}.get(part)
        if depth is None:
            depth = 1 + places.index((int(rest[0]), int(rest[2]) if rest[1] == "blocks" else 0))
        assert rate[id(parameter)] == pytest.approx(0.5 * 0.5 * 0.75 ** (len(places) + 1 - depth)), name


@pytest.mark.parametrize(
    ("what", "trained"),
    [
        ("all", lambda name: True),
        ("last:2", lambda name: name.startswith(("blocks.4.", "blocks.5.", "norm."))),
        ("norm", lambda name: "norm" in name),
    ],
)
def test_only_what_is_asked_for_is_trained(what, trained):
    encoder = Encoder("test_vit", image_size=32, train=what)
    assert len(encoder.backbone.blocks) == 6
    found = {name for name, parameter in encoder.backbone.named_parameters() if parameter.requires_grad}
    assert found == {name for name, _ in encoder.backbone.named_parameters() if trained(name)}


def test_of_a_convnext_the_last_block_has_the_norm_that_follows():
    names = [n for n, p in Encoder("test_convnext", train="last:1").backbone.named_parameters() if p.requires_grad]
    assert {n.rsplit(".", 1)[0].split(".conv")[0] for n in names} >= {"head.norm"}
    assert any(n.startswith("stages.3.blocks.") for n in names)
    assert not any(n.startswith(("stages.2", "stem")) for n in names)


def test_batch_statistics_that_are_not_trained_stay():
    encoder = Encoder("test_resnet", train="last:1")
    before = {name: value.clone() for name, value in encoder.backbone.named_buffers()}
    encoder.train()(torch.randn(4, 3, 64, 64))
    moved = {n for n, value in encoder.backbone.named_buffers() if not torch.equal(value, before[n])}
    assert moved
    assert all(name.startswith("layer4") for name in moved)


def test_lora_starts_as_the_network_and_is_saved_as_a_plain_one(tmp_path):
    torch.manual_seed(0)
    plain, shown = Encoder("test_vit", image_size=32).eval(), torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    encoder = Encoder("test_vit", image_size=32, train="lora:3").eval()
    torch.testing.assert_close(encoder(shown), plain(shown))
    trained = [n for n, p in encoder.backbone.named_parameters() if p.requires_grad]
    assert {name.rsplit(".", 1)[1] for name in trained} == {"a", "b"}
    for name, parameter in encoder.backbone.named_parameters():
        if name.endswith(".b"):
            parameter.data.normal_()
    qkv = encoder.backbone.blocks[0].attn.qkv
    a, b = qkv.parametrizations.weight[0].a, qkv.parametrizations.weight[0].b
    assert a.shape == (3, 64)
    expected = plain.backbone.blocks[0].attn.qkv.weight + 16 / 3 * b @ a
    torch.testing.assert_close(merged(encoder.backbone)["blocks.0.attn.qkv.weight"], expected)
    again = load_encoder(encoder.save(tmp_path / "encoder.safetensors"))
    assert set(again.backbone.state_dict()) == set(plain.backbone.state_dict())
    torch.testing.assert_close(again(shown), encoder(shown))


@pytest.mark.parametrize("what", ["lora", "norm", "last:1"])
def test_a_run_that_trains_a_part(what, photos, tmp_path, theirs):
    line = [f"--encoder.name={NAME}", "--encoder.pretrained=true", f"--encoder.train={what}", "--encoder.image_size=32"]
    main(["train", str(photos), *line, *LESS, f"--run={tmp_path / 'r'}", "--quiet=true", "--method=BYOL"])
    after, before = load_file(tmp_path / "r" / "encoder.safetensors"), Encoder(NAME, pretrained=True, image_size=32)
    moved = {name for name, value in before.backbone.state_dict().items() if not torch.equal(value, after[name])}
    inside = {
        "lora": lambda n: n.endswith((".qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")) and "patch" not in n,
        "norm": lambda n: "norm" in n,
        "last:1": lambda n: n.startswith(("blocks.5.", "norm.")),
    }[what]
    assert moved
    assert all(map(inside, moved)), moved


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("some", "encoder.train='some': give all, last:N, norm or lora"),
        ("last", "give a whole number of at least 1 after the colon, such as last:4"),
        ("last:0", "give a whole number of at least 1"),
        ("last:99", "the network has 6 blocks: give at most last:6"),
        ("norm:3", "give all, last:N, norm or lora"),
    ],
)
def test_what_cannot_be_trained_says_so(what, told):
    with pytest.raises(UserError, match=told):
        Encoder("test_vit", train=what)
    with pytest.raises(UserError, match="lora: the network has no linear layers"):
        Encoder("resnet18", width=0.0625, train="lora")


class Scripted:
    """A monitor that has its figures beforehand, and keeps the weights that it saw."""

    def __init__(self, figures):
        self.figures, self.seen = list(figures), []

    def part(self, source):
        return source

    def monitor(self, encoder, *_):
        def measure():
            self.seen.append({k: v.clone() for k, v in encoder.backbone.state_dict().items()})
            return {"combined": self.figures.pop(0)}

        return measure


def fallen(photos, folder, figures, **more):
    from crosslevel.training.train import train

    watch = Scripted(figures)
    train(
        str(photos), encoder=partial(Encoder, NAME, pretrained=True, image_size=32), epochs=4, batch_size=8,
        run=str(folder), device="cpu", workers=0, monitor_every=1, report_html=False, quiet=True, watch=watch, **more,
    )  # fmt: skip
    return watch


def test_a_fall_ends_the_training_and_leaves_the_best_encoder(photos, tmp_path):
    watch = fallen(photos, tmp_path / "r", [0.80, 0.82, 0.74, 0.9, 0.9])
    assert len(watch.seen) == 3
    left = load_file(tmp_path / "r" / "encoder.safetensors")
    assert all(torch.equal(value, left[name]) for name, value in watch.seen[1].items())
    warning = (tmp_path / "r" / "warnings.txt").read_text()
    assert warning.startswith("step 6: the features fall: score 0.740, score 0.800 at the start: stopped, and the enc")
    assert "the encoder of step 3 is left (score 0.820)" in warning


def test_a_fall_from_the_first_figure_on_leaves_the_start(photos, tmp_path):
    watch = fallen(photos, tmp_path / "r", [0.80, 0.70])
    left = load_file(tmp_path / "r" / "encoder.safetensors")
    assert all(torch.equal(value, left[name]) for name, value in watch.seen[0].items())


def test_no_fall_and_none_that_is_to_be_stopped(photos, tmp_path):
    assert len(fallen(photos, tmp_path / "a", [0.80, 0.79, 0.77, 0.79, 0.80]).seen) == 5
    assert len(fallen(photos, tmp_path / "b", [0.1, 0.1, 0.1, 0.1], stop_fall=False).seen) == 4
    assert not (tmp_path / "a" / "warnings.txt").exists()


def test_a_fall_of_just_the_margin_is_none(tmp_path):
    """Of 22 right answers of 40 queries two may be lost, which are 5 points: 55.00000000000001 less 50."""
    guard = FallGuard(Run(tmp_path), SimpleNamespace(step=7), printer(quiet=True), Encoder("test_vit", image_size=32))
    guard.begin({"knn": 100 * (22 / 40)})
    assert not guard.look({"knn": 100 * (20 / 40)})
    assert guard.look({"knn": 100 * (19 / 40)})


def test_a_size_of_no_whole_patches_is_refused_in_one_line(photos, capsys):
    line = [f"--encoder.name={NAME}", "--encoder.pretrained=true", "--views.size=100", *LESS]
    with pytest.raises(SystemExit):
        main(["train", str(photos), *line])
    assert "takes images of whole patches of 16 pixels, not 100: give 96" in capsys.readouterr().err
