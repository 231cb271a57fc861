"""The objects of `crosslevel evaluate`: an encoder, its baselines, and the labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images
from crosslevel.data.open import open_images
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.uri import Source, parse
from crosslevel.evaluation.protocols import PIXELS, Kind, Subject
from crosslevel.evaluation.results import FILE
from crosslevel.features.extract import Runtime
from crosslevel.features.source import check_channels, open_for
from crosslevel.models.copies import untrained
from crosslevel.models.encoder import Encoder
from crosslevel.models.named import is_by_name, open_encoder, run_dir_of, title_of
from crosslevel.runs import Run, load_branches
from crosslevel.utils.console import printer, say
from crosslevel.utils.errors import SourceError, UserError, hidden

START = "start (frozen)"
"""The row of the weights that a training began with."""


@dataclass(frozen=True)
class Data:
    """The sources of images: to learn from, and to classify."""

    images: Source
    test: Source | None
    data_root: str | None
    crops: Crops | None

    def metadata(self, seed: int) -> dict[str, Any]:
        """The settings that are recorded with every figure."""
        metadata: dict[str, Any] = {
            "images": _absolute(self.images),
            "test": _absolute(self.test),
            "data_root": self.data_root,
        }
        return {**metadata, "seed": seed} | ({} if self.crops is None else {"crops": asdict(self.crops)})


@dataclass(frozen=True)
class Session:
    """The encoder to evaluate, its runtime, and the folders for results.

    ``title`` names the encoder's row, ``baselines`` are further encoders by the titles of their rows, ``folder`` is the
    run's folder, ``cache_dir`` the folder of cached features, if they are cached.
    """

    encoder: Encoder
    title: str
    baselines: dict[str, Encoder]
    folder: Path | None
    file: Path
    cache_dir: Path | None
    runtime: Runtime
    seed: int
    console: Console
    bad_files: BadFiles = field(default_factory=BadFiles)


def session_of(
    run: str, beside: Sequence[str], output: str | None, cache: bool, runtime: Runtime, seed: int, quiet: bool
) -> Session:
    """Load the encoder and its baselines, and print their licences."""
    folder = run_dir_of(run)
    console, encoder = printer(quiet), open_encoder(run)
    baselines = {title_of(name): open_encoder(name) for name in beside}
    for loaded in dict.fromkeys(each.loaded for each in (encoder, *baselines.values())):
        say(console, loaded)
    file = Path(output) if output else (folder or Path()) / FILE
    title = title_of(run) if is_by_name(run) else "trained encoder"
    start = None if folder is None else start_of(Run(folder), encoder, console)
    start_row = {} if start is None else {START: start}
    cache_dir = folder if cache else None
    return Session(encoder, title, {**start_row, **baselines}, folder, file, cache_dir, runtime, seed, console)


def start_of(run: Run, encoder: Encoder, console: Console) -> Encoder | None:
    """An encoder with the weights that a run began with; None if it began with random ones."""
    if not run.config.is_file():
        return None
    settings = run.settings().get("encoder")
    if not isinstance(settings, dict) or not (settings.get("pretrained") or settings.get("weights")):
        return None
    try:
        start = Encoder(**{**settings, "train": "all"})
    except (UserError, TypeError, OSError) as error:
        say(console, f"without the row {START}: {error}")
        return None
    start.view, start.reads = encoder.view, encoder.reads
    return start.eval()


def subject_of(
    session: Session, data: Data, names: Sequence[str], branches: bool, shots: tuple[int, int] | None
) -> Subject | None:
    """The features to evaluate on labelled images; None if only detectors are trained."""
    if set(names) == {"detection"}:
        return None
    assert data.test is not None
    for title, baseline in session.baselines.items():
        check_channels(session.encoder, baseline.view.channels, title)
    bank, queries = labelled_pair(data.images, data.test, data.data_root, data.crops, session.encoder)
    kinds: dict[str, Kind] = {
        "raw pixels": PIXELS,
        "untrained encoder": untrained(session.encoder, session.seed),
        **session.baselines,
        session.title: session.encoder,
    }
    for part in (bank, queries):
        session.bad_files.leave_out(part.left_out)
    heads = load_branches(session.folder) if branches and session.folder is not None else {}
    return Subject(
        kinds, bank, queries, session.runtime, session.bad_files, session.cache_dir, heads, session.console, shots,
        session.seed,
    )  # fmt: skip


def labelled_pair(
    images: str | Source,
    test: str | Source,
    data_root: str | None = None,
    crops: Crops | None = None,
    encoder: Encoder | None = None,
) -> tuple[Images, Images]:
    """Open both sources, read in the same way as the encoder's training images.

    Raises:
        SourceError: one has no labels, or the test images have classes that the others lack.
    """
    images, test = parse(images), parse(test)
    bank, queries = (_labelled(source, data_root, crops, encoder) for source in (images, test))
    unknown = sorted(set(queries.classes or []) - set(bank.classes or []))
    if unknown:
        class_names = ", ".join(unknown[:5]) + (" and more" if len(unknown) > 5 else "")
        raise SourceError(f"{test.text} has classes that {images.text} lacks: {class_names}")
    return bank, queries


def _labelled(source: Source, data_root: str | None, crops: Crops | None, encoder: Encoder | None) -> Images:
    if encoder is None:
        images = open_images(source, data_root=data_root, crops=crops)
    else:
        images = open_for(encoder, source, data_root, crops)
    if images.labels is None:
        raise SourceError(f"{source.text} has no labels: put each class into a folder of its own to evaluate on it")
    return images


def _absolute(source: Source | None) -> str | None:
    """A source with absolute paths, and without secrets in addresses."""
    return None if source is None else hidden(source.absolute().text)
