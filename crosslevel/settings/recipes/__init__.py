"""Recipes: one YAML file for each method and data set, with the published figure to reach where one is recorded."""

from __future__ import annotations

import shutil
import textwrap
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from crosslevel.utils.errors import UserError, did_you_mean

DATA_SETS = (
    "cifar10", "cifar100", "cifar10lt", "cifar100lt", "kitchen", "stl10", "imagenet100", "imagenetlt", "imagenet",
    "films",
)  # fmt: skip


class Recipe(NamedTuple):
    """The header of a recipe's file.

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
    read = [_read(file) for file in folder.glob("*/*.yaml")]
    return sorted(read, key=lambda recipe: (DATA_SETS.index(recipe.name.split("-", 1)[0]), recipe.name))


def find(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UserError: there is no such recipe; the message has the nearest name.

    """
    by_name = {recipe.name: recipe for recipe in every()}
    if name not in by_name:
        raise UserError(f"recipe={name!r} is unknown: {did_you_mean(name, by_name, 'crosslevel recipes lists them')}")
    return by_name[name]


def recipes(show: str | None = None) -> None:
    """List the recipes, each with the published figure to reach where one is recorded, or print one.

    Args:
        show: name of a recipe to print, in place of the list.
    """
    if show is not None:
        print(find(show).file.read_text(encoding="utf-8"), end="")
        return
    listed = every()
    column = max(len(recipe.name) for recipe in listed) + 2
    width, indent, section = max(60, shutil.get_terminal_size().columns), " " * column, ""
    for recipe in listed:
        data = recipe.name.split("-", 1)[0]
        if section and data != section:
            print()
        section = data
        text = f"{recipe.name:<{column}}{recipe.title}: {recipe.published}"
        print(textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False))
    with_figure = sum(recipe.published[0].isdigit() for recipe in listed)
    print(f"\n{with_figure} of {len(listed)} recipes have a published figure that is recorded.")
    print("next: crosslevel recipes --show NAME prints one, crosslevel train IMAGES --recipe NAME takes it;")
    print("any value can be overridden after it")


def _read(file: Path) -> Recipe:
    title, *lines = [line[2:] for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    head = dict(line.split(": ", 1) for line in lines if ": " in line)
    return Recipe(file.stem, file, title, head["Published"], head["Settings"])
