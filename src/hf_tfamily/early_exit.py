"""Depth that each token chooses: `generate()` that leaves a decoder's layers as soon as it is confident.

After Elbayad, Gu, Grave and Auli 2019, "Depth-Adaptive Transformer" (arXiv:1910.10073), and Schuster et al. 2022,
"Confident Adaptive Language Modeling" (CALM, arXiv:2207.07061).

    with early_exit(model, confidence=0.9) as exits:
        model.generate(ids, max_new_tokens=100)
    print(exits.mean_layers)

A token that leaves early hands its state to all later layers, which keep its keys and values and compute nothing else
(Elbayad et al., section 3; CALM, section 3.3). The prompt goes through every layer. What a row of a batch writes does
not depend on the others: states of tokens that have left stay as they are, while the batch goes on.

Shapes: B rows, V ids.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .modeling.causal_lm import label_smoothed_loss, next_tokens


def softmax_response(model: PreTrainedModel, before: Tensor, after: Tensor) -> Tensor:
    """[B], how far the likeliest id is above the second, from states [B, 1, hidden] (CALM, section 3.5)."""
    best = torch.softmax(logits_of(model, after[:, -1]).float(), dim=-1).topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


def state_saturation(model: PreTrainedModel, before: Tensor, after: Tensor) -> Tensor:
    """[B], the cosine of the states [B, 1, hidden] before and after a layer (CALM, section 3.5)."""
    return cosine_similarity(before[:, -1].float(), after[:, -1].float(), dim=-1)


MEASURES: dict[str, Callable[[PreTrainedModel, Tensor, Tensor], Tensor]] = {
    "softmax": softmax_response,
    "state": state_saturation,
}


def logits_of(model: PreTrainedModel, states: Tensor) -> Tensor:
    """What the model would say, [..., V], if these states [..., hidden] were its last layer's."""
    return model.lm_head(model.get_decoder().norm(states))


class KeysOnly(Exception):
    """Raised inside a layer when its keys and values are in the cache."""


class Keeper:
    """A cache that ends the layer's work once its keys and values are in."""

    def __init__(self, cache: Cache):
        self.cache = cache

    def update(self, *args: Any, **kwargs: Any) -> None:
        self.cache.update(*args, **kwargs)
        raise KeysOnly


class Exits:
    """Where the tokens of a `generate()` left.

    Attributes:
        layers: for each step after the prompt, how many layers each row's token went through, [B].
        computed: how many layers were computed for any row of the batch, a number for each step.
    """

    def __init__(self, model: PreTrainedModel, confidence: float, measure: str, first: int):
        self.model, self.confidence, self.first = model, confidence, first
        self.measure = MEASURES[measure]
        self.depth = len(model.get_decoder().layers)
        self.layers: list[Tensor] = []
        self.computed: list[int] = []
        self._left: Tensor | None = None  # which rows have left in this step; None where every layer is computed

    @property
    def mean_layers(self) -> float:
        """How many layers a token went through."""
        if not self.layers:
            raise ValueError("No token was written yet: generate() inside `with early_exit(...)`.")
        return float(torch.cat(self.layers).float().mean())

    def begin(self, states: Tensor, cache: Cache | None) -> None:
        """A step begins; one of the prompt or without a cache goes through every layer."""
        past = 0 if cache is None else int(cache.get_seq_length())
        self._left = None
        if states.shape[1] == 1 and past > 0:
            self._left = torch.zeros(len(states), dtype=torch.bool, device=states.device)
            self.layers.append(torch.full((len(states),), self.depth, device=states.device))
            self.computed.append(0)

    def pass_through(self, index: int, layer: Callable, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What layer `index` makes of states [B, T, hidden], and for tokens that have left, the same states."""
        past = kwargs.get("past_key_values")
        own = getattr(past, "self_attention_cache", past)
        if index == 0:
            self.begin(states, own)
        if self._left is None:
            return layer(states, *args, **kwargs)
        if bool(self._left.all()):
            try:
                layer(states, *args, **{**kwargs, "past_key_values": Keeper(own)})
            except KeysOnly:
                return states
            raise RuntimeError(f"Layer {index} of {type(self.model).__name__} did not write to its cache.")
        after = torch.where(self._left[:, None, None], states, layer(states, *args, **kwargs))
        self.computed[-1] += 1
        if self.first <= index + 1 < self.depth:
            leaves = ~self._left & (self.measure(self.model, states, after) >= self.confidence)
            self.layers[-1].masked_fill_(leaves, index + 1)
            self._left = self._left | leaves
        return after


@contextmanager
def early_exit(model: PreTrainedModel, confidence: float, measure: str = "softmax", first: int = 1) -> Iterator[Exits]:
    """Inside, `model.generate()` with a cache leaves the layers of each token at a confidence of at least `confidence`.

    Args:
        model: a decoder, alone or beside an encoder, with a stack of layers, a final norm and an `lm_head`.
        confidence: 0 leaves after `first` layers, above 1 never.
        measure: "softmax", how far the likeliest token is above the second; or "state", how little a layer changed.
        first: layers that every token goes through.

    Raises:
        ValueError: if a model or an argument is not of these.
    """
    _check(model, confidence, measure, first)
    exits = Exits(model, confidence, measure, first)
    layers = model.get_decoder().layers
    try:
        for index, layer in enumerate(layers):
            layer.forward = _through(exits, index, layer.forward)
        yield exits
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _through(exits: Exits, index: int, forward: Callable) -> Callable:
    def wrapped(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return exits.pass_through(index, forward, hidden_states, *args, **kwargs)

    return wrapped


def _check(model: PreTrainedModel, confidence: float, measure: str, first: int) -> None:
    name = type(model).__name__
    decoder = model.get_decoder() if hasattr(model, "lm_head") else None
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(getattr(decoder, "norm", None), nn.Module):
        raise ValueError(f"early_exit needs a decoder with `layers`, a final `norm` and an `lm_head`; {name} has none.")
    if len(layers) < 2:
        raise ValueError(
            f"{name} has {len(layers)} layer: there is nothing to leave early (adaptive=True halts steps)."
        )
    if any("forward" in layer.__dict__ for layer in layers):
        raise ValueError(
            f"The layers of {name} are already wrapped, by another early_exit or by hooks that move weights; "
            "leave that first."
        )
    if hasattr(model.config, "mem_len"):
        raise ValueError(f"{name} remembers segments, whose states every layer needs; early_exit takes it not.")
    if not confidence >= 0:
        raise ValueError(f"confidence must be at least 0, got {confidence}.")
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}.")
    if isinstance(first, bool) or not isinstance(first, int) or not 1 <= first <= len(layers):
        raise ValueError(f"first must be 1 to {len(layers)} layers, got {first!r}.")


def loss_of_all_exits(model: PreTrainedModel, **batch: Any) -> Tensor:
    """The mean over layers of the loss that each would have as the last, which teaches every exit to predict.

    Elbayad et al. 2019, section 3.1 (aligned training, the same weight for every layer). `batch` holds what `forward`
    takes, and `labels` or `shift_labels`.

    Raises:
        ValueError: if it has neither, or the model returns no hidden states.
    """
    labels, shifted = batch.pop("labels", None), batch.pop("shift_labels", None)
    if labels is None and shifted is None:
        raise ValueError("loss_of_all_exits needs labels or shift_labels.")
    outputs = model(**batch, output_hidden_states=True)
    targets = labels if model.config.is_encoder_decoder else next_tokens(labels, shifted)
    states = outputs.decoder_hidden_states if model.config.is_encoder_decoder else outputs.hidden_states
    logits = [logits_of(model, layer) for layer in states[1:-1]] + [outputs.logits]
    return torch.stack([label_smoothed_loss(one, targets) for one in logits]).mean()
