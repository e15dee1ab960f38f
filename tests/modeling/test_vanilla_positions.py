"""The position encodings of the vanilla Transformer: what attention knows with and without them, and what leaks."""

import pytest
import torch
from transformers import DynamicCache

from hf_tfamily.modeling.configuration_vanilla_encoder import VanillaEncoderConfig
from hf_tfamily.modeling.configuration_vanilla_transformer import POSITION_ENCODINGS, VanillaTransformerConfig
from hf_tfamily.modeling.modeling_vanilla_encoder import VanillaEncoderModel
from hf_tfamily.modeling.modeling_vanilla_transformer import VanillaTransformerForCausalLM
from hf_tfamily.modeling.positions import POSITION_SCHEMES, ShawInLayer

TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "max_relative_position": 3,
    "relative_attention_num_buckets": 4,
    "relative_attention_max_distance": 5,
    "dropout": 0.0,
}
encodings = pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
DISTANCE_ONLY = ("relative", "transformer_xl", "rotary", "alibi", "t5", "none")


def lively(model):
    """Weights large enough that every key and every position matters."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def encoder(encoding, implementation="sdpa", **fields):
    config = VanillaEncoderConfig(**{**TINY, "position_encoding": encoding, **fields})
    return lively(VanillaEncoderModel._from_config(config, attn_implementation=implementation))


def decoder(encoding, implementation="sdpa", **fields):
    config = VanillaTransformerConfig(**{**TINY, "position_encoding": encoding, **fields})
    return lively(VanillaTransformerForCausalLM._from_config(config, attn_implementation=implementation))


def backends_of(encoding):
    scheme = POSITION_SCHEMES[encoding]
    engine = ("block_sparse",) if scheme.as_data or not scheme.biases_scores else ()
    return ("eager", "sdpa", "flex_attention", *engine)


def ids(*shape):
    return torch.randint(3, TINY["vocab_size"], shape)


@encodings
@torch.no_grad()
def test_without_positions_attention_is_an_operation_on_sets(encoding):
    """Permuted tokens give permuted outputs with "none", and with nothing else."""
    model, tokens, order = encoder(encoding), ids(1, 8), torch.randperm(8)
    found, permuted = model(tokens).last_hidden_state[:, order], model(tokens[:, order]).last_hidden_state
    assert torch.allclose(found, permuted, atol=1e-5) == (encoding == "none")


@encodings
@torch.no_grad()
def test_what_knows_distances_alone_does_not_know_where_a_text_begins(encoding):
    model, tokens = encoder(encoding), ids(1, 8)
    here = model(tokens, position_ids=torch.arange(8)[None]).last_hidden_state
    there = model(tokens, position_ids=torch.arange(20, 28)[None]).last_hidden_state
    assert torch.allclose(here, there, atol=1e-4) == (encoding in DISTANCE_ONLY)


@encodings
@torch.no_grad()
def test_future_tokens_never_leak(encoding):
    """Change a token and everything after it: nothing before moves, on any backend, all at once and token by token."""
    tokens, changed = ids(2, 11), ids(2, 11)
    changed[:, :6] = tokens[:, :6]
    for implementation in backends_of(encoding):
        model = decoder(encoding, implementation)
        with torch.compiler.set_stance("force_eager"):
            before, after = model(tokens).logits, model(changed).logits
        torch.testing.assert_close(after[:, :6], before[:, :6], atol=1e-6, rtol=1e-6)
        assert not torch.allclose(after[:, 6], before[:, 6], atol=1e-2)
        cache, steps = DynamicCache(), []
        with torch.compiler.set_stance("force_eager"):
            for start, end in ((0, 4), (4, 5), (5, 6)):
                steps.append(model(tokens[:, start:end], past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), before[:, :6], atol=2e-5, rtol=1e-4)


@encodings
def test_gradients_never_flow_to_the_future(encoding):
    model = decoder(encoding)
    embeddings = model.get_input_embeddings()(ids(1, 9)).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits[:, 4].square().sum().backward()
    assert embeddings.grad[:, :5].abs().sum(dim=-1).all()
    assert not embeddings.grad[:, 5:].any()


@torch.no_grad()
def test_far_keys_are_alike_to_shaw():
    """Distances beyond k share an embedding: exchanging two such keys changes nothing (section 3.2)."""
    model = encoder("relative", num_hidden_layers=1)
    tokens = ids(1, 9)
    tokens[0, 4], tokens[0, 8] = 5, 6
    exchanged = tokens.clone()
    exchanged[0, 4], exchanged[0, 8] = 6, 5
    found, other = model(tokens).last_hidden_state[0], model(exchanged).last_hidden_state[0]
    torch.testing.assert_close(found[:2], other[:2], atol=1e-5, rtol=1e-5)  # distances 4 and more, k = 3
    assert not torch.allclose(found[2], other[2], atol=1e-3)  # distance 2


def test_shaw_has_2k_plus_1_vectors_a_layer_for_keys_and_for_values():
    plain, relative = (decoder(encoding).num_parameters() for encoding in ("none", "relative"))
    head_dim, layers, k = 8, 2, TINY["max_relative_position"]
    assert relative - plain == layers * 2 * (2 * k + 1) * head_dim


@torch.no_grad()
def test_shaws_unit_values_are_the_weights():
    """What comes back beside the values is the attention weights, whatever the backend."""
    model = encoder("relative", num_hidden_layers=1)
    layer = next(module for module in model.modules() if isinstance(module, ShawInLayer))
    outputs = []
    original = layer.collect
    layer.collect = lambda output, *rest: outputs.append(output) or original(output, *rest)
    tokens = ids(2, 6)
    for implementation in ("eager", "sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
        with torch.compiler.set_stance("force_eager"):
            model(tokens)
    model.set_attn_implementation("eager")
    weights = model(tokens, output_attentions=True).attentions[0].transpose(1, 2)  # [B, T, H, S]
    for output in outputs:
        torch.testing.assert_close(output[..., 8:], weights, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("encoding", ["sinusoidal", *DISTANCE_ONLY])
@torch.no_grad()
def test_there_is_no_longest_text(encoding):
    short = decoder(encoding, max_position_embeddings=4)
    assert short(ids(1, 30)).logits.isfinite().all()
    assert short.num_parameters() == decoder(encoding).num_parameters()


@pytest.mark.parametrize("encoding", ["learned", "learned_per_layer"])
def test_learned_positions_are_counted(encoding):
    model = decoder(encoding, max_position_embeddings=8)
    tables = 1 if encoding == "learned" else 2
    assert model.num_parameters() == decoder("none").num_parameters() + tables * 8 * 32
    with pytest.raises(ValueError, match="The model has 8 positions"):
        model(ids(1, 9))
    with pytest.raises(ValueError, match="The model has 8 positions"):
        model(ids(1, 2), position_ids=torch.tensor([[7, 8]]))
    padded = torch.nn.functional.pad(torch.ones(1, 8, dtype=torch.long), (4, 0))
    assert model(ids(1, 12), attention_mask=padded).logits.isfinite().all()  # padding takes up no position
