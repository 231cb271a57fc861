"""The backbone: any timm model, a stem for small images, a width for the ResNets, loading and saving."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, final

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from crosslevel.utils.errors import NotThere, UserError, did_you_mean
from crosslevel.utils.files import write_tensors
from crosslevel.utils.tensors import load_safetensors, load_tensors

SMALL = 64  # pixels: up to this size a ResNet's usual stem would throw most of the image away
FILE = "encoder.safetensors"


class View(NamedTuple):
    """What the encoder was trained to look at: ``size`` pixels square, normalized by ``mean`` and ``std``."""

    size: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@final
class Encoder(nn.Module):
    """A timm backbone without classifier: images (B, 3, h, w) -> features (B, D).

    ``backbone`` is the timm model itself, ``num_features`` is D, ``view`` the images that it is trained on.
    """

    def __init__(
        self,
        name: str = "resnet18",
        small_images: bool | None = None,
        width: float = 1.0,
        weights: str | None = None,
        zero_init_last: bool | None = None,
        image_size: int | None = None,
    ) -> None:
        """Build the network.

        Args:
            name: any timm model, e.g. resnet50, convnext_tiny, vit_small_patch16_224.
            small_images: a 3x3 stem of stride 1 without max-pooling, for ResNets on images of about 32 pixels;
                chosen by the size of the views unless given.
            width: multiplies the channels of a ResNet; 0.25 gives 16, 32, 64, 128.
            weights: file of starting weights (timm or torchvision, .safetensors, .pth or .pt).
            zero_init_last: start a ResNet's residual branches at zero; not unless given (timm starts them at zero).
            image_size: pixels, for models that are built for one size (ViT); the model's own unless given.

        Raises:
            ValueError: an unknown model, a width for a model that has none, or weights that do not fit.

        """
        super().__init__()
        self.name, self.width, self.weights = name, width, weights
        self.zero_init_last, self.image_size = zero_init_last, image_size
        self.small_images: bool | None = None
        self.loaded = ""
        self.view = View(size=32)
        self.backbone = _create(name, zero_init_last, image_size)
        if width != 1.0:
            _narrow(self.backbone, name, width, zero_init_last)
        if small_images:
            self.use_small_stem()
        elif small_images is not None:
            self.small_images = False
        if weights is not None:
            self.loaded = load_weights(self.backbone, weights)

    @property
    def num_features(self) -> int:
        """D, the size of the features."""
        # Some models have layers between the pooled maps and the classifier: their size is timm's head_hidden_size.
        size: Any = getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features
        return int(size)

    @property
    def fixed_size(self) -> int | None:
        """Height and width of the only images that the network takes, if it is built for one size (ViT)."""
        built: dict[str, Any] = getattr(self.backbone, "default_cfg", {})
        if not built.get("fixed_input_size"):
            return None
        return self.image_size or int(built["input_size"][-1])

    def forward(self, images: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B D"]:
        """The pooled features."""
        features: Tensor = self.backbone(images)
        return features

    def identity(self) -> str:
        """Changes when a weight does, or what the network looks at."""
        digest = hashlib.sha256(repr((self.name, *self.view)).encode())
        for name, value in self.backbone.state_dict().items():
            digest.update(name.encode())
            digest.update(memoryview(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
        return digest.hexdigest()

    def adapt(self, size: int) -> None:
        """Choose the stem for views of ``size`` pixels, where ``small_images`` was left open."""
        if self.small_images is None and isinstance(self.backbone, ResNet) and size <= SMALL and self.weights is None:
            self.use_small_stem()
        elif self.small_images is None:
            self.small_images = False

    def use_small_stem(self) -> None:
        """Replace the first convolution by one of 3x3 and stride 1, and drop the max-pooling.

        Raises:
            ValueError: the model is not a ResNet with the usual single convolution.

        """
        stem = getattr(self.backbone, "conv1", None)
        if not isinstance(self.backbone, ResNet) or not isinstance(stem, nn.Conv2d):
            raise UserError(f"encoder.small_images fits ResNets with a one-convolution stem, not {self.name}")
        small = nn.utils.skip_init(nn.Conv2d, 3, stem.out_channels, 3, padding=1, bias=False)
        # From a generator of its own, the stem starts alike whether it is asked for or chosen later.
        draws = torch.Generator().manual_seed(torch.initial_seed())
        nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu", generator=draws)
        self.backbone.add_module("conv1", small)
        self.backbone.add_module("maxpool", nn.Identity())
        self.small_images = True

    def save(self, path: str | Path) -> Path:
        """Write the backbone's weights under timm's own key names, and how to build it, to ``path``."""
        built = {k: getattr(self, k) for k in _BUILT}
        built["view"] = self.view._asdict()
        state = {k: v.detach().contiguous().cpu() for k, v in self.backbone.state_dict().items()}
        write_tensors(path, state, {"format": "pt", "crosslevel": json.dumps(built)})
        return Path(path)


_BUILT = ("name", "small_images", "width", "zero_init_last", "image_size")
"""How a network is built, as its file says; what else `Encoder` takes, such as weights, no file names."""


def load_encoder(path: str | Path) -> Encoder:
    """The encoder that a run left behind, in evaluation mode.

    Args:
        path: the run's folder, or its ``encoder.safetensors``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file was not written by `Encoder.save`, or is damaged.

    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise NotThere(f"{path} has no {FILE}: give the folder of a run that `crosslevel train` finished")
    weights, about = load_safetensors(file)
    built = about.get("crosslevel")
    if built is None:
        raise UserError(f"{file} does not say how to build its network: it was not written by Crosslevel")
    try:
        settings = json.loads(built)
        view = settings.pop("view")
        if unknown := settings.keys() - set(_BUILT):
            raise KeyError(min(unknown))
        encoder = _filled(settings, weights)
        encoder.view = View(view["size"], tuple(view["mean"]), tuple(view["std"]))
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{file} says how to build another network than it holds: {error}") from error
    return encoder.eval()


def _filled(settings: dict[str, Any], weights: dict[str, Tensor]) -> Encoder:
    """An encoder with ``weights``, without first drawing the random ones that they replace."""
    with torch.device("meta"):
        encoder = Encoder(**settings)
    encoder.backbone.load_state_dict(weights, assign=True)
    if any(tensor.is_meta for tensor in itertools.chain(encoder.parameters(), encoder.buffers())):
        # Some models compute tensors when they are built that no file has.
        encoder = Encoder(**settings)
        encoder.backbone.load_state_dict(weights)
    return encoder


def untrained(encoder: Encoder, seed: int) -> Encoder:
    """The same network with fresh random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = Encoder(
            encoder.name, encoder.small_images, encoder.width, zero_init_last=encoder.zero_init_last,
            image_size=encoder.image_size,
        )  # fmt: skip
    fresh.view = encoder.view
    return fresh


def frozen(encoder: Encoder) -> Encoder:
    """A copy for evaluation: no gradients, and a ResNet's batch normalizations folded into its convolutions."""
    copied = copy.deepcopy(encoder).eval().requires_grad_(False)
    if isinstance(copied.backbone, ResNet):
        for module in list(copied.backbone.modules()):
            children = dict(module.named_children())
            pairs = [(f"conv{n}", f"bn{n}") for n in (1, 2, 3)]
            if isinstance(module, nn.Sequential):
                pairs = list(itertools.pairwise(children))
            for first, second in pairs:
                conv, norm = children.get(first), children.get(second)
                if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
                    setattr(module, first, fuse_conv_bn_eval(conv, norm))
                    setattr(module, second, nn.Identity())
    return copied


def load_weights(backbone: nn.Module, file: str | Path) -> str:
    """Load starting weights, and say in one line what did not match.

    Classifier weights and prefixes such as ``module.`` or ``backbone.`` are expected and taken off.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not one key matches, or the file is no file of weights.

    """
    if not Path(file).is_file():
        raise NotThere(f"encoder.weights={file}: there is no such file")
    mine, theirs = backbone.state_dict(), _strip(_read(Path(file)), set(backbone.state_dict()))
    fits = {k: v for k, v in theirs.items() if k in mine and v.shape == mine[k].shape}
    # Counters of batches have the same shape in every network, and say nothing.
    if all(k.endswith("num_batches_tracked") for k in fits):
        raise UserError(f"encoder.weights={file}: none of its {len(theirs)} keys fits the model's {len(mine)}")
    backbone.load_state_dict(fits, strict=False)
    missing = sorted(k for k in mine if k not in fits and not k.endswith("num_batches_tracked"))
    unused = sorted(k for k in theirs if k not in fits)
    return f"{len(fits)} of {len(mine)} tensors loaded; kept their start: {_names(missing)}; not used: {_names(unused)}"


def _create(name: str, zero_init_last: bool | None, image_size: int | None) -> nn.Module:
    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models(), "timm.list_models() has them all", most=3)
        raise UserError(f"encoder.name={name!r} is not a timm model: {hint}")
    options: dict[str, Any] = {} if zero_init_last is None else {"zero_init_last": zero_init_last}
    if timm.model_entrypoint(name).__module__ == ResNet.__module__:
        options = {"zero_init_last": bool(zero_init_last)}
    if image_size is not None:
        options["img_size"] = image_size
    try:
        model: nn.Module = timm.create_model(name, num_classes=0, **options)
    except TypeError as error:
        raise UserError(f"encoder.name={name} does not take {' or '.join(options)}: leave it out") from error
    return model


def _narrow(model: nn.Module, name: str, width: float, zero_init_last: bool | None) -> None:
    """Rebuild a ResNet with ``width`` times the channels, its stem included, in place."""
    if not isinstance(model, ResNet) or not isinstance(model.conv1, nn.Conv2d):
        raise UserError(f"encoder.width={width} is for ResNets with a one-convolution stem; {name} takes 1.0")
    scale = _scaled(width)
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                setattr(parent, key, scale(child))
            elif isinstance(child, nn.BatchNorm2d):
                setattr(parent, key, nn.BatchNorm2d(max(1, round(child.num_features * width))))
    model.num_features = model.head_hidden_size = max(1, round(model.num_features * width))
    model.init_weights(zero_init_last=bool(zero_init_last))


def _scaled(width: float) -> Callable[[nn.Conv2d], nn.Conv2d]:
    def scale(conv: nn.Conv2d) -> nn.Conv2d:
        inputs = conv.in_channels if conv.in_channels == 3 else max(1, round(conv.in_channels * width))
        same: Any = {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation", "groups")}
        thin = inputs < _THIN and conv.kernel_size == (1, 1) and conv.stride != (1, 1)
        kind = _Strided if thin else nn.Conv2d
        return kind(inputs, max(1, round(conv.out_channels * width)), bias=conv.bias is not None, **same)

    return scale


class _Strided(nn.Conv2d):
    """A 1x1 convolution of every other pixel, taken apart: first the pixels, then the convolution.

    The same numbers. In one step, oneDNN's gradient of the weights writes beyond its memory where there are fewer
    channels than a vector holds: float32, channels last, on processors with AVX2 (uxlfoundation/oneDNN issue 6035).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Of x (B, C, H, W)."""
        return F.conv2d(x[:, :, :: self.stride[0], :: self.stride[1]], self.weight, self.bias)


_THIN = 16  # float32 in the longest vector


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_safetensors(file)[0]
        read = load_tensors(file)
    except ValueError as error:
        raise UserError(f"encoder.weights={file}: not a file of weights: {error}") from error
    for key in ("state_dict", "model", "state_dict_ema"):
        if isinstance(read, dict) and isinstance(read.get(key), dict):
            read = read[key]
    if not isinstance(read, dict) or not any(isinstance(v, Tensor) for v in read.values()):
        raise UserError(f"encoder.weights={file}: it holds no dictionary of tensors")
    return {k: v for k, v in read.items() if isinstance(v, Tensor)}


def _strip(state: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    prefixes = ("module.", "model.", "backbone.", "encoder.", "encoder_q.", "base_encoder.")
    stripped = {}
    for name, value in state.items():
        key = name
        while key not in wanted and (prefix := next((p for p in prefixes if key.startswith(p)), None)):
            key = key[len(prefix) :]
        stripped[key] = value
    return stripped


def _names(keys: list[str]) -> str:
    return ", ".join(keys) or "none"
