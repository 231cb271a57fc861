"""A network that knows its classes loses them at the whole rate, is stopped and left as it began; not at the usual."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from run_samples import metrics
from safetensors.torch import load_file
from torch import nn

import crosslevel
from crosslevel.features.extract import normalize
from crosslevel.models.encoder import Encoder, View
from crosslevel.training.loop.guards.fall import MARGINS

SIDE, EACH, STEPS = 16, 120, 200
NETWORK = partial(
    Encoder, "vit_small_patch16_224", image_size=SIDE, pool="avg",
    arguments={"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},
)  # fmt: skip


def stripes(folder):
    """Pictures of stripes that lie, stand, fall or rise, of any two colours and any width; the pixels and classes."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:SIDE, :SIDE]
    pictures, classes = [], []
    for c, (name, along) in enumerate({"falling": x - y, "lying": y, "rising": x + y, "standing": x}.items()):
        (folder / name).mkdir(parents=True)
        for i in range(EACH):
            colours = rng.integers(0, 256, (2, 3))
            while np.abs(colours[0] - colours[1]).sum() < 200:
                colours = rng.integers(0, 256, (2, 3))
            pixels = colours[(along + rng.integers(8)) // rng.integers(2, 5) % 2] + rng.normal(0, 15, (SIDE, SIDE, 3))
            pictures.append(pixels.clip(0, 255).astype(np.uint8))
            classes.append(c)
            Image.fromarray(pictures[-1]).save(folder / name / f"{i:03}.png")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), torch.tensor(classes)


@pytest.fixture(scope="module")
def supervised(tmp_path_factory):
    """The pictures, and weights that were trained on their classes."""
    folder = tmp_path_factory.mktemp("stripes")
    pictures, classes = stripes(folder / "photos")
    torch.manual_seed(0)
    encoder, generator = NETWORK(), torch.Generator().manual_seed(0)
    head = nn.Linear(encoder.num_features, 4)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], 2e-3)
    shown = normalize(pictures, View(SIDE))
    for _ in range(STEPS):
        batch = torch.randint(len(shown), (32,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(head(encoder(shown[batch])), classes[batch]).backward()
        optimizer.step()
    return folder / "photos", encoder.save(folder / "supervised.safetensors")


def trained(supervised, run, **rates):
    """The kNN accuracy of the start and after each epoch, by the monitor itself, and the run."""
    photos, weights = supervised
    run = crosslevel.train(
        photos, run=run, encoder=partial(NETWORK, pretrained=str(weights)), epochs=2, batch_size=32, lr=0.015,
        monitor_every=1, device="cpu", precision="fp32", workers=0, report_html=False, quiet=True, **rates,
    )  # fmt: skip
    return [float(row["knn"]) for row in metrics(run) if row["knn"]], run


def test_at_the_usual_share_of_the_rate_and_after_a_warm_up_nothing_falls(supervised, tmp_path):
    knn, run = trained(supervised, tmp_path / "r")
    assert len(knn) == 3
    assert knn[0] > 80
    assert min(knn) >= knn[0] - MARGINS["knn"]
    assert not (run / "warnings.txt").exists()


def test_at_the_whole_rate_the_features_fall_and_the_start_is_left(supervised, tmp_path):
    knn, run = trained(supervised, tmp_path / "r", encoder_rate=1.0, warmup_epochs=0.0)
    start, fallen = knn  # the second epoch is not trained
    assert fallen < start - 2 * MARGINS["knn"]
    told = (run / "warnings.txt").read_text()
    assert told.startswith(f"step 15: the features fall: kNN {fallen:.1f} %, kNN {start:.1f} % at the start: stopped")
    assert f"the encoder of step 0 is left (kNN {start:.1f} %)" in told
    left, before = load_file(run / "encoder.safetensors"), load_file(supervised[1])
    assert left.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in left.items())
