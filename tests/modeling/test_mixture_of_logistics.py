"""The mixture of logistics: exact, whatever its parameters, and what integration says."""

import pytest
import torch

from hf_tfamily.modeling.mixture_of_logistics import (
    channel_mixture,
    log_interval,
    log_intervals,
    log_prob_of_pixels,
    num_parameters,
)


def random_mixture(channels, channel, num_mixtures=10, num_values=256, spread=1.0, dtype=torch.float64, count=5):
    torch.manual_seed(0)
    parameters = torch.randn(count, num_parameters(num_mixtures, channels), dtype=dtype) * spread
    earlier = torch.randint(0, num_values, (count, channels))
    return channel_mixture(parameters, torch.full((count,), channel), earlier, num_values)


def test_number_of_parameters_is_the_papers():
    """Section 3.4: 10 times the number of components for three channels."""
    assert num_parameters(10, 3) == 100
    assert num_parameters(10, 1) == 30


@pytest.mark.parametrize(("channels", "channel"), [(3, 0), (3, 1), (3, 2), (1, 0)])
@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_probabilities_sum_to_one(channels, channel, spread):
    log_probs = random_mixture(channels, channel, spread=spread).log_probs()
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(5, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_an_intervals_mass_is_what_integration_says():
    """The density of the logistic, summed by Simpson's rule over the interval; the outermost reach far out."""
    mean, log_scale, levels = torch.tensor(0.13, dtype=torch.float64), torch.tensor(-2.1, dtype=torch.float64), 8

    def integral(low, high, steps=20_000):
        x = torch.linspace(low, high, 2 * steps + 1, dtype=torch.float64)
        z = (x - mean) / log_scale.exp()
        density = torch.sigmoid(z) * torch.sigmoid(-z) / log_scale.exp()
        weights = torch.full_like(x, 2.0)
        weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0
        return (weights * density).sum() * (high - low) / (6 * steps)

    ends = [-30.0, *[2 * (v + 0.5) / (levels - 1) - 1 for v in range(levels - 1)], 30.0]
    expected = torch.stack([integral(low, high) for low, high in zip(ends, ends[1:])])
    values = torch.arange(levels)
    torch.testing.assert_close(log_interval(values, mean, log_scale, levels).exp(), expected, rtol=1e-9, atol=1e-12)


def test_conditionals_multiply_to_the_joint_probability_of_a_pixel():
    """The sum over components of weight times product over channels; over all pixels it is 1."""
    torch.manual_seed(1)
    levels, mixtures, channels = 4, 3, 3
    parameters = torch.randn(num_parameters(mixtures, channels), dtype=torch.float64)
    pixels = torch.cartesian_prod(*[torch.arange(levels)] * channels)  # every pixel there is
    conditionals = [
        channel_mixture(parameters.expand(len(pixels), -1), torch.full((len(pixels),), c), pixels, levels).log_prob(
            pixels[:, c]
        )
        for c in range(channels)
    ]
    total = torch.stack(conditionals).sum(0).exp()
    assert total.sum().item() == pytest.approx(1, abs=1e-12)

    logits, means, log_scales, coefficients = parameters.split([3, 9, 9, 9])
    x = pixels.double() * 2 / (levels - 1) - 1
    a, b, c = coefficients.view(3, 3).tanh()
    shifts = [torch.zeros(len(x), 3), x[:, :1] * a, x[:, :1] * b + x[:, 1:2] * c]
    joint = logits.log_softmax(-1)
    for channel in range(3):
        means_now = means.view(3, 3)[channel] + shifts[channel]
        joint = joint + log_interval(pixels[:, channel, None], means_now, log_scales.view(3, 3)[channel], levels)
    torch.testing.assert_close(total, joint.exp().sum(-1), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("num_values", [2, 3, 256])
def test_all_intervals_at_once_are_the_single_ones(num_values):
    means, log_scales = torch.randn(2, 7, dtype=torch.float64) * 3
    single = log_interval(torch.arange(num_values), means[:, None], log_scales[:, None], num_values)
    torch.testing.assert_close(log_intervals(means, log_scales, num_values), single, rtol=1e-12, atol=1e-12)


def test_log_prob_is_that_of_log_probs():
    mixture = random_mixture(3, 2)
    values = torch.tensor([0, 255, 17, 128, 200])
    torch.testing.assert_close(mixture.log_prob(values), mixture.log_probs()[torch.arange(5), values])


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_float32_stays_finite_and_close(spread):
    """Far tails and tiny scales too, where a difference of sigmoids would be 0."""
    exact = random_mixture(3, 2, spread=spread)
    rounded = random_mixture(3, 2, spread=spread, dtype=torch.float32)
    rounded = channel_mixture_like(exact, rounded)
    found = rounded.log_probs()
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), exact.log_probs(), rtol=1e-4, atol=1e-3)


def channel_mixture_like(exact, rounded):
    return type(rounded)(exact.log_weights.float(), exact.means.float(), exact.log_scales.float(), exact.num_values)


def test_gradients_are_finite_at_the_lowest_scale_and_ends():
    parameters = (torch.randn(4, num_parameters(2, 3)) * 20).requires_grad_()
    for value in (0, 128, 255):
        for channel in range(3):
            pixels = torch.full((4, 3), value)
            mixture = channel_mixture(parameters, torch.full((4,), channel), pixels, 256)
            (grad,) = torch.autograd.grad(mixture.log_prob(pixels[:, 0]).sum(), parameters)
            assert grad.isfinite().all()


@pytest.mark.parametrize("with_origin", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_all_channels_at_once_are_each_of_them(channels, with_origin):
    """Also where the values asked for are not those that follow."""
    torch.manual_seed(2)
    parameters = torch.randn(7, num_parameters(5, channels), dtype=torch.float64)
    earlier, values = torch.randint(0, 256, (2, 7, channels))
    origin = torch.rand(7, channels, dtype=torch.float64) * 2 - 1 if with_origin else None
    mixtures = [channel_mixture(parameters, torch.full((7,), c), earlier, 256, origin) for c in range(channels)]
    for mixture in mixtures:
        torch.testing.assert_close(mixture.log_probs().logsumexp(-1), torch.zeros(7, dtype=torch.float64))
    expected = torch.stack([mixture.log_prob(values[:, c]) for c, mixture in enumerate(mixtures)], dim=-1)
    found = log_prob_of_pixels(parameters, values, earlier, 256, origin)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_moved_origin_moves_the_distribution():
    """Means, and the values that later means depend on, are measured from it."""
    torch.manual_seed(3)
    parameters = torch.randn(6, num_parameters(5, 3), dtype=torch.float64)
    earlier, origin = torch.randint(100, 120, (6, 3)), torch.full((6, 3), -0.1, dtype=torch.float64)
    for channel in range(3):
        of_channel = torch.full((6,), channel)
        found = channel_mixture(parameters, of_channel, earlier, 256, origin)
        moved = channel_mixture(parameters, of_channel, earlier + 20, 256, origin + 40 / 255)
        for a, b in zip((found.log_weights, found.means + 40 / 255, found.log_scales), vars(moved).values()):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
