"""The benchmark of attention: what it measures is first checked, and a case that fails has no row."""

import json
import sys

import benchmark_attention
import pytest
import torch
from benchmarking import Benchmark, Measure


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """A benchmark that times nothing."""
    monkeypatch.setattr(sys, "argv", ["scripts/benchmark_attention.py", "--quick", "--json", str(tmp_path / "x.json")])
    monkeypatch.setattr(
        Benchmark, "times", lambda self, calls, rounds=None: {name: call_once(calls[name]) for name in calls}
    )
    chosen = {name: benchmark_attention.PATTERNS[name] for name in ("local", "strided merged")}
    monkeypatch.setattr(benchmark_attention, "PATTERNS", chosen)
    monkeypatch.setattr(benchmark_attention.gradient_error, "__defaults__", (150,))
    monkeypatch.setattr(benchmark_attention.relative_score_error, "__defaults__", (150,))
    bench = Benchmark("Title", sections=benchmark_attention.SECTIONS)
    bench.path = tmp_path / "x.json"
    return bench


def call_once(call):
    call()
    return Measure(2.0, 1.0, 3.0)


def rows(bench, section, run):
    """Exit status and rows of one section."""
    assert bench.start(section)
    run()
    return bench.finish(), json.loads(bench.path.read_text())["rows"]


def test_rows_against_dense_attention(bench):
    status, found = rows(bench, "4,096 tokens", lambda: benchmark_attention.against_dense(bench, 200, 1))
    assert status == 0
    cases = {(row["case"], row["peer_name"]) for row in found}
    assert len(cases) == len(found) == 2 * 2 * len(benchmark_attention.PATTERNS)
    assert ("strided merged, bfloat16, forward + backward", "dense SDPA") in cases
    assert {(row["ours"], row["peer"], row["ratio"]) for row in found} == {(2.0, 2.0, 1.0)}


def test_a_wrong_pattern_has_no_row(bench, monkeypatch, capsys):
    """An executor that is wrong for one pattern: the others have their rows."""
    right = benchmark_attention.sparse

    def wrong(query, key, value, pattern):
        output = right(query, key, value, pattern)
        return output * 1.1 if pattern == benchmark_attention.PATTERNS["local"] else output

    monkeypatch.setattr(benchmark_attention, "sparse", wrong)
    status, found = rows(bench, "short sequences", lambda: benchmark_attention.short_sequences(bench, 1))
    assert status == 1
    assert len(found) == 2 * (len(benchmark_attention.PATTERNS) - 1)
    printed = capsys.readouterr()
    assert not any(row["case"].startswith("local") for row in found)
    assert "local, forward / dense" not in printed.out
    assert "local: wrong result error" in printed.err


def test_relative_scores_are_checked_too(bench, monkeypatch):
    run = benchmark_attention.relative_attention

    def without_gradient(query, position_query, *others, **where):
        return run(query, position_query.detach(), *others, **where)

    status, found = rows(bench, "relative bias", lambda: benchmark_attention.relative_bias(bench, 200))
    assert (status, len(found)) == (0, 4)
    monkeypatch.setattr(benchmark_attention, "relative_attention", without_gradient)
    assert benchmark_attention.relative_score_error(benchmark_attention.PATTERNS["local"]) > 1e-2


def test_goals_are_those_of_cases():
    directions = ("forward", benchmark_attention.BOTH)
    for pattern, dtype, direction in benchmark_attention.GOALS:
        assert pattern in benchmark_attention.PATTERNS
        assert isinstance(getattr(torch, dtype), torch.dtype)
        assert direction in directions
