"""Configuration of the vanilla Transformer (Vaswani et al. 2017, arXiv:1706.03762)."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from .attention_patterns import check_known, check_patterns
from .checks import (
    check_buckets,
    check_heads_divide,
    check_left_out,
    check_not_negative,
    check_probabilities,
    check_sizes,
)

POSITION_ENCODINGS = (
    *("sinusoidal", "learned", "learned_per_layer", "relative", "transformer_xl", "rotary"),
    *("alibi", "t5", "none"),
)
SINUSOID_LAYOUTS = ("interleaved", "halves")


@strict
class VanillaStackConfig(PreTrainedConfig):
    """What a stack of the paper's blocks is made of, encoder or decoder. The defaults are the paper's base model.

    Args:
        vocab_size: number of token ids.
        hidden_size: width d_model of the residual stream.
        num_hidden_layers: number N of blocks.
        num_attention_heads: number h of heads, each of size d_model / h.
        intermediate_size: width d_ff of the feed-forward layers; 4 * hidden_size if None.
        hidden_act: activation of the feed-forward layers.
        norm_first: norms before the branches and at the end of the stack, instead of after the sums as in the paper.
        layer_bias: give the linear layers and norms of the stack biases, as the paper does.
        embedding_norm: normalise the embeddings before the first block.
        scale_embedding: multiply token embeddings by the square root of hidden_size (section 3.4).
        position_encoding: how order enters: "sinusoidal" (section 3.5), "learned", "learned_per_layer", "relative"
            (Shaw et al. 2018), "transformer_xl", "rotary", "alibi" (Press et al. 2021), "t5" (Raffel et al. 2019) or
            "none".
        sinusoid_layout: "interleaved" sines and cosines as in the paper, or in "halves" as in Marian.
        max_position_embeddings: number of learned positions. The other encodings have no longest sequence.
        max_relative_position: distance k from which on all are alike to "relative" positions.
        relative_attention_num_buckets: number of learned numbers a head that "t5" positions have, in each stack.
        relative_attention_max_distance: distance from which on all are alike to "t5" positions.
        attention_patterns: which tokens self-attention sees: one pattern dict, or a list of them cycled over the
            layers; all tokens if None.
        dropout: dropout of embeddings and at the end of each branch (section 5.4).
        attention_dropout: dropout of the attention weights.
        activation_dropout: dropout inside the feed-forward layers.
        layer_norm_eps: epsilon of the layer norms.
        initializer_factor: factor on the initial weights, which are uniform within sqrt(6 / (inputs + outputs)).
        chunk_size_feed_forward: positions that feed-forward layers and their norms take at a time, 0 for all; training
            then keeps only what they begin with.
        chunk_size_lm_head: positions whose logits the loss takes at a time, 0 for all; then it comes without logits.
    """

    vocab_size: int = 37000
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int | None = None
    hidden_act: str = "relu"
    norm_first: bool = False
    layer_bias: bool = True
    embedding_norm: bool = False
    scale_embedding: bool = True
    position_encoding: str = "sinusoidal"
    sinusoid_layout: str = "interleaved"
    max_position_embeddings: int = 1024
    max_relative_position: int = 16
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    attention_patterns: dict[str, Any] | list[dict[str, Any]] | None = None
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_factor: float | int = 1.0
    chunk_size_feed_forward: int = 0
    chunk_size_lm_head: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 1
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**{"auto_map": {}, **kwargs})  # TRL reads it of every config

    def validate_sizes(self):
        """Every size is at least 1, and heads divide the width."""
        sizes = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size "
        check_sizes(self, *(sizes + "max_position_embeddings max_relative_position").split())
        check_heads_divide(self, instead=None)
        check_buckets(self)

    def validate_numbers(self):
        """Dropouts are probabilities below 1, and the other numbers are not negative."""
        check_probabilities(self, "dropout", "attention_dropout", "activation_dropout")
        check_not_negative(self, "layer_norm_eps", "initializer_factor")
        check_not_negative(self, "chunk_size_feed_forward", "chunk_size_lm_head")

    def validate_names(self):
        """Encoding, layout and activation are known."""
        check_known(self, "position_encoding", POSITION_ENCODINGS)
        check_known(self, "sinusoid_layout", SINUSOID_LAYOUTS)
        check_known(self, "hidden_act", ACT2FN)

    def validate_waves(self):
        """Sines and cosines come in pairs."""
        self.validate_sizes()  # validators run in the order of their names
        if self.position_encoding in ("sinusoidal", "transformer_xl") and self.hidden_size % 2:
            raise ValueError(
                f"hidden_size must be even with position_encoding={self.position_encoding!r}, got {self.hidden_size}."
            )
        head_dim = self.hidden_size // self.num_attention_heads
        if self.position_encoding == "rotary" and head_dim % 2:
            raise ValueError(
                f"hidden_size / num_attention_heads must be even with position_encoding='rotary', got {head_dim}."
            )

    def validate_attention_patterns(self):
        """Every pattern is known, complete, and can be dealt out to the heads."""
        if self.attention_patterns is not None:
            check_patterns(self.attention_patterns, self.num_hidden_layers, self.num_attention_heads)

    def validate_layer_type(self):
        """Transformers reserves `layer_types` for its own caches and masks; replaces its check of their names."""
        check_left_out(self, "layer_types", seen="tokens")


@strict
class VanillaTransformerConfig(VanillaStackConfig):
    """An encoder and a decoder; `hidden_size`, heads and all else that is not named here hold for both.

    Args:
        decoder_layers: number of the decoder's blocks; num_hidden_layers if None.
        target_vocab_size: number of target ids; vocab_size if None.
        decoder_attention_patterns: the decoder's own attention_patterns; those of the encoder if None, and
            {"type": "full"} for all earlier tokens.
        share_embeddings: source and target have one table of embeddings (section 3.4), where tie_word_embeddings.
        tie_word_embeddings: target embeddings are the output layer's weights.
        output_bias: give the output layer a bias.
        label_smoothing: probability that the training loss spreads over the whole vocabulary (section 5.4).
        add_cross_attention: for VanillaTransformerForCausalLM: keep the layers that attend to an encoder's states.
        decoder_start_token_id: what the decoder's input begins with.
    """

    model_type = "vanilla_transformer"
    keys_to_ignore_at_inference = ["past_key_values"]

    decoder_layers: int | None = None
    target_vocab_size: int | None = None
    decoder_attention_patterns: dict[str, Any] | list[dict[str, Any]] | None = None
    share_embeddings: bool = True
    output_bias: bool = False
    label_smoothing: float | int = 0.0
    add_cross_attention: bool = False
    is_encoder_decoder: bool = True
    is_decoder: bool = False
    use_cache: bool = True
    decoder_start_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        if self.decoder_layers is None:
            self.decoder_layers = self.num_hidden_layers
        super().__post_init__(**kwargs)

    @property
    def vocab_size_of_decoder(self) -> int:
        """Number of ids of the decoder's inputs and outputs."""
        return self.vocab_size if self.target_vocab_size is None else self.target_vocab_size

    @property
    def patterns_of_decoder(self) -> dict | list | None:
        """The patterns of the decoder's self-attention."""
        own = self.decoder_attention_patterns
        return self.attention_patterns if own is None else own

    def validate_decoder(self):
        """The decoder has blocks and ids, shared tables are of one size, and smoothing is a probability."""
        given = [name for name in ("decoder_layers", "target_vocab_size") if getattr(self, name) is not None]
        check_sizes(self, *given)
        check_probabilities(self, "label_smoothing")
        shares = self.share_embeddings and self.tie_word_embeddings and self.is_encoder_decoder
        if shares and self.vocab_size_of_decoder != self.vocab_size:
            raise ValueError(
                f"vocab_size={self.vocab_size} and target_vocab_size={self.target_vocab_size} cannot share one table "
                "of embeddings; make them equal, or set share_embeddings to False."
            )

    def validate_attention_patterns(self):
        """Both stacks' patterns are known, complete, and can be dealt out to the heads."""
        super().validate_attention_patterns()
        if self.patterns_of_decoder is not None:
            check_patterns(self.patterns_of_decoder, self.decoder_layers, self.num_attention_heads)


__all__ = ["VanillaTransformerConfig"]
