"""Local copies of runs in object stores, while a verb works with them."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from crosslevel.data.uri import is_remote
from crosslevel.utils.errors import UserError

_ITSELF = {("train", "run"), ("train", "resume"), ("pack", "output")}  # verbs that handle addresses themselves
_HERE = ("output", "run", "resume")  # options that name an output, or a run


@contextmanager
def at_hand(verb: str, settings: MutableMapping[str, Any]) -> Iterator[None]:
    """While the block runs, ``settings`` names a local folder in place of a run's address.

    Checkpoints are not copied. Files that the verb adds to the run are sent to the address when the block ends.

    Raises:
        UserError: another output is an address.
        SourceError: the run cannot be read.

    """
    stored = None
    for name in _HERE:
        value = settings.get(name)
        if not isinstance(value, str) or not is_remote(value) or (verb, name) in _ITSELF:
            continue
        if name != "run" or verb in ("tune", "demo"):
            raise UserError(
                f"{name} {value}: what {verb} writes is to lie on this machine: give a folder, and copy it to the "
                "store when it is done"
            )
        from crosslevel.data.sources.containers.folders import StoredFolder  # noqa: PLC0415
        from crosslevel.utils.files import CHECKPOINTS, TENSORBOARD  # noqa: PLC0415

        stored = StoredFolder(value, "read")
        stored.fetch(lambda file: not file.startswith((f"{CHECKPOINTS}/", f"{TENSORBOARD}/")))
        settings[name] = str(stored.folder)
    yield
    if stored is not None:
        stored.send()
