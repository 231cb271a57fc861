"""Weights by name: from timm, the Hugging Face hub, or local files in the same form.

Weights are read from safetensors only; a repository that has only pickles is refused. timm itself adapts them to the
network: names of other programs, position embeddings of another size, an unused classifier.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import yaml
from torch import nn

from crosslevel.models.build import create
from crosslevel.utils.errors import NotThere, UserError, did_you_mean
from crosslevel.utils.tensors import load_safetensors

HUB = ("hf-hub:", "hf:")
FOLDER = "local-dir:"
TIMM = "timm:"
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
NAMES_OF_WEIGHTS = (WEIGHTS, "open_clip_model.safetensors")
ARGUMENTS = (
    "img_size", "patch_size", "in_chans", "drop_path_rate", "drop_rate", "global_pool", "fc_norm", "class_token",
    "reg_tokens", "no_embed_class", "pos_embed", "init_values", "qkv_bias", "qk_norm", "pre_norm", "final_norm",
    "embed_dim", "embed_dims", "depth", "depths", "dims", "num_heads", "mlp_ratio", "ls_init_value", "kernel_sizes",
    "window_size", "dynamic_img_size", "dynamic_img_pad", "act_layer", "norm_layer", "stem_width", "stem_type",
    "base_width", "cardinality", "output_stride", "layers", "channels",
)  # fmt: skip
"""The arguments that a file may set to build a network: timm's sizes and names, nothing that is imported."""


class Start(NamedTuple):
    """Weights to start from, and their network.

    ``architecture`` is the network's name in timm, ``arguments`` its further arguments, ``config`` timm's metadata of
    the weights, ``licence`` their licence (empty if unknown), ``source`` their origin.
    """

    architecture: str
    arguments: dict[str, Any]
    file: Path
    config: dict[str, Any]
    licence: str
    source: str


def is_named(name: str) -> bool:
    """Whether ``name`` says where weights are, and thus requests them."""
    return name.startswith((*HUB, FOLDER, TIMM))


def find(name: str, file: str | None = None) -> Start:
    """The weights that ``name`` stands for, on this machine: fetched once, and kept in the hub's own cache.

    Args:
        name: a timm model such as ``vit_small_patch14_dinov2.lvd142m`` (with ``timm:`` or without),
            ``hf-hub:owner/name`` (a revision after ``@``), or ``local-dir:FOLDER`` with such a repository's files.
        file: a .safetensors file of a timm model's weights, in place of those that timm names.

    Raises:
        UserError: the name is unknown, it has no weights as safetensors, or there is no network; the message says what
            to do.

    """
    hub = next((prefix for prefix in HUB if name.startswith(prefix)), None)
    if hub is not None:
        return _of_repository(name.removeprefix(hub), name)
    if name.startswith(FOLDER):
        return _of_folder(Path(name.removeprefix(FOLDER)), name, "")
    return _of_timm(name.removeprefix(TIMM), file)


def files_of(name: str) -> Callable[[str], Path | None]:
    """Return a function that fetches a file of the repository or folder ``name``; None for a missing file.

    Raises:
        UserError: the name is unknown.

    """
    name = name.partition(",")[0]
    hub = next((prefix for prefix in HUB if name.startswith(prefix)), None)
    if hub is not None:
        return partial(fetched, name.removeprefix(hub), name=name)
    if name.startswith(TIMM):
        config: Any = timm.get_pretrained_cfg(known_model(name))
        return partial(fetched, str(config.hf_hub_id or ""), name=name)
    folder = Path(name.removeprefix(FOLDER))
    return lambda file: folder / file if (folder / file).is_file() else None


def known_model(name: str) -> str:
    """A timm model's name, without ``timm:``.

    Raises:
        UserError: timm has no such model.

    """
    name = name.removeprefix(TIMM)
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models(), "timm.list_models() has them all", most=3)
        raise UserError(f"encoder.name={name!r} is not a timm model: {hint}")
    return name


def build(start: Start, options: Mapping[str, Any]) -> tuple[nn.Module, str]:
    """The network with its weights, and in one line what was loaded.

    Args:
        start: the weights.
        options: further arguments of timm's model, such as ``img_size``.

    Raises:
        UserError: the file is damaged, or its weights are not those of the network.

    """
    state, _ = load_safetensors(start.file)
    config = {**start.config, "file": None, "url": None, "hf_hub_id": None, "source": None, "custom_load": False}
    with _captured() as warnings:
        try:
            weights = {**config, "state_dict": state}
            model = create(start.architecture, {**start.arguments, **options}, pretrained=True, pretrained_cfg=weights)
        except UserError:
            raise
        except (RuntimeError, KeyError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{start.source}: its weights are not those of {start.architecture}: {reason}") from error
    missing = _listed(warnings, "Missing keys")
    if missing:
        raise UserError(f"{start.source}: its weights are not all of {start.architecture}'s: {missing} is missing")
    described: Any = model
    described.pretrained_cfg = described.default_cfg = {k: v for k, v in config.items() if k != "state_dict"}
    unused = _listed(warnings, "Unexpected keys")
    facts = [f"{len(model.state_dict())} tensors from {start.source}", f"licence {start.licence or 'not stated'}"]
    return model, "; ".join([*facts, *([f"not used: {unused}"] if unused else [])])


def checked(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check a file's arguments for building a network.

    Raises:
        UserError: a name that is no argument of timm's models, or a value that is no number, word or list of them.

    """
    copied = dict(arguments or {})
    for name, value in copied.items():
        items = value if isinstance(value, list | tuple) else [value]
        plain = all(item is None or isinstance(item, str | int | float | list | tuple) for item in items)
        if name not in ARGUMENTS or not plain:
            raise UserError(f"encoder.arguments: {name}={value!r} is no argument that a network can be built with here")
    return copied


def _of_timm(name: str, file: str | None) -> Start:
    known_model(name)
    try:
        config: Any = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    except RuntimeError as error:
        architecture = name.partition(".")[0]
        available = ", ".join(timm.list_pretrained(f"{architecture}.*")) or "none"
        raise UserError(
            f"encoder.name={name!r}: timm has no such weights of {architecture}: there are {available}"
        ) from error
    pretrained_cfg = config.to_dict()
    if file is not None:
        if not Path(file).is_file() or Path(file).suffix != ".safetensors":
            raise NotThere(f"encoder.pretrained={file}: give true, or a .safetensors file that is there")
        return Start(name, {}, Path(file), pretrained_cfg, "", file)
    if not config.hf_hub_id:
        raise UserError(f"encoder.name={name!r}: timm names no weights of it on the hub: give encoder.weights FILE")
    repository = str(config.hf_hub_id)
    filename = config.hf_hub_filename
    names = (Path(filename).with_suffix(".safetensors").name, filename) if filename else NAMES_OF_WEIGHTS
    weights = _weights(repository, tuple(dict.fromkeys(n for n in names if n.endswith(".safetensors"))), name)
    return Start(name, {}, weights, pretrained_cfg, config.license or "", f"{repository} on the hub")


def _of_repository(repository: str, name: str) -> Start:
    config = fetched(repository, CONFIG, name)
    if config is None:
        raise UserError(f"{name}: the repository has no {CONFIG} of timm's, which says what network it holds")
    weights = _weights(repository, NAMES_OF_WEIGHTS, name)
    card = fetched(repository, CARD, name)
    start = _of_folder(config.parent, name, "" if card is None else _licence(card))
    return start._replace(file=weights, source=f"{repository} on the hub")


def _of_folder(folder: Path, name: str, licence: str) -> Start:
    """Weights in a folder with the files of such a repository; its settings are checked."""
    file = folder / CONFIG
    weights = next((candidate for one in NAMES_OF_WEIGHTS if (candidate := folder / one).is_file()), folder / WEIGHTS)
    if not file.is_file():
        raise NotThere(f"{name}: there is no {file}")
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        architecture, pretrained_cfg = str(read["architecture"]), dict(read.get("pretrained_cfg") or read)
        model_arguments = dict(read.get("model_args") or {})
        for name_without_use in ("num_classes", "zero_init_last"):  # no classifier is needed, no weight is drawn
            model_arguments.pop(name_without_use, None)
        arguments = checked(model_arguments)
    except UserError as error:
        raise UserError(f"{name}: {file}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name}: {file} is no config of a timm model ({type(error).__name__}: {error})") from error
    if not timm.is_model(architecture):
        raise UserError(f"{name}: it holds {architecture!r}, which is no model of timm {timm.__version__}")
    pretrained_cfg.setdefault("num_classes", read.get("num_classes", 1000))
    known_fields = {k: v for k, v in pretrained_cfg.items() if k in timm.models.PretrainedCfg.__dataclass_fields__}
    card = folder / CARD
    # The card is written by the author of the weights; timm's own entry is often the architecture's licence.
    licence = licence or (_licence(card) if card.is_file() else "") or str(pretrained_cfg.get("license") or "")
    return Start(architecture, arguments, weights, {**known_fields, "architecture": architecture}, licence, str(folder))


def _weights(repository: str, names: tuple[str, ...], name: str) -> Path:
    for file in names:
        files = fetched(repository, file, name)
        if files is not None:
            return files
    raise UserError(
        f"{name}: {repository} has no weights as safetensors ({' or '.join(names)}): other formats can run code, and "
        "are not read"
    )


def fetched(repository: str, file: str, name: str) -> Path | None:
    """A file of the hub, from its cache if possible; None if the repository has no such file.

    Raises:
        UserError: no such repository, no permission to read it, or no network.

    """
    import huggingface_hub as hub  # noqa: PLC0415

    owned, _, revision = repository.partition("@")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    options: dict[str, Any] = {"revision": revision or None, "cache_dir": os.environ.get("HF_HUB_CACHE")}
    with _in_words(name, owned, revision, endpoint):
        # The cache first, so that a name keeps its meaning, and nothing waits for a missing network.
        cached = hub.try_to_load_from_cache(owned, file, **options)
        if isinstance(cached, str):
            return Path(cached)
        try:
            # This request does without the downloader's retries, which last half a minute.
            hub.get_hf_file_metadata(hub.hf_hub_url(owned, file, revision=revision or None, endpoint=endpoint))
            return Path(hub.hf_hub_download(owned, file, endpoint=endpoint, **options))
        except hub.errors.RemoteEntryNotFoundError:
            return None


@contextmanager
def _in_words(name: str, owned: str, revision: str, endpoint: str) -> Iterator[None]:
    """Turn errors of the hub's library into one line."""
    from huggingface_hub import errors  # noqa: PLC0415

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name}: {owned} is given out on terms: accept them at {endpoint}/{owned}, then hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{name}: the hub knows no {owned}: check the name; where it is private, hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name}: {owned} has no revision {revision!r}") from error
    except errors.HFValidationError as error:
        raise UserError(f"{name}: {owned!r} is no name of the hub's: give owner/name") from error
    except errors.HfHubHTTPError as error:
        raise UserError(f"{name}: the hub does not give it: {' '.join(str(error).split())[:200]}") from error
    except Exception as error:  # the network client raises many kinds of errors
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the disk
        raise UserError(
            f"{name}: {endpoint} cannot be reached, and {owned} is not in the cache: connect once, or copy the "
            "repository's files and give local-dir:FOLDER"
        ) from error


def _licence(card: Path) -> str:
    """The licence in a model card's header."""
    header = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        head = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:
        return ""
    return str(head.get("license_name") or head.get("license") or "") if isinstance(head, dict) else ""


class _Capture(logging.Handler):
    """Collects timm's log while it loads, the only source of the names of missing weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Store the record."""
        self.lines.append(record.getMessage())


@contextmanager
def _captured() -> Iterator[list[str]]:
    logger, handler = logging.getLogger("timm.models._builder"), _Capture()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _listed(lines: list[str], kind: str) -> str:
    return next((item[1] for line in lines if (item := re.match(rf"{kind} \((.*)\) ", line))), "")
