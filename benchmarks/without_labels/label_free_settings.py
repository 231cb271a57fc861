"""The settings that `label_free.py` trains with."""

from __future__ import annotations

from typing import Any

BATCH, SIZE, STEPS = 128, 24, 300
BASE: dict[str, Any] = {
    "weight": 0.25, "groups": 64, "group_temperature": 0.2, "temperature": 0.2, "lr": 0.25,
    "views": {"preset": "cifar"},
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "base": {},
    "no CLD": {"weight": 0.0},
    "weight 1": {"weight": 1.0},
    "weight 4": {"weight": 4.0},
    "groups 8": {"groups": 8, "weight": 1.0},
    "groups 32": {"groups": 32, "weight": 1.0},
    "groups 128": {"groups": 128, "weight": 1.0},
    "group temperature 0.05": {"group_temperature": 0.05, "weight": 1.0},
    "group temperature 0.7": {"group_temperature": 0.7, "weight": 1.0},
    "temperature 0.05": {"temperature": 0.05},
    "temperature 0.1": {"temperature": 0.1},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 1": {"temperature": 1.0},
    "temperature 5": {"temperature": 5.0},
    "lr 0.0001": {"lr": 1e-4},
    "lr 0.003": {"lr": 0.003},
    "lr 0.03": {"lr": 0.03},
    "lr 1": {"lr": 1.0},
    "lr 5": {"lr": 5.0},
    "lr 30": {"lr": 30.0},
    "no augmentation": {"views": {"preset": "none"}},
    "crop and flip": {"views": {"preset": "cifar", "jitter": 0.0, "grayscale": 0.0}},
    "colour alone": {"views": {"preset": "cifar", "scale": (1.0, 1.0)}},
    "mild": {"views": {"preset": "cifar", "scale": (0.6, 1.0), "jitter": 0.5, "grayscale": 0.0}},
    "simclr views": {"views": {"preset": "simclr"}},
    "tiny crops": {"views": {"preset": "cifar", "scale": (0.02, 0.1)}},
    "all gray": {"views": {"preset": "cifar", "grayscale": 1.0}},
    "few large groups alone": {"weight": 20.0, "groups": 4},
    "sharp": {"temperature": 0.1, "group_temperature": 0.1, "weight": 1.0, "groups": 96},
    "soft": {"temperature": 0.5, "group_temperature": 0.5, "weight": 1.0, "groups": 32, "lr": 0.5},
}
"""What differs from `BASE`; some are bad on purpose."""
