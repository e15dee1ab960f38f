"""The Swin Transformer of Liu et al. 2021 (arXiv:2103.14030) as loops: one picture, one token, one head, one key.

It reads the weights of a state dict. Windows are moved over the grid, as in figure 2; nothing is rolled or masked.
Grids that windows do not cover evenly are padded with zeros behind the norm, as the authors' code does.
"""

import math

import torch

from tests.reference.sparse_transformer import linear


def logits(weights: dict, config, pixels: torch.Tensor) -> torch.Tensor:
    """[labels] of one picture [channels, height, width], both multiples of the patch size."""
    grid = embed(weights, config, pixels)
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            grid = residual_block(weights, config, stage, block, grid)
        if stage < len(config.depths) - 1:
            grid = merge_patches(weights, f"swin.encoder.layers.{stage}.downsample", grid)
    states = [layer_norm(weights, "swin.layernorm", state) for row in grid for state in row]
    return linear(weights, "classifier", sum(states) / len(states))


def embed(weights: dict, config, pixels: torch.Tensor) -> list[list[torch.Tensor]]:
    """Rows of tokens [C]: each patch as one vector, projected (section 3.1)."""
    kernel = weights["swin.embeddings.patch_embeddings.projection.weight"]  # [C, channels, patch, patch]
    bias = weights["swin.embeddings.patch_embeddings.projection.bias"]
    size, (_, height, width) = config.patch_size, pixels.shape
    patches = [[pixels[:, y : y + size, x : x + size] for x in range(0, width, size)] for y in range(0, height, size)]
    tokens = [[kernel.flatten(1) @ patch.flatten() + bias for patch in row] for row in patches]
    return [[layer_norm(weights, "swin.embeddings.norm", token) for token in row] for row in tokens]


def residual_block(weights: dict, config, stage: int, block: int, grid: list) -> list:
    """Equation 3: z-hat = W-MSA(LN(z)) + z, then z = MLP(LN(z-hat)) + z-hat; SW-MSA in every second block."""
    name = f"swin.encoder.layers.{stage}.blocks.{block}"
    shift = config.window_size // 2 if block % 2 and min(len(grid), len(grid[0])) > config.window_size else 0
    normed = [[layer_norm(weights, f"{name}.layernorm_before", z) for z in row] for row in grid]
    attended = attention(weights, f"{name}.attention", config.num_heads[stage], config.window_size, shift, normed)
    grid = [[z + a for z, a in zip(*rows)] for rows in zip(grid, attended)]
    return [[z + mlp(weights, name, layer_norm(weights, f"{name}.layernorm_after", z)) for z in row] for row in grid]


def attention(weights: dict, name: str, heads: int, size: int, shift: int, grid: list) -> list:
    """Equation 4 for each token: SoftMax(q k^T / sqrt(d) + B) v over the tokens of its window."""
    grid = pad(grid, size)
    query, key, value = (
        [[linear(weights, f"{name}.{projection}_proj", x).view(heads, -1) for x in row] for row in grid]
        for projection in "qkv"
    )
    table = weights[f"{name}.relative_position_bias.relative_position_bias_table"]
    table = table.view(2 * size - 1, 2 * size - 1, heads)

    def attend(i: int, j: int) -> torch.Tensor:
        rows = [r for r in range(len(grid)) if (r - shift) // size == (i - shift) // size]
        columns = [c for c in range(len(grid[0])) if (c - shift) // size == (j - shift) // size]
        outputs = []
        for head in range(heads):
            exponentials, total = [], 0
            for r in rows:
                for c in columns:
                    score = query[i][j][head] @ key[r][c][head] / math.sqrt(len(key[r][c][head]))
                    exponentials.append(torch.exp(score + table[i - r + size - 1, j - c + size - 1, head]))
                    total = total + exponentials[-1] * value[r][c][head]
            outputs.append(total / sum(exponentials))
        return linear(weights, f"{name}.o_proj", torch.cat(outputs))

    return [[attend(i, j) for j in range(len(grid[0]))] for i in range(len(grid))]


def pad(grid: list, size: int) -> list:
    """Tokens of zeros below and beside, up to whole windows; a side shorter than a window stays."""
    zero = torch.zeros_like(grid[0][0])
    beside = -len(grid[0]) % size if len(grid[0]) > size else 0
    below = -len(grid) % size if len(grid) > size else 0
    return [*(row + [zero] * beside for row in grid), *([zero] * (len(grid[0]) + beside) for _ in range(below))]


def mlp(weights: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    inner = linear(weights, f"{name}.mlp.fc1", x)
    return linear(weights, f"{name}.mlp.fc2", inner * (1 + torch.erf(inner / math.sqrt(2))) / 2)


def merge_patches(weights: dict, name: str, grid: list) -> list:
    """2 x 2 neighbours concatenated, column after column, and projected to twice the width (section 3.1)."""
    zero = torch.zeros_like(grid[0][0])
    grid = [row + [zero] * (len(row) % 2) for row in grid]
    grid = grid + [[zero] * len(grid[0])] * (len(grid) % 2)
    merged = [
        [torch.cat([grid[y + dy][x + dx] for dx in (0, 1) for dy in (0, 1)]) for x in range(0, len(grid[0]), 2)]
        for y in range(0, len(grid), 2)
    ]
    weight = weights[f"{name}.reduction.weight"]
    return [[weight @ layer_norm(weights, f"{name}.norm", x) for x in row] for row in merged]


def layer_norm(weights: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]
