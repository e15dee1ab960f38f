"""Configuration of the Image Transformer (Parmar et al. 2018, arXiv:1802.05751)."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from .attention_patterns import Block2D, Pattern, check_known, check_patterns, patterns_for_layers, walk
from .checks import check_heads_divide, check_left_out, check_not_negative, check_probabilities, check_sizes

OUTPUTS = ("categorical", "logistic_mixture")
COORDINATES = ("sinusoidal", "learned")


@strict
class ImageTransformerConfig(PreTrainedConfig):
    """What an Image Transformer is made of. The defaults are a small model of 32x32 RGB images.

    An image is a sequence of [start, x0 ... x(N-1)] ids, N = height * width * channels: its values in the order of
    generation, behind a start token, which is the class where there are classes.

    Args:
        vocab_size: number of ids: `num_values` values of a channel, then the start tokens.
        num_values: number of values of a channel, 256 for bytes; vocab_size less the start tokens if None.
        num_classes: number of classes, each with a start token of its own; 0 for one start token and no classes. A
            class's embedding is added at every position (section 5.1).
        image_size: height and width of the images, or one number for both.
        num_channels: channels of a pixel.
        output: "categorical", a softmax over the values; or "logistic_mixture", a discretised mixture of logistics
            whose trunk has one position for each pixel, not for each value (section 3.4).
        num_mixtures: components of the mixture.
        coordinates: "sinusoidal" or "learned" encoding of rows and columns (section 3.1).
        attention_patterns: the pattern dict of every layer, or a list of them cycled over the layers; positions count
            in the order of generation. With a "block_2d" among them that is block by block, else row by row.
        hidden_size: width d of the residual stream, a multiple of 4.
        num_hidden_layers: number of decoder layers.
        num_attention_heads: number of heads.
        head_dim: size of a query, key or value; hidden_size / num_attention_heads if None.
        intermediate_size: width of the feed-forward layer; 4 * hidden_size if None.
        hidden_act: its activation.
        resid_dropout: dropout on the embeddings and at the end of each residual branch.
        attention_dropout: dropout of attention weights; "block_sparse" has none.
        num_encoder_layers: encoder layers of the super-resolution model; num_hidden_layers if None.
        source_image_size: height and width of the images that model enlarges, or one number for both.
        encoder_attention_patterns: patterns of its encoder, in raster order.
        predict_residual: its decoder reads and predicts how values differ from the small image after bicubic
            interpolation, instead of values themselves. Not in the paper (Kim et al. 2016, arXiv:1511.04587, have it);
            for output="logistic_mixture".
        layer_norm_eps: epsilon of the layer norms.
        initializer_range: standard deviation of the initial weights.
        chunk_size_feed_forward: positions that feed-forward layers and their norms take at a time, 0 for all; training
            then keeps only what they begin with.
        bos_token_id, decoder_start_token_id: start token of images without classes; num_values if None.
    """

    model_type = "image_transformer"
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
    num_values: int | None = None
    num_classes: int = 0
    image_size: int | list[int] | tuple[int, ...] = 32
    num_channels: int = 3
    output: str = "categorical"
    num_mixtures: int = 10
    coordinates: str = "sinusoidal"
    attention_patterns: dict[str, Any] | list[dict[str, Any]] | None = None
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    head_dim: int | None = None
    intermediate_size: int | None = None
    hidden_act: str = "relu"
    resid_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    num_encoder_layers: int | None = None
    source_image_size: int | list[int] | tuple[int, ...] = 8
    encoder_attention_patterns: dict[str, Any] | list[dict[str, Any]] | None = None
    predict_residual: bool = False
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    chunk_size_feed_forward: int = 0
    use_cache: bool = True
    is_encoder_decoder: bool = False
    bos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        for name in ("image_size", "source_image_size"):
            value = getattr(self, name)
            setattr(self, name, [value, value] if isinstance(value, int) else list(value))
        if self.attention_patterns is None:
            self.attention_patterns = {"type": "block_1d", "block": 256, "flange": 256}
        if self.encoder_attention_patterns is None:
            self.encoder_attention_patterns = {"type": "full"}
        if self.num_encoder_layers is None:
            self.num_encoder_layers = self.num_hidden_layers
        if self.head_dim is None and self.num_attention_heads > 0:
            check_heads_divide(self)
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_values is None:
            self.num_values = self.vocab_size - max(1, self.num_classes)
        if self.num_classes == 0:
            self.bos_token_id = self.num_values if self.bos_token_id is None else self.bos_token_id
            if self.decoder_start_token_id is None:
                self.decoder_start_token_id = self.bos_token_id
        super().__post_init__(**{"auto_map": {}, **kwargs})  # TRL reads it of every config

    @property
    def max_position_embeddings(self) -> int:
        """Longest sequence: the values of an image."""
        return math.prod(self.image_size) * self.num_channels

    @property
    def values_per_position(self) -> int:
        """Values that share one position of the trunk: all of a pixel under a mixture, else one."""
        return self.num_channels if self.output == "logistic_mixture" else 1

    @property
    def grid(self) -> tuple[int, int, int]:
        """Rows, columns, and positions of the trunk in a pixel."""
        return (*self.image_size, self.num_channels // self.values_per_position)

    @property
    def block_shape(self) -> list[int] | None:
        """Height and width of the blocks in whose order images are generated; None for row by row."""
        shapes = self._block_shapes()
        return list(shapes[0]) if shapes else None

    def _block_shapes(self) -> list[tuple[int, int]]:
        patterns = patterns_for_layers(self.attention_patterns, self.num_hidden_layers)
        found = (inner for pattern in patterns for inner in walk(pattern) if isinstance(inner, Block2D))
        return list(dict.fromkeys((pattern.height, pattern.width) for pattern in found))

    def validate_sizes(self):
        """Every size is at least 1; rows and columns each get half of an even number of waves."""
        sizes = "vocab_size num_values num_channels num_mixtures hidden_size num_hidden_layers num_attention_heads "
        check_sizes(self, *(sizes + "head_dim intermediate_size num_encoder_layers").split())
        for name in ("image_size", "source_image_size"):
            value = getattr(self, name)
            if len(value) != 2 or min(value) < 1:
                raise ValueError(f"{name} must be a height and a width of at least 1, got {value}.")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of 4 (waves of two coordinates), got {self.hidden_size}.")

    def validate_vocabulary(self):
        """The values and the start tokens have ids."""
        check_not_negative(self, "num_classes")
        needed = self.num_values + max(1, self.num_classes)
        if self.vocab_size < needed:
            raise ValueError(
                f"vocab_size={self.vocab_size} is too small: num_values={self.num_values} and "
                f"num_classes={self.num_classes} need {needed} ids (one start token where there are no classes)."
            )
        if self.output == "logistic_mixture" and self.num_values < 2:
            raise ValueError(f"output='logistic_mixture' needs num_values of at least 2, got {self.num_values}.")

    def validate_tie_word_embeddings(self):
        """A head has one vector for each id, so it is one table with embeddings that have one too."""
        if self.tie_word_embeddings and (self.output != "categorical" or self.num_channels > 1):
            raise ValueError(
                "tie_word_embeddings needs output='categorical' and num_channels=1: there is an embedding for each "
                f"channel, got output={self.output!r} and num_channels={self.num_channels}."
            )

    def validate_numbers(self):
        """Dropouts are probabilities below 1, and the rest of the numbers are not negative."""
        check_probabilities(self, "resid_dropout", "attention_dropout")
        check_not_negative(self, "layer_norm_eps", "initializer_range", "chunk_size_feed_forward")

    def validate_choices(self):
        """Names are of the things that there are."""
        check_known(self, "output", OUTPUTS)
        check_known(self, "coordinates", COORDINATES)
        check_known(self, "hidden_act", ACT2FN)

    def validate_predict_residual(self):
        """Differences are numbers, which a softmax over ids cannot move."""
        if self.predict_residual and self.output != "logistic_mixture":
            raise ValueError(f"predict_residual=True needs output='logistic_mixture', got output={self.output!r}.")

    def validate_attention_patterns(self):
        """Patterns are known, complete, can be dealt out to the heads, and agree on the order of generation."""
        for name, layers in (
            ("attention_patterns", self.num_hidden_layers),
            ("encoder_attention_patterns", self.num_encoder_layers),
        ):
            for pattern in check_patterns(getattr(self, name), layers, self.num_attention_heads):
                self._check_grids(name, pattern)
        shapes = self._block_shapes()
        if len(shapes) > 1:
            raise ValueError(
                f"attention_patterns hold blocks of {' and '.join(f'{h}x{w}' for h, w in shapes)} pixels, but an image "
                "is generated in one order: give every 'block_2d' the same height and width (flanges may differ)."
            )
        if shapes and any(side > limit for side, limit in zip(shapes[0], self.image_size)):
            raise ValueError(
                f"image_size={self.image_size} is smaller than a block of {list(shapes[0])} pixels; "
                "give 'block_2d' a height and width within the image."
            )

    def _check_grids(self, name: str, pattern: Pattern) -> None:
        for inner in walk(pattern):
            if inner.type == "window_2d":
                raise ValueError(f"{name}: 'window_2d' is no local attention of this model; use 'block_2d'.")
            if getattr(inner, "grid", None) is not None:
                raise ValueError(f"{name} holds a grid, {list(inner.grid)}; leave it out: the model knows its images.")

    def validate_layer_type(self):
        """Transformers reserves `layer_types` for its own caches and masks; replaces its check of their names."""
        check_left_out(self, "layer_types")


__all__ = ["ImageTransformerConfig"]
