"""Recipes: one YAML file for each published row, and what each is meant to reach."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from crosslevel.utils.errors import UserError, did_you_mean

DATA_SETS = (
    "cifar10", "cifar100", "cifar10lt", "cifar100lt", "kitchen", "stl10", "imagenet100", "imagenetlt", "imagenet",
    "films",
)  # fmt: skip


class Recipe(NamedTuple):
    """What the head of a recipe's file says.

    ``title``: method, data set and network; ``published``: the figure to reach and how it is measured, or that none is
    recorded; ``settings``: where the settings come from.
    """

    name: str
    file: Path
    title: str
    published: str
    settings: str


def every() -> list[Recipe]:
    """All recipes, by data set and name."""
    folder = Path(str(files(__package__)))
    found = [_read(file) for file in folder.glob("*.yaml")]
    return sorted(found, key=lambda recipe: (DATA_SETS.index(recipe.name.split("-", 1)[0]), recipe.name))


def find(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UserError: there is none; the message has the nearest name.

    """
    known = {recipe.name: recipe for recipe in every()}
    if name not in known:
        raise UserError(f"recipe={name!r} is unknown: {did_you_mean(name, known, 'crosslevel recipes lists them')}")
    return known[name]


def recipes(show: str | None = None) -> None:
    """List the recipes with the published figure that each one is meant to reach, or print one.

    Args:
        show: name of a recipe whose file is printed, in place of the list.
    """
    from rich.table import Table  # noqa: PLC0415

    from crosslevel.utils.console import printer  # noqa: PLC0415

    console = printer()
    if show is not None:
        console.print(find(show).file.read_text(encoding="utf-8"), end="", highlight=False, markup=False)
        return
    table = Table(title="crosslevel train --recipe NAME")
    for heading in ("name", "what", "published"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "name")
    section = ""
    for recipe in every():
        data = recipe.name.split("-", 1)[0]
        if section and data != section:
            table.add_section()
        section = data
        table.add_row(recipe.name, recipe.title, recipe.published)
    console.print(table, soft_wrap=False)
    console.print("crosslevel recipes --show NAME prints one; any value can be overridden after it", highlight=False)


def _read(file: Path) -> Recipe:
    title, *lines = [line[2:] for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    head = dict(line.split(": ", 1) for line in lines if ": " in line)
    return Recipe(file.stem, file, title, head["Published"], head["Settings"])
