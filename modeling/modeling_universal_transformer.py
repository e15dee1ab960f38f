"""Universal Transformer: Dehghani, Gouws, Vinyals, Uszkoreit and Kaiser 2018, "Universal Transformers"
(arXiv:1807.03819).

Encoder and decoder are one block each, applied step after step with the same weights (section 2.1); before every step
all positions are told where they are and which step it is (equations 6 and 7). With `adaptive`, each position halts
when it is ready (section 2.3, after Graves 2016, arXiv:1603.08983, section 2). Blocks and attention, with its call of
ALL_ATTENTION_FUNCTIONS.get_interface(...), are those of modeling_vanilla_transformer.py. Caches go by step, as another
model's go by layer.

Shapes: B batch, T tokens (target tokens, or those of the only sequence), S source tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .attention_patterns import Full, patterns_for_layers
from .causal_lm import IGNORED, INSIDE, check_loss_is_inside, next_tokens, num_targets
from .configuration_universal_transformer import UniversalTransformerConfig
from .modeling_vanilla_transformer import (
    VanillaTransformerDecoder,
    VanillaTransformerDecoderBlock,
    VanillaTransformerDecoderModel,
    VanillaTransformerEncoder,
    VanillaTransformerEncoderBlock,
    VanillaTransformerForCausalLM,
    VanillaTransformerForConditionalGeneration,
    VanillaTransformerModel,
    VanillaTransformerPreTrainedModel,
    VanillaTransformerStack,
)
from .positions import sinusoids


class OfStep:
    """A cache as the block sees it at one step: its only layer is the step's.

    What a decoder's block reads of the source is the same at every step, and is kept once.
    """

    def __init__(self, cache: Cache, step: int):
        self.step = step
        self.own = getattr(cache, "self_attention_cache", cache)
        if hasattr(cache, "cross_attention_cache"):
            self.self_attention_cache = self
            self.cross_attention_cache, self.is_updated = cache.cross_attention_cache, cache.is_updated

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.own.update(key, value, self.step)


class Walk(NamedTuple):
    """How one call applies the block.

    Attributes:
        steps: how often, at most.
        enter: (states, step) -> what the block is given at that step.
        apply: (entered, step) -> what it makes of it.
        remember: (entered, step) keeps the keys and values of states that are final; None where there is no cache.
    """

    steps: int
    enter: Callable
    apply: Callable
    remember: Callable | None


class FixedDepth(nn.Module):
    """Every position takes every step (section 2.1)."""

    def __init__(self, config: UniversalTransformerConfig):
        super().__init__()

    def forward(self, states: torch.Tensor, walk: Walk) -> tuple[torch.Tensor, None]:
        for step in range(walk.steps):
            states = walk.apply(walk.enter(states, step), step)
        return states, None


class HaltingUnit(nn.Linear):
    """The logit [B, T, 1] of the probability that a position is ready, of states [B, T, hidden]."""

    def __init__(self, config: UniversalTransformerConfig):
        super().__init__(config.hidden_size, 1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        # No matrix product: with one row it may round as weights happen to lie in memory, and halting has a threshold.
        return (states * self.weight[0]).sum(dim=-1, keepdim=True) + self.bias


class AdaptiveDepth(nn.Module):
    """Each position takes steps until its halting probabilities add up (section 2.3).

    What a position becomes is the mean of what its steps made, weighed by their halting probabilities, of which the
    last is the remainder to 1 (Graves 2016, equation 6 and those after it). A position that has halted is copied to the
    steps after ("its state is simply copied to the next step"), so that what others see of it, and what a cache keeps,
    never depends on when they halt. The listing of appendix C goes on computing it, and blends instead of adding.
    """

    def __init__(self, config: UniversalTransformerConfig):
        super().__init__()
        self.halting = HaltingUnit(config)
        self.threshold = config.halting_threshold

    def forward(self, states: torch.Tensor, walk: Walk) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, hidden] -> the same, and the ponder time [B, T] of each position."""
        final = torch.zeros_like(states)
        halted = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
        wide = torch.promote_types(states.dtype, torch.float32)
        halting_sum = torch.zeros(states.shape[:2], dtype=wide, device=states.device)
        ponder = torch.zeros_like(halting_sum)
        for step in range(walk.steps):
            entered = walk.enter(states, step)
            if self.may_stop(halted):
                if walk.remember is None:
                    break
                walk.remember(entered, step)
                continue
            probability = torch.sigmoid(self.halting(entered)[..., 0].to(wide))
            states = walk.apply(entered, step)
            halts = ~halted & ((halting_sum + probability > self.threshold) | (step == walk.steps - 1))
            remainder = 1 - halting_sum
            weight = torch.where(halts, remainder, probability).masked_fill(halted, 0.0)
            final = final + weight[..., None].to(states.dtype) * states
            ponder = ponder + torch.where(halts, 1 + remainder, 1.0).masked_fill(halted, 0.0)  # N + R
            halting_sum, halted = halting_sum + weight, halted | halts
            states = torch.where(halted[..., None], final, states)
        return final, ponder

    @staticmethod
    def may_stop(halted: torch.Tensor) -> bool:
        """Have all positions halted? Graphs have every step, and so have ranks that wait for each other's weights."""
        many = torch.distributed.is_available() and torch.distributed.is_initialized()
        alone = not many or torch.distributed.get_world_size() == 1
        return alone and not torch.compiler.is_compiling() and bool(halted.all())


@dataclass
class UniversalTransformerEncoderOutput(BaseModelOutput):
    """`ponder` [B, S] as in UniversalTransformerOutput."""

    ponder: torch.FloatTensor | None = None


@dataclass
class UniversalTransformerOutput(BaseModelOutputWithPastAndCrossAttentions):
    """`ponder` [B, T]: steps that each position took, and the remainder of its last; None without `adaptive`."""

    ponder: torch.FloatTensor | None = None


@dataclass
class UniversalTransformerSeq2SeqOutput(Seq2SeqModelOutput):
    """`ponder` [B, T] and `encoder_ponder` [B, S] as in UniversalTransformerOutput."""

    ponder: torch.FloatTensor | None = None
    encoder_ponder: torch.FloatTensor | None = None


@dataclass
class UniversalTransformerCausalLMOutput(CausalLMOutputWithCrossAttentions):
    """`ponder` [B, T] as in UniversalTransformerOutput."""

    ponder: torch.FloatTensor | None = None


@dataclass
class UniversalTransformerSeq2SeqLMOutput(Seq2SeqLMOutput):
    """`ponder` [B, T] and `encoder_ponder` [B, S] as in UniversalTransformerOutput."""

    ponder: torch.FloatTensor | None = None
    encoder_ponder: torch.FloatTensor | None = None


class UniversalTransformerPreTrainedModel(VanillaTransformerPreTrainedModel):
    """Initial weights of what decides when to halt: at first, after two steps."""

    config: UniversalTransformerConfig

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, HaltingUnit):
            init.ones_(module.bias)


class RepeatedBlock(UniversalTransformerPreTrainedModel, VanillaTransformerStack):
    """A stack that is one block, applied as often as there are steps."""

    def __init__(self, config: UniversalTransformerConfig, vocab_size: int, patterns, block: nn.Module, steps: int):
        VanillaTransformerStack.__init__(self, config, vocab_size, patterns, [block])
        self.patterns = patterns_for_layers(Full() if patterns is None else patterns, steps)
        self.depth = AdaptiveDepth(config) if config.adaptive else FixedDepth(config)
        self.post_init()

    def prepare(
        self, embeddings, attention_mask, position_ids=None, past_key_values=None, paged: bool = False
    ) -> tuple:
        """The embeddings as they are, a mask for each step, and where tokens stand."""
        masks, queries, order = self.place(embeddings, attention_mask, position_ids, past_key_values, paged)
        return embeddings, masks, (queries, order)

    def apply_layers(self, hidden_states, masks: list, *others, order, past_key_values=None, **kwargs) -> tuple:
        """[B, T, hidden] through all steps, and the ponder time [B, T]."""
        (queries, order), block = order, self.layers[0]

        def enter(states: torch.Tensor, step: int) -> torch.Tensor:
            """With the waves of positions and of the step, which counts from 1 (equations 6 and 7)."""
            time = torch.full((1, 1), step + 1.0, device=states.device)
            return self.positions.embed(states, queries) + sinusoids(time, states.shape[-1], dtype=states.dtype)

        def apply(entered: torch.Tensor, step: int) -> torch.Tensor:
            past = None if past_key_values is None else OfStep(past_key_values, step)
            return block(entered, masks[step], *others, order=order, past_key_values=past, **kwargs)

        remember = None if past_key_values is None else partial(self.remember, past_key_values, order)
        return self.depth(hidden_states, Walk(len(masks), enter, apply, remember))

    def remember(self, past_key_values: Cache, order, entered: torch.Tensor, step: int) -> None:
        """Keep the keys and values of a step that nobody takes: later tokens may take it."""
        block, attention = self.layers[0], self.layers[0].self_attn

        def keep(states: torch.Tensor) -> torch.Tensor:
            key, value = (
                attention.split_heads(projection(states)) for projection in (attention.k_proj, attention.v_proj)
            )
            _, key = attention.positions.rotate(key, key, order)
            OfStep(past_key_values, step).update(key, value, 0)
            return torch.zeros_like(states)

        block.self_attn_residual(
            attention.positions.enter(entered, order), keep
        )  # which norms come first is its matter


class UniversalTransformerEncoder(RepeatedBlock, VanillaTransformerEncoder):
    """Source ids or embeddings in, hidden states [B, S, hidden] out."""

    def __init__(self, config: UniversalTransformerConfig):
        block, patterns = VanillaTransformerEncoderBlock(config, 0), config.attention_patterns
        super().__init__(config, config.vocab_size, patterns, block, config.num_hidden_layers)

    def finish(self, hidden_states: tuple) -> UniversalTransformerEncoderOutput:
        states, ponder = hidden_states
        return UniversalTransformerEncoderOutput(last_hidden_state=self.norm(states), ponder=ponder)


class UniversalTransformerDecoder(RepeatedBlock, VanillaTransformerDecoder):
    """Target ids or embeddings in, hidden states [B, T, hidden] out."""

    def __init__(self, config: UniversalTransformerConfig):
        block, patterns = VanillaTransformerDecoderBlock(config, 0), config.patterns_of_decoder
        super().__init__(config, config.vocab_size_of_decoder, patterns, block, config.decoder_layers)
        self.plan_cross_attention()

    def finish(self, hidden_states: tuple, past_key_values: Cache | None) -> UniversalTransformerOutput:
        states, ponder = hidden_states
        return UniversalTransformerOutput(
            last_hidden_state=self.norm(states), past_key_values=past_key_values, ponder=ponder
        )


class UniversalTransformerModel(UniversalTransformerPreTrainedModel, VanillaTransformerModel):
    """Encoder and decoder without a head: hidden states [B, T, hidden] of the target."""

    encoder_class, decoder_class = UniversalTransformerEncoder, UniversalTransformerDecoder

    def join(self, encoder_outputs, outputs: UniversalTransformerOutput) -> UniversalTransformerSeq2SeqOutput:
        joined, encoder_ponder = super().join(encoder_outputs, outputs), getattr(encoder_outputs, "ponder", None)
        return UniversalTransformerSeq2SeqOutput(**joined, ponder=outputs.ponder, encoder_ponder=encoder_ponder)


class UniversalTransformerDecoderModel(UniversalTransformerPreTrainedModel, VanillaTransformerDecoderModel):
    """The decoder alone, under the name that it has beside an encoder."""

    decoder_class = UniversalTransformerDecoder


def with_ponder_cost(
    output, targets: torch.Tensor | None, padding: torch.Tensor | None, model: nn.Module, num_items_in_batch
):
    """A head's output whose loss has the ponder cost in training (Graves 2016, section 2.1): of the decoder's positions
    that have targets [B, T], and the mean of the encoder's in each row, which weighs as much as it has targets.

    So rows weigh the same however a batch is cut into micro-batches, of which `num_items_in_batch` counts the targets.
    """
    if output.ponder is None or not model.training or not model.config.ponder_cost:
        return output
    check_loss_is_inside(targets, num_items_in_batch, f"halting learns by a cost that only the model has. {INSIDE}")
    if targets is None:
        return output
    counted = targets != IGNORED
    cost = (output.ponder * counted).sum()
    encoder_ponder = getattr(output, "encoder_ponder", None)
    if encoder_ponder is not None:
        valid = torch.ones_like(encoder_ponder) if padding is None else padding.to(encoder_ponder.dtype)
        of_rows = (encoder_ponder * valid).sum(dim=1) / valid.sum(dim=1)
        cost = cost + (of_rows * counted.sum(dim=1)).sum()
    output.loss = output.loss + model.config.ponder_cost * cost / num_targets(targets, num_items_in_batch)
    return output


class UniversalTransformerGenerationMixin:
    """Where caches go by step: it stands before the mixin of the vanilla Transformer."""

    def obstacle_to_paging(self) -> str:
        return "keeps keys by layer, and this model's go by step"


class UniversalTransformerForConditionalGeneration(
    UniversalTransformerGenerationMixin,
    UniversalTransformerPreTrainedModel,
    VanillaTransformerForConditionalGeneration,
):
    """Encoder and decoder with a linear layer to the next target token's logits."""

    model_class = UniversalTransformerModel

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UniversalTransformerSeq2SeqLMOutput:
        """As VanillaTransformerForConditionalGeneration; with `adaptive`, the training loss has the ponder cost."""
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **{**kwargs, "return_dict": True},
        )
        padding = None if attention_mask is None or attention_mask.ndim != 2 else attention_mask
        return with_ponder_cost(output, labels, padding, self, kwargs.get("num_items_in_batch"))

    def finish(self, loss, logits, outputs: UniversalTransformerSeq2SeqOutput) -> UniversalTransformerSeq2SeqLMOutput:
        ponder = {"ponder": outputs.ponder, "encoder_ponder": outputs.encoder_ponder}
        return UniversalTransformerSeq2SeqLMOutput(**super().finish(loss, logits, outputs), **ponder)


class UniversalTransformerForCausalLM(
    UniversalTransformerGenerationMixin, UniversalTransformerPreTrainedModel, VanillaTransformerForCausalLM
):
    """The decoder alone as a language model."""

    model_class = UniversalTransformerDecoderModel

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UniversalTransformerCausalLMOutput:
        """As VanillaTransformerForCausalLM; with `adaptive`, the training loss has the ponder cost."""
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **{**kwargs, "return_dict": True},
        )
        targets = next_tokens(labels, kwargs.get("shift_labels"))
        return with_ponder_cost(output, targets, None, self, kwargs.get("num_items_in_batch"))

    def finish(self, predicted, outputs: UniversalTransformerOutput) -> UniversalTransformerCausalLMOutput:
        return UniversalTransformerCausalLMOutput(**super().finish(predicted, outputs), ponder=outputs.ponder)


UniversalTransformer = UniversalTransformerModel

__all__ = [
    "UniversalTransformer",
    "UniversalTransformerForCausalLM",
    "UniversalTransformerForConditionalGeneration",
    "UniversalTransformerModel",
    "UniversalTransformerPreTrainedModel",
]
