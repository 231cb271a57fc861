"""A run of random weights, its images, and tables of features whose neighbours are known."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from crosslevel import Encoder
from crosslevel.features.columns.thumbnails import KIND, encoded
from crosslevel.models.encoder import View


def write_encoder(folder, seed=0):
    """A run's folder with an encoder of random weights for images of 16 pixels."""
    torch.manual_seed(seed)
    encoder = Encoder("resnet18", True, 0.0625, zero_init_last=True)  # its random features tell colours apart
    encoder.view = View(16)
    folder.mkdir(parents=True, exist_ok=True)
    encoder.save(folder / "encoder.safetensors")
    return folder


def write_table(file, features, paths=None, pictures=None, about=None, **columns):
    """A table as embed writes it, of these features; ``pictures`` are tensors (3, H, W)."""
    features = torch.as_tensor(features, dtype=torch.float32)
    made = {"path": paths or [f"{i:03}.png" for i in range(len(features))], **columns}
    made["feature"] = pa.FixedSizeListArray.from_arrays(pa.array(features.numpy().ravel()), features.shape[1])
    if pictures is not None:
        made["image"] = pa.array([{"bytes": encoded(p, 96), "path": None} for p in pictures], KIND)
    table = pa.table(made)
    if about is not None:
        table = table.replace_schema_metadata({"crosslevel": json.dumps(about)})
    pq.write_table(table, file, row_group_size=16)
    return file


def crowds(sizes, width=16, noise=0.1, seed=0):
    """Features in crowds of these sizes around directions that have nothing in common, and whose each is."""
    draws = np.random.default_rng(seed)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    features = np.eye(width)[owner] + noise * draws.standard_normal((len(owner), width))
    return torch.tensor(features, dtype=torch.float32), torch.tensor(owner)


def noise_pictures(count, size=32, seed=0):
    """Pictures that differ in every pixel."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator))
