"""Values that nobody means: refused in one line, before memory is taken and with nothing left behind."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from hf_tfamily import model_size
from hf_tfamily_cli import app

DEEP = "{type: union, patterns: [" * 200 + "{type: local, window: 3}" + "]}" * 200


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_size=1e8", "model.hidden_size must be a number without a fraction"),
        ("model.hidden_size=100000000", "the weights, 240,000,009,800,000,000 parameters, take"),
        ("model.hidden_size=100000000000000000000", "is larger than any tensor can be"),
        ("model.num_hidden_layers=0", "num_hidden_layers must be at least 1"),
        (f"model.attention_patterns={DEEP}", "nested too deeply"),
        ("training.max_steps=.nan", "training.max_steps must be a number without a fraction, got nan"),
        ("training.learning_rate=.nan", "training.learning_rate must be a number, got nan"),
        ("training.save_steps=.nan", "training.save_steps must be a number, got nan"),
        ("model.layer_norm_eps=-1.0", "layer_norm_eps must be at least 0"),
    ],
)
def test_absurd_values_are_refused(micro_file, tmp_path, override, message):
    said = invoke("train", micro_file, "--output", tmp_path / "run", "--set", override)
    assert said.exit_code == 2, said.exception
    assert message in said.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opening", ["[", "{a: "])
def test_files_nested_3000_deep_are_refused(tmp_path, opening):
    file = tmp_path / "deep.yaml"
    file.write_text("title: x\nmodel: " + opening * 3000 + "1" + {"[": "]", "{a: ": "}"}[opening] * 3000)
    said = invoke("show", file)
    assert said.exit_code == 2
    assert "nested too deeply" in said.output


def test_patterns_nested_2000_deep_are_refused():
    said = invoke("show", '{"type":"union","patterns":[' * 2000 + "]}" * 2000)
    assert said.exit_code == 2
    assert "nested too deeply" in said.output


def test_the_dtype_counts(monkeypatch):
    config = AutoConfig.for_model("rope_decoder", hidden_size=64, num_hidden_layers=1)
    parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    assert model_size.count_parameters(AutoModelForCausalLM, config) == parameters
    monkeypatch.setattr(model_size, "_memory", lambda: 2 * parameters)
    with pytest.raises(ValueError, match=f"the weights, {parameters:,} parameters, take"):
        model_size.check_memory(AutoModelForCausalLM, config)
    config.dtype = torch.bfloat16
    model_size.check_memory(AutoModelForCausalLM, config)
