"""The Memorizing Transformer as section 3 of Wu et al. 2022 writes it: one row, one head, one query at a time.

Takes a MemorizingTransformerModel's weights and says what its output for a list of segments must be. Layers without a
store are a Transformer-XL's; the store is a list of tokens, the oldest first. No dropout, no padding.
"""

import math

import torch

from tests.reference.transformer_xl import block, distance_wave, feed_forward, normed


def unit(vector: torch.Tensor) -> torch.Tensor:
    """A vector whose numbers are 1 in root mean square."""
    return vector / (vector.square().mean() + 1e-6).sqrt()


def weighted(scores: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    weights = torch.stack(scores).softmax(dim=0)
    return sum(weight * value for weight, value in zip(weights, values))


def attention(layer, u, v, segment, past, store, config) -> tuple[torch.Tensor, list]:
    """[T, hidden] before the residual connection, and the keys and values of past and segment, a pair for each head."""
    context = torch.cat([past, segment])
    heads, size = config.num_attention_heads, config.head_dim
    slices = [slice(h * size, (h + 1) * size) for h in range(heads)]
    tokens = [
        [(unit(layer.k_proj.weight[mine] @ state), layer.v_proj.weight[mine] @ state) for mine in slices]
        for state in context
    ]
    rows = []
    for t in range(len(segment)):
        i, outputs = len(past) + t, []
        for h, mine in enumerate(slices):
            query = layer.q_norm.scale[h] * unit(layer.q_proj.weight[mine] @ segment[t])
            scores = []
            for j in range(i + 1):
                distance_key = layer.r_proj.weight[mine] @ distance_wave(i - j, config)
                scores.append(((query + u[h]) @ tokens[j][h][0] + (query + v[h]) @ distance_key) / math.sqrt(size))
            output = weighted(scores, [tokens[j][h][1] for j in range(i + 1)])
            if store:
                found = sorted(store, key=lambda token: -(query @ token[h][0]).item())[: config.num_neighbors]
                scores = [query @ token[h][0] / math.sqrt(size) for token in found]
                gate = 1 / (1 + torch.exp(-layer.gate.bias[h]))
                output = gate * weighted(scores, [token[h][1] for token in found]) + (1 - gate) * output
            outputs.append(output)
        rows.append(layer.o_proj.weight @ torch.cat(outputs))
    return torch.stack(rows), tokens


def memory_block(layer, u, v, segment, past, store, config) -> tuple[torch.Tensor, list]:
    """As the Transformer-XL's block, with the layer's store, which takes in what leaves the short memory."""
    if config.norm_first:
        norm = layer.attention_pre_norm
        entering, remembered = normed(norm, segment), normed(norm, past)
        attended, tokens = attention(layer.self_attn, u, v, entering, remembered, store, config)
        output = segment + attended
        output = output + feed_forward(layer.mlp, normed(layer.mlp_pre_norm, output))
    else:
        attended, tokens = attention(layer.self_attn, u, v, segment, past, store, config)
        output = normed(layer.attention_post_norm, segment + attended)
        output = normed(layer.mlp_post_norm, output + feed_forward(layer.mlp, output))
    leaving = tokens[: max(0, len(tokens) - config.mem_len)]
    store = [*store, *([(key.detach(), value.detach()) for key, value in token] for token in leaving)]
    return output, store[max(0, len(store) - config.memory_size) :]


def memorizing_transformer(model, segments: list[torch.Tensor]) -> torch.Tensor:
    """Hidden states [B, T1 + T2 + ..., hidden] of ids [B, T1], [B, T2], ..., read one after the other."""
    config, rows = model.config, []
    for row in range(len(segments[0])):
        memory = [torch.zeros(0, config.hidden_size, dtype=torch.float64) for _ in model.layers]
        store, outputs = [], []
        for ids in segments:
            states = model.embed_tokens(ids[row]) * math.sqrt(config.hidden_size)
            for n, layer in enumerate(model.layers):
                biases = model.biases[n if config.untie_r else 0]
                given = (biases.content, biases.position, states, memory[n])
                memory[n] = torch.cat([memory[n], states.detach()])[-config.mem_len :]
                if n == config.memory_layer:
                    states, store = memory_block(layer, *given, store, config)
                else:
                    states = block(layer, *given, config)
            outputs.append(states)
        rows.append(torch.cat(outputs))
    return torch.stack(rows)
