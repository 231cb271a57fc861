"""``crosslevel.load``: a run's encoder with its view, for images in any form."""

from __future__ import annotations


def load(run: str) -> None:
    """Not yet."""
