"""Transformer-XL: Dai, Yang, Yang, Carbonell, Le and Salakhutdinov 2019, "Transformer-XL: Attentive Language Models
Beyond a Fixed-Length Context".

A decoder that reads a text in segments and remembers, in every layer, the hidden states of the segment before; order
enters as the distance from query to key. Section numbers are those of arXiv:1901.02860.

Shapes: B batch, T new tokens, M slots of the memory, S = M + T keys, H heads, D head dim, L >= S distances.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .adaptive_softmax import AdaptiveEmbedding, AdaptiveSoftmax, Affine
from .attention import (
    BLOCK_SPARSE,
    CacheNameGenerationMixin,
    CachingPatternBackend,
    check_whole_rows,
    eager_attention_forward,
    lower_mask,
    visible_keys,
)
from .attention_patterns import Full, Local
from .causal_lm import (
    ShiftedLabels,
    kept_positions,
    loss_in_chunks,
    next_token_loss,
    next_tokens,
    num_targets,
    own_smoothing,
    position_wise,
    sum_of_chunks,
)
from .checks import check_one_input, check_token_ids
from .classification import SequenceClassificationHead
from .configuration_transformer_xl import TransformerXLConfig
from .memory_segments import SegmentMemory, check_memory
from .positions import RelativeBiases, RelativePositions, RelativeSinusoids, hidden_columns


class TransformerXLAttention(nn.Module):
    """Attention to the memory and the segment, with scores that know the distance (section 3.3)."""

    def __init__(self, config: TransformerXLConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        heads_size = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, heads_size, bias=False)  # W_{k,E}
        self.v_proj = nn.Linear(config.hidden_size, heads_size, bias=False)
        self.r_proj = nn.Linear(config.hidden_size, heads_size, bias=False)  # W_{k,R}
        self.o_proj = nn.Linear(heads_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_states: torch.Tensor,
        attention_mask,
        positions: RelativePositions,
        biases: tuple[torch.Tensor, torch.Tensor],
        memory: SegmentMemory,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, T, hidden] -> [B, T, hidden], and the weights [B, H, T, S] where the backend has them.

        past_states are remembered hidden states [B, M or 0, hidden]; what is projected already, the memory adds. The
        biases are u and v [H, D].
        """
        context = torch.cat([past_states, hidden_states], dim=1)  # h~ = [SG(h of the last segment), h], section 3.2
        query = self.split_heads(self.q_proj(hidden_states))  # [B, H, T, D]
        key, value = memory.update(
            self.split_heads(self.k_proj(context)), self.split_heads(self.v_proj(context)), self.layer_idx
        )  # [B, H, S, D]
        output, weights = self.attend(query, key, value, attention_mask, positions, biases, memory, **kwargs)
        return self.o_proj(output.flatten(2)), weights

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask,
        positions: RelativePositions,
        biases: tuple[torch.Tensor, torch.Tensor],
        memory: SegmentMemory,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, T, H, D] for queries [B, H, T, D] and keys and values [B, H, S, D], and the weights [B, H, T, S]."""
        relative_key = memory.relative_keys(
            self.layer_idx, positions.reach, lambda: self.split_heads(self.r_proj(positions.states))
        )  # [H, L, D]
        content_query, position_query = (query + bias[:, None] for bias in biases)
        # (a) + (c) of section 3.3 are (q + u) k, (b) + (d) are (q + v) W R.
        position_bias = positions.bias(position_query, relative_key, self.scaling)
        if positions.hidden is not None:  # then the bias is a mask as well, and sdpa reads that without a copy
            attention_mask, position_bias = position_bias, None

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            content_query,
            key,
            value,
            attention_mask,
            position_bias=position_bias,
            is_causal=False,  # the mask or the bias says all
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )  # [B, T, H, D]
        if positions.blind is not None:  # with a bias, sdpa averages over hidden keys where there are no others
            output = output.masked_fill(positions.blind[..., None], 0.0)
        return output, weights

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """[..., S, H * D] -> [..., H, S, D]."""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)


class TransformerXLMLP(nn.Module):
    """Position-wise feed-forward layer."""

    def __init__(self, config: TransformerXLConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.dropout(self.act_fn(self.up_proj(hidden_states))))


class TransformerXLBlock(GradientCheckpointingLayer):
    """Residual block; norms come after the sums as in the paper, or before the branches, the memory's included."""

    attention_class = TransformerXLAttention

    def __init__(self, config: TransformerXLConfig, layer_idx: int):
        super().__init__()
        before, after = (nn.LayerNorm, nn.Identity) if config.norm_first else (nn.Identity, nn.LayerNorm)
        self.attention_pre_norm = before(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = self.attention_class(config, layer_idx)
        self.attention_post_norm = after(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp_pre_norm = before(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = TransformerXLMLP(config)
        self.mlp_post_norm = after(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.chunk_size = config.chunk_size_feed_forward

    def forward(
        self, hidden_states: torch.Tensor, past_states: torch.Tensor, *context, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        """[B, T, hidden] -> [B, T, hidden]; the other arguments are those of the attention."""
        return self.transform(hidden_states, past_states, *context, **kwargs)[0]

    def transform(self, hidden_states, past_states, *context, **kwargs) -> tuple[torch.Tensor, ...]:
        """What `forward` returns, and what the attention returns beside its output: the weights [B, H, T, S] where the
        backend has them."""
        attended, *others = self.self_attn(
            self.attention_pre_norm(hidden_states), self.attention_pre_norm(past_states), *context, **kwargs
        )
        hidden_states = self.attention_post_norm(hidden_states + self.dropout(attended))
        if self.chunk_size:
            return position_wise(self.feed_forward, hidden_states, self.chunk_size), *others
        return self.feed_forward(hidden_states), *others

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        transformed = self.mlp(self.mlp_pre_norm(hidden_states))
        return self.mlp_post_norm(hidden_states + self.dropout(transformed))


class TransformerXLPreTrainedModel(CachingPatternBackend, PreTrainedModel):
    """Initial weights, and what Transformers wants to know about the family."""

    config: TransformerXLConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerXLBlock"]
    _skip_keys_device_placement = ["past_key_values", "memory"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    _is_stateful = True
    _can_record_outputs = {"hidden_states": TransformerXLBlock, "attentions": TransformerXLAttention}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`forward` makes the memory; a cache that keeps everything would be another model."""
        return False

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, RelativeBiases):
            init.normal_(module.content, std=self.config.initializer_range)
            init.normal_(module.position, std=self.config.initializer_range)
        elif isinstance(module, Affine):  # as every nn.Linear
            init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (AdaptiveEmbedding, AdaptiveSoftmax)):
            for projection in module.projections:
                init.normal_(projection.weight, std=self.config.projection_initializer_range)

    def resize_token_embeddings(self, *args, **kwargs):
        """As every model's, unless the vocabulary is cut into clusters."""
        if self.config.is_adaptive:
            raise ValueError(
                f"The vocabulary of an adaptive softmax (cutoffs={self.config.cutoffs}, div_val={self.config.div_val}) "
                "cannot be resized; make a new config with another vocab_size."
            )
        return super().resize_token_embeddings(*args, **kwargs)


class TransformerXLModel(TransformerXLPreTrainedModel):
    """The decoder without a head: ids or embeddings in, hidden states [B, T, hidden] out."""

    backends = ("eager", "sdpa", "flex_attention", BLOCK_SPARSE)
    memory_class = SegmentMemory
    block_class = TransformerXLBlock

    def __init__(self, config: TransformerXLConfig):
        super().__init__(config)
        self.pattern = Local(config.mem_len) if config.same_length else Full()
        self.embed_tokens = build_embeddings(config)
        self.embed_scale = config.hidden_size**0.5
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.positions = RelativeSinusoids(config.hidden_size, config.clamp_len)
        self.biases = nn.ModuleList(
            RelativeBiases(config.num_attention_heads, config.head_dim)
            for _ in range(config.num_hidden_layers if config.untie_r else 1)
        )
        self.layers = nn.ModuleList(self.block_class(config, i) for i in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()
        if config.is_adaptive:  # under tensor parallelism every process has all clusters
            self.tp_plan.pop("embed_tokens", None)

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: SegmentMemory | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: [B, T] token ids, or give inputs_embeds [B, T, hidden] as embed_tokens returns them. Both are
                scaled by the square root of hidden_size.
            attention_mask: [B, past + T], 1 for tokens and 0 for padding, where past counts all tokens seen so far
                (past_key_values.get_seq_length()); None if there is no padding among the new tokens. Padding is never
                seen and adds no distance, but takes up slots of the memory.
            past_key_values: the memory that the call for the previous segment returned.
            use_cache: return the memory for the next segment. A memory that is passed in is always brought up to date.
        """
        check_one_input(input_ids, inputs_embeds)
        self.check_backend()
        if kwargs.pop("position_ids", None) is not None:
            raise ValueError(
                "Transformer-XL knows order by distance and takes no position_ids; say with attention_mask what is "
                "padding. Packed documents are not supported."
            )
        if inputs_embeds is None:
            check_token_ids(input_ids, self.config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)
        inputs_embeds = inputs_embeds * self.embed_scale
        memory = self._memory(past_key_values, inputs_embeds)
        new_tokens = _new_tokens(attention_mask, memory, inputs_embeds)

        length = self.config.segment_length or inputs_embeds.shape[1]
        segments = inputs_embeds.split(length, dim=1)
        masks = [None] * len(segments) if new_tokens is None else new_tokens.split(length, dim=1)
        outputs = [
            self.read_segment(segment, mask, memory, return_dict=True, **kwargs)
            for segment, mask in zip(segments, masks)
        ]
        return self.join(outputs, memory if use_cache or past_key_values is not None else None)

    @capture_outputs
    def read_segment(
        self,
        inputs_embeds: torch.Tensor,
        new_tokens: torch.Tensor | None,
        memory: SegmentMemory,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """One segment [B, T, hidden], of which new_tokens [B, T] says what is no padding; the memory takes it in."""
        valid, views = self.prepare(inputs_embeds, new_tokens, memory)
        hidden_states = self.dropout(inputs_embeds)
        for i, (layer, view) in enumerate(zip(self.layers, views)):
            entering, past_states = hidden_states, memory.past_states(hidden_states, i)
            hidden_states = layer(hidden_states, past_states, *view, self.biases_of(i, hidden_states), memory, **kwargs)
            memory.remember(entering, i)
        memory.advance(inputs_embeds.shape[1], valid)
        return BaseModelOutputWithPast(last_hidden_state=self.dropout(hidden_states))

    def prepare(
        self, inputs_embeds: torch.Tensor, new_tokens: torch.Tensor | None, memory: SegmentMemory
    ) -> tuple[torch.Tensor | None, list[tuple]]:
        """Which keys are valid [B, S] (None if all), and for every layer the backend's mask and the distances."""
        check_whole_rows()
        batch_size, length = inputs_embeds.shape[:2]
        valid = memory.valid_keys(new_tokens, batch_size, length)
        seen = visible_keys(self.pattern, self.local_heads.count, inputs_embeds, valid, past_length=memory.held)
        implementation, device = self.config._attn_implementation, inputs_embeds.device
        mask, hidden, lazy = None, None, implementation == BLOCK_SPARSE
        if implementation == "sdpa" and valid is None:  # a bias that hides keys itself saves it reading another mask
            reach = self.config.mem_len if self.config.same_length else None
            hidden = hidden_columns(length, seen.key_length, reach, device)
        else:
            mask = lower_mask(seen, implementation, device)
        reach, at_hand = memory.reach(seen.key_length + 1)
        positions = RelativePositions(
            states=None if at_hand else self.dropout(self.positions(reach, inputs_embeds)),
            key_length=seen.key_length,
            distances=None if lazy or seen.query_positions is None else seen.distances(device),
            blind=None if valid is None or lazy else ~seen.dense(device).any(dim=-1).transpose(1, 2),
            hidden=hidden,
            lazy=lazy,
            reach=reach,
        )
        return valid, [(mask, positions)] * len(self.layers)

    def check_backend(self) -> None:
        """Raise ValueError for an attention implementation that would leave the distances out."""
        implementation = self.config._attn_implementation
        if implementation not in self.backends:
            raise ValueError(
                f"attn_implementation={implementation!r} takes no relative position bias; use one of "
                f"{', '.join(self.backends)}."
            )

    def biases_of(self, layer_idx: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """u and v [H, D] of a layer, of the heads that this process computes."""
        heads = self.local_heads
        return tuple(heads.own(bias) for bias in self.biases[layer_idx % len(self.biases)](like))

    @staticmethod
    def join(outputs: list[BaseModelOutputWithPast], memory: SegmentMemory | None) -> BaseModelOutputWithPast:
        """The outputs of consecutive segments as those of one input."""
        if len(outputs) == 1:
            outputs[0].past_key_values = memory
            return outputs[0]
        attentions, hidden_states = outputs[0].attentions, outputs[0].hidden_states
        if attentions is not None:
            raise ValueError(
                "output_attentions=True with an input longer than segment_length: segments see different numbers of "
                "keys. Give them one at a time."
            )
        if hidden_states is not None:
            by_layer = zip(*(output.hidden_states for output in outputs))
            hidden_states = tuple(None if layer[0] is None else torch.cat(layer, dim=1) for layer in by_layer)
        return BaseModelOutputWithPast(
            last_hidden_state=torch.cat([output.last_hidden_state for output in outputs], dim=1),
            past_key_values=memory,
            hidden_states=hidden_states,
        )

    def _memory(self, past_key_values: SegmentMemory | None, inputs_embeds: torch.Tensor) -> SegmentMemory:
        """The memory handed in, or an empty one; without gradients it need not keep what they would flow through."""
        if past_key_values is None:
            past_key_values = self.memory_class(self.config, projected=not (self.training or torch.is_grad_enabled()))
        check_memory(past_key_values, self.memory_class.kind)
        past_key_values.check(self, inputs_embeds)
        return past_key_values


class TransformerXLForCausalLM(ShiftedLabels, TransformerXLPreTrainedModel, CacheNameGenerationMixin):
    """The decoder with a softmax over the next token, adaptive where the config has cutoffs or projections."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    model_class = TransformerXLModel

    def __init__(self, config: TransformerXLConfig):
        super().__init__(config)
        self.loss_function = next_token_loss
        self.vocab_size = config.vocab_size
        self.chunk_size = config.chunk_size_lm_head
        self.model = self.model_class(config)
        if config.is_adaptive:
            self.lm_head = AdaptiveSoftmax(self.model.embed_tokens)
            self._tied_weights_keys = self.lm_head.tied_keys(
                "lm_head", self.model.embed_tokens, "model.embed_tokens", config.tie_projections
            )
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()
        if config.is_adaptive:
            del self.tp_plan["lm_head"]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: SegmentMemory | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Args:
            labels: [B, T] ids to predict, shifted inside: position t predicts labels[t + 1]; -100 is ignored. Give
                `shift_labels` instead where t predicts shift_labels[t], so that a stream cut into segments loses no
                target.
            logits_to_keep: compute logits for the last so many positions only (0: all), or for these indices.

        The logits of an adaptive softmax are log-probabilities. In training, with targets, it has no logits: the loss
        needs only the clusters that the targets are in. Nor has any head with targets and config.chunk_size_lm_head.
        """
        smoothing = own_smoothing(self, labels, kwargs)
        targets = next_tokens(labels, kwargs.pop("shift_labels", None))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = None
        loss_alone = self.chunk_size or (self.training and self.config.is_adaptive and not smoothing)
        if targets is None or not loss_alone:
            logits = self.lm_head(outputs.last_hidden_state[:, kept_positions(logits_to_keep)])
        loss = self._loss(outputs, logits, targets, smoothing, **kwargs)
        return self._output(loss, logits, outputs)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: `generate_batch` and the others call it first."""
        raise ValueError(
            "Continuous batching keeps keys in pages, which are no memory of segments; use generate(), which takes "
            "prompts of several lengths padded."
        )

    def _loss(self, outputs, logits, targets: torch.Tensor | None, smoothing: float, **kwargs) -> torch.Tensor | None:
        """Mean loss of the targets that count, or their sum over `num_items_in_batch`; None without targets."""
        if targets is None:
            return None
        states = outputs.last_hidden_state
        if self.config.is_adaptive and not smoothing:
            chunked = self.chunk_size > 0
            nats = (
                sum_of_chunks(self._nats, self.chunk_size, states, targets) if chunked else self._nats(states, targets)
            )
            return nats / num_targets(targets, kwargs.get("num_items_in_batch"))
        said = {"shift_labels": targets, "label_smoothing": smoothing, **kwargs}
        if self.chunk_size:
            return loss_in_chunks(self.chunk_size, True, self.lm_head, self.loss_function, states, **said)[0]
        return self.loss_function(logits=logits, labels=None, vocab_size=logits.shape[-1], **said)

    def _nats(self, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """What an adaptive softmax spends on targets [B, T] at hidden states [B, T, hidden]."""
        return self.lm_head.token_losses(hidden_states.flatten(0, 1), targets.flatten()).sum()

    def _output(self, loss, logits, outputs: BaseModelOutputWithPast) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class TransformerXLForSequenceClassification(SequenceClassificationHead, TransformerXLPreTrainedModel):
    """The decoder with a linear layer on each row's last token, the rightmost that is not config.pad_token_id."""

    model_class = TransformerXLModel

    def __init__(self, config: TransformerXLConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


def build_embeddings(config: TransformerXLConfig) -> nn.Module:
    """One table as wide as the model, or several of adaptive width."""
    if config.is_adaptive:
        return AdaptiveEmbedding(
            config.vocab_size, config.embedding_size, config.hidden_size, config.cutoffs, config.div_val
        )
    return nn.Embedding(config.vocab_size, config.hidden_size)


def _new_tokens(attention_mask: torch.Tensor | None, memory: SegmentMemory, inputs_embeds) -> torch.Tensor | None:
    """[B, T] bool, which of the new slots hold tokens; None if all are."""
    if attention_mask is None:
        return None
    batch_size, length = inputs_embeds.shape[:2]
    if attention_mask.shape != (batch_size, memory.seen + length):
        raise ValueError(
            f"attention_mask must have shape [batch, past + new tokens] = [{batch_size}, {memory.seen} + {length}], "
            f"got {list(attention_mask.shape)}."
        )
    past, new = attention_mask.bool().split([memory.seen, length], dim=1)
    memory.check_padding(past)
    return None if bool(new.all()) else new


__all__ = [
    "TransformerXLForCausalLM",
    "TransformerXLForSequenceClassification",
    "TransformerXLModel",
    "TransformerXLPreTrainedModel",
]
