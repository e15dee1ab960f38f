"""Memorizing Transformer: Wu, Rabe, Hutchins and Szegedy 2022, "Memorizing Transformers".

A Transformer-XL of which one layer also looks up keys and values of long ago: what leaves its short memory goes to a
store, in which every query attends to the nearest keys alone. Nothing is learnt through the store. Section numbers are
those of arXiv:2203.08913.

Shapes: B batch, H heads, T new tokens, M slots of the short memory, S = M + T keys, D head dim, R slots of the store,
K neighbors, E tokens that leave the short memory.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .attention import Heads, heads_of
from .configuration_memorizing_transformer import MemorizingTransformerConfig
from .memory_segments import SegmentMemory, check_same_kind
from .modeling_transformer_xl import (
    TransformerXLAttention,
    TransformerXLBlock,
    TransformerXLForCausalLM,
    TransformerXLModel,
    TransformerXLPreTrainedModel,
)
from .positions import RelativePositions

NUMBERS_AT_ONCE = 2**22  # scores of queries and stored keys, and keys that are looked up


class Store(NamedTuple):
    """Keys and values of tokens that have left the short memory, without gradient.

    Attributes:
        keys, values: [B, H, R, D]; token n of a row is in slot n modulo the most that there may be.
        count: [B], how many tokens each row has ever stored.
    """

    keys: torch.Tensor
    values: torch.Tensor
    count: torch.Tensor


def empty_store(like: torch.Tensor) -> Store:
    """One slot with nothing in it, for keys [B, H, S, D]: a look-up hides it, and needs no case of its own."""
    batch_size, heads, _, dim = like.shape
    keys, values = (like.new_zeros(batch_size, heads, 1, dim).detach() for _ in range(2))
    return Store(keys, values, torch.zeros(batch_size, dtype=torch.long, device=like.device))


class MemorizingMemory(SegmentMemory):
    """The memory of a Transformer-XL, and the store of its memory layer; see SegmentMemory.

    Args:
        config: a MemorizingTransformerConfig, for num_hidden_layers, mem_len and memory_size.
        projected: keep keys and values instead of hidden states; not for training.

    Attributes:
        stored_keys, stored_values, stored: the fields of a Store; None before the first token is stored.
    """

    kind = "memorizing"

    def __init__(self, config, projected: bool = False):
        super().__init__(config, projected)
        self.memory_size = config.memory_size
        self.stored_keys = self.stored_values = self.stored = None

    @property
    def store(self) -> Store | None:
        return None if self.stored is None else Store(self.stored_keys, self.stored_values, self.stored)

    def put_away(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Store what leaves the short memory of keys and values [B, H, S, D]; `valid` [B, S] says what is no padding.

        A row that stores more than memory_size tokens loses its oldest ones.
        """
        leaving = max(0, keys.shape[2] - self.layers[0].capacity)
        if not leaving or not self.memory_size:
            return
        keys, values = keys[:, :, :leaving].detach(), values[:, :, :leaving].detach()
        store = empty_store(keys) if self.store is None else self.store
        if valid is None:
            tokens = torch.ones(len(keys), leaving, dtype=torch.bool, device=keys.device)
        else:
            tokens = valid[:, :leaving].to(keys.device)
        numbers = store.count[:, None] + tokens.cumsum(dim=1) - 1  # [B, E], of each token since the row began
        count = store.count + tokens.sum(dim=1)
        kept = tokens & (numbers >= count[:, None] - self.memory_size)
        row, place = kept.nonzero(as_tuple=True)
        slot = numbers[row, place] % self.memory_size
        room = min(self.memory_size, int(count.max()))
        self.stored_keys, self.stored_values = (self._writable(held, room) for held in (store.keys, store.values))
        self.stored_keys[row, :, slot] = keys[row, :, place]
        self.stored_values[row, :, slot] = values[row, :, place]
        self.stored = count

    def forget(self, rows: torch.Tensor) -> None:
        """Rows [B] bool that begin a new document: they see nothing of what was before, nor store it.

        To attention_mask, what they have read is padding from now on.

        Raises:
            ValueError: if `rows` does not say yes or no of every row.
        """
        first = self.layers[0].first
        if rows.dtype != torch.bool or (first is not None and rows.shape != first.shape[:1]):
            batch = "batch" if first is None else len(first)
            raise ValueError(f"rows must be bool of shape [{batch}], got {rows.dtype} of shape {list(rows.shape)}.")
        if self.stored is not None:
            self.stored = self.stored.masked_fill(rows.to(self.stored.device), 0)
        if first is not None:
            gone = rows.to(first.device)[:, None]
            held = gone.new_ones(len(rows), self.held) if self.valid is None else self.valid
            self.valid = held & ~gone

    def reset(self) -> None:
        super().reset()
        self.stored_keys = self.stored_values = self.stored = None

    def _writable(self, held: torch.Tensor, room: int) -> torch.Tensor:
        """The slots, or a copy of them: larger where `room` says so, and where somebody may still read them."""
        if room > held.shape[2]:
            room = min(self.memory_size, max(room, 2 * held.shape[2]))
            larger = held.new_zeros(*held.shape[:2], room, held.shape[3])
            larger[:, :, : held.shape[2]] = held
            return larger
        frozen = held.is_inference() and not torch.is_inference_mode_enabled()
        return held.clone() if frozen or torch.is_grad_enabled() else held  # recomputed layers look it up once more

    def _change_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._change_batch(change)
        if self.store is not None:
            self.stored_keys, self.stored_values, self.stored = map(change, self.store)


def recall(query: torch.Tensor, store: Store, num_neighbors: int, scaling: float) -> torch.Tensor:
    """[B, H, T, D], what queries [B, H, T, D] find in the store: attention to the num_neighbors keys with the highest
    scores (section 3.1). Where there is nothing, something finite.

    The scores of some queries at a time are made, to choose by; those of what is chosen again, with their gradient.
    """
    check_same_kind(store.keys, query)
    batch_size, heads, room, dim = store.keys.shape
    at_once = max(1, NUMBERS_AT_ONCE // (batch_size * heads * max(room, num_neighbors * dim)))
    return torch.cat([_recall(some, store, num_neighbors, scaling) for some in query.split(at_once, dim=2)], dim=2)


def _recall(query: torch.Tensor, store: Store, num_neighbors: int, scaling: float) -> torch.Tensor:
    batch_size, heads, room, _ = store.keys.shape
    number = min(num_neighbors, room)
    filled = torch.arange(room, device=query.device) < store.count[:, None]  # [B, R]
    with torch.no_grad():
        scores = (query @ store.keys.transpose(-1, -2)).masked_fill_(~filled[:, None, None], float("-inf"))
        chosen = scores.topk(number, dim=-1).indices
    rows = torch.arange(batch_size * heads, device=query.device).view(batch_size, heads, 1, 1)
    keys, values = (slots.flatten(0, 1)[rows, chosen] for slots in store[:2])  # [B, H, T, K, D]
    scores = (keys @ query[..., None]).squeeze(-1) * scaling
    hidden = ~filled[:, None, None, :number]  # the best come first, and what is not there last
    exact = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(dim=-1, dtype=exact)
    return (weights[..., None, :].to(values.dtype) @ values).squeeze(-2)


def normed(states: torch.Tensor) -> torch.Tensor:
    """Vectors [..., D] of one length, so that keys of earlier weights are no larger or smaller than others
    (section 3.2)."""
    return nn.functional.rms_norm(states, states.shape[-1:], eps=1e-6).to(states.dtype)


class QueryNorm(nn.Module):
    """Normed queries, and for each head a learned length, which sets how sharp its attention is."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_heads))

    def forward(self, query: torch.Tensor, heads: Heads) -> torch.Tensor:
        """[B, H, T, D] -> [B, H, T, D], of the heads that this process computes."""
        return normed(query) * heads.own(self.scale)[:, None, None].to(query.dtype)


class MemoryGate(nn.Module):
    """V = g V_m + (1 - g) V_c with g = sigmoid(b), a number for each head (section 3.1)."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_heads))

    def forward(
        self, local: torch.Tensor, recalled: torch.Tensor, remembers: torch.Tensor, heads: Heads
    ) -> torch.Tensor:
        """What attention and the store gave, [B, T, H, D] each, in one; the first alone for rows without a store.

        Args:
            remembers: [B] bool, which rows have stored something.
            heads: those that this process computes.
        """
        gate = heads.own(self.bias).sigmoid()[:, None] * remembers[:, None, None, None]
        return local + gate.to(local.dtype) * (recalled - local)


class MemorizingTransformerAttention(TransformerXLAttention):
    """Attention to the memory and the segment, and by the same queries to the store, without distances."""

    def __init__(self, config: MemorizingTransformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.num_neighbors = config.num_neighbors
        self.q_norm = QueryNorm(config.num_attention_heads)
        self.gate = MemoryGate(config.num_attention_heads)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_states: torch.Tensor,
        attention_mask,
        positions: RelativePositions,
        biases: tuple[torch.Tensor, torch.Tensor],
        memory: MemorizingMemory,
        store: Store | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """[B, T, hidden] -> [B, T, hidden]; the weights [B, H, T, S] of memory and segment, where the backend has them;
        keys and values [B, H, S, D] without gradient."""
        heads = heads_of(self, self.config.num_attention_heads)
        context = torch.cat([past_states, hidden_states], dim=1)
        query = self.q_norm(self.split_heads(self.q_proj(hidden_states)), heads)
        key, value = memory.update(
            normed(self.split_heads(self.k_proj(context))), self.split_heads(self.v_proj(context)), self.layer_idx
        )
        local, weights = self.attend(query, key, value, attention_mask, positions, biases, memory, **kwargs)
        store = empty_store(key) if store is None else store
        recalled = recall(query, store, self.num_neighbors, self.scaling).transpose(1, 2)
        output = self.gate(local, recalled, store.count > 0, heads)
        return self.o_proj(output.flatten(2)), weights, key.detach(), value.detach()


class MemorizingTransformerBlock(TransformerXLBlock):
    """The layer that looks up the store."""

    attention_class = MemorizingTransformerAttention

    def forward(
        self, hidden_states: torch.Tensor, past_states: torch.Tensor, *context, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output [B, T, hidden], and keys and values [B, H, S, D]; the arguments are those of the attention."""
        hidden_states, _, key, value = self.transform(hidden_states, past_states, *context, **kwargs)
        return hidden_states, key, value


def block_of(config: MemorizingTransformerConfig, layer_idx: int) -> TransformerXLBlock:
    """One layer looks up the store, all others are a Transformer-XL's."""
    block_class = MemorizingTransformerBlock if layer_idx == config.memory_layer else TransformerXLBlock
    return block_class(config, layer_idx)


class MemorizingTransformerPreTrainedModel(TransformerXLPreTrainedModel):
    """Initial weights, and what Transformers wants to know about the family."""

    config: MemorizingTransformerConfig
    _no_split_modules = ["TransformerXLBlock", "MemorizingTransformerBlock"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, QueryNorm):
            init.ones_(module.scale)
        elif isinstance(module, MemoryGate):
            init.zeros_(module.bias)


class MemorizingTransformerModel(MemorizingTransformerPreTrainedModel, TransformerXLModel):
    """The decoder without a head: ids or embeddings in, hidden states [B, T, hidden] out."""

    memory_class = MemorizingMemory
    block_class = staticmethod(block_of)

    @capture_outputs
    def read_segment(
        self,
        inputs_embeds: torch.Tensor,
        new_tokens: torch.Tensor | None,
        memory: MemorizingMemory,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """One segment [B, T, hidden], of which new_tokens [B, T] says what is no padding; the memory takes it in."""
        valid, views = self.prepare(inputs_embeds, new_tokens, memory)
        hidden_states = self.dropout(inputs_embeds)
        for i, (layer, view) in enumerate(zip(self.layers, views)):
            entering = hidden_states
            given = (memory.past_states(entering, i), *view, self.biases_of(i, entering), memory)
            if i == self.config.memory_layer:
                hidden_states, keys, values = layer(entering, *given, memory.store, **kwargs)
                memory.put_away(keys, values, valid)  # not in the layer, which checkpointing runs twice
            else:
                hidden_states = layer(entering, *given, **kwargs)
            memory.remember(entering, i)
        memory.advance(inputs_embeds.shape[1], valid)
        return BaseModelOutputWithPast(last_hidden_state=self.dropout(hidden_states))


class MemorizingTransformerForCausalLM(MemorizingTransformerPreTrainedModel, TransformerXLForCausalLM):
    """The decoder with a softmax over the next token, adaptive where the config has cutoffs or projections."""

    model_class = MemorizingTransformerModel


__all__ = [
    "MemorizingTransformerForCausalLM",
    "MemorizingTransformerModel",
    "MemorizingTransformerPreTrainedModel",
]
