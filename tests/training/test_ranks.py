"""The same losses from 1, 2 and 4 processes with the same batches of all.

All cases share one start of the processes, which find each other as those of torchrun do.
"""

import csv
import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from container_samples import write_tar
from picture_samples import encoded
from PIL import Image
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
from crosslevel.utils.errors import UserError
from crosslevel.utils.processes import is_first, world

pytestmark = pytest.mark.slow

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


def source():
    data = torch.randint(256, (IMAGES, 3, 4, 4), generator=torch.Generator().manual_seed(1)).float()
    large = torch.nn.functional.interpolate(data, size=(SIZE, SIZE), mode="bilinear")
    return InMemoryImages(large.byte(), [str(i) for i in range(IMAGES)])


def batches(kind, folder, views, ranks):
    if kind == "images":
        return TrainBatches(source(), BATCH // ranks.size, seed=0, bad=BadFiles(), rank=ranks.rank, world=ranks.size)
    stream = open_images(f"stream:{folder}/s-*.tar", streams=True)
    whole = {"epoch_size": 4 * BATCH, "seed": 0, "bad": BadFiles(), "crops": views.crops, "buffer": 8, "rows": 4}
    return StreamBatches(stream, BATCH // ranks.size, rank=ranks.rank, world=ranks.size, **whole)


def losses(method, with_cld, kind, folder, ranks, run=None):
    """What `fit` logs of some steps, statistics and groups over all ranks; of a ``run`` that goes on, of the rest."""
    torch.manual_seed(0)
    encoder = shallow(Encoder("resnet18", True, 0.0625, zero_init_last=True))  # in which rounding grows least
    built = METHODS[method](encoder)
    cld = CrossLevel(encoder.num_features, groups=5, out_features=8, gather=True) if with_cld else None
    views = Views("cifar", SIZE)
    if with_cld:
        built.online = max(built.online, 2)
    views.count, views.plain = built.views, built.plain_views
    module = Pretrain(
        encoder, built, cld, views, steps=STEPS, warmup_steps=1, optimizer="sgd", lr=0.03, weight_decay=0.0, seed=0
    )
    resume, run = run is not None, run or folder / f"{method}-{with_cld}-{kind}-{ranks.size}"
    fit(
        module, batches(kind, folder, views, ranks), run, hardware=choose("cpu", "fp32"), ranks=ranks, log_every=1,
        sync_batchnorm=True, console=Console(file=io.StringIO()), resume=resume,
        checkpoint_minutes=0 if kind == "stream" else 10,
    )  # fmt: skip
    return logged(run)


def shallow(encoder):
    """Two stages of one block each: what is sent at each normalization takes longest here."""
    net = encoder.backbone
    net.layer3 = net.layer4 = torch.nn.Identity()
    del net.layer1[1:], net.layer2[1:]
    net.head_hidden_size = net.num_features = net.layer2[0].conv2.out_channels
    return encoder


def logged(run):
    if not (run / "metrics.csv").exists():
        return []
    with (run / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


def every_case(folder, ranks):
    return {case: losses(*case, folder, ranks) for case in CASES}


def run(process, count, port, folder):
    os.environ |= torchrun(process, count, port)
    found = every_case(Path(folder), world(1, 1))
    if process == 0:
        torch.save(found, f"{folder}/{count}.pt")


def torchrun(process, count, port):
    names = {"RANK": process, "LOCAL_RANK": process, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x"}
    return {name: str(value) for name, value in (names | where).items()}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The losses of all cases on 1, 2 and 4 processes."""
    folder = tmp_path_factory.mktemp("ranks")
    draws = np.random.default_rng(0)
    for i in range(2):
        pictures = draws.integers(0, 256, (30, 20, 20, 3), np.uint8)
        members = [(f"{n:03}.png", encoded(Image.fromarray(picture), "PNG")) for n, picture in enumerate(pictures)]
        write_tar(folder / f"s-{i}.tar", members)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run([sys.executable, __file__, str(folder)], check=True, env={**os.environ, "PYTHONPATH": path})
    return {count: torch.load(folder / f"{count}.pt") for count in (1, 2, 4)}


def main(folder):
    """In a process of its own, which imports once: those of 2 and 4 are its forks, before it trains itself."""
    torch.set_num_threads(1)
    sys.modules["tensorboard"] = None  # takes as long as a case
    for count in (2, 4):
        mp.start_processes(run, (count, free_port(), folder), nprocs=count, start_method="fork")
    found = every_case(Path(folder), world(1, 1))
    for count in (2, 4):
        begun = Path(folder, f"SimCLR-True-stream-{count}")
        os.replace(begun / "checkpoints" / "previous.ckpt", begun / "checkpoints" / "last.ckpt")
        found[count] = losses("SimCLR", True, "stream", Path(folder), world(1, 1), begun)
    torch.save(found, f"{folder}/1.pt")


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_losses_are_those_of_one_process_with_the_whole_batch(found, case):
    alone = found[1][case]
    assert len(alone) == STEPS
    assert len(set(alone)) == STEPS
    for count in (2, 4):
        assert found[count][case] == pytest.approx(alone, rel=1e-5), count  # the log has six digits


def test_a_run_of_several_processes_goes_on_within_an_epoch_with_the_same_images_in_one(found):
    case = ("SimCLR", True, "stream")
    for count in (2, 4):
        assert found[1][count] == pytest.approx(found[1][case], rel=1e-5)


def test_what_is_not_told_is_asked_for(monkeypatch):
    own = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "CROSSLEVEL_NODE")
    for name in ("SLURM_NODEID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", *own):
        monkeypatch.setenv(name, "")  # so that what the code sets goes with the test
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match=r"^--nodes 4: NODE_RANK, MASTER_ADDR, MASTER_PORT not set: start one command"):
        world(2, 4)
    with pytest.raises(UserError, match="at least 1 each"):
        world(1, 0)
    monkeypatch.setenv("SLURM_NODEID", "3")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[07-09,12],login1")
    assert world(2, 4) == (2, 4, 6)
    assert os.environ["MASTER_ADDR"] == "gpu07"
    assert not is_first()
    assert world(2, 1) == (2, 1, 0)  # of one machine, nothing of this counts
    assert is_first()
    assert "MASTER_ADDR" not in os.environ
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in torchrun(5, 8, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert world(1, 1) == world(4, 2) == (4, 2, 5)
    with pytest.raises(UserError, match="torchrun started 4 processes on each of 2 machines: leave both out"):
        world(8, 1)


if __name__ == "__main__":
    main(sys.argv[1])
