"""Without an optional package: what needs it says which extra to install, and everything else works."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hf_tfamily import knn
from hf_tfamily.data import byte_tokenizer
from hf_tfamily.hub import export
from hf_tfamily.missing_packages import EXTRAS, how_to_install
from tests.src.conftest import MICRO
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
KNN = {"knn_build", "knn_evaluate"}
# Package: the commands that do without it. The rest names it.
WORK_WITHOUT = {
    "datasets": {"recipes", "show", "picture", "info", "sample", "convert", "peft_defaults", *KNN},
    "PIL": {"recipes", "show", "info", "convert", "peft_defaults", *KNN},
    "sklearn": {"recipes", "show", "picture", "info", "sample", "convert", "peft_defaults", *KNN},
    "peft": {"recipes", "show", "picture", "info", "train", "evaluate", "sample", "convert", *KNN},
    "pyarrow": {"recipes", "info", "peft_defaults"},
    "faiss": {
        "recipes",
        "show",
        "picture",
        "info",
        "train",
        "evaluate",
        "sample",
        "convert",
        "peft_defaults",
        "knn_build",
    },
    "accelerate": {"recipes", "info", "peft_defaults"},  # which is no extra: nothing of ours is promised without it
}
NEVER_WORK_HERE = {"consolidate", "push"}  # the folder has no shards, and nobody is logged in


def chain(*errors):
    """Errors, each the cause of the one before."""
    for error, cause in zip(errors, errors[1:]):
        error.__cause__ = cause
    return errors[0]


def test_the_cause_is_found_however_deep():
    missing = ModuleNotFoundError("No module named 'pyarrow.lib'", name="pyarrow.lib")
    lazy = chain(ModuleNotFoundError("Could not import module 'Trainer'."), RuntimeError("deep"), missing)
    assert how_to_install(lazy) == (
        'This needs the package pyarrow, which is not installed: pip install "hf-tfamily[demo]"'
    )
    core = ModuleNotFoundError("No module named 'accelerate'", name="accelerate")
    assert how_to_install(core).endswith('pip install "hf-tfamily"')
    assert how_to_install(ModuleNotFoundError("No module named 'other'", name="other")) is None
    assert how_to_install(ImportError("cannot import name 'x' from 'torch'")) is None


def test_extras_are_those_of_the_package():
    said = (ROOT / "setup.cfg").read_text()
    assert all(f"\n{extra} =\n" in said for extra in EXTRAS.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, finished_once):
    folder = tmp_path_factory.mktemp("hidden")
    (folder / "micro.yaml").write_text(MICRO)
    shutil.copytree(finished_once, folder / "finished")
    decoder = tiny_model("rope_decoder", AutoModelForCausalLM, vocab_size=257)
    export(decoder, folder / "decoder", byte_tokenizer())
    model, tokenizer = knn.load_model(str(folder / "decoder"))
    ids = knn.read_tokens(tokenizer, [folder / "micro.yaml"])
    knn.build_datastore(model, ids, folder / "store", tokenizer)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("package", WORK_WITHOUT)
def test_every_command_without(package, folder):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "tests.src.hidden_packages", package, str(folder)]
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout.splitlines()[-1])
    assert not [words for code, words in said.values() if code == -1 or "Traceback" in words], said
    worked = {name for name, (code, _) in said.items() if code == 0}
    assert worked == WORK_WITHOUT[package], {name: words[-300:] for name, (_, words) in said.items()}
    for name in said.keys() - worked - NEVER_WORK_HERE:
        assert f"needs the package {package}, which is not installed: pip install" in said[name][1], (name, said[name])
