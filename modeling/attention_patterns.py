"""Which keys may a query see? Patterns are data: small, frozen, hashable, a plain dict and back.

    >>> pattern = Union([Local(window=4), Strided(stride=4)])
    >>> pattern.visible(0, 9, 5)
    True
    >>> pattern_from_dict(pattern.to_dict()) == pattern
    True

A pattern answers one question, `visible(head, query, key)`, by arithmetic on *positions of tokens*. It says nothing
about causality, padding or packing: what a query finally sees is its pattern AND the model's own causal rule AND the
padding AND the packing (attention.py). Beside it a pattern tells a few *facts*, from which plans, caches and kernels
know how to compute it cheaply; a pattern that tells none is computed by `visible` alone.

Local, Strided and Fixed are the factorised attention of Child et al. 2019 (arXiv:1904.10509), section 4.3; Sink the
attention sinks of Xiao et al. 2023 (arXiv:2309.17453), section 3.2; Block1D and Block2D the local attention of Parmar
et al. 2018 (arXiv:1802.05751), section 3.3; Window2D the windows of Liu et al. 2021 (arXiv:2103.14030), section 3.2.
Those in two dimensions are bound to a grid of tokens at run time (`bind`).
"""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from inspect import get_annotations
from typing import Any, ClassVar, NamedTuple

import torch

PATTERN_TYPES: dict[str, type["Pattern"]] = {}
FAR = 1 << 40  # farther than any position: an end of an interval that has none


class SummaryKeys(NamedTuple):
    """The keys at positions [first, first + count) of every block of `block` positions, whatever the query.

    A block of FAR positions never ends, so that there is one.
    """

    block: int
    first: int
    count: int


class Pattern:
    """Base of every pattern. A subclass is a frozen dataclass with a `type` name and a `visible` rule.

    Facts hold for head-independent patterns (`for_head`), and for queries and keys at positions from 0 on. A pattern
    that tells none is read whole; one that tells `interval`, `period` and `reach` tells the others with them; a
    subclass overrides what it knows better. Tests hold every fact to `visible`.
    """

    type: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        facts = [name for name in get_annotations(cls) if hasattr(Pattern, name)]
        if facts:
            raise TypeError(f"{cls.__qualname__}.{facts[0]} is the name of a fact that patterns tell; choose another.")
        if "type" not in cls.__dict__:
            return
        other = PATTERN_TYPES.setdefault(cls.type, cls)
        if other is not cls and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"Pattern type {cls.type!r} is taken by {other.__module__}.{other.__qualname__}; "
                f"give {cls.__qualname__} another `type`."
            )
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

    def of_heads(self, first: int, count: int) -> "Pattern":
        """What `count` heads see, from number `first` on, where they are numbered from 0."""
        if first % self.head_period == count % self.head_period == 0:
            return self
        patterns = tuple(self.for_head(first + head) for head in range(count))
        return patterns[0] if len(set(patterns)) == 1 else PerHead(patterns)

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

    # Facts: where a query's keys lie

    key_step = 1  # what a query sees lies a multiple of so many positions away

    def interval(self, query) -> tuple[Any, Any] | None:
        """(low, high): among the keys that lie a multiple of `key_step` away, `query` sees just those in [low, high).

        Integers and tensors alike, neither end ever decreasing; ends may lie beyond the sequence. None if it is no
        interval.
        """
        return None

    @property
    def is_full(self) -> bool:
        """Does every query see every key?"""
        return False

    @property
    def in_columns(self) -> "Pattern | None":
        """With a `key_step`: what the tokens of a column (every so many-th) show each other, counted in the column."""
        return None

    @property
    def summary_keys(self) -> SummaryKeys | None:
        """The keys that are seen, if they are the same few of every block for all queries."""
        return None

    def picks(self, start: torch.Tensor) -> torch.Tensor | None:
        """[R, J] all keys that the runs of queries (`block_span`) from the positions [R] on see; None if not known.

        J is the same for all runs; positions below 0 are no keys, else each is there once.
        """
        return None

    def block_span(self, query: int) -> tuple[int, int] | None:
        """(start, end) of the run of queries, this one among them, that all see the same keys; None if there is none.

        Runs follow each other without a gap.
        """
        return None

    def candidates(self, start: int, end: int, stop: int) -> torch.Tensor:
        """Ascending positions below `stop` among which are all keys that the queries [start, end) see."""
        if self.summary_keys is not None:
            keys = torch.arange(stop)
            return keys[self.visible(0, start, keys)]
        last = stop if self.interval(0) is None else min(self.interval(end - 1)[1], stop)
        keys = torch.arange(min(self.first_key(start), last), last)
        return keys if end - start >= self.key_step else keys[(keys - start) % self.key_step < end - start]

    def reads(self, query: torch.Tensor, first: torch.Tensor | int, count: int) -> torch.Tensor | None:
        """[R, J] positions among which are all keys of the past that queries [R, 1] see; J is the same for all queries.

        There are `count` keys from position `first` on; positions may lie outside, else each is there once. None: read
        all.
        """
        if self.summary_keys is not None:
            block, column, width = self.summary_keys
            blocks = (first // block + _up_to(-(-count // block) + 1, query)) * block
            return (blocks[:, :, None] + column + _up_to(width, query)[:, None]).flatten(1).expand(len(query), -1)
        if self.interval(0) is None or self.is_full:
            return None
        if self.reach == math.inf:
            return first + (query - first) % self.key_step + self.key_step * _up_to(-(-count // self.key_step), query)
        return self.interval(query)[0] + self.key_step * _up_to(self.reach // self.key_step + 1, query)

    # Facts: what the past is needed for

    @property
    def period(self) -> int | None:
        """By how many positions queries and keys can be moved together without a change; None if that is not known."""
        return None

    @property
    def reach(self) -> float:
        """No query sees a key of its past that is farther away; infinite where there is no bound."""
        return math.inf

    def meets(self, distance: torch.Tensor) -> torch.Tensor:
        """[L] bool: can a query see a key at this distance, 0 or more, in its past? True where it is not known."""
        return (distance <= self.reach) & (distance % self.key_step == 0)

    def first_key(self, query):
        """No query at this position or a later one sees a key before the one returned; integers and tensors alike."""
        if self.interval(query) is not None:
            return _at_least(0, self.interval(query)[0])
        return query * 0 if self.reach == math.inf else _at_least(0, query - self.reach)

    def last_query(self, key):
        """No query after the one returned sees `key`; integers and tensors alike."""
        return key + (FAR if self.reach == math.inf else self.reach)

    @property
    def num_positions(self) -> int | None:
        """How many positions there are; None where sequences may be of any length."""
        return None

    def within(self, window: int) -> "Pattern":
        """What the pattern shows of a causal query's last `window` positions, its own included."""
        return self if self.reach < window else intersect(self, Local(window))


def check_count(pattern: Pattern, field: str, lowest: int = 1) -> None:
    value = getattr(pattern, field)
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"{type(pattern).__name__}.{field} must be an integer of at least {lowest}, got {value!r}.")


def _up_to(length: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(length, device=like.device)[None]


# ---------------------------------------------------------------------------------------------------------------------
# Sequences


@dataclass(frozen=True)
class Full(Pattern):
    """Every key."""

    type: ClassVar[str] = "full"
    is_full = True
    period = 1

    def visible(self, head, query, key):
        return query - key == query - key

    def interval(self, query):
        return query - FAR, query + FAR

    @property
    def in_columns(self) -> "Full":
        return self


@dataclass(frozen=True)
class Local(Pattern):
    """Keys less than `window` positions away, the query's own included: |i - j| < window.

    With causality this is the first head of strided attention as its authors' code has it (the window holds `window`
    keys; the paper's text has one more). With a `dilation` only every so many-th position counts: `window` of those on
    either side, the dilated sliding window of Beltagy et al. 2020 (arXiv:2004.05150), section 3.1.
    """

    type: ClassVar[str] = "local"
    window: int
    dilation: int = 1
    period = 1

    def __post_init__(self) -> None:
        check_count(self, "window")
        check_count(self, "dilation")

    def visible(self, head, query, key):
        near = abs(query - key) < self.window * self.dilation
        return near if self.dilation == 1 else near & ((query - key) % self.dilation == 0)

    @property
    def key_step(self) -> int:
        return self.dilation

    def interval(self, query):
        return query - self.reach, query + self.reach + 1

    @property
    def in_columns(self) -> "Local":
        return Local(self.window)

    @property
    def reach(self) -> int:
        return (self.window - 1) * self.dilation


@dataclass(frozen=True)
class Strided(Pattern):
    """The column part of strided attention: every `stride`-th key, (i - j) mod stride = 0."""

    type: ClassVar[str] = "strided"
    stride: int
    in_columns = Full()
    period = 1

    def __post_init__(self) -> None:
        check_count(self, "stride")

    def visible(self, head, query, key):
        return (query - key) % self.stride == 0

    @property
    def key_step(self) -> int:
        return self.stride

    def interval(self, query):
        return query - FAR, query + FAR

    @property
    def is_full(self) -> bool:
        return self.stride == 1


@dataclass(frozen=True)
class FixedBlock(Pattern):
    """First part of fixed attention: keys of the query's own block, floor(j / block) = floor(i / block)."""

    type: ClassVar[str] = "fixed_block"
    block: int

    def __post_init__(self) -> None:
        check_count(self, "block")

    def visible(self, head, query, key):
        return query // self.block == key // self.block

    def interval(self, query):
        start = query // self.block * self.block
        return start, start + self.block

    def block_span(self, query):
        return self.interval(query)

    @property
    def period(self) -> int:
        return self.block

    @property
    def reach(self) -> int:
        return self.block - 1

    def last_query(self, key):
        return self.interval(key)[1] - 1


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

    @property
    def summary_keys(self) -> SummaryKeys:
        return SummaryKeys(self.block, self.first_column(0), self.summary)

    @property
    def period(self) -> int:
        return self.block

    def last_query(self, key):
        return key * 0 + FAR * self.visible(0, key, key)


@dataclass(frozen=True)
class Sink(Pattern):
    """The first `count` keys of a sequence, whatever the query: attention sinks, `Union([Local(window), Sink(4)])`.

    Beside a window they keep a language model that was trained without one at its perplexity (Xiao et al. 2023,
    section 3.2: StreamingLLM). Positions stay those of the text, where StreamingLLM counts them in its cache; so texts
    may be as long as the model knows positions.
    """

    type: ClassVar[str] = "sink"
    count: int

    def __post_init__(self) -> None:
        check_count(self, "count")

    def visible(self, head, query, key):
        return (key < self.count) & (query == query)

    @property
    def summary_keys(self) -> SummaryKeys:
        return SummaryKeys(FAR, 0, self.count)

    def candidates(self, start, end, stop):
        return torch.arange(min(self.count, stop))

    def reads(self, query, first, count):
        return _up_to(self.count, query).expand(len(query), -1)

    def last_query(self, key):
        return key * 0 + FAR * self.visible(0, key, key)


@dataclass(frozen=True)
class RandomBlocks(Pattern):
    """Each block of queries sees `count` blocks of keys drawn at random.

    The random attention of Zaheer et al. 2020 (arXiv:2007.14062), section 2 and appendix D. The draw is a hash of
    `seed` and the block's number, so that it is the same wherever it is asked for: without a `length` among the earlier
    blocks, for causal models; with the `length` of the sequence among all of them. One block is drawn from each of
    `count` equal ranges, so that none is drawn twice; where there are no more blocks than that, all are seen.
    """

    type: ClassVar[str] = "random_blocks"
    block: int
    count: int
    seed: int = 0
    length: int | None = None

    def __post_init__(self) -> None:
        check_count(self, "block")
        check_count(self, "count")
        check_count(self, "seed", lowest=0)
        if self.length is not None:
            check_count(self, "length")

    def visible(self, head, query, key):
        query_block, key_block = query // self.block, key // self.block
        seen = query != query
        for drawn, exists in self._drawn(query_block):
            seen = seen | (exists & (key_block == drawn))
        return seen

    def _drawn(self, query_block) -> Iterator[tuple[Any, Any]]:
        """(number, whether there is one) of each block that a block of queries sees; integers and tensors alike."""
        blocks = query_block if self.length is None else -(-self.length // self.block)
        for draw in range(self.count):
            low, high = draw * blocks // self.count, (draw + 1) * blocks // self.count
            exists = high > low + query_block * 0
            yield low + _hash(query_block, draw, self.seed) % (high - low + (high == low)), exists

    def block_span(self, query):
        start = query // self.block * self.block
        return start, start + self.block

    def candidates(self, start, end, stop):
        blocks = range(start // self.block, (end - 1) // self.block + 1)
        drawn = {number for block in blocks for number, exists in self._drawn(block) if exists}
        starts = torch.tensor(sorted(drawn), dtype=torch.long)[:, None] * self.block
        keys = (starts + torch.arange(self.block)).flatten()
        return keys[keys < stop]

    def reads(self, query, first, count):
        return self.picks(query[:, 0])

    def picks(self, start):
        drawn = self._drawn(start[:, None] // self.block)
        numbers = torch.cat([torch.where(exists, number, -1) for number, exists in drawn], dim=1)
        return _keys_of_blocks(numbers, self.block)


@dataclass(frozen=True)
class BlockTable(Pattern):
    """Each block of queries sees the blocks of keys that a table lists for it, for each head.

    What an implementation of random blocks (Zaheer et al. 2020, arXiv:2007.14062) once drew. Head h follows
    `table[h mod len(table)]`, whose i-th entry lists the numbers of the key blocks that the i-th block of queries sees;
    later blocks of queries see none.
    """

    type: ClassVar[str] = "block_table"
    block: int
    table: tuple[tuple[tuple[int, ...], ...], ...]

    def __post_init__(self) -> None:
        check_count(self, "block")
        if not self.table or not all(self.table):
            raise ValueError("BlockTable.table must have at least one head, and each at least one block of queries.")
        table = tuple(tuple(tuple(row) for row in head) for head in self.table)
        for row in (row for head in table for row in head):
            if any(isinstance(number, bool) or not isinstance(number, int) or number < 0 for number in row):
                raise ValueError(f"BlockTable.table must hold numbers of blocks from 0 on, got the row {list(row)}.")
            if len(set(row)) < len(row):
                raise ValueError(f"BlockTable.table lists a block twice in the row {list(row)}; list each once.")
        object.__setattr__(self, "table", table)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "table": [[list(row) for row in head] for head in self.table]}

    def visible(self, head, query, key):
        if not any(isinstance(value, torch.Tensor) for value in (head, query, key)):
            rows = self.table[head % len(self.table)]
            row = rows[query // self.block] if query // self.block < len(rows) else ()
            return key // self.block in row
        query, key = torch.as_tensor(query), torch.as_tensor(key)
        numbers = _numbers(self.table).to(query.device)
        row = (query // self.block).clamp(max=numbers.shape[1] - 1)
        seen = (query != query) & (key != key)
        for listed in numbers.unbind(-1):
            seen = seen | (listed[head % len(self.table), row] == key // self.block)
        return seen

    @property
    def head_period(self) -> int:
        return len(self.table)

    def for_head(self, head: int) -> "BlockTable":
        return replace(self, table=(self.table[head % len(self.table)],))

    def check_heads(self, num_heads: int) -> None:
        if num_heads % len(self.table):
            raise ValueError(
                f"BlockTable.table is for {len(self.table)} heads, which does not divide "
                f"num_attention_heads={num_heads}; give a table of a number of heads that does."
            )

    def block_span(self, query):
        start = query // self.block * self.block
        return start, start + self.block

    def picks(self, start):
        numbers = _numbers(self.table)[0].to(start.device)
        return _keys_of_blocks(numbers[(start // self.block).clamp(max=len(numbers) - 1)], self.block)

    def reads(self, query, first, count):
        return self.picks(query[:, 0])

    def candidates(self, start, end, stop):
        rows = self.table[0][start // self.block : (end - 1) // self.block + 1]
        starts = torch.tensor(sorted({number for row in rows for number in row}), dtype=torch.long) * self.block
        keys = (starts[:, None] + torch.arange(self.block)).flatten()
        return keys[keys < stop]


@lru_cache(maxsize=64)
def _numbers(table: tuple) -> torch.Tensor:
    """[heads, rows + 1, J] the blocks of a BlockTable, -1 where a row has fewer, and in a last row for all later ones.

    Cached, so that layers share them: not to be written to.
    """
    with torch.inference_mode(False):
        longest = max(1, *(len(row) for head in table for row in head))
        rows = max(len(head) for head in table)
        numbers = torch.full((len(table), rows + 1, longest), -1)
        for h, head in enumerate(table):
            for i, row in enumerate(head):
                numbers[h, i, : len(row)] = torch.tensor(row, dtype=torch.long)
        return numbers


def _keys_of_blocks(numbers: torch.Tensor, block: int) -> torch.Tensor:
    """[R, J * block] the keys of blocks [R, J]; below 0 where the number is."""
    return (numbers[:, :, None] * block + torch.arange(block, device=numbers.device)).flatten(1)


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

    @property
    def period(self) -> int:
        return self.block

    def candidates(self, start, end, stop):
        return _candidates_of_all(self.parts, start, end, stop)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


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
    """Local attention in one dimension: all queries of a block see the block and `flange` positions before it, and
    `flange_after` behind it, as the neighbouring blocks of Zaheer et al. 2020 (arXiv:2007.14062) are."""

    type: ClassVar[str] = "block_1d"
    block: int
    flange: int
    flange_after: int = 0

    def __post_init__(self) -> None:
        check_count(self, "block")
        check_count(self, "flange", lowest=0)
        check_count(self, "flange_after", lowest=0)

    def visible(self, head, query, key):
        low, high = self.interval(query)
        return (key >= low) & (key < high)

    def interval(self, query):
        start = query // self.block * self.block
        return start - self.flange, start + self.block + self.flange_after

    def block_span(self, query: int) -> tuple[int, int]:
        start = query // self.block * self.block
        return start, start + self.block

    @property
    def period(self) -> int:
        return self.block

    @property
    def reach(self) -> int:
        return self.flange + self.block - 1

    def last_query(self, key):
        return (key + self.flange) // self.block * self.block + self.block - 1


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

    @property
    def num_positions(self) -> int:
        return math.prod(self._bound_grid())

    def block_span(self, query: int) -> tuple[int, int]:
        row, column = self.place(query)
        return self._span(row // self.height * self.height, column // self.width * self.width)

    def first_key(self, query):
        _, columns, channels = self._bound_grid()
        top = self.place(query)[0] // self.height * self.height
        return _at_least(0, top - self.flange_height) // self.height * self.height * columns * channels

    def last_query(self, key):
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


# ---------------------------------------------------------------------------------------------------------------------
# Patterns of patterns


class _Composite(Pattern):
    """A pattern made of patterns; its dict holds their dicts."""

    patterns: Sequence[Pattern]

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

    def bind(self, grid: tuple[int, ...]) -> Pattern:
        return replace(self, patterns=tuple(p.bind(grid) for p in self.patterns))

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, "patterns": [p.to_dict() for p in self.patterns]}

    # Facts of what any of the patterns shows

    @property
    def period(self) -> int | None:
        periods = [p.period for p in self.patterns]
        return None if None in periods else math.lcm(*periods)

    @property
    def reach(self) -> float:
        return max(p.reach for p in self.patterns)

    def meets(self, distance):
        return torch.stack([p.meets(distance) for p in self.patterns]).any(dim=0)

    def first_key(self, query):
        return _pairwise(_at_most, (p.first_key(query) for p in self.patterns))

    def last_query(self, key):
        return _pairwise(_at_least, (p.last_query(key) for p in self.patterns))

    @property
    def num_positions(self) -> int | None:
        return next((p.num_positions for p in self.patterns if p.num_positions is not None), None)

    def candidates(self, start, end, stop):
        return _candidates_of_all(self.patterns, start, end, stop)

    def within(self, window: int) -> Pattern:
        return replace(self, patterns=tuple(p.within(window) for p in self.patterns))


@dataclass(frozen=True)
class Union(_Composite):
    """Keys that any of `patterns` shows: a "merged head" (Child et al. 2019, section 4.2, equation 8)."""

    type: ClassVar[str] = "union"
    patterns: Sequence[Pattern]

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

    def within(self, window: int) -> Pattern:
        return Union(tuple(part.within(window) for part in self.parts))


@dataclass(frozen=True)
class Intersection(_Composite):
    """Keys that all of `patterns` show, such as a pattern inside a model's own sliding window."""

    type: ClassVar[str] = "intersection"
    patterns: Sequence[Pattern]

    def visible(self, head, query, key):
        first, *rest = (p.visible(head, query, key) for p in self.patterns)
        for seen in rest:
            first = first & seen
        return first

    def for_head(self, head: int) -> "Intersection":
        return Intersection(tuple(p.for_head(head) for p in self.patterns))

    @property
    def reach(self) -> float:
        return min(p.reach for p in self.patterns)

    def meets(self, distance):
        return torch.stack([p.meets(distance) for p in self.patterns]).all(dim=0)

    def first_key(self, query):
        return _pairwise(_at_least, (p.first_key(query) for p in self.patterns))

    def last_query(self, key):
        return _pairwise(_at_most, (p.last_query(key) for p in self.patterns))

    def candidates(self, start, end, stop):
        return min((p.candidates(start, end, stop) for p in self.patterns), key=len)

    def reads(self, query, first, count):
        shortest = None  # all that is shown stands in the list of each; torch.compile knows no min with a key
        for pattern in self.patterns:
            found = _reads_of_all(pattern.parts, query, first, count)
            if found is not None and (shortest is None or found.shape[-1] < shortest.shape[-1]):
                shortest = found
        return shortest

    def within(self, window: int) -> Pattern:
        return self if self.reach < window else intersect(self, Local(window))


@dataclass(frozen=True)
class PerHead(_Composite):
    """Head h follows `patterns[h mod len(patterns)]`: "multi-head" (Child et al. 2019, section 4.2, equation 9).

    The number of heads must be a multiple of the number of patterns.
    """

    type: ClassVar[str] = "per_head"
    patterns: Sequence[Pattern]

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


# ---------------------------------------------------------------------------------------------------------------------
# Reading and combining


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


def check_patterns(patterns: Mapping | Pattern | Iterable, num_layers: int, num_heads: int) -> list[Pattern]:
    """`patterns_for_layers`, but raises ValueError, too, where a pattern cannot be dealt out to `num_heads` heads."""
    checked = patterns_for_layers(patterns, num_layers)
    for pattern in checked:
        pattern.check_heads(num_heads)
    return checked


def intersect(first: Pattern, second: Pattern) -> Pattern:
    """Keys that both show, without an Intersection where one pattern alone says it."""
    if first.is_full or contains(first, second):
        return second
    return first if second.is_full or contains(second, first) else Intersection((first, second))


@lru_cache(maxsize=256)
def contains(outer: Pattern, inner: Pattern) -> bool:
    """Does `outer` show whatever `inner` shows? False also where their facts do not say it."""
    if outer == inner or outer.is_full:
        return True
    if _in_first_keys(outer) and _in_first_keys(inner):
        return outer.summary_keys.count >= inner.summary_keys.count
    periods = outer.period, inner.period
    if None in periods or inner.interval(0) is None or outer.interval(0) is None:
        return False
    period = math.lcm(*periods)
    if period > 1 << 16:
        return False
    query = torch.arange(period) + math.lcm(period, outer.key_step) * 8  # far enough from 0 for every phase
    (low, high), (inner_low, inner_high) = outer.interval(query), inner.interval(query)
    inside = bool(((low <= inner_low) & (inner_high <= high)).all())
    own_only = bool(((inner_low > query - inner.key_step) & (inner_high <= query + inner.key_step)).all())
    return inside and (own_only or inner.key_step % outer.key_step == 0)


def _in_first_keys(pattern: Pattern) -> bool:
    """Does it show the first keys of the sequence and no others?"""
    return pattern.summary_keys is not None and pattern.summary_keys[:2] == (FAR, 0)


@lru_cache(maxsize=64)
def distances_met(pattern: Pattern, reach: int) -> torch.Tensor:
    """The distances below `reach`, descending, at which a query can see a key of its past.

    Cached, so that layers share them: not to be written to.
    """
    with torch.inference_mode(False):
        distances = torch.arange(reach - 1, -1, -1)
        return distances[pattern.meets(distances)]


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


def check_known(config, name: str, allowed: Iterable[str]) -> None:
    """Raise ValueError if the config's field `name` is none of the `allowed` names."""
    value = getattr(config, name)
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown{nearest(value, allowed)}")


def _check_fixed(pattern: "Fixed | FixedSummary") -> None:
    for field in ("block", "summary", "sub_blocks"):
        check_count(pattern, field)
    if isinstance(pattern.shift, bool) or not isinstance(pattern.shift, int) or pattern.shift < 0:
        raise ValueError(f"{type(pattern).__name__}.shift must be an integer of at least 0, got {pattern.shift!r}.")
    needed = (pattern.shift + pattern.sub_blocks) * pattern.summary
    if needed > pattern.block:
        raise ValueError(
            f"{type(pattern).__name__} needs (shift + sub_blocks) * summary <= block, "
            f"got ({pattern.shift} + {pattern.sub_blocks}) * {pattern.summary} = {needed} > {pattern.block}."
        )


def _checked_grid(grid: Iterable[int]) -> tuple[int, int, int]:
    values = tuple(grid)
    if len(values) != 3 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
        raise ValueError(f"Block2D.grid must be (rows, columns, channels), each at least 1, got {list(values)}.")
    return values


def _candidates_of_all(patterns: Iterable[Pattern], start: int, end: int, stop: int) -> torch.Tensor:
    """What any of the patterns may show, each position once."""
    return torch.cat([p.candidates(start, end, stop) for p in patterns]).unique()


def _reads_of_all(parts: Iterable[Pattern], query: torch.Tensor, first, count: int) -> torch.Tensor | None:
    """What any of the parts reads, each position once; None if one of them reads all."""
    found, before = [], []
    for part in parts:
        places = part.reads(query, first, count)
        if places is None:
            return None
        shown = part.visible(0, query, places)
        for other in before:  # which has it in its own list
            shown = shown & ~other.visible(0, query, places)
        found.append(torch.where(shown, places, -1))
        before.append(part)
    return torch.cat(found, dim=-1)


def _pairwise(choose, values: Iterable):
    first, *rest = values
    for value in rest:
        first = choose(first, value)
    return first


def _at_most(limit, value):
    """min(limit, value); integers, arrays and tensors alike."""
    return limit - (limit - value) * (value < limit)


def _at_least(limit, value):
    """max(limit, value); integers, arrays and tensors alike."""
    return limit + (value - limit) * (value > limit)


def _hash(number, draw: int, seed: int):
    """A random-looking integer of 31 bits; no product exceeds 63 bits, so that tensors and integers agree."""
    mask = 0x7FFFFFFF
    mixed = (number * 0x343FD + draw * 0x269EC3 + seed * 0x41C64E6D % mask + 0x3039) & mask
    for factor in (0x2C1B3C6D, 0x297A2D39):
        mixed = ((mixed ^ (mixed >> 15)) * factor) & mask
    return mixed ^ (mixed >> 13)
