"""Recipes hold no secrets: a recipe is copied beside its model, printed, and pushed.

Tokens belong in the environment (HF_TOKEN) or where `hf auth login` keeps them.
"""

import re
from collections.abc import Iterator
from typing import Any

# How the tokens of the Hub and of other places begin, and a password within an address.
VALUES = re.compile(
    r"\b(?:hf_|api_org_|gh[opsu]_|github_pat_|glpat-|sk-|xox[abp]-|AKIA)[A-Za-z0-9_-]{12,}|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)
KEYS = re.compile(
    r"^token$|(?:hub|auth|access|api|bearer)_token$|(?:^|_)(?:secret|password|passwd|api_?key|credentials?)$",
    re.IGNORECASE,
)
INSTEAD = "set HF_TOKEN in the environment, or log in with `hf auth login`"


def refuse_secrets(content: Any, name: str, error: type[ValueError] = ValueError) -> None:
    """Raise `error`, which says where and not what, if a recipe or an override holds what looks like a secret."""
    for place, value in _entries(content, ()):
        if VALUES.search(value) or VALUES.search(" ".join(place)) or (place and KEYS.search(place[-1])):
            where = without_secrets(".".join(place)) or "it"
            raise error(
                f"{without_secrets(name)}: {where} holds a secret, or what looks like one. Recipes are copied beside "
                f"models and pushed with them; leave it out, and {INSTEAD}."
            )


def without_secrets(text: str) -> str:
    """The text with *** in the place of what looks like a token."""
    return VALUES.sub("***", text)


def _entries(content: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text in a recipe, with the keys that lead to it."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _entries(value, (*place, str(key)))
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from _entries(value, place)
    elif isinstance(content, str):
        yield place, content
