"""The comparison of early exits runs from end to end, with a tiny model in place of SmolLM2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_tfamily.data.text import byte_tokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import compare_depth

    return compare_depth


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes, initializer_range=0.3)).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_every_measure_has_its_rows(script, folder, monkeypatch):
    monkeypatch.setattr(script, "WAYS_OF_WEIGHTS", [*script.WAYS, ("softmax", 0.5, 3)])
    rows = script.exits_of_weights(2, folder)
    assert len(rows) == 2 + len(script.WAYS)
    assert (rows[0]["layers"], rows[0]["agreement"], rows[0]["depth"]) == (4, 1.0, 4)
    assert all(1 <= row["layers"] <= 4 for row in rows)
    for row in rows:
        if row["layers"] == 4:
            assert row["agreement"] > 0.95, row  # padding aside, a batch rounds otherwise than a row
    assert script.page({**script.surroundings(), "rows": {"weights": rows}}).count("\n| softmax, ") == 6
    assert rows[-1]["layers"] >= 3


@pytest.mark.slow
def test_sections_that_do_not_run_stay(tmp_path, folder):
    files = {option: tmp_path / f"depth.{option}" for option in ("json", "page")}
    outputs = [part for option, file in files.items() for part in (f"--{option}", file)]
    deep = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=26,
                                        num_attention_heads=2))  # fmt: skip
    deep.save_pretrained(folder)
    for section in ("weights", "exits"):
        options = ["--quick", "--only", section, "--model", folder]
        subprocess.run([sys.executable, SCRIPTS / "compare_depth.py", *options, *outputs], check=True)
    record = json.loads(files["json"].read_text())
    assert set(record["rows"]) == {"exits", "weights"}
    assert len(record["commands"]) == 2
    assert "## Early exits of weights that others trained" in files["page"].read_text()
