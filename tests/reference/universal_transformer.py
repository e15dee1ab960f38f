"""The Universal Transformer as Dehghani et al. 2018 write it, one position and one step at a time.

Takes a model's weights and says what its output for one source and one target must be. No dropout, no padding. What
vanilla blocks do is in vanilla_transformer.py.
"""

import math

import torch

from .vanilla_transformer import attention, connected, feed_forward, normed, wave


def block(layer, states, causal, encoder_states, config):
    """A step: self-attention, attention to the source, and the transition function (equations 4 and 5)."""
    states = connected(
        layer.self_attn_residual,
        states,
        lambda x: attention(layer.self_attn, x, x, causal, config.position_encoding, config),
        config,
    )
    if encoder_states is not None:
        states = connected(
            layer.cross_attn_residual,
            states,
            lambda x: attention(layer.cross_attn, x, encoder_states, False, "none", config),
            config,
        )
    return connected(layer.mlp_residual, states, lambda x: feed_forward(layer.mlp, x), config)


def told(states, step, config):
    """What a step is given: states, and where they are and which step it is (equations 6 and 7)."""
    rows = []
    for position, row in enumerate(states):
        if config.position_encoding == "sinusoidal":
            row = row + wave(position, config.hidden_size)
        rows.append(row + wave(step, config.hidden_size))
    return torch.stack(rows)


def stack(module, ids, steps, causal, encoder_states=None):
    """Hidden states [T, hidden], and how long each position pondered (None where all take every step)."""
    config = module.config
    scale = math.sqrt(config.hidden_size) if config.scale_embedding else 1
    states = torch.stack([module.embed_tokens.weight[token] * scale for token in ids])
    if not config.adaptive:
        for step in range(1, steps + 1):
            states = block(module.layers[0], told(states, step, config), causal, encoder_states, config)
        return (normed(module.norm, states) if config.norm_first else states), None

    halting = module.depth.halting
    sums, final, ponder = [0.0] * len(ids), [torch.zeros_like(states[0]) for _ in ids], [None] * len(ids)
    for step in range(1, steps + 1):
        given = told(states, step, config)
        made = block(module.layers[0], given, causal, encoder_states, config)
        rows = []
        for i in range(len(ids)):
            if ponder[i] is not None:  # it has halted, and is copied
                rows.append(final[i])
                continue
            h = torch.sigmoid(halting.weight[0] @ given[i] + halting.bias[0])
            if sums[i] + h > config.halting_threshold or step == steps:
                remainder = 1 - sums[i]
                final[i] = final[i] + remainder * made[i]
                ponder[i] = step + remainder
                rows.append(final[i])
            else:
                final[i] = final[i] + h * made[i]
                sums[i] = sums[i] + h
                rows.append(made[i])
        states = torch.stack(rows)
    final = torch.stack(final)
    return (normed(module.norm, final) if config.norm_first else final), torch.stack(
        [torch.as_tensor(p) for p in ponder]
    )


def universal_transformer(model, source, target):
    """Hidden states [T, hidden] of target ids [T], and the ponder times of both stacks."""
    config = model.config
    encoded, encoder_ponder = stack(model.encoder, source, config.num_hidden_layers, causal=False)
    decoded, ponder = stack(model.decoder, target, config.decoder_layers, causal=True, encoder_states=encoded)
    return decoded, ponder, encoder_ponder
