"""The benchmark of sampling: every section runs, tokens are first checked, and caches are counted in bytes."""

import json
import sys

import benchmark_generation
import pytest
from benchmarking import Benchmark, Measure

CONTESTS = benchmark_generation.contests


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """A benchmark of tiny models that times nothing."""
    monkeypatch.setattr(sys, "argv", ["scripts/benchmark_generation.py", "--quick", "--json", str(tmp_path / "x.json")])
    monkeypatch.setattr(Benchmark, "times", called_once)
    for name, value in {"num_hidden_layers": 2, "hidden_size": 32}.items():
        monkeypatch.setitem(benchmark_generation.SIZES, name, value)
    monkeypatch.setitem(benchmark_generation.GATED, "intermediate_size", 48)
    monkeypatch.setattr(benchmark_generation, "LAYERS", 2)
    monkeypatch.setattr(benchmark_generation, "WIDTH", 32)
    monkeypatch.setattr(benchmark_generation, "MEMORY", 8)
    monkeypatch.setattr(benchmark_generation, "GOAL_AT", 20)
    monkeypatch.setattr(benchmark_generation, "BATCH", 2)
    monkeypatch.setattr(benchmark_generation.is_correct, "__defaults__", (10,))
    return tmp_path / "x.json"


def called_once(self, contenders, rounds=None):
    for call in contenders.values():
        call()
    return {name: Measure(*[1.0 if name in ("ours", "static", "step") else 6.0] * 3) for name in contenders}


def test_all_sections(bench, monkeypatch):
    monkeypatch.setattr(benchmark_generation, "contests", lambda bench, *_: CONTESTS(bench, [12, 20], 20))
    assert benchmark_generation.main() == 0
    found = json.loads(bench.read_text())["rows"]
    assert len([row for row in found if row["section"] == "profile"]) == 5
    rows = [row for row in found if row["section"] != "profile"]
    assert [row["must"] for row in rows if row["unit"] == "ms"] == [None, None, 5, 5, 1.5]
    assert all(row["ratio"] == 6 for row in rows if row["unit"] == "ms")
    of_bytes = {(row["case"], row["peer_name"]): row for row in rows if row["section"] == "bytes"}
    assert len(of_bytes) == 5
    # Llama's static cache: keys and values of 2 layers, 2 rows, 4 heads of 8, all tokens and the start.
    assert of_bytes["pictures, 20 tokens", "Llama"]["peer"] * 2**20 == pytest.approx(2 * 2 * 2 * 32 * 20 * 4, rel=0.06)


def test_a_cache_that_changes_tokens_has_no_row(bench, monkeypatch):
    monkeypatch.setattr(
        benchmark_generation, "is_correct", lambda bench, name, model: bench.holds(name, name != "ours")
    )
    monkeypatch.setattr(benchmark_generation, "contests", lambda bench, *_: CONTESTS(bench, [12], 12)[:1])
    assert benchmark_generation.main() == 1
    assert {row["section"] for row in json.loads(bench.read_text())["rows"]} == {"profile"}
