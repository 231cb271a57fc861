"""``crosslevel.load``: a run's encoder with its view, for images as files, arrays or tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.decode import from_pillow, read_image
from crosslevel.data.decoding.reading import USUAL, Reading
from crosslevel.data.images import Images
from crosslevel.features.extract import Runtime, stream
from crosslevel.features.source import reading_of
from crosslevel.models.encoder import Encoder, View
from crosslevel.models.named import open_encoder
from crosslevel.utils.console import printer, say
from crosslevel.utils.device import Device, Precision, choose
from crosslevel.utils.errors import BadImage, UserError

Picture = str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any] | Tensor
"""A file, an image of Pillow, an array (H, W, 3) or (H, W), or a tensor (3, H, W): bytes, or floats in [0, 1]. An
encoder with another number of channels takes that many instead of 3."""

_FORMS = "give a path, an image of Pillow, an array or a tensor"


class FeatureExtractor:
    """A trained encoder: images of any size and form in, features out.

    ``encoder`` is the network, ``view`` the size and normalization of its images, ``num_features`` is D.
    """

    def __init__(self, encoder: Encoder, runtime: Runtime) -> None:
        self.encoder, self.runtime = encoder, runtime

    @property
    def view(self) -> View:
        """The size and the normalization of the images that the encoder takes."""
        return self.encoder.view

    @property
    def num_features(self) -> int:
        """D, the size of the features."""
        return self.encoder.num_features

    def transform(self, images: Picture | Iterable[Picture]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Features (N, D), one row for each image, in the given order.

        Each image is scaled and cropped to the encoder's view as in `crosslevel embed`.

        Args:
            images: one image or several: paths, images of Pillow, arrays (H, W, 3), (H, W) or (N, H, W, 3), tensors
                (3, H, W) or (N, 3, H, W); bytes, or floats in [0, 1].

        Raises:
            UserError: something that is no image, a folder, or no image at all.
            BadImage: a file that cannot be read.

        """
        source = _Several(_several(images), reading_of(self.encoder))
        if not len(source):
            raise UserError("transform: there are no images: give one at least")
        device, workers, batch = self.runtime.hardware, self.runtime.workers or 0, self.runtime.batch_size
        bad_files = BadFiles()
        chunks = list(
            stream(self.encoder, source, batch_size=batch, workers=workers, hardware=device, bad_files=bad_files)
        )
        for path, reason in bad_files.reasons.items():
            raise BadImage(path, reason)
        features: Float[Tensor, "N D"] = torch.cat([part.features for part in chunks])
        return features.numpy()

    def __call__(self, images: Picture | Iterable[Picture]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The same as `transform`."""
        return self.transform(images)


def load(
    run: str,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: int = 0,
    batch_size: int = 256,
    quiet: bool = False,
) -> FeatureExtractor:
    """Load the encoder of a run, or one by the name of its weights, whose source and licence are printed.

    Args:
        run: the folder of a run, or its encoder.safetensors; or weights by name: timm:NAME, hf-hub:owner/name, with
            ,size=PIXELS for another image size.
        device: auto takes CUDA, then Apple's MPS, then the CPU.
        precision: auto takes bfloat16 where the hardware computes it.
        workers: processes that decode; 0 decodes in one thread.
        batch_size: images at a time.
        quiet: print nothing.

    Returns:
        an object that computes features: ``crosslevel.load("runs/photos").transform(["a.jpg", "b.jpg"])``.

    Examples:
        >>> model = crosslevel.load("runs/photos")
        >>> features = model.transform(["a.jpg", "b.jpg"])
        >>> features.shape == (2, model.num_features)
        True

    """
    encoder = open_encoder(run)
    say(printer(quiet), encoder.loaded)
    return FeatureExtractor(encoder, Runtime(choose(device, precision), workers, batch_size))


class _Several(Images):
    """Images in memory or in files; files are decoded on demand."""

    def __init__(self, pictures: Sequence[Picture], reading: Reading = USUAL) -> None:
        self.name, self.reading = "images", reading
        self.paths = [_name_of(picture, i) for i, picture in enumerate(pictures)]
        for picture, path in zip(pictures, self.paths, strict=True):
            if isinstance(picture, str | os.PathLike) and os.path.isdir(path):
                raise UserError(
                    f"{path} is a folder: list its images, as in sorted(Path({path!r}).rglob('*.jpg')), or give it to "
                    "crosslevel.embed"
                )
        self.pictures = [
            picture if isinstance(picture, str | os.PathLike) else _pixels(picture, self.paths[i], reading)
            for i, picture in enumerate(pictures)
        ]

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        picture = self.pictures[i]
        return picture if isinstance(picture, Tensor) else read_image(os.fspath(picture), reading=self.reading), -1


def _name_of(picture: Picture, i: int) -> str:
    return os.fspath(picture) if isinstance(picture, str | os.PathLike) else f"image {i}"


def _several(images: Picture | Iterable[Picture]) -> list[Picture]:
    """Turn one image, several images or an array of several into a list of images."""
    if isinstance(images, str | os.PathLike | Image.Image):
        return [images]
    if isinstance(images, Tensor | np.ndarray):
        return [images] if images.ndim <= 3 else list(images)
    if not isinstance(images, Iterable) or isinstance(images, bytes | bytearray):
        raise UserError(f"transform: this is no image, but of type {type(images).__name__}: {_FORMS}")
    return list(images)


def _pixels(
    picture: Image.Image | np.ndarray[Any, Any] | Tensor, name: str, reading: Reading
) -> UInt8[Tensor, "C H W"]:
    if isinstance(picture, Image.Image):
        return from_pillow(picture, reading)
    channels = reading.channels
    if isinstance(picture, np.ndarray):
        pixels = torch.from_numpy(np.ascontiguousarray(picture))
        pixels = pixels.expand(channels, -1, -1) if pixels.ndim == 2 else pixels.movedim(-1, 0)
    elif isinstance(picture, Tensor):
        pixels = picture.detach().cpu()
    else:
        raise UserError(f"{name} is a {type(picture).__name__}: {_FORMS}")
    if pixels.ndim != 3 or len(pixels) != channels:
        arrays, shape = f"(H, W, {channels}) or (H, W)", tuple(picture.shape)
        raise UserError(f"{name} has the shape {shape}: give an array {arrays}, or a tensor ({channels}, H, W)")
    return _bytes(pixels, name)


def _bytes(pixels: Tensor, name: str) -> UInt8[Tensor, "3 H W"]:
    if pixels.dtype == torch.uint8:
        return pixels
    low, high = (float(value) for value in pixels.aminmax())
    if not pixels.is_floating_point() or not 0 <= low <= high <= 1:
        kind = str(pixels.dtype).removeprefix("torch.")
        raise UserError(f"{name} has {kind} values from {low:g} to {high:g}: give bytes, or floats in [0, 1]")
    return (pixels * 255).round().to(torch.uint8)
