"""Rotary positions equal loops over RoFormer's equations, forward and backward, and depend on distance alone."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_tfamily.modeling import configuration_rope_decoder
from hf_tfamily.modeling.configuration_rope_decoder import RoPEDecoderConfig
from hf_tfamily.modeling.positions import ROTARY_LAYOUTS, RotaryEmbedding
from tests.reference.rope import rotate, rotate_all
from tests.src.test_conversion import ROPE

BASE, DIM = 100.0, 8
layouts = pytest.mark.parametrize("layout", ROTARY_LAYOUTS)


def angles(share=1.0, **fields):
    rope = {"rope_theta": BASE, "partial_rotary_factor": share}
    return RotaryEmbedding(
        RoPEDecoderConfig(hidden_size=2 * DIM, num_attention_heads=2, rope_parameters=rope, **fields)
    )


def turn(layout, embedding, states, positions):
    cos, sin = embedding(states, positions)
    return ROTARY_LAYOUTS[layout](states, cos[:, None], sin[:, None])


def test_the_config_knows_the_layouts():
    assert set(configuration_rope_decoder.LAYOUTS) == set(ROTARY_LAYOUTS)


@layouts
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_equals_the_loops_with_gradients(layout, share):
    states = torch.randn(2, 3, 5, DIM, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 3, 0, 90, 1]])
    output = turn(layout, angles(share), states, positions)
    expected = rotate_all(states.detach(), positions, BASE, layout, int(DIM * share))
    # The angles are float32: at position 90 that is an error of about 90 * 6e-8.
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=0)

    # A rotation's transpose turns back: the gradient of <y, R_m x> is R_-m y.
    upstream = torch.randn_like(states)
    (output * upstream).sum().backward()
    expected = rotate_all(upstream, -positions, BASE, layout, int(DIM * share))
    torch.testing.assert_close(states.grad, expected, atol=2e-5, rtol=0)


@layouts
def test_gradients_are_those_of_finite_differences(layout):
    states = torch.randn(1, 2, 3, DIM, dtype=torch.float64, requires_grad=True)
    embedding, positions = angles(), torch.arange(3)[None]
    assert torch.autograd.gradcheck(lambda x: turn(layout, embedding, x, positions), (states,))


@layouts
def test_a_score_depends_on_the_distance_alone(layout):
    query, key = torch.randn(2, 1, 1, 1, DIM, dtype=torch.float64)
    embedding = angles()

    def score(m, n):
        return (
            turn(layout, embedding, query, torch.tensor([[m]])) * turn(layout, embedding, key, torch.tensor([[n]]))
        ).sum()

    by_loops = rotate(query.flatten(), 3, BASE, layout, DIM) @ key.flatten().double()
    for shift in (0, 1, 50, 100):
        torch.testing.assert_close(score(shift + 3, shift), by_loops, atol=5e-5, rtol=0)
    assert abs(score(4, 0) - by_loops) > 1e-3


@pytest.mark.parametrize("rope", ROPE.values(), ids=ROPE)
@pytest.mark.parametrize("length", [6, 30])
def test_every_scaling_has_the_angles_of_llama(rope, length):
    fields = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 16}
    ours = RotaryEmbedding(RoPEDecoderConfig(rope_parameters=dict(rope), **fields))
    llama = LlamaRotaryEmbedding(LlamaConfig(rope_parameters=dict(rope), **fields))
    states, positions = torch.zeros(1, length, 32), torch.arange(length)[None]
    for one, other in zip(ours(states, positions), llama(states, positions)):
        assert torch.equal(one, other[..., :4])  # Llama repeats the angles for the second half


def test_dynamic_scaling_grows_and_returns():
    fields = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 16}
    embedding = RotaryEmbedding(RoPEDecoderConfig(rope_parameters=ROPE["dynamic"], **fields))
    short = torch.arange(8)[None]
    before, _ = embedding(torch.zeros(1), short)
    embedding(torch.zeros(1), torch.arange(40)[None])
    grown = embedding.inv_freq.clone()
    after, _ = embedding(torch.zeros(1), short)
    assert torch.equal(before, after)
    assert not torch.equal(grown, embedding.inv_freq)


def test_angles_stay_float32_when_the_model_is_cast():
    embedding = angles(max_position_embeddings=4096)
    states, positions = torch.zeros(1, 4096, 1), torch.arange(4096)[None]
    exact = embedding(states, positions)
    cast = embedding.to(torch.bfloat16)
    assert cast.inv_freq.dtype == torch.float32
    assert torch.equal(cast(states, positions)[0], exact[0])
    assert cast(states.bfloat16(), positions)[0].dtype == torch.bfloat16
    assert embedding.to("meta").inv_freq.device.type == "meta"
