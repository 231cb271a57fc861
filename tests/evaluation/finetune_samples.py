"""Pictures of noise in a class's colour."""

import torch

from crosslevel.data.images import InMemoryImages

COLOURS = torch.tensor([[160, 90, 90], [90, 160, 90], [90, 90, 160], [130, 130, 60]])
CLASSES = ["red", "green", "blue", "olive"]


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(count, seed, noise=80):
    """Pictures of four colours under noise, the classes in turn; without noise they are one colour everywhere."""
    labels = torch.arange(count) % 4
    colours = COLOURS[labels] + torch.randint(-20, 21, (count, 3), generator=draws(seed))
    pixels = colours[:, :, None, None] + torch.randint(-noise, noise + 1, (count, 3, 16, 16), generator=draws(seed + 1))
    return InMemoryImages(pixels.clamp(0, 255).to(torch.uint8), [f"{i:03}.png" for i in range(count)], labels, CLASSES)
