"""The command line: what it prints, what it writes, and how it says no."""

import re
import subprocess
import sys
from importlib import metadata

import pytest
from PIL import Image
from typer.testing import CliRunner

from hf_tfamily.recipes import list_recipes
from hf_tfamily_cli import app


@pytest.fixture
def run(monkeypatch):
    """Runs `hf-tfamily ARGUMENTS`: its exit code, and what it printed as one line of words."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return result.exit_code, re.sub(r"\s+", " ", result.output)

    return run


def is_picture(path):
    with Image.open(path) as picture:
        return picture.format == "PNG" and min(picture.size) > 100


def test_installed_as_a_command():
    (command,) = metadata.entry_points(group="console_scripts", name="hf-tfamily")
    assert command.value == "hf_tfamily_cli:main"


@pytest.mark.parametrize("arguments", [["train", "--help"], ["recipes"], ["--version"]])
def test_help_and_lists_import_neither_torch_nor_transformers(arguments):
    code = "import sys; from typer.testing import CliRunner; from hf_tfamily_cli import app; "
    code += f"result = CliRunner().invoke(app, {arguments}); assert result.exit_code == 0, result.output; "
    code += "print([name for name in ('torch', 'transformers', 'hf_tfamily') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("columns", [60, 200])
def test_recipes_lists_names_and_sizes(run, columns, monkeypatch):
    """Names are whole, however narrow the terminal is."""
    monkeypatch.setenv("COLUMNS", str(columns))
    code, output = run("recipes")
    assert code == 0
    assert not [name for name in list_recipes() if f"{name} " not in output]
    assert "sparse_transformer/digits" in output
    assert "sparse_transformer/cifar10 59," in output


def test_the_version(run):
    assert run("--version") == (0, f"hf-tfamily {metadata.version('hf-tfamily')} ")


def test_reproduce_lists_claims_and_names_the_nearest(run):
    code, listed = run("reproduce")
    assert code == 0
    assert "transformer_xl_memory" in listed
    assert "a memory of earlier segments lowers the loss" in listed
    code, said = run("reproduce", "transformer_xl_memry")
    assert code == 2
    assert "transformer_xl_memory" in said
    code, said = run("reproduce", "swin_cost", "--quick", "--page", "pages")
    assert code == 2
    assert "leave out --quick or --page" in said


def test_info_tells_what_runs_where(run):
    code, output = run("info")
    assert code == 0
    assert "torch" in output
    assert "what runs block_sparse" in output
    assert "flex_attention" not in output
    code, output = run("info", "--attention")
    assert code == 0
    assert "block_sparse cpu yes yes" in output
    assert "flex_attention cpu yes no" in output


def test_show_a_recipe_and_its_picture(run, tmp_path):
    code, output = run("show", "sparse_transformer/cifar10", "--output", tmp_path / "cifar.png")
    assert code == 0
    assert "parameters, 128 layers of width 256 with 2 heads" in output
    assert "keys per query" in output
    assert is_picture(tmp_path / "cifar.png")


def test_show_names_what_has_no_pattern(run):
    code, said = run("show", "transformer_xl/bible")
    assert code == 2
    assert "A transformer_xl has no attention_patterns to draw" in said


def test_show_a_pattern_in_either_spelling(run):
    short = run("show", "local:window=3", "--length", 8)
    assert short[0] == 0
    assert "8 tokens, 2.6 keys per query" in short[1]  # 1 + 2 + 6 * 3 = 21 keys of 8 queries
    code, output = run("show", '{"type": "local", "window": 3}', "--length", 8)
    assert code == 0
    assert "8 tokens, 2.6 keys per query" in output


def test_show_the_gallery(run, tmp_path):
    code, _ = run("show", "--gallery", tmp_path / "patterns.png")
    assert code == 0
    assert is_picture(tmp_path / "patterns.png")


def test_evaluate_prints_the_figure_of_the_run(run, finished):
    code, output = run("evaluate", finished)
    assert code == 0
    printed = float(re.search(r"bits per dimension: ([\d.]+)", output)[1])
    card = (finished / "README.md").read_text()
    assert float(re.search(r"bits per dimension: ([\d.]+)", card)[1]) == pytest.approx(printed, abs=1e-4)


def test_sample_draws_the_classes_asked_for(run, finished, tmp_path):
    code, output = run("sample", finished, "--classes", "3,7", "--count", 2, "--output", tmp_path / "drawn.png")
    assert code == 0
    assert "drawn.png" in output
    assert (tmp_path / "drawn.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "sparse_transformer/digit"), "did you mean 'sparse_transformer/digits'"),
        (("train", "sparse_transformer/digits", "--set", "model.hidden_sise=3"), "did you mean 'hidden_size'"),
        (("show", "lokal:window=3"), "did you mean 'local'"),
        (("show", "local:window=0"), "Local.window must be an integer of at least 1, got 0"),
        (("show",), "Say what to show"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, arguments, message):
    code, output = run(*arguments)
    assert code == 2
    assert output.startswith("Error:")
    assert message in output
    assert "Traceback" not in output


def test_options_of_other_tasks_are_refused(run, finished):
    code, output = run("sample", finished, "--classes", "a,b")
    assert code == 2
    assert "--classes must be whole numbers such as 0,1,2, got 'a,b'" in output
    code, output = run("sample", finished, "--classes", "10")
    assert code == 2
    assert "10" in output


def test_folder_without_a_model_is_refused(run, tmp_path):
    code, output = run("evaluate", tmp_path)
    assert code == 2
    assert "recipe.yaml" in output
