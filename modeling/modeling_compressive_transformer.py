"""Compressive Transformer: Rae, Potapenko, Jayakumar and Lillicrap 2019, "Compressive Transformers for Long-Range
Sequence Modelling".

A Transformer-XL whose oldest memories are not dropped but compressed, into a second memory that reaches further back.
Section and algorithm numbers are those of arXiv:1911.05507.

Shapes: B batch, T new tokens, M slots of the short memory, C compressed slots before them, S = C + M + T keys, H
heads, D head dim, E tokens that leave the short memory (a multiple of the rate c), E / c the slots they become.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .attention import Heads, eager_attention_forward, heads_of
from .causal_lm import IGNORED, INSIDE, check_loss_is_inside, num_targets
from .configuration_compressive_transformer import CompressiveTransformerConfig
from .memory_segments import HiddenStateLayer, KeyValueLayer, MemoryLayer, SegmentMemory, check_same_kind
from .modeling_transformer_xl import (
    TransformerXLBlock,
    TransformerXLForCausalLM,
    TransformerXLForSequenceClassification,
    TransformerXLModel,
    TransformerXLPreTrainedModel,
)
from .positions import RelativePositions


@dataclass(frozen=True)
class Evicted:
    """What leaves the short memory of a layer with the coming segment, to be compressed.

    Attributes:
        states: [B, E, hidden], without gradient.
        valid: [B, E] bool, False for padding; None if all are tokens.
        usage: [B, E] attention received before the coming segment, summed over queries; None if nobody asks.
        start: C, where the evicted begin among the keys.
        age: [E] number of queries that could see each, those of the coming segment included.
    """

    states: torch.Tensor
    valid: torch.Tensor | None
    usage: torch.Tensor | None
    start: int
    age: torch.Tensor


class CompressiveLayer(MemoryLayer):
    """A short memory of hidden states, and before it a compressed one (section 3).

    The short memory keeps `capacity` slots, and up to `rate` - 1 more that wait until so many are compressed together.
    """

    def __init__(self, config):
        super().__init__(config)
        self.compressed_capacity = config.compressed_mem_len
        self.rate = config.compression_rate
        self.usage: torch.Tensor | None = None
        if config.compression == "most_used":
            self.names = (*self.names, "usage")

    @property
    def recent(self) -> int:
        """M, the number of slots that hold one token each."""
        return self.states.shape[1] if self.is_initialized else 0

    @property
    def first(self) -> torch.Tensor | None:
        return self.states if self.is_initialized else None

    def lazy_initialization(self, hidden_states: torch.Tensor) -> None:
        self.states = hidden_states[:, :0].detach()
        if "usage" in self.names:
            self.usage = self.states.new_zeros(self.states.shape[:2])
        self.is_initialized = True

    def num_evicted(self, length: int) -> int:
        """E for a coming segment of `length` tokens."""
        return max(0, self.recent + length - self.capacity) // self.rate * self.rate

    def evict(self, hidden_states: torch.Tensor, valid: torch.Tensor | None) -> Evicted:
        """What of the memory and the coming segment [B, T, hidden] is compressed."""
        if not self.is_initialized:
            self.lazy_initialization(hidden_states)
        check_same_kind(self.states, hidden_states)
        length, start = hidden_states.shape[1], self.held - self.recent
        end, together = self.num_evicted(length), self.recent + length
        return Evicted(
            states=torch.cat([self.states, hidden_states], dim=1)[:, :end].detach(),
            valid=None if valid is None else valid[:, start : start + end],
            usage=None if self.usage is None else nn.functional.pad(self.usage, (0, length))[:, :end],
            start=start,
            age=torch.arange(together, together - end, -1, device=hidden_states.device),
        )

    def remember(self, hidden_states: torch.Tensor, compressed: torch.Tensor, usage: torch.Tensor | None) -> None:
        length = hidden_states.shape[1]
        end, together = self.num_evicted(length), self.recent + length
        if self.usage is not None:
            self.usage = (nn.functional.pad(self.usage, (0, length)) + usage[:, -together:])[:, end:].detach()
        self.states = torch.cat([self.states, hidden_states], dim=1)[:, end:].detach()


class CompressiveStateLayer(CompressiveLayer, HiddenStateLayer):
    """Keeps hidden states [B, M, hidden] and [B, C, hidden]; every segment projects them anew."""

    names = ("states", "compressed")

    @property
    def held(self) -> int:
        return self.recent + self.compressed.shape[1] if self.is_initialized else 0

    def lazy_initialization(self, hidden_states: torch.Tensor) -> None:
        super().lazy_initialization(hidden_states)
        self.compressed = self.states

    def past_states(self, like: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.compressed, self.states], dim=1)

    def remember(self, hidden_states: torch.Tensor, compressed: torch.Tensor, usage: torch.Tensor | None) -> None:
        super().remember(hidden_states, compressed, usage)
        self.compressed = torch.cat([self.compressed, compressed], dim=1)[:, -self.compressed_capacity :].detach()
        self.segments += 1

    def compress(self, compressed: torch.Tensor, project: Callable) -> None:
        """`remember` will."""


class CompressiveKeyValueLayer(CompressiveLayer, KeyValueLayer):
    """Keeps keys and values [B, H, C + M, D], and the hidden states [B, M, hidden] that are yet to be compressed."""

    names = ("states", "keys", "values")

    def __init__(self, config):
        super().__init__(config)
        self.num_compressed = 0

    @property
    def held(self) -> int:
        return self.recent + self.num_compressed

    def reset(self) -> None:
        super().reset()
        self.num_compressed = 0

    def past_states(self, like: torch.Tensor) -> torch.Tensor:
        return like[:, :0]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """What is held, then the new entries; `compress` will shorten it."""
        if self.keys is not None:
            check_same_kind(self.keys, key_states)
            key_states = torch.cat([self.keys, key_states], dim=-2)
            value_states = torch.cat([self.values, value_states], dim=-2)
        self.keys, self.values = key_states.detach(), value_states.detach()
        self.segments += 1
        return key_states, value_states

    def compress(self, compressed: torch.Tensor, project: Callable) -> None:
        """Put the compressed entries [B, E / rate, hidden] where the E tokens stood that they are made of."""
        if not compressed.shape[1]:
            return
        start = self.num_compressed
        end = start + compressed.shape[1] * self.rate
        for name, new in zip(("keys", "values"), project(compressed)):
            held = getattr(self, name)
            before = torch.cat([held[..., :start, :], new], dim=-2)[..., -self.compressed_capacity :, :]
            setattr(self, name, torch.cat([before, held[..., end:, :]], dim=-2).detach())
        self.num_compressed = before.shape[-2]


class CompressiveMemory(SegmentMemory):
    """The two memories of a Compressive Transformer; see SegmentMemory.

    Args:
        config: a CompressiveTransformerConfig, for num_hidden_layers, mem_len, compressed_mem_len and compression_rate.
        projected: keep keys and values besides the hidden states that are yet to be compressed; not for training.

    Attributes:
        valid: [B, C + M] bool, False where a slot holds padding, or was compressed from some.
    """

    kind = "compressive"
    layer_classes = (CompressiveStateLayer, CompressiveKeyValueLayer)

    @property
    def recent(self) -> int:
        return self.layers[0].recent

    def evict(self, hidden_states: torch.Tensor, layer_idx: int, valid: torch.Tensor | None) -> Evicted:
        """What a layer compresses, given its new input [B, T, hidden] and which keys are `valid` [B, C + M + T]."""
        return self.layers[layer_idx].evict(hidden_states, valid)

    def compress(self, layer_idx: int, compressed: torch.Tensor, project: Callable) -> None:
        """Put `compressed` [B, E / rate, hidden] where what a layer evicted stood, if it keeps keys and values."""
        self.layers[layer_idx].compress(compressed, project)

    def remember(
        self, hidden_states: torch.Tensor, layer_idx: int, compressed: torch.Tensor, usage: torch.Tensor | None
    ) -> None:
        """Take in a layer's new input, what it evicted in compressed form, and the attention [B, S] that keys got."""
        self.layers[layer_idx].remember(hidden_states, compressed, usage)

    def valid_after(self, valid: torch.Tensor | None, length: int, compress: Callable) -> torch.Tensor | None:
        """What `valid` [B, C + M + T] is once T tokens have come in and `compress` has dealt with those evicted."""
        if valid is None:
            return None
        start = self.held - self.recent
        end = start + self.layers[0].num_evicted(length)
        before = torch.cat([valid[:, :start], compress(valid[:, start:end])], dim=1)
        return torch.cat([before[:, -self.layers[0].compressed_capacity :], valid[:, end:]], dim=1)


class Compression(nn.Module):
    """f_c of section 3.1: E tokens become E / c slots. Each group of c tokens is one slot unless said otherwise."""

    def __init__(self, config: CompressiveTransformerConfig):
        super().__init__()
        self.rate = config.compression_rate

    def forward(self, evicted: Evicted, paid: torch.Tensor | None) -> torch.Tensor:
        """[B, E / c, hidden] from what was evicted, and the attention [B, S] that this segment paid, where known."""
        if evicted.states.shape[1]:
            return self.compress(evicted, paid)
        return evicted.states.clone()  # re-entrant checkpointing ties outputs to its graph, so never return an input

    def compress(self, evicted: Evicted, paid: torch.Tensor | None) -> torch.Tensor:
        raise NotImplementedError

    def valid(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, E] -> [B, E / c] bool: a slot that would mix in padding is not seen."""
        return self.groups(tokens).all(dim=-1)

    def groups(self, entries: torch.Tensor) -> torch.Tensor:
        """[B, E, ...] -> [B, E / c, c, ...]."""
        return entries.unflatten(1, (entries.shape[1] // self.rate, self.rate))


class MaxPool(Compression):
    def compress(self, evicted, paid):
        return self.groups(evicted.states).amax(dim=2)


class MeanPool(Compression):
    def compress(self, evicted, paid):
        return self.groups(evicted.states).mean(dim=2)


class StridedConv(Compression):
    """A convolution whose kernel is a group."""

    dilation = 1

    def __init__(self, config: CompressiveTransformerConfig):
        super().__init__(config)
        width, rate = config.hidden_size, config.compression_rate
        self.conv = nn.Conv1d(width, width, kernel_size=rate, stride=rate, dilation=self.dilation)

    @property
    def reach(self) -> int:
        """How far before its group a slot sees; the last token it sees is the group's last."""
        return (self.rate - 1) * (self.dilation - 1)

    def compress(self, evicted, paid):
        return self.conv(nn.functional.pad(evicted.states.transpose(1, 2), (self.reach, 0))).transpose(1, 2)

    def valid(self, tokens):
        if not tokens.shape[1]:
            return tokens
        seen = nn.functional.pad(tokens, (self.reach, 0), value=True).unfold(1, self.reach + self.rate, self.rate)
        return seen[..., :: self.dilation].all(dim=-1)


class DilatedConv(StridedConv):
    """A convolution that sees as many tokens as a group has, some distance apart, so that groups overlap.

    The paper gives no details of it.
    """

    def __init__(self, config: CompressiveTransformerConfig):
        self.dilation = config.compression_dilation
        super().__init__(config)


class MostUsed(Compression):
    """Of all tokens that leave together, keeps those that got most attention on average, in their order."""

    def compress(self, evicted, paid):
        mine = slice(evicted.start, evicted.start + len(evicted.age))
        average = (evicted.usage + paid[:, mine]) / evicted.age
        valid = torch.ones_like(average, dtype=torch.bool) if evicted.valid is None else evicted.valid
        kept = average.masked_fill(~valid, -1.0).topk(average.shape[1] // self.rate, dim=1).indices
        # In order, but padding first: then every layer has it in the same slots.
        kept = kept.gather(1, (kept - average.shape[1] * (~valid).gather(1, kept)).argsort(dim=1))
        return evicted.states.gather(1, kept[..., None].expand(-1, -1, evicted.states.shape[-1]))

    def valid(self, tokens):
        slots = tokens.shape[1] // self.rate
        return torch.arange(slots, device=tokens.device) >= slots - tokens.sum(dim=1, keepdim=True)


class NoLoss(nn.Module):
    """For compressions that learn nothing."""

    def __init__(self, config: CompressiveTransformerConfig):
        super().__init__()

    def forward(self, block, hidden_states: torch.Tensor, evicted: Evicted, compressed: torch.Tensor) -> torch.Tensor:
        """[B], a loss of each row."""
        return hidden_states.new_zeros(len(hidden_states))


class AutoEncoding(NoLoss):
    """How far the tokens are from what can be decoded from their compressed form (section 3.2)."""

    def __init__(self, config: CompressiveTransformerConfig):
        super().__init__(config)
        width, rate = config.hidden_size, config.compression_rate
        self.decoder = nn.ConvTranspose1d(width, width, kernel_size=rate, stride=rate)

    def forward(self, block, hidden_states, evicted, compressed):
        decoded = self.decoder(compressed.transpose(1, 2)).transpose(1, 2)
        return _mean_square(decoded - evicted.states, evicted.valid)


class AttentionReconstruction(NoLoss):
    """How far attention by content to the tokens is from attention to their compressed form (algorithm 2).

    The layer's own projections, and everything before them, take no gradient.
    """

    def forward(self, block, hidden_states, evicted, compressed):
        attention = block.self_attn
        normed = frozen(block.attention_pre_norm, hidden_states.detach())
        query = attention.split_heads(frozen(attention.q_proj, normed))
        compressed_valid = None if evicted.valid is None else block.compression.valid(evicted.valid)
        error = self._attend(block, query, evicted.states, evicted.valid)
        error = error - self._attend(block, query, compressed, compressed_valid)
        return block.heads.averaged(_mean_square(error))

    @staticmethod
    def _attend(block, query, memory, valid) -> torch.Tensor:
        """[B, T, H, D]: softmax((h Q) (m K)) (m V)."""
        attention = block.self_attn
        normed = frozen(block.attention_pre_norm, memory)
        key = attention.split_heads(frozen(attention.k_proj, normed))
        value = attention.split_heads(frozen(attention.v_proj, normed))
        mask = None if valid is None else valid[:, None, None]
        return eager_attention_forward(attention, query, key, value, mask, scaling=attention.scaling)[0]


COMPRESSIONS = {
    "max_pool": MaxPool,
    "mean_pool": MeanPool,
    "conv": StridedConv,
    "dilated_conv": DilatedConv,
    "most_used": MostUsed,
}
LOSSES = {"attention_reconstruction": AttentionReconstruction, "auto_encoding": AutoEncoding, None: NoLoss}


class CompressiveTransformerBlock(TransformerXLBlock):
    """A layer that also compresses what its short memory has no room for (algorithm 1)."""

    def __init__(self, config: CompressiveTransformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx
        self.compression = COMPRESSIONS[config.compression](config)
        self.compression_loss = LOSSES[config.compression_loss](config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_states: torch.Tensor,
        attention_mask,
        positions: RelativePositions,
        biases: tuple[torch.Tensor, torch.Tensor],
        memory: CompressiveMemory,
        evicted: Evicted,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Output [B, T, hidden]; compressed slots [B, E / c, hidden]; attention that keys got [B, S], where there are
        weights; the compression loss [B], in training."""
        output, weights = self.transform(
            hidden_states, past_states, attention_mask, positions, biases, memory, **kwargs
        )
        paid = None if weights is None else self.heads.averaged(weights.mean(dim=1)).sum(dim=1)
        compressed = self.compression(evicted, paid)
        memory.compress(self.layer_idx, compressed, self.project)
        loss = self._loss(hidden_states, evicted, compressed) if self.training else None
        return output, compressed, paid, loss

    @property
    def heads(self) -> Heads:
        """Those that this process computes."""
        return heads_of(self.self_attn, self.self_attn.config.num_attention_heads)

    def project(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, H, M, D] of remembered states."""
        normed = self.attention_pre_norm(states)
        attention = self.self_attn
        return attention.split_heads(attention.k_proj(normed)), attention.split_heads(attention.v_proj(normed))

    def _loss(self, hidden_states, evicted: Evicted, compressed: torch.Tensor) -> torch.Tensor:
        if evicted.states.shape[1]:
            return self.compression_loss(self, hidden_states, evicted, compressed)
        # Parameters without a gradient would stop distributed training before the memory is full.
        learned = [*self.compression.parameters(), *self.compression_loss.parameters()]
        return hidden_states.new_zeros(len(hidden_states)) + sum(0.0 * parameter.sum() for parameter in learned)


@dataclass
class CompressiveTransformerOutput(BaseModelOutputWithPast):
    """As every decoder's, and the compression loss, summed over layers and averaged over segments; in training only.

    Attributes:
        compression_losses: [B] of each row.
        compression_loss: their mean.
    """

    compression_loss: torch.FloatTensor | None = None
    compression_losses: torch.FloatTensor | None = None


@dataclass
class CompressiveTransformerCausalLMOutput(CausalLMOutputWithPast):
    """As every decoder's, and the compression loss, of which `loss` contains config.compression_loss_weight times."""

    compression_loss: torch.FloatTensor | None = None


@dataclass
class CompressiveTransformerSequenceClassifierOutput(SequenceClassifierOutputWithPast):
    """As every decoder's, and the compression loss, of which `loss` contains config.compression_loss_weight times."""

    compression_loss: torch.FloatTensor | None = None


class CompressiveTransformerPreTrainedModel(TransformerXLPreTrainedModel):
    """What Transformers wants to know about the family."""

    config: CompressiveTransformerConfig
    _no_split_modules = ["CompressiveTransformerBlock"]


class CompressiveTransformerModel(CompressiveTransformerPreTrainedModel, TransformerXLModel):
    """The decoder without a head: ids or embeddings in, hidden states [B, T, hidden] out."""

    memory_class = CompressiveMemory
    block_class = CompressiveTransformerBlock

    @capture_outputs
    def read_segment(
        self,
        inputs_embeds: torch.Tensor,
        new_tokens: torch.Tensor | None,
        memory: CompressiveMemory,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CompressiveTransformerOutput:
        """One segment [B, T, hidden], of which new_tokens [B, T] says what is no padding; the memory takes it in."""
        valid, views = self.prepare(inputs_embeds, new_tokens, memory)
        length = inputs_embeds.shape[1]
        valid_after = memory.valid_after(valid, length, self.layers[0].compression.valid)
        hidden_states = self.dropout(inputs_embeds)
        losses = []
        for i, (layer, view) in enumerate(zip(self.layers, views)):
            entering, evicted = hidden_states, memory.evict(hidden_states, i, valid)
            past_states = memory.past_states(hidden_states, i)
            hidden_states, compressed, usage, loss = layer(
                hidden_states, past_states, *view, self.biases_of(i, hidden_states), memory, evicted, **kwargs
            )
            memory.remember(entering, i, compressed, usage)
            losses.append(loss)
        memory.advance(length, valid_after)
        return CompressiveTransformerOutput(
            last_hidden_state=self.dropout(hidden_states),
            compression_losses=sum(losses) if self.training else None,
        )

    @staticmethod
    def join(outputs: list[CompressiveTransformerOutput], memory: CompressiveMemory | None):
        """The outputs of consecutive segments as those of one input."""
        joined = TransformerXLModel.join(outputs, memory)
        if outputs[0].compression_losses is None:
            return CompressiveTransformerOutput(**joined)
        losses = sum(output.compression_losses for output in outputs) / len(outputs)
        losses = {"compression_loss": losses.mean(), "compression_losses": losses}
        return CompressiveTransformerOutput(**{**joined, **losses})

    def check_backend(self) -> None:
        """Raise ValueError for an attention implementation that the distances or the compression cannot do with."""
        super().check_backend()
        implementation = self.config._attn_implementation
        if self.config.compression == "most_used" and implementation != "eager":
            raise ValueError(
                f"compression='most_used' needs attention weights, which attn_implementation={implementation!r} does "
                "not have; load the model with attn_implementation='eager'."
            )


class CompressiveTransformerForCausalLM(CompressiveTransformerPreTrainedModel, TransformerXLForCausalLM):
    """The decoder with a softmax over the next token; in training its loss contains the compression loss."""

    model_class = CompressiveTransformerModel

    def _loss(self, outputs: CompressiveTransformerOutput, logits, targets, smoothing, **kwargs) -> torch.Tensor | None:
        loss = super()._loss(outputs, logits, targets, smoothing, **kwargs)
        return with_compression_loss(loss, outputs, targets, self.config, **kwargs)

    def _output(self, loss, logits, outputs: CompressiveTransformerOutput) -> CompressiveTransformerCausalLMOutput:
        output = super()._output(loss, logits, outputs)
        return CompressiveTransformerCausalLMOutput(**output, compression_loss=outputs.compression_loss)


class CompressiveTransformerForSequenceClassification(
    CompressiveTransformerPreTrainedModel, TransformerXLForSequenceClassification
):
    """The decoder with a linear layer on each row's last token, the rightmost that is not config.pad_token_id.

    In training its loss contains the compression loss.
    """

    model_class = CompressiveTransformerModel

    def _loss(self, outputs: CompressiveTransformerOutput, logits, labels, **kwargs) -> torch.Tensor | None:
        loss = super()._loss(outputs, logits, labels, **kwargs)
        return with_compression_loss(loss, outputs, labels, self.config, **kwargs)

    def _output(self, loss, logits, outputs: CompressiveTransformerOutput):
        output = super()._output(loss, logits, outputs)
        return CompressiveTransformerSequenceClassifierOutput(**output, compression_loss=outputs.compression_loss)


def with_compression_loss(
    loss: torch.Tensor | None,
    outputs: CompressiveTransformerOutput,
    targets: torch.Tensor | None,
    config: CompressiveTransformerConfig,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs,
) -> torch.Tensor | None:
    """A head's loss and, in training, the compression loss; each row weighs as much as it has targets [B, ...].

    So rows weigh the same however a batch is cut into micro-batches, of which `num_items_in_batch` counts the targets.
    """
    if outputs.compression_losses is None or config.compression_loss is None:
        return loss
    check_loss_is_inside(
        targets, num_items_in_batch, f"the compression learns by a loss that only the model has. {INSIDE}"
    )
    if targets is None:
        return None
    weights = (targets != IGNORED).flatten(start_dim=1).sum(dim=1) if targets.ndim > 1 else targets != IGNORED
    compression_loss = (weights * outputs.compression_losses).sum() / num_targets(targets, num_items_in_batch)
    return loss + config.compression_loss_weight * compression_loss


def frozen(module: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """`module(states)` without a gradient for the module's parameters."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, parameters, states)


def _mean_square(error: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """[B], of each row's slots [B, E] that are valid, of an error [B, E, ...]."""
    error = error.square()
    if valid is None:
        return error.flatten(1).mean(dim=1)
    per_slot = error.flatten(2).mean(dim=-1)
    return (per_slot * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)


__all__ = [
    "CompressiveTransformerForCausalLM",
    "CompressiveTransformerForSequenceClassification",
    "CompressiveTransformerModel",
    "CompressiveTransformerPreTrainedModel",
]
