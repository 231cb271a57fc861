"""The training loss of single images: which ones the encoder tells from others, and which it does not.

NT-Xent (Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual Representations", ICML
2020, eq. 1) of one image, by two views of it that are drawn as the run drew its own, in a batch of B images::

    L = (l(a, b) + l(b, a)) / 2,   l(x, y) = -log( exp(x . y / T) / (exp(x . y / T) + sum_k exp(x . z_k / T)) )

in nats: 0 where nothing else is near, log(2 B - 1) where all views are alike. a and b are the image's unit features,
and z_k the 2 (B - 1) of the other images' views. The others are drawn once from the source, and are the same for every
image: rows can be compared, and none depends on which images are computed together, or by whom.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import pyarrow as pa
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from crosslevel.data.images import Images
from crosslevel.data.loaders.prefetch import ahead
from crosslevel.features.source import settings_of
from crosslevel.models.copies import frozen
from crosslevel.models.encoder import Encoder
from crosslevel.models.heads import load_head
from crosslevel.models.named import is_by_name, run_dir_of
from crosslevel.transforms.philox import Counted
from crosslevel.transforms.views import Views
from crosslevel.utils.device import Hardware
from crosslevel.utils.errors import BadImage, UserError
from crosslevel.utils.files import CONFIG, INSTANCE
from crosslevel.utils.rng import generator

LOSS = "loss"  # the column's name
DRAWS, BATCH = 4, 256  # pairs of views of an image, of which the mean is taken; B
TEMPERATURE = 0.2  # T of a run whose method has none
_AT_A_TIME = 32  # images that are encoded
_TRIES = 16  # times as many images as needed are tried, where most cannot be read


class Objective(NamedTuple):
    """What a run compared: how it drew views, its instance branch's head (None: it is not there), T, and its seed."""

    views: Views
    head: nn.Module | None
    temperature: float
    seed: int

    @classmethod
    def of(cls, run: str) -> Objective:
        """As a run's folder has it.

        Raises:
            UserError: nobody trained it here, or its settings are not there.

        """
        folder = None if is_by_name(run) else run_dir_of(run)
        if folder is None:
            raise UserError(
                f"--loss true: {run} was not trained here, and has no views: leave --loss out, or give a run"
            )
        settings = settings_of(folder)
        views, method, seed = (settings.get(name) for name in ("views", "method", "seed"))
        if not isinstance(views, dict) or not isinstance(method, dict) or not isinstance(seed, int):
            raise UserError(f"--loss true: {folder} has no {CONFIG} that says how views were drawn: leave --loss out")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in views.items()}
        try:
            of_run = Views(**arguments)
        except (TypeError, ValueError) as error:
            raise UserError(f"--loss true: {folder / CONFIG} does not say how views were drawn: {error}") from error
        of_method = method.get("init_args")
        temperature = of_method.get("temperature") if isinstance(of_method, dict) else None
        head = load_head(folder / INSTANCE) if (folder / INSTANCE).is_file() else None
        return cls(of_run, head, float(temperature) if isinstance(temperature, int | float) else TEMPERATURE, seed)

    @property
    def compared(self) -> str:
        """Which features of an image are compared."""
        return "the instance branch's features" if self.head is not None else "shared features"

    def __str__(self) -> str:
        return (
            f"of the run's views by {self.compared}, temperature {self.temperature:g}, among at most {BATCH} images, "
            f"the mean of {DRAWS} draws"
        )

    def described(self) -> dict[str, Any]:
        """What a table says of the column."""
        settings = {"temperature": self.temperature, "seed": self.seed}
        return {"of": self.compared, **settings, "draws": DRAWS, "batch": BATCH}


class Encoded(NamedTuple):
    """Unit features of the views of n images: which images, and D pairs of views of each."""

    numbers: Int64[Tensor, " n"]
    views: Float[Tensor, "D 2 n d"]


class ImageLosses:
    """The losses of a source's images, as a column.

    Args:
        encoder: the network.
        images: the source.
        objective: how views are drawn and compared.
        hardware: where the network runs.
        threads: how many decode; as many as PyTorch has unless given.
        draws: pairs of views of each image.
        batch: B, or as many images as can be read.

    """

    def __init__(
        self,
        encoder: Encoder,
        images: Images,
        objective: Objective,
        hardware: Hardware,
        threads: int | None = None,
        draws: int = DRAWS,
        batch: int = BATCH,
    ) -> None:
        self.images, self.objective, self.hardware = images, objective, hardware
        self.threads, self.draws, self.batch = max(1, threads or torch.get_num_threads()), draws, batch
        self.network = frozen(encoder).to(hardware.device).to(memory_format=torch.channels_last)
        self.views = objective.views.to(hardware.device)
        self.head = nn.Identity() if objective.head is None else objective.head.to(hardware.device).eval()

    def __call__(self, indices: Sequence[int]) -> pa.Array:
        """The losses of these images; none of one that cannot be read, or has no others to be compared with."""
        losses: dict[int, float] = {}
        for part in self._encoded(indices) if len(self._reference.numbers) > 1 else ():
            values = losses_of(part, self._reference, self.objective.temperature)
            losses.update(zip(part.numbers.tolist(), values.tolist(), strict=True))
        return pa.array([losses.get(i) for i in indices], pa.float32())

    @cached_property
    def _reference(self) -> Encoded:
        """The batch that every image is compared in: the first images of a random order that can be read."""
        order = torch.randperm(len(self.images), generator=generator(self.objective.seed, self.draws))
        chunks: list[Encoded] = []
        for part in self._encoded(order[: _TRIES * self.batch].tolist()):
            chunks.append(part)
            if sum(len(chunk.numbers) for chunk in chunks) >= self.batch:
                break
        numbers, views = (torch.cat(c, dim=d) for c, d in zip(zip(*chunks, strict=True), (0, 2), strict=True))
        return Encoded(numbers[: self.batch], views[:, :, : self.batch])

    def _encoded(self, indices: Sequence[int]) -> Iterator[Encoded]:
        """The views' features of those images that can be read, in order, some at a time."""
        keys = [indices[first : first + _AT_A_TIME] for first in range(0, len(indices), _AT_A_TIME)]
        for crops in ahead(self._crops, keys, 2 * self.threads, self.threads):
            if crops:
                yield self._encode(torch.tensor(list(crops)), torch.stack(list(crops.values())))

    def _crops(self, indices: Sequence[int]) -> dict[int, UInt8[Tensor, "D 2 C s s"]]:
        """The crops of images, which each has draws of its own for."""
        crops = {}
        for i in indices:
            try:
                image, _ = self.images[i]
            except BadImage:
                continue
            draws = [generator(self.objective.seed, draw, i) for draw in range(self.draws)]
            crops[i] = torch.stack([self.objective.views.crops(image, each) for each in draws])
        return crops

    def _encode(self, numbers: Int64[Tensor, " n"], crops: UInt8[Tensor, "n D 2 C s s"]) -> Encoded:
        pairs = []
        for draw in range(self.draws):
            batch = crops[:, draw].to(self.hardware.device)
            views = self.views(batch, Counted(self.objective.seed, draw, numbers))
            pairs.append(torch.stack([self._project(view) for view in views]))
        return Encoded(numbers, torch.stack(pairs))

    def _project(self, view: Float[Tensor, "n C s s"]) -> Float[Tensor, "n d"]:
        with torch.inference_mode():
            with self.hardware.autocast():
                features = self.network(view.contiguous(memory_format=torch.channels_last))
            return F.normalize(self.head(features.float()), dim=1).cpu()


def losses_of(images: Encoded, reference: Encoded, temperature: float) -> Float[Tensor, " n"]:
    """The losses of images, each among the ``reference`` without itself; without its last, if it is none of them."""
    left_out = images.numbers.unsqueeze(1) == reference.numbers
    left_out[:, -1] |= ~left_out.any(dim=1)
    left_out = left_out.repeat(1, 2)
    losses = []
    for (a, b), (first, second) in zip(images.views, reference.views, strict=True):
        positive, keys = (a * b).sum(1, keepdim=True) / temperature, torch.cat([first, second])
        for z in (a, b):
            negatives = (z @ keys.T / temperature).masked_fill(left_out, -torch.inf)
            losses.append(torch.cat([positive, negatives], 1).logsumexp(1) - positive.squeeze(1))
    return torch.stack(losses).mean(0)
