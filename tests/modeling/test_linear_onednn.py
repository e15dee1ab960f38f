"""Linear layers by oneDNN: results and gradients of PyTorch's own, whatever the processor."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_tfamily.modeling import linear_onednn
from hf_tfamily.modeling.linear_onednn import OneDNNLinear, linear, linear_gelu

DTYPES = [torch.float32, torch.bfloat16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [torch.float32]


class Sharded(torch.Tensor):
    """Stands for tensors that are not what they seem."""


@pytest.fixture(autouse=True)
def gains(monkeypatch):
    """All processors are said to gain."""
    monkeypatch.setattr(linear_onednn, "DTYPES", DTYPES)


@pytest.fixture
def calls(monkeypatch):
    """One entry for each product by oneDNN."""
    counted, product = [], linear_onednn._product
    monkeypatch.setattr(linear_onednn, "_product", lambda *arguments: counted.append(1) or product(*arguments))
    return counted


def make_inputs(dtype, shape=(3, 5), bias=True):
    """States [..., 7], a weight [6, 7] and a bias [6]."""
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, 7), torch.randn(6, 7), torch.randn(6)][: 3 if bias else 2]
    return [x.to(dtype).requires_grad_() for x in inputs]


def with_gradients(function, inputs):
    output = function(*inputs, *[None] * (3 - len(inputs)))
    torch.manual_seed(1)
    wanted = torch.randn(output.shape).to(output.dtype)
    return [x.detach().double() for x in (output, *torch.autograd.grad(output, inputs, wanted))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (1, 1), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_errors_are_pytorchs_own(calls, dtype, shape, bias):
    inputs = make_inputs(dtype, shape, bias)
    ours, theirs = (with_gradients(function, inputs) for function in (linear, F.linear))
    exact = with_gradients(F.linear, [x.detach().double().requires_grad_() for x in inputs])
    assert len(calls) == 2  # forward, and the gradient of the states
    for found, plain, truth in zip(ours, theirs, exact, strict=True):
        rounding = 4 * torch.finfo(dtype).eps * truth.abs().max()
        assert (found - truth).abs().max() <= 2 * (plain - truth).abs().max() + rounding


def test_strides():
    """Transposed and sliced states and weights are read as they are."""
    states, weight = torch.randn(7, 10, 3).transpose(0, 2)[:, ::2], torch.randn(7, 12).t()[::2]
    torch.testing.assert_close(linear(states, weight, None), F.linear(states, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu(dtype):
    inputs = [x.detach() for x in make_inputs(dtype)]
    exact = F.gelu(F.linear(*(x.double() for x in inputs)))
    error = (linear_gelu(*inputs) - exact).abs().max()
    assert error <= 2 * (F.gelu(F.linear(*inputs)) - exact).abs().max() + torch.finfo(dtype).eps


@pytest.mark.parametrize("gains", [True, False])
@pytest.mark.parametrize("length", [1, 6, 7, 300])
def test_gradients_of_weights(monkeypatch, gains, length):
    """By a convolution where sums are long and oneDNN gains, of strided states as well."""
    monkeypatch.setattr(linear_onednn, "DTYPES", DTYPES if gains else [])
    torch.manual_seed(0)
    states, gradient = torch.randn(7, length).t(), torch.randn(length, 12)[:, ::2]
    exact = gradient.double().t() @ states.double()
    error = (linear_onednn.weight_gradient(states, gradient) - exact).abs().max()
    assert error <= 2 * (gradient.t() @ states - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()


def test_second_derivatives():
    def of_second_order(function, inputs):
        output = function(*inputs).tanh().sum()
        first = torch.autograd.grad(output, inputs, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), inputs)

    inputs = make_inputs(torch.float32)
    exact = of_second_order(F.linear, [x.detach().double().requires_grad_() for x in inputs])
    for found, truth in zip(of_second_order(linear, inputs), exact, strict=True):
        assert (found - truth).abs().max() <= 16 * torch.finfo(torch.float32).eps * truth.abs().max()


def test_only_what_wants_gradients_gets_them(calls):
    states, weight, bias = make_inputs(torch.float32)
    linear(states.detach(), weight, bias.detach()).sum().backward()
    assert (states.grad, bias.grad) == (None, None)
    assert len(calls) == 1


def test_leaves_the_rest_to_pytorch(calls):
    """Autocast, other types, no tokens, quantised or sharded weights, and export, whose graphs others must run."""
    layer, states = OneDNNLinear(7, 6), torch.randn(3, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(states).dtype == torch.bfloat16
    layer.double()(states.double())
    layer.float()(states[:0])
    torch.export.export(layer, (states,))
    linear(states, layer.weight.detach().as_subclass(Sharded), None)
    assert not calls
    layer(states)
    assert calls


def test_is_a_linear_layer():
    layer, plain = OneDNNLinear(7, 6), nn.Linear(7, 6)
    plain.load_state_dict(layer.state_dict())
    states = torch.randn(3, 7)
    torch.testing.assert_close(layer(states), plain(states))


def test_compiles_as_one_graph():
    """Both ways, with bias and without."""
    first, second = OneDNNLinear(7, 6), OneDNNLinear(6, 5, bias=False)
    compiled = torch.compile(lambda x: second(first(x)), fullgraph=True)
    states = torch.randn(3, 7, requires_grad=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(states), second(first(states)))
    wanted = torch.randn(3, 5)
    found, exact = (torch.autograd.grad(f(states), states, wanted)[0] for f in (compiled, lambda x: second(first(x))))
    torch.testing.assert_close(found, exact)
