"""Attention inside windows: held to its equation in outputs and gradients."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_tfamily.block_sparse.windows import window_attention
from hf_tfamily.modeling.attention_patterns import Window2D
from hf_tfamily.modeling.modeling_swin_transformer import window_layout

SCALING = 0.5
SHIFTED, PLAIN = window_layout(Window2D(3, 1), (6, 9), "cpu", fit=True).mask, None  # 6 windows a picture


def make_inputs(dtype=torch.float32, pictures=3, heads=2, dim=4):
    """Query, key, value [B * L, H, N, D] as projections leave them, and the bias [H, N, N]."""
    torch.manual_seed(0)
    inputs = [torch.randn(pictures * 6, 9, heads, dim).to(dtype).transpose(1, 2) for _ in range(3)]
    return [x.detach().requires_grad_() for x in (*inputs, torch.randn(heads, 9, 9).to(dtype))]


def by_equation(query, key, value, bias, mask, scaling):
    """SoftMax(Q K^T / sqrt(d) + B) V, equation 4."""
    scores = query @ key.transpose(-1, -2) * scaling + bias
    if mask is not None:
        scores = scores.masked_fill(~mask.repeat(len(query) // len(mask), 1, 1)[:, None], float("-inf"))
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


def outputs_and_gradients(attention, inputs, mask):
    output = attention(*inputs, mask, SCALING)
    torch.manual_seed(1)
    wanted = torch.randn(output.shape).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, wanted)]


@pytest.mark.parametrize("mask", [PLAIN, SHIFTED], ids=["plain", "shifted"])
@pytest.mark.parametrize("pictures", [1, 3, 11])
def test_windows_are_the_equation(mask, pictures):
    inputs = make_inputs(torch.float64, pictures)
    expected = outputs_and_gradients(by_equation, inputs, mask)
    for found, exact in zip(outputs_and_gradients(window_attention, inputs, mask), expected, strict=True):
        torch.testing.assert_close(found, exact)
    with torch.no_grad():
        torch.testing.assert_close(window_attention(*inputs, mask, SCALING), expected[0])


@pytest.mark.parametrize("mask", [PLAIN, SHIFTED], ids=["plain", "shifted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pictures", [1, 3, 11], ids="{} pictures".format)
def test_errors_without_gradients_are_the_equations_own(mask, dtype, pictures):
    inputs = [x.detach() for x in make_inputs(dtype, pictures)]
    found, equation = (attend(*inputs, mask, SCALING) for attend in (window_attention, by_equation))
    exact = by_equation(*(x.double() for x in inputs), mask, SCALING)
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert (found - exact).abs().max() <= 2 * (equation - exact).abs().max() + rounding


@pytest.mark.parametrize("mask", [PLAIN, SHIFTED], ids=["plain", "shifted"])
def test_gradients_are_those_of_differences(mask):
    inputs = make_inputs(torch.float64, pictures=2, heads=1, dim=2)
    assert torch.autograd.gradcheck(lambda *x: window_attention(*x, mask, SCALING), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *x: window_attention(*x, mask, SCALING), inputs, fast_mode=True)


@pytest.mark.parametrize("mask", [PLAIN, SHIFTED], ids=["plain", "shifted"])
def test_torch_func_goes_through(mask):
    """A gradient for each sample, and many gradients of one output at once, each as if alone."""
    inputs = make_inputs(torch.float64)
    samples = [torch.stack([x, 2 * x]) for x in inputs]

    def loss(*inputs):
        return window_attention(*inputs, mask, SCALING).square().sum()

    found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)))(*samples)
    for number in range(2):
        alone = torch.autograd.grad(loss(*(x[number] for x in samples)), samples, retain_graph=True)
        for gradients, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(gradients[number], expected[number])

    output = window_attention(*inputs, mask, SCALING)
    wanted = torch.randn(2, *output.shape, dtype=torch.float64)
    found = torch.autograd.grad(output, inputs, wanted, is_grads_batched=True, retain_graph=True)
    for number in range(2):
        alone = torch.autograd.grad(output, inputs, wanted[number], retain_graph=True)
        for gradients, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(gradients[number], expected)


@pytest.mark.parametrize("mask", [PLAIN, SHIFTED], ids=["plain", "shifted"])
def test_counters_see_every_product(mask):
    """Two forward and four backward, as in the equation."""
    inputs, totals = make_inputs(), []
    for attend in (window_attention, by_equation):
        with FlopCounterMode(display=False) as counter:
            outputs_and_gradients(attend, inputs, mask)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] == 6 * 2 * 18 * 2 * 9 * 9 * 4


@pytest.mark.slow
@pytest.mark.parametrize("mask", [PLAIN, SHIFTED], ids=["plain", "shifted"])
def test_compiles_as_one_graph(mask):
    def attend(query, key, value, bias, mask, scaling):
        return window_attention(2 * query, key, value, bias, mask, scaling)

    inputs = make_inputs()
    expected = outputs_and_gradients(attend, inputs, mask)
    found = outputs_and_gradients(torch.compile(attend, fullgraph=True), inputs, mask)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mask", [PLAIN, SHIFTED], ids=["plain", "shifted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_the_equations_own(mask, dtype):
    inputs = make_inputs(dtype)
    exact = outputs_and_gradients(by_equation, [x.detach().double().requires_grad_() for x in inputs], mask)
    equation = outputs_and_gradients(by_equation, inputs, mask)
    for found, plain, truth in zip(outputs_and_gradients(window_attention, inputs, mask), equation, exact, strict=True):
        rounding = torch.finfo(dtype).eps * truth.abs().max()
        assert (found - truth).abs().max() <= 2 * (plain - truth).abs().max() + rounding


def test_autocast_keeps_what_it_is_given():
    """Inside, nothing is cast: inputs are in the type that the projections gave them."""
    inputs = make_inputs()

    def under_autocast(*arguments):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return window_attention(*arguments)

    expected = outputs_and_gradients(window_attention, inputs, SHIFTED)
    torch.testing.assert_close(outputs_and_gradients(under_autocast, inputs, SHIFTED), expected)


def test_what_needs_no_gradient_gets_none():
    query, key, value, bias = make_inputs()
    bias = bias.detach()
    window_attention(query, key.detach(), value, bias, SHIFTED, SCALING).sum().backward()
    assert query.grad is not None
    assert (key.grad, bias.grad) == (None, None)


@pytest.mark.parametrize("mask", [PLAIN, SHIFTED], ids=["plain", "shifted"])
def test_exports(mask):
    class Attention(torch.nn.Module):
        def forward(self, *inputs):
            return window_attention(*inputs, mask, SCALING)

    inputs = tuple(x.detach() for x in make_inputs())
    exported = torch.export.export(Attention(), inputs).module()
    torch.testing.assert_close(exported(*inputs), window_attention(*inputs, mask, SCALING))
