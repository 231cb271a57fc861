"""The encoder: shapes, stems, widths, and weights from and to other libraries."""

import copy

import pytest
import timm
import torch
import torchvision
from reference import normal
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from crosslevel.models.encoder import Encoder, View, load_encoder
from crosslevel.models.start.weights import load_weights


def images(seed=0, size=32, batch=2):
    return normal(seed, batch, 3, size, size, dtype=torch.float32)


def lively(module, seed=0):
    """Weights and batch statistics that no two channels share, so that a misplaced tensor shows."""
    state = module.state_dict()
    for i, (name, value) in enumerate(state.items()):
        if value.is_floating_point():
            noise = normal(seed + i, *value.shape, dtype=value.dtype)
            value.copy_(1 + 0.3 * noise.abs() if "running_var" in name or value.ndim == 1 else 0.05 * noise)
    return module.eval()


@pytest.mark.parametrize(
    ("options", "features"),
    [
        ({"name": "resnet18"}, 512),
        ({"name": "resnet50", "small_images": True, "width": 0.25}, 512),
        ({"name": "vit_tiny_patch16_224", "image_size": 32}, 192),
        ({"name": "convnext_atto"}, 320),
        ({"name": "mobilenetv3_small_050"}, 1024),
        ({"name": "test_vit", "image_size": 32}, 64),
    ],
)
def test_features_of_any_timm_model(options, features):
    encoder = Encoder(**options)
    out = encoder(images())
    assert out.shape == (2, features)
    assert encoder.num_features == features
    out.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


@pytest.mark.parametrize(
    ("name", "width"), [("resnet18", 0.25), ("resnet18", 2.0), ("seresnet50", 0.25), ("resnext50_32x4d", 0.5)]
)
def test_width_multiplies_every_channel(name, width):
    """The stem's too; the network is otherwise the same."""
    with torch.device("meta"):
        full = timm.create_model(name, num_classes=0)
    narrow = Encoder(name, width=width).backbone
    pairs = dict(full.named_modules())
    assert list(pairs) == [key for key, _ in narrow.named_modules()]
    for key, module in narrow.named_modules():
        if isinstance(module, nn.Conv2d):
            before = pairs[key]
            assert module.out_channels == before.out_channels * width
            assert module.in_channels == (3 if before.in_channels == 3 else before.in_channels * width)
            for same in ("kernel_size", "stride", "padding", "groups"):
                assert getattr(module, same) == getattr(before, same)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.num_features == pairs[key].num_features * width
    assert narrow.num_features == full.num_features * width
    assert narrow(images()).shape == (2, narrow.num_features)


@pytest.mark.parametrize(("zero", "gain"), [(None, 1), (True, 0), (False, 1)])
@pytest.mark.parametrize("width", [1.0, 0.25])
def test_residual_branches_start_as_asked(zero, gain, width):
    encoder = Encoder(width=width, zero_init_last=zero)
    assert all((block.bn2.weight == gain).all() for block in encoder.backbone.layer3)


@pytest.mark.parametrize(("small", "side"), [(True, 32), (False, 8), (None, 8)])
def test_small_stem_keeps_every_pixel(small, side):
    encoder, sizes = Encoder(width=0.25, small_images=small), []
    encoder.backbone.layer1.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-2:]))
    encoder(images())
    assert sizes == [(side, side)]
    assert encoder.small_images is small


@pytest.mark.parametrize(
    ("options", "size", "small"),
    [
        ({}, 32, True),
        ({}, 64, True),
        ({}, 65, False),
        ({"small_images": False}, 32, False),
        ({"small_images": True}, 224, True),
    ],
)
def test_stem_follows_the_size_of_the_views_unless_given(options, size, small):
    encoder = Encoder(width=0.25, **options)
    encoder.adapt(size)
    assert encoder.small_images is small
    assert encoder.backbone.conv1.kernel_size == ((3, 3) if small else (7, 7))


@pytest.mark.parametrize("width", [1.0, 0.25])
@pytest.mark.parametrize("init", ["timm", "torch"])
def test_weights_are_drawn_as_timm_or_as_torch_draws_them(width, init):
    """Deviations by fan: He's normal by fan-out, PyTorch's uniform within 1 / sqrt(fan-in); the small stem, too."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18", small_images=True, width=width, init=init)
    for conv in (encoder.backbone.conv1, encoder.backbone.layer3[0].conv2, encoder.backbone.layer4[0].conv1):
        fan_in, fan_out = (channels * 9 for channels in (conv.in_channels, conv.out_channels))
        deviation = (2 / fan_out) ** 0.5 if init == "timm" else (1 / (3 * fan_in)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(deviation, rel=0.1)
        largest = conv.weight.abs().max().item()
        assert (largest <= fan_in**-0.5) if init == "torch" else (largest > 2 * deviation)
    assert Encoder(**encoder.arguments()).init == init


def test_stem_of_a_model_without_one_stays():
    encoder = Encoder("convnext_atto")
    encoder.adapt(32)
    assert encoder.small_images is False


@pytest.mark.parametrize(
    "options",
    [
        {"width": 0.25, "small_images": True},
        {"width": 0.5, "zero_init_last": False},
        {"name": "vit_tiny_patch16_224", "image_size": 32},
    ],
)
def test_round_trip_is_exact(tmp_path, options):
    encoder = lively(Encoder(**options))
    encoder.view = View(48, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    encoder.save(tmp_path / "encoder.safetensors")
    for path in (tmp_path, tmp_path / "encoder.safetensors"):
        loaded = load_encoder(path)
        assert not loaded.training
        assert loaded.view == encoder.view
        assert torch.equal(loaded(images()), encoder(images()))


def test_reading_an_encoder_draws_nothing(tmp_path):
    """No random numbers, and none without values, on which PyTorch would spend most of the time."""
    Encoder("resnet18", width=0.0625).save(tmp_path / "encoder.safetensors")
    state, called = torch.get_rng_state(), set()

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.add(function.overloadpacket)
            return function(*args, **(kwargs or {}))

    with Calls():
        load_encoder(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.ops.aten.empty in called
    assert not called & {torch.ops.aten.normal_, torch.ops.aten.uniform_}


def test_round_trip_of_an_adapted_encoder(tmp_path):
    encoder = lively(Encoder(width=0.25))
    encoder.adapt(32)
    assert torch.equal(load_encoder(encoder.save(tmp_path / "mine.safetensors"))(images()), encoder(images()))


def test_plain_timm_loads_what_we_save(tmp_path):
    encoder = lively(Encoder("resnet18", small_images=False))
    file = encoder.save(tmp_path / "encoder.safetensors")
    theirs = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(file)).eval()
    assert torch.equal(theirs(images()), encoder(images()))


def test_torchvision_weights_give_torchvisions_features(tmp_path):
    theirs = lively(torchvision.models.resnet18(weights=None))
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    encoder = Encoder(weights=str(tmp_path / "resnet18.pth")).eval()
    theirs.fc = nn.Identity()
    torch.testing.assert_close(encoder(images()), theirs(images()), rtol=1e-4, atol=1e-5)
    total = len(encoder.backbone.state_dict())
    message = f"{total} of {total} tensors loaded; kept their start: none; not used: fc.bias, fc.weight"
    assert encoder.loaded == message
    assert (encoder.adapt(32), encoder.small_images) == (None, False)


def test_timm_weights(tmp_path):
    theirs = lively(timm.create_model("resnet18"))
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    encoder = Encoder(weights=str(tmp_path / "timm.safetensors")).eval()
    assert torch.equal(encoder(images()), theirs.forward_head(theirs.forward_features(images()), pre_logits=True))


@pytest.mark.parametrize(
    ("prefix", "outer"),
    [
        ("module.encoder_q.", "state_dict"),
        ("module.base_encoder.", None),
        ("backbone.", "model"),
        ("model.encoder.", None),
    ],
)
def test_prefixes_of_other_training_programs(tmp_path, prefix, outer):
    """The file of a MoCo run also has a key network and a queue."""
    source = lively(Encoder(width=0.25)).backbone.state_dict()
    state = {prefix + key: value for key, value in source.items()}
    state |= {"module.queue": torch.zeros(4, 8), "module.encoder_k.bn1.weight": torch.zeros(16)}
    torch.save({outer: state, "epoch": 7} if outer else state, tmp_path / "run.pt")
    encoder = Encoder(width=0.25, weights=str(tmp_path / "run.pt"))
    assert all(torch.equal(value, source[key]) for key, value in encoder.backbone.state_dict().items())
    assert encoder.loaded.startswith(f"{len(source)} of {len(source)} tensors loaded; kept their start: none;")
    assert "queue" in encoder.loaded


def test_a_prefix_that_the_model_has_itself_stays(tmp_path):
    model, weight = nn.ModuleDict({"encoder": nn.Linear(2, 2, bias=False)}), normal(0, 2, 2, dtype=torch.float32)
    save_file({"module.encoder.weight": weight}, tmp_path / "run.safetensors")
    assert load_weights(model, tmp_path / "run.safetensors").startswith("1 of 1 tensors loaded;")
    assert torch.equal(model["encoder"].weight, weight)


def test_partial_weights_name_what_did_not_match(tmp_path):
    backbone = Encoder(width=0.25).backbone
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    offered = {"conv1.weight": torch.full((16, 3, 7, 7), 0.5), "bn1.weight": torch.ones(99), "extra": torch.ones(1)}
    save_file(offered, tmp_path / "part.safetensors")
    said = load_weights(backbone, tmp_path / "part.safetensors")
    assert said.startswith("1 of 120 tensors loaded; kept their start: bn1.bias, bn1.running_mean, ")
    assert said.endswith("; not used: bn1.weight, extra")
    assert sum(key in said for key in before) == 100  # all but the counters of batches
    assert (backbone.conv1.weight == 0.5).all()
    after = backbone.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if key != "conv1.weight")


def test_weights_of_which_none_matches_are_an_error(tmp_path):
    save_file({"other.weight": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors: none of its 1 keys fits the model's 120"):
        Encoder(weights=str(tmp_path / "other.safetensors"))


def test_step_counters_alone_are_no_match(tmp_path):
    """The weights of a full-width network fit a narrow one nowhere but in its counters of batches."""
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(ValueError, match=r"wide.pth: none of its 122 keys fits the model's 120"):
        Encoder(width=0.25, weights=str(tmp_path / "wide.pth"))


def test_files_that_hold_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"encoder.weights=.*absent.pth: there is no such file"):
        Encoder(width=0.25, weights=str(tmp_path / "absent.pth"))
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ValueError, match=r"text.pth: not a file of weights"):
        Encoder(width=0.25, weights=str(tmp_path / "text.pth"))
    (tmp_path / "text.safetensors").write_text("not weights")
    with pytest.raises(ValueError, match=r"text.safetensors: not a file of weights"):
        Encoder(width=0.25, weights=str(tmp_path / "text.safetensors"))
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    with pytest.raises(ValueError, match=r"numbers.pth: it holds no dictionary of tensors"):
        Encoder(width=0.25, weights=str(tmp_path / "numbers.pth"))


def test_what_cannot_be_built_says_why():
    with pytest.raises(ValueError, match=r"encoder.name='resnet19' is not a timm model: did you mean .*resnet1"):
        Encoder("resnet19")
    with pytest.raises(ValueError, match=r"encoder.name='\?' is not a timm model: timm.list_models\(\) has them all"):
        Encoder("?")
    with pytest.raises(ValueError, match=r"encoder.width=0.5 is for ResNets with a one-convolution stem; vit_tiny"):
        Encoder("vit_tiny_patch16_224", width=0.5)
    with pytest.raises(ValueError, match=r"encoder.small_images fits ResNets with a one-convolution stem, not conv"):
        Encoder("convnext_atto", small_images=True)


def test_loading_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no encoder.safetensors: give the folder of a run"):
        load_encoder(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match=r"does not say how to build its network: it was not written by Crosslevel"):
        load_encoder(tmp_path)
    assert set(load_file(tmp_path / "encoder.safetensors")) == {"a"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"name": "resnet18", "image_size": 64}, "resnet18 does not take img_size"),
        ({"name": "test_vit", "zero_init_last": True}, "test_vit does not take zero_init_last"),
    ],
)
def test_an_option_that_a_model_lacks_says_so(options, named):
    with pytest.raises(ValueError, match=named):
        Encoder(**options)


def test_a_model_for_one_size_knows_it():
    assert Encoder("test_vit").fixed_size == 160
    assert Encoder("test_vit", image_size=64).fixed_size == 64
    assert Encoder("resnet18", width=0.25).fixed_size is None


@pytest.mark.parametrize("width", [0.0625, 0.125, 0.25])
def test_narrow_networks_learn_by_the_exact_gradient_in_any_memory_format(width):
    """In float32 as in float64: oneDNN has no fast path, and no fault, in the latter."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18", small_images=True, width=width, zero_init_last=False).train()
    exact = copy.deepcopy(encoder).double()
    x = torch.randn(4, 3, 16, 16)
    encoder.to(memory_format=torch.channels_last)
    encoder(x.contiguous(memory_format=torch.channels_last)).square().mean().backward()
    exact(x.double()).square().mean().backward()
    for (name, found), true in zip(encoder.named_parameters(), exact.parameters(), strict=True):
        gap = (found.grad.double() - true.grad).norm() / true.grad.norm()
        assert gap < 1e-3, name
