"""The package as a wheel installs it: it works from anywhere, and type checkers see it (an editable install is found by
Python alone)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("src", "modeling", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
TINY = ("model.num_hidden_layers=1", "training.max_steps=2", "data.limit=32", "data.eval_limit=8")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with nothing but the package, built from a copy, in which the build leaves its own files."""
    home = tmp_path_factory.mktemp("wheel")
    (home / "copy").mkdir()
    for name in BUILT_FROM:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile)(ROOT / name, home / "copy" / name)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--target", str(home / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(home / "copy")], check=True)
    return home / "site"


def run(site, folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(site)}  # before what is installed otherwise
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


def test_it_trains_a_recipe_of_the_package_elsewhere(site, tmp_path):
    changes = [part for change in TINY for part in ("--set", change)]
    train = ["-m", "hf_tfamily", "train", "sparse_transformer/digits", "--output", "digits", *changes]
    assert "Held-out bits per dimension" in run(site, tmp_path, *train)
    code = "import hf_tfamily, hf_tfamily.modeling as m; print(hf_tfamily.__file__, m.__file__); "
    code += "from transformers import AutoModelForCausalLM as A; print(type(A.from_pretrained('digits')).__name__)"
    *files, name = run(site, tmp_path, "-c", code).split()
    assert all(file.startswith(str(site)) for file in files)
    assert name == "SparseTransformerForCausalLM"
    assert (tmp_path / "digits" / "modeling_sparse_transformer.py").exists()


def test_recipes_and_patterns_are_listed(site, tmp_path):
    assert "sparse_transformer/digits" in run(site, tmp_path, "-m", "hf_tfamily", "recipes")
    assert "keys per query" in run(site, tmp_path, "-m", "hf_tfamily", "show", "local:window=8")


def test_type_checkers_pass_right_uses_and_find_wrong_ones(site, tmp_path):
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path)]
    environment = {**os.environ, "MYPYPATH": str(site)}
    checked = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
