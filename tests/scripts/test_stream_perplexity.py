"""The comparison of windows with and without sinks runs from end to end, with a tiny model in place of SmolLM2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_tfamily import Local, Sink, Union, set_attention_patterns
from hf_tfamily.data.text import byte_tokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SINKS = Union([Local(12), Sink(4)])


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import stream_perplexity

    return stream_perplexity


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, **SIZES, **HEADS, tie_word_embeddings=True, initializer_range=0.3)
    return LlamaForCausalLM(config).eval()


def test_stock_ours_and_a_stream_are_equal(script):
    """The stream keeps 12 + 4 keys; dense losses are others."""
    model, ids = tiny_llama(), torch.randint(300, (1, 300))
    dense = script.losses(model, ids)
    set_attention_patterns(model, SINKS)
    found = script.losses(model, ids)
    assert (found - dense).abs().max() > 0.1
    ours = script.as_rope_decoder(model, SINKS)
    torch.testing.assert_close(script.losses(ours, ids), found, atol=2e-5, rtol=2e-5)
    streamed, kept, _ = script.streamed_losses(ours, ids)
    torch.testing.assert_close(streamed, found, atol=2e-5, rtol=2e-5)
    assert set(kept) == {16}


def test_writing_on_needs_no_more_keys(script):
    ours, ids = script.as_rope_decoder(tiny_llama(), SINKS), torch.randint(300, (1, 100))
    _, _, cache = script.streamed_losses(ours, ids[:, :-1])
    written = script.write_on(ours, ids, cache, 40)
    assert script.keys_kept(cache) == 16
    assert cache.get_seq_length() == 139
    again = ours.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(written, again[0, 100:])


@pytest.mark.slow
def test_the_script_writes_table_and_picture(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    files = {option: tmp_path / f"streaming.{option}" for option in ("json", "page", "plot")}
    files["plot"] = tmp_path / "streaming.png"
    options = ["--model", tmp_path / "model", "--length", "400", "--keys", "16", "--after", "100"]
    outputs = [part for option, file in files.items() for part in (f"--{option}", file)]
    subprocess.run([sys.executable, SCRIPTS / "stream_perplexity.py", *options, *outputs], check=True)
    kept = json.loads(files["json"].read_text())
    assert kept["difference"] < 1e-4
    assert kept["streamed_difference"] < 1e-4
    assert set(kept["kept"]) == {16} == {kept["kept_after_writing"]}
    assert files["page"].read_text().count("| window ") == 3
    assert files["plot"].stat().st_size > 10_000
