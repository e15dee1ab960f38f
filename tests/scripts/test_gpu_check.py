"""gpu_check.py: what it leaves out, what it needs, and that all of it can be gone through without a GPU."""

import argparse
import json
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
    return script.Run(options(tmp_path, dry_run=True))


def options(folder, **chosen):
    names = ("dry_run", "quick", "sweeps", "correctness", "speed")
    return argparse.Namespace(output=folder, **{name: chosen.get(name, False) for name in names})


def test_a_failing_check_suppresses_the_row(script, run, monkeypatch):
    monkeypatch.setattr(script, "measure", lambda *_: pytest.fail("a wrong result was timed"))
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
    assert letters == set("ABCDEFGHIJKLM") == set(script.SPEED_FIRST)
    blocks = next(shape.pattern for shape in script.SHAPES if shape.name[0] == "I")
    places = torch.arange(0, 16384, 64)
    seen = blocks.visible(0, places[:, None], places)
    assert 0.09 < seen.tril(-1).sum() / (len(places) * (len(places) - 1) / 2) < 0.11
    assert seen.diagonal().all()
    for shapes in script.sweeps().values():
        for shape in shapes:
            assert 24000 < shape.batch * shape.length <= 65536


@pytest.mark.parametrize("number", [*range(13), 17])  # the others are windows too
def test_flexattention_agrees_in_every_form(script, run, number):
    """Forward, and without tiles of its own, as far as a CPU can tell: masks of all block sizes, and views."""
    shape = script.SHAPES[number]
    sizes = script.sizes_of(run, shape)
    tensors = script.inputs(run, 1, 192, *sizes[:3], torch.float32)[:3]
    where = {"causal": True, "scale": sizes[2][0] ** -0.5, "q_offset": 0}
    sinks = script.sinks_of(sizes[0], run.device) if shape.sinks else None
    expected = script.attend(*tensors, sinks, pattern=shape.pattern, **where)
    makers = script.flex_contenders(shape, sizes[0], 192, run.device, every=True)
    assert len(makers) == 6 + ("flex* on the view" in makers)
    for make in makers.values():
        with torch.no_grad():
            torch.testing.assert_close(make()(*tensors), expected, atol=1e-4, rtol=1e-4)


def test_correctness_and_speed_are_runs_of_their_own(script, tmp_path):
    """Checks alone in 2 minutes, the benchmark alone in 5, the shapes of today's windowed models first."""
    for mode, minutes, stages in (("correctness", 2, script.CHECKS), ("speed", 5, (script.benchmark,))):
        begin = script.time.monotonic()
        run = script.Run(options(tmp_path, **{mode: True}))
        assert run.mode == mode
        assert abs(run.end - begin - 60 * minutes) < 1
        assert script.STAGES[mode] == stages
        assert script.COMPILATION_TAKES[mode] < 60 * minutes
        names = [shape.name for shape in script.shapes_of(run)]
        assert [name[:9] for name in names[:4]] == ["K Mistral"] * 4 * (mode == "speed")
    assert script.STAGES["full"][: len(script.CHECKS)] == script.CHECKS


def test_every_check_is_written_at_once(script, run):
    import gpu_correctness

    jobs = [one for one in gpu_correctness.jobs(run) if "sinks" in one.name or "dilation" in one.name]
    assert len(jobs) == 8
    for number, one in enumerate(jobs):
        assert gpu_correctness.compare(run, one)
        assert len(json.loads((run.folder / "gpu_check.json").read_text())["checks"]) == number + 1


def test_a_wide_window_is_checked_beyond_its_edge(script, run, monkeypatch):
    """By fewer heads, since the dense check holds all pairs."""
    monkeypatch.setattr(script.Run, "is_gpu", True)
    for shape in script.SHAPES:
        _, length, heads, key_heads, _, _ = script.checked_sizes(run, shape)
        window = getattr(shape.pattern, "window", 0)
        assert length > 1.2 * window
        assert heads * length**2 * 8 < 2 << 30, "a matrix of float64 scores"
        assert heads / key_heads == shape.heads / (shape.key_heads or shape.heads)


@pytest.mark.slow
def test_it_needs_little():
    """A bare machine lacks data sets, plots and the command line; --help says all without them."""
    missing = ("accelerate", "datasets", "matplotlib", "PIL", "sklearn", "skimage", "sacrebleu", "peft")
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); sys.path.insert(0, {str(SCRIPTS)!r})\n"
    code += "sys.argv = ['gpu_check.py', '--dry-run']; import gpu_check; print('imported')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "imported" in result.stdout, result.stderr[-2000:]
