"""Crosslevel: visual features from natural, unlabelled images, by cross-level discrimination (CLD)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosslevel.cld.loss import CrossLevel
    from crosslevel.curation.curate import curate
    from crosslevel.data.pack import pack
    from crosslevel.data.subset import subset
    from crosslevel.evaluation.compare import compare
    from crosslevel.evaluation.evaluate import evaluate
    from crosslevel.evaluation.labelling.classify import classify
    from crosslevel.evaluation.push import push
    from crosslevel.exploration.explore import explore
    from crosslevel.features.embed import embed
    from crosslevel.features.load import load
    from crosslevel.inspection.inspect import inspect
    from crosslevel.models.encoder import Encoder, load_encoder
    from crosslevel.models.export import export
    from crosslevel.retrieval.search import search
    from crosslevel.training.train import train
    from crosslevel.tuning.tune import tune

__version__ = "0.1.0"

__all__ = [
    "CrossLevel", "Encoder", "__version__", "classify", "compare", "curate", "embed", "evaluate", "explore", "export",
    "inspect", "load", "load_encoder", "pack", "push", "search", "subset", "train", "tune",
]  # fmt: skip

_MODULES = {
    "CrossLevel": "crosslevel.cld.loss",
    "Encoder": "crosslevel.models.encoder",
    "classify": "crosslevel.evaluation.labelling.classify",
    "compare": "crosslevel.evaluation.compare",
    "curate": "crosslevel.curation.curate",
    "embed": "crosslevel.features.embed",
    "evaluate": "crosslevel.evaluation.evaluate",
    "explore": "crosslevel.exploration.explore",
    "export": "crosslevel.models.export",
    "inspect": "crosslevel.inspection.inspect",
    "load": "crosslevel.features.load",
    "load_encoder": "crosslevel.models.encoder",
    "pack": "crosslevel.data.pack",
    "push": "crosslevel.evaluation.push",
    "search": "crosslevel.retrieval.search",
    "subset": "crosslevel.data.subset",
    "train": "crosslevel.training.train",
    "tune": "crosslevel.tuning.tune",
}
"""Where each name is, imported when it is first used: ``import crosslevel`` waits for nothing."""


_VERBS = (
    "classify", "compare", "curate", "embed", "evaluate", "explore", "export", "inspect", "pack", "push", "search",
    "subset", "train", "tune",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'crosslevel' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    if name in _VERBS:
        value = import_module("crosslevel.settings.parts").public(value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
