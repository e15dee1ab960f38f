"""BLOOM and MPT there and back: equal logits, nothing lost, and what does not fit is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, BloomModel, MptConfig, MptForCausalLM

from hf_tfamily.auto import register_all
from hf_tfamily.conversion import convert
from hf_tfamily.modeling.configuration_vanilla_transformer import VanillaTransformerConfig
from hf_tfamily.modeling.modeling_vanilla_transformer import VanillaTransformerForCausalLM

register_all()

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
STOCK = {
    "bloom": (BloomForCausalLM, BloomConfig, {"hidden_size": 24, "n_layer": 2, "n_head": 6}),
    "mpt": (MptForCausalLM, MptConfig, {"d_model": 24, "n_layers": 2, "n_heads": 6, "max_seq_len": 64}),
}
families = pytest.mark.parametrize("family", STOCK)


def random_model(family, **fields):
    """With 6 heads, whose slopes are no powers of one number."""
    torch.manual_seed(0)
    model_class, config_class, sizes = STOCK[family]
    model = model_class(config_class(vocab_size=50, **sizes, **TOKENS, **fields)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def stock_folder(tmp_path, family, **fields):
    model = random_model(family, **fields)
    model.save_pretrained(tmp_path / family)
    return model, tmp_path / family


@torch.no_grad()
def logits(model, padded=False):
    torch.manual_seed(1)
    ids, mask = torch.randint(4, 50, (2, 19)), torch.ones(2, 19, dtype=torch.long)
    if padded:
        mask[0, :5] = 0
    return model.eval()(ids, attention_mask=mask).logits[mask.bool()]


@families
def test_there_and_back(family, tmp_path):
    stock, folder = stock_folder(tmp_path, family)
    result = convert(folder, tmp_path / "ours", check=True)
    assert result.architecture == "VanillaTransformerForCausalLM"
    assert not result.fit.missing
    assert not result.fit.left_over
    for implementation in ("eager", "sdpa", "block_sparse"):
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation=implementation)
        assert type(ours) is VanillaTransformerForCausalLM
        for padded in (False, True):
            torch.testing.assert_close(logits(ours, padded), logits(stock, padded), atol=1e-5, rtol=1e-5)
    assert ours.num_parameters() == stock.num_parameters()
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 3}
    prompt = torch.randint(4, 50, (1, 7))
    assert torch.equal(ours.generate(prompt, **how), stock.generate(prompt, **how))

    convert(tmp_path / "ours", tmp_path / "back", target=family, check=True)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "back")), logits(stock))


def test_blooms_oldest_checkpoints_have_no_prefix(tmp_path):
    stock = random_model("bloom")
    BloomModel.save_pretrained(stock.transformer, tmp_path / "bloom")
    config = json.loads((tmp_path / "bloom" / "config.json").read_text())
    config["architectures"] = ["BloomForCausalLM"]
    (tmp_path / "bloom" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "bloom", tmp_path / "ours")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")), logits(stock))


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm=True"),
        ("mpt", {"attn_config": {"alibi_bias_max": 4}}, "needs alibi_bias_max=8, but the model has alibi_bias_max=4"),
        ("mpt", {"attn_config": {"clip_qkv": 6.0}}, "needs clip_qkv=None"),
        ("mpt", {"attn_config": {"softmax_scale": 0.3}}, "scales scores by 0.5, but the model has softmax_scale=0.3"),
    ],
)
def test_what_ours_cannot_say(family, fields, message, tmp_path):
    _, folder = stock_folder(tmp_path, family, **fields)
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "ours")


@families
def test_what_stock_models_cannot_say(family, tmp_path):
    built_in = {"norm_first": True, "scale_embedding": False, "position_encoding": "alibi", "is_encoder_decoder": False}
    built_in |= {"hidden_act": "gelu_pytorch_tanh", "embedding_norm": True, "layer_bias": True, "dropout": 0.0}
    if family == "mpt":
        built_in |= {"hidden_act": "gelu", "embedding_norm": False, "layer_bias": False}
    wrong = [("position_encoding", "t5"), ("norm_first", False), ("intermediate_size", 20)]
    wrong += [("layer_bias", family == "mpt"), ("attention_patterns", {"type": "local", "window": 3})]
    for number, (field, value) in enumerate(wrong):
        sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = VanillaTransformerConfig(**{**sizes, **built_in, field: value})
        VanillaTransformerForCausalLM(config).save_pretrained(tmp_path / str(number))
        with pytest.raises(ValueError, match=f"has {field}=.* built in, but this model has {field}="):
            convert(tmp_path / str(number), tmp_path / "stock", target=family)


def test_bare_models_have_no_counterpart(tmp_path):
    BloomModel(random_model("bloom").config).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="no counterpart of BloomModel; there is one of BloomForCausalLM"):
        convert(tmp_path / "bare", tmp_path / "ours")
