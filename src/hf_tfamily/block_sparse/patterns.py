"""How patterns and masks of any loaded copy of modeling/ reach the engine: by their data, never by their class.

A checkpoint's own code has its own classes. Their dicts become the installed package's patterns; a type that the
package does not know (somebody's own class) keeps its object, and is computed by its own `visible`.
"""

import json
from collections import OrderedDict
from dataclasses import fields
from functools import lru_cache

import torch

from ..modeling.attention import PROJECT, SEAM, VisibleKeys
from ..modeling.attention_patterns import PATTERN_TYPES, Pattern, grid_of, pattern_from_dict, walk

_FOREIGN: OrderedDict[str, "ForeignPattern"] = OrderedDict()
_MOST_FOREIGN = 64


class ForeignPattern(Pattern):
    """A pattern whose type the package does not know: what it says of itself, and no facts beyond it."""

    def __init__(self, theirs):
        self.theirs = theirs

    def visible(self, head, query, key):
        return self.theirs.visible(head, query, key)

    @property
    def head_period(self) -> int:
        return self.theirs.head_period

    def for_head(self, head: int) -> Pattern:
        return own_pattern(self.theirs.for_head(head))

    def check_heads(self, num_heads: int) -> None:
        self.theirs.check_heads(num_heads)

    def to_dict(self) -> dict:
        return self.theirs.to_dict()

    def __eq__(self, other) -> bool:
        return isinstance(other, ForeignPattern) and self.theirs == other.theirs

    def __hash__(self) -> int:
        return hash(self.theirs)


def own_pattern(pattern) -> Pattern:
    """The installed package's pattern for one of any copy."""
    return pattern if isinstance(pattern, Pattern) else _own_pattern(pattern)


@lru_cache(maxsize=256)
def _own_pattern(theirs) -> Pattern:
    if any(inner.type not in PATTERN_TYPES for inner in _inside(theirs)):
        return ForeignPattern(theirs)
    mine, grid = pattern_from_dict(theirs.to_dict()), _grid(theirs)
    return mine if grid is None else mine.bind(grid)


def _inside(theirs):
    """The pattern and every pattern inside it."""
    yield theirs
    for inner in getattr(theirs, "patterns", ()):
        yield from _inside(inner)


def _grid(theirs) -> tuple[int, ...] | None:
    return next((inner.grid for inner in _inside(theirs) if getattr(inner, "grid", None) is not None), None)


def own_mask(mask) -> VisibleKeys:
    """The installed package's VisibleKeys for one of any copy; worked out once for all layers of a step.

    Raises:
        ValueError: if it is of a newer version than this engine knows.
    """
    if isinstance(mask, VisibleKeys):
        return mask
    if getattr(mask, "seam", 1) > SEAM:
        raise ValueError(
            f"The model's code is newer than the installed hf_tfamily (seam {mask.seam}, {SEAM} is known); "
            f"upgrade hf_tfamily ({PROJECT}), or use attn_implementation='sdpa'."
        )
    mine = getattr(mask, "_of_engine", None)
    if mine is None:
        values = {f.name: getattr(mask, f.name) for f in fields(VisibleKeys) if f.init and hasattr(mask, f.name)}
        mine = VisibleKeys(**{**values, "pattern": own_pattern(mask.pattern)})
        object.__setattr__(mask, "_of_engine", mine)
    return mine


# ---------------------------------------------------------------------------------------------------------------------
# Operators take strings


@torch.compiler.assume_constant_result  # torch.compile cannot look into json
def to_text(pattern: Pattern) -> str:
    return _cached_text(pattern)


@lru_cache(maxsize=256)
def _cached_text(pattern: Pattern) -> str:
    foreign = any(isinstance(inner, ForeignPattern) for inner in walk(pattern))
    text = json.dumps([pattern.to_dict(), grid_of(pattern)], sort_keys=True)
    if foreign:
        text = f"foreign {len(_FOREIGN)} {text}"
        _FOREIGN[text] = pattern
        while len(_FOREIGN) > _MOST_FOREIGN:
            _FOREIGN.popitem(last=False)
    return text


@lru_cache(maxsize=256)
def from_text(text: str) -> Pattern:
    if text in _FOREIGN:
        return _FOREIGN[text]
    values, grid = json.loads(text)
    bare = pattern_from_dict(values)
    return bare if grid is None else bare.bind(grid)
