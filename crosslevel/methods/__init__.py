"""Instance-level methods: one file each, and the contract that they share."""

from __future__ import annotations

from crosslevel.methods.base import Method
from crosslevel.methods.byol import BYOL
from crosslevel.methods.dino import DINO
from crosslevel.methods.distill import Distill
from crosslevel.methods.infomin import InfoMin
from crosslevel.methods.moco import MoCo
from crosslevel.methods.npid import NPID
from crosslevel.methods.simclr import SimCLR
from crosslevel.methods.simsiam import SimSiam
from crosslevel.methods.swav import SwAV
from crosslevel.methods.vicreg import VICReg

METHODS: dict[str, type[Method]] = {
    "byol": BYOL,
    "dino": DINO,
    "distill": Distill,
    "infomin": InfoMin,
    "moco": MoCo,
    "npid": NPID,
    "simclr": SimCLR,
    "simsiam": SimSiam,
    "swav": SwAV,
    "vicreg": VICReg,
}
USUAL = "simclr"  # where none is named; why: crosslevel/training/defaults.py

__all__ = [
    "BYOL", "DINO", "METHODS", "NPID", "USUAL", "Distill", "InfoMin", "Method", "MoCo", "SimCLR", "SimSiam", "SwAV",
    "VICReg",
]  # fmt: skip
