"""Opens a CLIP by name: its text tower, its vocabulary, and its projection of image features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from crosslevel.models.clip.tokens import Tokens
from crosslevel.models.clip.tower import TextTower
from crosslevel.models.start.pretrained import files_of
from crosslevel.utils.errors import UserError
from crosslevel.utils.tensors import load_safetensors
from crosslevel.utils.trees import json_tree

CONFIG, WEIGHTS, TABLE = "open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"


@dataclass(frozen=True)
class Clip:
    """Maps words, and features of images, to unit vectors that can be compared.

    ``projection`` (D, E) maps the pooled features of an image.
    """

    tokens: Tokens
    tower: TextTower
    projection: Float[Tensor, "D E"]

    @torch.no_grad()
    def words(self, text: str) -> Float[Tensor, "1 E"]:
        """The unit vector of a text."""
        vector: Tensor = self.tower(self.tokens(text, self.tower.length).unsqueeze(0))
        return vector


def open_clip_of(name: str, width: int) -> Clip:
    """Open the text side of a CLIP.

    Args:
        name: of its weights, as `crosslevel.models.named.open_encoder` takes it: a repository of the hub or a
            folder with open_clip's files (open_clip_config.json, open_clip_model.safetensors) and tokenizer.json.
        width: D, the size of an image's feature.

    Raises:
        UserError: it is no CLIP, or its files are of another kind.

    """
    fetched = files_of(name)
    config = fetched(CONFIG)
    if config is None:
        raise UserError(f"{name} is no CLIP, which reads words: it has no {CONFIG}")
    try:
        settings = json_tree(config.read_text(encoding="utf-8"))["model_cfg"]
        text = dict(settings.get("text_cfg") or {})
        heads, fast = text.get("heads"), bool(settings.get("quick_gelu", False))
        if text.get("hf_model_name") or text.get("no_causal_mask") or text.get("pool_type", "argmax") != "argmax":
            raise UserError("its text tower is of another kind than CLIP's own")
        state, _ = load_safetensors(_required(fetched, WEIGHTS))
        tower = TextTower(state, None if heads is None else int(heads), fast)
        return Clip(Tokens.read(_required(fetched, TABLE)), tower, _projection(state, width, tower.features))
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{name}: {config} is no config of a CLIP ({type(error).__name__}: {error})") from error


def _required(fetched: Callable[[str], Path | None], file: str) -> Path:
    path = fetched(file)
    if path is None:
        raise UserError(f"it has no {file}, which queries in words need")
    return path


def _projection(state: dict[str, Tensor], width: int, features: int) -> Float[Tensor, "D E"]:
    """The projection of image features into the space of texts."""
    projection = state.get("visual.proj")
    if projection is None and "visual.head.proj.weight" in state:
        projection = state["visual.head.proj.weight"].T
    if projection is None or tuple(projection.shape) != (width, features):
        raise UserError(f"its weights do not take images' features of {width} numbers to words of {features}")
    return projection.float()
