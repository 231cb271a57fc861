"""How many epochs a run has: by the collection, or by the time that there is, measured on this machine."""

from __future__ import annotations

import copy
import itertools
import os
import time
from collections.abc import Callable

import torch

from crosslevel.data.loaders.batches import TrainBatches
from crosslevel.data.loaders.streams import StreamBatches
from crosslevel.models.encoder import Encoder
from crosslevel.training import defaults
from crosslevel.transforms.views import Views
from crosslevel.utils.device import Hardware

MEASURED = "CROSSLEVEL_SECONDS_A_STEP"
"""What the first process of a distributed run measured; the others, which it starts later, need the same."""

TIMED, ENOUGH = 10, 5.0  # steps, and seconds after which fewer do
Batches = TrainBatches | StreamBatches


def budget(
    minutes: float | None,
    images: int,
    encoder: Encoder,
    views: Views,
    batches: Callable[[], Batches],
    hardware: Hardware,
    rank: int,
) -> defaults.Choice:
    """The epochs that suit ``images``, or that ``minutes`` have time for.

    Raises:
        ValueError: no time at all.

    """
    if minutes is None:
        return defaults.epochs(images)
    tried = batches()
    if rank == 0:
        os.environ[MEASURED] = str(seconds_a_step(encoder, views, tried, hardware))
    return defaults.affordable_epochs(minutes, float(os.environ[MEASURED]), len(tried))


def seconds_a_step(encoder: Encoder, views: Views, batches: Batches, hardware: Hardware) -> float:
    """What reading a batch, drawing its views, and a step of a copy of the encoder on all of them take.

    The encoder stays as it is, and so does the state of torch's random numbers. Heads, losses and memories are not
    measured: beside an encoder they are little.
    """
    with torch.random.fork_rng(devices=[]):
        network = copy.deepcopy(encoder).train().to(hardware.device).to(memory_format=torch.channels_last)
        draw = copy.deepcopy(views).to(hardware.device)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
        ends: list[float] = []
        for batch in itertools.chain.from_iterable(itertools.repeat(batches)):
            shown = draw(batch.images.to(hardware.device))
            with hardware.autocast():
                features = [network(view.contiguous(memory_format=torch.channels_last)) for view in shown]
            optimizer.zero_grad()
            torch.stack([h.float().square().mean() for h in features]).sum().backward()
            optimizer.step()
            float(features[0].detach().flatten()[0])  # waits for the device
            ends.append(time.perf_counter())
            if len(ends) > TIMED or (len(ends) > 2 and ends[-1] - ends[0] > ENOUGH):
                break
    return (ends[-1] - ends[0]) / (len(ends) - 1)
