"""Which keys may a query see? Patterns are data: small, frozen, hashable, a plain dict and back.

    >>> pattern = Union([Local(window=4), Strided(stride=4)])
    >>> pattern.visible(0, 9, 5)
    True
    >>> pattern_from_dict(pattern.to_dict()) == pattern
    True

Here are those of sequences, and how patterns are combined and read; attention_patterns_images.py has those of pictures,
attention_patterns_base.py says what a pattern is. Local, Strided and Fixed are the factorised attention of Child et al.
2019 (arXiv:1904.10509), section 4.3.
"""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from .attention_patterns_base import PATTERN_TYPES, Pattern, check_count
from .attention_patterns_images import Block1D, Block2D, Window2D  # noqa: F401  so that their dicts are known


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
        check_count(self, "window")

    def visible(self, head, query, key):
        return abs(query - key) < self.window


@dataclass(frozen=True)
class Strided(Pattern):
    """The column part of strided attention: every `stride`-th key, (i - j) mod stride = 0."""

    type: ClassVar[str] = "strided"
    stride: int

    def __post_init__(self) -> None:
        check_count(self, "stride")

    def visible(self, head, query, key):
        return (query - key) % self.stride == 0


@dataclass(frozen=True)
class FixedBlock(Pattern):
    """First part of fixed attention: keys of the query's own block, floor(j / block) = floor(i / block)."""

    type: ClassVar[str] = "fixed_block"
    block: int

    def __post_init__(self) -> None:
        check_count(self, "block")

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


def check_patterns(patterns: Mapping | Pattern | Iterable, num_layers: int, num_heads: int) -> list[Pattern]:
    """`patterns_for_layers`, but raises ValueError, too, where a pattern cannot be dealt out to `num_heads` heads."""
    checked = patterns_for_layers(patterns, num_layers)
    for pattern in checked:
        pattern.check_heads(num_heads)
    return checked


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
