"""One run of gpu_check.py: what it found so far, how much time is left, how it times, and the page it writes."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarking import write

MINUTES = {"full": 9.0, "quick": 2.0, "sweeps": 9.0, "correctness": 2.0, "speed": 5.0, "dry": 20.0}
_AT_MOST = 0.3  # seconds that the calls of one timing may take together, where a few are enough
PHASES = ("forward", "forward + backward")


class Run:
    """One run: the device, what was found so far, and how much time is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        names = ("dry_run", "quick", "sweeps", "correctness", "speed")
        self.mode = next((name for name in names if getattr(options, name)), "full").removesuffix("_run")
        self.device = torch.device("cpu" if options.dry_run else "cuda")
        self.folder = Path(options.output)
        self.end = time.monotonic() + 60 * MINUTES[self.mode]
        self.record = {"machine": {}, "calibration": {}, "checks": []}
        self.record |= {"rows": [], "sweeps": [], "models": [], "left_out": []}

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def out_of_time(self, what: str) -> bool:
        if time.monotonic() < self.end:
            return False
        self.leave_out(what, "out of time")
        return True

    def leave_out(self, what: str, why: object) -> None:
        reason = f"{type(why).__name__}: {why}" if isinstance(why, BaseException) else str(why)
        self.record["left_out"].append({"what": what, "why": reason[:500]})
        print(f"left out: {what}: {reason[:200]}", file=sys.stderr, flush=True)

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write(self.folder / "gpu_check.json", json.dumps(self.record, indent=1))
        write(self.folder / "gpu_check.md", page(self.record))


def timed(run: Run, call: Callable[[], object]) -> float:
    """Median seconds of a call."""
    if not run.is_gpu:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    one = _seconds(call)
    few = max(1, min(5 if run.mode in ("quick", "speed") else 10, int(_AT_MOST / one)))
    for _ in range(2 if few > 1 else 0):
        call()
    return statistics.median(_seconds(call) for _ in range(few))


def _seconds(call: Callable[[], object]) -> float:
    """Seconds of one call on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def inputs(run: Run, batch: int, length: int, heads: int, key_heads: int, dims, dtype) -> list[torch.Tensor]:
    """Query, key, value [B, N, H, D] as views of projections, and the gradient of the output."""
    shapes = [(heads, dims[0]), (key_heads, dims[0]), (key_heads, dims[1]), (heads, dims[1])]
    return [torch.randn(batch, length, *shape, device=run.device, dtype=dtype) for shape in shapes]


# ---------------------------------------------------------------------------------------------------------------------
# The page


SWEPT = [f"ours, {phase}" for phase in PHASES]


def page(record: dict) -> str:
    lines = ["# block_sparse on a GPU", "", "Made by `python scripts/gpu_check.py --output DIR`.", ""]
    lines += [f"- {key}: {shown(value)}" for part in ("machine", "calibration") for key, value in record[part].items()]
    failed = [check for check in record["checks"] if not check["passed"]]
    lines += ["", f"## Correctness: {len(record['checks'])} checks, {len(failed)} failed", ""]
    lines += [f"- FAILED {check['name']}: {check['note']}" for check in failed]
    lines += ["", "## Speed", ""]
    lines += ["![Times faster than FlexAttention and dense SDPA](gpu_check.png)", ""] if record.get("plotted") else []
    if not record["rows"]:
        lines += ["No row was measured."]
    for row in record["rows"]:
        lines += [f"### {row['shape']}", ""]
        lines += [f"- {key}: {shown(value)}" for key, value in row.items() if key != "shape"]
        lines += [""]
    lines += ["## Sweeps", ""] if record["sweeps"] else []
    for row in record["sweeps"]:
        said = [f"{key}: {shown(row[key])}" for key in row if "times" in key or "TFLOP/s" in key or key in SWEPT]
        lines += [f"- {row['quantity']}: {row['shape']}: {', '.join(said)}"]
    lines += ["", "## Models", ""]
    lines += [", ".join(f"{key}: {shown(value)}" for key, value in row.items()) for row in record["models"]]
    lines += ["", "## Left out", ""]
    lines += [f"- {entry['what']}: {entry['why']}" for entry in record["left_out"]]
    return "\n".join(lines) + "\n"


def shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(run: Run) -> None:
    """Times faster than FlexAttention and dense SDPA, with the goals; nothing without rows or matplotlib."""
    rows = [row for row in run.record["rows"] if any("times" in key for key in row)]
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True)
    for axis, kind in zip(axes, ("flex", "sdpa")):
        names = [row["shape"] for row in rows]
        for offset, phase in enumerate(("forward", "forward + backward")):
            values = [row.get(f"{phase}, times {kind}", 0) for row in rows]
            axis.barh([place + 0.4 * offset for place in range(len(rows))], values, 0.38, label=phase)
            goals = [(row.get(f"{phase}, goal {kind}") or (float("nan"),))[0] for row in rows]
            axis.plot(goals, [place + 0.4 * offset for place in range(len(rows))], "k|", markersize=12)
        axis.set(title=f"times faster than {kind}; | must", xscale="log", yticks=range(len(names)), yticklabels=names)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(run.folder / "gpu_check.tmp.png", dpi=120)
    (run.folder / "gpu_check.tmp.png").replace(run.folder / "gpu_check.png")
    run.record["plotted"] = True
