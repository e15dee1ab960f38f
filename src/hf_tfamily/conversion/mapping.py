"""What converters need to say one architecture in the names of another."""

import re

import torch


def require(condition: bool, message: str) -> None:
    """What the other side has no way to say is an error."""
    if not condition:
        raise ValueError(message)


def rename_in_blocks(weights: dict[str, torch.Tensor], modules: dict[str, str]) -> dict[str, torch.Tensor]:
    """Whole module names of blocks exchanged, the first that fits."""
    rule = re.compile(r"(?<=\d\.)(" + "|".join(map(re.escape, modules)) + r")(?=\.|$)")
    return {rule.sub(lambda match: modules[match[0]], name): tensor for name, tensor in weights.items()}


def renamed(architectures: list[str] | None, heads: dict[str, str]) -> str:
    """The class of the same head."""
    found = (architectures or [next(iter(heads))])[0]
    require(found in heads, f"There is no counterpart of {found}; there is one of {', '.join(heads)}.")
    return heads[found]
