"""The ways in which a stack of Transformer blocks can know order, behind one interface.

A scheme has two halves, chosen once when a model is built. The stack's half adds positions to the embeddings and works
out, once for each call, what the layers need to know about where tokens stand. The layer's half lives in an attention
module and meets that layer's hidden states, queries, keys and values.

Shapes: B batch, H heads, T queries, S keys, D head dim.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from .positions import ROTARY_LAYOUTS, RelativeBiases, SinusoidalPositionEmbedding, sinusoids


class LayerOrder(nn.Module):
    """The layer's half of a scheme that leaves attention alone; base of the others.

    `order` is what the stack's half said about this call (`StackOrder.survey`).
    """

    def __init__(self, config):
        super().__init__()

    def enter(self, hidden_states: torch.Tensor, order: Any) -> torch.Tensor:
        """The block's input [B, T, hidden]."""
        return hidden_states

    def turn(self, query: torch.Tensor, key: torch.Tensor, order: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys [B, H, T, D] of the new tokens, before a cache stores the keys."""
        return query, key

    def relate(
        self, query: torch.Tensor, value: torch.Tensor, order: Any, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Queries [B, H, T, D] and values [B, H, S, D] as attention shall take them, and a bias [B, H, T, S] on scores
        that have been multiplied by `scaling`."""
        return query, value, None

    def collect(self, output: torch.Tensor, attention_mask: Any, order: Any) -> torch.Tensor:
        """The heads' outputs [B, T, H, D], from what attention returned."""
        return output


class StackOrder(nn.Module):
    """The stack's half of the scheme "none": order is not known at all. Base of the others.

    Attributes:
        layer: the layer's half.
        num_positions: how many positions there are; None for no limit.
        biases_scores: the layer's half adds a bias to the scores.
    """

    layer: type[LayerOrder] = LayerOrder
    biases_scores = False
    num_positions: int | None = None

    def __init__(self, config):
        super().__init__()

    def embed(self, embeddings: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, T, hidden] of tokens at position_ids [B or 1, T]."""
        return embeddings

    def survey(
        self, queries: torch.Tensor, keys: torch.Tensor, causal: bool, like: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, ...] | None:
        """What the layers need to know of the positions of queries [B or 1, T] and keys [B or 1, S]."""
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Absolute positions, added to the embeddings or to the input of every layer


class Sinusoidal(StackOrder):
    """Waves, added to the embeddings (Vaswani et al. 2017, arXiv:1706.03762, section 3.5)."""

    def __init__(self, config):
        super().__init__(config)
        self.waves = SinusoidalPositionEmbedding(config.hidden_size, config.sinusoid_layout)

    def embed(self, embeddings: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return embeddings + self.waves(position_ids, embeddings.dtype)


class Learned(StackOrder):
    """A learned vector for each position, added to the embeddings (Gehring et al. 2017, arXiv:1705.03122)."""

    def __init__(self, config):
        super().__init__(config)
        self.num_positions = config.max_position_embeddings
        self.table = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def embed(self, embeddings: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return embeddings + self.table(position_ids)


class LearnedInLayer(LayerOrder):
    """A layer's own vector for each position, added to its input."""

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def enter(self, hidden_states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.table(order)


class LearnedPerLayer(StackOrder):
    """Learned vectors that are added to the input of every layer (Al-Rfou et al. 2018, arXiv:1808.04444)."""

    layer = LearnedInLayer

    def __init__(self, config):
        super().__init__(config)
        self.num_positions = config.max_position_embeddings

    def survey(self, queries, keys, causal, like) -> torch.Tensor:
        return queries


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions


class RotaryInLayer(LayerOrder):
    """Queries and keys turned by their positions' angles."""

    def turn(self, query, key, order: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        rotate = ROTARY_LAYOUTS["interleaved"]
        return rotate(query, *order), rotate(key, *order)


class Rotary(StackOrder):
    """Rotations of queries and keys (Su et al. 2021, arXiv:2104.09864, section 3.2.2): scores know the distance.

    The angles are those of the sinusoidal positions, theta_i = 10000^(-2i / D) (equation 15).
    """

    layer = RotaryInLayer

    def __init__(self, config):
        super().__init__(config)
        self.head_dim = config.hidden_size // config.num_attention_heads

    def survey(self, queries, keys, causal, like) -> tuple[torch.Tensor, torch.Tensor]:
        exact = torch.promote_types(like.dtype, torch.float32)
        sin, cos = sinusoids(queries.to(exact), self.head_dim, "halves").to(like.dtype).chunk(2, dim=-1)
        return cos[:, None], sin[:, None]  # [B or 1, 1, T, D / 2]


# ---------------------------------------------------------------------------------------------------------------------
# Relative positions: scores that know the distance from query to key


class BiasedLayerOrder(LayerOrder):
    """Base of schemes with a bias on the scores: what sees nothing gives 0, on every backend."""

    def collect(self, output: torch.Tensor, attention_mask: Any, order: Any) -> torch.Tensor:
        if not isinstance(attention_mask, torch.Tensor):  # flex_attention's own masks hide such rows already
            return output
        # With a bias, sdpa averages over hidden keys where there are no others.
        sees_some = attention_mask.any(dim=-1).transpose(1, 2)  # [B or 1, T, H or 1]
        return output.masked_fill(~sees_some[..., None], 0.0)


class DistanceVectors(nn.Embedding):
    """A vector for each clipped distance, all of them at once."""

    def forward(self) -> torch.Tensor:
        """[2k + 1, D]."""
        return self.weight


class ShawInLayer(BiasedLayerOrder):
    """A vector a^K for each clipped distance in the scores and one, a^V, in the values; shared by the heads."""

    def __init__(self, config):
        super().__init__(config)
        distances, head_dim = 2 * config.max_relative_position + 1, config.hidden_size // config.num_attention_heads
        self.keys = DistanceVectors(distances, head_dim)
        self.values = DistanceVectors(distances, head_dim)
        self.head_dim = head_dim

    def relate(self, query, value, order: torch.Tensor, scaling: float):
        by_distance = query @ self.keys().T  # [B, H, T, 2k + 1]
        bias = by_distance.gather(-1, order.expand(*query.shape[:3], -1)) * scaling  # x W^Q a^K, equation 4
        # Backends hand out no weights, but values that are unit vectors bring them along.
        unit = torch.eye(value.shape[2], dtype=value.dtype, device=value.device).expand(*value.shape[:2], -1, -1)
        return query, torch.cat([value, unit], dim=-1), bias

    def collect(self, output, attention_mask, order: torch.Tensor) -> torch.Tensor:
        output = super().collect(output, attention_mask, order)
        output, weights = output.split([self.head_dim, output.shape[-1] - self.head_dim], dim=-1)  # [B, T, H, S]
        order = order.transpose(1, 2).expand_as(weights)
        by_distance = weights.new_zeros(*weights.shape[:3], self.values.num_embeddings).scatter_add(-1, order, weights)
        return output + by_distance @ self.values()  # alpha (x W^V + a^V), equation 3


class Shaw(StackOrder):
    """Learned vectors of distances (Shaw et al. 2018, arXiv:1803.02155): beyond `max_relative_position` all are alike.

    As in its authors' code, each layer has its own vectors and its heads share them (section 3.3).
    """

    layer = ShawInLayer
    biases_scores = True

    def __init__(self, config):
        super().__init__(config)
        self.clip = config.max_relative_position

    def survey(self, queries, keys, causal, like) -> torch.Tensor:
        """Which vector each pair takes, [B or 1, 1, T, S]: clip(j - i, k), equation 5, counted from 0."""
        distances = keys[:, None, None, :] - queries[:, None, :, None]
        return distances.clamp(-self.clip, self.clip) + self.clip


class WaveOrder(NamedTuple):
    """Waves R [L, hidden] of L distances, and which of them each pair takes, [B or 1, 1, T, S]."""

    waves: torch.Tensor
    columns: torch.Tensor


class TransformerXLInLayer(BiasedLayerOrder):
    """Scores (q + u) k + (q + v) W R_{i-j}, with u, v and W of the layer's own (Dai et al. 2019, section 3.3)."""

    def __init__(self, config):
        super().__init__(config)
        head_dim = config.hidden_size // config.num_attention_heads
        self.r_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)  # W_{k,R}
        self.biases = RelativeBiases(config.num_attention_heads, head_dim)

    def relate(self, query, value, order: WaveOrder, scaling: float):
        relative_key = self.r_proj(order.waves).unflatten(-1, (query.shape[1], -1)).transpose(0, 1)  # [H, L, D]
        content_query, position_query = self.biases(query)
        by_distance = position_query @ relative_key.transpose(-1, -2)  # (b) + (d)
        bias = by_distance.gather(-1, order.columns.expand(*query.shape[:3], -1)) * scaling
        return content_query, value, bias  # (a) + (c)


class TransformerXLOrder(StackOrder):
    """Waves of distances (Dai et al. 2019, arXiv:1901.02860, section 3.3), of both signs where later keys are seen."""

    layer = TransformerXLInLayer
    biases_scores = True

    def __init__(self, config):
        super().__init__(config)
        self.hidden_size = config.hidden_size

    def survey(self, queries, keys, causal, like) -> WaveOrder:
        exact = torch.promote_types(like.dtype, torch.float32)
        length = keys.shape[1]
        lowest = 0 if causal else 1 - length
        distances = torch.arange(lowest, length, dtype=exact, device=like.device)
        waves = sinusoids(distances, self.hidden_size, "halves").to(like.dtype)
        pairs = queries[:, None, :, None] - keys[:, None, None, :]
        return WaveOrder(waves, pairs.clamp(lowest, length - 1) - lowest)


POSITION_SCHEMES: dict[str, type[StackOrder]] = {
    "sinusoidal": Sinusoidal,
    "learned": Learned,
    "learned_per_layer": LearnedPerLayer,
    "relative": Shaw,
    "transformer_xl": TransformerXLOrder,
    "rotary": Rotary,
    "none": StackOrder,
}
