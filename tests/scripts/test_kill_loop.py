"""The kill loop with three kills of each kind of run, and what it says of the folders that a kill leaves."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def kill_loop():
    return pytest.importorskip("kill_loop")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")
def test_three_kills_of_each_kind(tmp_path):
    """In a process of its own, which has started no threads before it forks."""
    command = [sys.executable, str(ROOT / "scripts/kill_loop.py"), "--kills", "3", "--page", str(tmp_path / "page.md")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "page.md").read_text()
    assert page.count("the same weights, bit for bit") == 3
    assert page.count("| 3 | it finishes") == 3
    assert page.count("| a checkpoint is written") == 3


def test_moments_are_of_all_kinds(kill_loop):
    order = kill_loop.order_of(10, random.Random(0))
    assert len(order) == 10
    assert order[-1] == "it finishes"
    assert set(order) == set(kill_loop.moments(kill_loop.training.RunFolder("nowhere"), random.Random(0)))


def test_what_is_left(kill_loop, tmp_path):
    run = kill_loop.training.RunFolder(tmp_path / "run")
    assert kill_loop.what_is_left(run) == "no whole checkpoint"
    for name in ("checkpoint-4/manifest.json", "checkpoint-8/shards/model", "checkpoint-8/config.json"):
        (run.partial / name).parent.mkdir(parents=True, exist_ok=True)
        (run.partial / name).touch()
    assert kill_loop.newest(run.partial) == 4
    assert kill_loop.what_is_left(run) == "checkpoint-4, checkpoint-8 half written (2 files)"
    (run.partial / "finished").mkdir()
    assert kill_loop.what_is_left(run) == "a finished folder half written (0 files)"
    run.output.mkdir()
    assert kill_loop.what_is_left(run) == "the finished folder"
