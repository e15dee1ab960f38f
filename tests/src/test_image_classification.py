"""Image classification: the task's parts, and a run from training to the pipeline and the card."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoConfig, AutoModelForImageClassification, Trainer, TrainingArguments, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_torchvision_available
from typer.testing import CliRunner

from hf_tfamily.data import LabelledImages, load_data
from hf_tfamily.finished import evaluate, load_finished
from hf_tfamily.modeling.modeling_swin_transformer import SwinTransformerForImageClassification
from hf_tfamily.recipes import RecipeError, load_recipe
from hf_tfamily.tasks import task_of
from hf_tfamily.tasks.image_classification import (
    HeldOutPixels,
    ImageClassificationTask,
    TrainingPixels,
    cross_entropy_of_shares,
    figures,
    held_out_logits,
)
from hf_tfamily.training import train
from hf_tfamily_cli import app

MICRO = """
title: Digits by a small Swin
model:
  model_type: swin_transformer
  image_size: 8
  patch_size: 2
  embed_dim: 16
  depths: [2, 2]
  num_heads: [2, 4]
  window_size: 2
  drop_path_rate: 0.0
  initializer_range: 0.2
  num_labels: 10
data: {source: digit_classes, augmentation: {shift: 1}}
training:
  max_steps: 200
  per_device_train_batch_size: 32
  per_device_eval_batch_size: 99
  learning_rate: 5e-3
  label_smoothing_factor: 0.1
  logging_steps: 50
  eval_strategy: steps
  eval_steps: 200
  save_strategy: no
"""
PICTURES = ("samples.png", "confusion.png", "loss.png", "patterns.png")
no_processor = pytest.mark.skipif(
    transformers.__version__ == "5.17.0" and not is_torchvision_available(),
    reason="pipelines of Transformers 5.17 want torchvision for any image processor",
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "digits.yaml"
    file.write_text(MICRO)
    return file


@pytest.fixture(scope="module")
def folder(file, tmp_path_factory):
    """A finished run; do not write into it."""
    return train(load_recipe(file), tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(scope="module")
def data(file):
    return load_data(load_recipe(file).data)


@pytest.fixture(scope="module")
def pictures(data, tmp_path_factory):
    """Files of the first three held-out digits."""
    place = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        data.eval[number]["image"].save(place / f"{number}.png")
    return sorted(place.iterdir())


def test_the_class_of_data_chooses_the_task(file):
    assert isinstance(task_of(load_recipe(file)), ImageClassificationTask)


def test_a_run_leaves_figures_pictures_and_a_card(folder, data):
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["accuracy"] > 0.5  # by chance 0.1
    assert metrics["accuracy"] <= metrics["top_5_accuracy"] <= 1
    assert abs(metrics["accuracy"] - metrics["balanced_accuracy"]) < 0.1
    again = evaluate(folder, batch_size=50, progress=False)
    assert again == pytest.approx({name: metrics[name] for name in again}, abs=1e-6)
    for name in PICTURES:
        assert Image.open(folder / name).size[0] > 300, name
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.library_name == "transformers"
    (result,) = card.data.eval_results
    assert (result.task_type, result.metric_type) == ("image-classification", "accuracy")
    assert result.metric_value == metrics["accuracy"]
    assert "![confusion](confusion.png)" in card.text
    assert "AutoModelForImageClassification" in card.text
    assert f"mean over classes: {100 * metrics['balanced_accuracy']:.1f} %" in card.text


def test_classes_have_names(folder):
    config = AutoConfig.from_pretrained(folder)
    assert config.id2label == {number: str(number) for number in range(10)}
    assert config.label2id["7"] == 7


def test_the_saved_processor_makes_the_pixels_that_were_trained_on(folder, data):
    processor = AutoImageProcessor.from_pretrained(folder)
    rows = data.train[:6]
    expected = processor([picture.convert("RGB") for picture in rows["image"]], return_tensors="pt")["pixel_values"]
    assert expected.shape == (6, 3, 8, 8)
    plain = LabelledImages(**{**vars(data), "augmentation": type(data.augmentation)()})
    close = 0 if processor.backend == "pil" else 1e-6
    for made in (TrainingPixels.of(plain)(rows), HeldOutPixels(data.processor)(rows)):
        torch.testing.assert_close(made["pixel_values"], expected, rtol=0, atol=close)
    brightness = torch.from_numpy(np.array(rows["image"][0])).float()
    torch.testing.assert_close(expected[0, 1], brightness / 127.5 - 1)


@no_processor
def test_the_pipeline_names_classes_of_files(folder, data, pictures):
    classify = pipeline("image-classification", model=str(folder), device="cpu")
    found = classify([str(picture) for picture in pictures], top_k=10)
    logits, _ = held_out_logits(load_finished(folder).model.cpu(), data, 99, progress=False)
    for answers, row in zip(found, torch.from_numpy(logits[:3]).softmax(dim=-1)):
        assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(
            {str(number): float(share) for number, share in enumerate(row)}, abs=1e-5
        )


def test_the_command_line_evaluates_and_classifies(folder, pictures, tmp_path):
    run = CliRunner().invoke(app, ["evaluate", str(folder), "--plot", str(tmp_path / "confusion.png")])
    assert run.exit_code == 0, run.output
    assert "Held-out accuracy: " in run.output
    assert Image.open(tmp_path / "confusion.png").size[0] > 300
    files = [word for picture in pictures for word in ("--pictures", str(picture))]
    run = CliRunner().invoke(app, ["sample", str(folder), *files])
    assert run.exit_code == 0, run.output
    lines = run.output.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(picture) for picture in pictures]
    assert all(line.count(",") == 4 for line in lines)
    run = CliRunner().invoke(app, ["sample", str(folder)])
    assert run.exit_code == 2
    assert "Give pictures to classify: --pictures FILE" in run.output
    run = CliRunner().invoke(app, ["sample", str(folder), "--temperature", "2"])
    assert "options here: --pictures" in run.output
    run = CliRunner().invoke(app, ["show", "swin_transformer/fashion_mnist"])
    assert run.exit_code == 0, run.output
    assert "window_2d" in run.output


@pytest.mark.slow
@no_processor
def test_a_finished_folder_runs_where_this_package_is_not(folder, pictures, tmp_path):
    code = (
        "import sys; sys.modules['hf_tfamily'] = None\n"
        "from transformers import pipeline\n"
        f"classify = pipeline('image-classification', model={str(folder)!r}, trust_remote_code=True, device='cpu')\n"
        f"print(classify({str(pictures[0])!r}, top_k=1)[0]['label'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    ours = CliRunner().invoke(app, ["sample", str(folder), "--pictures", str(pictures[0])]).output
    assert run.stdout.split()[-1] == ours.partition(": ")[2].split()[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_labels=9", "num_labels=9 does not fit the data; it needs 10"),
        ("model.num_channels=1", "num_channels=1 does not fit the data; it needs 3"),
        ("model.patch_size=16", r"patch_size=16 is larger than the pictures, \(8, 8\)"),
        ("data.augmentation={mixup: -1}", "mixup must be at least 0"),
        ("data.augmentation={blur: 1}", "blur"),
    ],
)
def test_unfit_recipes_are_refused(file, override, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        train(load_recipe(file, [override]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_pictures_are_mixed_within_their_batch(data, tmp_path):
    mixed = LabelledImages(**{**vars(data), "augmentation": type(data.augmentation)(mixup=1.0)})
    model = ImageClassificationTask().build_model(_config(), mixed)
    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=8, use_cpu=True, report_to="none")
    trainer = ImageClassificationTask().build_trainer(model, arguments, mixed)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["labels"].shape == (8, 10)
    torch.testing.assert_close(batch["labels"].sum(dim=1), torch.ones(8))
    assert (batch["labels"] > 0).sum() > 8
    held_out = next(iter(trainer.get_eval_dataloader()))
    assert held_out["labels"].tolist() == data.eval[:8]["label"]


def _config():
    return SwinTransformerForImageClassification.config_class(
        image_size=8, patch_size=1, embed_dim=8, depths=[1], num_heads=[2], window_size=4, num_labels=10
    )


def test_the_loss_is_a_mean_over_pictures_whatever_the_step():
    class Outputs:
        logits = torch.randn(6, 4)

    classes = torch.tensor([0, 3, 1, 1, 2, 0])
    shares = torch.nn.functional.one_hot(classes, 4).float()
    expected = torch.nn.functional.cross_entropy(Outputs.logits, classes)
    torch.testing.assert_close(cross_entropy_of_shares(Outputs, classes), expected)
    torch.testing.assert_close(cross_entropy_of_shares(Outputs, shares), expected)
    torch.testing.assert_close(cross_entropy_of_shares(Outputs, shares, torch.tensor(2 * 24)), expected / 2)
    torch.testing.assert_close(cross_entropy_of_shares(Outputs, classes, torch.tensor(2 * 6)), expected / 2)


def test_accumulated_micro_batches_train_like_one_batch(data, tmp_path):
    plain = LabelledImages(**{**vars(data), "augmentation": type(data.augmentation)()})
    found = []
    for size, steps in ((8, 1), (4, 2)):
        torch.manual_seed(0)
        model = ImageClassificationTask().build_model(_config(), plain)
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=2,
            label_smoothing_factor=0.1,
            optim="sgd",
            learning_rate=0.1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        ImageClassificationTask().build_trainer(model, arguments, plain).train()
        found.append(torch.cat([weights.flatten() for weights in model.parameters()]).detach())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_training_can_begin_with_a_checkpoint(file, folder, tmp_path):
    still = ["training.max_steps=1", "training.learning_rate=0"]
    again = train(load_recipe(file, still), tmp_path / "again", weights=folder)
    there, here = (load_finished(place).model.state_dict() for place in (folder, again))
    assert all(torch.equal(there[name], here[name]) for name in there)
    assert f"Training began with the weights of {folder}." in load_recipe(again / "recipe.yaml").notes
    with pytest.raises(RecipeError, match=r"lacks \d+ weights"):
        train(load_recipe(file, ["model.depths=[2, 4]", *still]), tmp_path / "deeper", weights=folder)


def test_figures_of_unbalanced_classes():
    logits = np.eye(7)[[0, 0, 0, 0, 1, 0]] + 0.01 * np.arange(7)[::-1]
    labels = np.array([0, 0, 0, 0, 1, 1])
    found = figures(logits, labels)
    assert found["accuracy"] == pytest.approx(5 / 6)
    assert found["balanced_accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert found["commonest_class_accuracy"] == pytest.approx(4 / 6)
    assert found["top_5_accuracy"] == 1
    assert "top_5_accuracy" not in figures(logits[:, :5], labels)


def test_a_checkpoint_goes_on_with_other_classes(folder, data, tmp_path):
    """Fine-tuning as Transformers has it: the classifier starts anew, everything else is kept."""
    copied = shutil.copytree(folder, tmp_path / "copy")
    model, said = AutoModelForImageClassification.from_pretrained(
        copied, num_labels=2, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {entry[0] for entry in said["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    even = data.train.select(range(64)).map(lambda row: {"label": row["label"] % 2})
    even = even.cast_column("label", type(data.train.features["label"])(names=["even", "odd"]))
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        gradient_checkpointing=True,
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        save_strategy="no",
    )
    before = model.swin.encoder.layers[0].blocks[0].mlp.fc1.weight.detach().clone()
    Trainer(model, arguments, train_dataset=even.with_transform(HeldOutPixels(data.processor))).train()
    assert not torch.equal(before, model.swin.encoder.layers[0].blocks[0].mlp.fc1.weight)
