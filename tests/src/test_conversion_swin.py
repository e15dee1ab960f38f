"""Swin there and back: equal logits and gradients, bit for bit the same weights, and what does not fit is refused."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    SwinBackbone,
    SwinConfig,
    SwinForImageClassification,
    SwinForMaskedImageModeling,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_tfamily.auto import register_all
from hf_tfamily.conversion import convert, dry_run, swin
from hf_tfamily.conversion.checkpoint import fit
from hf_tfamily.modeling.configuration_swin_transformer import SwinTransformerConfig
from hf_tfamily.modeling.modeling_swin_transformer import (
    SwinTransformerBackbone,
    SwinTransformerForImageClassification,
    SwinTransformerForMaskedImageModeling,
    SwinTransformerModel,
)
from tests.tiny_models import SMALL_SWIN

register_all()

VARIANTS = {
    "plain": {},
    "no_biases": {"qkv_bias": False, "hidden_act": "relu", "layer_norm_eps": 1e-3, "mlp_ratio": 2.5},
    "absolute": {"use_absolute_embeddings": True, "num_channels": 1},
    "rectangles": {"use_absolute_embeddings": True, "image_size": [24, 36], "patch_size": [2, 3]},
    "stages": {"depths": [1, 2, 1], "num_heads": [2, 4, 8], "window_size": 2, "encoder_stride": 8},
    "labelled": {"id2label": {0: "cat", 1: "dog", 2: "hen"}, "problem_type": "single_label_classification"},
}
PAIRS = {
    SwinForImageClassification: SwinTransformerForImageClassification,
    SwinModel: SwinTransformerModel,
    SwinForMaskedImageModeling: SwinTransformerForMaskedImageModeling,
    SwinBackbone: SwinTransformerBackbone,
}
CASES = [(model_class, variant) for model_class in PAIRS for variant in VARIANTS]
CASES.remove((SwinForMaskedImageModeling, "rectangles"))  # stock paints squares alone
BACKENDS = ("eager", "sdpa")
# A config as Transformers 4.16 wrote it to the Hub.
EARLY_CONFIG = {
    "architectures": ["SwinForImageClassification"],
    "attention_probs_dropout_prob": 0.0,
    "depths": [2, 2],
    "drop_path_rate": 0.1,
    "embed_dim": 8,
    "encoder_stride": 4,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "id2label": {"0": "tench", "1": "goldfish", "2": "great white shark"},
    "image_size": 24,
    "initializer_range": 0.02,
    "label2id": {"goldfish": 1, "great white shark": 2, "tench": 0},
    "layer_norm_eps": 1e-05,
    "mlp_ratio": 4.0,
    "model_type": "swin",
    "num_channels": 3,
    "num_heads": [1, 2],
    "num_layers": 2,
    "patch_size": 2,
    "path_norm": True,
    "qkv_bias": True,
    "torch_dtype": "float32",
    "transformers_version": "4.16.0.dev0",
    "use_absolute_embeddings": False,
    "window_size": 3,
}


def random_model(model_class, **fields):
    """With norms, biases and tables that are not at their initial 1 and 0, so that a lost one shows."""
    model = model_class(model_class.config_class(**{**SMALL_SWIN, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def saved(folder, model_class=SwinForImageClassification, **fields):
    model = random_model(model_class, **fields)
    model.save_pretrained(folder)
    return model


def result_and_gradients(model):
    """What the model says about the same random pictures and masks, and the gradients of its parameters."""
    torch.manual_seed(1)
    inputs = {"pixel_values": pictures(model.config)}
    if "ForMaskedImage" in type(model).__name__:
        inputs["bool_masked_pos"] = torch.rand(2, (model.config.image_size // model.config.patch_size) ** 2) > 0.5
    model.zero_grad()
    outputs = model(**inputs)
    found = outputs.feature_maps if "feature_maps" in outputs else outputs[-1:]
    found = torch.cat([each.flatten() for each in found])
    found.square().mean().backward()
    return found.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def pictures(config):
    size = [config.image_size] * 2 if isinstance(config.image_size, int) else config.image_size
    return torch.randn(2, config.num_channels, *size)


def assert_same_model(found, expected):
    """Logits and gradients to 1e-5 in both backends."""
    for backend in BACKENDS:
        expected.set_attn_implementation(backend)
        found.set_attn_implementation(backend)
        logits, gradients = result_and_gradients(expected)
        found_logits, found_gradients = result_and_gradients(found)
        torch.testing.assert_close(found_logits, logits, atol=1e-5, rtol=1e-5)
        assert found_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found_gradients[name], gradient, atol=1e-5, rtol=1e-5)


def assert_same_weights(found, expected):
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in expected.state_dict().items())


def load_config(folder):
    return json.loads((folder / "config.json").read_text())


def edit_config(folder, **fields):
    (folder / "config.json").write_text(json.dumps(load_config(folder) | fields))


# ---------------------------------------------------------------------------------------------------------------------
# There and back


@pytest.mark.parametrize(("model_class", "variant"), CASES)
def test_logits_gradients_and_weights_are_equal_both_ways(model_class, variant, tmp_path):
    stock = saved(tmp_path / "stock", model_class, **VARIANTS[variant])
    our_class = PAIRS[model_class]

    there = convert(tmp_path / "stock", tmp_path / "ours")
    assert (there.model_type, there.architecture) == ("swin_transformer", our_class.__name__)
    ours = our_class.from_pretrained(tmp_path / "ours").eval()
    assert_same_model(ours, stock)
    assert_same_weights(ours, stock)

    back_again = convert(tmp_path / "ours", tmp_path / "back")
    assert (back_again.model_type, back_again.architecture) == ("swin", model_class.__name__)
    back = model_class.from_pretrained(tmp_path / "back")
    assert_same_weights(back, stock)
    assert load_config(tmp_path / "back") == load_config(tmp_path / "stock")
    files = [load_file(tmp_path / side / "model.safetensors") for side in ("stock", "back")]
    assert files[0].keys() == files[1].keys()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"depths": [2, 2, 18, 2]},
        {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12, "image_size": 384},
        {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48]},
    ],
    ids=["tiny", "small", "base at 384", "large"],
)
def test_published_sizes_fit_both_ways(fields):
    with torch.device("meta"):
        stock = SwinForImageClassification(
            SwinConfig(num_labels=1000, architectures=["SwinForImageClassification"], **fields)
        )
    config, weights = swin.to_ours(stock.config.to_dict(), stock.state_dict())
    fit(config, weights).require("ours")
    config, weights = swin.to_stock(config, weights)
    fit(config, weights).require("stock")
    assert {name: getattr(stock.config, name) for name in fields} == {name: config[name] for name in fields}


def test_our_own_models_become_stock(tmp_path):
    """One that never was stock, saved without a word about its heads."""
    torch.manual_seed(0)
    config = SwinTransformerConfig(hidden_size=16, num_hidden_layers=2, image_size=24, patch_size=2, window_size=3)
    ours = SwinTransformerForImageClassification(config).eval()
    ours.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "stock", check=True)
    stock = SwinForImageClassification.from_pretrained(tmp_path / "stock").eval()
    assert_same_model(stock, ours)


# ---------------------------------------------------------------------------------------------------------------------
# Files as they are found


def early_folder(folder):
    """A folder of Transformers 4.16, and the weights in it: early names, and the buffers that were saved then."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(EARLY_CONFIG))
    model = random_model(SwinForImageClassification, id2label=EARLY_CONFIG["id2label"])
    model.save_pretrained(folder / "now")
    weights = load_file(folder / "now" / "model.safetensors")
    assert "swin.encoder.layers.0.blocks.0.attention.self.query.weight" in weights
    for name in [name for name in weights if name.endswith("relative_position_bias_table")]:
        weights[name.removesuffix("bias_table") + "index"] = torch.zeros(9, 9, dtype=torch.int64)
    return model, weights


def test_an_early_hub_folder(tmp_path):
    stock, weights = early_folder(tmp_path / "hub")
    save_file(weights, tmp_path / "hub" / "model.safetensors")
    convert(tmp_path / "hub", tmp_path / "ours", check=True)
    ours = AutoModelForImageClassification.from_pretrained(tmp_path / "ours").eval()
    assert_same_model(ours, stock)
    assert ours.config.id2label == {0: "tench", 1: "goldfish", 2: "great white shark"}
    convert(tmp_path / "ours", tmp_path / "back")
    back = load_config(tmp_path / "back")
    renamed = {"torch_dtype", "transformers_version"}
    assert all(back[name] == value for name, value in EARLY_CONFIG.items() if name not in renamed)


def test_an_early_pickle_is_read_as_weights_only_if_told_so(tmp_path):
    stock, weights = early_folder(tmp_path / "hub")
    torch.save(weights, tmp_path / "hub" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="a pickle is a program"):
        convert(tmp_path / "hub", tmp_path / "ours")
    convert(tmp_path / "hub", tmp_path / "ours", pickled_weights=True)
    assert_same_weights(AutoModelForImageClassification.from_pretrained(tmp_path / "ours"), stock)


def test_names_of_the_modules_and_a_config_without_a_class(tmp_path):
    """What `torch.save(model.state_dict())` users have, in safetensors: each class is told by its weights."""
    for number, model_class in enumerate(PAIRS):
        folder = tmp_path / str(number)
        stock = saved(folder, model_class)
        save_file(stock.state_dict(), folder / "model.safetensors")
        edit_config(folder, architectures=None)
        assert convert(folder, tmp_path / f"ours{number}").architecture == PAIRS[model_class].__name__
        assert_same_weights(PAIRS[model_class].from_pretrained(tmp_path / f"ours{number}"), stock)


def test_a_backbone_that_has_no_last_norm(tmp_path):
    """Backbones of Transformers 4 were saved without one."""
    stock = saved(tmp_path / "stock", SwinBackbone, out_features=["stem", "stage2"])
    weights = load_file(tmp_path / "stock" / "model.safetensors")
    assert "encoder.layers.0.downsample.norm.weight" in weights
    save_file(
        {name: tensor for name, tensor in weights.items() if not name.startswith("swin.layernorm")},
        tmp_path / "stock" / "model.safetensors",
    )
    convert(tmp_path / "stock", tmp_path / "ours", check=True)
    ours = SwinTransformerBackbone.from_pretrained(tmp_path / "ours").eval()
    assert (ours.config.out_features, ours.channels) == (["stem", "stage2"], [8, 16])
    assert_same_model(ours, stock)


def test_shards_and_half_precision(tmp_path):
    stock = random_model(SwinForImageClassification).half()
    stock.save_pretrained(tmp_path / "stock", max_shard_size="10KB")
    assert len(list((tmp_path / "stock").glob("model-*.safetensors"))) > 1
    convert(tmp_path / "stock", tmp_path / "ours", check=True)
    ours = AutoModelForImageClassification.from_pretrained(tmp_path / "ours")
    assert ours.dtype == torch.float16
    assert_same_weights(ours, stock)
    assert_same_model(ours.float().eval(), stock.float())


@pytest.mark.parametrize(
    "settings",
    [
        {"feature_extractor_type": "ViTFeatureExtractor", "do_resize": True, "resample": 3, "size": 24},
        {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": 24, "width": 24},
            "image_mean": [0.1, 0.2, 0.3],
        },
        {"image_processor_type": "ViTImageProcessorFast", "size": {"height": 24, "width": 24}},
    ],
    ids=["feature extractor", "slow", "fast"],
)
def test_the_image_processor_comes_along_and_a_pipeline_reads_both(settings, tmp_path):
    saved(tmp_path / "stock", id2label={0: "cat", 1: "dog", 2: "hen"})
    (tmp_path / "stock" / "preprocessor_config.json").write_text(json.dumps(settings))
    convert(tmp_path / "stock", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    pixels, answers = [], []
    for side in ("stock", "ours", "back"):
        pixels.append(AutoImageProcessor.from_pretrained(tmp_path / side)(picture, return_tensors="pt").pixel_values)
        answers.append(pipeline("image-classification", model=str(tmp_path / side))(picture))
    assert pixels[0].shape == (1, 3, 24, 24)
    assert all(torch.equal(each, pixels[0]) for each in pixels)
    for answer in answers[1:]:
        assert [each["label"] for each in answer] == [each["label"] for each in answers[0]]
        assert [each["score"] for each in answer] == pytest.approx([each["score"] for each in answers[0]], abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit


def test_weights_left_over_missing_or_of_another_shape_are_named(tmp_path):
    saved(tmp_path / "stock")
    weights = load_file(tmp_path / "stock" / "model.safetensors")
    weights["swin.surplus"] = weights.pop("swin.encoder.layers.1.blocks.0.output.dense.bias")
    table = "swin.encoder.layers.0.blocks.1.attention.self.relative_position_bias_table"
    weights[table] = weights[table][:-1].clone()
    save_file(weights, tmp_path / "stock" / "model.safetensors")
    found = dry_run(tmp_path / "stock").fit
    assert (found.left_over, found.missing, found.misshapen) == (
        ["swin.surplus"],
        ["swin.encoder.layers.1.blocks.0.mlp.fc2.bias"],
        ["swin.encoder.layers.0.blocks.1.attention.relative_position_bias.relative_position_bias_table"],
    )
    with pytest.raises(ValueError, match=r"Left over: swin\.surplus\. Missing: .*mlp\.fc2\.bias\. Of another shape: "):
        convert(tmp_path / "stock", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("model_class", "fields", "message"),
    [
        (SwinTransformerModel, {"shifted_windows": False}, "has shifted_windows=False"),
        (
            SwinTransformerModel,
            {"architectures": ["SwinTransformerForBananas"]},
            "no counterpart of SwinTransformerForB",
        ),
        (
            SwinModel,
            {"architectures": ["SwinForBananas"]},
            "no counterpart of SwinForBananas; there is one of SwinModel",
        ),
        (SwinForMaskedImageModeling, {"encoder_stride": 8}, "encoder_stride must be 4, .* got 8"),
        (SwinModel, {"window_size": 4}, "Of another shape: .*relative_position_bias_table"),
        (SwinModel, {"num_heads": [3, 6]}, r"num_heads=\[3, 6\] must divide"),
        (SwinModel, {"model_type": "swinv2"}, "model_type='swinv2'; what can be converted is .*swin, swin_transformer"),
    ],
)
def test_models_that_cannot_be_converted(model_class, fields, message, tmp_path):
    saved(tmp_path / "source", model_class)
    edit_config(tmp_path / "source", **fields)
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        convert(tmp_path / "source", tmp_path / "result")
    assert not (tmp_path / "result").exists()


def test_another_model_under_the_name_of_swin(tmp_path):
    vit = ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=32))
    vit.save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="model_type='vit'"):
        convert(tmp_path / "vit", tmp_path / "ours")
    edit_config(tmp_path / "vit", **EARLY_CONFIG)
    with pytest.raises(ValueError, match=r"Left over: classifier|Left over: vit"):
        convert(tmp_path / "vit", tmp_path / "ours")


def test_check_says_where_stock_cannot_run(tmp_path):
    """Stock classifiers fail where a stage has fewer tokens than a window; ours has smaller windows there."""
    saved(tmp_path / "stock", window_size=7)
    with pytest.raises(ValueError, match="Nothing to check: SwinForImageClassification fails"):
        convert(tmp_path / "stock", tmp_path / "ours", check=True)
    convert(tmp_path / "stock", tmp_path / "ours")
    ours = AutoModelForImageClassification.from_pretrained(tmp_path / "ours")
    assert ours(torch.zeros(1, 3, 24, 24)).logits.isfinite().all()
