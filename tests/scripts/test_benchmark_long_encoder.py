"""The benchmark of long encoders: every section runs, and what it measures is first held to the stock model."""

import json
import sys

import benchmark_long_encoder as script
import pytest
import torch
from benchmarking import Benchmark, Measure


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """A benchmark of tiny models that times nothing and forks nothing."""
    monkeypatch.setattr(sys, "argv", ["scripts/benchmark_long_encoder.py", "--json", str(tmp_path / "x.json")])
    monkeypatch.setattr(
        Benchmark, "times", lambda self, calls, rounds=None: {name: call_once(name, calls[name]) for name in calls}
    )
    monkeypatch.setattr(script, "in_fresh_process", lambda function, *arguments: function(*arguments))
    for name, size in (("vocab_size", 60), ("hidden_size", 32), ("intermediate_size", 48)):
        monkeypatch.setitem(script.SIZES, name, size)
    monkeypatch.setattr(script, "WINDOW", 8)
    monkeypatch.setattr(script, "BLOCK", 4)
    bench = Benchmark("Title", sections=script.SECTIONS)
    bench.path = tmp_path / "x.json"
    return bench


def call_once(name, call):
    call()
    seconds = 2.0 if name == "ours" else 8.0
    return Measure(seconds, seconds, seconds)


@pytest.mark.parametrize("name", script.MODELS)
def test_speed(bench, name):
    assert bench.start(name)
    script.speed(bench, name, (64,))
    assert bench.finish() == 0
    rows = json.loads(bench.path.read_text())["rows"]
    assert [(row["case"], row["ratio"]) for row in rows] == [
        ("64 tokens, forward", 4.0),
        ("64 tokens, forward + backward", 4.0),
    ]


@pytest.mark.parametrize("name", script.MODELS)
def test_another_model_has_no_rows(bench, name, monkeypatch):
    convert = script.ours_of

    def damaged(stock):
        ours = convert(stock)
        with torch.no_grad():
            ours.layers[0].self_attn.v_proj.weight.mul_(2)
        return ours

    monkeypatch.setattr(script, "ours_of", damaged)
    assert bench.start(name)
    script.speed(bench, name, (64,))
    assert bench.finish() == 1
    assert not bench.rows


def test_memory(bench):
    assert bench.start("memory")
    script.memory(bench, (64, 128))
    assert bench.finish() == 0
    assert len(bench.rows) == 4
