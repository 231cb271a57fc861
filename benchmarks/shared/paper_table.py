"""The paper's table for CIFAR-10: its figures, variants that may explain a shortfall, and the page of results."""

from __future__ import annotations

from typing import Any

PUBLISHED = {"npid": 80.8, "npid-cld": 86.7, "moco": 82.1, "moco-cld": 87.5}
"""Wang, Liu, Yu 2021, on the official files; the best epoch by test accuracy."""

VARIANTS = {
    "torch-init": "--encoder.init=torch",
    "fp32": "--precision=fp32",
    "per-view": "--method.per_view=true",
    "splits": "--method.splits=2",
}
"""What a cell may be trained with besides, by the name that follows its own and a plus sign."""

BRANCHES = ("instance", "group", "shared")


def markdown(cells: dict[str, dict[str, Any]], always: list[str]) -> str:
    """The newest figures of every cell as a table, and the instance branch's way there as another.

    Those of ``always`` have a row even if they were not run. ``short by``: how far a whole cell is below the published
    figure.
    """
    lines = [
        "Weighted kNN (k = 200) of CIFAR-10's test images, top-1 in %, at the last epoch measured (the published "
        "figures are their best epoch's by test accuracy, on the official files).",
        "",
        "| cell | published | epochs | instance | short by | group | shared | images/s | where, when |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in [*always, *(name for name in cells if name not in always)]:
        one, published = cells.get(name), PUBLISHED.get(name.partition("+")[0])
        head = f"| {name} | {'-' if published is None else published}"
        if one is None or not one["figures"]:
            lines.append(f"{head} | not run | - | - | - | - | - | - |")
            continue
        newest = one["figures"][max(one["figures"], key=int)]
        is_comparable = published is not None and one["epochs_done"] == one["epochs"]
        short = f"{published - newest['instance']:.1f}" if is_comparable else "-"
        instance, *rest = (f"{newest[branch]:.1f}" if branch in newest else "-" for branch in BRANCHES)
        texts = " | ".join([instance, short, *rest])
        rate = "-" if one["images_per_second"] is None else f"{one['images_per_second']:,.0f}"
        lines.append(
            f"{head} | {one['epochs_done']} of {one['epochs']} | {texts} | {rate} | "
            f"{one['card']}, {one['precision']}, {one['date']} |"
        )
    return "\n".join([*lines, *curves(cells)]) + "\n"


def curves(cells: dict[str, dict[str, Any]]) -> list[str]:
    """The published figure, by epoch; empty before there are any."""
    measured = {name: one["figures"] for name, one in cells.items() if one["figures"]}
    epochs = sorted({int(epoch) for figures in measured.values() for epoch in figures})
    if not epochs:
        return []
    rows = [
        f"| {name} | " + " | ".join(f"{f[str(e)]['instance']:.1f}" if str(e) in f else "-" for e in epochs) + " |"
        for name, f in measured.items()
    ]
    head = ["", "The instance branch's accuracy by epoch:", "", f"| epoch | {' | '.join(map(str, epochs))} |"]
    return [*head, "|---|" + "---|" * len(epochs), *rows]
