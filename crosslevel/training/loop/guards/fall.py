"""Stops a training of pretrained weights when they become worse."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from rich.console import Console
from torch import Tensor

from crosslevel.models.encoder import Encoder
from crosslevel.runs import Run
from crosslevel.training.loop.module import Pretrain
from crosslevel.utils.console import say
from crosslevel.utils.errors import UserError
from crosslevel.utils.files import BEST_ENCODER, write_tensors
from crosslevel.utils.tensors import load_safetensors

MARGINS = {"knn": 5.0, "combined": 0.05}
"""How far each figure may fall below the start, in its own unit: twice the random variation of kNN with 1,000
queries."""

ROUNDING = 1e-9  # two queries of 40 are 5 points, and not more, whatever the last digits

TEXT = {"knn": "kNN {:.1f} %", "combined": "score {:.3f}"}


class FallGuard:
    """Compares the monitor's figure with that of the starting weights.

    It keeps the encoder with the best figure so far, including the start. When a figure is below the start's by more
    than its margin, the training ends, and the best encoder is its result.

    ``encoder`` is the unsharded one, which a sharded training has in addition.

    Attributes:
        start: the figure of the start, by its name; empty before `begin`.
        fallen: whether the training must end.

    """

    def __init__(self, run: Run, module: Pretrain, console: Console, encoder: Encoder) -> None:
        self.encoder = encoder
        self.run, self.module, self.console = run, module, console
        self.file = run.checkpoints / BEST_ENCODER
        self.start: dict[str, float] = {}
        self.best, self.fallen = (float("-inf"), 0), False
        if module.step and self.file.is_file():
            try:
                _, metadata = load_safetensors(self.file)
                self.start = {metadata["figure"]: float(metadata["start"])}
                self.best = float(metadata["best"]), int(metadata["step"])
            except (UserError, KeyError, ValueError) as error:
                say(console, f"{self.file}: {error}: whether the features fall is not watched from here on")

    def begin(self, figures: Mapping[str, float]) -> None:
        """Record the figure of the encoder before the first step: the run ends if it falls clearly below."""
        name = next((name for name in MARGINS if name in figures), None)
        if name is None:
            return
        self.start = {name: figures[name]}
        say(self.console, f"start: {TEXT[name].format(figures[name])}; the training ends if it falls clearly below")
        self._keep(figures[name])

    def look(self, figures: Mapping[str, float]) -> bool:
        """Check whether the features have fallen; otherwise store the encoder if it is the best."""
        name = next(iter(self.start), None)
        if name is None or name not in figures:
            return False
        now, start = figures[name], self.start[name]
        if now > self.best[0]:
            self._keep(now)
        self.fallen = start - now > MARGINS[name] + ROUNDING
        if self.fallen:
            then, (best, step) = TEXT[name].format(start), self.best
            line = (
                f"step {self.module.step}: the features fall: {TEXT[name].format(now)}, {then} at the start: stopped, "
                f"and the encoder of step {step} is left ({TEXT[name].format(best)}): lower --lr or --encoder_rate, "
                "or train less of it (--encoder.train last:4, norm or lora); --stop_fall false trains to the end"
            )
            say(self.console, line)
            with self.run.warnings.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        return self.fallen

    def restore(self) -> None:
        """Restore the encoder with the best figure."""
        if self.fallen:
            self.encoder.backbone.load_state_dict(load_safetensors(self.file)[0])

    @torch.no_grad()
    def _keep(self, figure: float) -> None:
        self.best = figure, self.module.step
        state: dict[str, Tensor] = {
            name: value.detach().cpu().contiguous() for name, value in self.encoder.backbone.state_dict().items()
        }
        (name, start), *_ = self.start.items()
        metadata = {"figure": name, "start": repr(start), "best": repr(figure), "step": str(self.module.step)}
        self.run.checkpoints.mkdir(parents=True, exist_ok=True)
        write_tensors(self.file, state, metadata)
