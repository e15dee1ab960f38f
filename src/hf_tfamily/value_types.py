"""Do values of recipes and callers have the types that annotations say? What is wrong is said in a reader's words."""

import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from numbers import Integral, Real
from os import PathLike
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch

WORDS = {
    bool: "true or false",
    int: "a number without a fraction",
    float: "a number",
    str: "text",
    NoneType: "null",
}


def check_value(value: Any, annotation: Any, name: str) -> None:
    """Raise ValueError, naming field, value and what is allowed, unless `value` is of the annotated type."""
    if not fits(value, annotation):
        raise ValueError(f"{name} must be {in_words(annotation)}, got {value!r}.")


def check_arguments(function: Callable, arguments: Mapping[str, Any], prefix: str = "") -> None:
    """Raise ValueError unless every argument is of the type that `function` annotates; unknown names are passed by."""
    hints, parameters = annotations_of(function), inspect.signature(function).parameters
    for name, value in arguments.items():
        if name in hints and not _is_default(value, parameters[name].default):
            check_value(value, hints[name], prefix + name)


def annotations_of(what: Any) -> dict[str, Any]:
    """The annotations of a function or a class, resolved; those are left out that name what cannot be found."""
    found = {}
    for owner in reversed(what.__mro__) if isinstance(what, type) else [what]:
        names = vars(sys.modules[owner.__module__]) | {"torch": torch}  # which Transformers imports for checkers alone
        for name, annotation in inspect.get_annotations(owner).items():
            try:
                found |= typing.get_type_hints(SimpleNamespace(__annotations__={name: annotation}), names)
            except (NameError, TypeError, AttributeError):
                found.pop(name, None)
    return found


def fits(value: Any, annotation: Any) -> bool:
    """Is `value` of the annotated type? Lists do for tuples, whole numbers for numbers, paths for text.

    True and false are no numbers, nor is NaN. What cannot be told, such as a type variable, is taken for granted.
    """
    kind, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if kind in (Union, UnionType):
        return any(fits(value, choice) for choice in arguments)
    if kind is Annotated:
        return fits(value, arguments[0])
    if kind is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if kind in (None, NoneType):
        return value is None
    if kind in (int, float):
        is_number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        return is_number and value == value  # NaN is not even equal to itself
    if kind is Any or not isinstance(kind, type):
        return True
    if kind is str or issubclass(kind, Enum):
        return isinstance(value, (str, PathLike, kind))
    if issubclass(kind, Mapping) or typing.is_typeddict(kind):
        return isinstance(value, Mapping) and _mapping_fits(value, arguments)
    if issubclass(kind, Iterable):
        return _items_fit(value, arguments)
    return kind is object or isinstance(value, kind)


def in_words(annotation: Any) -> str:
    """The annotated type as a reader of YAML would put it."""
    kind, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if kind in (Union, UnionType):
        return " or ".join(dict.fromkeys(in_words(choice) for choice in arguments))
    if kind is Annotated:
        return in_words(arguments[0])
    if kind is Literal:
        return " or ".join(repr(choice) for choice in arguments)
    if kind in WORDS:
        return WORDS[kind]
    if not isinstance(kind, type):
        return str(annotation)
    if issubclass(kind, Enum):
        return f"one of {', '.join(str(member.value) for member in kind)}"
    if issubclass(kind, Mapping) or typing.is_typeddict(kind):
        return "a mapping"
    if issubclass(kind, Iterable):
        inside = [WORDS.get(argument, "") for argument in arguments if argument is not ...]
        return "a list" if not inside or not inside[0] else f"a list, each entry {inside[0]}"
    return kind.__name__


def _is_default(value: Any, default: Any) -> bool:
    """Some annotations leave out the default's own type, most often None."""
    return type(value) is type(default) and value == default


def _mapping_fits(value: Mapping, arguments: tuple) -> bool:
    if len(arguments) != 2:
        return True
    return all(fits(key, arguments[0]) and fits(inside, arguments[1]) for key, inside in value.items())


def _items_fit(value: Any, arguments: tuple) -> bool:
    """Entries are looked at where that uses nothing up; how many there are is for whoever takes them to say."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        return False
    if not isinstance(value, (list, tuple)) or not arguments:
        return True
    kinds = [argument for argument in arguments if argument is not ...]
    return all(fits(item, kinds[min(place, len(kinds) - 1)]) for place, item in enumerate(value))
