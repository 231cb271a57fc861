"""Detection of collapses during the training."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rich.console import Console

from crosslevel.runs import Run
from crosslevel.training.loop.log import Log
from crosslevel.training.loop.module import Pretrain
from crosslevel.utils import files
from crosslevel.utils.console import say

FEW_DIRECTIONS = 2.0  # even the narrowest untrained networks have more than 4
ONE_GROUP = 0.9  # share of a batch's images
SETTLING = 20  # steps: if an epoch is one step, the warm-up may be too short for a network


def symptoms(figures: Mapping[str, float], batch_size: int, features: int, groups: int | None) -> dict[str, str]:
    """The kinds of collapse in the newest figures of a run's log, each with a line that says what to change.

    - ``features``: their effective rank (`metrics.spectrum`) is below `FEW_DIRECTIONS`: all images look alike.
    - ``instance branch``: the same for the features that the instance loss compares, where a collapse begins.
    - ``groups``: with 3 groups or more, one has more than the share `ONE_GROUP` of a batch (the mean of both views), or
      the group branch's features have an effective rank below `FEW_DIRECTIONS`: then the groups, of equal size, are
      only noise.

    Args:
        figures: as in metrics.csv.
        batch_size: images that are grouped together.
        features: D of the encoder.
        groups: k of CLD; None without CLD.

    """
    messages = {}
    rate = f" (now {figures['lr']:.3g})" if "lr" in figures else ""
    hint = (
        f"lower --lr{rate} or raise --warmup_epochs; for BYOL and DINO raise --method.momentum, for VICReg "
        "--method.variance; a contrastive method: lower --method.temperature"
    )
    rank, instance = figures.get("effective_rank"), figures.get("instance_rank")
    if rank is not None and rank < FEW_DIRECTIONS:
        messages["features"] = f"the features collapse: effective rank {rank:.1f} of {features}: {hint}"
    if instance is not None and instance < FEW_DIRECTIONS:
        messages["instance branch"] = (
            f"the instance branch collapses: its features have effective rank {instance:.1f}: {hint}"
        )
    if groups is not None and groups > 2 and (wrong := _ungrouped(figures, batch_size, groups)):
        agreement = f", agreement {100 * figures['group_agreement']:.0f} %" if "group_agreement" in figures else ""
        messages["groups"] = f"the groups collapse: {wrong}{agreement}: lower --cld.weight or --lr"
    return messages


def _ungrouped(figures: Mapping[str, float], batch_size: int, groups: int) -> str:
    rank, share = figures.get("group_rank"), figures.get("largest_group", 0.0) / batch_size
    if share > ONE_GROUP:
        return f"{100 * share:.0f} % of a batch in one of {groups} groups"
    if rank is not None and rank < FEW_DIRECTIONS:
        return f"the group branch's features have effective rank {rank:.1f}"
    return ""


class CollapseWatch:
    """Prints each kind of collapse once, on the console and in warnings.txt.

    The steps of the warm-up, and the first `SETTLING` steps, are not checked: features of low rank are usual there. A
    continued run keeps the warnings from before its checkpoint.
    """

    def __init__(self, log: Log, run: Run, module: Pretrain, console: Console) -> None:
        self.log, self.file, self.module, self.console = log, run.warnings, module, console
        self.reported: set[str] = set()
        if not self.file.exists():
            return
        lines = self.file.read_text(encoding="utf-8").splitlines()
        earlier = [line for line in lines if _step(line) <= module.step and module.step]
        kinds = ("features", "instance branch", "groups")
        self.reported = {kind for kind in kinds for line in earlier if f"the {kind} collapse" in line}
        files.write(self.file, "".join(f"{line}\n" for line in earlier))

    def look(self, batch: int) -> None:
        """Check the newest figures, if they are of this step; ``batch`` is the number of its images."""
        step, cld = self.module.step, self.module.cld
        if step <= max(self.module.warmup_steps, SETTLING) or self.log.recorded != step:
            return
        images = batch if cld is None or cld.last is None else len(cld.last.a.assignment)
        groups = None if cld is None or cld.last is None else len(cld.last.a.sizes)
        for kind, line in symptoms(self.log.newest, images, self.module.encoder.num_features, groups).items():
            if kind not in self.reported:
                self.reported.add(kind)
                say(self.console, f"step {step}: {line}")
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(f"step {step}: {line}\n")


def _step(line: str) -> int:
    match = re.match(r"step (\d+)", line)
    return int(match[1]) if match else 0
