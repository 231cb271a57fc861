"""A program whose 1, 2 and 4 processes train with the same batches of all: what `test_ranks` compares."""

import copy
import csv
import io
import os
import shutil
import socket
import sys
from functools import cache
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
from crosslevel.methods import BYOL, DINO, NPID, Distill, InfoMin, MoCo, SimCLR, SimSiam, SwAV, VICReg
from crosslevel.models.encoder import Encoder
from crosslevel.training.loop.fit import fit
from crosslevel.training.loop.module import Pretrain
from crosslevel.transforms.views import Views
from crosslevel.utils.device import choose
from crosslevel.utils.distributed import wait
from crosslevel.utils.processes import world

IMAGES, BATCH, STEPS, SIZE = 48, 16, 3, 16
SMALL = {"out_features": 8, "hidden": 16}
# Prototypes and the last layer stay as they are in the first step alone, of three in an epoch.
CROPPED = SMALL | {"small_views": 1, "freeze": 0.3}
METHODS = {
    "SimCLR": lambda encoder: SimCLR(encoder, temperature=0.2, **SMALL),
    "MoCo": lambda encoder: MoCo(encoder, IMAGES, out_features=8, queue=32, momentum=0.9, shuffle=False),
    "InfoMin": lambda encoder: InfoMin(encoder, IMAGES, out_features=8, queue=32, momentum=0.9, shuffle=False),
    "BYOL": lambda encoder: BYOL(encoder, **SMALL),
    "NPID": lambda encoder: NPID(encoder, IMAGES, out_features=8),
    "SimSiam": lambda encoder: SimSiam(encoder, **SMALL),
    "VICReg": lambda encoder: VICReg(encoder, **SMALL),
    "SwAV": lambda encoder: SwAV(encoder, prototypes=12, queue=24, **CROPPED),
    "DINO": lambda encoder: DINO(encoder, outputs=12, teacher_warmup=1, momentum=0.9, **CROPPED),
    "Distill": lambda encoder: Distill(encoder, teacher=os.environ[TEACHER], momentum=0.5, hidden=16),
}
TEACHER = "TEACHER_OF_DISTILL"
CASES = [(name, cld, "images") for name in METHODS for cld in (False, True)]
CASES += [(name, name != "MoCo", "stream") for name in ("SimCLR", "MoCo", "BYOL", "InfoMin")]
VIT = ("MoCo", False, "ViT")  # a transformer, by AdamW, with rates that fall in depth
CASES += [VIT]
SHARDED = [("SimCLR", True, "images"), ("BYOL", False, "images"), VIT]
"""These with encoders in parts, too."""
LAYOUTS = [(name, True, "images") for name in METHODS]
"""These on two machines of two processes, too."""


def source():
    data = torch.randint(256, (IMAGES, 3, 4, 4), generator=torch.Generator().manual_seed(1)).float()
    large = torch.nn.functional.interpolate(data, size=(SIZE, SIZE), mode="bilinear")
    return InMemoryImages(large.byte(), [str(i) for i in range(IMAGES)])


def batches(kind, folder, views, ranks):
    if kind != "stream":
        return TrainBatches(
            source(), BATCH // ranks.size, seed=0, bad_files=BadFiles(), rank=ranks.rank, world=ranks.size
        )
    stream = open_images(f"stream:{folder}/s-*.tar", streams=True)
    whole = {
        "epoch_size": STEPS * BATCH, "seed": 0, "bad_files": BadFiles(), "crops": views.crops, "buffer": 8, "rows": 4,
    }  # fmt: skip
    return StreamBatches(stream, BATCH // ranks.size, rank=ranks.rank, world=ranks.size, **whole)


@cache
def shallow():
    """A convolution, its normalization and the average: what is sent at each normalization takes longest here."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18", True, 0.125)
    net = encoder.backbone
    net.layer1 = net.layer2 = net.layer3 = net.layer4 = torch.nn.Identity()
    net.head_hidden_size = net.num_features = net.conv1.out_channels
    return encoder


def step_of(method, with_cld, kind):
    """A training step, the same each time."""
    made = shallow()  # which draws the first time alone
    torch.manual_seed(0)
    optimizer = {"optimizer": "sgd", "lr": 0.03, "weight_decay": 0.0}
    if kind == "ViT":
        small = {"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 4}
        encoder = Encoder("vit_tiny_patch16_224", image_size=SIZE, arguments=small)
        optimizer = {"optimizer": "adamw", "lr": 0.001, "weight_decay": 0.05, "layer_decay": 0.75}
    else:
        encoder = copy.deepcopy(made)
    built = METHODS[method](encoder)
    cld = CrossLevel(encoder.num_features, groups=5, out_features=8, gather=True) if with_cld else None
    colours = {} if kind == "stream" else {"jitter": 0, "grayscale": 0}  # they take as long as all the rest
    views = Views("cifar", SIZE, **colours)
    if with_cld:
        built.online = max(built.online, 2)
    views.count, views.small, views.plain = built.views, built.small_views, built.plain_views
    return Pretrain(encoder, built, cld, views, steps=STEPS, warmup_steps=1, seed=0, **optimizer)


def losses(method, with_cld, kind, folder, ranks, run=None, strategy="ddp"):
    """What `fit` logs of some steps, statistics and groups over all ranks; of a ``run`` that goes on, of the rest.

    With encoders in parts, the monitor's figure is a sum of the weights that it sees, and the run leaves its own.
    """
    module = step_of(method, with_cld, kind)
    encoder, often = module.encoder, (method, kind) in (("SimCLR", "stream"), ("MoCo", "ViT"))
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
        os.environ |= torchrun(process, count, port, machines=2)
        found |= {("2x2", case): losses(*case, folder / "2x2", world(1, 1)) for case in LAYOUTS}
    if process == 0:
        torch.save(found, folder / f"{count}.pt")


def last_but_one(run, copy):
    """A copy of a run whose newest checkpoint is the one before its last."""
    shutil.copytree(run, copy)
    os.replace(copy / "checkpoints" / "previous.ckpt", copy / "checkpoints" / "last.ckpt")


def torchrun(process, count, port, machines=1):
    each = count // machines
    names = {"RANK": process, "LOCAL_RANK": process % each, "GROUP_RANK": process // each, "WORLD_SIZE": count}
    names |= {"LOCAL_WORLD_SIZE": each}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x"}
    return {name: str(value) for name, value in (names | where).items()}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def main(folder):
    """In a fork of the test's process, which has all imports: those of 2 and 4 are its own, before it trains itself."""
    torch.set_num_threads(1)
    sys.modules["tensorboard"] = None  # takes as long as a case
    torch.manual_seed(1)
    os.environ[TEACHER] = str(Encoder("test_vit", image_size=2 * SIZE).save(folder / "teacher.safetensors"))
    for count in (2, 4):
        mp.start_processes(run, (count, free_port(), folder), nprocs=count, start_method="fork")
    found = every_case(folder, world(1, 1))
    for count in (2, 4):
        last_but_one(folder / f"SimCLR-True-stream-{count}-ddp", folder / f"begun-{count}")
        found[count] = losses("SimCLR", True, "stream", folder, world(1, 1), folder / f"begun-{count}")
    last_but_one(folder / name_of(VIT, 2, "fsdp"), folder / "on-one")
    found["fsdp", 2, 1] = losses(*VIT, folder, world(1, 1), folder / "on-one")
    torch.save(found, folder / "1.pt")
