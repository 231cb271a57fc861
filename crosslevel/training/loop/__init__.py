"""The loop around the training step: steps, log, checkpoints, and the watch for collapses."""

import importlib
import sys

# lightning_fabric asks for torchmetrics' version by importing all of it, for over a second, and needs it nowhere here.
if "lightning_fabric" not in sys.modules and "torchmetrics" not in sys.modules:
    sys.modules["torchmetrics"] = None  # type: ignore[assignment]  # as Python marks what cannot be imported
    try:
        importlib.import_module("lightning_fabric")
    finally:
        del sys.modules["torchmetrics"]
