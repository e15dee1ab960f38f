"""Patterns of pictures: windows, and blocks in the order of generation.

Block1D and Block2D are the local attention of Parmar et al. 2018 (arXiv:1802.05751), section 3.3; Window2D are the
windows of Liu et al. 2021 (arXiv:2103.14030), section 3.2. Those in two dimensions are bound to a grid of tokens at run
time (`bind`); their dicts hold none.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from .attention_patterns_base import Pattern, check_count


@dataclass(frozen=True)
class Window2D(Pattern):
    """Windows of a picture (Liu et al. 2021, section 3.2): keys of the query's own square of `size` x `size` tokens.

    The squares begin at row and column `shift`; what lies before it, or is cut off at the far side, makes smaller
    windows of its own. That is what the paper's cyclic shift computes under its masks.

    Attributes:
        size: side of a window.
        shift: rows and columns that the windows are moved by, less than `size`.
        grid: rows and columns of tokens, known at run time; see `bind`.
    """

    type: ClassVar[str] = "window_2d"
    size: int
    shift: int = 0
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_count(self, "size")
        if isinstance(self.shift, bool) or not isinstance(self.shift, int) or not 0 <= self.shift < self.size:
            raise ValueError(f"Window2D.shift must be an integer from 0 to size - 1, got {self.shift!r}.")

    def bind(self, grid: tuple[int, int]) -> "Window2D":
        return replace(self, grid=tuple(grid))

    def visible(self, head, query, key):
        return self.window(query) == self.window(key)

    def window(self, token):
        """Number of the window that a token lies in."""
        if self.grid is None:
            raise ValueError("Window2D needs to know the grid of tokens; use pattern.bind((rows, columns)).")
        columns = self.grid[1]
        row, column = ((coordinate - self.shift) // self.size for coordinate in (token // columns, token % columns))
        return row * (columns + 1) + column  # windows of a row of windows are numbered from -1


@dataclass(frozen=True)
class Block1D(Pattern):
    """Local attention in one dimension: all queries of a block see the block and `flange` positions before it."""

    type: ClassVar[str] = "block_1d"
    block: int
    flange: int

    def __post_init__(self) -> None:
        check_count(self, "block")
        check_count(self, "flange", lowest=0)

    def visible(self, head, query, key):
        start = query // self.block * self.block
        return (key >= start - self.flange) & (key < start + self.block)

    def block_span(self, position: int) -> tuple[int, int]:
        """First position of the block that `position` lies in, and one past its last."""
        start = position // self.block * self.block
        return start, start + self.block

    def first_key(self, query: int) -> int:
        """No query of this block or a later one sees a key before this position."""
        return max(0, query // self.block * self.block - self.flange)

    def last_query(self, key):
        """The last position from which `key` is seen; integers and tensors alike."""
        return ((key + self.flange) // self.block + 1) * self.block - 1


@dataclass(frozen=True)
class Block2D(Pattern):
    """Local attention in two dimensions: all queries of a rectangle of pixels see it and a flange around it.

    The flange lies above the rectangle (`flange_height` rows) and on its left and right (`flange_width` columns).
    Positions count in the order of generation: block after block in raster order, inside a block pixel after pixel in
    raster order, inside a pixel channel after channel.

    Attributes:
        height, width: rows and columns of the rectangle; smaller at the far edges of an image that they do not divide.
        flange_height, flange_width: rows and columns of the flange.
        grid: rows, columns and channels of the image, known at run time; see `bind`.
    """

    type: ClassVar[str] = "block_2d"
    height: int
    width: int
    flange_height: int
    flange_width: int
    grid: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        for field in ("height", "width"):
            check_count(self, field)
        for field in ("flange_height", "flange_width"):
            check_count(self, field, lowest=0)
        if self.grid is not None:
            object.__setattr__(self, "grid", _checked_grid(self.grid))

    def bind(self, grid: tuple[int, ...]) -> "Block2D":
        return replace(self, grid=tuple(grid))

    def place(self, position):
        """(row, column) of the pixel that is generated at `position`; integers and tensors alike."""
        rows, columns, channels = self._bound_grid()
        of_block_row = self.height * columns * channels
        top = position // of_block_row * self.height
        height = _at_most(self.height, rows - top % rows)  # modulo, so that no position past the image divides by 0
        rest = position % of_block_row
        left = rest // (height * self.width * channels) * self.width
        width = _at_most(self.width, columns - left % columns)
        rest = rest % (height * self.width * channels)
        return top + rest // (width * channels), left + rest % (width * channels) // channels

    def visible(self, head, query, key):
        (row, column), (key_row, key_column) = self.place(query), self.place(key)
        top, left = row // self.height * self.height, column // self.width * self.width
        near_row = (key_row >= top - self.flange_height) & (key_row < top + self.height)
        near_column = (key_column >= left - self.flange_width) & (key_column < left + self.width + self.flange_width)
        return near_row & near_column

    def block_span(self, position: int) -> tuple[int, int]:
        """First position of the block that `position` lies in, and one past its last."""
        row, column = self.place(position)
        return self._span(row // self.height * self.height, column // self.width * self.width)

    def first_key(self, query: int) -> int:
        """No query of this block or a later one sees a key before this position."""
        _, columns, channels = self._bound_grid()
        top = self.place(query)[0] // self.height * self.height
        return max(0, top - self.flange_height) // self.height * self.height * columns * channels

    def last_query(self, key):
        """The last position from which `key` is seen; integers and tensors alike."""
        rows, columns, _ = self._bound_grid()
        row, column = self.place(key)
        top = _at_most(rows - 1, row + self.flange_height) // self.height * self.height
        left = _at_most(columns - 1, column + self.flange_width) // self.width * self.width
        return self._span(top, left)[1] - 1

    def _span(self, top, left):
        rows, columns, channels = self._bound_grid()
        height, width = _at_most(self.height, rows - top), _at_most(self.width, columns - left)
        start = (top * columns + left * height) * channels
        return start, start + height * width * channels

    def _bound_grid(self) -> tuple[int, int, int]:
        if self.grid is None:
            raise ValueError("Block2D needs to know the image; use pattern.bind((rows, columns, channels)).")
        return self.grid


def _checked_grid(grid: Iterable[int]) -> tuple[int, int, int]:
    values = tuple(grid)
    if len(values) != 3 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
        raise ValueError(f"Block2D.grid must be (rows, columns, channels), each at least 1, got {list(values)}.")
    return values


def _at_most(limit, value):
    """min(limit, value); integers, arrays and tensors alike."""
    return limit - (limit - value) * (value < limit)
