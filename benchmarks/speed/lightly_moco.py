"""Images a second, end to end, of MoCo here and of a MoCo loop of lightly's published parts, in alternation.

Both on the same JPEG files and a ResNet-18 at a quarter width, batch 256, both as their documentation sets them up:
lightly with its transform in 2 loader workers and float32, Crosslevel with its defaults.

    python benchmarks/speed/lightly_moco.py FOLDER   # a class-per-folder layout; needs: pip install lightly
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import MoCoV2Transform
from torch.utils.data import DataLoader

from crosslevel import Encoder
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.loaders.batches import pack
from crosslevel.data.open import open_images
from crosslevel.data.subsets.select import take
from crosslevel.methods import MoCo

sys.path.append(str(Path(__file__).parents[1]))

from shared import records
from shared.beside import beside, dated, median

BATCH, STEPS = 256, 24


class Peer:
    """The loop of lightly's MoCo example: one step at a time."""

    def __init__(self, folder: str) -> None:
        self.query = Encoder("resnet18", True, 0.25)
        features = self.query.num_features
        self.head = MoCoProjectionHead(features, features, 128)
        self.key, self.key_head = copy.deepcopy(self.query), copy.deepcopy(self.head)
        deactivate_requires_grad(self.key)
        deactivate_requires_grad(self.key_head)
        self.criterion = NTXentLoss(temperature=0.2, memory_bank_size=(4096, 128))
        self.optimizer = torch.optim.SGD([*self.query.parameters(), *self.head.parameters()], lr=0.06)
        dataset = LightlyDataset(folder, transform=MoCoV2Transform(input_size=32))
        self.loader = DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=2)
        self.batches = self._forever()

    def _forever(self) -> Iterator[list[torch.Tensor]]:
        while True:
            for batch in self.loader:
                yield batch[0]

    def seconds(self, steps: int = 8) -> float:
        """Seconds a step; the batches that waited ready in the loader's buffer are taken first, not counted."""
        for _ in range(6):
            self.step(next(self.batches))
        began = time.perf_counter()
        for _ in range(steps):
            self.step(next(self.batches))
        return (time.perf_counter() - began) / steps

    def step(self, views: list[torch.Tensor]) -> None:
        update_momentum(self.query, self.key, 0.99)
        update_momentum(self.head, self.key_head, 0.99)
        query = self.head(self.query(views[0]))
        with torch.no_grad():
            key = self.key_head(self.key(views[1]))
        loss = self.criterion(query, key)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("folder")
    parser.add_argument("--epochs", type=int, default=6, help="rounds; the first is not counted")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    peer = Peer(arguments.folder)
    encoder = Encoder("resnet18", True, 0.25)
    method = MoCo(encoder)
    source = open_images(arguments.folder)
    images = take(source, torch.randperm(len(source))[: BATCH * STEPS])
    ours, theirs = beside(
        encoder, method, pack(images, 32, bad_files=BadFiles()), peer.seconds, epochs=arguments.epochs
    )
    print(dated())
    print(f"crosslevel  {BATCH / median(ours):8,.0f} images/s")
    print(f"lightly     {BATCH / median(theirs):8,.0f} images/s")
    ratios = [t / o for o, t in zip(ours, theirs, strict=True)]
    print(f"ratio       {median(ratios):8.2f}     (rounds: {' '.join(f'{r:.2f}' for r in ratios)})")


if __name__ == "__main__":
    main()
