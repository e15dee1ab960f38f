"""A batch with no token to predict: a loss of 0 with gradients of 0, and a warning; stock models have NaN."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_tfamily.modeling import causal_lm
from tests.tiny_models import TINY, all_heads, batch_for, tiny_model

HEADS = [
    (model_type, head)
    for model_type, head in all_heads()
    if head in (AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM)
]
CAUSAL = [model_type for model_type, head in HEADS if head is AutoModelForCausalLM and TINY[model_type].takes_ids]


@pytest.fixture
def said(monkeypatch):
    """Warnings of a batch without targets, each time."""
    words = []
    monkeypatch.setattr(causal_lm.logger, "warning_once", words.append)
    return words


@pytest.mark.parametrize("model_type", CAUSAL)
def test_rows_of_one_token(model_type, said):
    model = tiny_model(model_type, AutoModelForCausalLM)
    ids = torch.full((2, 1), 3)
    loss = model(input_ids=ids, labels=ids).loss
    assert loss == 0
    assert "0 tokens to predict" in said[0]
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(("model_type", "head"), HEADS)
@pytest.mark.parametrize("counted", [None, 0, torch.tensor(0)])
def test_all_labels_ignored(model_type, head, counted, said):
    model = tiny_model(model_type, head)
    batch = batch_for(model_type, head)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = model(**batch, num_items_in_batch=counted).loss
    assert loss == 0
    assert bool(said) == (counted is None)


@pytest.mark.parametrize("chunk", [0, 4])
def test_targets_are_counted_as_before(chunk, said):
    model = tiny_model("rope_decoder", AutoModelForCausalLM, chunk_size_lm_head=chunk)
    ids = torch.randint(1, 90, (2, 7))
    labels = torch.where(torch.arange(7) == 3, ids, -100)
    logits = tiny_model("rope_decoder", AutoModelForCausalLM)
    logits.load_state_dict(model.state_dict())
    expected = torch.nn.functional.cross_entropy(logits(ids).logits[:, 2], ids[:, 3])
    torch.testing.assert_close(model.train()(ids, labels=labels).loss, expected)
    assert not said


def test_compiled_code_looks_at_no_value(said):
    count = torch.compile(causal_lm.num_targets, fullgraph=True, backend="eager")
    assert count(torch.full((2, 3), -100), None) == 1
    assert count(torch.zeros(2, 3), None) == 6
    assert not said


def test_stock_llama_has_nan():
    """What our rule differs from."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))
    ids = torch.tensor([[3]])
    assert torch.isnan(model(ids, labels=ids).loss)
