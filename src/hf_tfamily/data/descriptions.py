"""What sources there are, what they take, and which recipes of the package read them."""

import inspect
import json
import re
from collections.abc import Callable
from typing import NamedTuple

from ..modeling.attention_patterns import nearest
from ..value_types import annotations_of
from . import (
    SOURCES,
    AlgorithmPairs,
    EnlargementPairs,
    LabelledImages,
    MaskedTexts,
    TextStreams,
    TokenSequences,
    TranslationPairs,
)
from .limits import LIMITS

LIMIT_MEANINGS = {
    LIMITS[0]: "the most examples to train on; of a stream, tokens",
    LIMITS[1]: "the most that are held out",
}


# What models learn from each kind of data.
KINDS = {
    TokenSequences: "the next value",
    TextStreams: "the next token",
    TranslationPairs: "translation",
    EnlargementPairs: "enlarging pictures",
    LabelledImages: "telling pictures apart",
    MaskedTexts: "hidden tokens",
    AlgorithmPairs: "algorithms",
}


class Argument(NamedTuple):
    """One argument of a source: its type and default in words, and what it means."""

    name: str
    kind: str
    default: str
    meaning: str


def sentence(source: str) -> str:
    """What a source is: the first paragraph of its docstring."""
    return " ".join(inspect.getdoc(_known(source)).split("\n\n")[0].split())


def list_sources() -> list[tuple[str, str]]:
    """Each source, and what its data are for."""
    return [(name, KINDS[inspect.signature(source).return_annotation]) for name, source in SOURCES.items()]


def recipes_of(source: str) -> list[str]:
    """How to train on a source: the command that makes a recipe for own data, and recipes of the package."""
    from ..new_recipes import STARTERS  # which stands on everything that trains
    from ..recipes import list_recipes, load_recipe

    own = STARTERS.get(source)
    lines = []
    if own is not None:
        paths = " ".join(path.upper().replace(" ", "_") for path in own.paths)
        lines += ["", f"For your own: hf-tfamily new-recipe {source} {paths}  (--system {', '.join(own.bases)})"]
    names = [name for name in list_recipes() if load_recipe(name).data["source"] == source]
    return lines + (["", f"Recipes that read it: {', '.join(names)}"] if names else [])


def arguments(source: str) -> list[Argument]:
    """All arguments of a source, the limits that every source takes among them."""
    function = _known(source)
    hints, meanings = annotations_of(function), _meanings(function)
    own = [
        Argument(name, _kind(hints[name]), _default(parameter.default), meanings.get(name, ""))
        for name, parameter in inspect.signature(function).parameters.items()
    ]
    return own + [Argument(name, "int | None", "null", meaning) for name, meaning in LIMIT_MEANINGS.items()]


def _known(source: str) -> Callable:
    if source not in SOURCES:
        raise ValueError(f"No source is called {source!r}{nearest(source, SOURCES)}")
    return SOURCES[source]


def _meanings(function: Callable) -> dict[str, str]:
    """Argument -> what the docstring's `Args:` says of it; some share a line."""
    inside = inspect.getdoc(function).partition("Args:\n")[2]
    found = {}
    for entry in re.split(r"\n(?=    \w)", inside):
        names, colon, meaning = entry.strip().partition(":")
        if colon:
            found |= dict.fromkeys((name.strip() for name in names.split(",")), " ".join(meaning.split()))
    return found


def _kind(hint: object) -> str:
    name = hint.__name__ if isinstance(hint, type) and not getattr(hint, "__args__", ()) else str(hint)
    return name.replace("typing.", "").replace("collections.abc.", "")


def _default(default: object) -> str:
    """As YAML has it; empty where there is none."""
    if default is inspect.Parameter.empty:
        return ""
    return default if isinstance(default, str) else json.dumps(default)
