"""The defaults that `train` chooses, and why: one rule for each function, from what is known before training.

No rule reads a label or knows a collection's name. The evidence is in docs/results.md, "The defaults".
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from crosslevel.utils.errors import UserError, counted

RATES = {"adamw": 1e-3, "lars": 0.3}  # at 256 images a batch; SGD's is the method's own
DECAYS = {"sgd": 5e-4, "adamw": 0.05, "lars": 1e-6}
LARGE_VIEW = 64  # pixels: up to this size views are drawn as in the authors' CIFAR recipes


class Choice(NamedTuple):
    """One setting as the command line has it, the value that a rule gave it, and the reason in a few words."""

    setting: str
    value: Any
    reason: str

    def __str__(self) -> str:
        """One line for the console and for config.yaml."""
        value = f"{self.value:.4g}" if isinstance(self.value, float) else self.value
        value = str(list(value)).replace(" ", "") if isinstance(value, tuple) else value
        return f"--{self.setting} {value}: {self.reason}"


def batch_size(images: int, epochs: float, devices: int = 1, device: str = "cpu") -> Choice:
    """Images a step on each device, by the number that the run sees in total.

    With S images seen and B a step, there are S / B steps, and each image is contrasted with B - 1 others: both numbers
    must be large. For S of 50,000 to 200,000, 128 a step were better than 256, and better than 64 or about as good; B
    grows with the cube root of S, up to 256 from 370,000 on. Fewer than `GPU_LEAST` do not fill a GPU. An epoch has at
    least `STEPS_AN_EPOCH` steps, if that leaves a batch of at least 16.
    """
    total, share = images * epochs, images / devices
    ideal = 128 * math.cbrt(total / SEEN_FOR_128)
    if device != "cpu":
        ideal = max(ideal, GPU_LEAST)
    fitting = [size for size in BATCHES if size <= share / STEPS_AN_EPOCH] or [min(BATCHES)]
    size = min(fitting, key=lambda size: abs(math.log(size / ideal)))
    reason = f"{total:,.0f} images are seen in all, {images:,} in an epoch"
    return Choice("batch_size", max(2, min(size, int(share))), reason)


def largest_batch(size: int, devices: int, requested: int) -> Choice:
    """All images as one batch, where more images a step were asked for than there are; the rates follow it."""
    where = "" if devices == 1 else f" on each of {devices} devices"
    return Choice("batch_size", size, f"{counted(size, 'image')}{where} make one batch, {requested:,} were asked for")


BATCHES = (16, 32, 64, 128, 256)
SEEN_FOR_128, GPU_LEAST, STEPS_AN_EPOCH = 130_000, 128, 4


def epochs(images: int) -> Choice:
    """Passes over the images: 100 for 50,000 images, else by the inverse root of their number, from 20 to 400."""
    ideal = round(100 * math.sqrt(50_000 / images))
    return Choice("epochs", max(20, min(400, ideal)), f"of {images:,} images; --minutes M sets a time instead")


def affordable_epochs(minutes: float, images_a_second: float, images: int) -> Choice:
    """The number of epochs that fit into ``minutes``, an integer if at least one fits.

    Raises:
        ValueError: no time at all.

    """
    if minutes <= 0:
        raise UserError(f"minutes={minutes} must be positive")
    exact = 60 * minutes * SHARE_FOR_STEPS * images_a_second / images
    reason = f"{minutes:g} minutes at {images_a_second:,.0f} images a second, as measured on this machine"
    return Choice("epochs", float(int(exact)) if exact >= 1 else exact, reason)


SHARE_FOR_STEPS = 0.9  # share of the time for training; the rest goes to figures, checkpoints and the report


def learning_rate(optimizer: str, sgd_rate: float, batch: int) -> Choice:
    """The highest rate, in proportion to the images a step (Goyal et al. 2017)."""
    base = RATES.get(optimizer, sgd_rate)
    return Choice("lr", base * batch / 256, f"{base:g} for 256 images a step, in proportion")


def weight_decay(optimizer: str) -> Choice:
    """The usual weight decay of the optimizer."""
    return Choice("weight_decay", DECAYS[optimizer], f"usual for {optimizer}")


def warmup_epochs(epochs: float) -> Choice:
    """The epochs in which the learning rate rises: a tenth of all, at most 5."""
    return Choice("warmup_epochs", min(5.0, epochs / 10), "a tenth of all, at most 5")


def momentum(steps: int) -> Choice:
    """Momentum of MoCo's, InfoMin's and BYOL's average: over a thirtieth of the run, as 0.999 for 30,000 steps."""
    span = max(10.0, min(1000.0, steps / 30))
    return Choice("method.momentum", 1 - 1 / span, f"the average spans {span:.0f} of {steps:,} steps")


def queue(images: int | None, batch: int) -> Choice:
    """Keys of MoCo's queue: 4,096, but at most a quarter of the images, so that few keys are of the query's own image.

    A queue that holds an image's own earlier keys repels them (facebookresearch/moco issue 146).
    """
    if images is None:
        return Choice("method.queue", max(4096, batch), "the images are not counted")
    quarter = max(1, images // 4)
    size = min(4096, max(batch, quarter // batch * batch), max(1, images - batch))
    return Choice("method.queue", size, f"at most a quarter of {images:,} images, in whole batches")


def groups(batch: int) -> Choice:
    """K of CLD: three quarters of the images that are grouped together."""
    return Choice("cld.groups", max(2, min(batch, round(0.75 * batch))), f"three quarters of {batch} images")


def hold_out(images: int) -> Choice:
    """Images without labels that are held out of the training, to evaluate it: a twentieth, at most 500.

    With fewer than 1,000 images, none are held out: 50 would give a poor estimate, and the training needs them.
    """
    count = min(500, images // 20) if images >= LEAST_TO_HOLD_OUT else 0
    return Choice("hold_out", count, f"of {images:,} images without labels, to judge the features by at the end")


LEAST_TO_HOLD_OUT = 1000


def crop_scale(view: int) -> Choice:
    """Smallest and largest crop for views of up to `LARGE_VIEW` pixels, as shares of the image.

    A fifth of 32 x 32 pixels, the smallest crop of the authors' recipes of 200 epochs, is 14 pixels a side. In short
    trainings, crops from two fifths on were better by 2 to 12 points of kNN if objects fill the image, and about as
    good on CIFAR-10.
    """
    return Choice("views.scale", (0.4, 1.0), f"of {view} pixels a fifth shows little")


def flip(epochs: float) -> Choice:
    """Probability that a view is mirrored: none in short trainings, a half in longer ones, as usual.

    Mirror images take longer to learn, and are wrong for some collections, such as signs and letters. In 2 to 4 epochs
    on three collections, kNN was 0.7 to 2.2 points better without them; in 200 epochs on 500 images, 2.9 points worse.
    """
    short = epochs < FLIPS_FROM
    reason = f"mirror images are more to learn, and {epochs:g} epochs few" if short else f"usual for {epochs:g} epochs"
    return Choice("views.flip", 0.0 if short else 0.5, reason)


FLIPS_FROM = 20


def preset(view: int) -> Choice:
    """The preset of views: up to 64 pixels as in the authors' CIFAR recipes, beyond that with MoCo v2's blur.

    Taken from the published recipes at 32 and at 224 pixels, which have the same colours; not measured in between.
    """
    name = "cifar" if view <= LARGE_VIEW else "mocov2"
    return Choice("views.preset", name, f"usual for views of {view} pixels")


def temperature_period(epochs: float) -> Choice:
    """Epochs of a temperature schedule's period: a fifth of the run, as 400 of 2,000 in the authors' code."""
    return Choice("temperature_period", epochs / 5, "a fifth of the run, as in Kukleva et al. 2023")


def queue_start(epochs: float) -> Choice:
    """Epochs after which SwAV's queue is used: the same share of the run as 15 of 200 in the authors' code."""
    return Choice("method.queue_start", 15 * epochs / 200, "the share of the run that it is in Caron et al. 2020")


def teacher_warmup(epochs: float) -> Choice:
    """Epochs in which the temperature of DINO's teacher rises: a tenth, as 30 of 300 in the paper."""
    return Choice("method.teacher_warmup", epochs / 10, "a tenth of the run, as in Caron et al. 2021")


def harmonization(epochs: float) -> tuple[Choice, ...]:
    """Epochs before harmonization, of its ramp, and between counts: 500, 10 and 20 of 1,000 in the authors' code.

    Each image is counted at least once.
    """
    reason = "the share of the run that it is in Zhou et al. 2023"
    return (
        Choice("gh.warmup_epochs", epochs / 2, reason),
        Choice("gh.ramp_epochs", epochs / 100, reason),
        Choice("gh.update_epochs", max(1.0, epochs / 50), reason),
    )


def optimizer(modern: bool, preferred: str = "sgd") -> Choice:
    """AdamW for ViTs, ConvNeXts and the like, which are published with it; otherwise the method's usual optimizer.

    That is SGD with momentum, except LARS for VICReg: with SGD at 0.06 its loss was infinite after 22 steps.
    """
    if modern or preferred == "sgd":
        return Choice("optimizer", "adamw" if modern else "sgd", "usual for this family of networks")
    return Choice("optimizer", preferred, "usual for this method")


def encoder_rate(pretrained: bool) -> Choice:
    """The encoder's share of the learning rate: a tenth if it starts from weights, as the heads start at random.

    At the full rate, the first steps with untrained heads destroy the weights (facebookresearch/dinov2 issue 204: kNN
    fell from 80 to 10 %).
    """
    return Choice("encoder_rate", FROM_WEIGHTS if pretrained else 1.0, "it starts from weights, the heads do not")


def layer_decay(pretrained: bool, modern: bool) -> Choice:
    """Each layer of a ViT or ConvNeXt that starts from weights learns at 0.75 of the rate of the one above it.

    BEiT's and MAE's usual value for fine-tuning (He et al. 2022, table 9); other networks have one rate.
    """
    return Choice(
        "layer_decay", 0.75 if pretrained and modern else 1.0, "usual where a deep network starts from weights"
    )


FROM_WEIGHTS = 0.1
