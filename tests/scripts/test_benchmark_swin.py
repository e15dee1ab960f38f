"""The Swin benchmark runs on small models: its rows, its checks, its picture. Nothing here is a question of time."""

import json
import sys

import benchmark_swin as script
import benchmarking
import pytest
import torch

SECTION = "8 of 224, float32"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run sections of the script with small models; its exit status and its rows."""

    def run(*sections, arguments=()):
        files = ("--json", str(tmp_path / "swin.json"), "--page", str(tmp_path / "swin.md"))
        monkeypatch.setattr(
            sys, "argv", ["benchmark_swin.py", "--quick", "--threads", "1", "--only", *sections, *files, *arguments]
        )
        status = script.main()
        return status, json.loads((tmp_path / "swin.json").read_text())["rows"]

    return run


def test_a_row_for_each_peer_and_direction(run):
    status, rows = run(SECTION, "8 of 224, bfloat16")
    assert status == 0
    cases = [(row["case"], row["peer_name"]) for row in rows if row["section"] == SECTION]
    assert cases == [(way, peer) for way in script.GOALS for peer in ("stock eager", "stock sdpa")]
    assert len(rows) == 2 * len(cases)
    goals = [row["must"] for row in rows]
    assert sorted(goal for goal in goals if goal) == [0.95] * 4  # of the fastest peer alone


def test_a_peer_that_is_wrong_has_no_row(run, monkeypatch, capsys):
    build = script.swins

    def one_is_wrong(*arguments):
        models = build(*arguments)
        torch.nn.init.zeros_(models["stock sdpa"].classifier.weight)
        return models

    monkeypatch.setattr(script, "swins", one_is_wrong)
    status, rows = run(SECTION)
    assert status == 1
    assert {row["peer_name"] for row in rows} == {"stock eager"}
    assert "stock sdpa: wrong result" in capsys.readouterr().err


def test_kept_memory(run):
    """As much as stock eager Swin keeps, beside biases and indices, which are much only for models this small."""
    status, rows = run(script.KEPT)
    assert status == 0
    assert len(rows) == 4 * 2
    for row in rows:
        if row["peer_name"] == "stock eager":
            assert 0 < row["ours"] < 1.06 * row["peer"]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, benchmarking.ALLOCATOR),
        ({"MALLOC_TRIM_THRESHOLD_": "1"}, {**benchmarking.ALLOCATOR, "MALLOC_TRIM_THRESHOLD_": "1"}),
    ],
)
def test_starts_again_once_under_one_allocator(monkeypatch, given, wanted):
    """What is set already stays; the second time there is nothing left to do."""
    started = []
    monkeypatch.setattr(benchmarking.os, "environ", given)
    monkeypatch.setattr(benchmarking.os, "execve", lambda *arguments: started.append(arguments))
    benchmarking.under_allocator()
    ((program, arguments, environment),) = started
    assert (program, arguments) == (sys.executable, [sys.executable, *sys.argv])
    assert environment == wanted
    monkeypatch.setattr(benchmarking.os, "environ", environment)
    benchmarking.under_allocator()
    assert len(started) == 1


def test_every_timed_section_names_the_allocator():
    for note in (*(setting.note for setting in script.SETTINGS), script.SIDES_NOTE):
        assert all(name in note for name in benchmarking.ALLOCATOR)


def test_sides_are_drawn(run, tmp_path):
    status, rows = run(script.SIDES, arguments=("--plot", str(tmp_path / "sides.png")))
    assert status == 0
    assert [row["case"] for row in rows][-2:] == ["exponent", "exponent"]
    assert len(rows) == 2 * (4 + 1)
    assert (tmp_path / "sides.png").stat().st_size > 0


def test_exponents():
    assert script.exponent([1, 2, 4, 8], [script.Measure(t, t, t) for t in (9, 4, 16, 64)]) == pytest.approx(1)


def test_names_of_timm():
    weights = {f"swin.encoder.layers.0.blocks.1.attention.{letter}_proj.bias": torch.ones(2) for letter in "qkv"}
    weights |= {"swin.encoder.layers.0.downsample.norm.bias": torch.ones(1), "swin.layernorm.weight": torch.ones(1)}
    found = script.timm_weights(weights)
    assert list(found) == ["layers.0.blocks.1.attn.qkv.bias", "layers.1.downsample.norm.bias", "norm.weight"]
    assert len(found["layers.0.blocks.1.attn.qkv.bias"]) == 6
