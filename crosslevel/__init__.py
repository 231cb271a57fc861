"""Crosslevel: visual features from natural, unlabelled images, by cross-level discrimination (CLD)."""

from crosslevel.cld import CrossLevel
from crosslevel.encoder import Encoder, load_encoder

__version__ = "0.1.0"

__all__ = ["CrossLevel", "Encoder", "__version__", "load_encoder"]
