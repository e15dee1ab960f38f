"""Which keys may a query see? Patterns are data: small, frozen, hashable, a plain dict and back.

A pattern answers one question, `visible(head, query, key)`, by arithmetic on *positions of tokens*. It says nothing
about causality, padding or packing: what a query finally sees is its pattern AND the model's own causal rule AND the
padding AND the packing (see attention_masks.py).

    >>> pattern = Union([Local(window=4), Strided(stride=4)])
    >>> pattern.visible(0, 9, 5)
    True
    >>> pattern_from_dict(pattern.to_dict()) == pattern
    True

Local, Strided and Fixed are the factorised attention of Child et al. 2019 (arXiv:1904.10509), section 4.3; Block1D and
Block2D the local attention of Parmar et al. 2018 (arXiv:1802.05751), section 3.3. Patterns of pictures are bound to a
grid of tokens at run time (`bind`); their dicts hold none.
"""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

PATTERN_TYPES: dict[str, type["Pattern"]] = {}


class Pattern:
    """Base of every pattern. A subclass is a frozen dataclass with a `type` name and a `visible` rule."""

    type: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "type" in cls.__dict__:
            PATTERN_TYPES[cls.type] = cls

    def visible(self, head, query, key):
        """May `query` see `key` in `head`? Integers give a bool; integer tensors broadcast to a bool tensor."""
        raise NotImplementedError

    @property
    def parts(self) -> tuple["Pattern", ...]:
        """The patterns whose union this one is; a pattern that is no union is its own only part."""
        return (self,)

    @property
    def head_period(self) -> int:
        """Heads `h` and `h + head_period` see the same; 1 where all heads do."""
        return 1

    def for_head(self, head: int) -> "Pattern":
        """The head-independent pattern that `head` follows."""
        return self

    def check_heads(self, num_heads: int) -> None:
        """Raise ValueError if the pattern cannot be dealt out to `num_heads` heads."""

    def bind(self, grid: tuple[int, ...]) -> "Pattern":
        """The pattern over the tokens of a picture of this `grid`, (rows, columns, ...); only those in 2-D change."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """`{"type": ..., field: value, ...}`, ready for JSON; fields at their default and the grid are left out."""
        names = [f.name for f in fields(self) if f.name != "grid" and getattr(self, f.name) != f.default]
        values = {name: getattr(self, name) for name in names}
        return {"type": self.type, **values}


@dataclass(frozen=True)
class Full(Pattern):
    """Every key."""

    type: ClassVar[str] = "full"

    def visible(self, head, query, key):
        return query - key == query - key


@dataclass(frozen=True)
class Local(Pattern):
    """Keys less than `window` positions away, the query's own included: |i - j| < window.

    With causality this is the first head of strided attention as its authors' code has it (the window holds `window`
    keys; the paper's text has one more).
    """

    type: ClassVar[str] = "local"
    window: int

    def __post_init__(self) -> None:
        _check_count(self, "window")

    def visible(self, head, query, key):
        return abs(query - key) < self.window


@dataclass(frozen=True)
class Strided(Pattern):
    """The column part of strided attention: every `stride`-th key, (i - j) mod stride = 0."""

    type: ClassVar[str] = "strided"
    stride: int

    def __post_init__(self) -> None:
        _check_count(self, "stride")

    def visible(self, head, query, key):
        return (query - key) % self.stride == 0


@dataclass(frozen=True)
class FixedBlock(Pattern):
    """First part of fixed attention: keys of the query's own block, floor(j / block) = floor(i / block)."""

    type: ClassVar[str] = "fixed_block"
    block: int

    def __post_init__(self) -> None:
        _check_count(self, "block")

    def visible(self, head, query, key):
        return query // self.block == key // self.block


@dataclass(frozen=True)
class FixedSummary(Pattern):
    """Second part of fixed attention: `summary` positions of every block, which sum up the block for all later ones.

    Blocks are cut into sub-blocks of length `summary`, numbered from the block's end. Head h reads sub-block
    `shift + h mod sub_blocks`; with the defaults every head reads the last `summary` positions. Distinct sub-blocks
    for distinct heads are the paper's advice (section 4.3).
    """

    type: ClassVar[str] = "fixed_summary"
    block: int
    summary: int
    sub_blocks: int = 1
    shift: int = 0

    def __post_init__(self) -> None:
        _check_fixed(self)

    def first_column(self, head):
        """Where in a block the summary positions of `head` begin."""
        return self.block - (self.shift + head % self.sub_blocks + 1) * self.summary

    def visible(self, head, query, key):
        first = self.first_column(head)
        column = key % self.block
        return (column >= first) & (column < first + self.summary) & (query == query)

    @property
    def head_period(self) -> int:
        return self.sub_blocks

    def for_head(self, head: int) -> "FixedSummary":
        return replace(self, sub_blocks=1, shift=self.shift + head % self.sub_blocks)


@dataclass(frozen=True)
class Fixed(Pattern):
    """Fixed attention, both parts merged: the own block and the summary positions of every block.

    `Fixed(...).parts` are the two, for models that give them to different layers or heads.
    """

    type: ClassVar[str] = "fixed"
    block: int
    summary: int
    sub_blocks: int = 1
    shift: int = 0

    def __post_init__(self) -> None:
        _check_fixed(self)

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return FixedBlock(self.block), FixedSummary(self.block, self.summary, self.sub_blocks, self.shift)

    def visible(self, head, query, key):
        own_block, summary = self.parts
        return own_block.visible(head, query, key) | summary.visible(head, query, key)

    @property
    def head_period(self) -> int:
        return self.sub_blocks

    def for_head(self, head: int) -> "Fixed":
        return replace(self, sub_blocks=1, shift=self.shift + head % self.sub_blocks)


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
        _check_count(self, "size")
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
        _check_count(self, "block")
        _check_count(self, "flange", lowest=0)

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
            _check_count(self, field)
        for field in ("flange_height", "flange_width"):
            _check_count(self, field, lowest=0)
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


class _Composite(Pattern):
    """A pattern made of patterns; its dict holds their dicts."""

    patterns: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        patterns = self.patterns
        if isinstance(patterns, Pattern) or not isinstance(patterns, Iterable):
            raise ValueError(f"{type(self).__name__}.patterns must be a list of patterns, got {patterns!r}.")
        patterns = tuple(pattern_from_dict(p) if isinstance(p, Mapping) else p for p in patterns)
        for pattern in patterns:
            if not isinstance(pattern, Pattern):
                raise ValueError(f"{type(self).__name__}.patterns holds {pattern!r}, which is no pattern.")
        if not patterns:
            raise ValueError(f"{type(self).__name__}.patterns is empty; it needs at least one pattern.")
        object.__setattr__(self, "patterns", patterns)

    @property
    def head_period(self) -> int:
        return math.lcm(*(p.head_period for p in self.patterns))

    def check_heads(self, num_heads: int) -> None:
        for pattern in self.patterns:
            pattern.check_heads(num_heads)

    def bind(self, grid: tuple[int, int]) -> Pattern:
        return replace(self, patterns=tuple(p.bind(grid) for p in self.patterns))

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, "patterns": [p.to_dict() for p in self.patterns]}


@dataclass(frozen=True)
class Union(_Composite):
    """Keys that any of `patterns` shows: a "merged head" (Child et al. 2019, section 4.2, equation 8)."""

    type: ClassVar[str] = "union"
    patterns: tuple[Pattern, ...]

    @property
    def parts(self) -> tuple[Pattern, ...]:
        parts = (part for pattern in self.patterns for part in pattern.parts)
        return tuple(dict.fromkeys(parts))

    def visible(self, head, query, key):
        first, *rest = (p.visible(head, query, key) for p in self.patterns)
        for seen in rest:
            first = first | seen
        return first

    def for_head(self, head: int) -> "Union":
        return Union(tuple(p.for_head(head) for p in self.patterns))


@dataclass(frozen=True)
class Intersection(_Composite):
    """Keys that all of `patterns` show, such as a pattern inside a model's own sliding window."""

    type: ClassVar[str] = "intersection"
    patterns: tuple[Pattern, ...]

    def visible(self, head, query, key):
        first, *rest = (p.visible(head, query, key) for p in self.patterns)
        for seen in rest:
            first = first & seen
        return first

    def for_head(self, head: int) -> "Intersection":
        return Intersection(tuple(p.for_head(head) for p in self.patterns))


@dataclass(frozen=True)
class PerHead(_Composite):
    """Head h follows `patterns[h mod len(patterns)]`: "multi-head" (Child et al. 2019, section 4.2, equation 9).

    The number of heads must be a multiple of the number of patterns.
    """

    type: ClassVar[str] = "per_head"
    patterns: tuple[Pattern, ...]

    def visible(self, head, query, key):
        shown = None
        for index, pattern in enumerate(self.patterns):
            mine = (head % len(self.patterns) == index) & pattern.visible(head, query, key)
            shown = mine if shown is None else shown | mine
        return shown

    @property
    def head_period(self) -> int:
        return math.lcm(len(self.patterns), *(p.head_period for p in self.patterns))

    def for_head(self, head: int) -> Pattern:
        return self.patterns[head % len(self.patterns)].for_head(head)

    def check_heads(self, num_heads: int) -> None:
        if num_heads % len(self.patterns):
            raise ValueError(
                f"PerHead deals out {len(self.patterns)} patterns, which does not divide "
                f"num_attention_heads={num_heads}; give a number of patterns that does."
            )
        super().check_heads(num_heads)


def pattern_from_dict(values: Mapping[str, Any] | Pattern) -> Pattern:
    """The pattern that a dict (from `to_dict`, JSON or YAML) describes; a pattern is returned as it is.

    Raises ValueError on an unknown type, an unknown or missing key, or a value that does not fit, naming what does.
    """
    if isinstance(values, Pattern):
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"A pattern must be a dict such as {{'type': 'local', 'window': 64}}, got {values!r}.")
    rest = dict(values)
    name = rest.pop("type", None)
    if name not in PATTERN_TYPES:
        raise ValueError(f"Unknown pattern type {name!r}{nearest(str(name), PATTERN_TYPES)}")
    cls = PATTERN_TYPES[name]
    allowed = [f.name for f in fields(cls)]
    for key in rest:
        if key not in allowed:
            raise ValueError(f"Pattern {name!r} has no key {key!r}{nearest(key, allowed)}")
    required = {f.name for f in fields(cls) if f.default is f.default_factory}
    missing = [name for name in allowed if name in required and name not in rest]
    if missing:
        raise ValueError(f"Pattern {name!r} needs {', '.join(map(repr, missing))}, got {dict(values)!r}.")
    return cls(**rest)


def patterns_for_layers(patterns: Mapping | Pattern | Iterable, num_layers: int) -> list[Pattern]:
    """One pattern for each of `num_layers` layers: a single pattern for all, or a list cycled over them."""
    if isinstance(patterns, (Mapping, Pattern)):
        patterns = [patterns]
    patterns = [pattern_from_dict(p) for p in patterns]
    if not patterns:
        raise ValueError("attention_patterns is an empty list; give one pattern, or a list to cycle over the layers.")
    return [patterns[layer % len(patterns)] for layer in range(num_layers)]


def intersect(first: Pattern, second: Pattern) -> Pattern:
    """Keys that both show, without an Intersection where one pattern alone says it."""
    match first, second:
        case Full(), other:
            return other
        case other, Full():
            return other
        case Local(), Local():
            return Local(min(first.window, second.window))
    return first if first == second else Intersection((first, second))


def walk(pattern: Pattern) -> Iterator[Pattern]:
    """The pattern and every pattern inside it."""
    yield pattern
    for inner in getattr(pattern, "patterns", ()):
        yield from walk(inner)


def grid_of(pattern: Pattern) -> tuple[int, ...] | None:
    """The grid that a pattern of pictures, or one inside it, is bound to."""
    return next((inner.grid for inner in walk(pattern) if getattr(inner, "grid", None) is not None), None)


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The end of an error message: the nearest allowed names, and all of them."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(name, allowed, n=3)
    guess = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    return f"{guess} Allowed: {', '.join(allowed)}."


def _check_count(pattern: Pattern, field: str, lowest: int = 1) -> None:
    value = getattr(pattern, field)
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"{type(pattern).__name__}.{field} must be an integer of at least {lowest}, got {value!r}.")


def _checked_grid(grid: Iterable[int]) -> tuple[int, int, int]:
    values = tuple(grid)
    if len(values) != 3 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
        raise ValueError(f"Block2D.grid must be (rows, columns, channels), each at least 1, got {list(values)}.")
    return values


def _at_most(limit, value):
    """min(limit, value); integers, arrays and tensors alike."""
    return limit - (limit - value) * (value < limit)


def _check_fixed(pattern: "Fixed | FixedSummary") -> None:
    for field in ("block", "summary", "sub_blocks"):
        _check_count(pattern, field)
    if isinstance(pattern.shift, bool) or not isinstance(pattern.shift, int) or pattern.shift < 0:
        raise ValueError(f"{type(pattern).__name__}.shift must be an integer of at least 0, got {pattern.shift!r}.")
    needed = (pattern.shift + pattern.sub_blocks) * pattern.summary
    if needed > pattern.block:
        raise ValueError(
            f"{type(pattern).__name__} needs (shift + sub_blocks) * summary <= block, "
            f"got ({pattern.shift} + {pattern.sub_blocks}) * {pattern.summary} = {needed} > {pattern.block}."
        )
