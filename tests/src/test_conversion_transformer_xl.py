"""TransfoXL checkpoints become ours: log-probabilities of three segments are those of Transformers 4.30.2."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_tfamily  # noqa: F401
from hf_tfamily.conversion import convert

GOLDENS = Path(__file__).parents[1] / "goldens" / "transformer_xl"
NAMES = sorted(file.stem for file in GOLDENS.glob("*.json"))
SEGMENTS = (7, 5, 7)


def golden(name):
    """(config, weights, ids, log-probabilities) as scripts/make_goldens_transformer_xl.py wrote them."""
    tensors = load_file(GOLDENS / f"{name}.safetensors")
    weights = {key.removeprefix("weights."): tensor for key, tensor in tensors.items() if key.startswith("weights.")}
    config = json.loads((GOLDENS / f"{name}.json").read_text())
    return config, weights, tensors["ids"], tensors["log_probabilities"]


def legacy_checkpoint(folder, config, weights):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def read(model, ids):
    """Log-probabilities of SEGMENTS, one after the other."""
    memory, outputs = None, []
    for segment in ids.split(SEGMENTS, dim=1):
        output = model(segment, past_key_values=memory, use_cache=True)
        memory = output.past_key_values
        outputs.append(output.logits.log_softmax(-1))
    return torch.cat(outputs, dim=1)


def test_there_are_goldens():
    assert len(NAMES) == 3


@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_equal_the_goldens(name, tmp_path):
    config, weights, ids, expected = golden(name)
    legacy = legacy_checkpoint(tmp_path / "legacy", config, weights)
    assert convert(legacy, tmp_path / "ours").model_type == "transformer_xl"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(read(model, ids), expected, atol=1e-4, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(read(model, ids), expected, atol=1e-4, rtol=0)
    assert model.config.zero_initial_memory
    model.config.zero_initial_memory = False
    assert (read(model, ids) - expected).abs().max() > 0.1


def test_pickled_weights_are_read_on_demand_and_there_is_no_stock_class_to_check_against(tmp_path):
    config, weights, _, _ = golden("plain")
    legacy = legacy_checkpoint(tmp_path / "legacy", config, weights)
    with pytest.raises(ValueError, match="Nothing to check against"):
        convert(legacy, tmp_path / "checked", check=True)
    torch.save(weights, legacy / "pytorch_model.bin")
    (legacy / "model.safetensors").unlink()
    assert convert(legacy, tmp_path / "ours", pickled_weights=True).fit.missing == []


def test_older_and_tied_files(tmp_path):
    """What is tied may be missing, and the fields of early versions have other names."""
    config, weights, ids, expected = golden("adaptive")
    config["n_token"] = config.pop("vocab_size")
    config["tie_weight"] = True
    config["cutoffs"] = [*config["cutoffs"], config["n_token"]]
    tied = [key for key in weights if key.startswith("crit.out_layers.") and key.endswith(".weight")]
    for key in [*tied, "crit.out_projs.1", "crit.out_projs.2", "transformer.pos_emb.inv_freq"]:
        del weights[key]
    convert(legacy_checkpoint(tmp_path / "legacy", config, weights), tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(read(model, ids), expected, atol=1e-4, rtol=0)


def test_other_heads(tmp_path):
    config, weights, ids, _ = golden("plain")
    body = {key.removeprefix("transformer."): tensor for key, tensor in weights.items() if "crit." not in key}
    bare = legacy_checkpoint(tmp_path / "bare", {**config, "architectures": None}, body)
    convert(bare, tmp_path / "model")
    expected = AutoModel.from_pretrained(tmp_path / "model").eval()(ids).last_hidden_state

    named = {**config, "architectures": ["TransfoXLForSequenceClassification"], "pad_token_id": 39}
    scored = {f"transformer.{key}": tensor for key, tensor in body.items()} | {"score.weight": torch.eye(2, 16)}
    convert(legacy_checkpoint(tmp_path / "scored", named, scored), tmp_path / "classifier")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier").eval()
    ids = ids.clamp(max=38)
    assert model(ids).logits.shape == (2, 2)
    torch.testing.assert_close(model.model(ids[:1, :5])[0], expected[:1, :5])


def test_what_is_not_what_it_says_is_refused(tmp_path):
    config, weights, _, _ = golden("adaptive")
    cases = {
        "missing": (config, {k: v for k, v in weights.items() if "qkv_net" not in k}, "Missing: .*q_proj.weight"),
        "unknown": (config, {**weights, "transformer.extra": torch.zeros(1)}, "Left over: extra"),
        "attention": ({**config, "attn_type": 2}, weights, "attn_type=2; only 0"),
        "memory": ({**config, "mem_len": 0}, weights, "mem_len=0; only a model with a memory"),
        "head": ({**config, "architectures": ["TransfoXLForNothing"]}, weights, "names TransfoXLForNothing"),
        "shape": ({**config, "d_inner": 20}, weights, "Of another shape: .*up_proj"),
        "layers": ({**config, "n_layer": 1}, weights, "Left over: .*layers.1"),
    }
    for name, (wrong, tensors, message) in cases.items():
        with pytest.raises((ValueError, RuntimeError), match=message):
            convert(legacy_checkpoint(tmp_path / name, wrong, tensors), tmp_path / "ours")
        assert not (tmp_path / "ours").exists()


class Trap:
    """Unpickling this would leave a trace."""

    def __reduce__(self):
        return Path.touch, (Path("trace"),)


def test_pickled_code_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, weights, _, _ = golden("plain")
    folder = legacy_checkpoint(tmp_path / "legacy", config, weights)
    (folder / "vocab.bin").write_bytes(pickle.dumps(Trap()))
    (folder / "vocab.pkl").write_bytes(pickle.dumps(Trap()))
    convert(folder, tmp_path / "ours")
    assert not any((tmp_path / "ours").glob("vocab*"))
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "trap": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="a pickle is a program"):
        convert(folder, tmp_path / "other")
    with pytest.raises(ValueError, match="does not hold weights"):
        convert(folder, tmp_path / "other", pickled_weights=True)
    assert not (tmp_path / "trace").exists()
