"""XLSparse as loops: a Transformer-XL whose queries see the keys that a pattern shows at their positions in the text.

Takes an XLSparseModel's weights and says what its output for a list of segments must be. No dropout, no padding.
"""

import math

import torch

from tests.reference.transformer_xl import block


def shows(pattern: dict, head: int, i: int, j: int) -> bool:
    """Does a pattern show position j to a query at position i >= j? (Child et al. 2019, section 4.3.)"""
    match pattern["type"]:
        case "full":
            return True
        case "local":
            return i - j < pattern["window"]
        case "strided":
            return (i - j) % pattern["stride"] == 0
        case "fixed_block":
            return i // pattern["block"] == j // pattern["block"]
        case "fixed_summary":
            number = pattern.get("shift", 0) + head % pattern.get("sub_blocks", 1)
            end = pattern["block"] - number * pattern["summary"]
            return end - pattern["summary"] <= j % pattern["block"] < end
        case "fixed":
            return any(shows({**pattern, "type": part}, head, i, j) for part in ("fixed_block", "fixed_summary"))
        case "union":
            return any(shows(inner, head, i, j) for inner in pattern["patterns"])
        case "per_head":
            return shows(pattern["patterns"][head % len(pattern["patterns"])], head, i, j)
    raise ValueError(pattern)


def xl_sparse(model, segments: list[torch.Tensor]) -> torch.Tensor:
    """Hidden states [B, T1 + T2 + ..., hidden] of ids [B, T1], [B, T2], ..., read one after the other."""
    config = model.config
    patterns = config.attention_patterns
    patterns = patterns if isinstance(patterns, list) else [patterns]
    rows = []
    for row in range(len(segments[0])):
        memory = [torch.zeros(0, config.hidden_size, dtype=torch.float64) for _ in model.layers]
        outputs, read = [], 0
        for ids in segments:
            states = model.embed_tokens(ids[row]) * math.sqrt(config.hidden_size)
            for n, layer in enumerate(model.layers):
                biases, pattern = model.biases[n if config.untie_r else 0], patterns[n % len(patterns)]
                first = read - len(memory[n])  # position of the first remembered token

                def sees(head, i, j, pattern=pattern, first=first):
                    near = i - j < config.mem_len or not config.same_length
                    return near and shows(pattern, head, first + i, first + j)

                entering = states
                states = block(layer, biases.content, biases.position, entering, memory[n], config, sees)
                memory[n] = torch.cat([memory[n], entering.detach()])[-config.mem_len :]
            outputs.append(states)
            read += len(ids[row])
        rows.append(torch.cat(outputs))
    return torch.stack(rows)
