"""How order enters a model.

Shapes: B batch, T tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update


class AxialPositionEmbedding(nn.Module):
    """Learned embeddings of a position's coordinates along several axes, summed (Child et al. 2019, section 5.3).

    Position t of data laid out in `shape` has the coordinates `unravel(t, shape)`: row, column and channel for an
    image; for text or audio, row and column of a matrix whose width is the attention's stride.

    Args:
        shape: length of each axis, the last one running fastest.
        hidden_size: width of the embeddings.
    """

    def __init__(self, shape: list[int], hidden_size: int):
        super().__init__()
        self.shape = tuple(shape)
        self.axes = nn.ModuleList(nn.Embedding(length, hidden_size) for length in shape)

    @property
    def num_positions(self) -> int:
        return math.prod(self.shape)

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """[B, T] positions -> [B, T, hidden]."""
        embeddings, rest = 0, position_ids
        for axis in reversed(self.axes):
            embeddings = embeddings + axis(rest % axis.num_embeddings)
            rest = rest // axis.num_embeddings
        return embeddings


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
        return 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, rotated, 2).float() / rotated), 1.0

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


# The dimension along which sines and cosines are stacked before the last two are flattened.
SINUSOID_LAYOUTS = {"interleaved": -1, "halves": -2}


def sinusoids(positions: torch.Tensor, dim: int, layout: str = "interleaved") -> torch.Tensor:
    """Sine and cosine waves of positions, [...] -> [..., dim] (Vaswani et al. 2017, arXiv:1706.03762, section 3.5).

    Args:
        positions: floating point; the waves have its dtype.
        layout: "interleaved" as in the paper (sine in even columns, cosine in odd ones), or "halves" as in Marian and
            Transformer-XL (all sines, then all cosines).
    """
    if layout not in SINUSOID_LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(SINUSOID_LAYOUTS)}, got {layout!r}.")
    if dim % 2 or dim < 2:
        raise ValueError(f"Sines and cosines come in pairs: dim must be even and at least 2, got {dim}.")
    even = torch.arange(0, dim, 2, dtype=positions.dtype, device=positions.device)
    angles = positions[..., None] / 10000 ** (even / dim)
    waves = torch.stack([angles.sin(), angles.cos()], dim=SINUSOID_LAYOUTS[layout])
    return waves.flatten(-2)


class SinusoidalPositionEmbedding(nn.Module):
    """Absolute positions as waves; no parameters, and no longest position.

    Args:
        hidden_size: width of the embeddings, even.
        layout: see `sinusoids`.
    """

    def __init__(self, hidden_size: int, layout: str = "interleaved"):
        super().__init__()
        self.hidden_size = hidden_size
        self.layout = layout

    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[B, T] positions -> [B, T, hidden]."""
        exact = torch.promote_types(dtype, torch.float32)
        return sinusoids(position_ids.to(exact), self.hidden_size, self.layout).to(dtype)


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
        distances = distances.to(like.device, torch.promote_types(like.dtype, torch.float32))
        if self.clamp_len is not None:
            distances = distances.clamp(max=self.clamp_len)
        return sinusoids(distances, self.hidden_size, "halves").to(like.dtype)


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

    def forward(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q + u for the keys and q + v for the distances, of queries [B, H, T, D]."""
        return query + self.content[:, None], query + self.position[:, None]


class RelativeScores(NamedTuple):
    """Scores of the distances between queries and keys, yet to be computed: what block_sparse takes as position_bias.

    Attributes:
        position_query: [B, H, T, D].
        relative_key: [H, L, D].
        distances: [L] on the CPU, the distance that each row of relative_key is for; all that the pattern can meet.
    """

    position_query: torch.Tensor
    relative_key: torch.Tensor
    distances: torch.Tensor


@dataclass(frozen=True)
class RelativePositions:
    """Where the queries stand to the keys, for every layer of one call.

    Attributes:
        states: R [L, hidden] for the distances L - 1 down to 0.
        key_length: S, less than L.
        distances: [B, T, S], negative for later keys; None where the T queries are the last T of S unpadded keys.
        blind: [B, T] bool, queries that see no key at all; None if there are none.
        hidden: [T, columns] bool from `hidden_columns`: what `scores` makes hopeless; None leaves it to a mask.
    """

    states: torch.Tensor
    key_length: int
    distances: torch.Tensor | None = None
    blind: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    lazy: bool = False

    def bias(self, query: torch.Tensor, relative_key: torch.Tensor, scaling: float) -> torch.Tensor | RelativeScores:
        """Scaled `scores`, or where the backend computes them itself what they are computed from."""
        if not self.lazy:
            return self.scores(query * scaling, relative_key)
        return RelativeScores(query, relative_key, torch.arange(relative_key.shape[1] - 1, -1, -1))

    def scores(self, query: torch.Tensor, relative_key: torch.Tensor) -> torch.Tensor:
        """What queries [B, H, T, D] and projected distances [H, L, D] have in common, as [B, H, T, S].

        The terms (b) and (d) of Dai et al. 2019, section 3.3, if v has been added to the query. Entries for later
        keys mean nothing; the causal mask hides them, or `hidden` does.
        """
        by_distance = query @ relative_key[:, -self.key_length - 1 :].transpose(-1, -2)  # column c: distance S - c
        if self.hidden is not None:
            by_distance[..., : self.hidden.shape[1]].masked_fill_(self.hidden, torch.finfo(by_distance.dtype).min)
        if self.distances is None:
            return shift_rows(by_distance)
        columns = (self.key_length - self.distances).clamp(0, self.key_length)
        return by_distance.gather(-1, columns[:, None].expand(-1, by_distance.shape[1], -1, -1))


def shift_rows(scores: torch.Tensor) -> torch.Tensor:
    """[..., T, S + 1] by distance, S down to 0 -> [..., T, S] by key (Dai et al. 2019, appendix B).

    Row i moves T - i places to the left: of S keys the last T are the queries' own. What enters from the right belongs
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


def rows_by_distance(distances: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """For each of the `wanted` distances, of any shape, the row r where distances[r] is it; any if there is none."""
    rows = distances.new_zeros(int(distances.max()) + 1)
    rows[distances] = torch.arange(len(distances), device=distances.device)
    return rows[wanted.clamp(0, len(rows) - 1)]
