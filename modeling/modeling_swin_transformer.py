"""Swin Transformer: Liu et al. 2021, "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows".

Attention inside windows of a picture, which every second block moves by half their size, in stages that halve the
resolution and double the width. Section and equation numbers are those of arXiv:2103.14030. Weights have the names of
Transformers' Swin.

Shapes: B batch, T tokens of a grid gh x gw, C width, L windows of N tokens each, H heads, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hf_tfamily.block_sparse.windows import attends_in_pieces, packed_window_attention, window_attention

from .attention import BLOCK_SPARSE, PatternBackend, eager_attention_forward
from .attention_patterns import Window2D, patterns_for_layers
from .checks import check_labels
from .configuration_swin_transformer import SwinTransformerConfig, pair
from .linear_onednn import OneDNNLinear
from .positions_window import WindowPositionBias
from .swin_layers import (
    SwinTransformerDropPath,
    SwinTransformerEmbeddings,
    SwinTransformerMLP,
    SwinTransformerPatchMerging,
    are_bare,
    project_together,
)
from .window_layout import WindowLayout, window_layout


class SwinTransformerAttention(nn.Module):
    """Attention inside windows with a relative position bias (equation 4)."""

    def __init__(self, config: SwinTransformerConfig, width: int, num_heads: int):
        super().__init__()
        self.config = config
        self.is_causal = False
        self.head_dim = width // num_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_probs_dropout_prob
        self.q_proj = OneDNNLinear(width, width, bias=config.qkv_bias)
        self.k_proj = OneDNNLinear(width, width, bias=config.qkv_bias)
        self.v_proj = OneDNNLinear(width, width, bias=config.qkv_bias)
        self.o_proj = OneDNNLinear(width, width)
        self.relative_position_bias = WindowPositionBias(config.window_size, num_heads)

    def forward(
        self, windows: torch.Tensor, layout: WindowLayout, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B * L, N, C] -> [B * L, N, C], and the weights [B * L, H, N, N] where the backend has them."""
        block_sparse = self.config._attn_implementation == BLOCK_SPARSE
        if block_sparse and kwargs.get("output_attentions"):
            raise ValueError(f"attn_implementation='{BLOCK_SPARSE}' does not support output_attentions; use 'eager'.")
        bias = self.relative_position_bias(layout.window)  # B, [H, N, N]
        dropout = self.dropout if self.training else 0.0
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if block_sparse and not dropout and are_bare(projections) and attends_in_pieces(windows, self.q_proj.weight):
            packed = project_together(windows, projections).unflatten(-1, (3, -1, self.head_dim))
            return self.o_proj(packed_window_attention(packed, bias, layout.mask, self.scaling).flatten(2)), None
        query, key, value = (
            project(windows).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B * L, H, N, D]
            for project in projections
        )
        if block_sparse:
            output, weights = window_attention(query, key, value, bias, layout.mask, self.scaling, dropout), None
        else:
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
            mask = (
                None if layout.mask is None else layout.mask[:, None].repeat(len(windows) // len(layout.mask), 1, 1, 1)
            )
            output, weights = attention(
                self,
                query,
                key,
                value,
                mask,
                scaling=self.scaling,
                dropout=dropout,
                position_bias=bias[None],
                **kwargs,
            )  # SoftMax(Q K^T / sqrt(d) + B) V, equation 4
        return self.o_proj(output.flatten(2)), weights


class SwinTransformerBlock(GradientCheckpointingLayer):
    """Windowed attention, then the feed-forward layer, both with pre-norm and a residual (equation 3)."""

    def __init__(
        self, config: SwinTransformerConfig, width: int, num_heads: int, pattern: Window2D, drop_path_rate: float
    ):
        super().__init__()
        self.pattern = pattern
        self.layernorm_before = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = SwinTransformerAttention(config, width, num_heads)
        self.layernorm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = SwinTransformerMLP(config, width)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = SwinTransformerDropPath(drop_path_rate)

    def forward(
        self, hidden_states: torch.Tensor, layout: WindowLayout, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, T, C] -> [B, T, C], and the attention weights."""
        windows = layout.partition(self.layernorm_before(hidden_states))
        windows, weights = self.attention(windows, layout, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.dropout(layout.reverse(windows)))  # z-hat
        branch = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + self.drop_path(self.dropout(branch)), weights  # z


class SwinTransformerStage(nn.Module):
    """Blocks at one resolution, and the merging that leads to the next stage."""

    def __init__(self, config: SwinTransformerConfig, stage: int, drop_path_rates: list[float], for_detection: bool):
        super().__init__()
        width, num_heads = config.stage_widths[stage], config.num_heads[stage]
        patterns = patterns_for_layers(config.attention_patterns, config.depths[stage])
        self.for_detection = for_detection
        self.blocks = nn.ModuleList(
            SwinTransformerBlock(config, width, num_heads, pattern, rate)
            for pattern, rate in zip(patterns, drop_path_rates)
        )
        is_last = stage == len(config.depths) - 1
        self.downsample = None if is_last else SwinTransformerPatchMerging(width)

    def forward(
        self, hidden_states: torch.Tensor, grid: tuple[int, int], **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """[B, T, C] -> what the next stage reads, the same before merging, and the last block's attention weights."""
        layouts = {
            pattern: window_layout(pattern, grid, hidden_states.device, fit=not self.for_detection)
            for pattern in {block.pattern for block in self.blocks}
        }
        for block in self.blocks:
            hidden_states, weights = block(hidden_states, layouts[block.pattern], **kwargs)
        merged = hidden_states if self.downsample is None else self.downsample(hidden_states, grid)
        return merged, hidden_states, weights


class SwinTransformerEncoder(nn.Module):
    """The stages (figure 3); stochastic depth grows from block to block."""

    def __init__(self, config: SwinTransformerConfig, for_detection: bool):
        super().__init__()
        self.for_detection = for_detection
        last = max(1, sum(config.depths) - 1)
        rates = iter([config.drop_path_rate * block / last for block in range(sum(config.depths))])
        self.layers = nn.ModuleList(
            SwinTransformerStage(config, stage, [next(rates) for _ in range(depth)], for_detection)
            for stage, depth in enumerate(config.depths)
        )

    def forward(
        self, hidden_states: torch.Tensor, grid: tuple[int, int], **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The last stage's states [B, T, C], and maps [B, C, gh, gw]: of the embeddings and of each stage."""
        maps = [_to_map(hidden_states, grid)]
        for stage in self.layers:
            hidden_states, features, _ = stage(hidden_states, grid, **kwargs)
            if self.for_detection:
                maps.append(_to_map(features, grid))
            if stage.downsample is not None:
                grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
            if not self.for_detection:
                maps.append(_to_map(hidden_states, grid))
        return hidden_states, maps


@dataclass
class SwinTransformerModelOutput(BaseModelOutputWithPooling):
    """What the model returns; `reshaped_hidden_states` are maps [B, C, gh, gw] of the embeddings and of each stage."""

    reshaped_hidden_states: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class SwinTransformerImageClassifierOutput(ImageClassifierOutput):
    """What the classifier returns; maps as in the model's output."""

    reshaped_hidden_states: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class SwinTransformerMaskedImageModelingOutput(MaskedImageModelingOutput):
    """What masked image modelling returns; maps as in the model's output."""

    reshaped_hidden_states: tuple[torch.FloatTensor, ...] | None = None


class SwinTransformerPreTrainedModel(PatternBackend, PreTrainedModel):
    """Initial weights, and what Transformers wants to know about the family."""

    config: SwinTransformerConfig
    base_model_prefix = "swin"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["SwinTransformerBlock"]
    _supports_sdpa = True
    _supports_flex_attn = False
    _supports_flash_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _input_embed_layer = "patch_embeddings"
    _can_record_outputs = {
        "hidden_states": OutputRecorder(SwinTransformerStage, index=0),
        "attentions": OutputRecorder(SwinTransformerStage, index=2, capture_initial_hidden_state=False),
    }

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        """Backends without a bias inside windows are refused here; Transformers' own words would name none that can."""
        if attn_implementation is not None and ("flash" in attn_implementation or "flex" in attn_implementation):
            raise ValueError(
                f"attn_implementation={attn_implementation!r} cannot run windows with a learned position bias; "
                f"use '{BLOCK_SPARSE}', 'sdpa' or 'eager'."
            )
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        """Normal with the config's deviation, the bias tables too; mask tokens and positions are 0 at first."""
        super()._init_weights(module)
        if isinstance(module, WindowPositionBias):
            init.trunc_normal_(module.relative_position_bias_table, std=self.config.initializer_range)
        elif isinstance(module, SwinTransformerEmbeddings):
            for parameter in (module.mask_token, module.position_embeddings):
                if parameter is not None:
                    init.zeros_(parameter)

    def resize_windows(self, window_size: int) -> None:
        """Go over to windows of another size, in place; relative position biases are interpolated.

        What the paper does to fine-tune at a higher resolution: windows of 12 for pictures of 384 after 7 for 224.
        """
        self.config.window_size = window_size
        self.config.validate()
        patterns = patterns_for_layers(self.config.attention_patterns, 2)
        for module in self.modules():
            if isinstance(module, WindowPositionBias):
                module.resize(window_size)
            elif isinstance(module, SwinTransformerStage):
                for number, block in enumerate(module.blocks):
                    block.pattern = patterns[number % 2]


class SwinTransformerModel(SwinTransformerPreTrainedModel):
    """The stages without a head: pixels in, states of the last stage [B, T, C] and their mean out.

    Args:
        add_pooling_layer: whether the output holds the mean over tokens.
        use_mask_token: whether patches can be masked.
        for_detection: windows are shifted on grids of any size, and maps are taken before patch merging, as in the
            paper's detectors (section 4.2); classifiers do not shift a window that covers the grid.
    """

    def __init__(
        self,
        config: SwinTransformerConfig,
        add_pooling_layer: bool = True,
        use_mask_token: bool = False,
        for_detection: bool = False,
    ):
        super().__init__(config)
        self.num_features = config.hidden_size
        self.embeddings = SwinTransformerEmbeddings(config, use_mask_token)
        self.encoder = SwinTransformerEncoder(config, for_detection)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.add_pooling_layer = add_pooling_layer
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        bool_masked_pos: torch.BoolTensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SwinTransformerModelOutput:
        """
        Args:
            pixel_values: [B, channels, height, width], of any size of at least a patch.
            bool_masked_pos: [B, T] True for patches that are hidden from the model.
            interpolate_pos_encoding: resize absolute embeddings, if the model has them, to other sizes of pictures.
        """
        hidden_states, grid = self.embeddings(pixel_values, bool_masked_pos, interpolate_pos_encoding)
        hidden_states, maps = self.encoder(hidden_states, grid, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        wants_maps = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        return SwinTransformerModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states.mean(dim=1) if self.add_pooling_layer else None,
            reshaped_hidden_states=tuple(maps) if wants_maps else None,
        )


class SwinTransformerForImageClassification(SwinTransformerPreTrainedModel):
    """A linear layer on the mean over tokens (section 4.1)."""

    def __init__(self, config: SwinTransformerConfig):
        super().__init__(config)
        self.swin = SwinTransformerModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        labels: torch.LongTensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SwinTransformerImageClassifierOutput:
        """
        Args:
            pixel_values: [B, channels, height, width].
            labels: [B] classes; or what `config.problem_type` says.
            interpolate_pos_encoding: see SwinTransformerModel.
        """
        outputs = self.swin(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            check_labels(labels, logits, self.config.problem_type)
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        return SwinTransformerImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            reshaped_hidden_states=outputs.reshaped_hidden_states,
        )


class SwinTransformerForMaskedImageModeling(SwinTransformerPreTrainedModel):
    """Pixels of masked patches from the others (SimMIM, Xie et al. 2022, arXiv:2111.09886)."""

    def __init__(self, config: SwinTransformerConfig):
        super().__init__(config)
        self.patch_size = pair(config.patch_size)
        pixels = tuple(patch * 2 ** (len(config.depths) - 1) for patch in self.patch_size)
        if pixels != (config.encoder_stride, config.encoder_stride):
            raise ValueError(
                f"A token of the last stage stands for {pixels[0]} x {pixels[1]} pixels, so encoder_stride must be "
                f"{pixels[0]}, and patches square, for masked image modelling; got {config.encoder_stride}."
            )
        self.swin = SwinTransformerModel(config, add_pooling_layer=False, use_mask_token=True)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, config.encoder_stride**2 * config.num_channels, kernel_size=1),
            nn.PixelShuffle(config.encoder_stride),
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        bool_masked_pos: torch.BoolTensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SwinTransformerMaskedImageModelingOutput:
        """
        Args:
            pixel_values: [B, channels, height, width].
            bool_masked_pos: [B, T] True for patches that are hidden; the loss is the mean distance (L1) to the pixels
                of those.
            interpolate_pos_encoding: see SwinTransformerModel.
        """
        outputs = self.swin(pixel_values, bool_masked_pos, interpolate_pos_encoding, **kwargs)
        height, width = pixel_values.shape[2:]
        growth = 2 ** (len(self.config.depths) - 1)
        grid = tuple(-(-side // patch) for side, patch in zip((height, width), self.patch_size))
        last_grid = tuple(-(-side // growth) for side in grid)
        reconstruction = self.decoder(_to_map(outputs.last_hidden_state, last_grid))[..., :height, :width]
        loss = None
        if bool_masked_pos is not None:
            mask = bool_masked_pos.view(-1, 1, *grid).to(pixel_values.dtype)
            for axis, patch in enumerate(self.patch_size, start=2):
                mask = mask.repeat_interleave(patch, axis)
            mask = mask[..., :height, :width]
            distance = (pixel_values - reconstruction).abs()
            loss = (distance * mask).sum() / (mask.sum() + 1e-5) / self.config.num_channels
        return SwinTransformerMaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            reshaped_hidden_states=outputs.reshaped_hidden_states,
        )


class SwinTransformerBackbone(BackboneMixin, SwinTransformerPreTrainedModel):
    """Feature maps of the stages that `config.out_features` names, each with a norm of its own, for detectors."""

    _keys_to_ignore_on_load_missing = [r"swin\.layernorm\..*"]

    def __init__(self, config: SwinTransformerConfig):
        super().__init__(config)
        self.num_features = [config.embed_dim, *config.stage_widths]
        self.swin = SwinTransformerModel(config, add_pooling_layer=False, for_detection=True)
        self.hidden_states_norms = nn.ModuleDict(
            {stage: nn.LayerNorm(width) for stage, width in zip(self.out_features, self.channels)}
        )
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.FloatTensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """
        Args:
            pixel_values: [B, channels, height, width].

        Returns:
            feature_maps: [B, C, gh, gw] of each of `out_features`.
        """
        outputs = self.swin(pixel_values, **kwargs)
        maps = dict(zip(self.stage_names, outputs.reshaped_hidden_states))
        feature_maps = tuple(
            norm(maps[stage].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            for stage, norm in self.hidden_states_norms.items()
        )
        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=outputs.reshaped_hidden_states, attentions=outputs.attentions
        )


def _to_map(states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """[B, gh * gw, C] -> [B, C, gh, gw]."""
    return states.transpose(1, 2).unflatten(2, grid)


__all__ = [
    "SwinTransformerBackbone",
    "SwinTransformerForImageClassification",
    "SwinTransformerForMaskedImageModeling",
    "SwinTransformerModel",
    "SwinTransformerPreTrainedModel",
]
