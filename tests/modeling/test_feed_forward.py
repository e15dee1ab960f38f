"""Feed-forward layers in pieces: results and gradients of the plain layers, and less that is kept."""

import pytest
import torch
import torch.nn.functional as F

from hf_tfamily.modeling import feed_forward as module
from hf_tfamily.modeling import linear_onednn
from hf_tfamily.modeling.feed_forward import feed_forward

DTYPES = [torch.float32, torch.bfloat16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [torch.float32]


def make_inputs(dtype, shape=(3, 5)):
    """States [..., 4], and the weights and biases of layers of width 4 -> 6 -> 4."""
    torch.manual_seed(0)
    inputs = [torch.randn(size) for size in ((*shape, 4), (6, 4), (6,), (4, 6), (4,))]
    return [x.to(dtype).requires_grad_() for x in inputs]


def plain(x, weight_in, bias_in, weight_out, bias_out):
    return F.linear(F.gelu(F.linear(x, weight_in, bias_in)), weight_out, bias_out)


def with_gradients(function, inputs):
    output = function(*inputs)
    torch.manual_seed(1)
    wanted = torch.randn(output.shape).to(output.dtype)
    return [x.detach() for x in (output, *torch.autograd.grad(output, inputs, wanted))]


def kept_bytes(function, inputs):
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x.nbytes}) or x, lambda x: x):
        function(*inputs)
    return sum(kept.values())


@pytest.fixture(params=[1, 4, 1000], ids="{} tokens at a time".format)
def tokens_at_a_time(request, monkeypatch):
    """In double precision."""
    monkeypatch.setattr(module, "WIDE", request.param * 6 * 8)


@pytest.mark.parametrize("shape", [(3, 5), (1,), (2, 2, 3)], ids=str)
def test_pieces_are_the_plain_layers(tokens_at_a_time, shape):
    inputs = make_inputs(torch.float64, shape)
    expected = with_gradients(plain, inputs)
    torch.testing.assert_close(with_gradients(feed_forward, inputs), expected)
    with torch.no_grad():
        torch.testing.assert_close(feed_forward(*inputs), expected[0])


def test_gradients_are_those_of_differences(tokens_at_a_time):
    assert torch.autograd.gradcheck(feed_forward, make_inputs(torch.float64), fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gains", [True, False])
def test_errors_are_the_plain_layers(monkeypatch, dtype, gains):
    """Whether the linear layers are oneDNN's or PyTorch's."""
    monkeypatch.setattr(linear_onednn, "DTYPES", DTYPES if gains else [])
    inputs = make_inputs(dtype)
    exact = with_gradients(plain, [x.detach().double().requires_grad_() for x in inputs])
    for found, theirs, truth in zip(with_gradients(feed_forward, inputs), with_gradients(plain, inputs), exact):
        rounding = 4 * torch.finfo(dtype).eps * truth.abs().max()
        assert (found - truth).abs().max() <= 2 * (theirs - truth).abs().max() + rounding


def test_keeps_wide_states_once():
    inputs = make_inputs(torch.float32, (16, 16))
    wide, bias = 16 * 16 * 6 * 4, 6 * 4
    assert kept_bytes(plain, inputs) - kept_bytes(feed_forward, inputs) == wide - bias


def test_frozen_parameters_get_no_gradient():
    x, *parameters = make_inputs(torch.float32)
    frozen = [parameter.detach() for parameter in parameters[:2]]
    found = with_gradients(lambda *learnt: feed_forward(learnt[0], *frozen, *learnt[1:]), [x, *parameters[2:]])
    expected = with_gradients(lambda *learnt: plain(learnt[0], *frozen, *learnt[1:]), [x, *parameters[2:]])
    torch.testing.assert_close(found, expected)


def test_autocast_casts():
    inputs = make_inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = feed_forward(*inputs)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in inputs)


def test_no_tokens():
    inputs = make_inputs(torch.float32, (2, 0))
    assert feed_forward(*inputs).shape == (2, 0, 4)


def test_second_derivatives_are_those_of_differences(tokens_at_a_time):
    assert torch.autograd.gradgradcheck(feed_forward, make_inputs(torch.float64, (2, 3)), fast_mode=True)


def test_compiles_and_exports_as_one_graph():
    inputs = make_inputs(torch.float32)
    expected = with_gradients(plain, inputs)
    torch.testing.assert_close(with_gradients(torch.compile(feed_forward, fullgraph=True), inputs), expected)

    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return feed_forward(*tensors)

    detached = tuple(x.detach() for x in inputs)
    exported = torch.export.export(Layer(), detached).module()
    torch.testing.assert_close(exported(*detached), expected[0])
