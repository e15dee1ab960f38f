"""BERT and RoBERTa made long: short texts come out as before, positions are copied, and the rest is refused."""

import json

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LongformerForMaskedLM,
    LongformerForSequenceClassification,
    LongformerModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
)
from typer.testing import CliRunner

from hf_tfamily.auto import register_all
from hf_tfamily.conversion import Length, convert
from hf_tfamily.conversion.checkpoint import model_class_of, read_config
from hf_tfamily.data import byte_tokenizer
from hf_tfamily_cli import app

register_all()

TINY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "sep_token_id": 2,
}
BERTS = (
    *(BertModel, BertForMaskedLM, BertForPreTraining, BertForSequenceClassification),
    *(BertForTokenClassification, BertForQuestionAnswering),
)
ROBERTAS = (
    *(RobertaModel, RobertaForMaskedLM, RobertaForSequenceClassification),
    *(RobertaForTokenClassification, RobertaForQuestionAnswering),
)
POSITIONS = 20
COPIED = ("query", "key", "value")


def stock(model_class, **fields):
    torch.manual_seed(0)
    is_roberta = model_class in ROBERTAS
    positions = {"max_position_embeddings": POSITIONS + 2, "pad_token_id": 1} if is_roberta else {"pad_token_id": 1}
    config_class = RobertaConfig if is_roberta else BertConfig
    config = config_class(**{**TINY, "max_position_embeddings": POSITIONS, **positions, **fields})
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def made_long(model, folder, target=None, positions=70, window=40):
    model.save_pretrained(folder / "stock")
    convert(folder / "stock", folder / "long", target, length=Length(positions, window))
    return model_class_of(read_config(folder / "long")).from_pretrained(folder / "long").eval()


def batch(length, padded):
    torch.manual_seed(length)
    ids = torch.randint(5, 60, (2, length))
    ids[:, length // 3] = TINY["sep_token_id"]
    ids[:, -1] = TINY["sep_token_id"]
    mask = torch.ones_like(ids)
    if padded:
        ids[1, length - 3 :], mask[1, length - 3 :] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


def outputs_and_gradients(model, inputs):
    model.zero_grad()
    found = model(**inputs)
    found = [found.start_logits, found.end_logits] if "start_logits" in found else [found[0]]
    valid = inputs["attention_mask"].bool()
    found = [tensor[valid] if tensor.shape[:2] == valid.shape else tensor for tensor in found]
    sum((tensor * torch.linspace(-1, 1, tensor.numel()).view_as(tensor)).sum() for tensor in found).backward()
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_class", [*BERTS, *ROBERTAS], ids=lambda cls: cls.__name__)
def test_short_texts_come_out_as_before(model_class, tmp_path):
    """Also their gradients, weight by weight: those of a weight and of its global copy add up."""
    theirs = stock(model_class)
    ours = made_long(theirs, tmp_path)
    assert ours.config.model_type == "long_encoder"
    assert ours.config._attn_implementation == "block_sparse"
    names = name_map(theirs, ours)
    for length, padded in ((7, False), (POSITIONS, True)):
        inputs = batch(length, padded)
        (found, gradients), (expected, their_gradients) = (outputs_and_gradients(m, inputs) for m in (ours, theirs))
        for mine, wanted in zip(found, expected):
            torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)
        compared = 0
        for name, gradient in their_gradients.items():
            rows = gradient[unused_rows(theirs, name) :]
            copies = [gradients[copy][: len(rows)] for copy in names[name] if copy in gradients]
            torch.testing.assert_close(sum(copies), rows, atol=1e-5, rtol=1e-4, msg=name)
            compared += 1
        assert compared >= 30


def unused_rows(theirs, name):
    return 2 if type(theirs) in ROBERTAS and "position_embeddings" in name else 0


def name_map(theirs, ours):
    """Of each weight of theirs, those of ours with the same numbers (positions: with the same first row)."""
    found = {}
    for name, tensor in theirs.named_parameters():
        rows = tensor[unused_rows(theirs, name) :]
        found[name] = [
            other
            for other, copy in ours.named_parameters()
            if copy.shape[1:] == rows.shape[1:] and len(copy) >= len(rows) and torch.equal(copy[: len(rows)], rows)
        ]
        assert found[name] or "pooler" in name or "seq_relationship" in name, name
    return found


@pytest.mark.parametrize("model_class", [BertModel, RobertaModel])
def test_positions_and_projections_are_copied(model_class, tmp_path):
    theirs = stock(model_class)
    ours = made_long(theirs, tmp_path, positions=47)
    unused = 2 if model_class is RobertaModel else 0
    rows = theirs.embeddings.position_embeddings.weight[unused:]
    table = ours.positions.table.weight
    assert table.shape[0] == ours.config.max_position_embeddings == 47
    for place in range(47):
        assert torch.equal(table[place], rows[place % POSITIONS])
    attention = ours.layers[0].self_attn
    for name in ("q", "k", "v"):
        usual, copy = (getattr(attention, f"{prefix}{name}_proj") for prefix in ("", "global_"))
        assert torch.equal(usual.weight, copy.weight)
        assert usual.weight.data_ptr() != copy.weight.data_ptr()
    assert torch.isfinite(ours(**batch(47, True))[0]).all()


@pytest.mark.parametrize(
    ("model_class", "target_class"),
    [
        (BertModel, LongformerModel),
        (BertForMaskedLM, LongformerForMaskedLM),
        (RobertaForSequenceClassification, LongformerForSequenceClassification),
    ],
)
@torch.no_grad()
def test_stock_longformer_at_once(model_class, target_class, tmp_path):
    theirs = stock(model_class)
    long = made_long(theirs, tmp_path, "longformer")
    assert type(long) is target_class
    assert long.config.attention_window == [40, 40]
    assert long.config.max_position_embeddings == 72
    inputs = batch(POSITIONS, True)
    valid = inputs["attention_mask"].bool()
    found, expected = long(**inputs)[0], theirs(**inputs)[0]
    pick = (lambda x: x[valid]) if found.shape[:2] == valid.shape else (lambda x: x)
    torch.testing.assert_close(pick(found), pick(expected), atol=1e-5, rtol=1e-5)


def test_a_windows_edge_is_where_it_differs(tmp_path):
    """Half a window and more away tokens are no longer seen."""
    theirs = stock(BertModel)
    ours = made_long(theirs, tmp_path, window=8)
    short, longer = batch(5, False), batch(12, False)
    with torch.no_grad():
        torch.testing.assert_close(ours(**short)[0], theirs(**short)[0], atol=1e-5, rtol=1e-5)
        assert (ours(**longer)[0] - theirs(**longer)[0]).abs().max() > 1e-2


def test_the_command_and_the_tokenizer(tmp_path):
    stock(BertForMaskedLM, vocab_size=257).save_pretrained(tmp_path / "stock")
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = POSITIONS
    tokenizer.save_pretrained(tmp_path / "stock")
    command = ["convert", str(tmp_path / "stock"), str(tmp_path / "long"), "--max-positions", "64", "--check"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "LongEncoderForMaskedLM (long_encoder)" in result.output
    assert AutoTokenizer.from_pretrained(tmp_path / "long").model_max_length == 64
    assert json.loads((tmp_path / "stock" / "tokenizer_config.json").read_text())["model_max_length"] == POSITIONS
    config = read_config(tmp_path / "long")
    assert config["attention_patterns"] == {"type": "local", "window": 257}


@pytest.mark.parametrize(
    ("fields", "length", "said"),
    [
        ({}, Length(19), "max_positions=19 is less than the 20 that the model has"),
        ({"is_decoder": True}, None, "needs is_decoder=False"),
        ({"architectures": ["BertForNextSentencePrediction"]}, None, "no counterpart of BertForNextSentencePrediction"),
    ],
)
def test_what_cannot_become_long_is_refused(fields, length, said, tmp_path):
    model = stock(BertModel)
    model.save_pretrained(tmp_path / "stock")
    file = tmp_path / "stock" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(ValueError, match=said):
        convert(tmp_path / "stock", tmp_path / "long", length=length)


def test_questions_need_a_separator(tmp_path):
    stock(BertForQuestionAnswering, sep_token_id=None).save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="give it a sep_token_id"):
        convert(tmp_path / "stock", tmp_path / "long")


@pytest.mark.parametrize(("fields", "said"), [({"max_positions": 0}, "at least 1"), ({"attention_window": 7}, "even")])
def test_lengths_that_are_none(fields, said):
    with pytest.raises(ValueError, match=said):
        Length(**fields)


def test_others_have_the_length_that_they_have(tmp_path):
    convert_from = tmp_path / "long"
    made_long(stock(BertModel), tmp_path)
    with pytest.raises(
        ValueError, match="long_encoder has the length that it has; what becomes longer is bert, roberta"
    ):
        convert(convert_from, tmp_path / "again", length=Length())
