"""The Compressive Transformer as algorithms 1 and 2 of Rae et al. 2019 write it, one row and one place at a time.

Takes a CompressiveTransformerModel's weights and says what its output and its compression loss must be. No dropout,
no padding. Where the paper leaves something open, the model's choice: evicted tokens are compressed in whole groups of
c, norms are mean squares, the loss is summed over layers.
"""

import math

import torch
from torch.nn.functional import layer_norm

from tests.reference.transformer_xl import block


def compress(layer, old, usage, config) -> torch.Tensor:
    """f_c: [E, hidden] -> [E / c, hidden]; usage is the average attention each of the E tokens got."""
    c = config.compression_rate
    groups = [range(start, start + c) for start in range(0, len(old), c)]
    if config.compression == "max_pool":
        return torch.stack([torch.stack([old[i] for i in group]).max(dim=0).values for group in groups])
    if config.compression == "mean_pool":
        return torch.stack([sum(old[i] for i in group) / c for group in groups])
    if config.compression == "most_used":
        best = sorted(range(len(old)), key=lambda i: -usage[i])[: len(old) // c]
        return torch.stack([old[i] for i in sorted(best)])
    dilation = config.compression_dilation if config.compression == "dilated_conv" else 1
    conv, places = layer.compression.conv, []
    for group in groups:
        place = conv.bias
        for k in range(c):
            i = group[-1] - (c - 1 - k) * dilation
            if i >= 0:
                place = place + conv.weight[:, :, k] @ old[i]
        places.append(place)
    return torch.stack(places)


def attend(layer, queries, memory, config) -> torch.Tensor:
    """Attention by content, softmax((h Q) (m K)) (m V), with projections and norms that take no gradient."""
    attention, size = layer.self_attn, config.head_dim
    if config.norm_first:
        norm = layer.attention_pre_norm
        scale, shift = norm.weight.detach(), norm.bias.detach()
        queries = layer_norm(queries, queries.shape[-1:], scale, shift, norm.eps)
        memory = layer_norm(memory, memory.shape[-1:], scale, shift, norm.eps)
    rows = []
    for h_t in queries:
        heads = []
        for h in range(config.num_attention_heads):
            mine = slice(h * size, (h + 1) * size)
            query = attention.q_proj.weight.detach()[mine] @ h_t
            keys = [attention.k_proj.weight.detach()[mine] @ m for m in memory]
            values = [attention.v_proj.weight.detach()[mine] @ m for m in memory]
            weights = torch.stack([query @ key / math.sqrt(size) for key in keys]).softmax(dim=0)
            heads.append(sum(w * value for w, value in zip(weights, values)))
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def compression_loss(layer, entering, old, new, config) -> torch.Tensor:
    """Algorithm 2, or the auto-encoding loss."""
    if config.compression_loss == "attention_reconstruction":
        error = attend(layer, entering.detach(), old, config) - attend(layer, entering.detach(), new, config)
        return error.square().mean()
    if config.compression_loss == "auto_encoding":
        decoder, c = layer.compression_loss.decoder, config.compression_rate
        decoded = [decoder.weight[:, :, k].T @ place + decoder.bias for place in new for k in range(c)]
        return (torch.stack(decoded) - old).square().mean()
    return old.new_zeros(())


class Layer:
    """The memories of one layer and one row, as lists of places."""

    def __init__(self):
        self.memory, self.compressed = [], []
        self.attention, self.queries = [], []  # for each place of the memory: what it got, and from how many


def step(layer, kept: Layer, biases, entering, weights, config):
    """Algorithm 1 for one layer: (output [T, hidden], compression loss)."""
    past = [*kept.compressed, *kept.memory]
    past = torch.stack(past) if past else entering.new_zeros(0, config.hidden_size)
    output = block(layer, biases.content, biases.position, entering, past, config)

    memory = [*kept.memory, *entering.detach()]
    attention = [*kept.attention, *[0.0] * len(entering)]
    queries = [*kept.queries, *[0] * len(entering)]
    for t in range(len(entering)):
        for place in range(len(kept.memory) + t + 1):
            queries[place] += 1
            if weights is not None:
                attention[place] += weights[t, len(kept.compressed) + place].item()

    c = config.compression_rate
    evicted = max(0, len(memory) - config.mem_len) // c * c
    loss = entering.new_zeros(())
    if evicted:
        old = torch.stack(memory[:evicted])
        usage = [attention[i] / queries[i] for i in range(evicted)]
        new = compress(layer, old, usage, config)
        loss = compression_loss(layer, entering, old, new, config)
        kept.compressed = [*kept.compressed, *new.detach()][-config.compressed_mem_len :]
    kept.memory, kept.attention, kept.queries = memory[evicted:], attention[evicted:], queries[evicted:]
    return output, loss


def compressive_transformer(model, segments, weights=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [B, T1 + T2 + ..., hidden] of ids [B, T1], [B, T2], ..., and the loss of each segment.

    weights[s][n] are the attention weights [B, T, S], averaged over heads, of layer n at segment s; for "most_used".
    """
    config = model.config
    rows, losses = [], torch.zeros(len(segments), dtype=torch.float64)
    for row in range(len(segments[0])):
        kept = [Layer() for _ in model.layers]
        outputs = []
        for s, ids in enumerate(segments):
            states = model.embed_tokens(ids[row]) * math.sqrt(config.hidden_size)
            for n, layer in enumerate(model.layers):
                biases = model.biases[n if config.untie_r else 0]
                mine = None if weights is None else weights[s][n][row]
                states, loss = step(layer, kept[n], biases, states, mine, config)
                losses[s] = losses[s] + loss / len(segments[0])
            outputs.append(states)
        rows.append(torch.cat(outputs))
    return torch.stack(rows), losses
