"""The tokenizer of CLIP's text tower: byte-pair encoding (Radford et al. 2021, sec. 2.4)."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from crosslevel.utils.errors import UserError

START, END, LAST = "<|startoftext|>", "<|endoftext|>", "</w>"
_LONGEST = 64 * 2**20  # the most bytes of a vocabulary file; CLIP's has two million
_SHORT = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


class Tokens:
    """A tokenizer: text to token numbers.

    Args:
        vocabulary: the number of every piece.
        merges: pairs of pieces to merge, in order of priority.

    Raises:
        UserError: the start or end token is missing.

    """

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
        if START not in vocabulary or END not in vocabulary:
            raise UserError(f"its table of words has no {START} or {END}: it is not CLIP's")
        self.vocabulary, self.rank = vocabulary, {pair: i for i, pair in enumerate(merges)}

    @classmethod
    def read(cls, file: Path) -> Tokens:
        """Read a ``tokenizer.json`` of the Hugging Face hub.

        Raises:
            UserError: the file is no tokenizer, or damaged.

        """
        try:
            if file.stat().st_size > _LONGEST:
                raise UserError(f"{file} is no table of words: it has {file.stat().st_size:,} bytes")
            model = json.loads(file.read_text(encoding="utf-8"))["model"]
            vocabulary = {str(piece): int(number) for piece, number in model["vocab"].items()}
            pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
            return cls(vocabulary, [(str(a), str(b)) for a, b in pairs])
        except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{file} is no table of words ({type(error).__name__}: {error})") from error

    def __call__(self, text: str, length: int) -> Int64[Tensor, " L"]:
        """The token numbers of a text between start and end token, cut and padded to ``length``."""
        pieces = [piece for word in _words(text) for piece in self._pieces(word)]
        unknown = self.vocabulary[END]
        numbers = [self.vocabulary[START], *(self.vocabulary.get(piece, unknown) for piece in pieces)][: length - 1]
        numbers.append(self.vocabulary[END])
        return torch.tensor(numbers + [0] * (length - len(numbers)))

    def _pieces(self, word: str) -> list[str]:
        """The pieces of a word: its bytes, merged as long as ``merges`` has a pair of them."""
        letters = _letters()
        pieces = [letters[byte] for byte in word.encode()]
        pieces[-1] += LAST
        while len(pieces) > 1:
            pairs = list(pairwise(pieces))
            best = min(pairs, key=lambda pair: self.rank.get(pair, len(self.rank)))
            if best not in self.rank:
                break
            merged, i = list[str](), 0
            while i < len(pieces):
                merges = tuple(pieces[i : i + 2]) == best
                merged.append("".join(best) if merges else pieces[i])
                i += 1 + merges
            pieces = merged
        return pieces


def _words(text: str) -> Iterator[str]:
    """Split a lower-cased text into runs of letters, digits, other runs, and English endings after an apostrophe."""
    text = " ".join(unicodedata.normalize("NFC", text).split()).lower()
    at = 0
    while at < len(text):
        short = next((word for word in _SHORT if text.startswith(word, at)), "")
        kind, end = _kind(text[at]), at + 1
        if short:
            end = at + len(short)
        elif kind in ("L", "other"):
            while end < len(text) and _kind(text[end]) == kind:
                end += 1
        if kind != " ":
            yield text[at:end]
        at = end


def _kind(letter: str) -> str:
    if letter.isspace():
        return " "
    category = unicodedata.category(letter)[0]
    return category if category in "LN" else "other"


@cache
def _letters() -> list[str]:
    """A visible character for every byte, as in GPT-2."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    substitutes = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(substitutes)) for byte in range(256)]
