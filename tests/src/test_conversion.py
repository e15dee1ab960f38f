"""`convert` there and back: equal logits, nothing lost, nothing half written, bad sources refused."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from typer.testing import CliRunner

from hf_tfamily import Local, Sink, Union, conversion, set_attention_patterns
from hf_tfamily.auto import register_all
from hf_tfamily.conversion import convert, dry_run
from hf_tfamily.modeling.configuration_rope_decoder import RoPEDecoderConfig
from hf_tfamily.modeling.modeling_rope_decoder import RoPEDecoderForCausalLM
from hf_tfamily_cli import app

register_all()

TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}
ROPE = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 2.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 8,
    },
}
STOCK = {
    **{f"llama-{name}": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": rope}) for name, rope in ROPE.items()},
    "llama-biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama-head_dim": (LlamaForCausalLM, LlamaConfig, {"head_dim": 16}),
    "mistral-window": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
    "mistral-full": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2-window": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
}


def random_model(model_class, config):
    """With norms and biases that are not at their initial 1 and 0, so that a lost one shows."""
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model, length):
    torch.manual_seed(1)
    ids = torch.randint(TINY["vocab_size"], (2, length))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # left padding
    return model.eval()(ids, attention_mask=mask).logits[mask.bool()]


@pytest.mark.parametrize("name", STOCK)
def test_logits_are_equal_both_ways(name, tmp_path):
    model_class, config_class, fields = STOCK[name]
    stock = random_model(model_class, config_class(**TINY, **fields))
    stock.save_pretrained(tmp_path / "stock")

    assert convert(tmp_path / "stock", tmp_path / "ours").model_type == "rope_decoder"
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(ours) is RoPEDecoderForCausalLM
    assert convert(tmp_path / "ours", tmp_path / "back", config_class.model_type).model_type == config_class.model_type
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is model_class

    for length in (7, 24):  # below and beyond the trained length
        expected = logits(stock, length)
        torch.testing.assert_close(logits(ours, length), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(logits(back, length), expected, atol=1e-5, rtol=0)
    assert back.state_dict().keys() == stock.state_dict().keys()
    assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in stock.state_dict().items())


def test_interleaved_pairs_become_halves(tmp_path):
    ours = random_model(
        RoPEDecoderForCausalLM, RoPEDecoderConfig(**TINY, rotary_layout="interleaved", attention_bias=True)
    )
    ours.save_pretrained(tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "llama").model_type == "llama"
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    torch.testing.assert_close(logits(llama, 12), logits(ours, 12), atol=1e-5, rtol=0)


@pytest.mark.parametrize("patterns", [Local(4), [Local(3), Union([Local(2), Sink(2)])]], ids=["one", "by layer"])
def test_patterns_of_a_stock_model_come_along(patterns, tmp_path):
    stock = random_model(LlamaForCausalLM, LlamaConfig(**TINY))
    dense = logits(stock, 12)
    set_attention_patterns(stock, patterns)
    stock.save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "ours", check=True)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits(ours, 12), logits(stock, 12), atol=1e-5, rtol=1e-5)
    assert (logits(ours, 12) - dense).abs().max() > 1e-3


def test_patterns_that_the_target_would_not_follow_are_refused(tmp_path):
    stock = random_model(MistralForCausalLM, MistralConfig(**TINY, sliding_window=4))
    set_attention_patterns(stock, Local(2))
    stock.save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match=r"was saved under attention_patterns=.* would not follow"):
        convert(tmp_path / "stock", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_other_heads_and_dtypes(tmp_path):
    config = LlamaConfig(**TINY, num_labels=3, pad_token_id=0)
    classifier = random_model(LlamaForSequenceClassification, config).to(torch.bfloat16)
    classifier.save_pretrained(tmp_path / "classifier")
    convert(tmp_path / "classifier", tmp_path / "ours")
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert (ours.config.num_labels, ours.dtype) == (3, torch.bfloat16)
    ids = torch.tensor([[3, 4, 5, 0, 0], [9, 8, 7, 6, 5]])
    classifier, ours = classifier.float(), ours.float()
    torch.testing.assert_close(ours(ids).logits, classifier(ids).logits, atol=1e-3, rtol=0)

    bare = random_model(LlamaModel, LlamaConfig(**TINY))
    bare.save_pretrained(tmp_path / "bare")
    convert(tmp_path / "bare", tmp_path / "ours-bare")
    assert AutoConfig.from_pretrained(tmp_path / "ours-bare").architectures == ["RoPEDecoderModel"]


@pytest.fixture
def llama(tmp_path):
    folder = tmp_path / "llama"
    random_model(LlamaForCausalLM, LlamaConfig(**TINY)).save_pretrained(folder)
    return folder


def edit_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_old_pickled_shards_and_angles(llama, tmp_path):
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(weights)
    (llama / "model.safetensors").unlink()
    shards = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for shard in set(shards.values()):
        torch.save({name: weights[name] for name in names if shards[name] == shard}, llama / shard)
    (llama / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ValueError, match=r"pickle is a program.*--pickled-weights"):
        convert(llama, tmp_path / "ours")
    convert(llama, tmp_path / "ours", pickled_weights=True)
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    assert saved.keys() == {name for name in names if "inv_freq" not in name}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in saved.items())


def test_tokenizer_and_generation_settings_come_along(llama, tmp_path):
    (llama / "tokenizer.json").write_text("{}")
    (llama / "generation_config.json").write_text('{"temperature": 0.5}')
    (llama / "vocab.bin").write_bytes(b"a pickle")
    convert(llama, tmp_path / "ours")
    written = {path.name for path in (tmp_path / "ours").iterdir()}
    assert {"tokenizer.json", "modeling_rope_decoder.py"} <= written
    assert "vocab.bin" not in written
    assert "0.5" in (tmp_path / "ours" / "generation_config.json").read_text()


def test_weights_left_over_or_missing_are_named_and_nothing_is_written(llama, tmp_path):
    weights = load_file(llama / "model.safetensors")
    weights["model.surplus.weight"] = weights.pop("model.norm.weight")
    save_file(weights, llama / "model.safetensors")
    with pytest.raises(ValueError, match=r"Left over: model\.surplus\.weight\. Missing: model\.norm\.weight"):
        convert(llama, tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_dry_run_lists_what_does_not_fit_and_writes_nothing(llama, tmp_path):
    weights = load_file(llama / "model.safetensors")
    weights["model.surplus.weight"] = weights.pop("model.norm.weight")
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1].clone()
    save_file(weights, llama / "model.safetensors")
    found = dry_run(llama)
    assert (found.model_type, found.architecture) == ("rope_decoder", "RoPEDecoderForCausalLM")
    assert found.fit == (len(weights) - 2, ["model.surplus.weight"], ["model.norm.weight"], ["lm_head.weight"])
    result = CliRunner().invoke(app, ["convert", str(llama), "--dry-run"])
    assert result.exit_code == 1
    assert "left over: model.surplus.weight\nmissing: model.norm.weight\nmisshapen: lm_head.weight" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_check_runs_both_models(llama, tmp_path, monkeypatch):
    assert convert(llama, tmp_path / "ours", check=True).difference < 1e-5
    assert convert(tmp_path / "ours", tmp_path / "back", check=True).difference < 1e-5
    result = CliRunner().invoke(
        app, ["convert", str(llama), str(tmp_path / "again"), "--check", "--to", "rope_decoder"]
    )
    assert result.exit_code == 0, result.output
    assert "Largest difference of logits" in result.output

    right = conversion.llama.to_ours

    def wrong(config, weights):
        ours, renamed = right(config, weights)
        return ours, {name: tensor * 1.01 for name, tensor in renamed.items()}

    monkeypatch.setattr(conversion.llama, "to_ours", wrong)
    with pytest.raises(ValueError, match="The converted model differs"):
        convert(llama, tmp_path / "wrong", check=True)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("name", ["mistral-window", "qwen2-window"])
def test_check_runs_models_of_other_types_both_ways(name, tmp_path):
    model_class, config_class, fields = STOCK[name]
    random_model(model_class, config_class(**TINY, **fields)).save_pretrained(tmp_path / "stock")
    assert convert(tmp_path / "stock", tmp_path / "ours", check=True).difference < 1e-5
    assert convert(tmp_path / "ours", tmp_path / "back", config_class.model_type, check=True).difference < 1e-5


def test_command_refuses_in_one_line(llama, tmp_path):
    result = CliRunner().invoke(app, ["convert", str(llama)])
    assert result.exit_code == 2
    assert "a new folder, or --dry-run" in result.output
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "nowhere"), str(tmp_path / "ours")])
    assert result.exit_code == 2
    assert "is no folder" in " ".join(result.output.split())


def test_code_in_a_pickle_is_not_run(llama, tmp_path):
    class Payload:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Payload()}, protocol=2))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin does not hold weights"):
        convert(llama, tmp_path / "ours", pickled_weights=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "t5"}, "model_type='t5'; what can be converted is bert, big_bird, bloom, "),
        ({"model_type": None}, "model_type=None"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"architectures": ["LlamaForBanana"]}, "no class RoPEDecoderForBanana"),
        ({"hidden_act": "no_such"}, "no_such"),
    ],
)
def test_configs_that_cannot_be_converted(fields, message, llama, tmp_path):
    edit_config(llama, **fields)
    with pytest.raises((ValueError, KeyError), match=message):
        convert(llama, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("fields", "target", "message"),
    [
        ({"attention_patterns": {"type": "strided", "stride": 4}}, None, "Llama has no attention_patterns"),
        ({"attention_patterns": {"type": "strided", "stride": 4}}, "mistral", "Mistral has one local window"),
        ({"attention_bias": True}, "mistral", "Mistral has no biases"),
        ({"attention_bias": True, "attention_output_bias": False}, "llama", "attention_output_bias=False"),
        ({}, "qwen2", "Qwen2 has"),
        ({}, "gpt2", "it can become llama, mistral, qwen2"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "llama", "partial_rotary_factor"),
    ],
)
def test_models_that_the_target_cannot_hold(fields, target, message, tmp_path):
    RoPEDecoderForCausalLM(RoPEDecoderConfig(**TINY, **fields)).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "ours", tmp_path / "stock", target)
    assert not (tmp_path / "stock").exists()


def test_bad_folders(llama, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        convert(tmp_path / "nowhere", tmp_path / "ours")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        convert(tmp_path / "empty", tmp_path / "ours")
    with pytest.raises(FileExistsError, match="exists; name a new folder"):
        convert(llama, llama)
    (llama / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"model\.safetensors does not hold weights"):
        convert(llama, tmp_path / "ours")
    (llama / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        convert(llama, tmp_path / "ours")
    (llama / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        convert(llama, tmp_path / "ours")
