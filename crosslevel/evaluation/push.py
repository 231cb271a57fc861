"""``crosslevel push``: a run's encoder on the Hugging Face hub, with a model card, in the form that timm loads."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from timm.models import save_for_hf
from torch import nn

from crosslevel.evaluation.results import COLUMNS, FILE, read_results
from crosslevel.models.encoder import Encoder
from crosslevel.models.named import open_encoder
from crosslevel.models.start.pretrained import CARD, HUB, is_named
from crosslevel.runs import Run
from crosslevel.utils.console import printer, say
from crosslevel.utils.errors import UserError, hidden
from crosslevel.utils.marks import verb

PRIVATE = ("images", "data_root", "weights", "pretrained", "teacher", "crops")
"""Settings that may name a path on somebody's disk: only the last part of a path is published."""

LEFT_OUT = ("workers", "memory", "quiet", "monitor", "monitor_every", "log_every", "checkpoint_minutes", "report_html",
            "logger", "device", "devices")  # fmt: skip


@verb()
def push(
    run: str,
    to: str,
    license: str | None = None,
    output: str | None = None,
    private: bool = False,
    quiet: bool = False,
) -> str:
    """Publish a run's encoder on the Hugging Face hub, where timm.create_model("hf-hub:owner/name") loads it.

    Uploads three files: model.safetensors, config.json (how timm builds it, and how its images are prepared) and
    README.md, the model card: data, settings, figures (those of crosslevel evaluate) and licence. The account that is
    logged in (hf auth login, or HF_TOKEN) is used; the token is never printed.

    Args:
        run: the folder of a run.
        to: the repository, hf:owner/name; it is made if it is not there.
        license: licence of the published files, as the hub spells it, such as apache-2.0; unless given, that of the
            weights that the run began with, if any.
        output: a folder to write the files to for inspection; nothing is sent.
        private: make a repository that only its owners see.
        quiet: print nothing.

    Returns:
        the address of the commit, or the folder.
    """
    prefix = next((prefix for prefix in HUB if to.startswith(prefix)), None)
    repository = to.removeprefix(prefix or "")
    if prefix is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"{to!r} is no repository of the hub: give hf:owner/name")
    console, encoder = printer(quiet), open_encoder(run)
    if encoder.width != 1.0 or encoder.small_images:
        raise UserError(
            f"timm has no {encoder.name} with a small-image stem or a width, so the hub could not load it: "
            "crosslevel export --format onnx writes a file for every program"
        )
    if encoder.licence and license and license != encoder.licence:
        say(console, f"the run began with weights under {encoder.licence}: see whether that allows {license}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(encoder, folder)
        (folder / CARD).write_text(card(Run(run), encoder, repository, license or encoder.licence), encoding="utf-8")
        if output is not None:
            Path(output).mkdir(parents=True, exist_ok=True)
            for file in sorted(folder.iterdir()):
                shutil.copyfile(file, Path(output) / file.name)
            say(console, f"written to {output}, nothing was sent; next: look at it, and then the same without --output")
            return output
        address = _sent(folder, repository, private, quiet)
    say(console, f'{address}; next: timm.create_model("hf-hub:{repository}", pretrained=True, num_classes=0)')
    return address


def write(encoder: Encoder, folder: Path) -> None:
    """The files from which timm builds the network: weights as safetensors, and config.json."""
    network: nn.Module = encoder.backbone
    view = encoder.view
    config = {"mean": view.mean, "std": view.std, "input_size": (view.channels, view.size, view.size), "crop_pct": 1.0,
           "interpolation": "bilinear"}  # fmt: skip
    save_for_hf(network, str(folder), safe_serialization=True, data_config=config)


def card(run: Run, encoder: Encoder, repository: str, licence: str) -> str:
    """The model card: a YAML header for the hub, then text for readers."""
    settings = run.settings() if run.config.is_file() else {}
    head: dict[str, Any] = {"library_name": "timm", "pipeline_tag": "image-feature-extraction"}
    head["tags"] = ["image-feature-extraction", "timm", "crosslevel", "self-supervised-learning"]
    if licence:
        head = {"license": licence, **head}
    base_name = (settings.get("encoder") or {}).get("name", "")
    started = bool((settings.get("encoder") or {}).get("pretrained"))
    if started and is_named(base_name) and any(map(base_name.startswith, HUB)):
        head["base_model"] = base_name.partition(":")[2].partition("@")[0]
    title = repository.partition("/")[2]
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {title}",
        f"{encoder.architecture}, {encoder.num_features} features, trained without labels by "
        f"[Crosslevel](https://arxiv.org/abs/2008.03813). It looks at images of {encoder.view.size} pixels.",
        "```python\nimport timm\n\n"
        f'model = timm.create_model("hf-hub:{repository}", pretrained=True, num_classes=0).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n```",
        "## Data",
        _data(run, settings),
        *(["## Settings", _settings(settings)] if settings else []),
        "## Figures",
        _figures(run),
        "## Licence",
        licence or "Not stated.",
    ]
    if started:
        sections.append(
            f"The training began with the weights {_metadata(base_name)} ({encoder.licence or 'licence not stated'})."
        )
    return "\n\n".join(sections) + "\n"


def _data(run: Run, settings: dict[str, Any]) -> str:
    try:
        count = f"{json.loads(run.images.read_text(encoding='utf-8'))['images']:,} images"
    except (OSError, ValueError, KeyError, TypeError):
        count = "images whose number is not known"
    return f"{_metadata(settings.get('images', 'a collection that is not named'))}: {count}, without labels."


def _settings(tree: dict[str, Any]) -> str:
    rows = [f"{name}: {value}" for name, value in _flat(tree)]
    return "```yaml\n" + "\n".join(rows) + "\n```"


def _flat(tree: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if value is None or (not before and name in LEFT_OUT):
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", _metadata(value) if name in PRIVATE else _public(value)


def _metadata(value: Any) -> Any:
    """A setting as the model card shows it: only the last part of a path, and an address without secrets."""
    if not isinstance(value, str) or is_named(value):
        return value
    address, mark, signed = value.partition("?")  # a signature may have slashes
    return hidden(address.rstrip("/").rpartition("/")[2] + mark + signed)


def _public(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_public(part) for part in value]
    return hidden(value) if isinstance(value, str) else value


def _figures(run: Run) -> str:
    file = run.path / FILE
    results = read_results(file) if file.is_file() else []
    if not results:
        return "None were measured: `crosslevel evaluate` measures some."
    tables = []
    for result in results:
        rows = result["accuracy_percent"]
        names = [name for name in COLUMNS if any(name in row for row in rows.values())]
        lines = [["features", *(COLUMNS[name] for name in names)]]
        lines += [[kind, *(f"{row[name]:.1f}" if name in row else "" for name in names)] for kind, row in rows.items()]
        description = f"{_metadata(result.get('images') or '')}, tested on {_metadata(result.get('test') or '')}"
        tables.append(f"{result['protocol']} ({description}), in %:\n\n{_markdown(lines)}")
    return "\n\n".join(tables)


def _markdown(lines: list[list[str]]) -> str:
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _sent(folder: Path, repository: str, private: bool, quiet: bool) -> str:
    import huggingface_hub as hub  # noqa: PLC0415

    api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    with _without_token(repository), _silent(quiet):
        api.create_repo(repository, private=private, exist_ok=True)
        sent = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="An encoder trained with Crosslevel"
        )
    return str(getattr(sent, "commit_url", "") or sent)


@contextmanager
def _silent(quiet: bool) -> Iterator[None]:
    """Turn off the library's progress bars if nothing should be printed."""
    from huggingface_hub.utils import (  # noqa: PLC0415
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    hidden = quiet and not are_progress_bars_disabled()
    if hidden:
        disable_progress_bars()
    try:
        yield
    finally:
        if hidden:
            enable_progress_bars()


@contextmanager
def _without_token(repository: str) -> Iterator[None]:
    """Turn the hub's errors into one line, without the user's token."""
    import huggingface_hub as hub  # noqa: PLC0415

    token = hub.get_token()
    try:
        yield
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403) or isinstance(error, hub.errors.LocalTokenNotFoundError):
            raise UserError(
                f"the hub does not let you write to {repository}: hf auth login, or HF_TOKEN, of one who may"
            ) from None
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        reason = reason.replace(token, "***") if token else reason
        raise UserError(f"{repository} was not pushed: {reason}") from None
