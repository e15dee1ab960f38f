"""What benchmark scripts share: rows, checks, files."""

import json
import os
import sys

import benchmarking
import pytest
from benchmarking import Benchmark, Measure, Row, measure, page, shown


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a small benchmark with these arguments; its exit status and what it wrote."""

    def run(*arguments, sections=("speed", "memory"), correct=True):
        monkeypatch.setattr(sys, "argv", ["scripts/benchmark_x.py", *arguments, "--json", str(tmp_path / "x.json")])
        bench = Benchmark("Title", sections=sections)
        for section in sections:
            if bench.start(section, f"About {section}.") and bench.holds("small", correct, "error 1"):
                bench.add("small", Measure(2.0, 1.0, 3.0), 5.0, peer_name="dense", must=2, stretch=3)
        return bench.finish(), json.loads((tmp_path / "x.json").read_text())

    return run


def test_peaks_are_measured_under_the_systems_allocator(monkeypatch):
    for name, value in benchmarking.ALLOCATOR.items():
        monkeypatch.setenv(name, value)
    with benchmarking.system_allocator():
        assert not any(name in os.environ for name in benchmarking.ALLOCATOR)
    assert all(os.environ[name] == value for name, value in benchmarking.ALLOCATOR.items())


def test_rows_say_how_many_times_better_we_are(run):
    status, record = run("--quick")
    assert status == 0
    assert [row["section"] for row in record["rows"]] == ["speed", "memory"]
    row = Row(**record["rows"][0])
    assert (row.case, row.ours, row.peer, row.ratio, row.peer_name) == ("small", 2.0, 5.0, 2.5, "dense")
    assert row.ours_range == [1.0, 3.0]
    assert row.verdict == "met"
    assert record["commands"][0].startswith("python scripts/benchmark_x.py --quick")


def test_a_wrong_result_has_no_row_and_fails(run, capsys):
    status, record = run(correct=False)
    assert (status, record["rows"]) == (1, [])
    printed = capsys.readouterr()
    assert "small" not in printed.out
    assert "small: wrong result error 1" in printed.err


def test_sections_run_alone_leave_the_others_in_the_file(run):
    run()
    _, record = run("--only", "memory")
    assert [row["section"] for row in record["rows"]] == ["speed", "memory"]
    assert record["notes"] == {"speed": "About speed.", "memory": "About memory."}
    assert len(record["commands"]) == 2
    assert len(run()[1]["commands"]) == 1


def test_a_page_tells_machines_apart(run, monkeypatch):
    """Sections of an earlier run elsewhere say so."""
    run()
    monkeypatch.setattr("benchmarking._cpu_name", lambda: "another processor")
    _, record = run("--only", "memory")
    lines = page(record).splitlines()
    assert "machine: another processor, CPU only" in page(record)
    elsewhere = [line for line in lines if line.startswith("Run ")]
    assert len(elsewhere) == 1
    assert lines.index("## speed") < lines.index(elsewhere[0]) < lines.index("## memory")


def test_a_page_has_a_table_for_each_section(run):
    lines = page(run()[1]).splitlines()
    assert lines[0] == "# Title"
    assert lines.count("| small | 2 ms | 5 ms | dense | **2.5** | 2 | 3 | met |") == 2
    assert "## memory" in lines
    assert "About memory." in lines


def test_times_are_interleaved(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x"])
    calls = []
    times = Benchmark("x").times({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert set(times) == {"a", "b"}
    changes = [x for x, y in zip(calls, calls[1:]) if x != y]
    assert changes == ["a", "b"] * 2 + ["a"]  # a warm-up and two rounds


def test_numbers():
    assert measure([3.0, 1.0, 2.0]) == Measure(2.0, 1.0, 3.0)
    assert [shown(x) for x in (None, 0.01234, 12.34, 1234.5)] == ["", "0.0123", "12.3", "1,234"]
