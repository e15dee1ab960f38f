"""The comparison of position encodings runs from end to end, and its tasks are what they say."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from hf_tfamily.modeling.configuration_vanilla_transformer import POSITION_ENCODINGS

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import compare_positions

    return compare_positions


def test_recall_asks_for_the_token_three_places_before(script):
    for ids, targets in islice(script.recall_batches(9, 2, seed=0), 2):
        assert (targets[:, :3] == -100).all()
        assert torch.equal(targets[:, 3:], ids[:, :-3])


def test_text_is_the_same_at_every_length(script):
    content = torch.arange(64, dtype=torch.uint8).numpy()
    for length in (4, 16):
        batches = script.held_out_text(content, 32)(length)
        ids = torch.cat([ids for ids, _ in batches])
        targets = torch.cat([targets for _, targets in batches])
        assert targets.flatten().tolist() == list(range(32))
        assert (ids[:, 0] == script.START).all()
        assert torch.equal(ids[:, 1:], targets[:, :-1])


@pytest.mark.slow
def test_quick_run_writes_table_and_picture(tmp_path):
    files = {option: tmp_path / f"positions.{option}" for option in ("json", "md", "png")}
    options = ["--quick", "--json", files["json"], "--page", files["md"], "--plot", files["png"]]
    subprocess.run([sys.executable, SCRIPTS / "compare_positions.py", *options], check=True)
    runs = json.loads(files["json"].read_text())["runs"]
    assert {run["encoding"] for run in runs} == set(POSITION_ENCODINGS)
    page = files["md"].read_text()
    assert all(page.count(f"| {encoding} |") == 2 for encoding in POSITION_ENCODINGS)
    assert files["png"].stat().st_size > 10_000
