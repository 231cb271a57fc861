"""The text tower of a CLIP (Radford et al. 2021): it maps a text into the space of image features.

Ours, since timm builds the image towers of CLIPs, and not their text towers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from crosslevel.utils.errors import UserError

PREFIX = "text."
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")


class _Fast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """Return x sigmoid(1.702 x), which the first CLIPs use in place of GELU."""
        return x * torch.sigmoid(1.702 * x)


class _Block(nn.Module):
    """A residual transformer block: causal attention, then an MLP of two layers for each position."""

    def __init__(self, width: int, heads: int, hidden: int, fast: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, hidden))
        self.mlp.add_module("gelu", _Fast() if fast else nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(hidden, width))

    def forward(self, x: Float[Tensor, "B L W"], mask: Tensor) -> Float[Tensor, "B L W"]:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class TextTower(nn.Module):
    """Token numbers (B, L) to unit vectors (B, E), with open_clip's parameter names, so that its weights fit.

    ``length`` is L, ``features`` E.
    """

    def __init__(self, state: Mapping[str, Tensor], heads: int | None, fast: bool) -> None:
        """Build the tower from the weights ``state``, which determine all sizes.

        Raises:
            UserError: these are no weights of such a tower.

        """
        super().__init__()
        weights = {name.removeprefix(PREFIX): v.float() for name, v in state.items() if not name.startswith("visual.")}
        try:
            vocabulary, width = weights["token_embedding.weight"].shape
            self.length, self.features = weights["positional_embedding"].shape[0], weights["text_projection"].shape[1]
            blocks = 1 + max(int(match[1]) for name in weights if (match := _BLOCK.match(name)))
            hidden = weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
        except (KeyError, ValueError, IndexError) as error:
            raise UserError("its weights have no text tower of CLIP's kind") from error
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(self.length, width))
        self.transformer = nn.Module()
        heads = heads or max(1, width // 64)
        if width % heads or blocks > 1000:
            raise UserError(f"its text tower of {blocks} blocks, {width} wide, has {heads} heads: that is no CLIP's")
        self.transformer.resblocks = nn.ModuleList(_Block(width, heads, hidden, fast) for _ in range(blocks))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, self.features))
        try:
            self.load_state_dict({name: weights[name] for name in self.state_dict()})
        except (KeyError, RuntimeError) as error:
            raise UserError(f"its text tower is not CLIP's: {' '.join(str(error).split())[:150]}") from error
        self.eval().requires_grad_(False)

    def forward(self, numbers: Int64[Tensor, "B L"]) -> Float[Tensor, "B E"]:
        """The unit feature (E,) of each text: the output at its end token, the one with the largest number."""
        length = numbers.shape[1]
        x = self.token_embedding(numbers) + self.positional_embedding[:length]
        mask = torch.full((length, length), -torch.inf).triu(1)
        for block in self.transformer.resblocks:  # type: ignore[union-attr]
            x = block(x, mask)
        ends = self.ln_final(x)[torch.arange(len(x)), numbers.argmax(1)]
        return F.normalize(ends @ self.text_projection, dim=1)
