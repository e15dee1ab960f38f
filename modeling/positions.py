"""How order enters a model.

Shapes: B batch, T tokens.
"""

import math
from collections.abc import Callable

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
        cos, sin: [B, T, R / 2]; dimensions from R on stay as they are.
    """
    states, kept = _rotated_and_kept(states, cos)
    even, odd = states.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack(_turn(even, odd, cos, sin), dim=-1).flatten(-2)
    return torch.cat((turned, kept), dim=-1)


def rotate_half(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x_0, x_{R/2}), (x_1, x_{R/2+1}), ... as GPT-NeoX and Llama do; arguments as above."""
    states, kept = _rotated_and_kept(states, cos)
    return torch.cat((*_turn(*states.chunk(2, dim=-1), cos, sin), kept), dim=-1)


ROTARY_LAYOUTS: dict[str, Callable] = {"interleaved": rotate_interleaved, "half": rotate_half}


def _rotated_and_kept(states, cos):
    rotated = 2 * cos.shape[-1]
    return states[..., :rotated], states[..., rotated:]


def _turn(first, second, cos, sin):
    """Each pair turned by its angle (equation 13)."""
    cos, sin = cos[:, None], sin[:, None]  # [B, 1, T, R / 2]
    return first * cos - second * sin, second * cos + first * sin
