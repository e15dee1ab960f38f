"""The notebooks of docs/: committed without outputs, and run from the first cell to the last."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from .hub.conftest import ENVIRONMENT, hub  # noqa: F401

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
BOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
each_book = pytest.mark.parametrize("name", BOOKS)


def read(name):
    book = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(book)
    return book


def run(name, folder):
    """What its cells print, in order; an error in one is raised."""
    book = read(name)
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def test_there_are_two():
    assert BOOKS == ["from_a_stock_model_to_a_window", "from_digits_to_the_hub"]


@each_book
def test_no_outputs_are_committed(name):
    for cell in read(name).cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


@each_book
def test_links_lead_somewhere(name):
    for cell in read(name).cells:
        for target in re.findall(r"\]\(([^)#]+)\)", cell.source if cell.cell_type == "markdown" else ""):
            assert target.startswith("https://") or (FOLDER / target).exists(), target


@pytest.mark.slow
def test_from_a_stock_model_to_a_window(tmp_path):
    said = run("from_a_stock_model_to_a_window", tmp_path)
    assert re.search(r"stock +\[149, 149\]\nstock, windowed +\[149, 149\]\nRoPE decoder, windowed +\[16, 16\]", said)


@pytest.mark.slow
def test_from_digits_to_the_hub(hub, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    here = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "write", "HF_HOME": str(tmp_path / "home")}
    for variable, value in {**ENVIRONMENT, **here}.items():
        monkeypatch.setenv(variable, value)
    said = run("from_digits_to_the_hub", tmp_path)
    assert f"{hub.url}/someone/sparse-transformer-digits/commit/" in said
    files = hub.repositories["someone/sparse-transformer-digits"].files
    assert {"README.md", "model.safetensors", "samples.png", "modeling_sparse_transformer.py"} <= files.keys()


def test_without_a_hub_to_try_it_on_the_commands_are_shown(monkeypatch, capsys):
    cell = next(
        cell.source
        for cell in read("from_digits_to_the_hub").cells
        if "HF_ENDPOINT" in cell.source and cell.cell_type == "code"
    )
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setenv("HF_TOKEN", "write")
    exec("import os\nfrom huggingface_hub import get_token\nfolder = 'runs/digits'\n" + cell, {})
    assert "hf-tfamily push runs/digits your-name/sparse-transformer-digits" in capsys.readouterr().out
