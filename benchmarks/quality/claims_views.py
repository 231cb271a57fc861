"""What the instance branch says of two views of the same images: claims about positives, negatives and invariance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

T = 0.2  # the temperature of MoCo's loss


def of_views(folder: Path, test: str) -> dict[str, float]:
    """How the instance branch compares two views of 1,000 test images, which are the same for all runs."""
    import torch
    import torch.nn.functional as F

    from crosslevel.data.bad_files import BadFiles
    from crosslevel.data.loaders.batches import pack
    from crosslevel.data.open import open_images
    from crosslevel.data.subsets.select import take
    from crosslevel.models.encoder import load_encoder
    from crosslevel.runs import load_branches
    from crosslevel.transforms.philox import Counted
    from crosslevel.transforms.views import Views

    encoder, head = load_encoder(folder), load_branches(folder)["instance branch"]
    images = open_images(test)
    sample = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:1000]
    packed = pack(take(images, sample.sort().values), encoder.view.size, bad_files=BadFiles())
    views = Views("cifar", encoder.view.size, mean=encoder.view.mean, std=encoder.view.std)
    with torch.inference_mode():
        a, b = (
            F.normalize(head(torch.cat([encoder(part) for part in view.split(250)])), dim=1)
            for view in views(packed.data, Counted(0, 0, torch.arange(len(packed))))
        )
    return compared(a, b)


def compared(a: Tensor, b: Tensor) -> dict[str, float]:
    """The ratio of positives to negatives, and the agreement in percent, of unit features of two views, row by row.

    An image's ratio is exp(s / T) of its own other view over the mean of exp(s / T) of the other images' ones.
    """
    import torch

    cosine = (a @ b.T).double()
    own, same = cosine.diagonal(), torch.eye(len(cosine), dtype=torch.bool)
    others = cosine.masked_fill(same, -torch.inf)
    negatives = (others / T).exp().sum(1) / (len(cosine) - 1)
    return {
        "contrast": float(((own / T).exp() / negatives).mean()),
        "agreement": 100 * float((own > others.amax(1)).double().mean()),
    }
