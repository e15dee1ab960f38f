"""gpu_check.py: what it leaves out, what it needs, and that all of it can be gone through without a GPU."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import gpu_check

    return gpu_check


@pytest.fixture
def run(script, tmp_path):
    return script.Run(argparse.Namespace(output=tmp_path, dry_run=True, quick=False, sweeps=False))


def test_a_failing_check_suppresses_the_row(script, run, monkeypatch):
    monkeypatch.setattr(script, "measure", lambda *_: pytest.fail("a wrong result was timed"))
    monkeypatch.setattr(script, "block_sparse_attention", None)
    import gpu_correctness

    def wrong(query, key, value, **_):
        return value * query.sum() * key.sum()

    monkeypatch.setattr(gpu_correctness, "block_sparse_attention", wrong)
    script.checked_row(run, "rows", script.SHAPES[3], 1.0, every_flex=False)
    assert [check["passed"] for check in run.record["checks"]] == [False]
    assert run.record["left_out"] == [{"what": "rows C local 128", "why": "its check failed"}]
    assert run.record["rows"] == []


def test_decoding_and_equal_bits_are_checked(script, run, monkeypatch):
    import gpu_correctness

    monkeypatch.setattr(gpu_correctness, "PATTERNS", dict(list(gpu_correctness.PATTERNS.items())[4:6]))
    script.check_decoding(run)
    script.check_determinism(run)
    assert [check["passed"] for check in run.record["checks"]] == [True] * 4


def test_what_is_compiled_in_advance_is_what_is_measured(script, run, monkeypatch, capsys):
    """In a dry run the first of it: FlexAttention under the first shape."""
    calls = []
    monkeypatch.setattr(script, "one_call", lambda attention, sets, phase: calls.append((phase, len(sets[0]))))
    script.compile_some(run, 0, 1)
    assert calls == [("forward", 4)]
    assert capsys.readouterr().err == ""


def test_ratios_are_to_the_best_of_each_kind(script):
    shape = script.SHAPES[4]  # strided column
    times = {"ours": 1.0, "flex": 40.0, "flex, hints": 30.0, "flex* on the view": 2.0}
    times |= {"sdpa cudnn": 20.0, "sdpa flash": 25.0}
    row = {"pairs": 100.0, **{f"{name}, forward": seconds for name, seconds in times.items()}}
    script.rate(row, shape, (8, 8, (64, 64)), "forward", 4, 12288)
    assert [row[f"forward, times {kind}"] for kind in ("flex", "flex*", "sdpa")] == [30.0, 2.0, 20.0]
    assert row["forward, goal flex"] == (15, 25)
    assert row["forward, goal sdpa"] == (13, 22)


def test_shapes_are_those_of_the_goals(script):
    letters = {shape.name[0] for shape in script.SHAPES}
    assert letters == set("ABCDEFGHIJ")
    blocks = next(shape.pattern for shape in script.SHAPES if shape.name[0] == "I")
    places = torch.arange(0, 16384, 64)
    seen = blocks.visible(0, places[:, None], places)
    assert 0.09 < seen.tril(-1).sum() / (len(places) * (len(places) - 1) / 2) < 0.11
    assert seen.diagonal().all()
    for shapes in script.sweeps().values():
        for shape in shapes:
            assert 24000 < shape.batch * shape.length <= 65536


@pytest.mark.parametrize("number", range(13))
def test_flexattention_agrees_in_every_form(script, run, number):
    """Forward, and without tiles of its own, as far as a CPU can tell: masks of all block sizes, and views."""
    shape = script.SHAPES[number]
    sizes = script.sizes_of(run, shape)
    tensors = script.inputs(run, 1, 192, *sizes[:3], torch.float32)[:3]
    where = {"causal": True, "scale": sizes[2][0] ** -0.5, "q_offset": 0}
    expected = script.block_sparse_attention(*tensors, shape.pattern, **where)
    makers = script.flex_contenders(shape, sizes[0], 192, run.device, every=True)
    assert len(makers) == 6 + ("flex* on the view" in makers)
    for make in makers.values():
        with torch.no_grad():
            torch.testing.assert_close(make()(*tensors), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_it_needs_little():
    """A bare machine lacks data sets, plots and the command line; --help says all without them."""
    missing = ("accelerate", "datasets", "matplotlib", "PIL", "sklearn", "skimage", "sacrebleu", "peft")
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); sys.path.insert(0, {str(SCRIPTS)!r})\n"
    code += "sys.argv = ['gpu_check.py', '--dry-run']; import gpu_check; print('imported')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "imported" in result.stdout, result.stderr[-2000:]
