"""Random views of a whole batch at once, on the batch's own device; parameters differ from image to image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any, final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from crosslevel.transforms import functional as op
from crosslevel.transforms import grouped, masked, parameters, presets
from crosslevel.transforms.layout import Layout
from crosslevel.transforms.parameters import Augment, Draw, draw, draw_box
from crosslevel.transforms.philox import Counted
from crosslevel.transforms.random_numbers import Words
from crosslevel.utils.errors import UserError, did_you_mean


@final
class Views(nn.Module):
    """Random views of a whole batch at once, on the batch's own device.

    Every image of every view gets parameters of its own, the same on every device: from a generator they are drawn on
    the CPU, from `Counted` where the images are. The preset's entries are used in turn, one for each view; the
    settings given here replace the preset's. ``count``, the number of views, is 2 unless set; the last ``plain`` of
    them, 0 unless set, are large crops and flips without any change of colour; the ``small`` ones before these, 0
    unless set, are small crops of ``small_side`` pixels, as multi-crop methods take them (Caron et al. 2020).

    Args:
        preset: ``simclr``, ``mocov2``, ``byol``, ``infomin``, ``dino``, ``swav``, ``cifar`` or ``none`` (no randomness:
            a centred square). Default: cifar, or the preset passed to ``choose``.
        size: height and width of a view in pixels. Default: 32, or the size passed to ``adapt``.
        scale: smallest and largest area of the crop, as a share of the image. Default: the preset's.
        flip: probability of a horizontal flip. Default: the preset's.
        jitter: probability of the colour jitter. Default: the preset's.
        brightness: strength of the jitter, as in torchvision's ColorJitter. Default: the preset's.
        contrast: likewise.
        saturation: likewise.
        hue: likewise, at most 0.5.
        grayscale: probability of dropping the colour. Default: the preset's.
        blur: probability of a Gaussian blur. Default: the preset's.
        blur_sigma: smallest and largest standard deviation of the blur, in pixels. Default: the preset's.
        randaugment: operations of RandAugment an image. Default: the preset's.
        magnitude: of RandAugment's operations, in [0, 10]. Default: the preset's.
        solarize: probability of inverting values from 0.5 up. Default: the preset's.
        erase: probability of erasing a box. Default: the preset's.
        mean: of each channel in [0, 1], which normalization subtracts; their number is that of the channels. Default:
            that of ImageNet, or of the weights that the encoder starts from; for other channels than three, the images'
            own.
        std: standard deviation that it divides by; likewise.
        small_size: height and width in pixels of the small crops that DINO and SwAV take beside the large ones.
            Default: 3/7 of size, as 96 of 224.
        small_scale: smallest and largest area of a small crop. Default: from 0.05 to the smallest of a large one (0.4
            in DINO, 0.14 in SwAV), but at least to 0.14.

    Raises:
        ValueError: the preset is unknown, or a setting is outside its range.

    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        preset: str | None = None,
        size: int | None = None,
        scale: tuple[float, float] | None = None,
        flip: float | None = None,
        jitter: float | None = None,
        brightness: float | None = None,
        contrast: float | None = None,
        saturation: float | None = None,
        hue: float | None = None,
        grayscale: float | None = None,
        blur: float | None = None,
        blur_sigma: tuple[float, float] | None = None,
        randaugment: int | None = None,
        magnitude: float | None = None,
        solarize: float | None = None,
        erase: float | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        small_size: int | None = None,
        small_scale: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if any(side is not None and side < 4 for side in (size, small_size)) or min(std or presets.STD) <= 0:
            raise UserError(f"{size=}, {small_size=}, {std=}: a view needs 4 pixels or more, and every std above 0")
        overrides: dict[str, Any] = {
            "scale": scale,
            "flip": flip,
            "jitter": jitter,
            "brightness": brightness,
            "contrast": contrast,
            "saturation": saturation,
            "hue": hue,
            "grayscale": grayscale,
            "blur": blur,
            "blur_sigma": blur_sigma,
            "randaugment": randaugment,
            "magnitude": magnitude,
            "solarize": solarize,
            "erase": erase,
        }
        changes = {name: value for name, value in overrides.items() if value is not None}
        self._changes, self.chosen = changes, preset is not None
        self.small_size, self.small_scale = small_size, small_scale
        self._overrides, self.size, self._open = overrides, size or 32, size is None
        self._colours_open = mean is None, std is None
        self.mean, self.std = presets.completed(mean, std)
        self.count, self.small, self.plain = 2, 0, 0
        self.chunk = masked.CHUNK  # floats at a time, off the CPU
        self.choose(preset or "cifar", self.chosen)
        # The compiled functions that a captured step uses instead.
        self.make: Callable[..., Tensor] = masked.view
        self.draw: Callable[..., Draw] = draw
        self.words: Callable[..., Tensor] = Counted.words
        self.register_buffer("_mean", torch.tensor(self.mean), persistent=False)
        self.register_buffer("_std", torch.tensor(self.std), persistent=False)

    def choose(self, preset: str, chosen: bool = True, **instead: Any) -> None:
        """Draw views as in ``preset``, with ``instead`` in place of the preset's settings; given settings stay.

        ``chosen``: whether the preset is final. An unknown preset, or one that does not fit the settings, is an error.
        """
        if preset not in presets.PRESETS:
            hint = did_you_mean(preset, presets.PRESETS, cutoff=0.0)
            raise UserError(f"preset={preset!r} is unknown: {hint} One of {', '.join(presets.PRESETS)}")
        for name, value in instead.items():
            if value is not None and self._overrides[name] is None:
                self._overrides[name] = self._changes[name] = value
        self.augments = tuple(replace(augment, **self._changes) for augment in presets.PRESETS[preset])
        self.preset, self.chosen = preset, chosen
        small = presets.small_of(preset, self.augments[0].scale)
        self._small = replace(small, **{**self._changes, "scale": self.small_scale or small.scale})
        if self.channels != presets.COLOURED:
            presets.refuse_colours(self._overrides, self.channels)
            self.augments, self._small = tuple(map(presets.uncoloured, self.augments)), presets.uncoloured(self._small)

    @property
    def channels(self) -> int:
        """C, the channels of the images."""
        return len(self.mean)

    def adapt(self, size: int) -> None:
        """Draw views of ``size`` pixels, if no size was given."""
        if self._open:
            self.size, self._open = size, False

    def normalize_by(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Normalize by these, if none were given; their number is that of the channels.

        Raises:
            UserError: the given ones have another number of channels, or a setting needs red, green and blue.

        """
        mean_open, std_open = self._colours_open
        self.mean, self.std = mean if mean_open else self.mean, std if std_open else self.std
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != len(mean):
                raise UserError(f"views.{name}={list(values)}: the images have {len(mean)} channels: give one for each")
        self._mean, self._std = (torch.tensor(v, device=self._mean.device) for v in (self.mean, self.std))
        self.choose(self.preset, self.chosen)

    def arguments(self) -> dict[str, Any]:
        """The arguments that build these views again; None for the preset's own settings."""
        small = {"small_size": self.small_size, "small_scale": self.small_scale}
        return {
            "preset": self.preset,
            "size": self.size,
            **self._overrides,
            "mean": self.mean,
            "std": self.std,
            **small,
        }

    @property
    def _layout(self) -> Layout:
        return Layout(self.count, self.small, self.plain, self.size, self.small_side)

    @property
    def small_side(self) -> int:
        """Height and width of a small crop in pixels, at most those of a large one."""
        return min(self.size, self.small_size or max(4, round(presets.SMALL_SIDE * self.size)))

    def forward(
        self,
        images: UInt8[Tensor, "B *V C H W"],
        generator: torch.Generator | Counted | None = None,
        partners: UInt8[Tensor, "B C H W"] | None = None,
    ) -> list[Float[Tensor, "B C s s"]]:
        """``count`` views of every image, normalized.

        A CPU computes one view after another, in parts that fit into its cache; other devices use fixed shapes, and do
        not wait for random numbers. Equal random numbers give equal views either way.

        Args:
            images: whole images (B, 3, H, W), or crops of them (B, V, 3, size, size) as ``crops`` makes
                them: then only the crop is skipped.
            generator: a CPU generator, or the numbers of these images in a step; None takes torch's own generator.
            partners: whole images that every second view is drawn from, in place of ``images``.

        Raises:
            ValueError: the images are not uint8 of one of these shapes.

        """
        cropped = images.ndim == 5
        self._check(images, cropped)
        if partners is not None and (cropped or partners.shape != images.shape):
            raise UserError(f"partners {tuple(partners.shape)} of images {tuple(images.shape)}: give whole ones alike")
        views: list[Tensor] = []
        with _float32_without_gradients(images.device):
            sources = self._sources(generator, images.device)
            if parameters.for_its_cache(images.device):
                return [
                    self._in_parts(self._of_view(v, images, partners), cropped, v, s) for v, s in enumerate(sources)
                ]
            # All views with the same settings are one batch: as many operations as for a single view.
            for _, alike in groupby(range(self.count), lambda v: (self._augment(v), self._layout.side(v))):
                view_numbers = list(alike)
                views += self._masked(images, partners, cropped, view_numbers, [sources[v] for v in view_numbers])
        return views

    def _sources(
        self, generator: torch.Generator | Counted | None, device: torch.device
    ) -> list[torch.Generator | Words | None]:
        """The source of each view's random numbers."""
        if not isinstance(generator, Counted):
            return [generator] * self.count
        needed = max(Words.needed(self._augment(v)) for v in range(self.count))
        # Apple's GPUs have no float64, in which boxes are drawn.
        draw_device = torch.device("cpu") if device.type == "mps" else device
        return [Words(words) for words in self.words(generator, range(self.count), needed, draw_device)]

    def _masked(
        self,
        images: UInt8[Tensor, "B *V C H W"],
        partners: UInt8[Tensor, "B C H W"] | None,
        cropped: bool,
        view_numbers: list[int],
        sources: list[torch.Generator | Words | None],
    ) -> list[Float[Tensor, "B C size size"]]:
        """The views ``numbers``, all with the same settings, with fixed shapes."""
        augment, side = self._augment(view_numbers[0]), self._layout.side(view_numbers[0])
        count, (height, width) = len(images), images.shape[-2:]
        words = [source.words for source in sources if isinstance(source, Words)]
        if words:
            sampled = self.draw(augment, count * len(view_numbers), height, width, side, Words(torch.cat(words)))
        else:
            sampled = Draw.joined([draw(augment, count, height, width, side, source) for source in sources])
        sampled = sampled.to(images.device)
        if len(view_numbers) > 1:
            images = torch.cat([self._of_view(v, images, partners) for v in view_numbers])
        else:
            images = self._of_view(view_numbers[0], images, partners)
        most = max(1, self.chunk // (self.channels * max(height * width, side**2)))
        chunks = [
            self.make(chunk, cropped, sampled.part(first, most), augment, side, self._mean, self._std)
            for first, chunk in zip(range(0, len(images), most), images.split(most), strict=True)
        ]
        # Separate tensors, so that an in-place operation on one does not affect the others, or autograd.
        views = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
        return [view.data for view in views.unflatten(0, (len(view_numbers), count)).unbind()]

    def crops(
        self, image: UInt8[Tensor, "C H W"], generator: torch.Generator | None = None
    ) -> UInt8[Tensor, "V C size size"]:
        """The random crops of one decoded image, one for each view; a loader's worker makes them.

        Small ones lie side by side in the last pictures (`Layout`). The same pixels as torchvision's resized_crop.
        Fastest for an image whose memory is (H, W, 3), as decoders leave it; so is the memory of the views.
        """
        height, width = image.shape[-2:]
        batch = image.unsqueeze(0)
        # Unused room beside small crops is zero, so that equal random numbers give equal bytes.
        make = image.new_zeros if self.small else image.new_empty
        views = make(self._layout.pictures, self.size, self.size, len(image)).permute(0, 3, 1, 2)
        for v in range(self.count):
            top, left, rows, columns = draw_box(self._augment(v), height, width, generator)
            part, side = batch[..., top : top + rows, left : left + columns], self._layout.side(v)
            if part.is_contiguous():  # a whole image: PyTorch fails on it where the output's memory is (H, W, 3)
                part = part.contiguous(memory_format=torch.channels_last)
            # The operation inside torchvision's resize, whose checks and copies would take half of the time.
            if side == self.size:
                slot = self._layout.picture(v)
                torch.ops.aten._upsample_bilinear2d_aa.out(
                    part, [side, side], False, None, None, out=views[slot : slot + 1]
                )
            else:
                self._layout.room(views, v).copy_(torch.ops.aten._upsample_bilinear2d_aa(part, [side, side], False)[0])
        return views

    def center(self, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C size size"]:
        """The view for evaluation: the largest centred square, resized where needed, normalized."""
        height, width = images.shape[-2:]
        if height == width == self.size:
            return op.normalize(images.to(torch.float32).div_(255), self._mean, self._std)
        side = min(height, width)
        box = torch.tensor([(height - side) // 2, (width - side) // 2, side, side])
        views = []
        with _float32_without_gradients(images.device):
            for chunk in images.split(grouped.chunk_length(images, self.size)):
                boxes = box.repeat(len(chunk), 1).to(images.device, non_blocking=True)
                views.append(op.normalize(op.crop_resize(chunk, boxes, self.size), self._mean, self._std))
        return torch.cat(views)

    def _augment(self, view: int) -> Augment:
        if self._layout.is_plain(view) and self.augments[0].crop:
            return presets.PLAIN
        if self._layout.is_small(view):
            return self._small
        return self.augments[view % len(self.augments)]

    def _of_view(self, view: int, images: Tensor, partners: Tensor | None) -> Tensor:
        """The images that view v is drawn from, or its crops."""
        if images.ndim == 5:
            return self._layout.room(images, view)
        return partners if partners is not None and self._layout.picture(view) % 2 else images

    def _check(self, images: Tensor, cropped: bool) -> None:
        shape = tuple(images.shape)
        expected = (self._layout.pictures, self.channels, self.size, self.size)
        if images.dtype != torch.uint8 or (shape[1:] != expected if cropped else shape[1:2] != (self.channels,)):
            crops, batch = ", ".join(map(str, expected)), f"(B, {self.channels}, H, W)"
            raise UserError(f"images are {images.dtype} {shape}: give uint8 {batch}, or crops (B, {crops})")

    def _in_parts(
        self, images: UInt8[Tensor, "B C H W"], cropped: bool, v: int, source: torch.Generator | Words | None
    ) -> Float[Tensor, "B C s s"]:
        """View v, part by part."""
        augment, side, (height, width) = self._augment(v), self._layout.side(v), images.shape[-2:]
        sampled = draw(augment, len(images), height, width, side, source)
        return grouped.view(images, cropped, sampled, augment, side, self._mean, self._std)


@contextmanager
def _float32_without_gradients(device: torch.device) -> Iterator[None]:
    """Turn autocast and gradients off: a view rounded to bfloat16 has lost half of its gray levels."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield
