"""The benchmark of long encoders runs on small models: every section, and no row of what is wrong."""

import json
import sys

import benchmark_long_encoder as script
import pytest
import torch
from benchmarking import Benchmark, Measure


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run sections of the script, timing nothing; its exit status and its rows."""
    monkeypatch.setattr(script, "SIZES", dict(script.SIZES))
    monkeypatch.setattr(script, "REACH", dict(script.REACH))
    monkeypatch.setattr(
        Benchmark, "times", lambda self, calls, rounds=None: {name: call_once(name, calls[name]) for name in calls}
    )

    def run(*sections):
        files = ("--json", str(tmp_path / "x.json"), "--page", str(tmp_path / "x.md"))
        monkeypatch.setattr(sys, "argv", ["x.py", "--quick", "--threads", "1", "--only", *sections, *files])
        status = script.main()
        assert (tmp_path / "x.md").is_file()
        return status, json.loads((tmp_path / "x.json").read_text())["rows"]

    return run


def call_once(name, call):
    call()
    seconds = 2.0 if name == "ours" else 8.0
    return Measure(seconds, seconds, seconds)


def test_each_model_is_as_stock_and_has_its_rows(run):
    status, rows = run("Longformer", "BigBird")
    assert status == 0
    assert [row["case"] for row in rows[:4]] == [
        f"{length} tokens, {direction}" for length in (320, 512) for direction in ("forward", script.BOTH)
    ]
    assert [(row["ratio"], row["must"]) for row in rows] == [(4.0, script.MUST)] * 8


def test_memory(run):
    status, rows = run("memory")
    assert status == 0
    assert len(rows) == 2 * (2 + 1)
    assert all(row["ours"] > 0 for row in rows)
    assert [row["must"] for row in rows] == [None, None, script.LINEAR] * 2


@pytest.mark.parametrize("changed", ["embed_tokens.weight", "layers.1.mlp.up_proj.weight"])
def test_a_wrong_model_has_no_row(run, monkeypatch, capsys, changed):
    right = script.pair

    def wrong(*arguments):
        models = right(*arguments)
        with torch.no_grad():
            models["ours"].get_parameter(changed).mul_(1.1)
        return models

    monkeypatch.setattr(script, "pair", wrong)
    assert run("Longformer") == (1, [])
    assert "wrong result" in capsys.readouterr().err
