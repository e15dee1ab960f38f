"""Vanilla encoder: equal to stock BERT, every backend, padding and packing, heads, configuration."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
)

from hf_tfamily.auto import register_all
from hf_tfamily.modeling.configuration_vanilla_encoder import VanillaEncoderConfig
from hf_tfamily.modeling.configuration_vanilla_transformer import POSITION_ENCODINGS
from hf_tfamily.modeling.modeling_vanilla_encoder import (
    VanillaEncoder,
    VanillaEncoderForMaskedLM,
    VanillaEncoderForSequenceClassification,
    VanillaEncoderModel,
)

register_all()

TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
BACKENDS = ("eager", "sdpa", "flex_attention", "block_sparse")
PATTERNS = {
    "none": None,
    "layers": [{"type": "local", "window": 3}, {"type": "strided", "stride": 3}],
    "heads": {
        "type": "per_head",
        "patterns": [{"type": "local", "window": 3}, {"type": "fixed", "block": 4, "summary": 1}],
    },
}
patterns = pytest.mark.parametrize("pattern", PATTERNS)


def encoder(model_class=VanillaEncoderModel, implementation="sdpa", **fields):
    torch.manual_seed(0)
    config = VanillaEncoderConfig(**{**TINY, "dropout": 0.0, **fields})
    model = model_class._from_config(config, attn_implementation=implementation).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def ids(*shape):
    return torch.randint(3, TINY["vocab_size"], shape)


RENAMED = {
    "bert.embeddings.word_embeddings.": "model.embed_tokens.",
    "bert.embeddings.position_embeddings.": "model.positions.table.",
    "bert.embeddings.token_type_embeddings.": "model.embed_types.",
    "bert.embeddings.LayerNorm.": "model.embedding_norm.",
    "bert.encoder.layer.": "model.layers.",
    "attention.self.query.": "self_attn.q_proj.",
    "attention.self.key.": "self_attn.k_proj.",
    "attention.self.value.": "self_attn.v_proj.",
    "attention.output.dense.": "self_attn.o_proj.",
    "attention.output.LayerNorm.": "self_attn_residual.norm.",
    "intermediate.dense.": "mlp.up_proj.",
    "output.dense.": "mlp.down_proj.",
    "output.LayerNorm.": "mlp_residual.norm.",
    "bert.pooler.dense.": "pooler.",
    "classifier.": "score.",
    "cls.predictions.transform.dense.": "transform.",
    "cls.predictions.transform.LayerNorm.": "transform_norm.",
    "cls.predictions.decoder.": "lm_head.",
}


def with_weights_of(stock, model):
    weights = {}
    for name, tensor in stock.state_dict().items():
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        weights[name] = tensor
    weights.pop("cls.predictions.bias", None)  # the same tensor as the decoder's
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize(
    ("stock_class", "model_class"),
    [
        (BertForMaskedLM, VanillaEncoderForMaskedLM),
        (BertForSequenceClassification, VanillaEncoderForSequenceClassification),
    ],
)
@torch.no_grad()
def test_equals_bert(stock_class, model_class):
    torch.manual_seed(0)
    stock = stock_class(BertConfig(**TINY, initializer_range=0.2, num_labels=3)).eval()
    model = with_weights_of(stock, encoder(model_class, num_labels=3))
    batch = {"input_ids": ids(2, 9), "token_type_ids": torch.randint(0, 2, (2, 9))}
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    found, expected = (m(**batch, attention_mask=mask).logits for m in (model, stock))
    real = mask.bool() if found.ndim == 3 else slice(None)
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)


@patterns
def test_backends_agree(pattern):
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, :4], mask[1, 8:] = 0, 0
    tokens, real = ids(3, 11), mask.bool()
    fields = {"attention_patterns": PATTERNS[pattern]}
    expected = encoder(implementation="eager", **fields).double()(tokens, attention_mask=mask).last_hidden_state
    for implementation in BACKENDS:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            found = encoder(implementation=implementation, **fields)(tokens, attention_mask=mask).last_hidden_state
        assert found.isfinite().all()
        torch.testing.assert_close(found[real].double(), expected[real], atol=1e-5, rtol=1e-5, msg=implementation)


@patterns
def test_gradients_agree(pattern):
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    tokens, labels = ids(2, 9), ids(2, 9).masked_fill(mask == 0, -100)

    def gradients(implementation):
        model = encoder(VanillaEncoderForMaskedLM, implementation, attention_patterns=PATTERNS[pattern]).train()
        model(tokens, attention_mask=mask, labels=labels).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients("eager")
    for implementation in ("sdpa", "block_sparse"):
        for name, gradient in gradients(implementation).items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@patterns
@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
@torch.no_grad()
def test_padding_and_packing_change_no_token(pattern, encoding):
    model = encoder(position_encoding=encoding, attention_patterns=PATTERNS[pattern])
    first, second = ids(1, 5), ids(1, 6)
    alone = torch.cat((model(first).last_hidden_state, model(second).last_hidden_state), dim=1)
    positions = torch.cat((torch.arange(5), torch.arange(6)))[None]
    packed = model(torch.cat((first, second), dim=1), position_ids=positions).last_hidden_state
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)
    for left, right in ((3, 0), (0, 4)):
        padded = torch.nn.functional.pad(first, (left, right), value=7)
        mask = torch.nn.functional.pad(torch.ones_like(first), (left, right))
        found = model(padded, attention_mask=mask).last_hidden_state[:, left : left + 5]
        torch.testing.assert_close(found, alone[:, :5], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_class_is_read_off_the_first_token():
    model, tokens = encoder(VanillaEncoderForSequenceClassification), ids(1, 5)
    alone = model(tokens).logits
    for left, right in ((3, 0), (0, 4)):
        padded = torch.nn.functional.pad(tokens, (left, right))
        mask = torch.nn.functional.pad(torch.ones_like(tokens), (left, right))
        torch.testing.assert_close(model(padded, attention_mask=mask).logits, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({"num_labels": 3}, torch.tensor([0, 2])),
        ({"num_labels": 1}, torch.tensor([0.5, -1.0])),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.tensor([[0.0, 1, 1], [1, 0, 0]])),
    ],
)
def test_the_classifier_learns(fields, labels):
    model = encoder(VanillaEncoderForSequenceClassification, **fields).train()
    model(ids(2, 6), labels=labels).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_token_types_matter_only_where_there_are_any():
    tokens, types = ids(1, 6), torch.tensor([[0, 0, 0, 1, 1, 1]])
    model = encoder()
    assert not torch.allclose(model(tokens, token_type_ids=types)[0], model(tokens)[0], atol=1e-2)
    torch.testing.assert_close(model(tokens, token_type_ids=torch.zeros_like(types))[0], model(tokens)[0])
    plain = encoder(type_vocab_size=0, embedding_norm=False)
    assert "embed_types" not in dict(plain.named_children())
    plain(tokens, token_type_ids=torch.zeros_like(types))
    for bad, limit in ((plain, 0), (model, 1)):
        with pytest.raises(ValueError, match=rf"token_type_ids must lie in \[0, {limit}\]"):
            bad(tokens, token_type_ids=types + (bad is model))
    with pytest.raises(ValueError, match=r"token_type_ids must have shape \[1, 6\], got \[1, 5\]"):
        model(tokens, token_type_ids=types[:, :5])


def test_compiles_without_graph_breaks():
    model, tokens = encoder(VanillaEncoderForMaskedLM, attention_patterns=PATTERNS["layers"]), ids(2, 7)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens, labels=tokens).loss, model(tokens, labels=tokens).loss)


def test_auto_classes():
    config = VanillaEncoderConfig(**TINY)
    assert type(AutoModel.from_config(config)) is VanillaEncoderModel is VanillaEncoder
    assert type(AutoModelForMaskedLM.from_config(config)) is VanillaEncoderForMaskedLM
    assert type(AutoModelForSequenceClassification.from_config(config)) is VanillaEncoderForSequenceClassification
    assert encoder(implementation=None).config._attn_implementation == "sdpa"
    patterned = encoder(implementation=None, attention_patterns=PATTERNS["layers"])
    assert patterned.config._attn_implementation == "block_sparse"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type_vocab_size": -1}, "type_vocab_size must be at least 0, got -1"),
        ({"classifier_dropout": 1.0}, "classifier_dropout must be at least 0 and below 1, got 1.0"),
        ({"num_attention_heads": 5}, "hidden_size=768 is not a multiple of num_attention_heads=5"),
        ({"position_encoding": "absolute"}, "position_encoding='absolute' is unknown"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(Exception, match=message):
        VanillaEncoderConfig(**fields)


def test_bad_inputs():
    model = encoder()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="attention_mask has no token in row 0"):
        model(ids(1, 3), attention_mask=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="The model has 64 positions"):
        model(ids(1, 65))
