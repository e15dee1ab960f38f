"""Put a model of Transformers' own under an attention pattern."""

import inspect
import re
from collections.abc import Iterable, Mapping
from functools import cache
from operator import attrgetter

from torch import nn
from transformers import PreTrainedModel

from .block_sparse.stock_masks import NAME, layer_pattern
from .modeling.attention_patterns import Pattern, patterns_for_layers

_INTERFACE = "ALL_ATTENTION_FUNCTIONS.get_interface("
# Parts of the names of parameters that enter the scores.
_OWN_TERMS = ("position_bias", "attention_bias", "bias_table")


def set_attention_patterns(
    model: PreTrainedModel,
    patterns: Mapping | Pattern | Iterable[Mapping | Pattern] | None,
    attention_dropout: float | None = None,
) -> None:
    """Let `model` attend by `patterns` with the block_sparse backend, from its next forward pass on.

    What a query sees is the pattern AND the model's own rule: causality, sliding windows, padding, packing.
    Cross-attention stays as it is. The patterns are stored as `config.attention_patterns` and saved with the model;
    a saved model follows them again when it is loaded with `attn_implementation="block_sparse"`, other backends
    ignore them. `export` and `push` write the backend beside them, so that nothing need be said.

    Args:
        model: any model whose attention goes through Transformers' AttentionInterface.
        patterns: one for all layers, or a list that is cycled over them; patterns or their dicts. None takes them away,
            which leaves the model's own rule.
        attention_dropout: 0.0 turns off the dropout of attention weights, which block_sparse cannot, in the model and
            in its config.

    Raises:
        ValueError: if a pattern is wrong or does not fit the model, or the model cannot be put under one; the model
            is then left as it was.
    """
    if patterns is None:
        vars(model.config).pop("attention_patterns", None)
        return
    if attention_dropout not in (None, 0):
        raise ValueError(f"attention_dropout may be 0.0 or None (as it is), got {attention_dropout!r}.")
    patterns = [pattern.to_dict() for pattern in _as_list(patterns)]
    value = patterns[0] if len(patterns) == 1 else patterns
    attentions = [module for module in model.modules() if _uses_interface(type(module))]
    _refuse_unfit(model, attentions, attention_dropout)
    for attention in attentions:
        layer_pattern(attention, value)
    if attention_dropout is not None:
        _turn_dropout_off(model, attentions)
    model.config.attention_patterns = value
    model.set_attn_implementation(NAME)


def _as_list(patterns: Mapping | Pattern | Iterable) -> list[Pattern]:
    """One pattern, or one for each in a list."""
    patterns = [patterns] if isinstance(patterns, (Mapping, Pattern)) else list(patterns)
    return patterns_for_layers(patterns, max(len(patterns), 1))


def _refuse_unfit(model: PreTrainedModel, attentions: list[nn.Module], attention_dropout: float | None) -> None:
    has_field = hasattr(type(model.config), "attention_patterns")
    reasons = {
        "{} knows patterns itself; set attention_patterns in the config that it is built from": [model] * has_field,
        "{} attends by its own code and would ignore the pattern": _ignoring(model) or ([] if attentions else [model]),
        "{} adds terms of its own to the scores (position biases), which block_sparse cannot": [
            attention for attention in attentions if _has_own_terms(attention)
        ],
        "{} caps its scores, which block_sparse cannot; set attn_logit_softcapping to None in the config": [
            attention for attention in attentions if getattr(attention.config, "attn_logit_softcapping", None)
        ],
        "{} has a config of its own; call this on the model inside that it belongs to": [
            attention for attention in attentions if attention.config is not model.config
        ],
        "{} drops attention weights in training, which block_sparse cannot; to train without, give "
        "set_attention_patterns(model, patterns, attention_dropout=0.0)": [
            attention for attention in attentions if attention_dropout is None and any(_dropouts(attention).values())
        ],
    }
    for reason, modules in reasons.items():
        if modules:
            names = ", ".join(sorted({type(module).__name__ for module in modules}))
            raise ValueError(f"{type(model).__name__} cannot be put under attention patterns: {reason.format(names)}.")


def _ignoring(model: PreTrainedModel) -> list[nn.Module]:
    """Attention modules that no backend reaches."""
    return [
        module
        for module in model.modules()
        if "Attention" in type(module).__name__ and not any(_uses_interface(type(inner)) for inner in module.modules())
    ]


@cache
def _uses_interface(module_class: type) -> bool:
    """Transformers, too, reads the source to know which attention follows `attn_implementation`."""
    if issubclass(module_class, PreTrainedModel):
        return False
    own = [base for base in module_class.__mro__ if not base.__module__.startswith(("torch.", "builtins"))]
    try:
        return any(_INTERFACE in inspect.getsource(base) for base in own)
    except OSError:  # a class without a file
        return False


def _has_own_terms(attention: nn.Module) -> bool:
    return any(term in name for name, _ in attention.named_parameters() for term in _OWN_TERMS)


@cache
def _dropout_paths(module_class: type) -> frozenset[str]:
    """What a class hands to its backend as `dropout`, such as {"attention_dropout"} or {"attn_dropout.p"}."""
    given = re.findall(r"\bdropout=([^,\n]+)", inspect.getsource(module_class))
    return frozenset(path for value in given for path in re.findall(r"self\.([\w.]+)", value)) - {"training"}


def _dropouts(attention: nn.Module) -> dict[str, float]:
    values = {path: attrgetter(path)(attention) for path in _dropout_paths(_computing_class(type(attention)))}
    return {path: value for path, value in values.items() if isinstance(value, int | float)}


@cache
def _computing_class(module_class: type) -> type:
    """The one among its bases that calls the backend."""
    return next(base for base in module_class.__mro__ if _INTERFACE in inspect.getsource(base))


def _turn_dropout_off(model: PreTrainedModel, attentions: list[nn.Module]) -> None:
    for attention in attentions:
        for path in _dropouts(attention):
            owner, _, name = path.rpartition(".")
            setattr(attrgetter(owner)(attention) if owner else attention, name, 0.0)
    for name in vars(model.config):  # attention_dropout, attn_pdrop, attention_probs_dropout_prob
        if "att" in name and "drop" in name:
            setattr(model.config, name, 0.0)
