"""The Sparse Transformer of Child et al. 2019 (arXiv:1904.10509) as loops: one token, one layer, one head, one key.

It reads the weights of a state dict and takes one plain sequence: no batch, no padding, no packing, no cache. What the
model makes of those must equal this, row by row and document by document.
"""

import math

import torch

from hf_tfamily.modeling.attention_patterns import pattern_from_dict


def logits(weights: dict, config, ids: list[int], positions: list[int] | None = None) -> torch.Tensor:
    """[T, vocabulary] logits of a sequence of T token ids (equations 9 to 15), in the dtype of the weights."""
    embeddings = [weights["model.embed_tokens.weight"][token] for token in ids]
    return logits_of_embeddings(weights, config, embeddings, positions)


def logits_of_embeddings(weights: dict, config, embeddings: list, positions: list[int] | None = None) -> torch.Tensor:
    positions = list(range(len(embeddings))) if positions is None else positions
    hidden = [x + position_embedding(weights, config, t) for x, t in zip(embeddings, positions)]
    for layer in range(config.num_hidden_layers):
        hidden = residual_block(weights, config, layer, hidden, positions)
    hidden = [layer_norm(weights, "model.norm", config, h) for h in hidden]
    return torch.stack([weights["lm_head.weight"] @ h for h in hidden])  # equation 11, before the softmax


def position_embedding(weights: dict, config, position: int) -> torch.Tensor:
    """The sum over axes in equation 15; the last axis runs fastest."""
    total = 0
    for axis, length in reversed(list(enumerate(config.position_shape))):
        total = total + weights[f"model.embed_positions.axes.{axis}.weight"][position % length]
        position //= length
    return total


def residual_block(weights: dict, config, layer: int, hidden: list, positions: list[int]) -> list:
    """H + a(H) + b(H) (equations 10 and 12 to 14)."""
    name = f"model.layers.{layer}"
    normed = [layer_norm(weights, f"{name}.attention_norm", config, h) for h in hidden]
    a = attention(weights, f"{name}.self_attn", config, layer, normed, positions)
    normed = [layer_norm(weights, f"{name}.mlp_norm", config, h + a_h) for h, a_h in zip(hidden, a)]
    b = [feed_forward(weights, f"{name}.mlp", n) for n in normed]
    return [h + a_h + b_h for h, a_h, b_h in zip(hidden, a, b)]


def attention(weights: dict, name: str, config, layer: int, inputs: list, positions: list[int]) -> list:
    """Equations 2 to 8: head h of query i attends to the keys up to i that the layer's pattern shows it."""
    query, key, value = (
        [linear(weights, f"{name}.{projection}", x).unflatten(0, (config.num_attention_heads, -1)) for x in inputs]
        for projection in ("q_proj", "k_proj", "v_proj")
    )  # lists of [H, D], [H, D], [H, Dv]
    outputs = []
    for i in range(len(inputs)):
        heads = []
        for h in range(config.num_attention_heads):
            pattern = pattern_of(config, layer)
            shown = [j for j in range(i + 1) if pattern.visible(h, positions[i], positions[j])]
            scores = [query[i][h] @ key[j][h] / math.sqrt(config.qk_head_dim) for j in shown]
            total = sum(torch.exp(score) for score in scores)
            zero = torch.zeros_like(value[i][h])
            heads.append(sum((torch.exp(s) / total * value[j][h] for s, j in zip(scores, shown)), zero))
        outputs.append(linear(weights, f"{name}.o_proj", torch.cat(heads)))
    return outputs


def pattern_of(config, layer: int):
    patterns = config.attention_patterns
    patterns = [patterns] if isinstance(patterns, dict) else patterns
    return pattern_from_dict(patterns[layer % len(patterns)])  # equation 6: interleaved by r mod p


def feed_forward(weights: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    """W_2 f(W_1 x + b_1) + b_2 with f(x) = x sigmoid(1.702 x) (section 5.2)."""
    inner = linear(weights, f"{name}.up_proj", x)
    return linear(weights, f"{name}.down_proj", inner / (1 + torch.exp(-1.702 * inner)))


def linear(weights: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def layer_norm(weights: dict, name: str, config, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean()
    deviation = torch.sqrt((centred**2).mean() + config.layer_norm_eps)
    return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]
