"""A batch in parts whose images are made into views together, with their parameters on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int64, Shaped, UInt8
from torch import Tensor

from crosslevel.transforms import functional as op
from crosslevel.transforms import randaugment
from crosslevel.transforms.parameters import CONTRAST, HUE, SATURATION, Augment, Draw

# Two megabytes of float32: the operations of a chunk then find it in the cache, not in memory.
_CHUNK = 2**19

# Elsewhere every operation is a kernel to launch, which takes longer than 32x32 pixels do: 256 megabytes at a time.
_DEVICE_CHUNK = 2**26


@dataclass(frozen=True)
class Part:
    """Images of a batch with their parameters, on the device, those with colour jitter first.

    Of these, the later hue comes among the four colour operations, the earlier the image: ``later[r]`` are the images
    whose hue comes after ``r`` of the others or more, so that ``later[0]`` are all with jitter. ``index`` are the
    images' places in the batch; ``operations`` (RandAugment's), ``grayscale``, ``blur``, ``solarize`` and ``erase`` are
    places in the part.
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
    matrix: Float[Tensor, "n 3 3 3"]
    level: Float[Tensor, "n 3 3"]
    shift: Float[Tensor, " n"]
    sigma: Float[Tensor, " n"]
    levels: Float[Tensor, "n N"]
    erase_boxes: Float[Tensor, "n 4"]

    def change_colors(self, x: Float[Tensor, "n 3 H W"], augment: Augment) -> Float[Tensor, "n 3 H W"]:
        """The four jitter operations, in each image's own order: what comes before hue, hue, what comes after."""
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

    def _mixed(self, x: Float[Tensor, "n 3 H W"], step: int, start: int, stop: int) -> Float[Tensor, "n 3 H W"]:
        """Brightness, contrast or saturation of images ``start`` to ``stop``, whichever comes as number ``step``."""
        if start == stop:
            return x
        span = slice(start, stop)
        return _replaced(x, start, stop, op.mix_colors(x[span], self.matrix[span, step], self.level[span, step]))

    @staticmethod
    def on(
        chosen: Int64[Tensor, " k"],
        x: Float[Tensor, "n 3 H W"],
        operation: Callable[..., Tensor],
        *parameters: Shaped[Tensor, "n ..."],
    ) -> None:
        """In place: ``operation`` on the chosen images."""
        if len(chosen):
            x.index_copy_(0, chosen, operation(*(t.index_select(0, chosen) for t in (x, *parameters))))


def _replaced(x: Tensor, start: int, stop: int, part: Tensor) -> Tensor:
    """``x`` with ``part`` in its rows from ``start`` to ``stop``: no copy where these are all."""
    if stop - start == len(x):
        return part
    x[start:stop] = part
    return x


def chunk_length(images: UInt8[Tensor, "B *V 3 H W"], size: int) -> int:
    """How many of these images at a time become views of ``size`` pixels."""
    pixels = max(images.shape[-2] * images.shape[-1], size**2)
    return max(1, (_CHUNK if for_its_cache(images.device) else _DEVICE_CHUNK) // (3 * pixels))


def for_its_cache(device: torch.device) -> bool:
    """Whether small pieces are best; elsewhere few large ones."""
    return device.type == "cpu"


def divided(drawn: Draw, most: int, device: torch.device) -> Iterator[Part]:
    """The batch, sorted by when hue comes, in parts of at most ``most`` images.

    Which images a part holds is decided on the CPU, so that the device is never waited for. In small parts hue comes
    at the same time for all images, so that none is copied for an operation.
    """
    hue_round = (drawn.order == HUE).int().argmax(dim=1)
    rank = torch.where(drawn.jitter, 3 - hue_round, 4)
    order = rank.argsort(stable=True)
    drawn = drawn.sorted_by(order)
    matrix, level = _rounds(drawn)
    numbers = [
        drawn.boxes,
        drawn.flip.float(),
        matrix,
        level,
        drawn.factors[:, HUE],
        drawn.sigma,
        drawn.levels,
        drawn.erase_boxes,
    ]
    boxes, flip, matrix, level, shift, sigma, levels, erase_boxes = _send(numbers, device)
    ends = torch.bincount(rank, minlength=5).cumsum(0).tolist()
    borders = [0, *ends] if for_its_cache(device) else [0, len(order)]
    spans = [
        slice(start, min(start + most, last)) for first, last in pairwise(borders) for start in range(first, last, most)
    ]
    flags = (drawn.grayscale, drawn.blur, drawn.solarize, drawn.erase)
    places = [
        part
        for span in spans
        for part in (
            order[span],
            *(flag[span].nonzero()[:, 0] for flag in flags),
            *randaugment.places(drawn.operations[span]),
        )
    ]
    places = _send(places, device)
    each = len(places) // max(1, len(spans))
    for number, span in enumerate(spans):
        index, grayscale, blur, solarize, erase, *operations = places[each * number : each * (number + 1)]
        yield Part(
            later=[min(max(ends[3 - r] - span.start, 0), span.stop - span.start) for r in range(4)],
            index=index,
            operations=operations,
            grayscale=grayscale,
            blur=blur,
            solarize=solarize,
            erase=erase,
            boxes=boxes[span],
            flip=flip[span] > 0,
            matrix=matrix[span],
            level=level[span],
            shift=shift[span],
            sigma=sigma[span],
            levels=levels[span],
            erase_boxes=erase_boxes[span],
        )


def _rounds(drawn: Draw) -> tuple[Float[Tensor, "B 3 3 3"], Float[Tensor, "B 3 3"]]:
    """Brightness, contrast and saturation of each image in its own order, as arguments of ``mix_colors``."""
    kind = drawn.order[drawn.order != HUE].view(-1, 3)
    factor = drawn.factors.gather(1, kind)
    return op.mixing(factor, (1 - factor) * (kind == SATURATION), (1 - factor) * (kind == CONTRAST))


def _send(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one type, on the device, by one copy that the CPU does not wait for."""
    if device.type == "cpu":
        return tensors
    sent = torch.cat([tensor.flatten() for tensor in tensors]).to(device, non_blocking=True)
    pieces = sent.split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]
