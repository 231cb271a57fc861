"""The components of a training: encoder, method, group branch and views, each newly made for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from crosslevel.cld.harmonization import Harmonization
from crosslevel.cld.loss import CrossLevel
from crosslevel.methods import METHODS, USUAL, Method
from crosslevel.models.any_size import take_any_size
from crosslevel.models.encoder import COLOURS, Encoder
from crosslevel.settings import describe as settings
from crosslevel.training.loop.module import connect
from crosslevel.training.loop.module import share_hidden as share
from crosslevel.transforms.views import Views
from crosslevel.utils.errors import UserError

MakeEncoder = Callable[[], Encoder]
MakeCLD = Callable[[int], CrossLevel]
MakeGH = Callable[[int], Harmonization]
MakeViews = Callable[[], Views]
MakeMethod = Callable[[nn.Module, int | None], Method]
Part = TypeVar("Part", bound=nn.Module)


@dataclass
class Bases:
    """The components built before the images are known; ``cld`` is present even if its weight turns it off."""

    encoder: Encoder
    cld: CrossLevel | None
    views: Views


@dataclass
class Components:
    """All parts of one training, and the ``settings`` that would build them again."""

    encoder: Encoder
    method: Method
    cld: CrossLevel | None
    views: Views
    settings: dict[str, Any]
    gh: Harmonization | None = None

    @property
    def kind(self) -> str:
        """The word for the components in a run's name."""
        added = ("-cld" if self.cld is not None else "") + ("-gh" if self.gh is not None else "")
        return type(self.method).__name__.lower() + added

    @property
    def described(self) -> str:
        """A description of the losses and the network, for the user."""
        branch = ("" if self.cld is None else " + CLD") + ("" if self.gh is None else " + GH")
        return f"{type(self.method).__name__}{branch} on {self.encoder.name}"

    @property
    def method_option(self) -> str:
        """The option that names a method that is not Crosslevel's, for a command line."""
        return "" if type(self.method) in METHODS.values() else f" --method {self.settings['method']['class_path']}"

    def check(self, batch: int, devices: int, images: int | None = None) -> None:
        """Refuse settings that would fail in the first step, before anything is trained.

        Args:
            batch: images a step, on each device.
            devices: how many of them.
            images: number of images in the collection; None if unknown.

        Raises:
            ValueError: parts do not fit each other or the batch; the message says what to change.

        """
        if batch < 2:
            raise UserError(f"batch_size={batch} leaves nothing to compare with: give at least 2")
        self.method.check(batch, devices, images)
        name, piece = type(self.method).__name__, self.method.piece_size(self.views.size)
        if self.views.small:
            _check_small(name, self.encoder, self.views.small_side)
        if piece is not None and self.encoder.fixed_size not in (None, piece):
            raise UserError(
                f"{name}'s patches are {piece} pixels, {self.encoder.name} is built for {self.encoder.fixed_size}: "
                "give --method.jigsaw 0 or a convolutional encoder"
            )
        points = batch * (devices if self.cld is not None and self.cld.gather else 1)
        if self.cld is not None and self.cld.groups is not None and self.cld.groups > points:
            raise UserError(
                f"cld.groups={self.cld.groups} exceeds the batch of {points} images: lower groups or raise batch_size"
            )
        needed = self.method.views - self.method.plain_views - self.method.small_views
        distinct = len(self.views.augments)
        if 1 < distinct < needed:
            raise UserError(
                f"views.preset={self.views.preset} has {distinct} different views, {name} "
                f"{'with CLD ' if self.cld is not None else ''}needs {needed}: choose a preset of one, such as mocov2"
            )


def bases(
    encoder: Encoder | MakeEncoder,
    cld: CrossLevel | MakeCLD | None,
    views: Views | MakeViews,
    seed: int,
    channels: int = 3,
) -> Bases:
    """Seed, then make the parts, so that the seed determines their initial weights.

    Args:
        encoder: a factory of the network, or a network to copy.
        cld: a factory of the group branch, by feature size, or one to copy; None for none.
        views: a factory of the views, or views to copy.
        seed: of torch's random numbers.
        channels: of the images; an encoder takes that many unless it sets them itself.

    Raises:
        UserError: the encoder takes other channels.

    """
    torch.manual_seed(seed)
    network = _copy(encoder) if isinstance(encoder, Encoder) else _build_encoder(encoder, channels)
    if network.view.channels != channels:
        raise UserError(
            f"the images have {channels} channels, the encoder takes {network.view.channels}: give the source's by "
            "--channels, and leave encoder.channels out"
        )
    if cld is None or isinstance(cld, CrossLevel):
        branch = None if cld is None else _copy(cld)
    else:
        branch = cld(network.num_features)
    return Bases(network, branch, _copy(views) if isinstance(views, Views) else views())


def assemble(
    base: Bases,
    method: MakeMethod | None,
    images: int | None,
    share_hidden: bool,
    gh: Harmonization | MakeGH | None = None,
) -> Components:
    """Add the method, the default one unless given, and fit all parts to each other.

    Args:
        base: the other parts; the size of the views is set in ``encoder`` and ``views``.
        method: a factory of the method, by encoder and number of images.
        images: N; None if unknown.
        share_hidden: both heads share their hidden layer.
        gh: a factory of the geometric harmonization, by feature size, or one to copy; None for none.

    Raises:
        ValueError: heads that cannot share a layer, or settings that a part refuses.

    """
    build: Callable[..., Method] = method or METHODS[USUAL]
    instance = build(base.encoder, images)
    branch = base.cld if base.cld is not None and base.cld.weight else None
    if branch is not None:
        connect(instance, branch)
    harmony = _copy(gh) if isinstance(gh, Harmonization) else None if gh is None else gh(instance.out_features)
    if harmony is not None and not harmony.weight:
        harmony = None
    if instance.small_views:
        _fit_small(base.encoder, base.views)
    tree = {
        "encoder": settings.describe(base.encoder),
        "cld": {"weight": 0.0} if base.cld is None else settings.describe(base.cld, skip=("in_features",)),
        "gh": {"weight": 0.0} if harmony is None else settings.describe(harmony, skip=("in_features",)),
        "views": settings.describe(base.views),
        "method": {
            "class_path": f"{type(instance).__module__}.{type(instance).__name__}",
            "init_args": settings.describe(instance, skip=("encoder", "images")),
        },
    }
    if branch is not None or harmony is not None:
        instance.online = max(instance.online, 2)  # both compare two views of the trained network
    base.views.count, base.views.small, base.views.plain = instance.views, instance.small_views, instance.plain_views
    if share_hidden and branch is not None:
        share(instance, branch)
    return Components(base.encoder, instance, branch, base.views, tree, harmony)


def _fit_small(encoder: Encoder, views: Views) -> None:
    """Adapt a network that is built for one size to small crops, in whole patches."""
    patch = take_any_size(encoder.backbone) if encoder.fixed_size is not None else None
    if patch is not None and views.small_size is None:
        views.small_size = max(patch, round(views.small_side / patch) * patch)


def _check_small(name: str, encoder: Encoder, side: int) -> None:
    """Refuse small crops that the encoder cannot take."""
    if encoder.fixed_size in (None, side):
        return
    patch = take_any_size(encoder.backbone)
    if patch is None:
        raise UserError(
            f"{name}'s small crops are {side} pixels, {encoder.name} takes {encoder.fixed_size} alone: give "
            f"--method.small_views 0 or --views.small_size {encoder.fixed_size}"
        )
    if side % patch:
        raise UserError(f"views.small_size={side}: {encoder.name} needs a multiple of its patches' {patch} pixels")


def _build_encoder(encoder: MakeEncoder, channels: int) -> Encoder:
    """Build the network, with the images' channels if its factory takes them."""
    if channels == COLOURS:
        return encoder()
    maker: partial[Encoder] = encoder if isinstance(encoder, partial) else partial(encoder)
    open_still = maker.func is Encoder and maker.keywords.get("channels") is None
    return maker(**({"channels": channels} if open_still else {}))


def _copy(part: Part) -> Part:
    return copy.deepcopy(part)
