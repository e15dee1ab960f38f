"""How patterns and masks of any loaded copy of modeling/ reach the engine: by their data, never by their class.

A checkpoint's own code has its own classes. Their dicts become the installed package's patterns; a type that the
package does not know (somebody's own class) keeps its object, and is computed by its own `visible`.
"""

import json
from dataclasses import fields
from functools import lru_cache

import torch

from ..modeling.attention import PROJECT, SEAM, VisibleKeys
from ..modeling.attention_patterns import PATTERN_TYPES, Pattern, grid_of, pattern_from_dict, walk

# Patterns of other people's classes, which texts name by number: two classes may say the same of themselves, and one
# may be defined anew. None is ever dropped, since a backward or a compiled graph may name it.
_OTHERS: list[Pattern] = []


class ForeignPattern(Pattern):
    """A pattern whose type the package does not know: what it says of itself, and no facts beyond it."""

    def __init__(self, theirs):
        self.theirs = theirs
        self.type = f"foreign {theirs.type}"

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
    inner, known = getattr(theirs, "patterns", None), PATTERN_TYPES.get(theirs.type)
    try:
        if known is not None and inner is not None:
            mine = known(tuple(own_pattern(pattern) for pattern in inner))
        else:
            mine = pattern_from_dict(theirs.to_dict())
    except ValueError:  # of a type or with a field that is not known
        return ForeignPattern(theirs)
    if mine.to_dict() != theirs.to_dict():
        return ForeignPattern(theirs)
    grid = getattr(theirs, "grid", None)
    return mine if grid is None else mine.bind(grid)


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
    text = json.dumps([pattern.to_dict(), grid_of(pattern)], sort_keys=True)
    if all(type(inner).__module__ == Pattern.__module__ for inner in walk(pattern)):
        return text
    if pattern not in _OTHERS:
        _OTHERS.append(pattern)
    return f"{_OTHERS.index(pattern)} {text}"


@lru_cache(maxsize=256)
def from_text(text: str) -> Pattern:
    number, described = text.split(" ", 1) if text[0].isdigit() else ("", text)
    numbered = _OTHERS[int(number) :][:1] if number else []
    if numbered and _cached_text(numbered[0]) == text:  # else the text is of another process
        return numbered[0]
    values, grid = json.loads(described)
    bare = pattern_from_dict(values)
    return bare if grid is None else bare.bind(grid)
