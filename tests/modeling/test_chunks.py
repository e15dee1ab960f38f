"""Feed-forward layers and losses in chunks: the same outputs, losses and gradients, and less that is kept for them."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig

from tests.loss_cases import LENGTH, cases
from tests.tiny_models import TINY, tiny_config

CASES = cases()
CHUNK = 5
assert LENGTH % CHUNK, "the last chunk has to be shorter"
BY_FEED_FORWARD = [name for name, case in CASES.items() if case.name != "swin_transformer"]
WITHOUT_LOGITS = [
    name
    for name in BY_FEED_FORWARD
    if "image" not in name
    and name.endswith(("CausalLM", "MaskedLM", "Seq2SeqLM", "adaptive", "next_token", "encoding"))
]
TEXT = [
    "sparse_transformer-CausalLM",
    "rope_decoder-CausalLM",
    "vanilla_transformer-CausalLM",
    "transformer_xl-CausalLM",
]


def batch_of(name, **more):
    return {**CASES[name].collate(CASES[name].rows), **more}


def step(name, batch=None, checkpointing=False, **fields):
    """Outputs and gradients of one case in training."""
    model = CASES[name].build(**fields).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    torch.manual_seed(1)
    outputs = model(**(batch_of(name) if batch is None else batch))
    outputs.loss.backward()
    return outputs, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def assert_equal(found, expected):
    torch.testing.assert_close(found[0].loss, expected[0].loss, rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    assert max(gradient.abs().max() for gradient in expected[1].values()) > 1e-3
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", BY_FEED_FORWARD)
def test_feed_forward_layers_in_chunks(name):
    chunked, whole = step(name, chunk_size_feed_forward=CHUNK), step(name)
    assert_equal(chunked, whole)
    if getattr(whole[0], "logits", None) is not None:
        torch.testing.assert_close(chunked[0].logits, whole[0].logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WITHOUT_LOGITS)
def test_losses_in_chunks(name):
    chunked = step(name, chunk_size_lm_head=CHUNK)
    assert chunked[0].logits is None
    assert_equal(chunked, step(name))


@pytest.mark.parametrize("said", [{"num_items_in_batch": 7}, {"label_smoothing": 0.2}], ids=str)
@pytest.mark.parametrize("name", WITHOUT_LOGITS)
def test_losses_in_chunks_honour_what_a_batch_says(name, said):
    batch = batch_of(name, **said)
    assert_equal(step(name, batch, chunk_size_lm_head=CHUNK), step(name, batch))
    assert step(name, batch)[0].loss != step(name)[0].loss


@pytest.mark.parametrize("name", TEXT)
def test_losses_of_shift_labels(name):
    batch = batch_of(name)
    shifted = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    assert_equal(step(name, {**batch, "shift_labels": shifted}, chunk_size_lm_head=CHUNK), step(name))


@pytest.mark.parametrize("name", WITHOUT_LOGITS)
def test_there_are_logits_without_targets(name):
    inputs = batch_of(name)
    for target in ("labels", "shift_labels", "counted_targets"):
        inputs.pop(target, None)
    if CASES[name].name == "vanilla_transformer" and "Seq2SeqLM" in name:
        inputs["decoder_input_ids"] = inputs.get("decoder_input_ids", inputs["input_ids"])
    chunked, whole = (CASES[name].build(**fields).eval() for fields in ({"chunk_size_lm_head": CHUNK}, {}))
    with torch.no_grad():
        assert torch.equal(chunked(**inputs).logits, whole(**inputs).logits)


@pytest.mark.parametrize("name", TEXT)
def test_both_under_gradient_checkpointing(name):
    both = {"chunk_size_feed_forward": CHUNK, "chunk_size_lm_head": CHUNK}
    assert_equal(step(name, checkpointing=True, **both), step(name))


@pytest.mark.parametrize("name", TEXT)
def test_in_double_precision_hidden_states_are_equal(name):
    case, inputs = CASES[name], {key: value for key, value in batch_of(name).items() if key != "labels"}
    chunked, whole = (case.build(**f).double().eval().base_model for f in ({"chunk_size_feed_forward": CHUNK}, {}))
    states = [model(**inputs).last_hidden_state for model in (chunked, whole)]
    torch.testing.assert_close(*states, rtol=1e-12, atol=1e-12)


def test_dropout_is_the_same_in_the_backward():
    """Where a chunk is computed again, it drops what it dropped; other numbers are drawn than for a whole row."""
    fields = {"chunk_size_feed_forward": CHUNK, "resid_dropout": 0.5}
    name = "sparse_transformer-CausalLM"
    model = CASES[name].build(**fields).train()
    batch = batch_of(name)

    def loss(weight):
        torch.manual_seed(3)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.bias[0] = weight
        return model(**batch).loss

    middle = model.model.layers[0].mlp.down_proj.bias[0].item()
    loss(middle).backward()
    found = model.model.layers[0].mlp.down_proj.bias.grad[0].item()
    difference = (loss(middle + 1e-2) - loss(middle - 1e-2)).item() / 2e-2
    assert found == pytest.approx(difference, rel=5e-2, abs=1e-4)


def kept_bytes(model, batch):
    """Of all tensors that the backward is kept for, each counted once."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    total = sum(kept.values()) - sum(p.nbytes for p in model.parameters() if p.data_ptr() in kept)
    loss.backward()
    return total


@pytest.mark.parametrize("name", TEXT)
def test_less_is_kept(name):
    """Of a feed-forward layer its input alone, and of logits nothing."""
    batch = batch_of(name)
    whole, feed_forward, both = (
        kept_bytes(CASES[name].build(hidden_act="gelu", **fields).train(), batch)
        for fields in (
            {},
            {"chunk_size_feed_forward": CHUNK},
            {"chunk_size_feed_forward": CHUNK, "chunk_size_lm_head": CHUNK},
        )
    )
    tokens = batch["input_ids"].numel()
    model = CASES[name].build()
    inner = 4 * tokens * 2 * model.config.num_hidden_layers * model.config.intermediate_size  # before and behind f
    logits = 4 * tokens * model.config.vocab_size
    assert whole - feed_forward >= inner
    assert feed_forward - both >= logits / 2


@pytest.mark.parametrize("field", ["chunk_size_feed_forward", "chunk_size_lm_head"])
@pytest.mark.parametrize("name", ["sparse_transformer", "rope_decoder", "transformer_xl", "vanilla_encoder"])
def test_a_negative_size_is_refused(name, field):
    with pytest.raises(StrictDataclassError, match=field):
        tiny_config(name, **{field: -1})


def test_swin_takes_no_chunks():
    with pytest.raises(StrictDataclassError, match="chunk_size_feed_forward"):
        tiny_config("swin_transformer", chunk_size_feed_forward=4)


@pytest.mark.parametrize("name", [name for name in TINY if name != "swin_transformer"])
def test_sizes_are_in_a_saved_config(name, tmp_path):
    tiny_config(name, chunk_size_feed_forward=7).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).chunk_size_feed_forward == 7
