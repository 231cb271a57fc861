"""The backbone: any timm model, a stem for small images, a width for the ResNets, loading and saving."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import torch
from jaxtyping import Float
from timm.models.resnet import ResNet
from torch import Tensor, nn

from crosslevel.models.build import Init, create, create_narrow, draw_as_torch, draw_stem, is_modern
from crosslevel.models.start.pretrained import build, checked, find, is_named, known_model
from crosslevel.models.start.trained import merged, restrict, still
from crosslevel.models.start.weights import load_weights
from crosslevel.utils.errors import NotThere, UserError
from crosslevel.utils.files import ENCODER, write_tensors
from crosslevel.utils.rng import seeded
from crosslevel.utils.tensors import load_safetensors, without_values
from crosslevel.utils.trees import json_tree

STRUCTURE = ("small_images", "width", "zero_init_last", "image_size", "pool", "channels")
"""The arguments that a network is built with, besides its name and sizes; `Encoder` has an attribute for each."""

LEAST_PRETRAINED = 112  # pixels: smaller views have too few patches for weights learned at 224
COLOURS = 3  # channels by default
DROP_PATH = 0.1
SMALL = 64  # pixels: up to this size, a ResNet's usual stem would discard most of the image


class View(NamedTuple):
    """The encoder's input: ``size`` pixels square, channels normalized by ``mean`` and ``std``."""

    size: int
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def channels(self) -> int:
        """C, the channels of the images."""
        return len(self.mean)


Pool = Literal["token", "avg"]


@final
class Encoder(nn.Module):
    """A timm backbone without classifier: images (B, C, h, w) -> features (B, D).

    ``backbone`` is the timm model itself, ``num_features`` is D, ``view`` the images that it is trained on.
    ``architecture`` is its name without weights, ``loaded`` a line about its starting weights, and ``licence`` their
    licence. ``reads`` has the reading settings of its images that differ from the default, such as ``{"channels":
    "4"}``.
    """

    def __init__(
        self,
        name: str = "resnet18",
        small_images: bool | None = None,
        width: float = 1.0,
        weights: str | None = None,
        zero_init_last: bool | None = None,
        image_size: int | None = None,
        pretrained: bool | str = False,
        train: str = "all",
        pool: Pool | None = None,
        drop_path: float | None = None,
        arguments: dict[str, Any] | None = None,
        channels: int | None = None,
        init: Init = "timm",
    ) -> None:
        """Build the network.

        Args:
            name: any timm model, e.g. resnet50, convnext_tiny, vit_small_patch16_224; with pretrained also the name of
                weights, e.g. vit_small_patch14_dinov2.lvd142m, hf-hub:owner/name or local-dir:FOLDER.
            small_images: a 3x3 stem of stride 1 without max-pooling, for ResNets on images of about 32 pixels;
                chosen by the size of the views unless given.
            width: multiplies the channels of a ResNet; 0.25 gives 16, 32, 64, 128.
            weights: file of starting weights (timm or torchvision, .safetensors, .pth or .pt).
            zero_init_last: start a ResNet's residual branches at zero; not unless given (timm starts them at zero).
            image_size: pixels, for models that are built for one size (ViT); the model's own unless given, with
                pretrained that of the views.
            pretrained: true starts from the weights that timm or the hub has under this name; the path of a
                .safetensors file uses that file. Size, mean and deviation of the views follow from the weights.
            train: the trained part: all, last:N (blocks), norm (normalizations) or lora (small additions to the linear
                layers; lora:R of rank R).
            pool: the feature of a ViT: token (the class token) or avg (the mean of the others); the model's own unless
                given.
            drop_path: probability that a residual branch is left out in training; 0.1 with pretrained where the model
                has such branches, else the model's own, unless given.
            arguments: further sizes that timm builds the model by, such as {reg_tokens: 4}.
            channels: of the images; those of the source (--channels, 3 by default) unless given. Weights for three
                channels are adapted in the first layer: summed for one channel, repeated for more.
            init: how random weights are drawn: timm (a ResNet's convolutions normal by fan-out, He et al. 2015) or
                torch (PyTorch's defaults, uniform by fan-in, as in the authors' code).

        Raises:
            ValueError: an unknown model, a width for a model that has none, or weights that do not fit.

        """
        super().__init__()
        self.name, self.width, self.weights = name, width, weights
        self.zero_init_last, self.image_size, self.pool, self.drop_path = zero_init_last, image_size, pool, drop_path
        self.pretrained, self.channels = pretrained or is_named(name), None if channels == COLOURS else channels
        if channels is not None and channels < 1:
            raise UserError(f"encoder.channels={channels}: at least 1")
        self.reads: dict[str, str] = {}
        self.trained, self.further, self.init = train, checked(arguments), init
        self.small_images: bool | None = None
        self.loaded = self.licence = ""
        self.view = self._view(32, *View._field_defaults.values())
        if self.pretrained:
            self._start(None if isinstance(self.pretrained, bool) else self.pretrained)
        else:
            self.architecture = known_model(name)
            options = self._options() | self.further
            if width == 1.0:
                self.backbone = create(self.architecture, options)
            else:
                self.backbone = create_narrow(self.architecture, options, width, zero_init_last)
            if init == "torch":
                draw_as_torch(self.backbone)
        if small_images:
            self.use_small_stem()
        elif small_images is not None:
            self.small_images = False
        if weights is not None:
            self.loaded = load_weights(self.backbone, weights)
        restrict(self.backbone, train)

    def _options(self) -> dict[str, Any]:
        options = {
            "zero_init_last": self.zero_init_last,
            "img_size": self.image_size,
            "global_pool": self.pool,
            "drop_path_rate": self.drop_path,
            "in_chans": self.channels,
        }
        return {key: value for key, value in options.items() if value is not None}

    def _start(self, file: str | None) -> None:
        """Build the network with the weights of its name."""
        if self.weights is not None or self.width != 1.0 or self.small_images:
            raise UserError(
                f"encoder.name={self.name} brings its weights: leave out encoder.weights, width and small_images"
            )
        start = find(self.name, file)
        self.architecture, self.licence = start.architecture, start.licence
        self.further = {**start.arguments, **self.further}
        if self.image_size is not None:
            self.further.pop("img_size", None)
        if self.drop_path is None and is_modern(start.architecture):
            self.drop_path = DROP_PATH
        self.backbone, self.loaded = build(start, self._options() | self.further)
        config: Any = self.backbone.default_cfg
        usual_size = self.further.get("img_size", config["input_size"][-1])
        size = self.image_size or int(usual_size[-1] if isinstance(usual_size, list | tuple) else usual_size)
        self.view = self._view(size, tuple(config["mean"]), tuple(config["std"]))

    def _view(self, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> View:
        """A view with the encoder's channels; mean and deviation for another number of channels are averaged."""
        count = self.channels or COLOURS
        mean, std = (v if len(v) == count else (sum(v) / len(v),) * count for v in (mean, std))
        return View(size, mean, std)

    def arguments(self) -> dict[str, Any]:
        """The arguments that build this encoder again."""
        options = {key: getattr(self, key) for key in (*STRUCTURE, "weights", "pretrained", "drop_path", "init")}
        return {"name": self.name, **options, "train": self.trained, "arguments": self.further or None}

    def structure(self) -> dict[str, Any]:
        """The arguments that build the same network without any weights."""
        settings = {"name": self.architecture, **{key: getattr(self, key) for key in STRUCTURE}}
        for name in ("pool", "channels"):
            if settings[name] is None:
                del settings[name]
        return settings | ({"arguments": self.further} if self.further else {})

    @property
    def num_features(self) -> int:
        """D, the size of the features."""
        # Some models have layers between pooling and classifier, whose size is timm's head_hidden_size.
        size: Any = getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features
        return int(size)

    @property
    def fixed_size(self) -> int | None:
        """Height and width of the images, if the network takes only one size (ViT)."""
        built: dict[str, Any] = getattr(self.backbone, "default_cfg", {})
        if not built.get("fixed_input_size") or (self.image_size is None and self.resizes):
            return None
        return self.image_size or int(built["input_size"][-1])

    @property
    def started(self) -> bool:
        """Whether it started from pretrained weights."""
        return bool(self.pretrained) or self.weights is not None

    @property
    def resizes(self) -> bool:
        """Whether position embeddings are resampled to the size of the views, as pretrained ones are."""
        return bool(self.pretrained) and hasattr(self.backbone, "set_input_size")

    def suiting(self, size: int) -> int:
        """The size of views for images of ``size`` pixels: whole patches, and not far from the weights' own size."""
        if not self.pretrained:
            return size
        patch = max(getattr(getattr(self.backbone, "patch_embed", None), "patch_size", (1, 1)))
        size = max(size, min(LEAST_PRETRAINED, self.view.size))
        return max(2 * patch, size // patch * patch) if patch > 1 else size

    def train(self, mode: bool = True) -> Encoder:
        """Set training mode; normalizations that are not trained stay in evaluation mode."""
        super().train(mode)
        if mode and self.trained != "all":
            still(self.backbone)
        return self

    def forward(self, images: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D"]:
        """The pooled features."""
        features: Tensor = self.backbone(images)
        return features

    def identity(self) -> str:
        """A checksum that changes when a weight changes, or the size or normalization of its input."""
        digest = hashlib.sha256(repr((self.name, *self.view)).encode())
        for name, value in self.backbone.state_dict().items():
            digest.update(name.encode())
            digest.update(memoryview(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
        return digest.hexdigest()

    def adapt(self, size: int) -> None:
        """Choose the stem, and the size of position embeddings, for views of ``size`` pixels, if they are not set."""
        plain = self.weights is None and not self.pretrained
        if self.small_images is None and isinstance(self.backbone, ResNet) and size <= SMALL and plain:
            self.use_small_stem()
        elif self.small_images is None:
            self.small_images = False
        if self.resizes and self.image_size is None:
            self.resize(size)

    def resize(self, size: int) -> None:
        """Take images of ``size`` pixels from now on: position embeddings, if any, are resampled.

        Raises:
            UserError: the size is no multiple of the patches.

        """
        if hasattr(self.backbone, "set_input_size"):
            resized: Any = self.backbone.set_input_size
            try:
                resized(img_size=size)
            except (AssertionError, ValueError) as error:
                raise UserError(f"{self.name} takes no images of {size} pixels: {error}") from error
            patch = max(getattr(getattr(self.backbone, "patch_embed", None), "patch_size", (1, 1)))
            if size % patch:
                near = max(1, round(size / patch)) * patch
                raise UserError(f"{self.name} takes images of whole patches of {patch} pixels, not {size}: give {near}")
            self.image_size = size
        self.view = self.view._replace(size=size)

    def use_small_stem(self) -> None:
        """Replace the first convolution by one of 3x3 and stride 1, and drop the max-pooling.

        Raises:
            ValueError: the model is not a ResNet with the usual single convolution.

        """
        stem = getattr(self.backbone, "conv1", None)
        if not isinstance(self.backbone, ResNet) or not isinstance(stem, nn.Conv2d):
            raise UserError(f"encoder.small_images fits ResNets with a one-convolution stem, not {self.name}")
        small = nn.utils.skip_init(nn.Conv2d, stem.in_channels, stem.out_channels, 3, padding=1, bias=False)
        # With its own generator, the stem starts with the same weights whether it is requested or chosen later.
        generator = seeded(torch.initial_seed())
        draw_stem(small.weight, self.init, generator)
        self.backbone.add_module("conv1", small)
        self.backbone.add_module("maxpool", nn.Identity())
        self.small_images = True

    def save(self, path: str | Path) -> Path:
        """Write the backbone's weights under timm's own key names, and how to build it, to ``path``."""
        built = self.structure() | {"view": self.view._asdict()}
        built |= {"licence": self.licence} if self.licence else {}
        built |= {"reads": self.reads} if self.reads else {}
        state = {k: v.detach().contiguous().cpu() for k, v in merged(self.backbone).items()}
        write_tensors(path, state, {"format": "pt", "crosslevel": json.dumps(built)})
        return Path(path)


def load_encoder(path: str | Path) -> Encoder:
    """Load the encoder of a run, in evaluation mode.

    Args:
        path: the run's folder, or its ``encoder.safetensors``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file was not written by `Encoder.save`, or is damaged.

    """
    file = Path(path) / ENCODER if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise NotThere(f"{path} has no {ENCODER}: give the folder of a run that `crosslevel train` finished")
    weights, metadata = load_safetensors(file)
    built = metadata.get("crosslevel")
    if built is None:
        raise UserError(f"{file} does not say how to build its network: it was not written by Crosslevel")
    try:
        settings = json_tree(built)
    except ValueError as error:
        raise UserError(f"{file} says how to build another network than it holds: {error}") from error
    try:
        view, licence, reads = settings.pop("view"), str(settings.pop("licence", "")), settings.pop("reads", {})
        if unknown := settings.keys() - {"name", *STRUCTURE, "arguments"}:
            raise KeyError(min(unknown))
        if is_named(str(settings["name"])):
            raise KeyError(settings["name"])  # a file fetches no weights
        encoder = _filled(settings, weights)
        encoder.licence = licence
        encoder.view = View(view["size"], tuple(view["mean"]), tuple(view["std"]))
        encoder.reads = {str(name): str(value) for name, value in reads.items()}
        if encoder.view.channels != (encoder.channels or COLOURS):
            raise UserError(f"a view of {encoder.view.channels} channels")
    except (UserError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{file} says how to build another network than it holds: {error}") from error
    return encoder.eval()


def _filled(settings: dict[str, Any], weights: dict[str, Tensor]) -> Encoder:
    """An encoder with ``weights``, without first drawing random ones."""
    with without_values():
        encoder = Encoder(**settings)
    encoder.backbone.load_state_dict(weights, assign=True)
    if any(tensor.is_meta for tensor in itertools.chain(encoder.parameters(), encoder.buffers())):
        # Some models compute tensors while they are built, which no file contains.
        encoder = Encoder(**settings)
        encoder.backbone.load_state_dict(weights)
    return encoder
