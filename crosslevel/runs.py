"""A run's folder: the names and contents of all its files are defined here."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from crosslevel.cld.loss import CrossLevel
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.sources.containers.folders import StoredFolder
from crosslevel.data.sources.containers.remote import exists
from crosslevel.data.sources.containers.stream import ImageStream
from crosslevel.data.uri import is_remote
from crosslevel.models.encoder import Encoder, load_encoder
from crosslevel.models.heads import load_head, stacked
from crosslevel.utils import files
from crosslevel.utils.errors import UserError
from crosslevel.utils.locks import folder_lock, holder
from crosslevel.utils.processes import (
    World,
    attempt,
    by_torchrun,
    launched,
    local_rank,
    torchrun_call,
    warn_of_restarts,
)  # fmt: skip
from crosslevel.utils.tensors import load_safetensors
from crosslevel.utils.trees import json_tree, regular, yaml_tree

RUN_VARIABLE = "CROSSLEVEL_RUN"


class Run:
    """The files of one run.

    Attributes:
        path: the folder.
        config: the whole tree of settings.
        metrics: one row a logged step.
        checkpoints: folder of ``last``, from which a run continues, ``previous``, the one before, and ``best``, that of
            the epoch with the lowest loss.
        encoder: the network; ``instance`` and ``cld`` are the branches' heads.
        images: which images the run began with; ``subset`` lists them where they are a part of a source.
        bad_files: the unreadable files, and the reasons.
        warnings: the warnings of the training.
        report: the page.
        launch: the call of torchrun that trains it, if one does.
        stored: the folder of the object store that this one mirrors, if any; its address is then the run's name.

    """

    def __init__(self, path: str | os.PathLike[str], stored: StoredFolder | None = None) -> None:
        self.path, self.stored = Path(path), stored
        self.config, self.metrics = self.path / files.CONFIG, self.path / files.METRICS
        self.tensorboard = self.path / files.TENSORBOARD
        self.checkpoints = self.path / files.CHECKPOINTS
        self.last, self.previous, self.best = (
            self.checkpoints / name for name in (files.LAST, files.PREVIOUS, files.BEST)
        )
        self.encoder = self.path / files.ENCODER
        self.instance, self.cld = self.path / files.INSTANCE, self.path / files.GROUP
        self.images, self.subset = self.path / files.IMAGES, self.path / files.SUBSET
        self.bad_files, self.warnings = self.path / files.BAD_FILES, self.path / files.WARNINGS
        self.report, self.launch = self.path / files.REPORT, self.path / files.LAUNCH

    def __str__(self) -> str:
        return str(self.path) if self.stored is None else self.stored.address

    def display_path(self, file: Path) -> str:
        """The path or address of one of the run's files."""
        return str(file) if self.stored is None else f"{self}/{file.relative_to(self.path).as_posix()}"

    def send(self) -> None:
        """Copy the local files to the object store, if the run lies in one.

        Raises:
            MachineError: the store refuses them; the local files stay.

        """
        if self.stored is not None:
            self.stored.send()

    def holds_something(self) -> bool:
        """Whether the folder holds a run worth keeping; one that ended before its first checkpoint is not."""
        return any(self.checkpoints.glob("*.ckpt")) or self.encoder.exists()

    def settings(self) -> dict[str, Any]:
        """The settings in config.yaml, as a tree.

        Raises:
            UserError: there is no such file, or it is no tree.

        """
        try:
            tree = yaml_tree(regular(self.config).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{self.config} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(tree, dict):
            raise UserError(f"{self.config} holds no settings")
        return tree

    def sweep(self) -> None:
        """Remove the unfinished files of killed writers."""
        for folder in (self.path, self.checkpoints):
            files.sweep(folder)
        # Former versions used this name.
        self.last.with_suffix(".tmp").unlink(missing_ok=True)

    def keep_images(self, images: Images | ImageStream) -> None:
        """Record the images that the run begins with; those of a stream are unknown."""
        if isinstance(images, Images):
            files.write(self.images, json.dumps(_image_state(images)))

    def changed_images(self, images: Images | ImageStream) -> str:
        """How the images differ from those that the run began with; empty if they do not."""
        if not (isinstance(images, Images) and self.images.is_file()):
            return ""
        now = _image_state(images)
        try:
            before = json_tree(self.images.read_text(encoding="utf-8"))
            then = f"{before['images']:,}"
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.images} is damaged: which images the run began with is not known; if they are these, delete "
                "it, then --resume again"
            ) from error
        if before == now:
            return ""
        return f"{images.name} has changed since the run began ({then} images then, {now['images']:,} now)"

    def save_branches(self, instance: nn.Sequential, head: str, cld: CrossLevel | None) -> None:
        """Keep both branches' heads beside the encoder: published figures are of the instance branch's features."""
        files.write_tensors(self.instance, dict(instance.state_dict()), {"head": head})
        if cld is not None:
            files.write_tensors(self.cld, cld.state_dict())

    def load_encoder(self) -> Encoder:
        """The trained encoder, in evaluation mode; errors as in `load_encoder`."""
        return load_encoder(self.path)

    def load_cld(self) -> CrossLevel:
        """The group branch that the run trained beside its encoder.

        Raises:
            UserError: config.yaml and cld.safetensors do not fit.

        """
        state, _ = load_safetensors(self.cld)
        try:
            built = self.settings()["cld"]
            if isinstance(built, dict) and built.get("on") == "instance":
                instance = load_head(self.instance)
                cld = CrossLevel(len(next(instance[-1].parameters())), **built)
                cld.branch = stacked(instance, cld.branch)
            else:
                cld = CrossLevel(state["branch.0.weight"].shape[1], **built)
            cld.load_state_dict(state)
        except (UserError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"{self.config} does not say how to build {self.cld.name}: {error}") from error
        return cld.eval()

    def load_branches(self) -> dict[str, nn.Module]:
        """The stored heads of the run's branches, by name: features (B, D) to those that the losses compare."""
        branches: dict[str, nn.Module] = {}
        if self.instance.is_file():
            branches["instance branch"] = load_head(self.instance)
        if self.cld.is_file():
            branches["group branch"] = self.load_cld().branch
        return branches

    def next_commands(
        self, images: str, labelled: bool, data_root: str | None, crops: Crops | None = None
    ) -> list[str]:
        """Commands to continue with the run."""
        run, source = shlex.quote(str(self)), shlex.quote(images)
        options = "" if data_root is None else f" --data-root {shlex.quote(data_root)}"
        options += "" if crops is None else f" {crops.options()}"
        tested = source if labelled else "LABELLED_IMAGES"
        return [
            f"crosslevel embed {run} {source} -o features.parquet{options}",
            f"crosslevel evaluate {run} {tested} --test LABELLED_TEST_IMAGES{options}",
        ]


@contextmanager
def claimed(run: str | None, name: str, resume: str | None, rank: int) -> Iterator[Run]:
    """While the block runs, only this process writes to the run's folder.

    Args:
        run: the folder of a new run; below runs/ unless given.
        name: of the new folder; if it is taken, a number is appended.
        resume: the folder of a run to continue instead.
        rank: of this process; the first one locks the folder for all.

    Raises:
        FolderInUse: another process writes to it.
        UserError: there is a run in it already.

    """
    stored = _stored(resume or run)
    if rank > 0:
        # The first rank chooses the folder, then starts the others of its machine; otherwise the run is named by the
        # user.
        if stored is not None and resume is not None and local_rank() == 0:
            stored.fetch()
        yield Run(resume or run or os.environ[RUN_VARIABLE]) if stored is None else Run(stored.folder, stored)
        return
    if stored is not None:
        claimed_run = Run(stored.folder, stored)
    else:
        claimed_run = Run(resume) if resume is not None else Run(run) if run is not None else _free(name)
    if resume is None:
        _refuse_used(claimed_run)
    with folder_lock(claimed_run.path, "crosslevel train"):
        if stored is not None and resume is not None:
            stored.fetch()
        elif stored is not None:
            stored.clear()
        if resume is None:
            _refuse_used(claimed_run)  # by the former holder of the lock
        os.environ[RUN_VARIABLE] = str(claimed_run)
        if call := torchrun_call():
            files.write(claimed_run.launch, call.name)
        yield claimed_run
        claimed_run.send()


def _stored(run: str | None) -> StoredFolder | None:
    """A run's folder in an object store; each of several commands on one machine has its own local files."""
    return None if run is None or not is_remote(run) else StoredFolder(run, os.environ.get("NODE_RANK", ""))


def restarted(run: str | None, resume: str | None, world: World) -> str | None:
    """The run to resume: ``resume``, or after a restart by a launcher the run that the same command has begun.

    Each agent of torchrun counts its own restarts, and a new agent on a machine begins at 0. So the run's folder
    records the call of torchrun that began it.

    Raises:
        UserError: another program starts the processes, perhaps on several machines, and the run's folder is not given.

    """
    elsewhere = by_torchrun() or launched() or world.nodes > 1
    if elsewhere and run is None and resume is None:
        raise UserError("several commands train one run: give it a name that all of them know: --run runs/NAME")
    if world.nodes > 1:
        warn_of_restarts()
    address = resume or run or ""
    if by_torchrun() and is_remote(address):
        raise UserError(f"{address}: torchrun's processes share a folder: leave it out, and give --devices and --nodes")
    if resume is None and run is not None and _goes_on(run):
        return run
    return resume


def _goes_on(run: str) -> bool:
    """Whether this start of a training's processes continues the run of a former start."""
    call = torchrun_call()
    if call is not None and not (call.is_users_own or attempt() > 0):
        return False
    return has_checkpoint(run) and (attempt() > 0 if call is None else _launched_by(Run(run)) == call.name)


def _launched_by(run: Run) -> str:
    return regular(run.launch).read_text(encoding="utf-8", errors="replace") if run.launch.is_file() else ""


def has_checkpoint(run: str) -> bool:
    """Whether a run can be continued."""
    return exists(f"{run.rstrip('/')}/checkpoints/last.ckpt") if is_remote(run) else Run(run).last.exists()


def load_cld(folder: str | os.PathLike[str]) -> CrossLevel:
    """`Run.load_cld` for a folder."""
    return Run(folder).load_cld()


def load_branches(folder: str | os.PathLike[str]) -> dict[str, nn.Module]:
    """`Run.load_branches` for a folder."""
    return Run(folder).load_branches()


def _refuse_used(run: Run) -> None:
    is_used = run.holds_something() if run.stored is None else any(map(_lost, run.stored.listed()))
    if is_used:
        raise UserError(f"--run {run}: it already holds a run: give another folder, or --resume {run}")


def _lost(name: str) -> bool:
    """Whether another run in this file's folder would overwrite something of value."""
    return name.endswith(".ckpt") or name == files.ENCODER


def _free(name: str) -> Run:
    tries = (Run(Path("runs") / (name if n == 1 else f"{name}-{n}")) for n in range(1, 10_000))
    return next(run for run in tries if not run.holds_something() and holder(run.path) is None)


def _image_state(images: Images) -> dict[str, Any]:
    digest = hashlib.sha256()
    for path in images.paths:
        digest.update(f"{path}\0".encode(errors="surrogateescape"))
    return {"images": len(images), "paths": digest.hexdigest()}


class Unreadable:
    """The list of unreadable files on disk: one for each rank during the run, one for all at its end."""

    def __init__(self, bad_files: BadFiles, folder: Path, rank: int, resume: bool) -> None:
        self.bad_files, self.folder = bad_files, folder
        self.file = folder / (files.BAD_FILES if rank == 0 else f"{rank}.{files.BAD_FILES}")
        if resume and self.file.exists():
            bad_files.read(self.file)

    def keep(self) -> None:
        """Write this rank's list, if it has any."""
        if len(self.bad_files):
            self.bad_files.write(self.file)

    def merge(self) -> None:
        """Add the other ranks' lists."""
        for part in self.folder.glob(f"*.{files.BAD_FILES}"):
            self.bad_files.read(part)
            part.unlink()
        self.keep()
