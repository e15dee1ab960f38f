"""Image Transformer: Parmar, Vaswani, Uszkoreit, Kaiser, Shazeer, Ku and Tran 2018, "Image Transformer".

A decoder that predicts an image value by value, with attention limited to a block of the image and what lies around it;
and an encoder and such a decoder for enlarging images. Equation and section numbers are those of arXiv:1802.05751.

Shapes: B batch, T values (ids), C channels, W values that share a position of the trunk (1, or the C of a pixel under a
mixture), P positions of the trunk, S source values, H heads, D head dim, d hidden, V ids.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate, pad
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithPast,
    Seq2SeqLMOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import CachingPatternBackend, cross_attention_mask, eager_attention_forward, layer_masks, new_positions
from .attention_patterns import Block2D, patterns_for_layers
from .cache_patterns import PatternCache, PatternCacheGenerationMixin
from .causal_lm import (
    IGNORED,
    ShiftedLabels,
    check_loss_is_inside,
    kept_positions,
    next_tokens,
    num_targets,
    own_smoothing,
    position_wise,
)
from .checks import check_counted, check_embeddings, check_one_input, check_positions, check_targets, check_token_ids
from .configuration_image_transformer import ImageTransformerConfig
from .mixture_of_logistics import (
    RESIDUAL_UNIT,
    ChannelMixture,
    channel_mixture,
    log_prob_of_pixels,
    num_parameters,
    rescale,
)
from .positions import sinusoids

# ---------------------------------------------------------------------------------------------------------------------
# The cache of pictures, which are given value by value but may be looked at pixel by pixel


class ImageCache(Cache):
    """Keys and values of the trunk, and what the next values need beside them.

    `get_seq_length` counts values seen (the start token included), while the trunk's cache counts its own positions,
    of which there is one for W values.

    Args:
        trunk: what the layers' keys and values are kept in.

    Attributes:
        values_seen: number of values.
        recent_ids: [B, W - 1] the last ids, which may belong to a position that is not complete.
        first: [B, 1, d] embedding of the start token, that is of the class where there are classes.
        last_hidden: [B, 1, d] hidden state of the newest position.
    """

    def __init__(self, trunk: Cache):
        super().__init__(layers=trunk.layers)
        self.trunk = trunk
        self._forget()

    def _forget(self) -> None:
        self.values_seen = 0
        self.recent_ids = self.first = self.last_hidden = None

    @property
    def nbytes(self) -> int:
        """Bytes of all stored keys and values."""
        return self.trunk.nbytes

    def update(self, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        return self.trunk.update(*args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.values_seen

    @property
    def max_cache_len(self) -> int:
        """No limit, as of a PatternCache."""
        return -1

    @property
    def is_croppable(self) -> bool:
        return False

    def reset(self) -> None:
        self.trunk.reset()
        self._forget()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.trunk.reorder_cache(beam_idx)
        self._for_each_state(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.trunk.batch_select_indices(indices)
        self._for_each_state(lambda state: state[indices.to(state.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.trunk.batch_repeat_interleave(repeats)
        self._for_each_state(lambda state: state.repeat_interleave(repeats, dim=0))

    def crop(self, *args, **kwargs) -> None:
        raise ValueError("The cache of a model with classes or of whole pixels cannot take values back.")

    def _for_each_state(self, change) -> None:
        for name in ("recent_ids", "first", "last_hidden"):
            state = getattr(self, name)
            if state is not None:
                setattr(self, name, change(state))


def image_state(cache: Cache | None) -> ImageCache | None:
    """The cache if it is an ImageCache, perhaps of another copy of this file."""
    return cache if hasattr(cache, "values_seen") else None


def ids_before(input_ids: torch.Tensor, count: int, cache: Cache | None, width: int) -> torch.Tensor:
    """[B, count, W]: for each of `count` new positions the W ids before it; the newest ids are left in the cache."""
    if width == 1:
        return input_ids[..., None]
    ids = with_recent(input_ids, cache, width)
    seen = 0
    if cache is not None:
        seen, cache.recent_ids = cache.values_seen, ids[:, 1 - width :]
    offset = -seen % width
    return ids[:, offset : offset + count * width].unflatten(1, (count, width))


def for_each_value(hidden_states: torch.Tensor, length: int, cache: Cache | None, width: int) -> torch.Tensor:
    """Hidden states [B, P, d] of new positions -> those of the `length` new values [B, T, d], which share them."""
    state = image_state(cache)
    if width > 1:
        within = 0 if state is None else state.values_seen % width
        if within:  # these values belong to a position that was computed before
            hidden_states = torch.cat([state.last_hidden, hidden_states], dim=1)
        hidden_states = hidden_states.repeat_interleave(width, dim=1)[:, within : within + length]
    if state is not None:
        state.last_hidden = hidden_states[:, -1:]
        state.values_seen += length
    return hidden_states


def with_recent(input_ids: torch.Tensor, cache: Cache | None, width: int) -> torch.Tensor:
    """[B, W - 1 + T]: the new ids behind the last ones that a position of `width` values may need; 0 where none are."""
    recent = getattr(cache, "recent_ids", None)
    if recent is None:
        recent = input_ids.new_zeros(input_ids.shape[0], width - 1)
    return torch.cat([recent, input_ids], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# How an image enters: values, whole pixels, classes, where they lie, and a small image at the size of a large one


class ValueEmbedding(nn.Module):
    """A position for each value, embedded by the table of its channel (section 3.1).

    A row of `embed_tokens` holds an id's vectors for all channels. They are multiplied by sqrt(d), as in the authors'
    code.
    """

    def __init__(self, config: ImageTransformerConfig):
        super().__init__()
        self.channels, self.hidden_size = config.num_channels, config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.num_channels * config.hidden_size)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, enlarged: None = None) -> torch.Tensor:
        """The ids [B, P, 1] before the values at `positions` [B or 1, P] -> [B, P, d]."""
        return self.of_channel(self.embed_tokens(ids.squeeze(-1)), positions)

    def of_channel(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """From rows [B, P, C * d] of the table what belongs to each value's channel; [B, P, d] is taken as it is."""
        if rows.shape[-1] != self.hidden_size:
            channel = ((positions - 1) % self.channels)[..., None, None]
            rows = rows.unflatten(-1, (self.channels, self.hidden_size))
            rows = rows.gather(-2, channel.expand(*rows.shape[:2], 1, self.hidden_size)).squeeze(-2)
        return rows * math.sqrt(self.hidden_size)


class PixelConvolution(nn.Linear):
    """The 1 x C convolution over the values of a pixel, before a ReLU."""

    def init_weights(self) -> None:
        """Weights and biases of one size, so that the ReLUs bend at brightnesses all over the range.

        From small weights and no biases, which bend only at grey, brightness is learned much more slowly.
        """
        bound = self.in_features**-0.5
        init.uniform_(self.weight, -bound, bound)
        init.uniform_(self.bias, -bound, bound)


class SourcePixelEmbedding(nn.Module):
    """A position for each pixel: a 1 x C convolution over its values as numbers from -1 to 1 (section 3.1).

    Followed by a ReLU, as in the authors' code.
    """

    def __init__(self, config: ImageTransformerConfig):
        super().__init__()
        self.num_values = config.num_values
        self.embed_values = PixelConvolution(config.num_channels, config.hidden_size)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Whole pixels [B, P, C] -> [B, P, d]."""
        return self.embed_numbers(self.numbers(ids, self.embed_values.weight.dtype))

    def numbers(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """From -1 to 1; start tokens as the last value."""
        return rescale(ids.clamp(max=self.num_values - 1), self.num_values, dtype)

    def embed_numbers(self, numbers: torch.Tensor) -> torch.Tensor:
        """[B, P, C] -> [B, P, d]"""
        return self.embed_values(numbers.to(self.embed_values.weight.dtype)).relu()


class PixelEmbedding(SourcePixelEmbedding):
    """The same for the pixels before those to predict, or how they differ from an enlarged image.

    Before the first is the start token.
    """

    def __init__(self, config: ImageTransformerConfig):
        super().__init__(config)
        self.hidden_size = config.hidden_size
        self.embed_start = nn.Embedding(config.vocab_size - config.num_values, config.hidden_size)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, enlarged: torch.Tensor | None = None) -> torch.Tensor:
        """The pixels [B, P, C] before those at `positions` [1, P] -> [B, P, d]; `enlarged` [B, pixels, C]."""
        start = self.embed_start((ids[..., -1] - self.num_values).clamp(min=0)) * math.sqrt(self.hidden_size)
        if enlarged is None:
            pixels = super().forward(ids, positions)
        else:
            before = enlarged[:, (positions[0] - 1).clamp(min=0)]
            pixels = self.embed_numbers((self.numbers(ids, enlarged.dtype) - before) / RESIDUAL_UNIT)
        return torch.where((positions == 0)[..., None], start, pixels)


EMBEDDINGS = {"categorical": ValueEmbedding, "logistic_mixture": PixelEmbedding}
SOURCE_EMBEDDINGS = {"categorical": ValueEmbedding, "logistic_mixture": SourcePixelEmbedding}


class ClassCondition(nn.Module):
    """Adds the embedding of the class, which is the start token's, to every later position (section 5.1)."""

    def forward(self, embeddings: torch.Tensor, positions: torch.Tensor, past: ImageCache | None) -> torch.Tensor:
        """[B, P, d] at `positions` [B or 1, P]; the class of earlier calls is in `past`, and left there again."""
        before = None if past is None else past.first
        before = torch.zeros_like(embeddings[:, :1]) if before is None else before
        if embeddings.shape[1] == 0:
            return embeddings
        steps = torch.arange(1, embeddings.shape[1] + 1, device=embeddings.device)
        starts = torch.where(positions == 0, steps, 0).cummax(dim=-1).values  # the last start so far; 0: the past's
        starts = starts.expand(embeddings.shape[:2])[..., None].expand_as(embeddings)
        classes = torch.cat([before, embeddings], dim=1).gather(1, starts)
        if past is not None:
            past.first = classes[:, -1:]
        return embeddings + classes * (positions > 0)[..., None]


class NoCondition(nn.Module):
    """Images without classes."""

    def forward(self, embeddings: torch.Tensor, positions: torch.Tensor, past: ImageCache | None) -> torch.Tensor:
        return embeddings


class SinusoidalAxis(nn.Module):
    """A coordinate as waves; the middle of a pixel of a small image is that of the pixels it stands for in a large one.

    So attention from the large image to the same place in the small one is between the same waves.
    """

    def __init__(self, length: int, width: int, stretch: float):
        super().__init__()
        self.width, self.stretch = width, stretch

    def forward(self, coordinate: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        exact = torch.promote_types(like.dtype, torch.float32)
        stretched = (coordinate.to(exact) + 0.5) * self.stretch - 0.5
        return sinusoids(stretched, self.width).to(like.dtype)


class LearnedAxis(nn.Embedding):
    """A coordinate as a learned vector."""

    def __init__(self, length: int, width: int, stretch: float):
        super().__init__(length, width)

    def forward(self, coordinate: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return super().forward(coordinate)


AXES = {"sinusoidal": SinusoidalAxis, "learned": LearnedAxis}


class ImageCoordinates(nn.Module):
    """Where in the image a position lies: half of the dimensions for its row, half for its column and channel.

    Args:
        kind: a key of AXES.
        grid: rows, columns, and positions in a pixel.
        block_shape: height and width of the blocks in whose order positions count; None for row by row.
        hidden_size: d.
        stretch: height and width of the image that coordinates are of, as multiples of the grid's.
    """

    def __init__(self, kind: str, grid, block_shape: list[int] | None, hidden_size: int, stretch=(1.0, 1.0)):
        super().__init__()
        height, width = grid[:2] if block_shape is None else block_shape
        self.order = Block2D(height, width, 0, 0).bind(grid)
        self.rows = AXES[kind](grid[0], hidden_size // 2, stretch[0])
        self.columns = AXES[kind](grid[1] * grid[2], hidden_size // 2, stretch[1])

    @property
    def num_positions(self) -> int:
        return math.prod(self.order.grid)

    def forward(self, positions: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """[B, P] positions -> [B, P, d] in the dtype of `like`."""
        row, column = self.order.place(positions)
        depth = self.order.grid[2]
        return torch.cat([self.rows(row, like), self.columns(column * depth + positions % depth, like)], dim=-1)


@dataclass
class EnlargingEncoderOutput(BaseModelOutput):
    """What the encoder of a small image returns.

    Attributes:
        enlarged: [B, N, C] numbers from about -1 to 1 in the order of generation, the image interpolated to the size of
            the large one; None without `predict_residual`.
    """

    enlarged: torch.FloatTensor | None = None


class BicubicEnlargement(nn.Module):
    """The small image at the size of the large one, for a model that predicts what is added to it.

    Not in the paper: networks that enlarge images are commonly given the plain interpolation and learn the residual, as
    in Kim, Lee and Lee 2016 (arXiv:1511.04587). Bicubic, with Pillow's kernel (Keys 1981, a = -1/2).
    """

    def __init__(self, config: ImageTransformerConfig):
        super().__init__()
        self.small, self.large, self.num_values = config.source_image_size, config.image_size, config.num_values
        self.order = Block2D(*(config.block_shape or config.image_size), 0, 0).bind(config.grid)

    def forward(self, pixels: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Ids [B, S, C] in raster order -> [B, N, C], of the dtype of `like` but of at least float32."""
        if pixels.shape[1] != math.prod(self.small):
            raise ValueError(
                f"predict_residual=True enlarges whole images of {self.small} pixels; input_ids hold {pixels.shape[1]}."
            )
        values = rescale(
            pixels.clamp(max=self.num_values - 1), self.num_values, torch.promote_types(like.dtype, torch.float32)
        )
        # The kernel is Pillow's with `antialias` only; where an image grows, that changes nothing else.
        enlarged = interpolate(values.mT.unflatten(2, self.small), self.large, mode="bicubic", antialias=True)
        rows, columns = self.order.place(torch.arange(math.prod(self.large), device=pixels.device))
        return enlarged[:, :, rows, columns].mT


def check_enlarged(predict_residual: bool, enlarged: torch.Tensor | None) -> None:
    """Raise ValueError if the enlarged image is missing, or is given to a model that predicts values themselves."""
    if predict_residual and enlarged is None:
        raise ValueError(
            "predict_residual=True needs the enlarged small image: use ImageTransformerForSuperResolution, with "
            "input_ids, or with encoder_outputs as its encoder returned them."
        )
    if not predict_residual and enlarged is not None:
        raise ValueError("enlarged is for models with predict_residual=True; this one predicts values themselves.")


# ---------------------------------------------------------------------------------------------------------------------
# Attention and the block


class ImageTransformerAttention(nn.Module):
    """Multi-head attention (equation 1) to the same sequence, or to an encoder's."""

    def __init__(self, config: ImageTransformerConfig, layer_idx: int, is_causal: bool):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask,
        encoder_hidden_states: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, P, hidden] -> [B, P, hidden], and the weights [B, H, P, keys] where the backend has them."""
        query = self._heads(self.q_proj(hidden_states))  # [B, H, P, D]
        key, value = self._keys_and_values(hidden_states, encoder_hidden_states, past_key_values)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )  # [B, P, H, D]
        return self.o_proj(output.flatten(2)), weights

    def _keys_and_values(self, hidden_states, encoder_hidden_states, past_key_values):
        crosses = encoder_hidden_states is not None
        if crosses and past_key_values is not None and past_key_values.get_seq_length(self.layer_idx) > 0:
            kept = past_key_values.layers[self.layer_idx]  # the encoder's keys are those of the first step
            return kept.keys, kept.values
        source = encoder_hidden_states if crosses else hidden_states
        key, value = self._heads(self.k_proj(source)), self._heads(self.v_proj(source))
        return (key, value) if past_key_values is None else past_key_values.update(key, value, self.layer_idx)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MatchingKeys(nn.Linear):
    """Keys of an encoder's positions that at first are what the queries of these would be.

    So a position of the large image looks at like coordinates of the small one from the start; from independent weights
    that takes most of a short training to learn.
    """

    def __init__(self, q_proj: nn.Linear):
        super().__init__(q_proj.in_features, q_proj.out_features, bias=False)
        self.queries = (q_proj,)  # in a tuple, so that it stays no part of this module

    def init_weights(self) -> None:
        init.normal_(self.queries[0].weight, std=self.in_features**-0.5)
        init.copy_(self.weight, self.queries[0].weight)


class ImageTransformerMLP(nn.Module):
    """Position-wise feed-forward layer W_1 relu(W_2 x) (equation 2)."""

    def __init__(self, config: ImageTransformerConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class ImageTransformerBlock(GradientCheckpointingLayer):
    """Attention and a feed-forward layer, each followed by dropout, the residual and a norm (equations 1 and 2)."""

    def __init__(self, config: ImageTransformerConfig, layer_idx: int, is_causal: bool = True, cross: bool = False):
        super().__init__()
        self.self_attn = ImageTransformerAttention(config, layer_idx, is_causal)
        self.self_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attn = ImageTransformerAttention(config, layer_idx, is_causal=False) if cross else None
        if cross:
            self.cross_attn.k_proj = MatchingKeys(self.cross_attn.q_proj)
        self.cross_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if cross else None
        self.mlp = ImageTransformerMLP(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.resid_dropout)
        self.chunk_size = config.chunk_size_feed_forward

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask=None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask=None,
        past_key_values: Cache | None = None,
        cross_past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states, attention_mask, past_key_values=past_key_values, **kwargs)
        hidden_states = self.self_attn_norm(hidden_states + self.dropout(attended))  # equation 1
        if self.cross_attn is not None:
            attended, _ = self.cross_attn(
                hidden_states,
                encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                past_key_values=cross_past_key_values,
                **kwargs,
            )
            hidden_states = self.cross_attn_norm(hidden_states + self.dropout(attended))
        if self.chunk_size:
            return position_wise(self.feed_forward, hidden_states, self.chunk_size)
        return self.feed_forward(hidden_states)

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.mlp_norm(hidden_states + self.dropout(self.mlp(hidden_states)))  # equation 2


# ---------------------------------------------------------------------------------------------------------------------
# Decoder and encoder


class ImageTransformerPreTrainedModel(CachingPatternBackend, PreTrainedModel):
    """Initial weights, and what Transformers wants to know about the family."""

    config: ImageTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ImageTransformerBlock"]
    _skip_keys_device_placement = ["past_key_values", "cross_past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    _can_record_outputs = {
        "hidden_states": ImageTransformerBlock,
        "attentions": OutputRecorder(ImageTransformerAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(ImageTransformerAttention, index=1, layer_name="cross_attn"),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (PixelConvolution, MatchingKeys)):
            module.init_weights()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in Transformers, but values and start tokens keep their ids.

        Raises:
            ValueError: for fewer than there are of those.
        """
        needed = self.config.num_values + max(1, self.config.num_classes)
        if new_num_tokens is not None and new_num_tokens < needed:
            raise ValueError(
                f"new_num_tokens={new_num_tokens} is too small: num_values={self.config.num_values} and "
                f"num_classes={self.config.num_classes} need {needed} ids."
            )
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
        """Leave the 2-D padding mask alone: `forward` builds each layer's own mask, whatever the cache."""
        return attention_mask


class ImageTransformerStack(ImageTransformerPreTrainedModel):
    """What the decoder and the encoder share: how values enter."""

    def get_input_embeddings(self) -> nn.Module:
        """The table of values and start tokens; models of whole pixels have none."""
        if not hasattr(self.embedding, "embed_tokens"):
            raise NotImplementedError(
                "output='logistic_mixture' reads values as numbers; it has no table of ids. With PEFT name the "
                "target_modules, instead of 'all-linear' or token indices, or save with save_embedding_layers=False."
            )
        return self.embedding.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding.embed_tokens = value

    def unpadded(self, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """The mask; none if positions are pixels, whose images are never padded."""
        if self.config.values_per_position == 1 or attention_mask is None:
            return attention_mask
        if not torch.compiler.is_compiling() and not bool((attention_mask != 0).all()):
            raise ValueError(
                "output='logistic_mixture' takes no padding: attention_mask must be 1 everywhere; "
                "an image has all of its values."
            )
        return None


class ImageTransformerModel(ImageTransformerStack):
    """The decoder without a head: ids in, and for each the hidden state [B, T, hidden] that predicts the next value.

    With `output="logistic_mixture"` the trunk has one position for each pixel, whose values share its hidden state.
    """

    def __init__(self, config: ImageTransformerConfig, cross: bool = False):
        super().__init__(config)
        config.validate_vocabulary()  # fields may have been changed since the config was made, as from_pretrained does
        self.values_per_position = config.values_per_position
        self.cross = cross
        patterns = patterns_for_layers(config.attention_patterns, config.num_hidden_layers)
        self.patterns = [pattern.bind(config.grid) for pattern in patterns]
        self.embedding = EMBEDDINGS[config.output](config)
        self.condition = ClassCondition() if config.num_classes else NoCondition()
        self.coordinates = ImageCoordinates(config.coordinates, config.grid, config.block_shape, config.hidden_size)
        self.dropout = nn.Dropout(config.resid_dropout)
        blocks = (ImageTransformerBlock(config, i, cross=cross) for i in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(blocks)
        self.gradient_checkpointing = False
        self.post_init()
        if cross:
            attention = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
            self.tp_plan.update({f"layers.*.cross_attn.{name}": style for name, style in attention.items()})

    @property
    def needs_state(self) -> bool:
        """Does decoding need more of the past than keys and values?"""
        return self.values_per_position > 1 or self.config.num_classes > 0

    def new_cache(self, keys: Cache) -> Cache:
        """An empty decoding cache with `keys` for the keys and values of self-attention."""
        cache = ImageCache(keys) if self.needs_state else keys
        return EncoderDecoderCache(cache, DynamicCache()) if self.cross else cache

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        enlarged: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """
        Args:
            input_ids: [B, T] a start token and the values before those to predict, in the order of generation.
            inputs_embeds: instead, [B, T, channels * hidden] rows of the table of ids, or [B, T, hidden] of the values'
                own channels.
            attention_mask: [B, past + T], 1 for ids and 0 for padding; no padding where pixels are positions.
            position_ids: [B, T] positions; counted from the mask if None.
            encoder_hidden_states: [B, S, hidden] what cross-attention reads.
            encoder_attention_mask: [B, S], 0 for its padding.
            past_key_values: what earlier calls returned.
            enlarged: [B, pixels, channels] what the encoder interpolated; with `predict_residual`.
        """
        self._check_inputs(input_ids, inputs_embeds, encoder_hidden_states)
        check_enlarged(self.config.predict_residual, enlarged)
        if past_key_values is None and use_cache:
            past_key_values = self.new_cache(DynamicCache())
        past, cross_past = _split_cache(past_key_values)
        if past is not None and self.needs_state and image_state(past) is None:
            past = past_key_values = self._with_state(past)
        values = input_ids if inputs_embeds is None else inputs_embeds
        length = values.shape[1]
        attention_mask, position_ids = self._without_padding(attention_mask, position_ids, past)

        positions = self._positions(values, attention_mask, position_ids, past)
        hidden_states = self._embed(input_ids, inputs_embeds, positions, past, enlarged)
        if hidden_states.shape[1] > 0:  # else all values belong to a pixel whose position has been computed
            hidden_states = self.dropout(hidden_states + self.coordinates(positions, hidden_states))
            trunk = past.trunk if self.needs_state and past is not None else past
            said = (attention_mask, position_ids, trunk)
            masks = layer_masks(self.patterns, self.config, hidden_states, *said, heads=self.local_heads)
            if self.cross:
                kwargs["encoder_attention_mask"] = cross_attention_mask(
                    self.config, hidden_states, encoder_hidden_states, encoder_attention_mask
                )
                kwargs["cross_past_key_values"] = cross_past
            for layer, mask in zip(self.layers, masks):  # the encoder's states not by name: gradients flow through them
                hidden_states = layer(hidden_states, mask, encoder_hidden_states, past_key_values=trunk, **kwargs)
        hidden_states = for_each_value(hidden_states, length, past, self.values_per_position)
        return BaseModelOutputWithPastAndCrossAttentions(hidden_states, past_key_values)

    def _check_inputs(self, input_ids, inputs_embeds, encoder_hidden_states) -> None:
        check_one_input(input_ids, inputs_embeds)
        if input_ids is not None:
            check_token_ids(input_ids, self.config.vocab_size)
        elif self.config.output != "categorical":
            raise ValueError("output='logistic_mixture' reads values as numbers: give input_ids, not inputs_embeds.")
        else:
            one, whole = self.config.hidden_size, self.config.num_channels * self.config.hidden_size
            check_embeddings(inputs_embeds, one if inputs_embeds.shape[-1] == one else whole)
        if self.cross != (encoder_hidden_states is not None):
            raise ValueError(
                "Give encoder_hidden_states to a decoder with cross-attention, and to no other; "
                f"this one has {'some' if self.cross else 'none'}."
            )

    def _with_state(self, past: Cache) -> ImageCache:
        if past.get_seq_length() > 0:
            raise ValueError(
                "Models with classes or of whole pixels need more of the past than keys and values: give the "
                "past_key_values that an earlier call returned."
            )
        return ImageCache(past)

    def _without_padding(self, attention_mask, position_ids, past: Cache | None):
        """The mask and the positions; nothing, if positions are pixels, which are counted."""
        if self.values_per_position > 1:
            check_counted(position_ids, 0 if past is None else past.get_seq_length(), "output='logistic_mixture'")
            position_ids = None
        return self.unpadded(attention_mask), position_ids

    def _positions(self, values: torch.Tensor, attention_mask, position_ids, past: Cache | None) -> torch.Tensor:
        """[B or 1, P] positions in the trunk of the new values: the caller's, or counted from the mask or the past."""
        positions, counted_to = new_positions(values, attention_mask, position_ids, past)
        check_positions(positions, self.config.max_position_embeddings, counted_to)
        if positions.ndim == 1:
            positions = positions[None]
        width = self.values_per_position
        if width == 1 or counted_to is None:
            return positions
        seen = counted_to - values.shape[1]
        return positions[:, -seen % width :: width] // width

    def _embed(self, input_ids, inputs_embeds, positions: torch.Tensor, past: Cache | None, enlarged) -> torch.Tensor:
        """[B, P, hidden] of the values before those at `positions`, without coordinates."""
        if inputs_embeds is not None:
            embeddings = self.embedding.of_channel(inputs_embeds, positions)
        else:
            ids = ids_before(input_ids, positions.shape[1], past, self.values_per_position)
            embeddings = self.embedding(ids, positions, enlarged)
        return self.condition(embeddings, positions, image_state(past))


def _split_cache(cache: Cache | None) -> tuple[Cache | None, Cache | None]:
    """(cache of self-attention, cache of cross-attention)"""
    if hasattr(cache, "cross_attention_cache"):
        return cache.self_attention_cache, cache.cross_attention_cache
    return cache, None


class ImageTransformerEncoder(ImageTransformerStack):
    """The encoder of the image to enlarge: values [B, S] in raster order, without a start token -> [B, P, hidden].

    As in the decoder, a position is a value (P = S), or a pixel with `output="logistic_mixture"`.
    """

    def __init__(self, config: ImageTransformerConfig):
        super().__init__(config)
        grid = (*config.source_image_size, config.num_channels // config.values_per_position)
        patterns = patterns_for_layers(config.encoder_attention_patterns, config.num_encoder_layers)
        self.patterns = [pattern.bind(grid) for pattern in patterns]
        self.embedding = SOURCE_EMBEDDINGS[config.output](config)
        self.enlargement = BicubicEnlargement(config) if config.predict_residual else None
        stretch = tuple(large / small for large, small in zip(config.image_size, config.source_image_size))
        self.coordinates = ImageCoordinates(config.coordinates, grid, None, config.hidden_size, stretch)
        self.dropout = nn.Dropout(config.resid_dropout)
        blocks = (ImageTransformerBlock(config, i, is_causal=False) for i in range(config.num_encoder_layers))
        self.layers = nn.ModuleList(blocks)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EnlargingEncoderOutput:
        """
        Args:
            input_ids: [B, S] values of the image to enlarge.
            attention_mask: [B, S], 1 for values and 0 for padding; no padding where pixels are positions.
            inputs_embeds: refused: values are also what is enlarged.
        """
        if inputs_embeds is not None:
            raise ValueError("The image to enlarge is given by its values: give input_ids, not inputs_embeds.")
        check_one_input(input_ids, None)
        check_token_ids(input_ids, self.config.vocab_size)
        width = self.config.values_per_position
        if input_ids.shape[1] % width:
            raise ValueError(f"input_ids must hold whole pixels of {width} values, got shape {list(input_ids.shape)}.")
        pixels = input_ids.unflatten(1, (-1, width))  # [B, P, W]
        attention_mask = self.unpadded(attention_mask)
        positions, counted_to = new_positions(pixels, attention_mask)
        check_positions(positions, self.coordinates.num_positions, counted_to)
        embeddings = self.embedding(pixels, positions + 1)
        hidden_states = self.dropout(embeddings + self.coordinates(positions, embeddings))
        masks = layer_masks(
            self.patterns, self.config, hidden_states, attention_mask, causal=False, heads=self.local_heads
        )
        for layer, mask in zip(self.layers, masks):
            hidden_states = layer(hidden_states, mask, **kwargs)
        enlarged = None if self.enlargement is None else self.enlargement(pixels, like=hidden_states)
        return EnlargingEncoderOutput(last_hidden_state=hidden_states, enlarged=enlarged)


# ---------------------------------------------------------------------------------------------------------------------
# From hidden states to the next value: a softmax over ids, or a mixture of logistics over pixels (section 3.4)


class CategoricalOutput(nn.Module):
    """One softmax over the ids, the same for all channels."""

    def __init__(self, config: ImageTransformerConfig):
        super().__init__()
        self.config = config

    @property
    def num_targets(self) -> int:
        """How many ids can be predicted."""
        return self.config.vocab_size

    @staticmethod
    def new_layer(config: ImageTransformerConfig) -> nn.Linear:
        """The linear layer from hidden states to logits."""
        return nn.Linear(config.hidden_size, config.vocab_size)

    def check_loss(self, labels: torch.Tensor | None, num_items_in_batch, label_smoothing: float) -> None:
        """Any loss of logits will do."""

    def asked(self, hidden_states: torch.Tensor, first: int, kept, targets) -> torch.Tensor:
        """Of hidden states [B, T, hidden] those that the linear layer reads; arguments as of MixtureOutput."""
        return hidden_states[:, kept]

    def forward(self, logits: torch.Tensor, ids, first, kept, targets, enlarged=None, label_smoothing: float = 0.0):
        """Logits [B, T, V] and what each target [B, T] costs in nats; arguments as of MixtureOutput.

        With label_smoothing the targets spread over all V ids.
        """
        if targets is None:
            return logits, None
        nats = cross_entropy(
            logits.float().transpose(1, 2),
            targets[:, kept],
            ignore_index=IGNORED,
            label_smoothing=label_smoothing,
            reduction="none",
        )
        return logits, nats


class MixtureParameters(nn.Linear):
    """From hidden states to the numbers that describe mixtures, in at least float32."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, P, hidden] -> [B, P, num_parameters]."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return _exact(super().forward(hidden_states.to(self.weight.dtype)))


class MixtureOutput(nn.Module):
    """A mixture of discretised logistics over pixels, handed out as exact conditional logits of the next channel."""

    def __init__(self, config: ImageTransformerConfig):
        super().__init__()
        self.vocab_size, self.num_values, self.channels = config.vocab_size, config.num_values, config.num_channels
        self.num_targets = config.num_values  # start tokens cannot be predicted

    @staticmethod
    def new_layer(config: ImageTransformerConfig) -> nn.Linear:
        """The linear layer from hidden states to the parameters of mixtures."""
        count = num_parameters(config.num_mixtures, config.num_channels)
        return MixtureParameters(config.hidden_size, count, bias=False)

    def check_loss(self, labels: torch.Tensor | None, num_items_in_batch, label_smoothing: float) -> None:
        """Raise ValueError for label smoothing, by the model or a Trainer: start tokens have no probability."""
        if label_smoothing:
            raise ValueError(
                f"label_smoothing={label_smoothing} is for output='categorical': a mixture of logistics is smooth over "
                "values already. Set it, or label_smoothing_factor, to 0."
            )
        check_loss_is_inside(
            labels,
            num_items_in_batch,
            "a mixture of logistics has its own, unsmoothed: set label_smoothing_factor=0 and no compute_loss_func.",
        )

    def asked(self, hidden_states: torch.Tensor, first: int, kept, targets) -> torch.Tensor:
        """Of hidden states [B, T, hidden] those that the linear layer reads: one of each pixel will do for its values.

        Arguments as of `forward`.
        """
        pixels = self._by_pixel(hidden_states.shape[1], first, kept, targets)
        return hidden_states[:, :: self.channels] if pixels else hidden_states[:, kept]

    def forward(self, parameters: torch.Tensor, ids, first: int, kept, targets, enlarged=None, label_smoothing=0.0):
        """
        Args:
            parameters: [B, T or pixels, num_parameters], what the linear layer makes of what was `asked` for.
            ids: [B, C - 1 + T] the ids given so far, from C - 1 before the first of these T on.
            first: how many ids came before these T.
            kept: those of the T positions that are asked for.
            targets: [B, T] next values; IGNORED ones cost nothing.
            enlarged: [B, pixels, C] what mixtures are measured from, in the order of generation; None for 0.

        Returns:
            Logits [B, T, V], float32, of start tokens the lowest there is; None in training with targets, whose nats
            need no logits of other values. And the nats [B, T]; None without targets.
        """
        with torch.autocast(parameters.device.type, enabled=False):  # brightness needs more than bfloat16's 8 bits
            if self._by_pixel(ids.shape[1] - self.channels + 1, first, kept, targets):
                return None, self._nats_of_pixels(_exact(parameters), ids, first, targets, enlarged)
            mixture = self._mixture(_exact(parameters), ids, first, kept, enlarged)
            nats = None if targets is None else _nats(mixture.log_prob, targets[:, kept], self.num_values)
            logits = None if self.training and nats is not None else self._logits(mixture)
        return logits, nats

    def _by_pixel(self, length: int, first: int, kept, targets) -> bool:
        """In training, are these T positions the values of whole pixels, and all of them asked for?"""
        everything = isinstance(kept, slice) and not kept.start
        whole = everything and first % self.channels == 0 and length % self.channels == 0
        return self.training and targets is not None and whole

    def _nats_of_pixels(self, parameters, ids, first: int, targets, enlarged) -> torch.Tensor:
        """What targets cost, as `_mixture` has it; what the values of a pixel share is worked out once."""
        earlier = pad(ids[:, self.channels :], (0, 1)).clamp(max=self.num_values - 1).unflatten(1, (-1, self.channels))
        count = parameters.shape[1]
        origin = None if enlarged is None else enlarged[:, first // self.channels :][:, :count]

        def log_prob(values: torch.Tensor) -> torch.Tensor:
            values = values.unflatten(1, (-1, self.channels))
            return log_prob_of_pixels(parameters, values, earlier, self.num_values, origin).flatten(1)

        return _nats(log_prob, targets, self.num_values)

    def _mixture(self, parameters: torch.Tensor, ids: torch.Tensor, first: int, kept, enlarged) -> ChannelMixture:
        length = ids.shape[1] - self.channels + 1
        positions = (first + torch.arange(length, device=ids.device))[kept]  # [T]
        channel = positions % self.channels
        known = ids.clamp(max=self.num_values - 1)
        recent = [known[:, i + 1 : i + 1 + length] for i in range(self.channels - 1)]
        recent = torch.stack([*recent, torch.zeros_like(known[:, :length])], dim=-1)[:, kept]  # [B, T, C]
        # Channel j of this pixel is so many values ago; where it is not known yet, the 0 at the end stands for it.
        ago = torch.arange(self.channels, device=ids.device) + self.channels - 1 - channel[:, None]
        earlier = recent.gather(-1, ago.clamp(max=self.channels - 1).expand_as(recent))
        origin = None if enlarged is None else enlarged[:, positions // self.channels]
        return channel_mixture(parameters, channel.expand(recent.shape[:2]), earlier, self.num_values, origin)

    def _logits(self, mixture: ChannelMixture) -> torch.Tensor:
        logits = mixture.log_probs()
        return pad(logits, (0, self.vocab_size - self.num_values), value=torch.finfo(logits.dtype).min)


def _exact(parameters: torch.Tensor) -> torch.Tensor:
    """In at least float32."""
    return parameters.to(torch.promote_types(parameters.dtype, torch.float32))


def _nats(log_prob: Callable, targets: torch.Tensor, num_values: int) -> torch.Tensor:
    """[B, T] what targets cost; IGNORED ones nothing."""
    return -log_prob(targets.clamp(0, num_values - 1)).masked_fill(targets == IGNORED, 0.0)


OUTPUTS = {"categorical": CategoricalOutput, "logistic_mixture": MixtureOutput}


# ---------------------------------------------------------------------------------------------------------------------
# Models with a head


class ImageTransformerGenerationMixin(PatternCacheGenerationMixin):
    """`generate()` with a cache of reachable keys."""

    @property
    def _is_stateful(self) -> bool:
        return self.model.needs_state

    def new_pattern_cache(self) -> Cache:
        return self.model.new_cache(PatternCache.of_heads(self.model.patterns, self.model.local_heads))

    def get_output_embeddings(self) -> nn.Module | None:
        """The linear layer to the logits of ids; a mixture has none."""
        return self.lm_head if self.config.output == "categorical" else None


class ImageTransformerForCausalLM(ShiftedLabels, ImageTransformerPreTrainedModel, ImageTransformerGenerationMixin):
    """The decoder with a distribution of the next value (section 3.4); for images without a source."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.embed_tokens.weight"}

    def __init__(self, config: ImageTransformerConfig):
        check_enlarged(config.predict_residual, None)
        config = _with_encoder(config, False)
        super().__init__(config)
        self.model = ImageTransformerModel(config)
        self.output = OUTPUTS[config.output](config)
        self.lm_head = self.output.new_layer(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Args:
            labels: [B, T] ids to predict, shifted inside: position t predicts labels[t + 1]; -100 is ignored. For
                inputs that begin with a start token give `shift_labels` instead, where t predicts shift_labels[t].
            logits_to_keep: compute logits for the last so many positions only (0: all), or for these indices.

        Returns:
            Logits [B, T, V] of the next id. A mixture's are log-probabilities; in training with labels it works out
            those of the labels alone, and hands out no logits.
        """
        smoothing = own_smoothing(self, labels, kwargs)
        targets = next_tokens(labels, kwargs.pop("shift_labels", None))
        check_targets(targets, self.output.num_targets)
        num_items = kwargs.pop("num_items_in_batch", None)
        self.output.check_loss(targets, num_items, smoothing)
        first = 0 if past_key_values is None else past_key_values.get_seq_length()
        ids = None if input_ids is None else with_recent(input_ids, past_key_values, self.config.num_channels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = kept_positions(logits_to_keep)
        parameters = self.lm_head(self.output.asked(outputs.last_hidden_state, first, kept, targets))
        logits, nats = self.output(parameters, ids, first, kept, targets, label_smoothing=smoothing)
        return CausalLMOutputWithPast(
            loss=None if nats is None else nats.sum() / num_targets(targets[:, kept], num_items),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ImageTransformerForSuperResolution(ImageTransformerPreTrainedModel, ImageTransformerGenerationMixin):
    """Encoder and decoder that enlarge an image (section 5.3): a small image's values in, a large one's out.

    A sequence-to-sequence model like any other: `generate(small)` samples, and Seq2SeqTrainer trains.
    """

    _tied_weights_keys = {
        "lm_head.weight": "model.embedding.embed_tokens.weight",
        "encoder.embedding.embed_tokens.weight": "model.embedding.embed_tokens.weight",
    }

    def __init__(self, config: ImageTransformerConfig):
        config = _with_encoder(config, True)
        super().__init__(config)
        self.loss_type = "ForMaskedLM"  # labels are aligned
        self.encoder = ImageTransformerEncoder(config)
        self.model = ImageTransformerModel(config, cross=True)
        self.output = OUTPUTS[config.output](config)
        self.lm_head = self.output.new_layer(config)
        self.post_init()

    def get_encoder(self, *args, **kwargs) -> nn.Module:
        return self.encoder

    def get_decoder(self) -> nn.Module:
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Resize the tables of encoder and decoder, and the head."""
        self.model.resize_token_embeddings(*args, **kwargs)
        return super().resize_token_embeddings(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        """
        Args:
            input_ids: [B, S] values of the small image in raster order, without a start token.
            attention_mask: [B, S], 0 for padding.
            decoder_input_ids: [B, T] a start token and values of the large image in the order of generation; made of
                `labels` if None.
            labels: [B, T] values to predict, aligned with decoder_input_ids; -100 is ignored.
            encoder_outputs: what the encoder returned before, instead of input_ids.
        """
        smoothing = own_smoothing(self, labels, kwargs)
        check_targets(labels, self.output.num_targets)
        if decoder_input_ids is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        num_items = kwargs.pop("num_items_in_batch", None)
        self.output.check_loss(labels, num_items, smoothing)
        if encoder_outputs is None:
            if input_ids is None:
                raise ValueError("Give input_ids, the values of the image to enlarge, or encoder_outputs.")
            encoder_outputs = self.encoder(input_ids, attention_mask=attention_mask, **kwargs)
        enlarged = getattr(encoder_outputs, "enlarged", None)
        first = 0 if past_key_values is None else past_key_values.get_seq_length()
        ids = with_recent(decoder_input_ids, _split_cache(past_key_values)[0], self.config.num_channels)
        outputs = self.model(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs[0],
            encoder_attention_mask=self.encoder.unpadded(attention_mask),
            past_key_values=past_key_values,
            use_cache=use_cache,
            enlarged=enlarged,
            **kwargs,
        )
        parameters = self.lm_head(self.output.asked(outputs.last_hidden_state, first, slice(None), labels))
        logits, nats = self.output(parameters, ids, first, slice(None), labels, enlarged, smoothing)
        return Seq2SeqLMOutput(
            loss=None if nats is None else nats.sum() / num_targets(labels, num_items),
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            encoder_attentions=getattr(encoder_outputs, "attentions", None),
        )

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor | None) -> torch.LongTensor:
        """[B, T] labels moved by one to the right, behind the start token."""
        if labels is None:
            raise ValueError("Give decoder_input_ids, or labels to make them of.")
        start = labels.new_full((len(labels), 1), self.config.decoder_start_token_id)
        return torch.cat([start, labels[:, :-1].clamp(min=0)], dim=1)


def _with_encoder(config: ImageTransformerConfig, encoder: bool) -> ImageTransformerConfig:
    """The config with `is_encoder_decoder` set; a copy where it is not."""
    if config.is_encoder_decoder is not encoder:
        config = copy.deepcopy(config)
        config.is_encoder_decoder = encoder
    return config


__all__ = [
    "ImageTransformerForCausalLM",
    "ImageTransformerForSuperResolution",
    "ImageTransformerModel",
    "ImageTransformerPreTrainedModel",
]
