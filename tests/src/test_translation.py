"""Translation from the recipe to the printed line: training, figures, samples, and the Trainers of Transformers."""

import io
import json

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    MarianConfig,
    MarianMTModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from typer.testing import CliRunner

from hf_tfamily.auto import register_all
from hf_tfamily.data import load_data
from hf_tfamily.modeling.configuration_vanilla_transformer import VanillaTransformerConfig
from hf_tfamily.modeling.modeling_vanilla_transformer import VanillaTransformerForConditionalGeneration
from hf_tfamily.recipes import RecipeError, load_recipe
from hf_tfamily.tasks import task_of
from hf_tfamily.tasks.translation import TranslationTask, bits_per_token, translate
from hf_tfamily.training import train
from hf_tfamily_cli import app
from tests.reference.vanilla_transformer import noam_rate
from tests.src.help_pages import write_help

register_all()

MARIAN = {
    "vocab_size": 300,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
RECIPE = """
title: A help of a few sentences
model:
  model_type: vanilla_transformer
  vocab_size: 300
  hidden_size: 32
  num_hidden_layers: 1
  num_attention_heads: 2
  max_position_embeddings: 256
  norm_first: true
  label_smoothing: 0.1
data:
  source: libreoffice_help
  path: {path}
  vocab_size: 300
  eval_share: 0.25
training:
  max_steps: 6
  per_device_train_batch_size: 8
  learning_rate: 1e-2
  logging_steps: 2
  eval_strategy: steps
  eval_steps: 6
  save_steps: 6
"""


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("translation")
    file = folder / "micro.yaml"
    file.write_text(RECIPE.format(path=write_help(folder / "help")))
    return file


@pytest.fixture(scope="module")
def data(recipe_file):
    return load_data(load_recipe(recipe_file).data)


@pytest.fixture(scope="module")
def finished(recipe_file, tmp_path_factory):
    return train(load_recipe(recipe_file), tmp_path_factory.mktemp("runs") / "micro")


def small_model(**fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "dropout": 0.0}
    return VanillaTransformerForConditionalGeneration(VanillaTransformerConfig(**{**sizes, **fields}))


def test_a_run_leaves_figures_samples_and_a_tokenizer(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert 0 <= metrics["bleu"] <= 100
    assert 0 <= metrics["chrf"] <= 100
    assert 0 < metrics["bits_per_token"] < metrics["uniform_bits_per_token"]
    model = AutoModelForSeq2SeqLM.from_pretrained(finished)
    assert type(model) is VanillaTransformerForConditionalGeneration
    assert model.generation_config.num_beams == 4
    tokenizer = AutoTokenizer.from_pretrained(finished)
    batch = tokenizer(["Opens the file & more."], return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=5).shape[0] == 1
    assert (finished / "samples.txt").read_text(encoding="utf-8").count("reference: ") >= 3
    card = (finished / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: translation" in card
    assert "Held-out BLEU" in card
    assert "MPL-2.0" in card


def test_the_command_line_evaluates_and_translates_lines(finished):
    runner = CliRunner()
    result = runner.invoke(app, ["evaluate", str(finished)])
    assert result.exit_code == 0, result.output
    metrics = json.loads((finished / "metrics.json").read_text())
    assert f"Held-out BLEU: {metrics['bleu']:.2f} (chrF {metrics['chrf']:.2f}" in result.output
    result = runner.invoke(app, ["sample", str(finished)], input="Opens the file & more.\n\nClick OK.\n")
    assert result.exit_code == 0, result.output
    lines = result.output.removesuffix("\n").split("\n")
    assert len(lines) == 3
    assert not lines[1]
    result = runner.invoke(app, ["sample", str(finished), "--count", "2"])
    assert result.exit_code == 2
    assert "cannot be sampled with --count" in result.output


def test_lines_are_translated_in_their_order_whatever_the_batch(finished, monkeypatch):
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    lines = ["Opens the file & more.", "Click OK.", "Saves the table & more.", "Chapter 7", "Deletes the font & more."]
    together = list(translate(model, tokenizer, lines))
    assert together == [next(translate(model, tokenizer, [line])) for line in lines]
    assert together == list(translate(model, tokenizer, lines, batch_size=2))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert TranslationTask().sample(model, tokenizer, None) == together
    assert list(translate(model, tokenizer, [])) == []


def test_bits_per_token_do_not_depend_on_the_batch(data):
    model = small_model().eval()
    found = [bits_per_token(model, data, batch_size) for batch_size in (1, 4, 64)]
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)
    nats, count = 0.0, 0
    for row in data.eval:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).logits[0]
        nats -= logits.log_softmax(-1)[range(len(row["labels"])), row["labels"]].sum().item()
        count += len(row["labels"])
    assert found[0] == pytest.approx(nats / count / 0.6931471805599453, rel=1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vocab_size=290", "vocab_size=290 is too small: the tokenizer has 300 ids"),
        ("model.max_position_embeddings=8", "max_position_embeddings=8 is too small: a text has"),
        ("model.pad_token_id=3", "pad_token_id=3, but the tokenizer of the data has 0"),
        ("data.path=/nowhere", "There is no LibreOffice help"),
    ],
)
def test_unfit_recipes_are_refused(recipe_file, override, message, tmp_path):
    with pytest.raises((RecipeError, FileNotFoundError), match=message):
        train(load_recipe(recipe_file, [override]), tmp_path / "run")
    assert not any(tmp_path.iterdir())


def test_stock_models_may_be_trained_too(recipe_file, data):
    recipe = load_recipe(recipe_file)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    model = task_of(recipe).build_model(MarianConfig(**MARIAN, **ids), data)
    assert type(model) is MarianMTModel
    assert bits_per_token(model, data, 16) > 0


@pytest.mark.parametrize(("name", "ours", "paper"), [("base", 63_082_496, "65"), ("big", 214_245_376, "213")])
def test_paper_recipes_say_what_the_paper_says(name, ours, paper):
    """Table 3, and the schedule of equation 3 as the Trainer has it."""
    recipe = load_recipe(f"vanilla_transformer/{name}")
    assert recipe.parameters == ours
    assert f"The paper says {paper} million" in recipe.notes[0]
    assert f"come to {ours / 1e6:.1f} million" in recipe.notes[0]
    width, warmup = recipe.model["hidden_size"], recipe.training["warmup_steps"]
    assert recipe.training["lr_scheduler_type"] == "inverse_sqrt"
    assert recipe.training["learning_rate"] == pytest.approx(noam_rate(warmup, width, warmup), rel=1e-4)


def test_seq2seq_trainer(data, tmp_path):
    """Transformers' own trainer of translators, with generation at evaluation."""
    model, rows = small_model(label_smoothing=0.1), data.train.select_columns(["input_ids", "labels"])
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=4,
        predict_with_generate=True,
        generation_max_length=8,
        generation_num_beams=2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments,
        data_collator=DataCollatorForSeq2Seq(data.processor, model),
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        processing_class=data.processor,
        compute_metrics=lambda prediction: {"ids_after_8": (prediction.predictions[:, 8:] != 0).sum()},
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert trainer.evaluate()["eval_ids_after_8"] == 0


def test_accumulated_gradients_equal_those_of_the_whole_batch(data, tmp_path):
    """Rows of different lengths: the smoothed loss is a mean over all tokens of a step, however it is cut."""
    rows = data.train.select_columns(["input_ids", "labels"]).select(range(8))

    def trained(batch_size, steps):
        model = small_model(label_smoothing=0.1)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(batch_size)),
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0,
            train_sampling_strategy="sequential",
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        collator = DataCollatorForSeq2Seq(data.processor, model)
        Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator).train()
        return model.state_dict()

    whole, parts = trained(8, 1), trained(2, 4)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=1e-6, rtol=1e-5, msg=name)
