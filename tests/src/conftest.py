"""A recipe small enough to train in a test, and one finished run of it."""

import shutil

import pytest

from hf_tfamily.recipes import load_recipe
from hf_tfamily.training import train

MICRO = """
title: Digits by a model of a few thousand parameters
model:
  model_type: sparse_transformer
  vocab_size: 27
  hidden_size: 16
  num_hidden_layers: 2
  num_attention_heads: 2
  position_shape: [8, 8]
  attention_patterns:
    - {type: local, window: 8}
    - {type: strided, stride: 8}
  resid_dropout: 0.1
data: {source: digits}
training:
  max_steps: 4
  per_device_train_batch_size: 8
  per_device_eval_batch_size: 100
  learning_rate: 1e-2
  logging_steps: 1
  eval_strategy: steps
  eval_steps: 4
  save_steps: 2
"""


@pytest.fixture(scope="session")
def micro_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("recipes") / "micro.yaml"
    file.write_text(MICRO)
    return file


@pytest.fixture(scope="session")
def micro(micro_file):
    return load_recipe(micro_file)


@pytest.fixture(scope="session")
def finished_once(micro, tmp_path_factory):
    """Folder of a finished run; do not write into it."""
    return train(micro, tmp_path_factory.mktemp("runs") / "micro")


@pytest.fixture
def finished(finished_once, tmp_path):
    """A copy of the finished folder that a test may change."""
    return shutil.copytree(finished_once, tmp_path / "finished")
