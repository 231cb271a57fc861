"""Views of a batch in parts that fit into a CPU's cache, by their random parameters; `masked` is for other devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int64, Shaped, UInt8
from torch import Tensor

from crosslevel.transforms import functional as op
from crosslevel.transforms import randaugment
from crosslevel.transforms.parameters import CONTRAST, HUE, SATURATION, Augment, Draw

# Two megabytes of float32: a chunk then stays in the cache during its operations.
_CHUNK = 2**19


@dataclass(frozen=True)
class Part:
    """Images of a batch with their parameters, those with colour jitter first.

    Among the jittered images, those that change hue last come first: ``later[r]`` counts the images that apply at least
    ``r`` other colour operations before hue, so that ``later[0]`` is the number of jittered images. ``index`` are the
    images' indices in the batch; ``operations`` (RandAugment's), ``grayscale``, ``blur``, ``solarize`` and ``erase``
    are indices in the part.
    """

    later: list[int]
    index: Int64[Tensor, " n"]
    operations: list[Int64[Tensor, " o"]]
    grayscale: Int64[Tensor, " g"]
    blur: Int64[Tensor, " b"]
    solarize: Int64[Tensor, " s"]
    erase: Int64[Tensor, " e"]
    boxes: Float[Tensor, "n 4"]
    flip: Bool[Tensor, " n"]
    matrix: Float[Tensor, "n 3 C C"]
    level: Float[Tensor, "n 3 C"]
    shift: Float[Tensor, " n"]
    sigma: Float[Tensor, " n"]
    levels: Float[Tensor, "n N"]
    erase_boxes: Float[Tensor, "n 4"]

    def change_colors(self, x: Float[Tensor, "n C H W"], augment: Augment) -> Float[Tensor, "n C H W"]:
        """The four jitter operations, in each image's own order: those before hue, hue, those after."""
        jittered = self.later[0]
        for step in range(3):
            x = self._mixed(x, step, 0, self.later[step + 1])
        if jittered and augment.hue > 1 / 6:
            x = _replaced(x, 0, jittered, op.adjust_hue(x[:jittered], self.shift[:jittered]))
        elif jittered and augment.hue > 0:
            op.rotate_hue_(x[:jittered], 6 * self.shift[:jittered])
        for step in range(3):
            x = self._mixed(x, step, self.later[step + 1], jittered)
        return x

    def _mixed(self, x: Float[Tensor, "n C H W"], step: int, start: int, stop: int) -> Float[Tensor, "n C H W"]:
        """Operation number ``step`` (brightness, contrast or saturation) of the images ``start`` to ``stop``."""
        if start == stop:
            return x
        span = slice(start, stop)
        return _replaced(x, start, stop, op.mix_colors(x[span], self.matrix[span, step], self.level[span, step]))

    @staticmethod
    def on(
        index: Int64[Tensor, " k"],
        x: Float[Tensor, "n C H W"],
        operation: Callable[..., Tensor],
        *parameters: Shaped[Tensor, "n ..."],
    ) -> None:
        """Apply ``operation`` in place to the images of ``index``."""
        if len(index):
            x.index_copy_(0, index, operation(*(t.index_select(0, index) for t in (x, *parameters))))


def _replaced(x: Tensor, start: int, stop: int, part: Tensor) -> Tensor:
    """``x`` with its rows ``start`` to ``stop`` replaced by ``part``; without a copy if these are all rows."""
    if stop - start == len(x):
        return part
    x[start:stop] = part
    return x


def view(
    images: UInt8[Tensor, "B C H W"],
    cropped: bool,
    parameters: Draw,
    augment: Augment,
    size: int,
    mean: Float[Tensor, " C"],
    std: Float[Tensor, " C"],
) -> Float[Tensor, "B C size size"]:
    """One normalized view of each image, as `masked.view` makes it, part by part."""
    channels = images.shape[1]
    blurred = partial(op.gaussian_blur, taps=op.blur_taps(size, augment.blur_sigma[1]))
    views = torch.empty(len(images), channels, size, size)
    for part in divided(parameters, chunk_length(images, size), channels):
        pixels = images.index_select(0, part.index)
        if cropped:
            x = pixels.to(torch.float32).div_(255)
            x = op.flip(x, part.flip) if augment.flip > 0 else x
        else:
            x = op.crop_resize(pixels, part.boxes, size, part.flip)
        x = part.change_colors(x, augment)
        part.on(part.blur, x, blurred, part.sigma)
        randaugment.apply_(x, part.operations, part.levels, mean)
        part.on(part.grayscale, x, op.to_grayscale)
        part.on(part.solarize, x, lambda subset: op.solarize(subset, subset.new_full((len(subset),), 0.5)))
        x = x.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
        part.on(part.erase, x, op.erase, part.erase_boxes)
        views.index_copy_(0, part.index, x)
    return views


def chunk_length(images: UInt8[Tensor, "B *V C H W"], size: int) -> int:
    """How many of these images at a time become views of ``size`` pixels."""
    pixels = max(images.shape[-2] * images.shape[-1], size**2)
    return max(1, _CHUNK // (images.shape[-3] * pixels))


def divided(parameters: Draw, most: int, channels: int = 3) -> Iterator[Part]:
    """Divide a batch, sorted by the position of hue in the order, into parts of at most ``most`` images.

    In a part, hue has the same position for all images, so that no image is copied for an operation.
    """
    hue_round = (parameters.order == HUE).int().argmax(dim=1)
    rank = torch.where(parameters.jitter, 3 - hue_round, 4)
    order = rank.argsort(stable=True)
    parameters = parameters.sorted_by(order)
    matrix, level = _rounds(parameters, channels)
    ends = torch.bincount(rank, minlength=5).cumsum(0).tolist()
    spans = [
        slice(start, min(start + most, last))
        for first, last in pairwise([0, *ends])
        for start in range(first, last, most)
    ]
    for span in spans:
        flags = (parameters.grayscale, parameters.blur, parameters.solarize, parameters.erase)
        grayscale, blur, solarize, erase = (flag[span].nonzero()[:, 0] for flag in flags)
        yield Part(
            later=[min(max(ends[3 - r] - span.start, 0), span.stop - span.start) for r in range(4)],
            index=order[span],
            operations=list(randaugment.rows_by_operation(parameters.operations[span])),
            grayscale=grayscale,
            blur=blur,
            solarize=solarize,
            erase=erase,
            boxes=parameters.boxes[span],
            flip=parameters.flip[span],
            matrix=matrix[span],
            level=level[span],
            shift=parameters.factors[span, HUE],
            sigma=parameters.sigma[span],
            levels=parameters.levels[span],
            erase_boxes=parameters.erase_boxes[span],
        )


def _rounds(parameters: Draw, channels: int) -> tuple[Float[Tensor, "B 3 C C"], Float[Tensor, "B 3 C"]]:
    """Brightness, contrast and saturation of each image in its own order, as arguments of ``mix_colors``."""
    kind = parameters.order[parameters.order != HUE].view(-1, 3)
    factor = parameters.factors.gather(1, kind)
    return op.mixing(factor, (1 - factor) * (kind == SATURATION), (1 - factor) * (kind == CONTRAST), channels)
