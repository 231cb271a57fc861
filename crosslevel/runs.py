"""A run's folder: which one, and what is kept there beside logs and checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from pathlib import Path
from typing import Any, get_args

import yaml
from torch import nn

from crosslevel.cld.loss import CrossLevel
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.sources.containers.stream import ImageStream
from crosslevel.models.encoder import FILE
from crosslevel.models.heads import Head, rebuilt_head
from crosslevel.utils.files import write, write_tensors
from crosslevel.utils.tensors import load_safetensors

INSTANCE_FILE, CLD_FILE = "instance.safetensors", "cld.safetensors"
RUN_VARIABLE = "CROSSLEVEL_RUN"
BAD_FILES, IMAGES_FILE = "bad_files.txt", "images.json"


def claim(run: str | None, source: str, kind: str, rank: int) -> Path:
    """The folder of a new run, made: ``run``, or runs/ and a free name made of ``source``, a word, and ``kind``.

    Raises:
        ValueError: there is a run in it.

    """
    if rank > 0:
        # The other ranks are started by the first one, after it has chosen.
        return Path(os.environ[RUN_VARIABLE])
    if run is not None:
        folder = Path(run)
        if holds_a_run(folder):
            raise ValueError(f"--run {run}: it already holds a run: give another folder, or --resume {run}")
    else:
        name = f"{source}-{kind}"
        tries = [Path("runs") / (name if n == 1 else f"{name}-{n}") for n in range(1, 10_000)]
        folder = next(f for f in tries if not holds_a_run(f))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[RUN_VARIABLE] = str(folder)
    return folder


def holds_a_run(folder: Path) -> bool:
    """Whether there is something to lose; a run that ended before its first checkpoint left nothing."""
    return any((folder / "checkpoints").glob("*.ckpt")) or (folder / FILE).exists()


def next_commands(
    folder: Path, images: str, labelled: bool, data_root: str | None, crops: Crops | None = None
) -> list[str]:
    """What a user would do with a run."""
    run, source = shlex.quote(str(folder)), shlex.quote(images)
    where = "" if data_root is None else f" --data-root {shlex.quote(data_root)}"
    where += "" if crops is None else f" {crops.options()}"
    return [
        f"crosslevel embed {run} {source} -o features.parquet{where}",
        f"crosslevel evaluate {run} {source if labelled else 'LABELLED_IMAGES'} --test LABELLED_TEST_IMAGES{where}",
    ]


def keep_images(folder: Path, images: Images | ImageStream) -> None:
    """Note which images a run begins with; of a stream nobody knows."""
    if isinstance(images, Images):
        write(folder / IMAGES_FILE, json.dumps(_known(images)))


def changed_images(folder: Path, images: Images | ImageStream) -> str:
    """What is to be said where a run goes on with other images than it began with; empty where it does not."""
    if not (isinstance(images, Images) and (folder / IMAGES_FILE).is_file()):
        return ""
    before, now = json.loads((folder / IMAGES_FILE).read_text(encoding="utf-8")), _known(images)
    if before == now:
        return ""
    return (
        f"{images.name} has changed since the run began ({before['images']:,} images then, {now['images']:,} now): "
        "it goes on with those of now, not as it would have"
    )


def _known(images: Images) -> dict[str, Any]:
    digest = hashlib.sha256()
    for path in images.paths:
        digest.update(f"{path}\0".encode(errors="surrogateescape"))
    return {"images": len(images), "paths": digest.hexdigest()}


def save_branches(folder: Path, instance: nn.Sequential, head: str, cld: CrossLevel | None) -> None:
    """Keep both branches' heads beside the encoder: published figures are of the instance branch's features."""
    write_tensors(folder / INSTANCE_FILE, dict(instance.state_dict()), {"head": head})
    if cld is not None:
        write_tensors(folder / CLD_FILE, cld.state_dict())


def load_cld(folder: Path) -> CrossLevel:
    """The group branch that a run trained beside its encoder.

    Raises:
        ValueError: config.yaml and cld.safetensors do not fit.

    """
    state, _ = load_safetensors(folder / CLD_FILE)
    try:
        built = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["cld"]
        cld = CrossLevel(state["branch.0.weight"].shape[1], **built)
        cld.load_state_dict(state)
    except (yaml.YAMLError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder}/config.yaml does not say how to build {CLD_FILE}: {error}") from error
    return cld.eval()


def load_branches(folder: Path) -> dict[str, nn.Module]:
    """The heads of the branches that a run kept, by name: features (B, D) to what its losses compare."""
    found: dict[str, nn.Module] = {}
    if (folder / INSTANCE_FILE).is_file():
        state, about = load_safetensors(folder / INSTANCE_FILE)
        kind = next((head for head in get_args(Head) if head == about.get("head")), None)
        if kind is None:
            raise ValueError(f"{folder / INSTANCE_FILE} does not say which head it holds: Crosslevel did not write it")
        found["instance branch"] = rebuilt_head(kind, state)
    if (folder / CLD_FILE).is_file():
        found["group branch"] = load_cld(folder).branch
    return found


class Unreadable:
    """The list of unreadable files on disk: one a rank while the run goes on, one for all at its end."""

    def __init__(self, bad: BadFiles, folder: Path, rank: int, resume: bool) -> None:
        self.bad, self.folder = bad, folder
        self.file = folder / (BAD_FILES if rank == 0 else f"{rank}.{BAD_FILES}")
        if resume and self.file.exists():
            bad.read(self.file)

    def keep(self) -> None:
        """Write this rank's list, if it has any."""
        if len(self.bad):
            self.bad.write(self.file)

    def merge(self) -> None:
        """Take in the other ranks' lists."""
        for part in self.folder.glob(f"*.{BAD_FILES}"):
            self.bad.read(part)
            part.unlink()
        self.keep()
