"""A program whose 1, 2 and 4 processes train with the same batches of all: what `test_ranks` compares."""

import csv
import io
import os
import shutil
import socket
import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp
from rich.console import Console

from crosslevel.cld.loss import CrossLevel
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import InMemoryImages
from crosslevel.data.loaders.batches import TrainBatches
from crosslevel.data.loaders.streams import StreamBatches
from crosslevel.data.open import open_images
from crosslevel.methods import BYOL, NPID, InfoMin, MoCo, SimCLR
from crosslevel.models.encoder import Encoder
from crosslevel.training.loop.fit import fit
from crosslevel.training.loop.module import Pretrain
from crosslevel.transforms.views import Views
from crosslevel.utils.device import choose
from crosslevel.utils.distributed import wait
from crosslevel.utils.processes import world

IMAGES, BATCH, STEPS, SIZE = 64, 16, 4, 16
METHODS = {
    "SimCLR": lambda encoder: SimCLR(encoder, out_features=8, hidden=16, temperature=0.2),
    "MoCo": lambda encoder: MoCo(encoder, IMAGES, out_features=8, queue=32, momentum=0.9, shuffle=False),
    "InfoMin": lambda encoder: InfoMin(encoder, IMAGES, out_features=8, queue=32, momentum=0.9, shuffle=False),
    "BYOL": lambda encoder: BYOL(encoder, out_features=8, hidden=16),
    "NPID": lambda encoder: NPID(encoder, IMAGES, out_features=8),
}
CASES = [(name, cld, "images") for name in METHODS for cld in (False, True)]
CASES += [(name, True, "stream") for name in ("SimCLR", "MoCo")]
VIT = ("MoCo", False, "ViT")  # a transformer, by AdamW, with rates that fall in depth
CASES += [VIT]
SHARDED = [("SimCLR", True, "images"), ("BYOL", False, "images"), VIT]
"""These with encoders in parts, too."""


def source():
    data = torch.randint(256, (IMAGES, 3, 4, 4), generator=torch.Generator().manual_seed(1)).float()
    large = torch.nn.functional.interpolate(data, size=(SIZE, SIZE), mode="bilinear")
    return InMemoryImages(large.byte(), [str(i) for i in range(IMAGES)])


def batches(kind, folder, views, ranks):
    if kind != "stream":
        return TrainBatches(source(), BATCH // ranks.size, seed=0, bad=BadFiles(), rank=ranks.rank, world=ranks.size)
    stream = open_images(f"stream:{folder}/s-*.tar", streams=True)
    whole = {"epoch_size": 4 * BATCH, "seed": 0, "bad": BadFiles(), "crops": views.crops, "buffer": 8, "rows": 4}
    return StreamBatches(stream, BATCH // ranks.size, rank=ranks.rank, world=ranks.size, **whole)


def shallow(encoder):
    """Two stages of one block each: what is sent at each normalization takes longest here."""
    net = encoder.backbone
    net.layer3 = net.layer4 = torch.nn.Identity()
    del net.layer1[1:], net.layer2[1:]
    net.head_hidden_size = net.num_features = net.layer2[0].conv2.out_channels
    return encoder


def step_of(method, with_cld, kind):
    """A training step, the same each time."""
    torch.manual_seed(0)
    optimizer = {"optimizer": "sgd", "lr": 0.03, "weight_decay": 0.0}
    if kind == "ViT":
        small = {"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 4}
        encoder = Encoder("vit_tiny_patch16_224", image_size=SIZE, arguments=small)
        optimizer = {"optimizer": "adamw", "lr": 0.001, "weight_decay": 0.05, "layer_decay": 0.75}
    else:
        encoder = shallow(Encoder("resnet18", True, 0.0625, zero_init_last=True))  # in which rounding grows least
    built = METHODS[method](encoder)
    cld = CrossLevel(encoder.num_features, groups=5, out_features=8, gather=True) if with_cld else None
    views = Views("cifar", SIZE)
    if with_cld:
        built.online = max(built.online, 2)
    views.count, views.plain = built.views, built.plain_views
    return Pretrain(encoder, built, cld, views, steps=STEPS, warmup_steps=1, seed=0, **optimizer)


def losses(method, with_cld, kind, folder, ranks, run=None, strategy="ddp"):
    """What `fit` logs of some steps, statistics and groups over all ranks; of a ``run`` that goes on, of the rest.

    With encoders in parts, the monitor's figure is a sum of the weights that it sees, and the run leaves its own.
    """
    module = step_of(method, with_cld, kind)
    encoder, often = module.encoder, kind in ("stream", "ViT")
    resume, run = run is not None, run or folder / name_of((method, with_cld, kind), ranks.size, strategy)
    fit(
        module, batches(kind, folder, module.views, ranks), run, hardware=choose("cpu", "fp32"), ranks=ranks,
        log_every=1, sync_batchnorm=True, console=Console(file=io.StringIO()), resume=resume,
        checkpoint_minutes=0 if often else 10, strategy=strategy,
        monitor=None if strategy == "ddp" else lambda: {"knn": float(total(encoder))},
    )  # fmt: skip
    if ranks.rank == 0 and strategy == "fsdp":
        torch.save(encoder.state_dict(), run / "weights.pt")
    return logged(run)


def name_of(case, count, strategy):
    return "-".join(map(str, (*case, count, strategy)))


@torch.no_grad()
def total(encoder):
    return torch.stack([p.double().abs().sum() for p in encoder.parameters()]).sum()


def logged(run, name="loss"):
    if not (run / "metrics.csv").exists():
        return []
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def every_case(folder, ranks):
    return {case: losses(*case, folder, ranks) for case in CASES}


def run(process, count, port, folder):
    os.environ |= torchrun(process, count, port)
    ranks, folder = world(1, 1), Path(folder)
    found = every_case(folder, ranks)
    if count == 2:
        found |= {("fsdp", case): losses(*case, folder, ranks, strategy="fsdp") for case in SHARDED}
    else:
        for strategy in ("ddp", "fsdp"):
            if process == 0:
                last_but_one(folder / name_of(VIT, 2, strategy), folder / f"{strategy}-on-four")
            wait()
            found[strategy, 2, 4] = losses(*VIT, folder, ranks, folder / f"{strategy}-on-four", "fsdp")
    if process == 0:
        torch.save(found, folder / f"{count}.pt")


def last_but_one(run, copy):
    """A copy of a run whose newest checkpoint is the one before its last."""
    shutil.copytree(run, copy)
    os.replace(copy / "checkpoints" / "previous.ckpt", copy / "checkpoints" / "last.ckpt")


def torchrun(process, count, port):
    names = {"RANK": process, "LOCAL_RANK": process, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x"}
    return {name: str(value) for name, value in (names | where).items()}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def main(folder):
    """In a process of its own, which imports once: those of 2 and 4 are its forks, before it trains itself."""
    torch.set_num_threads(1)
    sys.modules["tensorboard"] = None  # takes as long as a case
    for count in (2, 4):
        mp.start_processes(run, (count, free_port(), folder), nprocs=count, start_method="fork")
    folder = Path(folder)
    found = every_case(folder, world(1, 1))
    for count in (2, 4):
        last_but_one(folder / f"SimCLR-True-stream-{count}-ddp", folder / f"begun-{count}")
        found[count] = losses("SimCLR", True, "stream", folder, world(1, 1), folder / f"begun-{count}")
    last_but_one(folder / name_of(VIT, 2, "fsdp"), folder / "on-one")
    found["fsdp", 2, 1] = losses(*VIT, folder, world(1, 1), folder / "on-one")
    torch.save(found, folder / "1.pt")


if __name__ == "__main__":
    main(sys.argv[1])
