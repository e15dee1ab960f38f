"""Configuration of the RoPE decoder: the decoder of Llama (Touvron et al. 2023, arXiv:2302.13971)."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .attention_patterns import check_known, check_patterns, nearest
from .checks import (
    check_buckets,
    check_heads_divide,
    check_left_out,
    check_not_negative,
    check_probabilities,
    check_sizes,
)

# The kinds of rotary positions, and what each of them needs beyond rope_theta.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
POSITIVE = (
    *("rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
    *("original_max_position_embeddings", "beta_fast", "beta_slow"),
)
POSITION_ENCODINGS = ("rotary", "alibi", "t5", "none")
LAYOUTS = ("half", "interleaved")


@strict
class RoPEDecoderConfig(PreTrainedConfig):
    """What a RoPE decoder is made of. The defaults are a small model of bytes.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated feed-forward layer; 8/3 * hidden_size, rounded up to a multiple of 64, if
            None (Shazeer 2020, arXiv:2002.05202: as many weights as 4 * hidden_size without a gate).
        num_hidden_layers: number of blocks.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key and value heads, each shared by a group of query heads (Ainslie et al. 2023,
            arXiv:2305.13245); num_attention_heads if None.
        head_dim: size of a query, key or value; hidden_size / num_attention_heads if None.
        hidden_act: activation of the gate; "silu" makes it SwiGLU.
        max_position_embeddings: length the model is trained for. Longer input is allowed: see rope_parameters.
        rope_parameters: the rotary positions, as Transformers has them: `rope_type` (default, linear, dynamic, yarn,
            llama3, longrope), `rope_theta`, `partial_rotary_factor`, and what the type needs.
        position_encoding: how order enters: "rotary"; "alibi" (Press et al. 2021, arXiv:2108.12409) or "t5" (Raffel et
            al. 2019, arXiv:1910.10683), which add to the scores what depends on the distance alone; or "none".
        relative_attention_num_buckets: number of learned numbers a head that "t5" positions have, shared by all layers.
        relative_attention_max_distance: distance from which on all are alike to "t5" positions.
        rotary_layout: which dimensions make a pair: "half" (i and i + D/2: GPT-NeoX, Llama) or "interleaved" (2i and
            2i + 1: RoFormer, GPT-J).
        attention_patterns: which earlier positions a layer sees: one pattern dict, or a list of them cycled over the
            layers; all positions if None.
        attention_bias: give the query, key and value projections a bias.
        attention_output_bias: give the output projection a bias; as attention_bias if None.
        mlp_bias: give the feed-forward layers a bias.
        attention_dropout: dropout on the attention weights.
        classifier_dropout: dropout before the token classification head.
        rms_norm_eps: epsilon of the norms.
        initializer_range: standard deviation of the initial weights.
        chunk_size_feed_forward: positions that feed-forward layers and their norms take at a time, 0 for all; training
            then keeps only what they begin with.
        chunk_size_lm_head: positions whose logits the loss takes at a time, 0 for all; then it comes without logits.
    """

    model_type = "rope_decoder"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 257
    hidden_size: int = 256
    intermediate_size: int | None = None
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    position_encoding: str = "rotary"
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    rope_parameters: RopeParameters | dict | None = None
    rotary_layout: str = "half"
    attention_patterns: dict[str, Any] | list[dict[str, Any]] | None = None
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    mlp_bias: bool = False
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.1
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    chunk_size_feed_forward: int = 0
    chunk_size_lm_head: int = 0
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            check_heads_divide(self)
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // (3 * 64)) * 64
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        super().__post_init__(**{"auto_map": {}, **kwargs})  # TRL reads it of every config

    def validate_sizes(self):
        """Every size is at least 1, and the heads fit each other."""
        heads = ("num_attention_heads", "num_key_value_heads", "head_dim")
        others = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
        check_sizes(self, *heads, *others)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}."
            )
        check_probabilities(self, "attention_dropout", "classifier_dropout")
        check_not_negative(self, "rms_norm_eps", "initializer_range", "chunk_size_feed_forward", "chunk_size_lm_head")
        check_known(self, "hidden_act", ACT2FN)
        check_known(self, "position_encoding", POSITION_ENCODINGS)
        check_buckets(self)

    def validate_rope(self):
        """The rotary positions are of a known kind and have what it needs; comes before Transformers' own check."""
        given = self.rope_parameters
        rope_type = given.get("rope_type")
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_parameters has rope_type={rope_type!r}{nearest(str(rope_type), ROPE_TYPES)}")
        if missing := [name for name in ROPE_TYPES[rope_type] if given.get(name) is None]:
            raise ValueError(f"rope_parameters of rope_type={rope_type!r} lacks {', '.join(missing)}.")
        for name in POSITIVE:
            self._check_positive(name, [1.0 if given.get(name) is None else given[name]])
        for name in ("short_factor", "long_factor"):
            if not isinstance(given.get(name, []), (list, tuple)):
                raise ValueError(f"rope_parameters has {name}={given[name]!r}, but it must be a list of numbers.")
            self._check_positive(name, given.get(name, []))
        if given.get("factor") is not None and given["factor"] < 1:
            raise ValueError(f"rope_parameters has factor={given['factor']}, but it must be at least 1.")
        if rope_type == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
            raise ValueError(
                f"rope_parameters has high_freq_factor={given['high_freq_factor']}, but it must be above "
                f"low_freq_factor={given['low_freq_factor']}."
            )
        super().validate_rope()

    def _check_positive(self, name: str, values: list):
        for value in values:
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not 0 < value < math.inf:
                raise ValueError(f"rope_parameters has {name}={value!r}, but it must be a number above 0.")

    def validate_rotary(self):
        """The rotary positions turn a whole number of pairs."""
        self.validate_sizes()  # validators run in alphabetical order, and this one needs the sizes
        check_known(self, "rotary_layout", LAYOUTS)
        share = self.rope_parameters.get("partial_rotary_factor", 1.0)
        rotated = int(self.head_dim * share) if isinstance(share, (int, float)) and 0 < share <= 1 else 0
        if rotated < 2 or rotated % 2:
            raise ValueError(
                f"head_dim={self.head_dim} with partial_rotary_factor={share} turns {rotated} dimensions; the number "
                "must be even, at least 2 and at most head_dim."
            )
        for name in ("short_factor", "long_factor"):
            factors = self.rope_parameters.get(name)
            if factors is not None and len(factors) != rotated // 2:
                raise ValueError(f"rope_parameters has {len(factors)} values of {name}; it needs {rotated // 2}.")

    def validate_attention_patterns(self):
        """Every pattern is known, complete, and can be dealt out to the heads."""
        if self.attention_patterns is not None:
            check_patterns(self.attention_patterns, self.num_hidden_layers, self.num_attention_heads)

    def validate_layer_types(self):
        """Transformers reserves `layer_types` for its own caches and masks, `sliding_window` likewise."""
        check_left_out(self, "layer_types", "sliding_window")


__all__ = ["RoPEDecoderConfig"]
