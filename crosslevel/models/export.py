"""``crosslevel export``: write an encoder's weights in the formats of other programs."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
import torchvision
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn

from crosslevel.models.encoder import Encoder
from crosslevel.models.named import open_encoder, run_dir_of
from crosslevel.utils.console import printer, say
from crosslevel.utils.errors import MissingExtra, NotThere, UserError
from crosslevel.utils.files import ENCODER, replacing
from crosslevel.utils.marks import verb
from crosslevel.utils.rng import seeded
from crosslevel.utils.tensors import save_to

Format = Literal["torchvision", "timm", "detectron2", "onnx", "torch"]

TOLERANCE = 1e-4
"""Largest difference between the features of an exported program and the encoder's, relative where they exceed 1."""

SHARED = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
"""The models that timm and torchvision build in the same way under the same names."""


@verb()
def export(
    run: str,
    format: Format = "timm",
    output: str | None = None,
    normalize: bool = False,
    seed: int = 0,
    quiet: bool = False,
) -> Path:
    """Write an encoder for torchvision, timm, detectron2, ONNX runtimes, or as a PyTorch program.

    torchvision: the state of the model of the same name without its classifier, for load_state_dict(strict=False).
    timm: the state of the timm model (num_classes=0). detectron2: a pickle with the names that the public converter of
    MoCo's models writes. onnx: the pooled features, checked with onnxruntime on random images before the file is put in
    place. torch: the same as a program of torch.export, which PyTorch runs, compiles or takes to devices without
    Crosslevel and timm.

    Args:
        run: the folder of a run, or its encoder.safetensors; or weights by name: timm:NAME, hf-hub:owner/name.
        format: the program that will read the file: torchvision, timm, detectron2, onnx or torch.
        output: the file: .pth or .pt; for timm also .safetensors; .pkl for detectron2; .onnx; .pt2 for torch. A name
            beside the encoder unless given; of weights by name, here.
        normalize: for onnx and torch: take RGB in [0, 1] and normalize inside; otherwise the images are normalized
            already.
        seed: of the random images.
        quiet: print nothing.

    Returns:
        the file.
    """
    if format not in _FORMATS:
        raise UserError(f"--format {format} is unknown: give {', '.join(_FORMATS)}")
    if normalize and format not in ("onnx", "torch"):
        raise UserError(f"--normalize is for onnx and torch: a file for {format} holds weights only")
    endings, write = _FORMATS[format]
    folder = run_dir_of(run) or Path()  # of weights by name, where the command is
    file = Path(output) if output else folder / f"encoder-{format}{endings[0]}"
    if file.suffix not in endings:
        raise UserError(f"--output {file}: a file for {format} ends in {' or '.join(endings)}")
    if file.resolve() == (folder / ENCODER).resolve():
        raise UserError(f"--output {file} is the encoder itself: give another name")
    if not file.parent.is_dir():
        raise NotThere(f"--output {file}: there is no folder {file.parent}")
    console, encoder = printer(quiet), open_encoder(run)
    say(console, encoder.loaded)
    with replacing(file) as stream:
        description = write(encoder, stream, file, normalize, seed)
    say(console, f"{encoder.name}, {encoder.num_features} features: {file}")
    say(console, f"next: {description}")
    return file


def for_torchvision(encoder: Encoder) -> dict[str, Tensor]:
    """The state of torchvision's model of the same name, without its classifier.

    Raises:
        ValueError: torchvision cannot build this network.

    """
    name = _plain(encoder, "torchvision")
    if encoder.width != 1.0:
        raise _full_width_only("torchvision", encoder)
    with torch.device("meta"):
        reference = torchvision.models.get_model(name, weights=None).state_dict()
    state = _state(encoder)
    shapes = {key: tuple(value.shape) for key, value in reference.items() if not key.startswith("fc.")}
    differing = sorted(
        key for key in shapes.keys() | state.keys() if key not in state or shapes.get(key) != tuple(state[key].shape)
    )
    if differing:
        raise UserError(f"{encoder.name} is not torchvision's {name}: {differing[0]} differs: export to timm or onnx")
    return state


def for_detectron2(encoder: Encoder) -> dict[str, Any]:
    """Weights for detectron2: NumPy arrays under the names of MoCo's public converter.

    The stem's parts get the prefix ``stem``; ``layer1`` to ``layer4`` are ``res2`` to ``res5``; ``bn1`` to ``bn3`` are
    the ``norm`` of their convolution; a projection ``shortcut`` and its ``norm`` replace ``downsample``.

    Raises:
        ValueError: detectron2's ResNet does not fit.

    """
    if _plain(encoder, "detectron2") in ("resnet18", "resnet34") and encoder.width != 1.0:
        raise _full_width_only("detectron2", encoder)
    weights = {_detectron2_name(key): value.numpy() for key, value in _state(encoder).items()}
    return {"model": weights, "__author__": "Crosslevel", "matching_heuristics": True}


def _detectron2_name(key: str) -> str:
    """``layer1.0.bn2.weight`` is ``res2.0.conv2.norm.weight``."""
    first, *suffix = key.split(".")
    segments = [f"res{int(first[-1]) + 1}", *suffix] if first.startswith("layer") else ["stem", first, *suffix]
    joined = ".".join(segments).replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    for n in "123":
        joined = joined.replace(f".bn{n}.", f".conv{n}.norm.")
    return joined


def _plain(encoder: Encoder, program: str) -> str:
    """The name of a ResNet that ``program`` also has."""
    name = encoder.architecture.split(".", maxsplit=1)[0]
    if name not in SHARED:
        raise UserError(f"{encoder.name} has no counterpart in {program}: export it to timm or onnx")
    if encoder.small_images:
        raise UserError(
            f"{program}'s {name} has no stem for small images: export to timm or onnx, "
            "or train with --encoder.small_images false"
        )
    if encoder.channels is not None:
        raise UserError(
            f"{program}'s {name} takes images of 3 channels, not {encoder.channels}: export to timm or onnx"
        )
    return name


def _full_width_only(program: str, encoder: Encoder) -> UserError:
    width = f"encoder.width={encoder.width}"
    return UserError(f"{program} builds {encoder.name} in full width only, not {width}: export to timm or onnx")


def _state(encoder: Encoder) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in encoder.backbone.state_dict().items()}


def _write_torchvision(encoder: Encoder, stream: BinaryIO, file: Path, normalize: bool, seed: int) -> str:
    save_to(stream, for_torchvision(encoder), file)
    name = encoder.architecture.split(".", maxsplit=1)[0]
    return (
        f"torchvision.models.{name}().load_state_dict(torch.load(file), strict=False) lacks only fc; {_inputs(encoder)}"
    )


def _write_timm(encoder: Encoder, stream: BinaryIO, file: Path, normalize: bool, seed: int) -> str:
    if file.suffix == ".safetensors":
        stream.write(save(_state(encoder), {"format": "pt"}))
    else:
        save_to(stream, _state(encoder), file)
    is_changed = encoder.width != 1.0 or encoder.small_images
    size = "" if encoder.image_size is None else f", img_size={encoder.image_size}"
    size += "" if encoder.channels is None else f", in_chans={encoder.channels}"
    name = encoder.architecture
    call = f"timm.create_model({name!r}, num_classes=0{size}, checkpoint_path={str(file)!r})"
    if is_changed:
        differences = ["a stem for small images"] * bool(encoder.small_images)
        differences += [f"a width of {encoder.width:g}"] * (encoder.width != 1.0)
        changes = f"small_images={bool(encoder.small_images)}, width={encoder.width}"
        call = (
            f"timm alone builds no {name} with {' and '.join(differences)}: load the file with "
            f"crosslevel.Encoder({name!r}, {changes}, weights={str(file)!r})"
        )
    return f"{call}; images: {_inputs(encoder)}"


def _write_detectron2(encoder: Encoder, stream: BinaryIO, file: Path, normalize: bool, seed: int) -> str:
    # Protocol 4: arrays in later ones need NumPy 2 to be read.
    pickle.dump(for_detectron2(encoder), stream, protocol=4)
    mean, std = ([round(255 * v, 3) for v in values] for values in (encoder.view.mean, encoder.view.std))
    return (
        f"MODEL.WEIGHTS file; INPUT.FORMAT RGB; MODEL.PIXEL_MEAN {mean}; MODEL.PIXEL_STD {std}; "
        f"MODEL.RESNETS: {_detectron2_network(encoder)}"
    )


def _detectron2_network(encoder: Encoder) -> str:
    """The settings with which detectron2 builds the same network."""
    backbone: Any = encoder.backbone
    block, depth = backbone.layer1[0], re.search(r"resne[xt]+(\d+)", encoder.architecture)
    assert depth is not None
    settings: dict[str, int | bool] = {"DEPTH": int(depth[1]), "STRIDE_IN_1X1": False}
    settings["STEM_OUT_CHANNELS"] = backbone.conv1.out_channels
    settings["RES2_OUT_CHANNELS"] = (getattr(block, "conv3", None) or block.conv2).out_channels
    if hasattr(block, "conv3"):
        groups = block.conv2.groups
        settings |= {"NUM_GROUPS": groups, "WIDTH_PER_GROUP": block.conv2.out_channels // groups}
    return ", ".join(f"{key} {value}" for key, value in settings.items())


class _Normalized(nn.Module):
    """Pooled features of images in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("mean", torch.tensor(encoder.view.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(encoder.view.std).view(1, -1, 1, 1))

    def forward(self, images: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D"]:
        """The pooled features."""
        features: Tensor = self.encoder((images - self.mean) / self.std)
        return features


def _example(encoder: Encoder) -> Float[Tensor, "2 C h w"]:
    size = encoder.view.size if encoder.fixed_size is None else encoder.fixed_size
    return torch.zeros(2, encoder.view.channels, size, size)


def _write_torch(encoder: Encoder, stream: BinaryIO, file: Path, normalize: bool, seed: int) -> str:
    network: nn.Module = (_Normalized(encoder) if normalize else encoder).eval()
    example = _example(encoder)
    with torch.no_grad():
        program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.export.save(program, stream)
    stream.flush()
    reloaded = torch.export.load(stream.name).module()
    difference = _difference(reloaded, network, example.shape[1:], seed)
    if not difference <= TOLERANCE:
        raise _differs(file, difference)
    shape = ", ".join(map(str, example.shape[1:]))
    scale = f"{_colours(encoder)} in [0, 1]" if normalize else _inputs(encoder)
    return (
        f"torch.export.load({file.name!r}).module()(images); images: float32 (batch, {shape}), {scale}; features "
        f"differ from the encoder's by at most {difference:.1e}"
    )


def _differs(file: Path, difference: float) -> UserError:
    return UserError(f"{file}: its features differ from the encoder's by {difference:.1e}: it is not kept")


def _write_onnx(encoder: Encoder, stream: BinaryIO, file: Path, normalize: bool, seed: int) -> str:
    onnx, runtime = _needed("onnx"), _needed("onnxruntime")
    path = Path(stream.name)
    _needed("onnxscript")
    network: nn.Module = (_Normalized(encoder) if normalize else encoder).eval()
    example = _example(encoder)
    shape = tuple(example.shape[1:])
    batch = torch.export.Dim("batch", min=1)
    torch.onnx.export(
        network, (example,), path, input_names=["images"], output_names=["features"], dynamo=True, verbose=False,
        dynamic_shapes=({0: batch},), external_data=False,
    )  # fmt: skip
    model = onnx.load(path)
    scale = f"{_colours(encoder)} in [0, 1]" if normalize else _inputs(encoder)
    says = {
        "input": f"images: float32 (batch, {', '.join(map(str, shape))}), {scale}",
        "output": f"features: float32 (batch, {encoder.num_features}), pooled",
        "encoder": encoder.name,
        "view": json.dumps(encoder.view._asdict()),
    }
    onnx.helper.set_model_props(model, says)
    onnx.save(model, path)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    difference = _difference(
        lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), network, shape, seed
    )
    if not difference <= TOLERANCE:
        raise _differs(file, difference)
    ends = f"features differ from the encoder's by at most {difference:.1e}"
    return f"onnxruntime.InferenceSession(file).run(None, {{'images': ...}}); {says['input']}; {ends}"


@torch.no_grad()
def _difference(program: Callable[[Tensor], Tensor], network: nn.Module, shape: Sequence[int], seed: int) -> float:
    """The largest difference on random images, in batches of two sizes."""
    generator, differences = seeded(seed), []
    for count in (1, 5):
        images = torch.rand(count, *shape, generator=generator)
        if not isinstance(network, _Normalized):
            images = 4 * images - 2  # about the range of normalized images
        expected = network(images)
        differences.append((program(images) - expected).abs().div(expected.abs().clamp(min=1)).max())
    return float(torch.stack(differences).max())


def _inputs(encoder: Encoder) -> str:
    return f"{_colours(encoder)} in [0, 1] minus {encoder.view.mean}, divided by {encoder.view.std}"


def _colours(encoder: Encoder) -> str:
    return "RGB" if encoder.channels is None else f"{encoder.channels} channels"


def _needed(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(f"--format onnx needs {module}: pip install 'crosslevel[export]'") from error


_Writer = Callable[[Encoder, BinaryIO, Path, bool, int], str]

_FORMATS: dict[str, tuple[tuple[str, ...], _Writer]] = {
    "torchvision": ((".pth", ".pt"), _write_torchvision),
    "timm": ((".safetensors", ".pth", ".pt"), _write_timm),
    "detectron2": ((".pkl",), _write_detectron2),
    "onnx": ((".onnx",), _write_onnx),
    "torch": ((".pt2",), _write_torch),
}
