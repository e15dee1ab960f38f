"""How order enters a model.

A scheme has two halves, chosen once when a model is built. The stack's half (`StackOrder`) adds positions to the
embeddings and works out, once for each call, what the layers need to know about where tokens stand. The layer's half
(`LayerOrder`) lives in an attention module and meets that layer's hidden states, queries, keys and values.
`POSITION_SCHEMES` at the end of the file names them all. They are made of the waves, rotations and scores by distance
that come first, of which models that know order in one way alone take what they need.

Shapes: B batch, H heads, T queries, S keys, D head dim, L distances.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

# ---------------------------------------------------------------------------------------------------------------------
# Waves

# The dimension along which sines and cosines are stacked before the last two are flattened.
SINUSOID_LAYOUTS = {"interleaved": -1, "halves": -2}


def wavelengths(dim: int, base: float = 10000, dtype: torch.dtype = torch.float32, device=None) -> torch.Tensor:
    """[dim / 2], base^(2i / dim) for each pair i of dimensions: how many positions a wave takes for an angle of 1."""
    return base ** (torch.arange(0, dim, 2, dtype=dtype, device=device) / dim)


def sinusoids(
    positions: torch.Tensor, dim: int, layout: str = "interleaved", dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Sine and cosine waves of positions, [...] -> [..., dim] (Vaswani et al. 2017, arXiv:1706.03762, section 3.5).

    Args:
        layout: "interleaved" as in the paper (sine in even columns, cosine in odd ones), or "halves" as in Marian and
            Transformer-XL (all sines, then all cosines).
        dtype: of the waves, computed in float32 at least; that of the (floating point) positions if None.

    Raises:
        ValueError: if the layout is unknown, or dim is odd.
    """
    if layout not in SINUSOID_LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(SINUSOID_LAYOUTS)}, got {layout!r}.")
    if dim % 2 or dim < 2:
        raise ValueError(f"Sines and cosines come in pairs: dim must be even and at least 2, got {dim}.")
    dtype = dtype or positions.dtype
    exact = positions.to(torch.promote_types(dtype, torch.float32))
    angles = exact[..., None] / wavelengths(dim, dtype=exact.dtype, device=exact.device)
    waves = torch.stack([angles.sin(), angles.cos()], dim=SINUSOID_LAYOUTS[layout])
    return waves.flatten(-2).to(dtype)


class RelativeSinusoids(nn.Module):
    """The matrix R of Dai et al. 2019 (arXiv:1901.02860), section 3.3: a wave for each distance i - j.

    Args:
        hidden_size: width of the embeddings, even.
        clamp_len: larger distances count as this one; None for no limit.
    """

    def __init__(self, hidden_size: int, clamp_len: int | None = None):
        super().__init__()
        self.hidden_size = hidden_size
        self.clamp_len = clamp_len

    def forward(self, length: int, like: torch.Tensor) -> torch.Tensor:
        """[length, hidden], rows for the distances length - 1 down to 0, in the dtype and on the device of `like`."""
        return self.of(torch.arange(length - 1, -1, -1), like)

    def of(self, distances: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """[L, hidden], rows for the distances [L]."""
        distances = distances.to(like.device)
        if self.clamp_len is not None:
            distances = distances.clamp(max=self.clamp_len)
        return sinusoids(distances, self.hidden_size, "halves", like.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Rotations


class RotaryEmbedding(nn.Module):
    """Angles of rotary positions (Su et al. 2021, arXiv:2104.09864, section 3.2.2).

    Pair i of a query or key at position m turns by the angle m * theta_i, theta_i = base^(-2i / D) (equation 15), so a
    score depends on the distance m - n alone. `config.rope_parameters` names the base and how the angles are scaled
    beyond the trained length (linear, dynamic, yarn, llama3, longrope); Transformers' own functions compute them. With
    a `partial_rotary_factor` only that share of the D dimensions turns.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        scaled = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = scaled(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config, **kwargs) -> tuple[torch.Tensor, float]:
        """The angles theta_i of equation 15, and 1.0, the factor on cos and sin."""
        rotated = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        return 1.0 / wavelengths(rotated, config.rope_parameters["rope_theta"]), 1.0

    def _apply(self, fn, recurse=True):
        """Move with the model but stay in float32: in bfloat16 the angle at position 1,000 would be off by a radian."""

        def move(buffer):
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        return super()._apply(move, recurse)

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T] positions -> cos and sin [B, T, D / 2] in the dtype of hidden_states."""
        angles = position_ids[..., None].float() * self.inv_freq
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def rotate_interleaved(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x_0, x_1), (x_2, x_3), ... as Su et al. 2021 write them (equation 34).

    Args:
        states: queries or keys [B, H, T, D].
        cos, sin: [B, 1, T, R / 2]; dimensions from R on stay as they are.
    """
    rotated = 2 * cos.shape[-1]
    pairs, kept = states.split((rotated, states.shape[-1] - rotated), dim=-1)
    even, odd = pairs.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return torch.cat((turned.flatten(-2), kept), dim=-1)


def rotate_half(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x_0, x_{R/2}), (x_1, x_{R/2+1}), ... as GPT-NeoX and Llama do; arguments as above."""
    half = cos.shape[-1]
    first, second, kept = states.split((half, half, states.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, kept), dim=-1)


ROTARY_LAYOUTS: dict[str, Callable] = {"interleaved": rotate_interleaved, "half": rotate_half}


# ---------------------------------------------------------------------------------------------------------------------
# Scores by distance


class DistanceBias(NamedTuple):
    """A bias that depends on the head and on the distance from key to query alone (ALiBi, T5's buckets).

    This and `DistanceScores` are the two forms in which what is added to scores crosses to a backend, as position_bias;
    read by attribute and never by class, since model and backend may come from different copies of this file. A backend
    without a way of its own takes `dense_bias` of either.

    Attributes:
        table: [H, L], added to the scaled scores.
        distances: [L] on the CPU, the distance i - j that each column of the table is for; all that are met.
    """

    table: torch.Tensor
    distances: torch.Tensor


class DistanceScores(NamedTuple):
    """Scores of queries and distances, yet to be computed (Shaw et al. 2018, Transformer-XL); see `DistanceBias`.

    They are q' k' for a position query q' and a relative key k', scaled as the scores q k of queries and keys are.

    Attributes:
        position_query: [B, H, T, D].
        relative_key: [H, L, D].
        distances: [L] on the CPU, the distance i - j that each row of relative_key is for; all that are met.
    """

    position_query: torch.Tensor
    relative_key: torch.Tensor
    distances: torch.Tensor


def dense_bias(bias: DistanceBias | DistanceScores, distances: torch.Tensor, scaling: float) -> torch.Tensor:
    """Either form as a tensor [B or 1, H, T, S] to be added to scores that have been multiplied by `scaling`.

    Args:
        distances: [B or 1, T, S], from each key to each query; what stands at those that the bias does not list means
            nothing, and a mask must hide it.
    """
    rows = rows_by_distance(bias.distances.to(distances.device), distances)
    if hasattr(bias, "table"):
        return bias.table[:, rows].transpose(0, 1)
    return scores_by_key(bias.position_query @ bias.relative_key.transpose(-1, -2) * scaling, rows)


def rows_by_distance(distances: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """For each of the `wanted` distances, of any shape, the row r where distances[r] is it; any if there is none."""
    lowest, highest = torch.stack(distances.aminmax()).tolist()
    rows = distances.new_zeros(highest - lowest + 1)
    rows[distances - lowest] = torch.arange(len(distances), device=distances.device)
    return rows[(wanted - lowest).clamp(0, highest - lowest)]


def scores_by_key(by_distance: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Scores [B, H, T, L] by distance -> [B, H, T, S] by key; `columns` [B or 1, T, S] says which one a pair takes."""
    return by_distance.gather(-1, columns[:, None].expand(*by_distance.shape[:3], -1))


class RelativeBiases(nn.Module):
    """The vectors u and v of Dai et al. 2019, section 3.3, which take the place of the query's absolute position.

    Attributes:
        content: u [H, D], added to queries that meet keys.
        position: v [H, D], added to queries that meet distances.
    """

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.content = nn.Parameter(torch.zeros(num_heads, head_dim))
        self.position = nn.Parameter(torch.zeros(num_heads, head_dim))

    def forward(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """u and v [H, D], on the device of `like`."""
        return self.content.to(like.device), self.position.to(like.device)


class RelativePositions(NamedTuple):
    """Where the queries stand to the keys, for every layer of one call.

    Attributes:
        states: R [L, hidden] for the distances `lowest` + L - 1 down to `lowest`; None if layers have them projected.
        key_length: S; R has a row for this distance.
        distances: [B or 1, T, S], below `lowest` where nobody looks; None where the T queries are the last T of S
            unpadded keys.
        lowest: 0 where later keys are hidden.
        blind: [B, T, 1] bool, queries that see no key at all; None if there are none.
        hidden: [T, columns] bool from `hidden_columns`: what `scores` makes hopeless; None leaves it to a mask.
        lazy: the backend computes the scores itself.
        reach: more than the distance of any query and key, for a memory that keeps R projected.
    """

    states: torch.Tensor | None
    key_length: int
    distances: torch.Tensor | None = None
    lowest: int = 0
    blind: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    lazy: bool = False
    reach: int = 0

    def bias(self, query: torch.Tensor, relative_key: torch.Tensor, scaling: float) -> torch.Tensor | DistanceScores:
        """Scaled `scores`, or where the backend computes them itself what they are computed from."""
        if not self.lazy:
            return self.scores(query * scaling, relative_key)
        lowest, highest = self.lowest, self.lowest + relative_key.shape[1] - 1
        return DistanceScores(query, relative_key, torch.arange(highest, lowest - 1, -1))

    def scores(self, query: torch.Tensor, relative_key: torch.Tensor) -> torch.Tensor:
        """What queries [B, H, T, D] and projected distances [H, L, D] have in common, as [B, H, T, S].

        The terms (b) and (d) of Dai et al. 2019, section 3.3, if v has been added to the query. Entries for distances
        below `lowest` mean nothing; the causal mask hides them, or `hidden` does.
        """
        last = self.key_length - self.lowest
        by_distance = query @ relative_key[:, -last - 1 :].transpose(-1, -2)  # column c: distance S - c
        if self.hidden is not None:
            by_distance[..., : self.hidden.shape[1]].masked_fill_(self.hidden, torch.finfo(by_distance.dtype).min)
        if self.distances is None:
            return shift_rows(by_distance)
        return scores_by_key(by_distance, (self.key_length - self.distances).clamp(0, last))


def shift_rows(scores: torch.Tensor) -> torch.Tensor:
    """[..., T, S + 1] by distance, S down to 0 -> [..., T, S] by key (Dai et al. 2019, appendix B).

    Row i moves T - i columns to the left: of S keys the last T are the queries' own. What enters from the right belongs
    to later keys. Nothing moves in memory: rows of S + 1 entries are viewed as rows of S, the first T entries left out.
    """
    rows, columns = scores.shape[-2:]
    return scores.flatten(-2)[..., rows:].unflatten(-1, (rows, columns - 1))


def hidden_columns(length: int, key_length: int, reach: int | None, device: torch.device) -> torch.Tensor:
    """[T, columns] bool: which scores by distance `shift_rows` would bring to keys that a query does not see.

    Of columns for the distances S, S - 1, ..., these are the first: distances of `reach` or more (None: no limit), and
    those that no key of the row's query has, which become the scores of the row before for later keys.
    """
    out_of_reach = 0 if reach is None else max(0, key_length - reach + 1)
    columns = torch.arange(max(length, out_of_reach), device=device)
    unmet = columns < length - torch.arange(length, device=device)[:, None]
    return unmet | (columns < out_of_reach)


# ---------------------------------------------------------------------------------------------------------------------
# Schemes: the two halves


class LayerOrder(nn.Module):
    """The layer's half of a scheme that leaves attention alone; base of the others.

    `order` is what the stack's half said about this call (`StackOrder.prepare`).
    """

    def __init__(self, config):
        super().__init__()

    def enter(self, hidden_states: torch.Tensor, order: Any) -> torch.Tensor:
        """The block's input [B, T, hidden]."""
        return hidden_states

    def rotate(self, query: torch.Tensor, key: torch.Tensor, order: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys [B, H, T, D] of the new tokens, before a cache stores the keys."""
        return query, key

    def relate(
        self, query: torch.Tensor, value: torch.Tensor, order: Any, scaling: float, heads: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Queries [B, H, T, D] and values [B, H, S, D] as attention shall take them, and a bias [B, H, T, S] on scores
        that have been multiplied by `scaling`; `heads` (attention.Heads) are those that this process computes."""
        return query, value, None

    def collect(self, output: torch.Tensor, attention_mask: Any, order: Any, heads: Any) -> torch.Tensor:
        """The heads' outputs [B, T, H, D], from what attention returned."""
        return output


class StackOrder(nn.Module):
    """The stack's half of the scheme "none": order is not known at all. Base of the others.

    Attributes:
        layer: the layer's half.
        num_positions: how many positions there are; None for no limit.
        biases_scores: the layer's half adds a bias to the scores.
        as_data: that bias reaches block_sparse as data, which computes it; other biases are tensors, which it refuses.
    """

    layer: type[LayerOrder] = LayerOrder
    biases_scores = False
    as_data = False
    num_positions: int | None = None

    def __init__(self, config):
        super().__init__()

    def embed(self, embeddings: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, T, hidden] of tokens at position_ids [B or 1, T]."""
        return embeddings

    def prepare(
        self, queries: torch.Tensor, keys: torch.Tensor, causal: bool, like: torch.Tensor, heads: Any = None
    ) -> torch.Tensor | tuple[torch.Tensor, ...] | None:
        """What the layers need to know of the positions of queries [B or 1, T] and keys [B or 1, S].

        Args:
            heads: attention.Heads, those that this process computes, for what differs between them; all if None.
        """
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Absolute positions, added to the embeddings or to the input of every layer


class Sinusoidal(StackOrder):
    """Waves, added to the embeddings (Vaswani et al. 2017, arXiv:1706.03762, section 3.5)."""

    def __init__(self, config):
        super().__init__(config)
        self.layout = config.sinusoid_layout

    def embed(self, embeddings: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return embeddings + sinusoids(position_ids, embeddings.shape[-1], self.layout, embeddings.dtype)


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

    def prepare(self, queries, keys, causal, like, heads=None) -> torch.Tensor:
        return queries


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions


class RotaryInLayer(LayerOrder):
    """Queries and keys rotated by their positions' angles."""

    def rotate(self, query, key, order: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return rotate_interleaved(query, *order), rotate_interleaved(key, *order)


class Rotary(StackOrder):
    """Rotations of queries and keys (Su et al. 2021, arXiv:2104.09864, section 3.2.2): scores know the distance.

    The angles are those of the sinusoidal positions, theta_i = 10000^(-2i / D) (equation 15), in the model's precision.
    `RotaryEmbedding` has them for other bases and for lengths beyond the trained one.
    """

    layer = RotaryInLayer

    def __init__(self, config):
        super().__init__(config)
        self.head_dim = config.hidden_size // config.num_attention_heads

    def prepare(self, queries, keys, causal, like, heads=None) -> tuple[torch.Tensor, torch.Tensor]:
        sin, cos = sinusoids(queries, self.head_dim, "halves", like.dtype).chunk(2, dim=-1)
        return cos[:, None], sin[:, None]  # [B or 1, 1, T, D / 2]


# ---------------------------------------------------------------------------------------------------------------------
# Relative positions: scores that know the distance from query to key


class BiasedLayerOrder(LayerOrder):
    """Base of schemes with a bias on the scores: what sees nothing gives 0, on every backend."""

    def collect(self, output: torch.Tensor, attention_mask: Any, order: Any, heads: Any) -> torch.Tensor:
        return nothing_seen_is_zero(output, attention_mask)


def nothing_seen_is_zero(output: torch.Tensor, attention_mask: Any) -> torch.Tensor:
    """The heads' outputs [B, T, H, D] where scores have a bias: then sdpa averages over hidden keys if there are no
    others."""
    if not isinstance(attention_mask, torch.Tensor):  # flex_attention's own masks hide such rows already
        return output
    sees_some = attention_mask.any(dim=-1).transpose(1, 2)  # [B or 1, T, H or 1]
    return output.masked_fill(~sees_some[..., None], 0.0)


class ShawInLayer(BiasedLayerOrder):
    """A vector a^K for each clipped distance in the scores and one, a^V, in the values; shared by the heads."""

    def __init__(self, config):
        super().__init__(config)
        self.num_distances = 2 * config.max_relative_position + 1
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.keys = nn.Embedding(self.num_distances, self.head_dim)
        self.values = nn.Embedding(self.num_distances, self.head_dim)

    def relate(self, query, value, order: torch.Tensor, scaling: float, heads):
        keys = heads.shared(self.of_all(self.keys, query))
        bias = scores_by_key(query @ keys.T * scaling, order)  # x W^Q a^K, equation 4
        # Backends hand out no weights, but values that are unit vectors bring them along.
        unit = torch.eye(value.shape[2], dtype=value.dtype, device=value.device).expand(*value.shape[:2], -1, -1)
        return query, torch.cat([value, unit], dim=-1), bias

    def collect(self, output, attention_mask, order: torch.Tensor, heads) -> torch.Tensor:
        output = super().collect(output, attention_mask, order, heads)
        output, weights = output.split([self.head_dim, output.shape[-1] - self.head_dim], dim=-1)  # [B, T, H, S]
        order = order[:, :, None].expand_as(weights)
        by_distance = weights.new_zeros(*weights.shape[:3], self.num_distances).scatter_add(-1, order, weights)
        values = heads.shared(self.of_all(self.values, output))
        return output + by_distance @ values  # alpha (x W^V + a^V), equation 3

    def of_all(self, vectors: nn.Embedding, like: torch.Tensor) -> torch.Tensor:
        """[2k + 1, D], those of all clipped distances."""
        return vectors(torch.arange(self.num_distances, device=like.device))


class BiasInLayer(BiasedLayerOrder):
    """The stack's bias on the scores, which all layers share."""

    def relate(self, query, value, order: "torch.Tensor | DistanceBias", scaling: float, heads):
        return query, value, order


class BiasByDistance(StackOrder):
    """Base of schemes whose bias depends on the head and the distance alone: data for block_sparse, else a tensor."""

    layer = BiasInLayer
    biases_scores = True
    as_data = True

    def __init__(self, config):
        super().__init__(config)
        self.config = config

    def table(self, distances: torch.Tensor, causal: bool) -> torch.Tensor:
        """[H, L], the bias at each of the distances [L]."""
        raise NotImplementedError

    def prepare(self, queries, keys, causal, like, heads=None) -> torch.Tensor | DistanceBias:
        """The bias of all distances that S keys can have, or [B, H, T, S]."""
        length = keys.shape[1]
        lowest = 0 if causal else 1 - length
        distances = torch.arange(length - 1, lowest - 1, -1)
        table = self.table(distances.to(like.device), causal)
        table = table if heads is None else heads.own(table)
        if self.config._attn_implementation == "block_sparse":
            return DistanceBias(table, distances)
        pairs = (queries[:, :, None] - keys[:, None, :]).clamp(lowest, length - 1)
        return table.to(like.dtype)[:, length - 1 - pairs].transpose(0, 1).expand(like.shape[0], -1, -1, -1)


def alibi_slopes(num_heads: int, device: torch.device | None = None) -> torch.Tensor:
    """[H], 2^(-8i / H) for the i-th head from 1 (Press et al. 2021, arXiv:2108.12409, section 3).

    Where H is no power of two, as in the authors' code: the slopes of the power below it, then every second one of the
    power above.
    """
    power = 2 ** (num_heads.bit_length() - 1)
    exponents = [8 * i / power for i in range(1, power + 1)]
    exponents += [8 * i / (2 * power) for i in range(1, 2 * (num_heads - power), 2)]
    return torch.tensor([2**-exponent for exponent in exponents], device=device)


class ALiBi(BiasByDistance):
    """A penalty of each head's own slope for each token in between (Press et al. 2021, arXiv:2108.12409, section 3).

    Nothing is learned. Where later keys are seen, they are penalised as earlier ones at the same distance.
    """

    def table(self, distances: torch.Tensor, causal: bool) -> torch.Tensor:
        return -alibi_slopes(self.config.num_attention_heads, distances.device)[:, None] * distances.abs()


def t5_buckets(distances: torch.Tensor, causal: bool, num_buckets: int, max_distance: int) -> torch.Tensor:
    """The bucket of each distance (Raffel et al. 2019, arXiv:1910.10683, section 2.1).

    Half of the buckets hold one distance each, the others logarithmically more of them up to `max_distance`, from which
    on all are alike. Unless `causal`, the second half of all is for keys after the query.
    """
    later = 0
    if not causal:
        num_buckets //= 2
        later = (distances < 0) * num_buckets
        distances = distances.abs()
    exact = num_buckets // 2
    share = (distances.clamp(min=exact).float() / exact).log() / math.log(max_distance / exact)  # of their logarithms
    wide = exact + (share * (num_buckets - exact)).long()
    return later + torch.where(distances < exact, distances, wide.clamp(max=num_buckets - 1))


class T5Buckets(BiasByDistance):
    """A learned number for each head and bucket of distances (Raffel et al. 2019, arXiv:1910.10683, section 2.1).

    As there, all layers of a stack share them, so that the bias is made once a call.
    """

    def __init__(self, config):
        super().__init__(config)
        self.numbers = nn.Embedding(config.relative_attention_num_buckets, config.num_attention_heads)

    def table(self, distances: torch.Tensor, causal: bool) -> torch.Tensor:
        config = self.config
        sizes = config.relative_attention_num_buckets, config.relative_attention_max_distance
        return self.numbers(t5_buckets(distances, causal, *sizes)).T


class Shaw(StackOrder):
    """Learned vectors of distances (Shaw et al. 2018, arXiv:1803.02155): beyond `max_relative_position` all are alike.

    As in its authors' code, each layer has its own vectors and its heads share them (section 3.3).
    """

    layer = ShawInLayer
    biases_scores = True

    def __init__(self, config):
        super().__init__(config)
        self.clip = config.max_relative_position

    def prepare(self, queries, keys, causal, like, heads=None) -> torch.Tensor:
        """Which vector each pair takes, [B or 1, T, S]: clip(j - i, k), equation 5, counted from 0."""
        distances = keys[:, None, :] - queries[:, :, None]
        return distances.clamp(-self.clip, self.clip) + self.clip


class TransformerXLInLayer(BiasedLayerOrder):
    """Scores (q + u) k + (q + v) W R_{i-j}, with u, v and W of the layer's own (Dai et al. 2019, section 3.3)."""

    def __init__(self, config):
        super().__init__(config)
        head_dim = config.hidden_size // config.num_attention_heads
        self.r_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)  # W_{k,R}
        self.biases = RelativeBiases(config.num_attention_heads, head_dim)

    def relate(self, query, value, order: RelativePositions, scaling: float, heads):
        relative_key = self.r_proj(order.states).unflatten(-1, (-1, query.shape[-1])).transpose(0, 1)  # [H, L, D]
        relative_key = heads.own(relative_key)
        content_query, position_query = (query + heads.own(bias)[:, None] for bias in self.biases(query))
        # (a) + (c) are (q + u) k, (b) + (d) are (q + v) W R.
        return content_query, value, order.bias(position_query, relative_key, scaling)


class TransformerXLOrder(StackOrder):
    """Waves of distances (Dai et al. 2019, arXiv:1901.02860, section 3.3), of both signs where later keys are seen."""

    layer = TransformerXLInLayer
    biases_scores = True

    def __init__(self, config):
        super().__init__(config)
        self.waves = RelativeSinusoids(config.hidden_size)

    def prepare(self, queries, keys, causal, like, heads=None) -> RelativePositions:
        length = keys.shape[1]
        lowest = 0 if causal else 1 - length
        states = self.waves.of(torch.arange(length, lowest - 1, -1), like)
        distances = (queries[:, :, None] - keys[:, None, :]).clamp(lowest, length - 1)
        return RelativePositions(states, length, distances, lowest)


# Every scheme by the name that a config's `position_encoding` gives it.
POSITION_SCHEMES: dict[str, type[StackOrder]] = {
    "sinusoidal": Sinusoidal,
    "learned": Learned,
    "learned_per_layer": LearnedPerLayer,
    "relative": Shaw,
    "transformer_xl": TransformerXLOrder,
    "rotary": Rotary,
    "alibi": ALiBi,
    "t5": T5Buckets,
    "none": StackOrder,
}
