"""The benchmark of long rows and many layers runs from end to end, and what it says follows from its figures."""

import json
import sys

import benchmark_scale as script
import pytest


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the script with tiny models that measure themselves here: its exit status, its figures and its page."""
    monkeypatch.setattr(script.run, "__defaults__", (lambda case, most: case | script.measure(**case),))

    def run(*arguments):
        json_file, page = tmp_path / "scale.json", tmp_path / "scale.md"
        command = [
            "benchmark_scale.py",
            "--quick",
            "--threads",
            "1",
            "--json",
            str(json_file),
            "--page",
            str(page),
            *arguments,
        ]
        monkeypatch.setattr(sys, "argv", command)
        status = script.main()
        return status, json.loads(json_file.read_text()), page.read_text()

    return run


def test_sections_one_after_the_other(run, tmp_path, monkeypatch):
    status, record, page = run("--only", "tokens")
    assert status == 0
    assert {row["way"] for row in record["rows"]["tokens"]} == set(script.WAYS)
    assert all(row["GiB"] > 0 and row["seconds"] > 0 for row in record["rows"]["tokens"])
    assert max(error for way, error in record["differences"].items() if "bfloat16" not in way) < 1e-5
    assert (tmp_path / "scale_tokens.png").exists()
    monkeypatch.setattr(script, "differences", lambda: {"plain": 0.0, "and chunks": 1.0})
    status, record, page = run("--only", "layers")
    assert status == 1, "a wrong way of training has to fail the script"
    assert record["rows"].keys() == {"tokens", "layers"}
    assert "## Tokens" in page
    assert "## Layers" in page
    assert (tmp_path / "scale_layers.png").exists()


@pytest.mark.slow
def test_a_case_in_its_own_process_and_one_that_needs_too_much():
    case = {"way": "and kept on disk", "tokens": 256, "layers": 1, "width": 32}
    found = script.in_own_process(case, most=4)
    assert found["GiB"] > 0.1
    assert found["parameters"] > 0
    long = case | {"tokens": 1 << 20, "way": "plain"}
    assert script.in_own_process(long, most=0.6)["GiB"] is None


def rows(**columns):
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def test_exponents_and_activations():
    found = rows(tokens=[10, 100, 1000], seconds=[2.0, None, 2000.0])
    assert script.exponent(found, "tokens", "seconds") == pytest.approx(1.5)
    assert script.exponent(found[:2], "tokens", "seconds") is None
    state, activation = 16 * 1000, 4 * 64 * 8
    peaks = [(5 * state + 2 * activation * layers + layers * state) / 2**30 for layers in (2, 4)]
    found = rows(layers=[2, 4], GiB=peaks, parameters=[2000, 4000], tokens=[64, 64], width=[8, 8])
    assert script.activations_a_layer(found) == pytest.approx(2.0)


def test_what_is_over_is_said():
    over = {"way": "plain", "tokens": 9, "GiB": None, "seconds": None}
    assert script.cell(over, 16) == "over 16 GiB"
    assert script.verdict(1.7, 1.6).endswith("missed)")
