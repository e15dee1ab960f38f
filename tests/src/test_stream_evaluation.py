"""Losses along a stream and with a given context, held to single forward passes; effective context to hand counting."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_tfamily.evaluation import relative_effective_context_length
from hf_tfamily.stream_evaluation import (
    context_losses,
    has_memory,
    has_rolling_cache,
    losses_by_position,
    relative_gain,
    stream_losses,
    with_attention_length,
)
from tests.tiny_models import tiny_model

START = 90
TEXT = np.random.default_rng(0).integers(0, START, 53)


def build(model_type, **changes):
    torch.manual_seed(0)
    return tiny_model(model_type, AutoModelForCausalLM, **changes)


def losses_of(model, inputs, targets):
    """One forward pass, float64 afterwards."""
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(inputs)[None], use_cache=False).logits[0].double()
    return -logits.log_softmax(-1)[torch.arange(len(targets)), torch.as_tensor(targets)].numpy()


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("transformer_xl", {"mem_len": 7, "same_length": True}),
        ("rope_decoder", {"attention_patterns": {"type": "local", "window": 7}}),
    ],
)
def test_what_is_carried_equals_one_pass(model_type, fields):
    model = build(model_type, **fields)
    expected = losses_of(model, [START, *TEXT[:-1]], TEXT)
    np.testing.assert_allclose(stream_losses(model, TEXT, 10, START), expected, atol=1e-5)
    halves = [losses_of(model, [START, *half[:-1]], half) for half in (TEXT[:27], TEXT[27:])]
    np.testing.assert_allclose(stream_losses(model, TEXT, 10, START, 2), np.concatenate(halves), atol=1e-5)


def test_without_memory_every_segment_is_read_by_itself():
    model = build("rope_decoder")
    assert not has_memory(model)
    assert not has_rolling_cache(model)
    read = [START, *TEXT]
    expected = [losses_of(model, read[i : min(i + 10, 53)], TEXT[i : i + 10]) for i in range(0, 53, 10)]
    np.testing.assert_allclose(stream_losses(model, TEXT, 10, START), np.concatenate(expected), atol=1e-5)


def test_losses_by_position_are_means_over_segments():
    # two streams of 5 and 4 tokens in segments of 2: places 0 1 0 1 0 | 0 1 0 1
    losses = np.array([1.0, 10, 2, 20, 3, 4, 30, 5, 40])
    np.testing.assert_allclose(losses_by_position(losses, 2, 2), [(1 + 2 + 3 + 4 + 5) / 5, (10 + 20 + 30 + 40) / 4])


@pytest.mark.parametrize(
    ("model_type", "fields", "seen"),
    [
        ("transformer_xl", {"mem_len": 60}, 11),
        ("transformer_xl", {"mem_len": 60, "segment_length": 3}, 11),
        ("rope_decoder", {"max_position_embeddings": 64}, 11),
        ("rope_decoder", {"max_position_embeddings": 6}, 6),  # reads no more than it has positions for
    ],
)
def test_context_is_all_that_is_seen(model_type, fields, seen):
    model = build(model_type, **fields)
    positions = np.array([11, 30, 52])
    measured = context_losses(model, TEXT, positions, 11, length=4, batch_size=2)
    expected = [losses_of(model, TEXT[p - seen : p], [0] * (seen - 1) + [TEXT[p]])[-1] for p in positions]
    np.testing.assert_allclose(measured, expected, atol=1e-5)


def test_context_must_be_there():
    with pytest.raises(ValueError, match="context must be from 1 to the 11 tokens before each position, got 12"):
        context_losses(build("rope_decoder"), TEXT, np.array([11, 30]), 12, length=4)


def test_attention_length_is_what_queries_see():
    trained = build("transformer_xl", mem_len=5)
    changed = with_attention_length(trained, 9, segment_length=4)
    assert (changed.config.mem_len, changed.config.same_length, changed.config.clamp_len) == (9, True, 8)
    assert trained.config.mem_len == 5
    expected = build("transformer_xl", mem_len=9, same_length=True, clamp_len=8)
    arguments = (TEXT, 4, START)
    np.testing.assert_allclose(stream_losses(changed, *arguments), stream_losses(expected, *arguments), atol=1e-6)

    compressive = build("compressive_transformer", mem_len=8, compressed_mem_len=4)
    assert with_attention_length(compressive, 20, 4).config.mem_len == 16
    rotary = with_attention_length(build("rope_decoder"), 9, 4)
    assert has_rolling_cache(rotary)
    with pytest.raises(ValueError, match="A sparse_transformer has no attention length to choose"):
        with_attention_length(build("sparse_transformer"), 9, 4)
    with pytest.raises(ValueError, match="attention_length=3 must be above the 4 slots"):
        with_attention_length(compressive, 3, 4)


def test_relative_gain_by_hand():
    shorter = np.array([[4.0, 3.0, 1.0, 2.0], [5.0, 2.0, 1.5, 2.0]])  # the best: 4, 2, 1, 2
    longer = np.array([3.0, 2.5, 0.0, 1.0])  # counts where it is better: 3, 2, 0, 1
    assert relative_gain(shorter, longer, r=1.0) == pytest.approx(1 - math.exp(6 / 4 - 9 / 4))
    assert relative_gain(shorter, longer, r=0.5) == pytest.approx(1 - math.exp(5 / 2 - 6 / 2))  # the hardest: 4, 2
    assert relative_gain(shorter, np.full(4, 9.0), r=1.0) == 0.0  # worse is not negative


def test_effective_context_ends_where_the_model_ends():
    """Seven positions are all that the first model reads; the second sees further, though untrained by chance only."""
    models = {"short": build("rope_decoder", max_position_embeddings=7), "long": build("transformer_xl", mem_len=40)}
    arguments = {"step": 7, "longest": 28, "num_positions": 20, "length": 8}
    lengths = relative_effective_context_length(models, TEXT, r=1.0, threshold=1e-9, **arguments)
    assert lengths["short"] == 7
    assert lengths["long"] > 7
    assert relative_effective_context_length(models, TEXT, threshold=2.0, **arguments) == {"short": 7, "long": 7}
    text = "In the beginning God created the heaven and the earth."
    byte_models = {"only": build("transformer_xl", vocab_size=257)}
    assert relative_effective_context_length(byte_models, text, threshold=0.0, **arguments) == {"only": 28}


def test_effective_context_says_what_is_wrong():
    models = {"only": build("transformer_xl")}
    with pytest.raises(ValueError, match="step=100, longest=1000 and the 53 tokens"):
        relative_effective_context_length(models, TEXT)
    with pytest.raises(ValueError, match="r must be above 0 and at most 1, got 0"):
        relative_effective_context_length(models, TEXT, r=0, step=1, longest=2)
