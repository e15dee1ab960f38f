"""Discretised mixtures of logistics: exact probabilities of a pixel's values, channel by channel.

Parmar et al. 2018 (arXiv:1802.05751), section 3.4, after Salimans et al. 2017 (arXiv:1701.05517), section 2. A value v
of L stands for x = 2 v / (L - 1) - 1; its probability under a logistic is the mass of the interval of half-width
1 / (L - 1) around x, the first and last reaching to infinity. Means of later channels depend on the values of earlier
ones. Component weights and coefficients are shared by the channels of a pixel, so given earlier channels the weights of
the next one are those of Bayes' rule; the product of these conditionals is the mixture's own probability.

Means may be measured from an origin: numbers that the values are near, such as those of an enlarged small image.

Shapes: ... any, K components, C channels, L values.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

LOWEST_LOG_SCALE = -7.0
RESIDUAL_UNIT = 1 / 8  # differences from an origin are mostly within this, so in this unit they are numbers of size 1


def num_parameters(num_mixtures: int, num_channels: int) -> int:
    """Numbers that describe a pixel: K weights, means and scales of each channel, coefficients of each pair."""
    return num_mixtures * (1 + 2 * num_channels + num_channels * (num_channels - 1) // 2)


def log_interval(values: torch.Tensor, means: torch.Tensor, log_scales: torch.Tensor, num_values: int) -> torch.Tensor:
    """log P(value) under discretised logistics; shapes broadcast.

    With a and b the standardised ends of the interval, log(sigmoid(a) - sigmoid(b)) is computed as
    logsigmoid(a) + logsigmoid(-b) + log(1 - exp(b - a)), where a - b does not depend on the value, so nothing cancels.
    """
    half_width = 1 / (num_values - 1)
    distance = rescale(values, num_values, means.dtype) - means
    inverse_scale = torch.exp(-log_scales)
    upper, lower = (distance + half_width) * inverse_scale, (distance - half_width) * inverse_scale
    below = torch.where(values == num_values - 1, 0.0, nn.functional.logsigmoid(upper))
    above = torch.where(values == 0, 0.0, nn.functional.logsigmoid(-lower))
    inner = torch.log(-torch.expm1(-2 * half_width * inverse_scale))
    return below + above + torch.where((values == 0) | (values == num_values - 1), 0.0, inner)


def log_intervals(means: torch.Tensor, log_scales: torch.Tensor, num_values: int) -> torch.Tensor:
    """`log_interval` of every value, [..., L]. Neighbours share an end, and logsigmoid(-z) = logsigmoid(z) - z."""
    half_width = 1 / (num_values - 1)
    inverse_scale = torch.exp(-log_scales)[..., None]
    values = torch.arange(num_values - 1, device=means.device)
    ends = (rescale(values, num_values, means.dtype) + half_width - means[..., None]) * inverse_scale  # [..., L - 1]
    below = nn.functional.logsigmoid(ends)
    inner = torch.log(-torch.expm1(-2 * half_width * inverse_scale))
    middle = below[..., 1:] + below[..., :-1] - ends[..., :-1] + inner
    return torch.cat([below[..., :1], middle, below[..., -1:] - ends[..., -1:]], dim=-1)


def rescale(values: torch.Tensor, num_values: int, dtype: torch.dtype) -> torch.Tensor:
    """Values 0 ... L - 1 as -1 ... 1."""
    return values.to(dtype) * (2 / (num_values - 1)) - 1


@dataclass(frozen=True)
class ChannelMixture:
    """The distribution of one channel's value, given the pixel's earlier channels.

    Attributes:
        log_weights, means, log_scales: [..., K], the weights normalised.
        num_values: L.
    """

    log_weights: torch.Tensor
    means: torch.Tensor
    log_scales: torch.Tensor
    num_values: int

    def log_prob(self, values: torch.Tensor) -> torch.Tensor:
        """log P(value) of integer values [...]."""
        of_components = log_interval(values[..., None], self.means, self.log_scales, self.num_values)
        return torch.logsumexp(self.log_weights + of_components, dim=-1)

    def log_probs(self) -> torch.Tensor:
        """log P of every value, [..., L]; one component at a time, so never [..., K, L]."""
        total = None
        for k in range(self.means.shape[-1]):
            of_component = log_intervals(self.means[..., k], self.log_scales[..., k], self.num_values)
            weighted = self.log_weights[..., k, None] + of_component
            total = weighted if total is None else torch.logaddexp(total, weighted)
        return total


def channel_mixture(
    parameters: torch.Tensor,
    channel: torch.Tensor,
    earlier: torch.Tensor,
    num_values: int,
    origin: torch.Tensor | None = None,
) -> ChannelMixture:
    """The mixture of the next channel.

    Args:
        parameters: [..., num_parameters(K, C)] of the pixel, of at least float32.
        channel: [...] which channel comes next.
        earlier: [..., C] the pixel's values; only those of channels before `channel` matter.
        num_values: L.
        origin: [..., C] numbers from -1 to 1 that means and earlier values are measured from, means and scales in
            RESIDUAL_UNITs; None for 0, in units of 1.
    """
    log_weights, means, log_scales = _components(parameters, earlier, num_values, origin)
    known = torch.arange(earlier.shape[-1], device=channel.device) < channel[..., None]  # [..., C]
    evidence = log_interval(earlier[..., None], means, log_scales, num_values)  # [..., C, K]
    log_weights = (log_weights + evidence.masked_fill(~known[..., None], 0.0).sum(dim=-2)).log_softmax(dim=-1)
    chosen = channel[..., None, None].expand(*channel.shape, 1, means.shape[-1])
    return ChannelMixture(
        log_weights, means.gather(-2, chosen).squeeze(-2), log_scales.gather(-2, chosen).squeeze(-2), num_values
    )


def log_prob_of_pixels(
    parameters: torch.Tensor,
    values: torch.Tensor,
    earlier: torch.Tensor,
    num_values: int,
    origin: torch.Tensor | None = None,
) -> torch.Tensor:
    """log P(value) of each channel, [..., C], given the earlier ones: `channel_mixture` of all channels at once.

    Args:
        values: [..., C] whose probabilities are asked for.
        parameters, earlier, num_values, origin: as of `channel_mixture`.
    """
    log_weights, means, log_scales = _components(parameters, earlier, num_values, origin)
    evidence = log_interval(earlier[..., :-1, None], means[..., :-1, :], log_scales[..., :-1, :], num_values)
    log_weights = torch.cat([log_weights[..., None, :], evidence], dim=-2).cumsum(dim=-2).log_softmax(dim=-1)
    return torch.logsumexp(log_weights + log_interval(values[..., None], means, log_scales, num_values), dim=-1)


def _components(parameters, earlier, num_values, origin) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-weights [..., K]; means and log-scales [..., C, K], the means given the values of earlier channels."""
    channels = earlier.shape[-1]
    pairs = channels * (channels - 1) // 2
    parameters = parameters.unflatten(-1, (1 + 2 * channels + pairs, -1))  # [..., ., K]
    log_weights, means, log_scales, coefficients = parameters.split((1, channels, channels, pairs), dim=-2)
    scaled = rescale(earlier, num_values, means.dtype)
    if origin is None:
        means = _shifted_means(means, coefficients.tanh(), scaled)
    else:
        log_scales = log_scales + math.log(RESIDUAL_UNIT)
        means = origin[..., None] + _shifted_means(means * RESIDUAL_UNIT, coefficients.tanh(), scaled - origin)
    return log_weights.squeeze(-2).log_softmax(dim=-1), means, log_scales.clamp(min=LOWEST_LOG_SCALE)


def _shifted_means(means: torch.Tensor, coefficients: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
    """Mean of channel c plus a coefficient times each earlier channel's value: [..., C, K]."""
    shifted, pair = [], 0
    for c in range(means.shape[-2]):
        mean = means[..., c, :]
        for j in range(c):
            mean = mean + coefficients[..., pair, :] * scaled[..., j, None]
            pair += 1
        shifted.append(mean)
    return torch.stack(shifted, dim=-2)
