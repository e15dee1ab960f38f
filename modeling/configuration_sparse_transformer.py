"""Configuration of the Sparse Transformer (Child et al. 2019, arXiv:1904.10509)."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from .attention_patterns import check_known, check_patterns
from .checks import check_heads_divide, check_left_out, check_not_negative, check_probabilities, check_sizes


@strict
class SparseTransformerConfig(PreTrainedConfig):
    """What a Sparse Transformer is made of. The defaults are a small model of 1,024 bytes of text.

    Args:
        vocab_size: number of token ids; start tokens (one, or one for each class) come after the data's own values.
        hidden_size: width d of the residual stream.
        num_hidden_layers: number N of residual blocks.
        num_attention_heads: number of heads.
        qk_head_dim: size of a query or key; hidden_size / num_attention_heads if None. The paper's CIFAR-10 model has
            half of that.
        v_head_dim: size of a value; hidden_size / num_attention_heads if None.
        intermediate_size: width of the feed-forward layer; 4 * hidden_size if None.
        hidden_act: activation; "quick_gelu" is the paper's x * sigmoid(1.702 x).
        position_shape: lengths of the axes of the learned position embeddings, the last running fastest (section 5.3):
            [32, 32, 3] for the rows, columns and channels of an image, [length / stride, stride] for text and audio;
            [max_position_embeddings] if None.
        max_position_embeddings: longest sequence; the product of position_shape.
        attention_patterns: the pattern dict of every layer, or a list of them cycled over the layers. One dict in a
            list for each residual block is the paper's first way of using factorised attention (equation 6), a "union"
            its second (merged heads, equation 7), a "per_head" its third (multi-head, equation 8).
        resid_dropout: dropout at the end of each residual branch; the paper has no other.
        embedding_dropout: dropout of the sum of embeddings (ImageGPT).
        attention_dropout: dropout of the attention weights (ImageGPT), which block_sparse does not have.
        norm: "layer", the paper's layer norm, or "rms", which neither centres nor has a bias (ImageGPT).
        layer_norm_eps: epsilon of the norms.
        final_norm_eps: epsilon of the last norm; layer_norm_eps if None.
        output_vocab_size: how many of the first ids can come next, where those behind are start tokens; all if None.
        initializer_scale: variance of the initial weights, times the number of inputs (section 6: 0.125).
        chunk_size_feed_forward: positions that feed-forward layers and their norms take at a time, 0 for all; training
            then keeps only what they begin with.
        chunk_size_lm_head: positions whose logits the loss takes at a time, 0 for all; then it comes without logits.
        upcast_sampling: float32 query-key products when sampling in half precision, that is outside training, with a
            cache (section 5.6).
    """

    model_type = "sparse_transformer"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 257
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    qk_head_dim: int | None = None
    v_head_dim: int | None = None
    intermediate_size: int | None = None
    hidden_act: str = "quick_gelu"
    position_shape: list[int] | tuple[int, ...] | None = None
    max_position_embeddings: int | None = None
    attention_patterns: dict[str, Any] | list[dict[str, Any]] | None = None
    resid_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    norm: str = "layer"
    layer_norm_eps: float = 1e-5
    final_norm_eps: float | None = None
    output_vocab_size: int | None = None
    initializer_scale: float | int = 0.125
    upcast_sampling: bool = True
    chunk_size_feed_forward: int = 0
    chunk_size_lm_head: int = 0
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.attention_patterns is None:
            self.attention_patterns = [{"type": "local", "window": 32}, {"type": "strided", "stride": 32}]
        if self.position_shape is None:
            self.position_shape = [1024 if self.max_position_embeddings is None else self.max_position_embeddings]
        self.position_shape = list(self.position_shape)
        if self.max_position_embeddings is None:
            self.max_position_embeddings = math.prod(self.position_shape)
        self._derive_widths()
        super().__post_init__(**{"auto_map": {}, **kwargs})  # TRL reads it of every config

    def _derive_widths(self):
        """Fill in the widths that follow from hidden_size and num_attention_heads."""
        for name in ("qk_head_dim", "v_head_dim"):
            if getattr(self, name) is None and self.num_attention_heads > 0:
                check_heads_divide(self, instead=name)
                setattr(self, name, self.hidden_size // self.num_attention_heads)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size

    def validate_sizes(self):
        """Every size is at least 1, and the axes hold as many positions as the model claims."""
        sizes = "vocab_size hidden_size num_hidden_layers num_attention_heads qk_head_dim v_head_dim intermediate_size"
        check_sizes(self, *sizes.split())
        if not self.position_shape or min(self.position_shape) < 1:
            raise ValueError(f"position_shape must list axis lengths of at least 1, got {self.position_shape}.")
        positions = math.prod(self.position_shape)
        if positions != self.max_position_embeddings:
            raise ValueError(
                f"position_shape={self.position_shape} holds {positions} positions, but "
                f"max_position_embeddings={self.max_position_embeddings}; give one of them, or make them agree."
            )

    def validate_numbers(self):
        """Dropouts are probabilities below 1, and the rest of the numbers are not negative."""
        check_probabilities(self, "resid_dropout", "embedding_dropout", "attention_dropout")
        check_not_negative(self, "layer_norm_eps", "initializer_scale")
        if self.final_norm_eps is not None:
            check_not_negative(self, "final_norm_eps")
        check_not_negative(self, "chunk_size_feed_forward", "chunk_size_lm_head")

    def validate_outputs(self):
        """Ids that can come next are ids, and where some cannot, their embeddings are not the output's."""
        size = self.output_vocab_size
        if size is None:
            return
        if not 1 <= size <= self.vocab_size:
            raise ValueError(f"output_vocab_size must be from 1 to vocab_size={self.vocab_size}, got {size}.")
        if self.tie_word_embeddings:
            raise ValueError(f"output_vocab_size={size} needs an output of its own; leave tie_word_embeddings=False.")

    def validate_names(self):
        """Transformers has an activation of that name, and there is such a norm."""
        check_known(self, "hidden_act", ACT2FN)
        check_known(self, "norm", ("layer", "rms"))

    def validate_attention_patterns(self):
        """Every pattern is known, complete, and can be dealt out to the heads."""
        check_patterns(self.attention_patterns, self.num_hidden_layers, self.num_attention_heads)

    def validate_layer_type(self):
        """Transformers reserves `layer_types` for its own caches and masks; replaces its check of their names."""
        check_left_out(self, "layer_types")


__all__ = ["SparseTransformerConfig"]
