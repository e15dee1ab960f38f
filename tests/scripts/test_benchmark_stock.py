"""The benchmark of stock models: every section runs, what it measures is first checked, and goals follow shares."""

import json
import sys

import benchmark_stock
import pytest
from benchmarking import Benchmark, Measure


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """A benchmark of tiny models that times nothing and forks nothing."""
    monkeypatch.setattr(sys, "argv", ["scripts/benchmark_stock.py", "--quick", "--json", str(tmp_path / "x.json")])
    monkeypatch.setattr(
        Benchmark, "times", lambda self, calls, rounds=None: {name: call_once(name, calls[name]) for name in calls}
    )
    monkeypatch.setattr(benchmark_stock, "in_fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setitem(benchmark_stock.TEXT, "vocab_size", 96)
    monkeypatch.setitem(benchmark_stock.TEXT, "hidden_size", 64)
    monkeypatch.setattr(benchmark_stock.is_correct, "__defaults__", (90, 20))
    bench = Benchmark("Title", sections=benchmark_stock.SECTIONS)
    bench.path = tmp_path / "x.json"
    return bench


def call_once(name, call):
    call()
    seconds = 2.0 if "block_sparse" in (name, name[0]) else 8.0  # names of attention alone say the direction, too
    return Measure(seconds, seconds, seconds)


def rows(bench, section, run):
    """Exit status and rows of one section."""
    assert bench.start(section)
    run()
    return bench.finish(), json.loads(bench.path.read_text())["rows"]


def test_attention_and_its_memory(bench):
    status, found = rows(bench, "attention", lambda: benchmark_stock.attention(bench, [90, 130]))
    assert status == 0
    assert [(row["ratio"], row["must"]) for row in found] == [(4.0, None)] * 2 + [(4.0, 15)] * 2
    status, found = rows(bench, "attention's memory", lambda: benchmark_stock.attention_memory(bench, 90))
    assert status == 0
    assert all(row["ours"] > 0 for row in found)


@pytest.mark.parametrize("name", ["Mistral", "Gemma 3"])
def test_whole_models(bench, name):
    status, found = rows(bench, name, lambda: benchmark_stock.whole_model(bench, name, [90, 130]))
    assert status == 0
    assert [row["peer_name"] for row in found] == ["sdpa", "sdpa", "eager", "sdpa", "sdpa"]
    assert [row["must"] for row in found][:3] == [None] * 3
    # Windows take all of sdpa's time by these times, so that the whole call may be as much faster as they are.
    layers = 12 if name == "Mistral" else 10
    assert found[-1]["must"] == pytest.approx(0.9 * 8 / (2 * layers), abs=0.01)


def test_memory_of_steps_and_sinks(bench):
    status, found = rows(bench, "gpt-oss", lambda: benchmark_stock.gpt_oss_memory(bench, 90))
    assert status == 0
    assert found[0]["must"] == 20
    status, found = rows(bench, "memory of a step", lambda: benchmark_stock.step_memory(bench, 90))
    assert status == 0
    assert len(found) == 1 + 2


def test_a_wrong_backend_has_no_row(bench, monkeypatch):
    right = benchmark_stock.mistral

    def wrong(implementation, **changes):
        model = right(implementation, **changes)
        if implementation == "block_sparse":
            model.lm_head.weight.data *= 1.1
        return model

    monkeypatch.setitem(benchmark_stock.MODELS, "Mistral", wrong)
    assert bench.start("Mistral")
    benchmark_stock.whole_model(bench, "Mistral", [90])
    assert bench.finish() == 1
    assert not bench.rows
