"""Waves of positions, absolute and relative, equal loops over their equations."""

import math

import pytest
import torch
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from hf_tfamily.modeling.positions import (
    RelativePositions,
    RelativeSinusoids,
    hidden_columns,
    shift_rows,
    sinusoids,
)


def test_interleaved_is_the_paper():
    table = sinusoids(torch.tensor([[0, 3, 1000]]), 6, dtype=torch.float64)
    for row, position in zip(table[0], (0, 3, 1000)):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            assert row[2 * i].item() == pytest.approx(math.sin(angle), abs=1e-12)
            assert row[2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-12)


def test_halves_is_marian():
    marian = MarianSinusoidalPositionalEmbedding(20, 8)
    weight = marian.create_weight()
    table = sinusoids(torch.arange(20)[None], 8, "halves", torch.float32)[0]
    torch.testing.assert_close(table, weight.to(table.dtype), atol=1e-5, rtol=0)


def test_clamped_distances_count_as_the_largest():
    waves = RelativeSinusoids(4, clamp_len=2)(5, torch.zeros(1))
    assert torch.equal(waves[0], waves[2])
    assert torch.equal(waves, sinusoids(torch.tensor([2.0, 2.0, 2.0, 1.0, 0.0]), 4, "halves"))


def test_shift_and_gather_bring_each_key_its_distance():
    queries, keys = 3, 7
    columns = torch.arange(keys, -1, -1.0).repeat(1, 1, queries, 1)  # the distance of each column
    key_positions = torch.arange(keys)
    distances = (key_positions[-queries:, None] - key_positions)[None]
    causal = distances[0] >= 0
    assert torch.equal(shift_rows(columns)[0, 0][causal], distances[0][causal].float())

    query, relative_key = torch.randn(1, 2, queries, 4), torch.randn(2, keys + 2, 4)
    shifted = RelativePositions(torch.zeros(keys + 2, 4), keys).scores(query, relative_key)
    gathered = RelativePositions(torch.zeros(keys + 2, 4), keys, distances).scores(query, relative_key)
    torch.testing.assert_close(shifted[..., causal], gathered[..., causal])


@pytest.mark.parametrize("reach", [None, 1, 4, 9])
@pytest.mark.parametrize("queries", [1, 3, 7])
def test_hidden_columns_are_the_keys_that_are_not_seen(queries, reach):
    keys = 7
    distances = torch.arange(keys)[-queries:, None] - torch.arange(keys)
    visible = (distances >= 0) & (distances < (reach or keys))
    hidden = hidden_columns(queries, keys, reach, torch.device("cpu"))
    positions = RelativePositions(torch.zeros(keys + 1, 4), keys, hidden=hidden)
    scores = positions.scores(torch.randn(2, 3, queries, 4), torch.randn(3, keys + 1, 4))
    assert torch.equal(scores > torch.finfo(scores.dtype).min, visible.expand_as(scores))


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="layout must be one of interleaved, halves, got 'thirds'"):
        sinusoids(torch.zeros(1), 4, "thirds")
    with pytest.raises(ValueError, match="dim must be even and at least 2, got 5"):
        sinusoids(torch.zeros(1), 5)
