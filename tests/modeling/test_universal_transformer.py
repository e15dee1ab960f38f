"""Universal Transformer: the paper restated, steps of a cache, halting, its cost, what is refused."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache

from hf_tfamily import (
    Local,
    Strided,
    UniversalTransformerConfig,
    UniversalTransformerForCausalLM,
    UniversalTransformerForConditionalGeneration,
    UniversalTransformerModel,
)
from hf_tfamily.modeling.modeling_universal_transformer import AdaptiveDepth
from tests.reference.universal_transformer import universal_transformer

TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "decoder_layers": 6,
    "num_attention_heads": 4,
    "dropout": 0.0,
}
adaptive = pytest.mark.parametrize("adaptive", [False, True])
norms = pytest.mark.parametrize("norm_first", [False, True])


def made(model_class=UniversalTransformerForConditionalGeneration, implementation="eager", **fields):
    """The same weights for the same fields; positions that halt after one step, and others that never do."""
    torch.manual_seed(0)
    config = UniversalTransformerConfig(**{**TINY, **fields})
    model = model_class._from_config(config, attn_implementation=implementation).eval()
    for name, parameter in model.named_parameters():
        if "lm_head" not in name:
            parameter.data.add_(0.15 * torch.randn_like(parameter))
    for depth in (module for module in model.modules() if isinstance(module, AdaptiveDepth)):
        depth.halting.weight.data.mul_(3)
        depth.halting.weight.data[:, 1::2] = 0  # where the waves of low positions are all near 1
        depth.halting.bias.data.fill_(-0.5)
    return model


def ids(*shape):
    return torch.randint(3, TINY["vocab_size"], shape)


@adaptive
@norms
@pytest.mark.parametrize("encoding", ["sinusoidal", "rotary"])
@torch.no_grad()
def test_equals_the_paper_restated(adaptive, norm_first, encoding):
    fields = {"adaptive": adaptive, "norm_first": norm_first, "position_encoding": encoding}
    model = made(UniversalTransformerModel, **fields).double()
    source, target = ids(2, 7), ids(2, 6)
    found = model(source, decoder_input_ids=target)
    for row in range(2):
        states, ponder, encoder_ponder = universal_transformer(model, source[row], target[row])
        torch.testing.assert_close(found.last_hidden_state[row], states, atol=1e-6, rtol=1e-6)
        if adaptive:
            torch.testing.assert_close(found.ponder[row], ponder, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(found.encoder_ponder[row], encoder_ponder, atol=1e-6, rtol=1e-6)
    if adaptive:
        steps = found.ponder.floor().unique()
        assert len(steps) > 1, f"only {steps} steps were taken; weights are too alike for this test"


def test_has_the_weights_of_one_block():
    one, six = made(decoder_layers=1, num_hidden_layers=1), made(decoder_layers=6, num_hidden_layers=5)
    assert one.num_parameters() == six.num_parameters()
    assert len(six.model.encoder.layers) == len(six.model.decoder.layers) == 1


@adaptive
@norms
@pytest.mark.parametrize("pattern", [None, [Local(3).to_dict(), Strided(2).to_dict()]])
@torch.no_grad()
def test_a_cache_goes_by_step(adaptive, norm_first, pattern):
    """Token by token is all at once, also where later tokens take steps that earlier ones did not."""
    fields = {"adaptive": adaptive, "norm_first": norm_first, "attention_patterns": pattern}
    model = made(UniversalTransformerForCausalLM, **fields).double()
    row = ids(2, 9)
    whole = model(row).logits
    cache, found = DynamicCache(), []
    for token in row.split([3, 1, 1, 2, 1, 1], dim=1):
        found.append(model(token, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=1e-6, rtol=1e-6)
    assert len(cache.layers) == TINY["decoder_layers"]
    assert all(layer.keys.shape[2] == row.shape[1] for layer in cache.layers)


@adaptive
@pytest.mark.parametrize("pattern", [None, Local(3).to_dict()])
def test_generates_with_and_without_a_cache(adaptive, pattern):
    for model, inputs in (
        (
            made(UniversalTransformerForCausalLM, adaptive=adaptive, attention_patterns=pattern),
            {"input_ids": ids(2, 5)},
        ),
        (made(adaptive=adaptive, attention_patterns=pattern), {"input_ids": ids(2, 5)}),
    ):
        how = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
        for beams in (1, 2):
            without = model.generate(**inputs, **how, use_cache=False, num_beams=beams)
            assert torch.equal(model.generate(**inputs, **how, num_beams=beams), without)


@torch.no_grad()
def test_a_source_is_kept_once():
    model = made(adaptive=True)
    cache = model(input_ids=ids(2, 5), decoder_input_ids=ids(2, 4), use_cache=True).past_key_values
    assert len(cache.cross_attention_cache.layers) == 1
    assert len(cache.self_attention_cache.layers) == TINY["decoder_layers"]


@adaptive
@pytest.mark.parametrize("implementation", ["sdpa", "block_sparse"])
def test_backends_agree_in_outputs_and_gradients(adaptive, implementation):
    pattern = [Local(3).to_dict(), Strided(2).to_dict()]
    source, target = ids(2, 9), ids(2, 7)
    padding = torch.ones_like(source)
    padding[0, :2] = padding[1, 7:] = 0
    results = []
    for backend in ("eager", implementation):
        model = made(implementation=backend, adaptive=adaptive, attention_patterns=pattern).train()
        output = model(source, padding, labels=target)
        output.loss.backward()
        gradients = [p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None]
        results.append((output.logits, output.loss, torch.cat(gradients)))
    for found, expected in zip(*results[::-1]):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def steps_of(model):
    """How often the decoder's block was applied since."""
    called = []
    model.model.decoder.layers[0].register_forward_hook(lambda *_: called.append(1))
    return called


@torch.no_grad()
def test_halted_positions_cost_nothing():
    model = made(UniversalTransformerForCausalLM, adaptive=True)
    model.model.decoder.depth.halting.bias.data.fill_(50.0)
    called = steps_of(model)
    output = model(ids(2, 4), use_cache=True)
    assert len(called) == 1
    assert (output.ponder == 2).all()
    assert output.past_key_values.layers[-1].keys.shape[2] == 4
    model.model.decoder.depth.halting.bias.data.fill_(-50.0)
    called.clear()
    assert (model(ids(2, 4)).ponder == 7).all()
    assert len(called) == 6


def test_other_rows_and_padding_change_nothing():
    model = made(UniversalTransformerForCausalLM, adaptive=True)
    row = ids(1, 6)
    with torch.no_grad():
        alone = model(row)
        beside = model(torch.cat([row, ids(3, 6)]))
        padded = model(torch.cat([ids(1, 2), row], 1), torch.tensor([[0] * 2 + [1] * 6]))
    torch.testing.assert_close(beside.logits[:1], alone.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded.logits[:, 2:], alone.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded.ponder[:, 2:], alone.ponder, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What pondering costs


def test_the_cost_is_paid_in_training_alone_and_teaches_to_halt():
    labels = ids(2, 6)
    labels[1, 4:] = -100
    batch = {"input_ids": ids(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long), "labels": labels}
    batch["attention_mask"][0, 5:] = 0
    model = made(adaptive=True, ponder_cost=0.5)
    in_evaluation = model(**batch).loss
    output = model.train()(**batch)
    counted = labels != -100
    encoders = [output.encoder_ponder[0, :5].mean(), output.encoder_ponder[1].mean()]
    cost = output.ponder[counted].sum() + sum(m * n for m, n in zip(encoders, counted.sum(1)))
    torch.testing.assert_close(output.loss, in_evaluation + 0.5 * cost / counted.sum())
    (output.loss - in_evaluation.detach()).backward()
    assert all(depth.halting.bias.grad.abs() > 0 for depth in (model.model.encoder.depth, model.model.decoder.depth))


def test_a_free_step_costs_nothing():
    batch = {"input_ids": ids(2, 8), "labels": ids(2, 8)}
    model = made(UniversalTransformerForCausalLM, adaptive=True, ponder_cost=0)
    assert model(**batch).loss == model.train()(**batch).loss


def test_a_loss_outside_would_lose_the_cost():
    model = made(adaptive=True).train()
    with pytest.raises(ValueError, match="halting learns by a cost that only the model has"):
        model(input_ids=ids(2, 8), decoder_input_ids=ids(2, 8), num_items_in_batch=16)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"decoder_layers": 0}, "decoder_layers"),
        ({"halting_threshold": 0}, "halting_threshold must be above 0 and at most 1, got 0"),
        ({"halting_threshold": 1.5}, "halting_threshold must be above 0 and at most 1, got 1.5"),
        ({"ponder_cost": -1}, "ponder_cost"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        UniversalTransformerConfig(**{**TINY, **fields})


def test_auto_classes_and_saved_weights(tmp_path):
    for auto, model in (
        (AutoModelForSeq2SeqLM, made(adaptive=True)),
        (AutoModelForCausalLM, made(UniversalTransformerForCausalLM, adaptive=True)),
    ):
        model.save_pretrained(tmp_path)
        again = auto.from_pretrained(tmp_path, attn_implementation="eager")
        assert type(again) is type(model)
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, again.state_dict()[name]), name
