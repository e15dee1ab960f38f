"""The Transformer as Vaswani et al. 2017 write it, and the ways of knowing order as their papers do: one query, one
key, one head at a time.

Takes a model's weights and says what its output for one source and one target must be. No dropout, no padding.
"""

import math

import torch
from torch.nn.functional import layer_norm

from .rope import rotate


def wave(position: int, dim: int, layout: str = "interleaved") -> torch.Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i / d)), PE(pos, 2i + 1) = cos of the same (Vaswani et al., section 3.5)."""
    angles = [position / 10000 ** (2 * i / dim) for i in range(dim // 2)]
    sines, cosines = [math.sin(a) for a in angles], [math.cos(a) for a in angles]
    values = sines + cosines if layout == "halves" else [x for pair in zip(sines, cosines) for x in pair]
    return torch.tensor(values, dtype=torch.float64)


def clipped(j: int, i: int, k: int) -> int:
    """Row of the embedding of clip(j - i, k) (Shaw et al. 2018, equation 5); rows stand for -k ... k."""
    return max(-k, min(k, j - i)) + k


def slope(head: int, num_heads: int) -> float:
    """m of a head from 1 on: 2^(-8 / n), 2^(-16 / n), ... for n heads (Press et al. 2021, section 3); where n is no
    power of two, those of the power of two below, then the first, third, ... of twice as many heads."""
    below = 2 ** math.floor(math.log2(num_heads))
    if head <= below:
        return 2 ** (-8 * head / below)
    return 2 ** (-8 * (2 * (head - below) - 1) / (2 * below))


def bucket(i: int, j: int, causal: bool, config) -> int:
    """Which number the query i has for the key j (Raffel et al. 2019, section 2.1): one a distance at first, then wider
    and wider ones up to the largest distance; for later keys those behind."""
    buckets, farthest = config.relative_attention_num_buckets, config.relative_attention_max_distance
    if not causal:
        buckets //= 2
    exact, distance = buckets // 2, abs(i - j)
    if distance >= exact:
        share = math.log(distance / exact) / math.log(farthest / exact)
        distance = min(exact + int(share * (buckets - exact)), buckets - 1)
    return distance + (buckets if j > i else 0)


def linear(layer, vector: torch.Tensor) -> torch.Tensor:
    return layer.weight @ vector + layer.bias


def attention(module, queries, keys, causal: bool, encoding: str, config, positions=None) -> torch.Tensor:
    """[T, hidden] and [S, hidden] -> [T, hidden], before the residual connection; `positions` are the stack's own."""
    heads = config.num_attention_heads
    size = config.hidden_size // heads
    rows = []
    for i in range(len(queries)):
        outputs = []
        for h in range(heads):
            mine = slice(h * size, (h + 1) * size)
            q = linear(module.q_proj, queries[i])[mine]
            scores, values = [], []
            for j in range(i + 1 if causal else len(keys)):
                k, v = linear(module.k_proj, keys[j])[mine], linear(module.v_proj, keys[j])[mine]
                if encoding == "rotary":
                    score = rotate(q, i, 10000, "interleaved", size) @ rotate(k, j, 10000, "interleaved", size)
                elif encoding == "relative":
                    row = clipped(j, i, config.max_relative_position)
                    score = q @ (k + module.positions.keys.weight[row])
                    v = v + module.positions.values.weight[row]
                elif encoding == "transformer_xl":
                    u, w = module.positions.biases.content[h], module.positions.biases.position[h]
                    distance_key = (module.positions.r_proj.weight @ wave(i - j, config.hidden_size, "halves"))[mine]
                    score = (q + u) @ k + (q + w) @ distance_key
                else:
                    score = q @ k
                score = score / math.sqrt(size)
                if encoding == "alibi":
                    score = score - slope(h + 1, heads) * abs(i - j)
                elif encoding == "t5":
                    score = score + positions.numbers.weight[bucket(i, j, causal, config), h]
                scores.append(score)
                values.append(v)
            weights = torch.stack(scores).softmax(dim=0)
            outputs.append(sum(w * v for w, v in zip(weights, values)))
        rows.append(linear(module.o_proj, torch.cat(outputs)))
    return torch.stack(rows)


def normed(norm, states: torch.Tensor) -> torch.Tensor:
    return layer_norm(states, states.shape[-1:], norm.weight, norm.bias, norm.eps)


def connected(connection, states: torch.Tensor, sublayer, config) -> torch.Tensor:
    """The residual connection around a sublayer."""
    if config.norm_first:
        return states + sublayer(normed(connection.norm, states))
    return normed(connection.norm, states + sublayer(states))


def feed_forward(mlp, states: torch.Tensor) -> torch.Tensor:
    hidden = (states @ mlp.up_proj.weight.T + mlp.up_proj.bias).relu()
    return hidden @ mlp.down_proj.weight.T + mlp.down_proj.bias


def stack(module, ids: torch.Tensor, causal: bool, encoder_states: torch.Tensor | None = None) -> torch.Tensor:
    """Hidden states [T, hidden] of an encoder, or of a decoder that attends to [S, hidden]."""
    config = module.config
    encoding = config.position_encoding
    rows = []
    for position, token in enumerate(ids):
        row = module.embed_tokens.weight[token] * (math.sqrt(config.hidden_size) if config.scale_embedding else 1)
        if encoding == "sinusoidal":
            row = row + wave(position, config.hidden_size, config.sinusoid_layout)
        elif encoding == "learned":
            row = row + module.positions.table.weight[position]
        rows.append(row)
    states = torch.stack(rows)
    for layer in module.layers:
        if encoding == "learned_per_layer":
            states = states + layer.self_attn.positions.table.weight[: len(ids)]
        states = connected(
            layer.self_attn_residual,
            states,
            lambda x, layer=layer: attention(layer.self_attn, x, x, causal, encoding, config, module.positions),
            config,
        )
        if encoder_states is not None:
            states = connected(
                layer.cross_attn_residual,
                states,
                lambda x, layer=layer: attention(layer.cross_attn, x, encoder_states, False, "none", config),
                config,
            )
        states = connected(layer.mlp_residual, states, lambda x, layer=layer: feed_forward(layer.mlp, x), config)
    return normed(module.norm, states) if config.norm_first else states


def vanilla_transformer(model, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Hidden states [T, hidden] of target ids [T] behind their start token, given source ids [S]."""
    return stack(model.decoder, target, causal=True, encoder_states=stack(model.encoder, source, causal=False))


def smoothed_loss(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Cross-entropy to (1 - e) on the label and e / V on every id, over labels that are not -100 (section 5.4)."""
    losses = []
    for row, label in zip(logits.flatten(0, 1), labels.flatten()):
        if label == -100:
            continue
        target = torch.full_like(row, smoothing / len(row))
        target[label] += 1 - smoothing
        losses.append(-(target * row.log_softmax(dim=0)).sum())
    return torch.stack(losses).mean()


def noam_rate(step: int, width: int, warmup: int, factor: float = 1.0) -> float:
    """d_model^-0.5 min(step^-0.5, step warmup^-1.5) (equation 3)."""
    return factor * width**-0.5 * min(step**-0.5, step * warmup**-1.5)
