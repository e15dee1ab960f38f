"""What people do with a Swin checkpoint: fine-tune it, put its trunk under other heads, feed it badly."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    SwinConfig,
    SwinForImageClassification,
    SwinForMaskedImageModeling,
    Trainer,
    TrainingArguments,
)

from hf_tfamily.auto import register_all
from hf_tfamily.conversion import convert
from hf_tfamily.modeling.configuration_swin_transformer import SwinTransformerConfig
from hf_tfamily.modeling.modeling_swin_transformer import (
    SwinTransformerBackbone,
    SwinTransformerForImageClassification,
    SwinTransformerForMaskedImageModeling,
    SwinTransformerModel,
)
from tests.tiny_models import SMALL_SWIN

register_all()

TINY = {**SMALL_SWIN, "num_labels": 5}
BACKENDS = ("eager", "sdpa", "block_sparse")
CLASSES = {0: "dark", 1: "grey", 2: "bright"}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Folder of a converted stock classifier of five classes; do not write into it."""
    return converted(tmp_path_factory.mktemp("classifier"), SwinForImageClassification)


def converted(folder, stock_class):
    torch.manual_seed(0)
    stock_class(SwinConfig(**TINY)).save_pretrained(folder / "stock")
    convert(folder / "stock", folder / "ours")
    return folder / "ours"


def shades(count):
    """Noise around three levels of brightness."""
    generator = torch.Generator().manual_seed(0)
    rows = ((number % 3, torch.randn(3, 24, 24, generator=generator)) for number in range(count))
    return [{"pixel_values": 0.3 * noise + label - 1, "labels": label} for label, noise in rows]


def train(model, folder, rows, **arguments):
    defaults = {"max_steps": 8, "per_device_train_batch_size": 12, "learning_rate": 1e-2, "report_to": "none"}
    settings = TrainingArguments(folder, **{**defaults, "save_strategy": "no", "use_cpu": True, **arguments})
    trainer = Trainer(
        model, settings, train_dataset=rows, eval_dataset=rows, compute_metrics=lambda p: {"accuracy": accuracy(p)}
    )
    trainer.train()
    return trainer


def accuracy(prediction):
    return (prediction.predictions.argmax(-1) == prediction.label_ids).mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning


def test_another_number_of_classes_is_an_error_until_asked_for(classifier):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForImageClassification.from_pretrained(classifier, num_labels=3)
    before = AutoModelForImageClassification.from_pretrained(classifier)
    after, found = AutoModelForImageClassification.from_pretrained(
        classifier, id2label=CLASSES, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, *_ in found["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert after.classifier.weight.shape == (3, 16)
    assert after.classifier.weight.isfinite().all()
    for name, parameter in before.swin.named_parameters():
        assert torch.equal(after.swin.get_parameter(name), parameter)


@pytest.mark.parametrize("backend", BACKENDS)
def test_trainer_fine_tunes_on_other_classes_with_gradient_checkpointing(backend, classifier, tmp_path):
    rows, learned = shades(36), []
    for checkpointing in (True, False):
        torch.manual_seed(0)
        model = AutoModelForImageClassification.from_pretrained(
            classifier, id2label=CLASSES, ignore_mismatched_sizes=True, attn_implementation=backend
        )
        trainer = train(model, tmp_path / f"run-{checkpointing}", rows, gradient_checkpointing=checkpointing)
        assert model.is_gradient_checkpointing == checkpointing
        learned.append(trainer.evaluate())
        assert learned[-1]["eval_accuracy"] > 0.9
    assert learned[0]["eval_loss"] == pytest.approx(learned[1]["eval_loss"], rel=1e-4)

    trainer.save_model(tmp_path / "finished")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "finished").eval()
    assert loaded.config.id2label == CLASSES
    pixels = rows[0]["pixel_values"][None]
    torch.testing.assert_close(loaded(pixels).logits, model.eval()(pixels).logits)


def test_trainer_in_bfloat16_with_smoothed_labels_and_frozen_trunk(classifier, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(classifier, num_labels=3, ignore_mismatched_sizes=True)
    model.swin.requires_grad_(False)
    trunk = {name: parameter.clone() for name, parameter in model.swin.named_parameters()}
    options = {"bf16": True, "label_smoothing_factor": 0.1, "max_steps": 2, "gradient_accumulation_steps": 2}
    trainer = train(model, tmp_path, shades(24), **options)
    assert trainer.evaluate()["eval_loss"] < 10
    assert all(torch.equal(parameter, trunk[name]) for name, parameter in model.swin.named_parameters())


def test_trainer_fills_in_masked_patches(tmp_path):
    model = SwinTransformerForMaskedImageModeling.from_pretrained(converted(tmp_path, SwinForMaskedImageModeling))
    hidden = torch.rand(24, 144, generator=torch.Generator().manual_seed(1)) > 0.4
    rows = [{"pixel_values": row["pixel_values"], "bool_masked_pos": mask} for row, mask in zip(shades(24), hidden)]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        before = model.eval()(**batch).loss
    settings = TrainingArguments(
        tmp_path / "run", max_steps=5, learning_rate=1e-2, report_to="none", save_strategy="no", use_cpu=True
    )
    Trainer(model, settings, train_dataset=rows).train()
    with torch.no_grad():
        assert model.eval()(**batch).loss < 0.8 * before


def test_fine_tuning_at_another_resolution_with_larger_windows(classifier):
    """Section A2.1 of the paper: a trained model goes on with larger pictures and windows."""
    model = AutoModelForImageClassification.from_pretrained(classifier)
    table = "encoder.layers.0.blocks.1.attention.relative_position_bias.relative_position_bias_table"
    model.resize_windows(6)
    assert model.swin.get_parameter(table).shape == (11 * 11, 1)
    model(torch.randn(2, 3, 48, 48), labels=torch.tensor([0, 4])).loss.backward()
    assert model.swin.get_parameter(table).grad.abs().sum() > 0


@pytest.mark.parametrize("backend", ["flex_attention", "flash_attention_2"])
def test_backends_that_cannot_run_it_are_refused_when_loading(backend, classifier):
    with pytest.raises(ValueError, match="use 'block_sparse', 'sdpa' or 'eager'"):
        AutoModelForImageClassification.from_pretrained(classifier, attn_implementation=backend)


# ---------------------------------------------------------------------------------------------------------------------
# One trunk, other heads


def test_a_classifier_becomes_every_other_head(classifier):
    trunk = AutoModelForImageClassification.from_pretrained(classifier).swin
    bare = AutoModel.from_pretrained(classifier)
    masked = AutoModelForMaskedImageModeling.from_pretrained(classifier)
    backbone = SwinTransformerBackbone.from_pretrained(classifier, out_features=["stage1", "stage2"])
    assert (type(bare), type(masked)) == (SwinTransformerModel, SwinTransformerForMaskedImageModeling)
    for other in (bare, masked.swin, backbone.swin):
        for name, parameter in trunk.named_parameters():
            assert torch.equal(other.get_parameter(name), parameter)
    assert (masked.swin.embeddings.mask_token == 0).all()
    pixels = torch.randn(1, 3, 24, 24)
    assert masked(pixels).reconstruction.shape == (1, 3, 24, 24)
    assert [m.shape for m in backbone(pixels).feature_maps] == [(1, 8, 12, 12), (1, 16, 6, 6)]


def test_a_masked_model_becomes_a_classifier(tmp_path):
    """How SimMIM checkpoints are used: the decoder and the mask token stay behind."""
    folder = converted(tmp_path, SwinForMaskedImageModeling)
    masked = AutoModelForMaskedImageModeling.from_pretrained(folder)
    model, found = AutoModelForImageClassification.from_pretrained(folder, num_labels=3, output_loading_info=True)
    assert type(model) is SwinTransformerForImageClassification
    assert found["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert found["unexpected_keys"] == {"decoder.0.weight", "decoder.0.bias", "swin.embeddings.mask_token"}
    for name, parameter in model.swin.named_parameters():
        assert torch.equal(masked.swin.get_parameter(name), parameter)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input, and input that only looks bad


@pytest.mark.parametrize("size", [(2, 2), (3, 2), (5, 9), (2, 50), (7, 23)])
def test_pictures_smaller_than_a_window_or_odd_work_in_every_backend(size, classifier):
    """One patch is enough: what is missing to whole patches, windows and pairs is padded."""
    torch.manual_seed(0)
    pixels, found = torch.randn(2, 3, *size), {}
    for backend in BACKENDS:
        model = AutoModelForImageClassification.from_pretrained(classifier, attn_implementation=backend)
        outputs = model(pixels, labels=torch.tensor([0, 4]))
        outputs.loss.backward()
        found[backend] = [outputs.logits.detach(), *(parameter.grad for parameter in model.parameters())]
    for backend in BACKENDS:
        for result, expected in zip(found[backend], found["eager"]):
            torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_pixels_are_not_judged_and_stay_in_their_picture(backend, classifier):
    """Pictures that are not normalised run; one that holds NaN spoils no other of the batch."""
    model = AutoModelForImageClassification.from_pretrained(classifier, attn_implementation=backend).eval()
    torch.manual_seed(0)
    pixels = torch.rand(3, 3, 24, 24)
    pixels[0] *= 255
    pixels[1, 0, 5, 5] = torch.nan
    with torch.no_grad():
        logits = model(pixels).logits
        assert logits[[0, 2]].isfinite().all()
        assert logits[1].isnan().all()
        torch.testing.assert_close(logits[[0, 2]], model(pixels[[0, 2]]).logits)


@pytest.mark.parametrize(
    ("problem", "labels", "message"),
    [
        (None, torch.tensor([0, 5]), r"labels must lie in \[0, 4\] \(num_labels=5\), got \[5\]"),
        (None, torch.tensor([[0], [-1]]), r"labels must lie in \[0, 4\] \(num_labels=5\), got \[-1\]"),
        (None, torch.tensor([0, 1, 2]), r"torch.int64 of shape \[2\], a class .* got torch.int64 of shape \[3\]"),
        (
            None,
            torch.tensor([0.0, 1.0]),
            r"\[2, 5\] for problem_type='multi_label_class.* got torch.float32 of shape \[2\]",
        ),
        ("single_label_classification", torch.rand(2, 5), r"torch.int64 of shape \[2\].* got torch.float32"),
        ("multi_label_classification", torch.rand(2, 2), r"floating point of shape \[2, 5\].* got .* \[2, 2\]"),
        ("multi_label_classification", torch.ones(2, 5).long(), r"floating point of shape .* got torch.int64"),
        ("regression", torch.rand(3, 5), r"floating point of shape \[2, 5\] for problem_type='regression'"),
    ],
)
def test_bad_labels_are_refused_by_name(problem, labels, message):
    model = SwinTransformerForImageClassification(SwinTransformerConfig(**TINY, problem_type=problem))
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(2, 3, 24, 24), labels=labels)


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({}, torch.tensor([-100, 4])),
        ({}, torch.tensor([[3], [4]])),
        ({}, torch.rand(2, 5)),
        ({"problem_type": "regression"}, torch.rand(2, 5)),
        ({"num_labels": 1}, torch.rand(2)),
        ({"num_labels": 1}, torch.rand(2, 1)),
    ],
    ids=["one ignored", "a column", "several classes", "numbers", "one number", "a column of numbers"],
)
def test_losses_are_those_of_stock_swin_for_every_kind_of_labels(fields, labels):
    stock = SwinForImageClassification(SwinConfig(**{**TINY, **fields})).eval()
    model = SwinTransformerForImageClassification(SwinTransformerConfig(**{**TINY, **fields})).eval()
    model.load_state_dict(stock.state_dict())
    pixels = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(model(pixels, labels=labels).loss, stock(pixels, labels=labels).loss)
    assert model.config.problem_type == stock.config.problem_type
