"""Content of pages that several tests show: images, features in clusters, every kind of block."""

import math

import torch

from crosslevel import report

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;$x_1$ \udcff 猫"


def random_images(n, size=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=g)


def clusters(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    return torch.eye(16)[labels] * 5 + torch.randn(n, 16, generator=g), labels


def blocks(name):
    """Every kind of block, with ``name`` wherever a user can put one."""
    images, (features, labels) = random_images(40), clusters(40)
    rows = report.neighbour_rows(images, features, [0, 1], k=4, labels=labels, classes=[name] * 4,
                                 files=[(name, f"/photos/{name}/{i}.png") for i in range(40)])  # fmt: skip
    return [
        report.text(name, [name]),
        report.table(name, [name, "kNN"], [[name, 61.25], ["other", 70.04]], note=name),
        report.curves(name, {name: [(1, 2.0), (2, math.nan), (3, 1.5)]}, name, name, note=name),
        report.settings(name, f"name: {name}"),
        report.commands(name, [f"crosslevel train {name}"]),
        report.image_rows(name, [*rows, report.ImageRow(name, list(images[:2]), [name, name])], note=name),
        report.map2d(name, features[:, :2], images, labels, [name] * 4, note=name, paths=[name] * 40),
        report.bars(name, [name, "b"], [3, 4.5], note=name),
        report.bars(name, [name] * 30, list(range(30)), note=name),
    ]
