"""Crosslevel: visual features from natural, unlabelled images, by cross-level discrimination (CLD)."""

from crosslevel.cld.loss import CrossLevel
from crosslevel.models.encoder import Encoder, load_encoder

__version__ = "0.1.0"

__all__ = ["CrossLevel", "Encoder", "__version__", "load_encoder"]
