"""Longformer and BigBird there and back: equal outputs and gradients at every length, the rest refused."""

import pytest
import torch
from transformers import (
    BigBirdConfig,
    BigBirdForMaskedLM,
    BigBirdForPreTraining,
    BigBirdForSequenceClassification,
    BigBirdForTokenClassification,
    BigBirdModel,
    LongformerConfig,
    LongformerForMaskedLM,
    LongformerForQuestionAnswering,
    LongformerForSequenceClassification,
    LongformerForTokenClassification,
    LongformerModel,
)

from hf_tfamily.auto import register_all
from hf_tfamily.conversion import big_bird as big_bird_conversion
from hf_tfamily.conversion import convert
from hf_tfamily.conversion import longformer as longformer_conversion
from hf_tfamily.conversion.checkpoint import model_class_of, read_config
from hf_tfamily.modeling.configuration_long_encoder import LongEncoderConfig
from hf_tfamily.modeling.modeling_long_encoder import LongEncoderForMaskedLM

register_all()

TINY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LONGFORMERS = (
    LongformerModel,
    LongformerForMaskedLM,
    LongformerForSequenceClassification,
    LongformerForTokenClassification,
    LongformerForQuestionAnswering,
)
each_longformer = pytest.mark.parametrize("model_class", LONGFORMERS)
SEPARATOR = 2


def longformer(model_class, **fields):
    torch.manual_seed(0)
    fields = {"attention_window": [4, 8], "max_position_embeddings": 66, "layer_norm_eps": 1e-5, **fields}
    model = model_class(LongformerConfig(**TINY, **fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pooler" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(length, padded=False, pad=1):
    """Two rows whose questions of different lengths end with a separator; two more separators follow."""
    torch.manual_seed(length)
    ids = torch.randint(5, 60, (2, length))
    if length >= 6:
        ids[0, [1, 2, -1]] = ids[1, [3, 4, -1]] = SEPARATOR
    mask = torch.ones_like(ids)
    if padded:
        ids[1, 5 * length // 6 :], mask[1, 5 * length // 6 :] = pad, 0
        ids[1, 5 * length // 6 - 1] = SEPARATOR
    return {"input_ids": ids, "attention_mask": mask}


def outputs(model, inputs):
    found = model(**inputs)
    return [found.start_logits, found.end_logits] if "start_logits" in found else [found[0]]


def outputs_and_gradients(model, inputs):
    """What the model says of tokens, and the gradient of each of its weights by the number of the tensor's elements."""
    model.zero_grad()
    found = outputs(model, inputs)
    valid = inputs["attention_mask"].bool()
    found = [tensor[valid] if tensor.shape[:2] == valid.shape else tensor for tensor in found]
    sum((tensor * torch.linspace(-1, 1, tensor.numel()).view_as(tensor)).sum() for tensor in found).backward()
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def load(folder, **how):
    return model_class_of(read_config(folder)).from_pretrained(folder, **how).eval()


def assert_equal(found, expected, inputs):
    (ours, our_gradients), (theirs, their_gradients) = (outputs_and_gradients(m, inputs) for m in (found, expected))
    for mine, wanted in zip(ours, theirs):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)
    theirs_as_ours = renamed_as(found, expected, their_gradients)
    assert our_gradients.keys() == theirs_as_ours.keys()
    for name, gradient in theirs_as_ours.items():
        error = (our_gradients[name] - gradient).abs().max()
        assert error <= 5e-5 * gradient.abs().max().clamp(min=1.0), name  # of the largest; those of key biases are 0
    norms = [
        sum(g.double().square().sum() for g in gradients.values()) for gradients in (our_gradients, their_gradients)
    ]
    torch.testing.assert_close(*norms, atol=1e-5, rtol=1e-5)


def renamed_as(found, expected, gradients):
    """Stock gradients under the names that their weights have in the other model: a gradient converts as its weight."""
    if type(found) is type(expected):
        return gradients
    config = {**expected.config.to_dict(), "architectures": [type(expected).__name__]}
    to_ours = longformer_conversion.to_ours if config["model_type"] == "longformer" else big_bird_conversion.to_ours
    return to_ours(config, gradients)[1]


@each_longformer
def test_longformer_there_and_back(model_class, tmp_path):
    stock = longformer(model_class)
    stock.save_pretrained(tmp_path / "stock")
    result = convert(tmp_path / "stock", tmp_path / "ours")
    assert result.architecture == model_class.__name__.replace("Longformer", "LongEncoder")
    ours = load(tmp_path / "ours")
    assert ours.config._attn_implementation == "block_sparse"
    assert ours.config.max_position_embeddings == 64
    convert(tmp_path / "ours", tmp_path / "back")
    back = load(tmp_path / "back")
    assert type(back) is model_class
    for length in (6, 7, 12, 23, 64):
        for padded in (False, True):
            inputs = batch(length, padded and length > 7)
            assert_equal(ours, stock, inputs)
            marked = torch.zeros_like(inputs["input_ids"])
            marked[0, [0, 4]] = marked[1, 2] = 1
            assert_equal(ours, stock, {**inputs, "global_attention_mask": marked})
            assert_equal(back, stock, inputs)
    kept = {name: tensor for name, tensor in stock.state_dict().items() if "pooler" not in name}
    for name, tensor in kept.items():
        tensor = tensor[2:] if name.endswith("position_embeddings.weight") else tensor
        found = back.state_dict()[name]
        assert torch.equal(found[-len(tensor) :], tensor), name


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_longformer_under_every_backend(implementation, tmp_path):
    stock = longformer(LongformerForSequenceClassification)
    stock.save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "ours")
    ours = load(tmp_path / "ours", attn_implementation=implementation)
    with torch.compiler.set_stance("force_eager"):
        found = ours(**batch(23, True)).logits
    torch.testing.assert_close(found, stock(**batch(23, True)).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_patterns": {"type": "strided", "stride": 3}}, "Longformer has windows alone"),
        ({"attention_patterns": {"type": "local", "window": 3, "dilation": 2}}, "'dilation': 2"),
        (
            {"global_projections": False},
            "global_projections=True built in, but this model has global_projections=False",
        ),
        ({"global_tokens": "first"}, "has global_tokens='by_task' built in, but this model has global_tokens='first'"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
    ],
)
def test_what_longformer_cannot_say(fields, message, tmp_path):
    sizes = {name: TINY[name] for name in list(TINY)[:5]}
    config = LongEncoderConfig(**{**sizes, "attention_patterns": {"type": "local", "window": 3}, **fields})
    LongEncoderForMaskedLM(config).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "ours", tmp_path / "stock", "longformer")


BIG_BIRDS = (BigBirdModel, BigBirdForMaskedLM, BigBirdForSequenceClassification, BigBirdForTokenClassification)


def big_bird(model_class, **fields):
    """In training mode, in which stock draws random blocks."""
    torch.manual_seed(0)
    fields = {"block_size": 4, "num_random_blocks": 2, "max_position_embeddings": 80, **fields}
    model = model_class(BigBirdConfig(**TINY, **fields)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pooler" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("model_class", BIG_BIRDS)
def test_big_bird_there_and_back(model_class, tmp_path):
    stock = big_bird(model_class)
    stock.save_pretrained(tmp_path / "stock")
    result = convert(tmp_path / "stock", tmp_path / "ours")
    assert result.architecture == model_class.__name__.replace("BigBird", "LongEncoder")
    ours = load(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", "big_bird")
    back = load(tmp_path / "back").train()
    assert type(back) is model_class
    for length in (37, 40, 59, 62, 80):  # at up to 36 tokens stock switches to full attention
        for padded in (False, True):
            inputs = batch(length, pad=0)
            if padded:  # inside the last block: stock counts global blocks in slots
                spare = max((length - 1) % 4, 0)
                inputs["attention_mask"][1, length - spare :] = 0
            assert_equal(ours, stock, inputs)
            assert_equal(back, stock, inputs)
    kept = {name: tensor for name, tensor in stock.state_dict().items() if "pooler" not in name}
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("longest", [1024, 3072, 4096])
@torch.no_grad()
def test_big_bird_at_the_lengths_of_its_paper(longest, tmp_path):
    stock = big_bird(BigBirdModel, max_position_embeddings=longest, block_size=64, num_random_blocks=3)
    stock.save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "ours")
    length = longest - 10
    inputs = batch(length)
    inputs["attention_mask"] = None
    if longest == 1024:  # where stock shows some blocks twice
        assert load(tmp_path / "ours")(**inputs)[0].isfinite().all()
        return
    torch.testing.assert_close(load(tmp_path / "ours")(**inputs)[0], stock(**inputs)[0], atol=1e-5, rtol=1e-5)


def test_big_bird_for_pretraining_becomes_a_masked_lm(tmp_path):
    stock = big_bird(BigBirdForPreTraining)
    stock.save_pretrained(tmp_path / "stock")
    assert convert(tmp_path / "stock", tmp_path / "ours").architecture == "LongEncoderForMaskedLM"
    inputs = batch(40)
    with torch.no_grad():
        found, expected = load(tmp_path / "ours")(**inputs).logits, stock(**inputs).prediction_logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_big_birds_full_attention(tmp_path):
    stock = big_bird(BigBirdForMaskedLM, attention_type="original_full").eval()
    stock.save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "ours")
    inputs = batch(40)
    torch.testing.assert_close(load(tmp_path / "ours")(**inputs)[0], stock(**inputs)[0], atol=1e-5, rtol=1e-5)
    convert(tmp_path / "ours", tmp_path / "back", "big_bird")
    assert load(tmp_path / "back").config.attention_type == "original_full"
