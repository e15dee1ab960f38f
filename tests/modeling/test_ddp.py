"""Distributed training takes every head as it is: no parameter waits for a gradient that never comes."""

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoBackbone, AutoModelForImageClassification

from hf_tfamily import SwinTransformerBackbone, SwinTransformerForImageClassification
from hf_tfamily.modeling.configuration_compressive_transformer import COMPRESSIONS, LOSSES
from tests.loss_cases import cases
from tests.tiny_models import tiny_config, tiny_model

CASES = cases()
PICTURES = {"pixel_values": torch.randn(2, 3, 16, 16)}


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    """A group of one, which is enough for the reducer to notice."""
    file = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def two_steps(model, batch, loss_of=lambda outputs: outputs.loss):
    """The second fails if a parameter had no gradient in the first."""
    parallel = DistributedDataParallel(model.train(), find_unused_parameters=False)
    for _ in range(2):
        loss_of(parallel(**batch)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_two_steps(name, checkpointing):
    case = CASES[name]
    model = case.build()
    if checkpointing:
        model.gradient_checkpointing_enable()
    two_steps(model, case.collate(case.rows))


@pytest.mark.parametrize("length", [3, 16])
@pytest.mark.parametrize("loss", [*LOSSES, None])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressive_classifiers(compression, loss, length):
    """Of every compression, before there is something to compress and after."""
    if (loss is None) != (compression not in ("conv", "dilated_conv")):
        pytest.skip("convolutions learn, others do not")
    case = CASES["compressive_transformer-single_label_classification"]
    case = case._replace(fields={**case.fields, "compression": compression, "compression_loss": loss})
    model, batch = case.build(), case.collate(case.rows)
    if compression == "most_used":
        model.set_attn_implementation("eager")
    two_steps(model, {"input_ids": batch["input_ids"][:, :length].clamp(min=1), "labels": batch["labels"]})
    learned = [p.grad for n, p in model.named_parameters() if ".compression" in n]
    assert bool(learned) == (loss is not None)
    assert all(gradient.abs().sum() > 0 for gradient in learned) or length == 3


def test_a_compressive_classifier_evaluates_classes_alone():
    case = CASES["compressive_transformer-single_label_classification"]
    model, batch = case.build(), case.collate(case.rows)
    plain, trained = model.eval()(**batch), model.train()(**batch)
    assert plain.compression_loss is None
    assert trained.loss > plain.loss + 0.01


def test_a_compressive_classifier_with_a_frozen_compression():
    """As its page has it: then nothing but the classes trains."""
    case = CASES["compressive_transformer-single_label_classification"]
    model = case.build()
    for block in model.model.layers:
        block.compression.requires_grad_(False)
    two_steps(model, case.collate(case.rows))


def sum_of_maps(outputs):
    return sum(maps.square().sum() for maps in outputs.feature_maps)


@pytest.mark.parametrize("stages", [["stage2"], ["stage1", "stage2"], ["stem", "stage1", "stage2"]])
def test_backbones(stages):
    config = tiny_config("swin_transformer", out_features=stages)
    two_steps(SwinTransformerBackbone(config), PICTURES, sum_of_maps)


def test_backbones_and_classifiers_load_each_other(tmp_path):
    """Neither lacks a key of the other's, but for its own head."""
    backbone = tiny_model("swin_transformer", AutoBackbone)
    classifier = tiny_model("swin_transformer", AutoModelForImageClassification)
    for model in (backbone, classifier):
        for tensor in model.swin.layernorm.state_dict().values():
            tensor.add_(torch.randn_like(tensor))
        model.save_pretrained(tmp_path / type(model).__name__)
    loaded, said = SwinTransformerBackbone.from_pretrained(
        tmp_path / "SwinTransformerForImageClassification", output_loading_info=True
    )
    assert {key.split(".")[0] for key in said["missing_keys"]} == {"hidden_states_norms"}
    assert {key.split(".")[0] for key in said["unexpected_keys"]} == {"classifier"}
    assert torch.equal(loaded.swin.layernorm.weight, classifier.swin.layernorm.weight)
    loaded, said = SwinTransformerForImageClassification.from_pretrained(
        tmp_path / "SwinTransformerBackbone", output_loading_info=True
    )
    assert {key.split(".")[0] for key in said["missing_keys"]} == {"classifier"}
    assert {key.split(".")[0] for key in said["unexpected_keys"]} == {"hidden_states_norms"}
    assert torch.equal(loaded.swin.layernorm.weight, backbone.swin.layernorm.weight)
    assert loaded.swin.layernorm.weight.requires_grad
    again, said = SwinTransformerBackbone.from_pretrained(
        tmp_path / "SwinTransformerBackbone", output_loading_info=True
    )
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(again.swin.layernorm.weight, backbone.swin.layernorm.weight)
    two_steps(again, PICTURES, sum_of_maps)
