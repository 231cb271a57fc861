"""The layout of a batch's views: which are large, small or plain, and where each crop is stored."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Shaped
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """``count`` views: large ones first, then the ``small`` ones, then the ``plain`` ones, which are large as well.

    When crops are stored, each large one has its own picture; small ones share as few pictures as possible, at the end.

    Attributes:
        count: all views.
        small: how many of them are small.
        plain: how many are plain.
        size: height and width of a large one in pixels.
        small_side: height and width of a small one, at most as large.

    """

    count: int
    small: int
    plain: int
    size: int
    small_side: int

    @property
    def pictures(self) -> int:
        """How many pictures the crops take."""
        return self.count - self.small - (-self.small // (self.size // self.small_side) ** 2)

    def is_small(self, view: int) -> bool:
        """Whether a view is a small one."""
        return self.count - self.plain - self.small <= view < self.count - self.plain

    def is_plain(self, view: int) -> bool:
        """Whether a view keeps its colours."""
        return view >= self.count - self.plain

    def side(self, view: int) -> int:
        """A view's height and width in pixels."""
        return self.small_side if self.is_small(view) else self.size

    def picture(self, view: int) -> int:
        """The number of the picture that a view's crop lies in."""
        return self._slot(view)[0]

    def room(self, crops: Shaped[Tensor, "*B V C size size"], view: int) -> Shaped[Tensor, "*B C s s"]:
        """A view's location in the pictures."""
        picture, top, left = self._slot(view)
        side = self.side(view)
        return crops[..., picture, :, top : top + side, left : left + side]

    def _slot(self, view: int) -> tuple[int, int, int]:
        large, a_side = self.count - self.small, self.size // self.small_side
        if not self.is_small(view):
            return (view - self.small if self.is_plain(view) else view), 0, 0
        further, cell = divmod(view - (large - self.plain), a_side**2)
        return large + further, cell // a_side * self.small_side, cell % a_side * self.small_side
