"""What is not trusted: secrets in recipes, HTML in cards, names with markup, pickles, and who may read weights."""

import ast
import json
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_tfamily.card import model_card
from hf_tfamily.conversion import convert
from hf_tfamily.data import load_data
from hf_tfamily.hub import export
from hf_tfamily.recipes import RecipeError, load_recipe
from hf_tfamily.secret_values import without_secrets
from hf_tfamily.tasks import task_of
from hf_tfamily.training import default_output, train
from hf_tfamily_cli import app
from tests.src.conftest import MICRO
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "aBcDeFgHiJ" * 3 + "1234"
TAG = "<script>alert(1)</script>"


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def keep_checkpoints(monkeypatch):
    """The working folder of a run stays when it is finished."""
    remove = shutil.rmtree

    def rmtree(folder, **kwargs):
        if not list(Path(folder).glob("checkpoint-*")):
            remove(folder, **kwargs)

    monkeypatch.setattr("hf_tfamily.training.shutil.rmtree", rmtree)


@pytest.mark.parametrize(
    ("override", "where"),
    [
        (f"training.hub_token={TOKEN}", "--set"),
        ("training.hub_token=mine", "training.hub_token"),
        (f"training.run_name={TOKEN}", "--set"),
        (f"data.path=https://me:{TOKEN[3:]}@example.org/data", "--set"),
        (f"training.hub_tokn={TOKEN}", "--set"),
        (f"nowhere.{TOKEN}={TOKEN}", "--set"),
    ],
)
def test_secrets_on_the_command_line_are_refused_and_not_repeated(micro_file, tmp_path, override, where):
    said = invoke("train", micro_file, "--output", tmp_path / "run", "--set", override)
    assert said.exit_code == 2
    assert where in said.output
    assert "HF_TOKEN" in said.output
    assert "hf auth login" in said.output
    assert TOKEN[3:] not in said.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    [
        f"training: {{hub_token: {TOKEN}}}",
        f"model: {{model_type: {TOKEN}}}",
        f"notes: [fine, 'use {TOKEN}']",
        f"{TOKEN}: 3",
        f"notes: [{TOKEN}\ntitle: '",
        TOKEN,
    ],
)
def test_secrets_in_files_are_refused_and_not_repeated(tmp_path, line):
    file = tmp_path / "recipe.yaml"
    file.write_text(line)
    for command in ("train", "show"):
        said = invoke(command, file)
        assert said.exit_code == 2
        assert TOKEN not in said.output


def test_recipes_of_python_are_looked_at_too(micro, tmp_path):
    micro.training["hub_token"] = "anything"
    try:
        with pytest.raises(RecipeError, match=r"training.hub_token holds a secret"):
            train(micro, tmp_path / "run")
    finally:
        del micro.training["hub_token"]
    assert list(tmp_path.iterdir()) == []


def test_fields_of_tokens_are_no_secrets(micro_file):
    load_recipe(micro_file, ["model.pad_token_id=0", "training.hub_token=null", "training.run_name=hf_small"])
    assert without_secrets("hf_tfamily, sk-1 and https://huggingface.co:443/x") == (
        "hf_tfamily, sk-1 and https://huggingface.co:443/x"
    )


def test_a_token_of_the_environment_is_written_nowhere(micro_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "work").mkdir()
    keep_checkpoints(monkeypatch)
    said = invoke("train", micro_file, "--output", tmp_path / "work" / "run", "--set", "training.max_steps=2")
    assert said.exit_code == 0, said.output
    assert TOKEN not in said.output
    written = [path for path in (tmp_path / "work").rglob("*") if path.is_file()]
    assert {"README.md", "recipe.yaml", "training_args.bin"} <= {path.name for path in written}
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


def test_html_of_anybody_is_shown_in_cards_and_does_nothing(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(MICRO.replace("title: ", f"reference: {TAG}\nnotes: ['{TAG}', 'a < b']\ntitle: {TAG} "))
    recipe = load_recipe(file)
    metrics = {"bits_per_dim": 1.0, "parameters": 1, "steps": 1, "seconds": 1, "uniform_bits_per_dim": 1.0}
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    card = model_card(recipe, task_of(recipe), load_data(recipe.data), metrics, tmp_path)
    assert "<script" not in str(card)
    assert str(card).count("&lt;script") == 3
    assert "a < b" in str(card)


@pytest.mark.parametrize("name", ["[bold]$(rm x);'`$\\frac$", "$\\frac$", "a [red]b&c"])
def test_names_with_markup_print_as_they_are(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    Path(f"{name}.yaml").write_text(MICRO)
    said = invoke("train", f"{name}.yaml", "--set", "training.max_steps=1", "--set", "training.eval_strategy=no")
    assert said.exit_code == 0, said.output
    assert f"runs/sparse_transformer-{name}/loss.png" in said.output
    assert [path.name for path in Path("runs").iterdir()] == [f"sparse_transformer-{name}"]
    assert f"{name}.yaml" in invoke("show", f"{name}.yaml", "--output", "seen.png").output


@pytest.mark.parametrize("name", ["../up.yaml", "../../etc/passwd", "/tmp/x/..", "..", ".", "configs/../../x.yaml"])
def test_names_do_not_leave_the_folder_of_runs(micro, name):
    output = default_output(replace(micro, name=name))
    assert Path(os.path.normpath(output)).parent == Path("runs")
    with pytest.raises(RecipeError, match="No recipe and no file"):
        load_recipe(f"../configs/{name}/nothing")


def modes(folder):
    return {stat.S_IMODE(path.stat().st_mode) for path in Path(folder).rglob("*") if path.is_file()}


def test_weights_are_readable_like_the_files_beside_them(micro_file, tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        keep_checkpoints(monkeypatch)
        train(load_recipe(micro_file, ["training.max_steps=2"]), tmp_path / "run")
        export(tiny_model("rope_decoder", AutoModelForCausalLM), tmp_path / "exported")
        convert(tmp_path / "exported", tmp_path / "converted", "llama")
    finally:
        os.umask(before)
    assert (tmp_path / "run.partial" / "checkpoint-2" / "model.safetensors").exists()
    for folder in ("run", "run.partial", "exported", "converted"):
        assert modes(tmp_path / folder) == {0o640}, folder


def calls(name):
    """(file, call) of every call of a function of that name in our own code."""
    for path in (path for top in ("src", "modeling", "scripts") for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
                yield path.name, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def test_pickles_are_read_as_weights_alone():
    found = list(calls("torch.load"))
    assert found
    assert all(keywords.get("weights_only") == "True" for _, keywords in found), found


@pytest.mark.parametrize("name", ["pickle.load", "pickle.loads", "joblib.load", "numpy.load", "eval", "exec"])
def test_nothing_else_runs_code_of_files(name):
    assert not [(file, keywords) for file, keywords in calls(name) if keywords.get("allow_pickle") != "False"]


def test_remote_code_runs_on_request_alone():
    sources = [path for top in ("src", "modeling") for path in (ROOT / top).rglob("*.py")]
    trusting = [path.name for path in sources if "trust_remote_code" in ast.dump(_code(path))]
    assert trusting == []


def _code(path):
    """A file without its texts, in which cards say how to load a model."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return tree
