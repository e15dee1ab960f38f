"""Swin Transformer: Liu et al. 2021, "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows".

Attention inside windows of a picture, which every second block moves by half their size, in stages that halve the
resolution and double the width. Section and equation numbers are those of arXiv:2103.14030. Weights have the names of
Transformers' Swin.

Shapes: B batch, T tokens of a grid gh x gw, C width, L windows of N tokens each, H heads, D head dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
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

from .attention import BLOCK_SPARSE, Heads, PatternBackend, VisibleKeys, eager_attention_forward, heads_of
from .attention_patterns import Window2D, patterns_for_layers
from .checks import check_labels, check_patch_mask, check_pixels
from .classification import classification_loss
from .configuration_swin_transformer import SwinTransformerConfig, pair


class SwinTransformerPatchEmbeddings(nn.Module):
    """Patches of pixels -> tokens (section 3.1); a picture is padded with zeros to whole patches."""

    def __init__(self, config: SwinTransformerConfig):
        super().__init__()
        self.patch_size = pair(config.patch_size)
        self.num_channels = config.num_channels
        self.projection = nn.Conv2d(config.num_channels, config.embed_dim, self.patch_size, stride=self.patch_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, channels, height, width] -> [B, C, gh, gw]."""
        height, width = pixel_values.shape[2:]
        below, beside = -height % self.patch_size[0], -width % self.patch_size[1]
        if below or beside:
            pixel_values = F.pad(pixel_values, (0, beside, 0, below))
        return self.projection(pixel_values.to(self.projection.weight.dtype))


class SwinTransformerEmbeddings(nn.Module):
    """Patch embeddings with a norm; mask tokens and absolute positions where the model has them."""

    def __init__(self, config: SwinTransformerConfig, use_mask_token: bool):
        super().__init__()
        self.config = config
        self.patch_embeddings = SwinTransformerPatchEmbeddings(config)
        self.position_grid = tuple(
            side // patch for side, patch in zip(pair(config.image_size), pair(config.patch_size))
        )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim)) if use_mask_token else None
        self.position_embeddings = None
        if config.use_absolute_embeddings:
            num_positions = self.position_grid[0] * self.position_grid[1]
            self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, config.embed_dim))
        self.norm = nn.LayerNorm(config.embed_dim)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """[B, channels, height, width] -> [B, T, C], and the grid (gh, gw)."""
        check_pixels(pixel_values, self.config.num_channels, self.patch_embeddings.patch_size)
        patches = self.patch_embeddings(pixel_values)
        grid = tuple(patches.shape[2:])
        embeddings = self.norm(patches.flatten(2).transpose(1, 2))
        if bool_masked_pos is not None:
            embeddings = self._masked(embeddings, bool_masked_pos)
        if self.position_embeddings is not None:
            embeddings = embeddings + self._positions(grid, interpolate_pos_encoding)
        return self.dropout(embeddings), grid

    def _masked(self, embeddings: torch.Tensor, bool_masked_pos: torch.Tensor) -> torch.Tensor:
        """The mask token in place of masked patches."""
        if self.mask_token is None:
            raise ValueError(
                "bool_masked_pos needs a mask token, which this model lacks; use "
                "SwinTransformerForMaskedImageModeling, or SwinTransformerModel(config, use_mask_token=True)."
            )
        check_patch_mask(bool_masked_pos, embeddings)
        return torch.where(bool_masked_pos[..., None].bool(), self.mask_token.to(embeddings.dtype), embeddings)

    def _positions(self, grid: tuple[int, int], interpolate: bool) -> torch.Tensor:
        """[1, T, C]."""
        if grid == self.position_grid:
            return self.position_embeddings
        if not interpolate:
            raise ValueError(
                f"The model has absolute embeddings for a grid of {self.position_grid} patches "
                f"(image_size={self.config.image_size}), got {grid}; use interpolate_pos_encoding=True."
            )
        positions = self.position_embeddings.unflatten(1, self.position_grid).permute(0, 3, 1, 2)
        positions = F.interpolate(positions, size=grid, mode="bicubic", align_corners=False)
        return positions.flatten(2).transpose(1, 2)


class SwinTransformerMLP(nn.Module):
    """Feed-forward layer (section 3.1)."""

    def __init__(self, config: SwinTransformerConfig, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, int(config.mlp_ratio * width))
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(int(config.mlp_ratio * width), width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, T, C] -> [B, T, C]."""
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class SwinTransformerDropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): a branch is left out for some pictures of a batch."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return branch
        kept = branch.new_empty(branch.shape[0], *[1] * (branch.ndim - 1)).bernoulli_(1 - self.rate)
        return branch * (kept / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class SwinTransformerPatchMerging(nn.Module):
    """Four neighbouring tokens become one, twice as wide (section 3.1); an odd side is padded with zeros."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """[B, gh * gw, C] -> [B, ceil(gh / 2) * ceil(gw / 2), 2 C]."""
        states = hidden_states.unflatten(1, grid)
        if grid[0] % 2 or grid[1] % 2:
            states = F.pad(states, (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
        states = states.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, gh / 2, 2, gw / 2, 2, C]
        states = states.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)  # four neighbours, column after column
        return self.reduction(self.norm(states))


@dataclass(frozen=True, eq=False)
class WindowLayout:
    """Which window and slot each token of a grid lies in, and which slots see each other (section 3.2).

    A grid is padded to whole windows, moved by the shift, and cut; both ways are one gather each.

    Attributes:
        pattern: the windows.
        window: rows and columns of a window.
        tokens: [L * N] the token in each slot; an arbitrary one where there is none.
        slots: [T] the slot of each token.
        empty: slots without a token; None if there are none.
        mask: [L, N, N] bool, True where slots of a window see each other; None if all do.
    """

    pattern: Window2D
    window: tuple[int, int]
    tokens: torch.Tensor
    slots: torch.Tensor
    empty: torch.Tensor | None
    mask: torch.Tensor | None

    def partition(self, states: torch.Tensor) -> torch.Tensor:
        """[B, T, C] -> [B * L, N, C]; slots without a token hold zeros."""
        windows = _gather(states, self.tokens)
        if self.empty is not None:
            windows = windows.index_fill(1, self.empty, 0)
        return windows.view(-1, self.window[0] * self.window[1], states.shape[-1])

    def reverse(self, windows: torch.Tensor) -> torch.Tensor:
        """[B * L, N, C] -> [B, T, C]; what lies in slots without a token is dropped."""
        return _gather(windows.reshape(-1, len(self.tokens), windows.shape[-1]), self.slots)

    def attention_mask(self, implementation: str, query: torch.Tensor) -> VisibleKeys | torch.Tensor | None:
        """What `implementation` takes to show queries [B * L, H, N, D] the keys of their windows."""
        windows, heads, length, _ = query.shape
        mask = None if self.mask is None else self.mask[:, None]  # [L, 1, N, N]
        if implementation == BLOCK_SPARSE:
            return VisibleKeys(self.pattern, heads, False, windows, length, length, extra=mask)
        return None if mask is None else mask.repeat(windows // len(mask), 1, 1, 1)


def window_layout(pattern: Window2D, grid: tuple[int, int], device: torch.device | str, fit: bool) -> WindowLayout:
    """The layout of `grid` under the windows of `pattern`.

    Args:
        fit: windows that would cover the shorter side of the grid are not shifted, nor larger than the grid: what the
            paper's classifiers do. Otherwise the grid is padded to whole windows: what its detectors do.
    """
    shift, window = pattern.shift, (pattern.size, pattern.size)
    if fit and min(grid) <= pattern.size:
        shift, window = 0, (min(pattern.size, grid[0]), min(pattern.size, grid[1]))
    padded = tuple(-(-side // length) * length for side, length in zip(grid, window))
    rows, columns = (torch.arange(side, device=device) for side in padded)

    def slot(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Where the token of a row and column of the padded grid goes."""
        # The cyclic shift; nothing is below 0, which torch.compile's index arithmetic could not take.
        row, column = (row[:, None] + padded[0] - shift) % padded[0], (column + padded[1] - shift) % padded[1]
        number = row // window[0] * (padded[1] // window[1]) + column // window[1]
        return (number * window[0] + row % window[0]) * window[1] + column % window[1]

    row, column = (_into_windows(axis, padded, window) for axis in ((rows[:, None] + shift), (columns + shift)))
    row, column = row % padded[0], column % padded[1]
    below, beside = slot(rows[grid[0] :], columns), slot(rows[: grid[0]], columns[grid[1] :])
    mask = None
    if shift:
        windows = pattern.bind(padded).window(row * padded[1] + column).view(-1, window[0] * window[1])
        mask = windows[:, :, None] == windows[:, None, :]
    return WindowLayout(
        pattern=pattern,
        window=window,
        tokens=row.clamp(max=grid[0] - 1) * grid[1] + column.clamp(max=grid[1] - 1),
        slots=slot(rows[: grid[0]], columns[: grid[1]]).flatten(),
        empty=torch.cat([below.flatten(), beside.flatten()]) if padded != grid else None,
        mask=mask,
    )


def _into_windows(values: torch.Tensor, padded: tuple[int, ...], window: tuple[int, int]) -> torch.Tensor:
    """Values over the padded grid (broadcast to it), window after window, [L * N]."""
    values = values.expand(padded).reshape(padded[0] // window[0], window[0], padded[1] // window[1], window[1])
    return values.transpose(1, 2).flatten()


def _gather(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[B, S, C] -> [B, T, C], the same `rows` [T] of every picture; PyTorch gathers one long list twice as fast."""
    batch, length = states.shape[:2]
    pictures = torch.arange(batch, device=rows.device)[:, None] * length
    return states.flatten(0, 1).index_select(0, (pictures + rows).flatten()).unflatten(0, (batch, -1))


class WindowPositionBias(nn.Module):
    """The bias B of equation 4: a learned number for each head and each of (2M - 1) x (2M - 1) offsets.

    Args:
        window_size: M.
        num_heads: H.

    Attributes:
        relative_position_bias_table: B-hat [(2M - 1)^2, H], by rows then columns of offsets, most negative first.
    """

    def __init__(self, window_size: int, num_heads: int):
        super().__init__()
        self.window_size = window_size
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))

    def forward(self, window: tuple[int, int], heads: Heads | None = None) -> torch.Tensor:
        """[H, N, N] for windows of these rows and columns, each at most M, of `heads`; of all if None."""
        table = self.relative_position_bias_table
        table = table if heads is None else heads.own(table, dim=1)
        offsets = self.offsets(window, table.device)
        bias = table.t().index_select(1, offsets.flatten())
        return bias.view(-1, *offsets.shape)

    def offsets(self, window: tuple[int, int], device: torch.device | str) -> torch.Tensor:
        """[N, N] the row of the table for query and key."""
        rows, columns = (torch.arange(length, device=device) for length in window)
        rows, columns = (axis[:, None] - axis + self.window_size - 1 for axis in (rows, columns))
        offsets = rows[:, None, :, None] * (2 * self.window_size - 1) + columns[None, :, None, :]
        return offsets.reshape(len(rows) * len(columns), -1)

    @torch.no_grad()
    def resize(self, window_size: int) -> None:
        """Go over to windows of another size: the table is interpolated (bicubic), as its authors do to fine-tune."""
        old, new = 2 * self.window_size - 1, 2 * window_size - 1
        table = self.relative_position_bias_table
        grid = table.t().reshape(1, -1, old, old).float()
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
        self.relative_position_bias_table = nn.Parameter(
            grid.view(-1, new * new).t().contiguous().to(table.dtype), requires_grad=table.requires_grad
        )
        self.window_size = window_size


class SwinTransformerAttention(nn.Module):
    """Attention inside windows with a relative position bias (equation 4)."""

    def __init__(self, config: SwinTransformerConfig, width: int, num_heads: int):
        super().__init__()
        self.config = config
        self.is_causal = False
        self.head_dim = width // num_heads
        self.num_heads = num_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_probs_dropout_prob
        self.q_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, width)
        self.relative_position_bias = WindowPositionBias(config.window_size, num_heads)

    def forward(
        self, windows: torch.Tensor, layout: WindowLayout, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B * L, N, C] -> [B * L, N, C], and the weights [B * L, H, N, N] where the backend has them."""
        cut = hasattr(self.o_proj.weight, "device_mesh")  # plain tensors have none
        heads = heads_of(self, self.num_heads) if cut else None
        query, key, value = (
            project(windows).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B * L, H, N, D]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            key,
            value,
            layout.attention_mask(self.config._attn_implementation, query),
            scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0,
            position_bias=self.relative_position_bias(layout.window, heads)[None],  # B, [1, H, N, N]
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
        self.loss_function = classification_loss
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
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
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
    """Feature maps of the stages that `config.out_features` names, each with a norm of its own, for detectors.

    Stages after the last that is named get no gradient: distributed training needs find_unused_parameters=True then.
    """

    _keys_to_ignore_on_load_missing = [r"swin\.layernorm\..*"]

    def __init__(self, config: SwinTransformerConfig):
        super().__init__(config)
        self.num_features = [config.embed_dim, *config.stage_widths]
        self.swin = SwinTransformerModel(config, add_pooling_layer=False, for_detection=True)
        self.swin.layernorm = UnusedLayerNorm(config.hidden_size)
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


class UnusedLayerNorm(nn.LayerNorm):
    """The norm before a classifier, where there is none: checkpoints have it, and nothing waits for its gradient."""

    def register_parameter(self, name: str, param: nn.Parameter) -> None:
        """Loading a checkpoint puts new parameters in place, which are frozen here like the first."""
        super().register_parameter(name, param.requires_grad_(False))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states


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
