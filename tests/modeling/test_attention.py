"""Every pattern under eager, sdpa and flex_attention equals loops over `visible`."""

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_tfamily.block_sparse.interface import block_sparse_attention_forward
from hf_tfamily.modeling.attention import drop_trivial, eager_attention_forward, lower_mask, visible_keys
from hf_tfamily.modeling.attention_patterns import FixedSummary, Full, Local, Strided, Union
from tests.modeling.test_attention_patterns import PATTERNS
from tests.reference.masked_attention import attention, visible_table

FORWARD = {
    "eager": eager_attention_forward,
    "sdpa": sdpa_attention_forward,
    "flex_attention": flex_attention_forward,
    "block_sparse": block_sparse_attention_forward,
}
HEADS, BATCH, DIM, VALUE_DIM = 8, 2, 4, 6


class Case:
    """One way a model can call attention: its mask arguments, and what the loops need to know of it."""

    def __init__(self, length, past=0, padding=(0, 0), documents=None, causal=True):
        self.length, self.past, self.causal = length, past, causal
        total = past + length
        self.valid = torch.ones(BATCH, total, dtype=torch.bool)
        self.valid[0, : padding[0]] = False
        self.valid[0, total - padding[1] :] = False
        self.attention_mask = self.valid.long() if any(padding) else None
        places = torch.arange(total).expand(BATCH, total)
        self.documents = torch.zeros_like(places) if documents is None else torch.tensor(documents).expand(BATCH, total)
        self.position_ids = None
        positions = places - torch.tensor([[padding[0]]] + [[0]] * (BATCH - 1))
        if documents is not None:
            starts = torch.tensor([documents.index(document) for document in documents])
            positions = places - starts
            self.position_ids = positions
        self.key_positions, self.query_positions = positions.tolist(), positions[:, past:].tolist()

    def seen(self, b, i, j):
        ordered = not self.causal or j <= self.past + i
        return ordered and bool(self.valid[b, j]) and self.documents[b, j] == self.documents[b, self.past + i]

    def visible_keys(self, pattern):
        hidden_states = torch.zeros(BATCH, self.length, 1)
        return visible_keys(
            pattern,
            HEADS,
            hidden_states,
            self.attention_mask,
            self.position_ids,
            past_length=self.past,
            causal=self.causal,
        )


CASES = {
    "one token": Case(1),
    "shorter than a block": Case(3),
    "no multiple": Case(11),
    "left padding": Case(9, padding=(4, 0)),
    "right padding": Case(9, padding=(0, 3)),
    "decoding": Case(1, past=10),
    "prefill after a past": Case(5, past=6),
    "decoding with left padding": Case(2, past=7, padding=(3, 0)),
    "packed": Case(11, documents=[0] * 4 + [1] * 7),
    "bidirectional": Case(10, padding=(0, 2), causal=False),
    "bidirectional, left padding": Case(7, padding=(2, 0), causal=False),
}


def tensors(case, dtype):
    total = case.past + case.length
    query = torch.randn(BATCH, HEADS, case.length, DIM, dtype=dtype)
    key = torch.randn(BATCH, HEADS // 2, total, DIM, dtype=dtype)
    value = torch.randn(BATCH, HEADS // 2, total, VALUE_DIM, dtype=dtype)
    return query, key, value


def run(implementation, case, pattern, query, key, value):
    """The output [B, T, H, Dv] under a backend, grouped heads repeated where it wants them so."""
    module = nn.Module().eval()
    module.num_key_value_groups = 2
    module.is_causal = case.causal
    mask = lower_mask(case.visible_keys(pattern), implementation, query.device)
    return FORWARD[implementation](module, query, key, value, mask, scaling=0.5)[0]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_backends_equal_loops(pattern, name):
    case = CASES[name]
    table = visible_table(pattern, HEADS, case.query_positions, case.key_positions, case.seen)
    tokens = case.valid[:, case.past :]  # what a query of padding sees is nobody's business
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value = tensors(case, dtype)
        expected = attention(query, key, value, table, scale=0.5)
        # Weights and outputs are rounded once each; scores of a few units cost a little more in bfloat16.
        tolerance = 8 * torch.finfo(dtype).eps * value.abs().max().item()
        # force_eager: FlexAttention's own uncompiled path, so that not every shape is compiled.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for implementation in FORWARD:
                output = run(implementation, case, pattern, query, key, value)
                torch.testing.assert_close(
                    output[tokens].double(),
                    expected[tokens],
                    atol=tolerance,
                    rtol=0,
                    msg=implementation,
                )


def test_rows_that_see_nothing_are_zero_with_zero_gradient():
    pattern = FixedSummary(4, 1)  # the first three positions have no summary before them
    case = CASES["no multiple"]
    for implementation in ("eager", "sdpa", "block_sparse"):
        query, key, value = (t.requires_grad_() for t in tensors(case, torch.float32))
        output = run(implementation, case, pattern, query, key, value)
        assert (output[:, :3] == 0).all()
        assert (output[:, 3:] != 0).all()
        output.sum().backward()
        assert (query.grad[:, :, :3] == 0).all()
        assert all(torch.isfinite(t.grad).all() for t in (query, key, value))


@pytest.mark.parametrize("name", ["left padding", "packed", "prefill after a past", "bidirectional"])
def test_gradients_equal_float64(name):
    case = CASES[name]
    tokens = case.valid[:, case.past :, None, None]
    for pattern in PATTERNS:
        inputs = tensors(case, torch.float32)
        weight = torch.randn(BATCH, case.length, HEADS, VALUE_DIM) * tokens

        def gradients(implementation, dtype, pattern=pattern, inputs=inputs, weight=weight):
            leaves = [t.detach().clone().to(dtype).requires_grad_() for t in inputs]
            (run(implementation, case, pattern, *leaves) * weight.to(dtype)).sum().backward()
            return [leaf.grad.double() for leaf in leaves]

        oracle = gradients("eager", torch.float64)
        for implementation in ("eager", "sdpa", "block_sparse"):
            for grad, expected in zip(gradients(implementation, torch.float32), oracle):
                torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", [Union((Local(40), FixedSummary(64, 8, sub_blocks=4))), Local(300)], ids=str)
def test_block_masks_equal_torchs_own(pattern):
    """Same blocks, full and partial, as create_block_mask computes from the whole [T, S] mask."""
    for length, past in ((300, 0), (128, 128), (130, 200)):
        seen = visible_keys(pattern, HEADS, torch.zeros(1, length, 1), past_length=past)
        ours = seen.block_mask(torch.device("cpu"))
        torchs = create_block_mask(seen.mask_mod(), 1, HEADS, length, past + length, device="cpu")
        assert ours.shape[-2:] == torchs.shape[-2:]
        heads = (1, HEADS, -1, -1)
        for ours_counts, ours_columns, torchs_counts, torchs_columns in (
            (ours.kv_num_blocks, ours.kv_indices, torchs.kv_num_blocks, torchs.kv_indices),
            (ours.full_kv_num_blocks, ours.full_kv_indices, torchs.full_kv_num_blocks, torchs.full_kv_indices),
        ):
            assert torch.equal(ours_counts.expand(heads[:-1]), torchs_counts)
            for ours_row, torchs_row, count in zip(
                ours_columns.expand(heads).flatten(0, 2), torchs_columns.flatten(0, 2), torchs_counts.flatten()
            ):
                assert torch.equal(ours_row[:count], torchs_row[:count])


def test_plain_block_masks_are_cached():
    first, again = (
        visible_keys(Local(7), HEADS, torch.zeros(b, 200, 1)).block_mask(torch.device("cpu")) for b in (1, 3)
    )
    assert first is again


def test_compiled_flex_attention_equals_eager():
    pattern, case = Union((Local(3), FixedSummary(6, 2, sub_blocks=2))), CASES["left padding"]
    query = torch.randn(BATCH, HEADS, case.length, 16)
    key = torch.randn(BATCH, HEADS // 2, case.length, 16)
    value = torch.randn(BATCH, HEADS // 2, case.length, 16)
    with torch.no_grad():
        expected = run("eager", case, pattern, query, key, value)
        torch.testing.assert_close(run("flex_attention", case, pattern, query, key, value), expected)


def test_sdpa_runs_plain_causal_attention_without_a_mask():
    hidden_states = torch.zeros(2, 5, 1)
    cpu = torch.device("cpu")
    assert lower_mask(visible_keys(Full(), 4, hidden_states), "sdpa", cpu) is None
    assert lower_mask(visible_keys(Full(), 4, hidden_states, past_length=3), "sdpa", cpu) is not None
    assert lower_mask(visible_keys(Full(), 4, hidden_states, causal=False), "sdpa", cpu) is None  # the module says so


def test_a_4d_mask_is_intersected():
    hidden_states = torch.zeros(1, 4, 1)
    extra = torch.tensor([[[[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]]]).bool()
    expected = visible_keys(Local(3), 2, hidden_states).dense(extra.device) & extra
    floats = torch.where(extra, 0.0, torch.finfo(torch.float32).min)
    for mask in (extra, floats):
        assert torch.equal(visible_keys(Local(3), 2, hidden_states, mask).dense(extra.device), expected)


def test_static_caches_have_a_free_end():
    """Keys beyond the tokens given so far are never seen, with and without padding."""
    hidden_states = torch.zeros(2, 2, 1)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    for attention_mask, position_ids in ((mask, None), (None, torch.tensor([[3, 4]])), (None, None)):
        seen = visible_keys(Strided(2), 2, hidden_states, attention_mask, position_ids, past_length=3, key_length=9)
        short = visible_keys(Strided(2), 2, hidden_states, attention_mask, position_ids, past_length=3)
        dense = seen.dense(mask.device)
        assert not dense[..., 5:].any()
        assert torch.equal(dense[..., :5], short.dense(mask.device))


def test_trivial_arguments_are_dropped_and_others_kept():
    hidden_states = torch.zeros(2, 3, 1)
    ones, places = torch.ones(2, 5), torch.tensor([[2, 3, 4]])
    assert drop_trivial(hidden_states, ones, places, past_length=2) == (None, None)
    padded, later = ones.clone(), places + 1
    padded[0, 0] = 0
    kept = drop_trivial(hidden_states, padded, later, past_length=2)
    assert kept[0] is padded
    assert kept[1] is later
    too_long = torch.ones(2, 6)
    assert drop_trivial(hidden_states, too_long, None, past_length=2)[0] is too_long


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.ones(2, 4)}, r"\[2, 5\].*got \[2, 4\]"),
        ({"attention_mask": torch.ones(2, 6)}, r"covers 6 tokens, but only 5"),
        ({"attention_mask": torch.ones(3, 5)}, r"got \[3, 5\]"),
        ({"attention_mask": torch.ones(2, 5, 5)}, r"got \[2, 5, 5\]"),
        ({"attention_mask": torch.ones(2, 1, 5, 4).bool()}, r"4-D attention_mask must have shape"),
        ({"attention_mask": torch.full((2, 1, 5, 5), -0.5)}, r"only hold 0 \(seen\)"),
        ({"position_ids": torch.zeros(2, 4).long()}, r"position_ids must have shape \[2 or 1, 5\]"),
    ],
)
def test_wrong_shapes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        visible_keys(Full(), 2, torch.zeros(2, 5, 1), **arguments)


def test_unknown_implementations_are_refused():
    seen = visible_keys(Full(), 2, torch.zeros(2, 5, 1))
    with pytest.raises(ValueError, match=r"flash_attention_2.*cannot run attention patterns; use"):
        lower_mask(seen, "flash_attention_2", torch.device("cpu"))
