"""The Image Transformer of Parmar et al. 2018 (arXiv:1802.05751) as loops: one value, one layer, one head, one key.

It reads the weights of a state dict and takes one plain sequence: no batch, no padding, no cache.
"""

import math

import torch


def block_order(height: int, width: int, channels: int, block_height: int, block_width: int) -> list[tuple]:
    """(row, column, channel) in the order of generation: blocks in raster order, inside them pixels in raster order."""
    order = []
    for top in range(0, height, block_height):
        for left in range(0, width, block_width):
            for row in range(top, min(top + block_height, height)):
                for column in range(left, min(left + block_width, width)):
                    for channel in range(channels):
                        order.append((row, column, channel))
    return order


def order_of(config, channels: int) -> list[tuple]:
    """The order of generation of an image with so many positions in a pixel."""
    height, width = config.image_size
    patterns = config.attention_patterns
    for pattern in [patterns] if isinstance(patterns, dict) else patterns:
        if pattern["type"] == "block_2d":
            return block_order(height, width, channels, pattern["height"], pattern["width"])
    return block_order(height, width, channels, height, width)


def memory(pattern: dict, order: list[tuple], query: int) -> list[int]:
    """Positions in the query's memory block that are generated up to it (section 3.3)."""
    if pattern["type"] == "block_1d":
        first = query - query % pattern["block"]
        return [key for key in range(query + 1) if key >= first - pattern["flange"]]
    row, column, _ = order[query]
    top, left = row - row % pattern["height"], column - column % pattern["width"]
    rows = range(top - pattern["flange_height"], top + pattern["height"])
    columns = range(left - pattern["flange_width"], left + pattern["width"] + pattern["flange_width"])
    return [key for key in range(query + 1) if order[key][0] in rows and order[key][1] in columns]


def logits(weights: dict, config, ids: list[int], source: list[int] | None = None) -> torch.Tensor:
    """[T, V] of the values after each of T ids; under a mixture their log-probabilities, [T, values]."""
    encoded = None if source is None else encode(weights, config, source)
    enlarged = enlarge(config, source) if config.predict_residual else None
    if config.output == "categorical":
        inputs = [value_embedding(weights, "model", config, token, t - 1) for t, token in enumerate(ids)]
        channels = config.num_channels
    else:
        inputs = pixel_embeddings(weights, config, ids, enlarged)
        channels = 1
    if config.num_classes:
        inputs = [x + inputs[0] if position else x for position, x in enumerate(inputs)]
    order = order_of(config, channels)
    hidden = [x + coordinates(weights, "model", config, order[p], channels) for p, x in enumerate(inputs)]
    patterns = config.attention_patterns
    patterns = [patterns] if isinstance(patterns, dict) else patterns
    for layer in range(config.num_hidden_layers):
        seen = [memory(patterns[layer % len(patterns)], order, p) for p in range(len(hidden))]
        hidden = block(weights, f"model.layers.{layer}", config, hidden, seen, encoded)
    if config.output == "categorical":
        return torch.stack([linear(weights, "lm_head", h) for h in hidden])
    return torch.stack(
        [next_channel(weights, config, ids, t, hidden[t // config.num_channels], enlarged) for t in range(len(ids))]
    )


def value_embedding(weights: dict, stack: str, config, token: int, position: int) -> torch.Tensor:
    """The vector of a value at `position`, from the table of its channel (section 3.1)."""
    channel, d = position % config.num_channels, config.hidden_size
    return weights[f"{stack}.embedding.embed_tokens.weight"][token, channel * d : (channel + 1) * d] * math.sqrt(d)


def pixel_embeddings(weights: dict, config, ids: list[int], enlarged: list | None) -> list[torch.Tensor]:
    """The start token, and then each whole pixel."""
    start = weights["model.embedding.embed_start.weight"][ids[0] - config.num_values] * math.sqrt(config.hidden_size)
    firsts = range(1, len(ids) - config.num_channels + 1, config.num_channels)
    origins = [None] * len(firsts) if enlarged is None else enlarged
    return [start, *(pixel_embedding(weights, "model", config, ids, *at) for at in zip(firsts, origins))]


def pixel_embedding(
    weights: dict, stack: str, config, ids: list[int], first: int, origin: list | None = None
) -> torch.Tensor:
    """A convolution over the channels of the pixel whose values begin at place `first` (section 3.1).

    Over eight times their differences from `origin`, if there is one.
    """
    pixel = [2 * ids[first + c] / (config.num_values - 1) - 1 for c in range(config.num_channels)]
    if origin is not None:
        pixel = [8 * (pixel[c] - origin[c]) for c in range(config.num_channels)]
    x = torch.tensor(pixel, dtype=weights[f"{stack}.embedding.embed_values.weight"].dtype)
    return torch.relu(linear(weights, f"{stack}.embedding.embed_values", x))


def coordinates(weights: dict, stack: str, config, place: tuple, channels: int) -> torch.Tensor:
    """Half of the dimensions for the row, half for the column and channel."""
    row, column, channel = place
    axes = {"rows": row, "columns": column * channels + channel}
    if config.coordinates == "learned":
        return torch.cat([weights[f"{stack}.coordinates.{axis}.weight"][at] for axis, at in axes.items()])
    half = config.hidden_size // 2
    waves = []
    for axis, at in axes.items():
        if stack == "encoder":  # where it lies in the large image
            side = ("rows", "columns").index(axis)
            at = (at + 0.5) * config.image_size[side] / config.source_image_size[side] - 0.5
        for i in range(0, half, 2):
            angle = at / 10000 ** (i / half)
            waves += [math.sin(angle), math.cos(angle)]
    return torch.tensor(waves, dtype=torch.float64)


def encode(weights: dict, config, source: list[int]) -> list[torch.Tensor]:
    """The encoder: every value (under a mixture, every pixel) of the small image sees every other."""
    if config.output == "categorical":
        hidden = [value_embedding(weights, "encoder", config, token, t) for t, token in enumerate(source)]
        channels = config.num_channels
    else:
        firsts = range(0, len(source), config.num_channels)
        hidden = [pixel_embedding(weights, "encoder", config, source, first) for first in firsts]
        channels = 1
    order = block_order(*config.source_image_size, channels, *config.source_image_size)
    hidden = [h + coordinates(weights, "encoder", config, order[p], channels) for p, h in enumerate(hidden)]
    for layer in range(config.num_encoder_layers):
        everything = [list(range(len(hidden)))] * len(hidden)
        hidden = block(weights, f"encoder.layers.{layer}", config, hidden, everything, None)
    return hidden


def enlarge(config, source: list[int]) -> list[list[float]]:
    """Values -1 ... 1 of each pixel of the large image, in the order of generation, by bicubic interpolation."""
    (height, width), (small_height, small_width) = config.image_size, config.source_image_size
    enlarged = []
    for row, column, _ in order_of(config, 1):
        rows = interpolation_weights(row, height, small_height)
        columns = interpolation_weights(column, width, small_width)
        pixel = []
        for c in range(config.num_channels):
            total = 0
            for y in range(small_height):
                for x in range(small_width):
                    value = source[(y * small_width + x) * config.num_channels + c]
                    total += rows[y] * columns[x] * (2 * value / (config.num_values - 1) - 1)
            pixel.append(total)
        enlarged.append(pixel)
    return enlarged


def interpolation_weights(place: int, large: int, small: int) -> list[float]:
    """Of each small pixel along one side, by Keys' kernel with a = -1/2; those outside the image have none."""
    centre = (place + 0.5) * small / large - 0.5
    weights = []
    for other in range(small):
        x = abs(centre - other)
        if x < 1:
            weights.append(1.5 * x**3 - 2.5 * x**2 + 1)
        elif x < 2:
            weights.append(-0.5 * x**3 + 2.5 * x**2 - 4 * x + 2)
        else:
            weights.append(0.0)
    return [weight / sum(weights) for weight in weights]


def block(weights: dict, name: str, config, hidden: list, seen: list[list[int]], encoded: list | None) -> list:
    """Equations 1 and 2, norms after the residuals."""
    attended = attention(weights, f"{name}.self_attn", config, hidden, hidden, seen)
    hidden = [layer_norm(weights, f"{name}.self_attn_norm", config, h + a) for h, a in zip(hidden, attended)]
    if encoded is not None:
        everything = [list(range(len(encoded)))] * len(hidden)
        attended = attention(weights, f"{name}.cross_attn", config, hidden, encoded, everything)
        hidden = [layer_norm(weights, f"{name}.cross_attn_norm", config, h + a) for h, a in zip(hidden, attended)]
    outputs = []
    for h in hidden:
        inner = torch.relu(linear(weights, f"{name}.mlp.up_proj", h))
        outputs.append(
            layer_norm(weights, f"{name}.mlp_norm", config, h + linear(weights, f"{name}.mlp.down_proj", inner))
        )
    return outputs


def attention(weights: dict, name: str, config, queries: list, keys: list, seen: list[list[int]]) -> list:
    """softmax(W_q q (M W_k)^T / sqrt(d)) M W_v for each head, M the memory of the query."""
    outputs = []
    for i, q in enumerate(queries):
        heads = []
        for head in range(config.num_attention_heads):
            rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
            w_q, w_k, w_v = (weights[f"{name}.{kind}_proj.weight"][rows] for kind in "qkv")
            scores = [(w_q @ q) @ (w_k @ keys[j]) / math.sqrt(config.head_dim) for j in seen[i]]
            total = sum(torch.exp(score) for score in scores)
            heads.append(sum(torch.exp(score) / total * (w_v @ keys[j]) for score, j in zip(scores, seen[i])))
        outputs.append(weights[f"{name}.o_proj.weight"] @ torch.cat(heads))
    return outputs


def next_channel(
    weights: dict, config, ids: list[int], t: int, hidden: torch.Tensor, enlarged: list | None
) -> torch.Tensor:
    """[values] log-probabilities of the value after id t: the pixel's joint probability over that of what is known."""
    channel = t % config.num_channels
    known = ids[t - channel + 1 : t + 1]
    pixel = weights["lm_head.weight"] @ hidden
    origin = None if enlarged is None else enlarged[t // config.num_channels]
    before = joint_probability(pixel, config, known, origin)
    return torch.stack(
        [torch.log(joint_probability(pixel, config, [*known, v], origin) / before) for v in range(config.num_values)]
    )


def joint_probability(pixel: torch.Tensor, config, values: list[int], origin: list | None) -> torch.Tensor:
    """P of the first channels of a pixel: sum over components of weight times the channels' probabilities.

    With an origin, means and earlier values are measured from it, and means and scales in eighths.
    """
    K, C = config.num_mixtures, config.num_channels
    logits, means, log_scales, coefficients = pixel.split([K, K * C, K * C, K * (C * (C - 1) // 2)])
    mixture_weights = torch.softmax(logits, 0)
    unit = 1 if origin is None else 1 / 8
    origin = [0] * C if origin is None else origin
    total = 0
    for k in range(K):
        product = mixture_weights[k]
        pair = 0
        for c, value in enumerate(values):
            mean = origin[c] + unit * means[c * K + k]
            for j in range(c):
                earlier = 2 * values[j] / (config.num_values - 1) - 1
                mean = mean + torch.tanh(coefficients[pair * K + k]) * (earlier - origin[j])
                pair += 1
            scale = torch.exp(torch.clamp(log_scales[c * K + k] + math.log(unit), min=-7))
            product = product * interval_probability(value, mean, scale, config.num_values)
        total = total + product
    return total


def interval_probability(value: int, mean: torch.Tensor, scale: torch.Tensor, num_values: int) -> torch.Tensor:
    """The mass of a logistic between the ends of a value's interval; the outermost ones have no end."""
    x, half = 2 * value / (num_values - 1) - 1, 1 / (num_values - 1)
    if x > mean:  # the mirror image, whose sigmoids are small: the difference of two near 1 would be lost
        return interval_probability(num_values - 1 - value, -mean, scale, num_values)
    above = 1.0 if value == num_values - 1 else torch.sigmoid((x + half - mean) / scale)
    below = 0.0 if value == 0 else torch.sigmoid((x - half - mean) / scale)
    return above - below


def linear(weights: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def layer_norm(weights: dict, name: str, config, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean()
    deviation = torch.sqrt((centred**2).mean() + config.layer_norm_eps)
    return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]
