"""Marian there and back: equal logits and translations, nothing lost, and what does not fit is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    MarianConfig,
    MarianForCausalLM,
    MarianModel,
    MarianMTModel,
)

from hf_tfamily.auto import register_all
from hf_tfamily.conversion import convert
from hf_tfamily.modeling.configuration_vanilla_transformer import VanillaTransformerConfig
from hf_tfamily.modeling.modeling_vanilla_transformer import (
    VanillaTransformerForCausalLM,
    VanillaTransformerForConditionalGeneration,
    VanillaTransformerModel,
)

register_all()

TINY = {
    "vocab_size": 50,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 49,
    "decoder_start_token_id": 49,
    "eos_token_id": 0,
    "forced_eos_token_id": 0,
    "activation_function": "swish",
    "scale_embedding": True,
}
VARIANTS = {
    "opus": {},
    "unscaled": {"scale_embedding": False, "activation_function": "gelu"},
    "two_tables": {"share_encoder_decoder_embeddings": False},
    "two_vocabularies": {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 45, "pad_token_id": 44},
    "untied": {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False},
}
PAIRS = {
    MarianMTModel: (AutoModelForSeq2SeqLM, VanillaTransformerForConditionalGeneration),
    MarianModel: (AutoModel, VanillaTransformerModel),
    MarianForCausalLM: (AutoModelForCausalLM, VanillaTransformerForCausalLM),
}


def random_marian(model_class=MarianMTModel, **fields):
    torch.manual_seed(0)
    config = MarianConfig(**{**TINY, **fields})
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if "embed_positions" not in name:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model


def marian_folder(tmp_path, **fields):
    random_marian(**fields).save_pretrained(tmp_path / "marian")
    return tmp_path / "marian"


@torch.no_grad()
def output(model):
    torch.manual_seed(1)
    inputs = {"input_ids": torch.randint(1, 40, (2, 9))}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(1, 40, (2, 7))
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, 6:] = 0
    return model.eval()(**inputs, use_cache=False)[0]  # stock MarianForCausalLM caches but as many layers as encode


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model_class", PAIRS, ids=lambda model_class: model_class.__name__)
def test_outputs_are_equal_both_ways(variant, model_class, tmp_path):
    if model_class is MarianForCausalLM and variant == "two_vocabularies":
        pytest.skip("Marian's decoder alone has one vocabulary")
    stock = random_marian(model_class, **VARIANTS[variant])
    stock.save_pretrained(tmp_path / "stock")
    auto_class, our_class = PAIRS[model_class]

    assert convert(tmp_path / "stock", tmp_path / "ours").model_type == "vanilla_transformer"
    ours = auto_class.from_pretrained(tmp_path / "ours")
    assert type(ours) is our_class
    assert convert(tmp_path / "ours", tmp_path / "back").model_type == "marian"
    back = auto_class.from_pretrained(tmp_path / "back")
    assert type(back) is model_class

    torch.testing.assert_close(output(ours), output(stock), atol=1e-5, rtol=0)
    torch.testing.assert_close(output(back), output(stock), atol=1e-5, rtol=0)
    assert back.state_dict().keys() == stock.state_dict().keys()
    assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in stock.state_dict().items())
    for field in VARIANTS[variant]:
        assert getattr(back.config, field) == getattr(stock.config, field)


@pytest.mark.parametrize("model_class", PAIRS, ids=lambda model_class: model_class.__name__)
def test_check_runs_both_models_both_ways(model_class, tmp_path):
    random_marian(model_class).save_pretrained(tmp_path / "stock")
    assert convert(tmp_path / "stock", tmp_path / "ours", check=True).difference < 1e-5
    assert convert(tmp_path / "ours", tmp_path / "back", check=True).difference < 1e-5


def test_translations_are_equal_with_beams(tmp_path):
    stock = random_marian()
    stock.save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "ours")
    ours = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    source = torch.randint(1, 40, (2, 6))
    mask = torch.ones_like(source)
    mask[1, 4:] = 0
    options = {"attention_mask": mask, "max_new_tokens": 9, "num_beams": 4, "num_return_sequences": 2}
    assert torch.equal(ours.generate(source, **options), stock.generate(source, **options))


def test_a_model_of_ours_becomes_marian(tmp_path):
    config = VanillaTransformerConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        sinusoid_layout="halves",
        max_position_embeddings=32,
    )
    model = VanillaTransformerForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "marian")
    marian = MarianMTModel.from_pretrained(tmp_path / "marian")
    torch.testing.assert_close(output(marian), output(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_encoding": "rotary"}, "Marian has position_encoding='sinusoidal' built in, .*'rotary'"),
        ({"sinusoid_layout": "interleaved"}, "Marian has sinusoid_layout='halves' built in"),
        ({"norm_first": True}, "Marian has norm_first=False built in"),
        ({"attention_patterns": {"type": "local", "window": 3}}, "Marian has attention_patterns=None built in"),
    ],
)
def test_what_marian_cannot_say_is_refused(fields, message, tmp_path):
    small = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = VanillaTransformerConfig(**{**small, "sinusoid_layout": "halves", **fields})
    VanillaTransformerForConditionalGeneration(config).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "ours", tmp_path / "marian")
    assert not (tmp_path / "marian").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_attention_heads": 8}, "same attention_heads, but this model has 4 and 8"),
        ({"decoder_ffn_dim": 64}, "same ffn_dim, but this model has 48 and 64"),
        ({"decoder_layerdrop": 0.1}, "decoder_layerdrop=0.1"),
        ({"decoder_vocab_size": 45}, "share embeddings, but have vocab_size=50 and decoder_vocab_size=45"),
        ({"vocab_size": 60, "decoder_vocab_size": 60}, "Mismatched vocabularies: .* has 50 rows.*says 60"),
        ({"architectures": ["MarianForSequenceClassification"]}, "no counterpart of MarianForSequenceClassification"),
    ],
)
def test_what_we_cannot_say_is_refused(changes, message, tmp_path):
    folder = marian_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_old_checkpoints_hold_every_table_and_no_architecture(tmp_path):
    """As the OPUS models were saved: positions and tied tensors too, by all of their names."""
    folder = marian_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config.pop("architectures")
    (folder / "config.json").write_text(json.dumps({**config, "num_beams": 6, "normalize_before": False}))
    model = random_marian()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert len(weights) > len(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    convert(folder, tmp_path / "ours")
    ours = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(output(ours), output(model), atol=1e-5, rtol=0)
