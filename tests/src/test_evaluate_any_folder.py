"""Figures and samples of models that no run finished here: saved, converted, stock, or on the Hub."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from typer.testing import CliRunner

from hf_tfamily import (
    RoPEDecoderConfig,
    RoPEDecoderForCausalLM,
    SwinTransformerConfig,
    SwinTransformerForImageClassification,
    TransformerXLConfig,
    TransformerXLForCausalLM,
    VanillaEncoderConfig,
    VanillaEncoderForMaskedLM,
)
from hf_tfamily.data import byte_tokenizer, load_data
from hf_tfamily.data.text_tokenizers import train_bpe
from hf_tfamily.finished import evaluate, task_in
from hf_tfamily.recipes import load_recipe
from hf_tfamily.stream_evaluation import stream_losses
from hf_tfamily.tasks import MaskedTextTask
from hf_tfamily.training import train
from hf_tfamily_cli import app
from tests.hub.conftest import open_hub

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
JUDE = ("source=bible_stream", "length=16", "eval_books=[Jude]", "limit=1000", "eval_limit=200")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models without recipes; do not write into them."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("models")
    llama = LlamaConfig(vocab_size=257, max_position_embeddings=32, intermediate_size=16, **SIZES)
    rope = RoPEDecoderConfig(vocab_size=257, max_position_embeddings=32, **SIZES)
    masked = VanillaEncoderConfig(vocab_size=258, max_position_embeddings=32, **SIZES)
    bert = BertConfig(vocab_size=258, intermediate_size=16, max_position_embeddings=32, **SIZES)
    made = {
        "rope": RoPEDecoderForCausalLM(rope),
        "xl": TransformerXLForCausalLM(TransformerXLConfig(vocab_size=257, mem_len=12, **SIZES)),
        "llama": LlamaForCausalLM(llama),
        "masked": VanillaEncoderForMaskedLM(masked),
        "bert": BertForMaskedLM(bert),
        "classifier": LlamaForSequenceClassification(llama),
        "bare": RoPEDecoderForCausalLM(rope),
    }
    masking = byte_tokenizer()
    masking.add_special_tokens({"mask_token": "<mask>"})
    for name, model in made.items():
        model.save_pretrained(place / name)
        if name != "bare":
            (masking if name in ("masked", "bert") else byte_tokenizer()).save_pretrained(place / name)
    return place


def words(data):
    return [word for setting in data for word in ("--data", setting)]


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")

    def run(*arguments):
        result = CliRunner().invoke(app, list(map(str, arguments)))
        return result.exit_code, " ".join(result.output.split())

    return run


@pytest.mark.parametrize("name", ["rope", "xl", "llama"])
def test_causal_models_are_measured_and_sampled(folders, name, run):
    found = evaluate(folders / name, data=JUDE, batch_size=2, progress=False)
    data = load_data({"source": "bible_stream", "length": 16, "eval_books": ["Jude"], "limit": 1000, "eval_limit": 200})
    model_class = {"rope": RoPEDecoderForCausalLM, "xl": TransformerXLForCausalLM, "llama": LlamaForCausalLM}[name]
    losses = stream_losses(model_class.from_pretrained(folders / name), data.eval, 16, 256, num_streams=2)
    assert found["bits_per_byte"] == pytest.approx(losses.mean() / math.log(2), abs=1e-4)
    code, said = run("evaluate", folders / name, *words(JUDE))
    assert code == 0, said
    assert re.search(r"Held-out bits per byte: [\d.]+ \(perplexity [\d.]+ per token", said)
    code, said = run("sample", folders / name, "--prompt", "And", "--max-new-tokens", 4)
    assert code == 0, said


def test_converted_models_are_measured_like_those_they_come_from(folders, run, tmp_path):
    code, said = run("convert", folders / "llama", tmp_path / "ours")
    assert code == 0, said
    ours = evaluate(tmp_path / "ours", data=JUDE, progress=False)
    assert ours == pytest.approx(evaluate(folders / "llama", data=JUDE, progress=False), rel=1e-4)


@pytest.mark.parametrize("name", ["masked", "bert"])
def test_masked_models_are_measured(folders, name):
    data = ("source=bible_masked", *JUDE[1:])
    assert 0 < evaluate(folders / name, data=data, progress=False)["bits_per_hidden_token"] < 12
    assert isinstance(task_in(folders / name), MaskedTextTask)


def test_windows_of_text_are_measured_too(folders):
    found = evaluate(folders / "rope", data=("source=bible", *JUDE[1:-1], "eval_limit=3"), progress=False)
    assert 0 < found["bits_per_dim"] < 20


def test_the_tokenizer_that_is_missing_is_asked_for(folders, run):
    asked = "holds no tokenizer; give one: --tokenizer bytes, a folder, or a name on the Hub."
    code, said = run("evaluate", folders / "bare", *words(JUDE))
    assert code == 2
    assert said == f"Error: {folders / 'bare'} {asked}"
    code, said = run("sample", folders / "bare", "--prompt", "a")
    assert code == 2
    assert "There is no tokenizer beside this model; give one: --tokenizer bytes" in said
    for tokenizer in ("bytes", folders / "rope"):
        code, said = run("evaluate", folders / "bare", *words(JUDE), "--tokenizer", tokenizer)
        assert code == 0, said
        code, said = run("sample", folders / "bare", "--prompt", "a", "--tokenizer", tokenizer, "--max-new-tokens", 2)
        assert code == 0, said


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("rope", (), "holds no recipe.yaml that says on what to measure this rope_decoder; say it: --data source="),
        ("rope", ("--data", "length=3"), "holds no recipe.yaml that says on what to measure"),
        ("rope", ("--set", "data.length=3", *words(JUDE)), "--set changes a recipe, and"),
        ("rope", words(("source=bible_streem",)), "Unknown data source 'bible_streem'; did you mean 'bible_stream'"),
        ("rope", words(("source=bible_stream", "lenght=3")), "has no argument 'lenght'; did you mean 'length'"),
        ("rope", words(("source=text_file_stream",)), "needs the argument 'path'"),
        ("rope", words(("source",)), "--data is written key=value, such as length=128; got 'source'."),
        (
            "rope",
            words(("source=bible_masked",)),
            "holds a RoPEDecoderForCausalLM, and the source 'bible_masked' is for",
        ),
        ("masked", words(JUDE), "sources for this one: bible_masked, masked_text_file."),
        ("rope", words(("source=bible_stream", "length=40")), "max_position_embeddings=32 is too small"),
        ("rope", (*words(JUDE), "--tokenizer", "bytes_with_end"), "vocab_size=257 is too small: the data has 258 ids"),
        (
            "rope",
            (*words(JUDE), "--data", "tokenizer=bytes_with_end"),
            "(258 ids) is not the one beside the model: ids mean",
        ),
        ("rope", words(("source=digits",)), "vocab_size"),
        ("rope", (*words(("source=digits",)), "--tokenizer", "bytes"), "--tokenizer: the source 'digits' takes none."),
        ("classifier", words(JUDE), "names LlamaForSequenceClassification as its architecture, which neither"),
        ("nowhere", words(JUDE), "There is no folder"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_said_in_one_line(folders, run, name, arguments, message):
    code, said = run("evaluate", folders / name, *arguments)
    assert code == 2, said
    assert said.startswith("Error: ")
    if message != "vocab_size":
        assert message in said
    assert "Traceback" not in said


MICRO = """
title: The Bible in byte pairs by a model of a few thousand parameters
model: {model_type: rope_decoder, vocab_size: 300, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}
data: {source: text_file_stream, path: PATH, length: 16, tokenizer: {train: bpe, vocab_size: 300}}
training: {max_steps: 2, per_device_train_batch_size: 4, per_device_eval_batch_size: 4, eval_strategy: 'no'}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run whose tokenizer was trained; do not write into it."""
    place = tmp_path_factory.mktemp("runs")
    (place / "text").write_text("the cat sat on the mat and the dog sat on the log.\n" * 300)
    (place / "micro.yaml").write_text(MICRO.replace("PATH", str(place / "text")))
    return train(load_recipe(place / "micro.yaml"), place / "micro")


def test_finished_runs_are_measured_on_other_texts_with_their_own_tokenizer(finished, tmp_path, run):
    (tmp_path / "other").write_text("a wholly other text: xylophones quiz vowels.\n" * 300)
    other = f"path={tmp_path / 'other'}"
    expected = evaluate(finished, data=["source=text_file_stream", other, "length=16"], progress=False)
    for data, overrides in (([other], []), ([], [f"data.{other}"])):
        assert evaluate(finished, overrides, data=data, progress=False) == expected
    assert expected["bits_per_byte"] > json.loads((finished / "metrics.json").read_text())["bits_per_byte"]
    code, said = run("evaluate", finished, "--data", "tokenizer=bytes")
    assert code == 2
    assert "The data's tokenizer (257 ids) is not the one beside the model: ids mean other tokens" in said
    train_bpe(Path(__file__).read_text(), 400)[0].save_pretrained(tmp_path / "larger")
    code, said = run("evaluate", finished, "--tokenizer", tmp_path / "larger")
    assert code == 2
    assert "vocab_size=300 is too small: the data has 400 ids, those of its tokenizer" in said
    code, said = run("sample", finished, "--prompt", "the cat", "--max-new-tokens", 5)
    assert code == 0, said


def test_a_tokenizer_from_elsewhere_may_be_gone(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "copy")
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(re.sub(r"tokenizer:.*?(?=\n\S)", "tokenizer: /gone", recipe, flags=re.DOTALL))
    assert load_recipe(folder / "recipe.yaml").data["tokenizer"] == "/gone"
    assert evaluate(folder, progress=False) == evaluate(finished, progress=False)
    with pytest.raises(ValueError, match="tokenizer=/other: there is no such folder"):
        evaluate(folder, ["data.tokenizer=/other"], progress=False)


def test_without_its_tokenizer_a_trained_one_is_not_made_anew(finished, tmp_path, run):
    folder = shutil.copytree(finished, tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    code, said = run("evaluate", folder)
    assert code == 2
    assert said == f"Error: {folder} holds no tokenizer; give one: --tokenizer bytes, a folder, or a name on the Hub."
    assert evaluate(folder, tokenizer=str(finished), progress=False) == evaluate(finished, progress=False)


def test_pictures_without_a_recipe(finished_once, tmp_path, run):
    folder = shutil.copytree(finished_once, tmp_path / "copy")
    (folder / "recipe.yaml").unlink()
    found = evaluate(folder, data=["source=digits"], batch_size=100, progress=False)
    assert found["bits_per_dim"] == pytest.approx(json.loads((folder / "metrics.json").read_text())["bits_per_dim"])
    code, said = run("sample", folder, "--classes", "3", "--count", 2, "--output", tmp_path / "drawn.png")
    assert (code, (tmp_path / "drawn.png").exists()) == (0, True), said
    code, said = run("sample", folder, "--tokenizer", "bytes")
    assert (code, said) == (2, "Error: --tokenizer: this model's data are pictures.")
    code, said = run("evaluate", folder, "--data", "source=bible")
    assert code == 2
    assert "holds no tokenizer; give one: --tokenizer bytes" in said


def test_classes_of_pictures_have_to_be_those_of_the_model(tmp_path, run):
    config = SwinTransformerConfig(
        **{"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 2},
        id2label=dict(enumerate("abcdefghij")),
    )
    SwinTransformerForImageClassification(config).save_pretrained(tmp_path)
    code, said = run("evaluate", tmp_path, "--data", "source=digit_classes")
    assert code == 2
    assert "The model's classes are a, b, c, d, e, f, g, h, i, j; those of the data 0, 1, 2" in said


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on loopback in place of the real one."""
    with open_hub() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        settings = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
        for name, value in {**settings, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path / "cache")}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "write")
        yield hub


def test_repositories_on_the_hub(hub, finished, folders, run):
    for folder, name in ((finished, "someone/micro"), (folders / "rope", "someone/rope")):
        code, said = run("push", folder, name)
        assert code == 0, said
    code, said = run("evaluate", "someone/micro", "--batch-size", 4)
    assert code == 0, said
    assert said == run("evaluate", finished, "--batch-size", 4)[1]
    code, said = run("evaluate", "someone/rope", *words(JUDE))
    assert code == 0, said
    code, said = run("sample", "someone/micro", "--prompt", "the", "--max-new-tokens", 3)
    assert code == 0, said
    code, said = run("sample", "someone/nothing", "--prompt", "the")
    assert code == 2
    assert said.startswith("Error: someone/nothing is no folder, and the Hub gives no model of that name (")
