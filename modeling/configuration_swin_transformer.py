"""Configuration of the Swin Transformer (Liu et al. 2021, arXiv:2103.14030)."""

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

from .attention_patterns import Window2D, check_known
from .checks import check_not_negative, check_probabilities, check_sizes


@strict
class SwinTransformerConfig(BackboneConfigMixin, PreTrainedConfig):
    """What a Swin Transformer is made of. The defaults are Swin-T (section 3.3). Names are those of Transformers' Swin.

    Args:
        image_size: height and width that the model is made for, or one number for both. Other sizes are fine; only
            absolute embeddings depend on it.
        patch_size: height and width of a patch in pixels, or one number for both.
        num_channels: channels of the pictures.
        embed_dim: width C of the first stage; each later one is twice as wide.
        depths: number of blocks of each stage.
        num_heads: number of heads of each stage. One number is that of the last stage; each stage before has half.
        window_size: side M of a window, in tokens.
        shifted_windows: whether every second block moves its windows by half their size (section 3.2); False is the
            paper's ablation (table 4).
        mlp_ratio: width of the feed-forward layers, over the width of the stage.
        qkv_bias: whether queries, keys and values have biases.
        hidden_dropout_prob: dropout of the embeddings and at the end of each branch.
        attention_probs_dropout_prob: dropout of the attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first one.
        hidden_act: activation.
        use_absolute_embeddings: learned position embeddings in addition to the relative position bias.
        initializer_range: standard deviation of the initial weights.
        layer_norm_eps: epsilon of the layer norms.
        encoder_stride: pixels of a picture for one token of the last stage, for masked image modelling.
        hidden_size, num_hidden_layers: width of the last stage and number of stages; they stand in for embed_dim and
            depths (two blocks a stage) where those are not given.
        out_features, out_indices: stages whose feature maps the backbone returns.
    """

    model_type = "swin_transformer"
    attribute_map = {"num_attention_heads": "num_heads"}
    base_model_tp_plan = {
        "encoder.layers.*.blocks.*.attention.q_proj": "colwise",
        "encoder.layers.*.blocks.*.attention.k_proj": "colwise",
        "encoder.layers.*.blocks.*.attention.v_proj": "colwise",
        "encoder.layers.*.blocks.*.attention.o_proj": "rowwise",
        "encoder.layers.*.blocks.*.mlp.fc1": "colwise",
        "encoder.layers.*.blocks.*.mlp.fc2": "rowwise",
    }

    image_size: int | list[int] | tuple[int, ...] = 224
    patch_size: int | list[int] | tuple[int, ...] = 4
    num_channels: int = 3
    embed_dim: int | None = None
    depths: list[int] | tuple[int, ...] | None = None
    num_heads: int | list[int] | tuple[int, ...] | None = None
    window_size: int = 7
    shifted_windows: bool = True
    mlp_ratio: float | int = 4.0
    qkv_bias: bool = True
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.1
    hidden_act: str = "gelu"
    use_absolute_embeddings: bool = False
    initializer_range: float | int = 0.02
    layer_norm_eps: float = 1e-5
    encoder_stride: int = 32
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self._derive_depths()
        self._derive_widths()
        self._derive_heads(kwargs.pop("num_attention_heads", self.num_heads))
        kwargs.pop("stage_names", None)
        self.stage_names = ["stem", *(f"stage{number}" for number in range(1, len(self.depths) + 1))]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**{"auto_map": {}, **kwargs})  # TRL reads it of every config

    def _derive_depths(self):
        if self.depths is None:
            self.depths = [2, 2, 6, 2] if self.num_hidden_layers is None else [2] * self.num_hidden_layers
        self.depths = list(self.depths)
        if self.num_hidden_layers not in (None, len(self.depths)):
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers} counts the stages, but depths={self.depths} has "
                f"{len(self.depths)}; give one of them, or make them agree."
            )
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"depths must list at least one stage, of at least one block each, got {self.depths}.")
        self.num_hidden_layers = len(self.depths)

    def _derive_widths(self):
        growth = 2 ** (len(self.depths) - 1)
        if self.embed_dim is None:
            self.embed_dim = 96 if self.hidden_size is None else self.hidden_size // growth
        if self.hidden_size not in (None, self.embed_dim * growth):
            raise ValueError(
                f"hidden_size={self.hidden_size} is the width of the last of {len(self.depths)} stages, which is "
                f"{growth} * embed_dim={self.embed_dim * growth}; make it a multiple of {growth}, or leave it out."
            )
        self.hidden_size = self.embed_dim * growth

    def _derive_heads(self, num_heads: int | list[int] | tuple[int, ...] | None):
        stages = len(self.depths)
        if num_heads is None:
            num_heads = max(1, self.hidden_size // 32)  # heads of 32 dimensions, as in the paper
        if isinstance(num_heads, int):
            num_heads = [max(1, num_heads >> (stages - 1 - stage)) for stage in range(stages)]
        self.num_heads = list(num_heads)

    @property
    def stage_widths(self) -> list[int]:
        """Width of each stage."""
        return [self.embed_dim * 2**stage for stage in range(len(self.depths))]

    @property
    def attention_patterns(self) -> list[dict]:
        """Patterns of the blocks, alternating: windows, and windows moved by half their size."""
        shift = self.window_size // 2 if self.shifted_windows else 0
        return [Window2D(self.window_size).to_dict(), Window2D(self.window_size, shift).to_dict()]

    def validate_sizes(self):
        """Every size is at least 1, and heads divide the width of their stage."""
        check_sizes(self, "num_channels", "embed_dim", "window_size", "encoder_stride")
        for name in ("image_size", "patch_size"):
            if len(pair(getattr(self, name))) != 2 or min(pair(getattr(self, name))) < 1:
                raise ValueError(f"{name} must be one or two numbers of at least 1, got {getattr(self, name)}.")
        if len(self.num_heads) != len(self.depths):
            raise ValueError(f"num_heads={self.num_heads} must have one entry for each stage of depths={self.depths}.")
        for width, heads in zip(self.stage_widths, self.num_heads):
            if heads < 1 or width % heads:
                raise ValueError(
                    f"num_heads={self.num_heads} must divide the widths of the stages, {self.stage_widths}, one by one."
                )

    def validate_numbers(self):
        """Dropouts are probabilities below 1, and the rest of the numbers are not negative."""
        check_probabilities(self, "hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")
        check_not_negative(self, "layer_norm_eps", "initializer_range", "mlp_ratio")
        if self.initializer_range == 0:
            raise ValueError("initializer_range must be above 0: weights are drawn from a normal cut off at 2, got 0.")
        if int(self.mlp_ratio * self.embed_dim) < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} leaves feed-forward layers no width at embed_dim.")

    def validate_hidden_act(self):
        """Transformers has an activation of that name."""
        check_known(self, "hidden_act", ACT2FN)

    def validate_chunks(self):
        """Every config of Transformers has this field; blocks of windows are short."""
        if self.chunk_size_feed_forward:
            raise ValueError(
                f"chunk_size_feed_forward={self.chunk_size_feed_forward}: a Swin Transformer takes no chunks; leave "
                "it 0, and use gradient checkpointing."
            )


def pair(size: int | list[int] | tuple[int, ...]) -> tuple[int, ...]:
    """(height, width) of a size that may be one number for both."""
    return (size, size) if isinstance(size, int) else tuple(size)


__all__ = ["SwinTransformerConfig"]
