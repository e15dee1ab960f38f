"""What a pattern is: data that says which keys a query may see.

A pattern answers one question, `visible(head, query, key)`, by arithmetic on *positions of tokens*. It says nothing
about causality, padding or packing: what a query finally sees is its pattern AND the model's own causal rule AND the
padding AND the packing (see attention_masks.py).
"""

from dataclasses import fields
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


def check_count(pattern: Pattern, field: str, lowest: int = 1) -> None:
    value = getattr(pattern, field)
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"{type(pattern).__name__}.{field} must be an integer of at least {lowest}, got {value!r}.")
