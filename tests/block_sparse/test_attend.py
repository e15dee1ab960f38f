"""The engine without a model, held to a dense softmax in float64: outputs, log-sum-exps, gradients, and refusals."""

import pytest
import torch

from hf_tfamily.block_sparse import attend, attend_varlen, engine
from hf_tfamily.modeling.attention_patterns import Fixed, Full, Local, PerHead, Sink, Strided, Union, pattern_from_dict
from hf_tfamily.modeling.positions import DistanceBias
from tests.block_sparse.test_plan import PATTERNS
from tests.reference.attention import dense_mask

BATCH, HEADS, KEY_HEADS, DIM, VALUE_DIM = 2, 4, 2, 8, 6
WINDOW_AND_SINKS = Union([Local(6), Sink(2)])


def make_inputs(queries, keys=None, *, batch=BATCH, key_heads=KEY_HEADS, dtype=torch.float64):
    """query, key, value and sinks, with the heads before the tokens."""
    keys = queries if keys is None else keys
    sizes = [(HEADS, queries, DIM), (key_heads, keys, DIM), (key_heads, keys, VALUE_DIM)]
    tensors = [torch.randn(batch, *size, dtype=dtype) for size in sizes]
    return [x.requires_grad_() for x in (*tensors, torch.randn(HEADS, dtype=dtype))]


def dense(query, key, value, sinks=None, *, mask, scale=DIM**-0.5, bias=0.0):
    """Output and log-sum-exp under a mask [B or 1, H, T, S]; with sinks there is one more key, of value 0."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = (query @ key.mT * scale + bias).masked_fill(~mask, -1e30)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
        mask = torch.cat([mask, torch.ones_like(mask[..., :1])], -1)
        value = torch.nn.functional.pad(value, (0, 0, 0, 1))
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp() * mask
    return weights @ value, lse.masked_fill(~mask.any(-1), float("-inf"))


def assert_equal(ours, theirs, inputs):
    """Outputs and log-sum-exps, and the gradients of a sum over both."""
    gradients = []
    for output, lse in (ours, theirs):
        seen = torch.isfinite(lse)
        weights = torch.linspace(-1, 1, lse.numel(), dtype=torch.float64).view(lse.shape)
        total = (output * output.detach().cos()).sum() + (lse.masked_fill(~seen, 0.0) * weights).sum()
        gradients.append(torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_equals_a_dense_softmax(pattern, causal):
    """Offsets, holes in the keys, sinks and log-sum-exps."""
    for queries, keys, query_offset, key_offset, with_sinks in ((50, 50, 0, 0, True), (9, 40, 31, 0, False)):
        *inputs, sinks = make_inputs(queries, keys)
        valid = torch.rand(BATCH, keys) > 0.2
        mask = (
            dense_mask(pattern, HEADS, queries, keys, causal=causal, q_offset=query_offset, kv_offset=key_offset)
            & (valid[:, None, None])
        )
        where = {"key_valid": valid, "query_offset": query_offset, "key_offset": key_offset}
        sinks = sinks if with_sinks else None
        ours = attend(*inputs, pattern, causal=causal, sinks=sinks, return_lse=True, **where)
        assert_equal(ours, dense(*inputs, sinks, mask=mask), [*inputs, sinks] if with_sinks else inputs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "pattern", [Full(), WINDOW_AND_SINKS, Fixed(8, 2, sub_blocks=2), PerHead([Local(3), Strided(4)])], ids=str
)
def test_packed_documents_are_apart(pattern, causal):
    """Each from position 0, with sinks of its own; one is empty, one a single token."""
    lengths = [17, 0, 40, 1, 5]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    inputs = make_inputs(sum(lengths), batch=1)
    mask = torch.zeros(1, HEADS, sum(lengths), sum(lengths), dtype=torch.bool)
    for start, length in zip(ends.tolist(), lengths):
        places = slice(start, start + length)
        mask[:, :, places, places] = dense_mask(pattern, HEADS, length, length, causal=causal)
    packed = [x[0].transpose(0, 1) for x in inputs[:3]]
    for kind in (torch.int32, torch.int64):
        output, lse = attend_varlen(*packed, pattern, ends.to(kind), causal=causal, sinks=inputs[3], return_lse=True)
        assert_equal((output.transpose(0, 1)[None], lse[None]), dense(*inputs, mask=mask), inputs)
    assert torch.equal(attend_varlen(*packed, pattern, ends, causal=causal, sinks=inputs[3]), output)


@pytest.mark.parametrize("pattern", [Full(), Local(7), WINDOW_AND_SINKS, PerHead([Local(3), Strided(4)])], ids=str)
def test_a_bias_by_distance(pattern):
    """A table of distances back, or one that says its distances, which may be negative; packed too."""
    *inputs, sinks = make_inputs(40)
    distances = torch.arange(-39, 40)
    table = torch.randn(HEADS, len(distances), dtype=torch.float64, requires_grad=True)
    apart = torch.arange(40)[:, None] - torch.arange(40)
    for causal, bias in ((True, table[:, 39:]), (False, DistanceBias(table, distances))):
        mask = dense_mask(pattern, HEADS, 40, 40, causal=causal)
        ours = attend(*inputs, pattern, causal=causal, bias=bias, sinks=sinks, return_lse=True)
        added = table[:, apart + 39][None]
        assert_equal(ours, dense(*inputs, sinks, mask=mask, bias=added), [*inputs, sinks, table])
    packed = [x[0].transpose(0, 1) for x in inputs]
    output = attend_varlen(*packed, pattern, torch.tensor([0, 25, 40]), causal=True, bias=table[:, 39:])
    second = attend(*(x[:1, :, 25:] for x in inputs), pattern, causal=True, bias=table[:, 39:])
    torch.testing.assert_close(output[25:].transpose(0, 1)[None], second)


def test_dicts_scales_and_one_token():
    query, key, value, _ = make_inputs(20)
    expected = attend(query, key, value, WINDOW_AND_SINKS, causal=True)
    assert torch.equal(attend(query, key, value, WINDOW_AND_SINKS.to_dict(), causal=True), expected)
    assert not torch.equal(attend(query, key, value, WINDOW_AND_SINKS, causal=True, scale=1.0), expected)
    last = attend(query[:, :, 19:], key, value, WINDOW_AND_SINKS, causal=True, query_offset=19)
    torch.testing.assert_close(last, expected[:, :, 19:])


def test_a_query_that_sees_nothing():
    """0 and -inf; with a sink the sink's score."""
    query, key, value, sinks = make_inputs(6)
    hidden = torch.zeros(BATCH, 6, dtype=torch.bool)
    arguments = {"causal": True, "key_valid": hidden, "return_lse": True}
    output, lse = attend(query, key, value, Local(3), **arguments)
    assert (output == 0).all()
    assert (lse == float("-inf")).all()
    output, lse = attend(query, key, value, Local(3), sinks=sinks, **arguments)
    assert (output == 0).all()
    assert torch.equal(lse, sinks[:, None].expand_as(lse))
    gradients = torch.autograd.grad(output.sum() + lse.sum(), [query, key, value, sinks])
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert (gradients[3] == BATCH * 6).all()


def test_under_autocast():
    query, key, value, sinks = make_inputs(30, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = attend(query, key.bfloat16(), value, WINDOW_AND_SINKS, causal=True, sinks=sinks)
    assert output.dtype == torch.bfloat16
    exact = attend(query, key, value, WINDOW_AND_SINKS, causal=True, sinks=sinks)
    torch.testing.assert_close(output.float(), exact, atol=3e-2, rtol=3e-2)
    gradient, expected = (torch.autograd.grad(x.float().square().sum(), query)[0] for x in (output, exact))
    torch.testing.assert_close(gradient, expected, atol=1e-1, rtol=1e-1)


@pytest.mark.parametrize("pattern", [WINDOW_AND_SINKS, WINDOW_AND_SINKS.to_dict()], ids=["pattern", "dict"])
def test_one_graph(pattern):
    """Of any length, with gradients."""

    def call(query, key, value, sinks):
        return attend(query, key, value, pattern, causal=True, sinks=sinks, return_lse=True)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for length in (20, 33, 47):
        inputs = make_inputs(length)
        assert_equal(compiled(*inputs), call(*inputs), inputs)


def test_packed_documents_under_compile():
    """They leave the graph, and are right."""

    def call(query, key, value, ends):
        return attend_varlen(query, key, value, WINDOW_AND_SINKS, ends, causal=True) * 2

    torch._dynamo.reset()
    inputs = [x.detach()[0].transpose(0, 1) for x in make_inputs(30, batch=1)[:3]]
    ends = torch.tensor([0, 11, 30])
    torch.testing.assert_close(torch.compile(call, backend="aot_eager")(*inputs, ends), call(*inputs, ends))


def refused(match, pattern=WINDOW_AND_SINKS, function=attend, change=None, **arguments):
    inputs = make_inputs(10)[:3] if change is None else change(*make_inputs(10)[:3])
    with pytest.raises(ValueError, match=match):
        function(*inputs, pattern, **{"causal": True, **arguments})


def test_what_does_not_fit_is_refused_by_name():
    refused(r"sinks must be floats \[H\] = \[4\], got torch.float32 \[3\]", sinks=torch.zeros(3))
    refused(r"sinks must be floats", sinks=torch.zeros(4, dtype=torch.long))
    refused(r"key_valid must be bool \[B, S\] = \[2, 10\], got torch.bool \[2, 9\]", key_valid=torch.ones(2, 9) > 0)
    refused(r"key_valid must be bool", key_valid=torch.ones(2, 10))
    refused(r"bias must be a table \[H, L\] or a DistanceBias, got shape \[4\]", bias=torch.zeros(HEADS))
    refused(r"4", bias=torch.zeros(3, 10))
    refused(r"distance", bias=torch.zeros(HEADS, 9))
    refused(r"query_offset must be an integer of at least 0, got -1", query_offset=-1)
    refused(r"key_offset must be an integer", key_offset=1.5)
    refused(r"pattern must be a pattern, such as Local\(64\), .* got 'local'", "local")
    refused(r"Unknown pattern type 'locl'; did you mean 'local'", {"type": "locl"})
    refused(r"num_attention_heads=4", PerHead([Full()] * 3))
    refused(r"query must be \[B, H, T, D\], got shape \[2, 4, 10\]", change=lambda q, k, v: (q[..., 0], k, v))
    refused(r"got torch.float64 for query and torch.float32 for key", change=lambda q, k, v: (q, k.float(), v))
    refused(r"got query \[2, 4, 10, 8\], key \[2, 2, 10, 4\]", change=lambda q, k, v: (q, k[..., :4], v))
    refused(r"key must have the batch of query, 2, got 1", change=lambda q, k, v: (q, k[:1], v[:1]))
    refused(r"4 query heads are no multiple of 3", change=lambda q, k, v: (q, *(x[:, [0, 0, 1]] for x in (k, v))))
    refused(r"value must be on the device of query, cpu, got meta", change=lambda q, k, v: (q, k, v.to("meta")))
    with pytest.raises(TypeError, match="unexpected keyword argument 'window'"):
        attend(*make_inputs(4)[:3], Full(), causal=True, window=3)


@pytest.mark.parametrize(
    ("ends", "match"),
    [
        ([0, 5, 9], r"rise from 0 to the number of tokens, 10, got \[0, 5, 9\]"),
        ([1, 10], r"rise from 0"),
        ([0, 7, 5, 10], r"rise from 0"),
        ([0], r"integers \[documents \+ 1\], got torch.int64 \[1\]"),
        ([0.0, 10.0], r"got torch.float32 \[2\]"),
    ],
)
def test_wrong_documents_are_refused(ends, match):
    inputs = [x[0].transpose(0, 1) for x in make_inputs(10, batch=1)[:3]]
    with pytest.raises(ValueError, match=match):
        attend_varlen(*inputs, Full(), torch.tensor(ends), causal=True)


def test_patterns_are_read_once():
    values = pattern_from_dict({"type": "local", "window": 4}).to_dict()
    assert engine.read_pattern(values, 1) is engine.read_pattern(values, 2)
