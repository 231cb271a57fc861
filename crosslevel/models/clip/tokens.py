"""Words as CLIP's text tower reads them: byte pairs that were merged by a table (Radford et al. 2021, sec. 2.4)."""

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
_LONGEST = 64 * 2**20  # bytes of a table; CLIP's has two million
_SHORT = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


class Tokens:
    """Text as numbers.

    Args:
        vocabulary: the number of every piece.
        merges: pairs of pieces that become one, the first ones first.

    Raises:
        UserError: the marks of beginning and end are missing.

    """

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
        if START not in vocabulary or END not in vocabulary:
            raise UserError(f"its table of words has no {START} or {END}: it is not CLIP's")
        self.vocabulary, self.rank = vocabulary, {pair: i for i, pair in enumerate(merges)}

    @classmethod
    def read(cls, file: Path) -> Tokens:
        """The table in a ``tokenizer.json``, as the Hugging Face hub has it.

        Raises:
            UserError: it is none, or damaged.

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
        """The numbers of a text between the marks of beginning and end, cut and filled to ``length``."""
        pieces = [piece for word in _words(text) for piece in self._pieces(word)]
        unknown = self.vocabulary[END]
        numbers = [self.vocabulary[START], *(self.vocabulary.get(piece, unknown) for piece in pieces)][: length - 1]
        numbers.append(self.vocabulary[END])
        return torch.tensor(numbers + [0] * (length - len(numbers)))

    def _pieces(self, word: str) -> list[str]:
        """The bytes of a word, merged as long as the table has a pair of them."""
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
    """Runs of letters, single digits, runs of anything else, and English endings after an apostrophe; in lower case."""
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
    """A letter that can be seen for every byte, as GPT-2 has them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    substitutes = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(substitutes)) for byte in range(256)]
