"""Attention patterns to look at: as arrays, as text, and in the short form in which a command line takes them.

    full                              local:window=8                     fixed:block=8,summary=2
    local:window=8+strided:stride=8   the union of patterns              (merged heads)
    local:window=8/strided:stride=8   heads take turns with patterns     (per_head)

A query sees no later key, but for windows of pictures, whose tokens see each other.

Shapes: T queries, S = T keys, H height, W width, C channels.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import yaml

from .modeling.attention_patterns import (
    PATTERN_TYPES,
    Block2D,
    Pattern,
    PerHead,
    Union,
    Window2D,
    pattern_from_dict,
    patterns_for_layers,
    walk,
)
from .modeling.image_processing_tokens import GENERATION_ORDERS

LATER, QUERY, UNSEEN = -2, -1, 0  # codes of a view; k = 1 ... MAX_PARTS is the k-th part of the pattern
MAX_PARTS = 4
MAX_LENGTH = 2048

GALLERY = (
    "full",
    "local:window=6",
    "local:window=4,dilation=3",
    "strided:stride=6",
    "local:window=6+strided:stride=6",
    "local:window=6+sink:count=2",
    "fixed_block:block=6",
    "fixed_summary:block=6,summary=2",
    "fixed:block=6,summary=1",
    "random_blocks:block=6,count=1",
    "block_1d:block=6,flange=6",
    "block_2d:height=3,width=3,flange_height=1,flange_width=2",
)


@dataclass(frozen=True)
class Panel:
    """One picture of a pattern: what a head of it sees, in a matrix and, where `shape` is given, in a grid.

    Where positions follow each other in blocks of the grid, `block` is the height and width of those.
    """

    pattern: Pattern
    length: int
    head: int = 0
    shape: Sequence[int] | None = None
    note: str = ""
    block: Sequence[int] | None = None

    @property
    def is_causal(self) -> bool:
        """Are later keys hidden?"""
        return not isinstance(self.pattern, Window2D)

    @property
    def title(self) -> str:
        return short_form(self.pattern).replace(",", ", ")

    def matrix(self) -> np.ndarray:
        """Codes [T, S]; see `matrix_view`."""
        return matrix_view(self.pattern, self.length, self.head, self.is_causal)

    def grid(self) -> np.ndarray:
        """Codes [H, W]; see `grid_view`."""
        return grid_view(self.pattern, self.shape, self.head, self.block, self.is_causal)


def gallery() -> list[Panel]:
    """Every pattern, on a 6 x 6 grid as in figure 3 of Child et al. 2019."""
    patterns = [parse_pattern(text).bind((6, 6, 1)) for text in GALLERY]
    return [panel for pattern in patterns for panel in _head_panels(pattern, 36, (6, 6), block=_block_of(pattern))]


def pattern_panels(pattern: Pattern, length: int | None = None) -> list[Panel]:
    """Panels of one pattern: four periods of it by default, as a grid of one period's width; or 3 x 3 blocks."""
    if isinstance(pattern, Window2D):
        return _window_panels([pattern])
    block = _block_of(pattern)
    if block is not None:
        grid = (3 * block[0], 3 * block[1], 1)
        return _head_panels(pattern.bind(grid), length or math.prod(grid), grid, block=block)
    width = period(pattern)
    length = length or 4 * width
    return _head_panels(pattern, length, (max(1, length // width), width))


def model_length(config: Any) -> int | None:
    """All positions of a model, if they are counted, or as many as a picture takes."""
    shape = getattr(config, "position_shape", None) or getattr(config, "grid", None)
    positions = math.prod(shape) if shape else getattr(config, "max_position_embeddings", None)
    return min(positions, MAX_LENGTH) if positions else None


def config_panels(config: Any, length: int | None = None) -> list[Panel]:
    """Panels of every distinct pattern among a model's layers, on the grid of its positions where it has one.

    Args:
        length: tokens to draw; four periods of a pattern if None.

    Raises ValueError for models that have no patterns.
    """
    if not hasattr(config, "attention_patterns"):
        raise ValueError(
            f"A {config.model_type} has no attention_patterns to draw: a query sees its segment and what it remembers."
        )
    patterns = patterns_for_layers(config.attention_patterns, config.num_hidden_layers)
    if all(isinstance(pattern, Window2D) for pattern in patterns):
        return _window_panels(patterns_for_layers(config.attention_patterns, max(config.depths)))
    shape = getattr(config, "position_shape", None) or getattr(config, "grid", None)
    shape = shape if shape and len(shape) > 1 else None
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    tokens_at_most = positions if shape is None else math.prod(shape)
    patterns = patterns if shape is None else [pattern.bind(shape) for pattern in patterns]
    block = getattr(config, "block_shape", None)
    found = []
    for pattern in dict.fromkeys(patterns):
        layers = [layer for layer, other in enumerate(patterns) if other == pattern]
        tokens = min(length or 4 * period(pattern), tokens_at_most)
        found += _head_panels(pattern, tokens, shape, _layers_note(layers, len(patterns)), block)
    return found


def _window_panels(patterns: Sequence[Window2D]) -> list[Panel]:
    """Panels of the windows of a stage's blocks, on a corner of the grid that is two windows wide and high."""
    found = []
    for pattern in dict.fromkeys(patterns):
        side = 2 * pattern.size
        blocks = [block for block, other in enumerate(patterns) if other == pattern]
        note = _layers_note(blocks, len(patterns), "block") if len(patterns) > 1 else ""
        found.append(Panel(pattern.bind((side, side)), side**2, shape=(side, side), note=note))
    return found


def _block_of(pattern: Pattern) -> tuple[int, int] | None:
    """Height and width of the blocks in whose order the pattern counts positions, if it does."""
    blocks = ((inner.height, inner.width) for inner in walk(pattern) if isinstance(inner, Block2D))
    return next(blocks, None)


def _head_panels(
    pattern: Pattern,
    length: int,
    shape: Sequence[int] | None,
    note: str = "",
    block: Sequence[int] | None = None,
) -> list[Panel]:
    """A panel for each head that sees something of its own."""
    heads = range(pattern.head_period)
    notes = [f"head {head} of every {len(heads)}" if len(heads) > 1 else "" for head in heads]
    return [
        Panel(pattern, length, head, shape, ", ".join(filter(None, [note, head_note])), block)
        for head, head_note in zip(heads, notes)
    ]


def _layers_note(layers: list[int], total: int, what: str = "layer") -> str:
    """ "every layer", "layers 0, 2, 4", or "layers 0, 4, 8 ... (32 of 128)"."""
    if len(layers) == total:
        return f"every {what}"
    if len(layers) <= 4:
        return f"{what}{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
    return f"{what}s {', '.join(map(str, layers[:3]))} ... ({len(layers)} of {total})"


def parse_pattern(text: str) -> Pattern:
    """The pattern that JSON or the short form describes. Raises ValueError, naming what is allowed."""
    text = text.strip()
    if text.startswith("{"):
        try:
            return pattern_from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{text!r} is not JSON: {error}") from error
    heads = [[_parse_simple(part) for part in head.split("+")] for head in text.split("/")]
    merged = [Union(parts) if len(parts) > 1 else parts[0] for parts in heads]
    return PerHead(merged) if len(merged) > 1 else merged[0]


def _parse_simple(text: str) -> Pattern:
    name, _, arguments = text.strip().partition(":")
    values = {}
    for argument in filter(None, arguments.split(",")):
        key, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"{argument!r} is not key=value; a pattern is written like fixed:block=8,summary=2.")
        values[key.strip()] = yaml.safe_load(value)
    return pattern_from_dict({"type": name, **values})


def looks_like_pattern(text: str) -> bool:
    """Is this a pattern rather than the name of a recipe?"""
    return text.startswith("{") or ":" in text or text in PATTERN_TYPES


def short_form(pattern: Pattern) -> str:
    """The short form; nested patterns that it cannot say come out as JSON."""
    kinds = {inner.type for inner in getattr(pattern, "patterns", ())}
    if pattern.type == PerHead.type and PerHead.type not in kinds:
        return " / ".join(map(short_form, pattern.patterns))
    if pattern.type == Union.type and not any(hasattr(inner, "patterns") for inner in pattern.patterns):
        return " + ".join(map(short_form, pattern.patterns))
    values = pattern.to_dict()
    if "patterns" in values:
        return json.dumps(values)
    arguments = ",".join(f"{key}={value}" for key, value in values.items() if key != "type")
    return f"{pattern.type}:{arguments}" if arguments else pattern.type


def period(pattern: Pattern) -> int:
    """The largest window, stride or block in the pattern: the width at which its picture makes sense."""
    sizes = [getattr(p, f.name) for p in walk(pattern) for f in fields(p) if f.name in ("window", "stride", "block")]
    sizes += [p.height * p.width * (p.grid or (1,))[-1] for p in walk(pattern) if isinstance(p, Block2D)]
    return max(sizes, default=8)


def matrix_view(pattern: Pattern, length: int, head: int = 0, is_causal: bool = True) -> np.ndarray:
    """Codes [T, S]: which part of the pattern shows each key to each query."""
    if not 1 <= length <= MAX_LENGTH:
        raise ValueError(f"length must be from 1 to {MAX_LENGTH}, got {length}.")
    query, key = np.arange(length)[:, None], np.arange(length)[None, :]
    view = _part_codes(pattern, head, query, key)
    if is_causal:
        view[key > query] = LATER
    return view


def grid_view(
    pattern: Pattern,
    shape: Sequence[int],
    head: int = 0,
    block: Sequence[int] | None = None,
    is_causal: bool = True,
) -> np.ndarray:
    """Codes [H, W]: which places of a grid (H, W) or (H, W, C) the query two thirds down and across can see.

    Of several channels the query is the last, and a place is seen where any of its channels is. With `block`, positions
    follow each other in blocks of this height and width.
    """
    height, width, channels = (*shape, 1)[:3]
    places = GENERATION_ORDERS["blocks" if block else "raster"](height, width, channels, block)
    place = ((2 * height // 3) * width + 2 * width // 3 + 1) * channels - 1
    query, key = np.flatnonzero(places == place)[0], np.arange(len(places))
    seen_by_query = _part_codes(pattern, head, query, key)
    if is_causal:
        seen_by_query[key > query] = LATER
    codes = np.empty_like(seen_by_query)
    codes[places] = seen_by_query
    codes = codes.reshape(height * width, channels)
    seen = np.where(codes > 0, codes, 127).min(axis=1)
    view = np.where(seen < 127, seen, codes.max(axis=1))
    view[place // channels] = QUERY
    return view.reshape(height, width)


def _part_codes(pattern: Pattern, head: int, query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """1-based number of the first part that shows `key` to `query`; UNSEEN where none does."""
    codes = np.full(np.broadcast_shapes(query.shape, key.shape), UNSEEN, np.int8)
    for number, part in reversed(list(enumerate(pattern.for_head(head).parts, start=1))):
        codes[np.broadcast_to(part.visible(head, query, key), codes.shape)] = min(number, MAX_PARTS)
    return codes


def as_text(view: np.ndarray, cells: int = 32) -> Iterator[str]:
    """A matrix view as at most `cells` lines; each mark stands for a square of pairs, the darker the more are seen."""
    size = math.ceil(len(view) / cells)
    is_causal = (view == LATER).any()
    for top in range(0, len(view), size):
        end = top + 1 if is_causal else len(view)
        blocks = (view[top : top + size, left : left + size] for left in range(0, end, size))
        yield "".join(2 * _shade(block) for block in blocks)


def _shade(block: np.ndarray) -> str:
    share = (block > 0).sum() / max(1, (block != LATER).sum())
    return "·" if share == 0 else "░▒▓█"[min(3, int(share * 4))]


def keys_per_query(view: np.ndarray) -> float:
    """How many keys a query of a matrix view sees, on average."""
    return float((view > 0).sum() / len(view))
