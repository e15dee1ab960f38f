"""ImageGPT there and back: equal logits, gradients and pictures, nothing lost, and what does not fit is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTModel,
)

from hf_tfamily.auto import register_all
from hf_tfamily.conversion import convert
from hf_tfamily.modeling.configuration_sparse_transformer import SparseTransformerConfig
from hf_tfamily.modeling.modeling_sparse_transformer import SparseTransformerForCausalLM

register_all()

# Heads are 16 wide: Transformers 5.17 divides scores by the square root rounded down, and 4 needs no rounding.
TINY = {"vocab_size": 17, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
START = 16


def random_model(model_class=ImageGPTForCausalImageModeling, **fields):
    torch.manual_seed(0)
    model = model_class(ImageGPTConfig(**TINY, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def stock_folder(tmp_path, *args, **fields):
    model = random_model(*args, **fields)
    model.save_pretrained(tmp_path / "stock")
    return model, tmp_path / "stock"


def picture_ids(rows=2):
    torch.manual_seed(1)
    pictures = torch.randint(START, (rows, 15))
    return torch.cat([torch.full((rows, 1), START), pictures], dim=1)


def logits_and_gradients(model, ids):
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    loss = model(ids, labels=ids, use_cache=False).loss
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    squares = sum(parameter.grad.double().square().sum() for parameter in model.parameters())
    return logits, loss, squares


@pytest.mark.parametrize("fields", [{}, {"n_inner": 40, "activation_function": "gelu", "layer_norm_epsilon": 1e-3}])
def test_there_and_back(fields, tmp_path):
    stock, folder = stock_folder(tmp_path, **fields)
    result = convert(folder, tmp_path / "ours", check=True)
    assert result.architecture == "SparseTransformerForCausalLM"
    expected = logits_and_gradients(stock, picture_ids())
    for implementation in ("eager", "sdpa", "block_sparse"):
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation=implementation).eval()
        assert type(ours) is SparseTransformerForCausalLM
        for found, wanted in zip(logits_and_gradients(ours, picture_ids()), expected):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert ours.num_parameters() == stock.num_parameters()
    dropouts = {name: getattr(ours.config, f"{name}_dropout") for name in ("resid", "embedding", "attention")}
    assert set(dropouts.values()) == {0.1}

    convert(tmp_path / "ours", tmp_path / "back", check=True)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    back = ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "back")
    torch.testing.assert_close(logits_and_gradients(back.eval(), picture_ids())[0], expected[0])


def test_pictures_are_the_same_and_hold_no_start_token(tmp_path):
    stock, folder = stock_folder(tmp_path)
    convert(folder, tmp_path / "ours")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    start = torch.full((3, 1), START)
    how = {"max_length": 16, "do_sample": False, "pad_token_id": 0}
    drawn = ours.generate(start, **how)
    assert torch.equal(drawn, stock.generate(start, **how))
    assert drawn[:, 1:].max() < START


def test_dropouts_act_in_training(tmp_path):
    """block_sparse names the one that it does not have."""
    _, folder = stock_folder(tmp_path, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.3)
    convert(folder, tmp_path / "ours")
    ids = picture_ids()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").train()
    assert not torch.equal(ours(ids).logits, ours(ids).logits)
    ours.model.dropout.p = 0.0
    assert torch.equal(ours(ids).logits, ours(ids).logits)
    ours.config.attention_dropout = 0.5
    with pytest.raises(ValueError, match="dropout of attention weights"):
        ours(ids)
    ours.set_attn_implementation("eager")
    assert not torch.equal(ours(ids).logits, ours(ids).logits)


def test_bare_models_and_old_files(tmp_path):
    stock, folder = stock_folder(tmp_path, ImageGPTModel)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    masks = {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    torch.save({**weights, **masks}, folder / "pytorch_model.bin")
    convert(folder, tmp_path / "ours", pickled_weights=True)
    ours = AutoModel.from_pretrained(tmp_path / "ours").eval()
    found, expected = (model(picture_ids()).last_hidden_state for model in (ours, stock))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert convert(tmp_path / "ours", tmp_path / "back").architecture == "ImageGPTModel"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale_attn_weights": False}, "needs scale_attn_weights=True, but the model has scale_attn_weights=False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "needs scale_attn_by_inverse_layer_idx=False"),
        ({"add_cross_attention": True}, "needs add_cross_attention=False"),
        ({"tie_word_embeddings": True}, "needs tie_word_embeddings=False"),
    ],
)
def test_what_ours_cannot_say(fields, message, tmp_path):
    _, folder = stock_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "ours")


def test_the_mean_of_all_states_is_not_the_last_one(tmp_path):
    _, folder = stock_folder(tmp_path, ImageGPTForImageClassification)
    with pytest.raises(ValueError, match="no counterpart of ImageGPTForImageClassification"):
        convert(folder, tmp_path / "ours")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "layer"}, "has norm='rms' built in, but this model has norm='layer'"),
        ({"attention_patterns": {"type": "local", "window": 3}}, "has attention_patterns="),
        ({"position_shape": [4, 4]}, "has position_shape=.16. built in"),
        ({"qk_head_dim": 3}, "has qk_head_dim=.* built in, but this model has qk_head_dim=3"),
        ({"output_vocab_size": None}, "output_vocab_size=16, but this model has output_vocab_size=None"),
        ({"final_norm_eps": 1e-3}, "has final_norm_eps=0.001"),
    ],
)
def test_what_stock_models_cannot_say(fields, message, tmp_path):
    sizes = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    good = {"norm": "rms", "attention_patterns": {"type": "full"}, "position_shape": [16], "output_vocab_size": 16}
    config = SparseTransformerConfig(**{**sizes, **good, **fields})
    SparseTransformerForCausalLM(config).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "ours", tmp_path / "stock")
