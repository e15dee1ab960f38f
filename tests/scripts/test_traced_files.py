"""How many files of ours one call goes through: no more than when this was last looked at."""

import subprocess
import sys
from pathlib import Path

import pytest
import traced_files

MOST = {
    "sparse_transformer under block_sparse": 7,
    "sparse_transformer, generate() of two tokens": 11,
    "transformer_xl with memory under block_sparse": 9,
    "swin_transformer": 5,
}


@pytest.fixture(scope="module")
def found():
    return traced_files.count()


@pytest.mark.parametrize("title", MOST)
def test_a_call_goes_through_few_files(found, title):
    assert len(found[title]) <= MOST[title], found[title]


def test_every_case_has_a_bound(found):
    assert found.keys() == MOST.keys()
    assert "modeling/modeling_swin_transformer.py" in found["swin_transformer"]


def test_only_files_of_ours_count():
    assert traced_files.traced_files(lambda: Path("x").with_suffix(".y")) == []


@pytest.mark.slow
def test_prints_a_line_for_each_case():
    command = [sys.executable, traced_files.__file__, "--names"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(title in printed for title in MOST)
    assert "    modeling/modeling_sparse_transformer.py" in printed
