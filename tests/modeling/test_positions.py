"""What is added to scores by distance equals loops, in either form in which it crosses to a backend."""

from types import SimpleNamespace

import pytest
import torch

from hf_tfamily.modeling.attention import eager_attention_forward
from hf_tfamily.modeling.configuration_rope_decoder import RoPEDecoderConfig
from hf_tfamily.modeling.positions import (
    POSITION_SCHEMES,
    DistanceBias,
    DistanceScores,
    RelativePositions,
    RelativeSinusoids,
    RotaryEmbedding,
    dense_bias,
    rows_by_distance,
)

BATCH, HEADS, QUERIES, KEYS, DIM, SCALING = 2, 3, 4, 7, 5, 0.3
ROWS = {
    "descending": torch.arange(KEYS - 1, -1, -1),
    "both_signs": torch.arange(-KEYS, KEYS),
    "with_holes": torch.tensor([6, 4, 3, 1, 0]),
    "in_no_order": torch.tensor([2, -3, 5, 0, 6, -1, 1]),
}
rows = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)


def distances_of(batch_size):
    """[B, T, S], the last queries of as many keys; other rows are padded on the left by one key more each."""
    positions = torch.arange(KEYS) - torch.arange(batch_size)[:, None]
    return positions[:, -QUERIES:, None] - positions[:, None, :]


def by_loops(entry, distances, rows):
    """[B, H, T, S] of entry(batch, head, query, row), and where the distance has a row at all."""
    listed = rows.tolist()
    bias = torch.zeros(len(distances), HEADS, QUERIES, KEYS, dtype=torch.float64)
    known = torch.zeros(bias.shape, dtype=torch.bool)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, bias.shape)).tolist():
        distance = int(distances[b, i, j])
        if distance in listed:
            bias[b, h, i, j] = entry(b, h, i, listed.index(distance))
            known[b, h, i, j] = True
    return bias, known


@rows
@pytest.mark.parametrize("batch_size", [1, BATCH])
def test_a_bias_of_heads_and_distances_equals_loops(rows, batch_size):
    table, distances = torch.randn(HEADS, len(rows), dtype=torch.float64), distances_of(batch_size)
    found = dense_bias(DistanceBias(table, rows), distances, SCALING)
    expected, known = by_loops(lambda b, h, i, row: table[h, row], distances, rows)
    assert found.shape == expected.shape
    assert torch.equal(found[known], expected[known])


@rows
@pytest.mark.parametrize("batch_size", [1, BATCH])
def test_scores_of_queries_and_distances_equal_loops(rows, batch_size):
    query = torch.randn(BATCH, HEADS, QUERIES, DIM, dtype=torch.float64)
    relative_key = torch.randn(HEADS, len(rows), DIM, dtype=torch.float64)
    distances = distances_of(batch_size)
    found = dense_bias(DistanceScores(query, relative_key, rows), distances, SCALING)
    expected, known = by_loops(
        lambda b, h, i, row: query[b, h, i] @ relative_key[h, row] * SCALING, distances.expand(BATCH, -1, -1), rows
    )
    torch.testing.assert_close(found[known], expected[known])


def test_either_form_hands_on_gradients():
    rows, distances = ROWS["both_signs"], distances_of(BATCH)
    table = torch.randn(HEADS, len(rows), dtype=torch.float64, requires_grad=True)
    query = torch.randn(BATCH, HEADS, QUERIES, DIM, dtype=torch.float64, requires_grad=True)
    relative_key = torch.randn(HEADS, len(rows), DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dense_bias(DistanceBias(x, rows), distances, SCALING), (table,))
    assert torch.autograd.gradcheck(
        lambda q, r: dense_bias(DistanceScores(q, r, rows), distances, SCALING), (query, relative_key)
    )


def test_the_forms_are_read_by_attribute():
    """Those of another copy of the file are of other classes."""
    rows, distances = ROWS["descending"], distances_of(BATCH)
    for bias in (
        DistanceBias(torch.randn(HEADS, KEYS), rows),
        DistanceScores(torch.randn(BATCH, HEADS, QUERIES, DIM), torch.randn(HEADS, KEYS, DIM), rows),
    ):
        other = SimpleNamespace(**bias._asdict())
        assert torch.equal(dense_bias(other, distances, SCALING), dense_bias(bias, distances, SCALING))


def test_eager_attention_adds_either_form():
    """ALiBi's slopes as a table, and the same numbers as scores of queries and distances."""
    query, key = torch.randn(BATCH, HEADS, QUERIES, DIM), torch.randn(BATCH, HEADS, KEYS, DIM)
    rows, distances = ROWS["descending"], distances_of(1)
    seen, slopes = distances[:, None] >= 0, 2.0 ** -torch.arange(1, HEADS + 1)
    scores = query @ key.transpose(-1, -2) * SCALING - slopes[:, None, None] * distances[:, None]
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ key
    table = -slopes[:, None] * rows
    ones = torch.ones(BATCH, HEADS, QUERIES, 1)
    module = torch.nn.Module().eval()
    for bias in (DistanceBias(table, rows), DistanceScores(ones, table[..., None] / SCALING, rows)):
        added = dense_bias(bias, distances, SCALING)
        found, _ = eager_attention_forward(module, query, key, key, seen, SCALING, position_bias=added)
        torch.testing.assert_close(found.transpose(1, 2), expected)


@rows
def test_rows_of_distances(rows):
    wanted = torch.arange(-12, 13).view(5, 5)
    found = rows_by_distance(rows, wanted)
    known = torch.isin(wanted, rows)
    assert torch.equal(rows[found][known], wanted[known])
    assert found.shape == wanted.shape
    assert ((found >= 0) & (found < len(rows))).all()


def test_what_a_lazy_backend_gets_is_what_others_add():
    """Transformer-XL's scores, handed over as what they are computed from, for distances of one or both signs."""
    query = torch.randn(BATCH, HEADS, QUERIES, DIM)
    for lowest in (0, 1 - KEYS):
        relative_key = torch.randn(HEADS, KEYS - lowest + 1, DIM)
        distances = distances_of(BATCH).clamp(lowest, KEYS - 1)
        positions = RelativePositions(relative_key[0], KEYS, distances, lowest)
        lazy = positions._replace(lazy=True).bias(query, relative_key, SCALING)
        torch.testing.assert_close(
            dense_bias(lazy, distances, SCALING), positions.bias(query, relative_key, SCALING), atol=1e-6, rtol=1e-5
        )


@pytest.mark.parametrize("causal", [True, False])
def test_the_scheme_of_transformer_xl_has_its_waves(causal):
    like, positions = torch.zeros(1), torch.arange(KEYS)[None]
    scheme = POSITION_SCHEMES["transformer_xl"](SimpleNamespace(hidden_size=6))
    order = scheme.prepare(positions[:, -QUERIES:], positions, causal, like)
    waves = RelativeSinusoids(6)(KEYS + 1, like)
    assert torch.equal(order.states[: KEYS + 1], waves)
    assert len(order.states) == KEYS + (1 if causal else KEYS)
    assert torch.equal(order.distances.clamp(min=0), distances_of(1).clamp(min=0))


def test_the_scheme_of_rotations_has_the_angles_of_a_rope_decoder():
    scheme = POSITION_SCHEMES["rotary"](SimpleNamespace(hidden_size=16, num_attention_heads=2))
    rope = {"rope_theta": 10000.0}
    embedding = RotaryEmbedding(RoPEDecoderConfig(hidden_size=16, num_attention_heads=2, rope_parameters=rope))
    positions, like = torch.tensor([[0, 1, 5, 100]]), torch.zeros(1)
    for one, other in zip(scheme.prepare(positions, positions, True, like), embedding(like, positions)):
        torch.testing.assert_close(one[:, 0], other, atol=1e-5, rtol=0)
