"""Everything there is to know about block_sparse on one GPU, in one command that needs nobody: right first, then fast.

    python scripts/gpu_check.py --output DIR             # at most 9 minutes; writes gpu_check.json, .md, .png into DIR
    python scripts/gpu_check.py --output DIR --quick     # at most 2 minutes
    python scripts/gpu_check.py --output DIR             # at most 9 minutes; gpu_check.json, .md and .png in DIR

Stages: calibration, correctness of every kernel, dense kernels, benchmark, training steps, sampling. A row of the
benchmark appears only if the check of that very pattern, head dimension and dtype passed; what failed or was out of
time is listed with the reason. The exit status is 1 if any check failed.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
import torch.nn.functional as F
import transformers
from benchmarking import write
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import hf_tfamily  # noqa: F401  registers the systems
from hf_tfamily.modeling import attention_triton
from hf_tfamily.modeling.attention_masks import VisibleKeys
from hf_tfamily.modeling.attention_patterns import Fixed, FixedBlock, Full, Local, Pattern, Strided, Union
from hf_tfamily.modeling.attention_torch import block_sparse_attention
from hf_tfamily.modeling.attention_triton_layout import Extent, layout
from hf_tfamily.modeling.attention_triton_views import dense_kernel
from hf_tfamily.recipes import load_recipe

MINUTES = {"full": 9.0, "quick": 2.0, "dry": 20.0}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BUDGET = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}  # relative errors that always pass


@dataclass(frozen=True)
class Shape:
    """A row of the benchmark: lengths and heads, and goals (must, stretch) for forward and forward + backward."""

    name: str
    pattern: Pattern
    batch: int
    heads: int
    length: int
    dims: tuple[int, int]
    against_flex: tuple[tuple[float, float], tuple[float, float]] | None = None
    against_dense: tuple[tuple[float, float], tuple[float, float]] | None = None


_C = {"batch": 4, "heads": 8, "length": 12288, "dims": (64, 64)}
SHAPES = [
    Shape("A dense causal, D 128", Full(), 4, 16, 8192, (128, 128), ((1.0, 1.15), (0.95, 1.15)), ((0.6, 0.75),) * 2),
    Shape("A dense causal, D 64", Full(), 4, 16, 8192, (64, 64), ((1.0, 1.15), (0.95, 1.15)), ((0.6, 0.75),) * 2),
    Shape("B window 1024", Local(1024), 4, 16, 16384, (128, 128), ((1.05, 1.3), (1.0, 1.2)), ((4.5, 6), (4, 5.5))),
    Shape("C local 128", Local(128), **_C, against_flex=((1.1, 1.4), (1.0, 1.3)), against_dense=((10, 16), (8, 14))),
    Shape(
        "D strided column", Strided(128), **_C, against_flex=((15, 25), (12, 20)), against_dense=((13, 22), (10, 18))
    ),
    Shape(
        "E strided merged",
        Union([Local(128), Strided(128)]),
        **_C,
        against_flex=((8, 12), (6, 10)),
        against_dense=((7, 10), (5, 8)),
    ),
    Shape(
        "F fixed merged, c=32",
        Fixed(128, 32, sub_blocks=4),
        **_C,
        against_flex=((2.5, 3.5), (2.0, 3.0)),
        against_dense=((2.0, 3.0), (1.8, 2.7)),
    ),
    Shape(
        "G fixed merged, c=8",
        Fixed(128, 8, sub_blocks=4),
        **_C,
        against_flex=((5, 9), (4, 7)),
        against_dense=((4, 7), (3, 6)),
    ),
    Shape("H CIFAR column, Dqk 64, Dv 128", Strided(96), 16, 2, 3072, (64, 128), ((3, 6), (3, 6)), ((2.5, 5),) * 2),
    Shape("H CIFAR local, Dqk 64, Dv 128", Local(96), 16, 2, 3072, (64, 128)),
    Shape("I two strides, by table", Union([Strided(64), Strided(96)]), 2, 16, 4096, (128, 128)),
    Shape("J 64k, window 1024", Local(1024), 1, 16, 65536, (64, 64), ((1.05, 1.3),) * 2, ((18, 25),) * 2),
    Shape("J 64k, strided 256", Strided(256), 1, 16, 65536, (64, 64), ((30, 60),) * 2, ((40, 90),) * 2),
]
PATTERNS = {
    "full": Full(),
    "local": Local(40),
    "column": Strided(16),
    "own block": FixedBlock(32),
    "strided merged": Union([Local(33), Strided(16)]),
    "fixed merged": Fixed(32, 8, sub_blocks=2),
    "by table": Union([Strided(5), Strided(7)]),
}


class Run:
    """One run: the device, what was found so far, and how much time is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.mode = "dry" if options.dry_run else "quick" if options.quick else "full"
        self.device = torch.device("cpu" if options.dry_run else "cuda")
        self.folder = Path(options.output)
        self.end = time.monotonic() + 60 * MINUTES[self.mode]
        self.record = {"machine": {}, "calibration": {}, "checks": [], "rows": [], "models": [], "left_out": []}

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder for the JSON, the page and the plot")
    parser.add_argument("--quick", action="store_true", help="at most 2 minutes")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, in Triton's interpreter")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu_check needs a CUDA device; --dry-run goes through all stages without one.", file=sys.stderr)
        return 2
    run = Run(options)
    if options.dry_run:
        attention_triton.register("cpu")
    for stage in (describe, calibrate, check_kernels, check_dense_kernels, benchmark, train, sample, plot):
        print(f"== {stage.__name__}", flush=True)
        try:
            stage(run)
        except Exception as error:  # an unattended run reports what it can
            run.leave_out(stage.__name__, error)
        run.save()
    failed = [check for check in run.record["checks"] if not check["passed"]]
    print(f"{len(run.record['checks'])} checks, {len(failed)} failed; {run.folder / 'gpu_check.md'}")
    return int(bool(failed) or not run.record["checks"])


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def describe(run: Run) -> None:
    import triton

    machine = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    machine |= {"transformers": transformers.__version__, "mode": run.mode, "date": time.strftime("%Y-%m-%d %H:%M")}
    if run.is_gpu:
        properties = torch.cuda.get_device_properties(run.device)
        machine |= {"gpu": properties.name, "processors": properties.multi_processor_count}
        machine |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    query = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device=run.device)
    machine["dense kernel of views"] = dense_kernel(query, query)
    run.record["machine"] = machine
    print(machine, flush=True)


def calibrate(run: Run) -> None:
    """What the machine can do: a large matrix product and a large copy."""
    size = 8192 if run.is_gpu else 256
    a, b = (torch.randn(size, size, device=run.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = timed(run, lambda: a @ b)
    source = torch.empty((4 << 30) if run.is_gpu else 1 << 20, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    copy = timed(run, lambda: target.copy_(source))
    tflops, gbs = 2 * size**3 / seconds / 1e12, 2 * source.numel() / copy / 1e9
    run.record["calibration"] = {"matmul TFLOP/s": tflops, "copy GB/s": gbs} if run.is_gpu else {"note": "dry run"}


def timed(run: Run, call: Callable[[], object]) -> float:
    """Median seconds of a call."""
    if not run.is_gpu:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    for _ in range(3):
        call()
    seconds = []
    for _ in range(5 if run.mode == "quick" else 10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


# ---------------------------------------------------------------------------------------------------------------------
# Correctness


def inputs(run: Run, batch: int, length: int, heads: int, key_heads: int, dims, dtype) -> list[torch.Tensor]:
    """Query, key, value [B, N, H, D] as views of projections, and the gradient of the output."""
    shapes = [(heads, dims[0]), (key_heads, dims[0]), (key_heads, dims[1]), (heads, dims[1])]
    return [torch.randn(batch, length, *shape, device=run.device, dtype=dtype) for shape in shapes]


def with_gradients(attention: Callable, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    query, key, value = (x.detach().requires_grad_() for x in tensors[:3])
    output = attention(query, key, value)
    return [output.detach(), *torch.autograd.grad(output, (query, key, value), tensors[3].to(output.dtype))]


def masked(query, key, value, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Dense attention under a mask [H, N, N] or [B, H, N, N], in the dtype of its inputs; nothing seen gives 0."""
    groups = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (key, value))
    scores = (query.transpose(1, 2) @ key.mT * scale).masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1).masked_fill(~mask, 0)
    return (weights @ value).transpose(1, 2)


def check(run: Run, name: str, pattern: Pattern, tensors: list[torch.Tensor], causal=True, key_valid=None) -> bool:
    """Output and gradients against float64: within the budget, or twice the error of dense attention in the dtype."""
    length, scale = tensors[0].shape[1], tensors[0].shape[3] ** -0.5
    heads = torch.arange(tensors[0].shape[2], device=run.device)[:, None, None]
    places = torch.arange(length, device=run.device)
    mask = pattern.visible(heads, places[:, None], places).expand(len(heads), length, length)
    mask = mask & (places <= places[:, None]) if causal else mask
    if key_valid is not None:
        mask = mask & key_valid[:, None, None]
    dense = partial(masked, mask=mask, scale=scale)
    ours = partial(block_sparse_attention, pattern=pattern, causal=causal, scale=scale, q_offset=0, key_valid=key_valid)
    exact = with_gradients(dense, [x.double() for x in tensors])
    plain = with_gradients(dense, tensors)
    worst = 0.0
    try:
        for mine, theirs, true in zip(with_gradients(ours, tensors), plain, exact):
            size = torch.maximum(true.norm(), 1e-2 * exact[0].norm())  # gradients that are 0 have no relative error
            error, peer = ((x.double() - true).norm() / size for x in (mine, theirs))
            ratio = float(error / max(BUDGET[tensors[0].dtype], 2 * float(peer)))
            worst = max(worst, ratio) if ratio == ratio else float("inf")
        note = f"error over budget {worst:.2f}"
    except Exception as failure:
        worst, note = float("inf"), f"{type(failure).__name__}: {failure}"[:300]
    run.record["checks"].append({"name": name, "passed": worst <= 1, "note": note})
    print(f"{'ok ' if worst <= 1 else 'BAD'} {name}: {note}", flush=True)
    return worst <= 1


def check_kernels(run: Run) -> None:
    """Every pattern in every dtype; padding, grouped heads, odd lengths, Dqk != Dv, not causal."""
    length = 333 if run.is_gpu else 48
    for dtype_name, dtype in DTYPES.items():
        for name, pattern in PATTERNS.items():
            if run.out_of_time(f"check {name}, {dtype_name}"):
                continue
            tensors = inputs(run, 2, length, 4, 2, (64, 64) if run.is_gpu else (16, 16), dtype)
            check(run, f"{name}, {dtype_name}", pattern, tensors)
    valid = torch.rand(2, length, device=run.device) > 0.3
    for name, pattern in PATTERNS.items():
        if not run.is_gpu and name not in ("fixed merged", "by table"):
            continue
        for dims in [(96, 96), (64, 128), (128, 128)] if run.is_gpu else [(16, 32)]:
            tensors = inputs(run, 2, length, 4, 1, dims, torch.bfloat16)
            check(run, f"{name}, {dims}, padding", pattern, tensors, key_valid=valid)
            check(run, f"{name}, {dims}, not causal", pattern, tensors, causal=False)


def check_dense_kernels(run: Run) -> None:
    """Each dense kernel that views may be handed to, by name, through the view of a strided column."""
    from hf_tfamily.modeling import attention_triton_views as views

    names = ("flash", "cudnn") if run.is_gpu else ("flash_cpu",)
    chosen = views.dense_kernel
    for name in names:
        views.dense_kernel = lambda *_, name=name: name
        try:
            for pattern in (Full(), Strided(16), FixedBlock(16)):
                tensors = inputs(run, 2, 256 if run.is_gpu else 32, 4, 2, (64, 64), torch.bfloat16)
                check(run, f"dense kernel {name}, {pattern}", pattern, tensors)
        finally:
            views.dense_kernel = chosen


# ---------------------------------------------------------------------------------------------------------------------
# Benchmark


def benchmark(run: Run) -> None:
    shapes = SHAPES if run.mode != "quick" else [shape for shape in SHAPES if shape.name[0] in "ACDEFG"]
    for shape in shapes:
        if run.out_of_time(f"benchmark {shape.name}"):
            continue
        sizes = (shape.heads, shape.heads, shape.dims, torch.bfloat16)
        if not run.is_gpu:
            sizes = (4, 4, tuple(dim // 4 for dim in shape.dims), torch.bfloat16)
        checked = 1536 if run.is_gpu else 64
        if not check(run, f"benchmark {shape.name}, {checked} tokens", shape.pattern, inputs(run, 1, checked, *sizes)):
            run.leave_out(f"benchmark {shape.name}", "its check failed")
            continue
        try:
            measure(run, shape, sizes)
        except Exception as error:
            run.leave_out(f"benchmark {shape.name}", error)
        run.save()
        if run.is_gpu:
            torch.cuda.empty_cache()


def measure(run: Run, shape: Shape, sizes: tuple) -> None:
    """Times of all contenders, in turn; our row says how many times faster than each peer we are."""
    length = shape.length if run.is_gpu else 64
    batch = shape.batch if run.is_gpu else 1
    sets = [inputs(run, batch, length, *sizes) for _ in range(3 if run.is_gpu else 1)]  # more than the L2 cache holds
    scale = sizes[2][0] ** -0.5
    layout.cache_clear()
    begin = time.perf_counter()
    layout(shape.pattern, Extent(length, length, 0, 0, True), sizes[0])
    row = {"shape": shape.name, "layout ms": 1e3 * (time.perf_counter() - begin), "pairs": pairs(shape.pattern, length)}
    contenders = {"ours": partial(block_sparse_attention, pattern=shape.pattern, causal=True, scale=scale, q_offset=0)}
    contenders |= {f"sdpa {name}": partial(dense, backend=backend) for name, backend in BACKENDS.items() if run.is_gpu}
    if run.is_gpu:
        contenders |= flex_contenders(run, shape, length, sizes, scale)
    for phase in ("forward", "forward + backward"):
        calls = {name: partial(one_call, attention, sets, phase) for name, attention in contenders.items()}
        for name, call in list(calls.items()):
            try:
                begin = time.perf_counter()
                call()
                if run.is_gpu:
                    torch.cuda.synchronize()
                row[f"{name}, {phase}, first call s"] = time.perf_counter() - begin
            except Exception as error:
                run.leave_out(f"{shape.name}, {name}, {phase}", error)
                del calls[name]
        times = {name: [] for name in calls}
        for _ in range({"full": 5, "quick": 3, "dry": 1}[run.mode]):
            for name, call in calls.items():
                times[name].append(timed(run, call))
        for name, seconds in times.items():
            row[f"{name}, {phase}"] = statistics.median(seconds)
            row[f"{name}, {phase}, spread"] = [min(seconds), max(seconds)]
        rate(run, row, shape, sizes, phase, batch, length)
        if run.is_gpu and "ours" in calls:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            calls["ours"]()
            row[f"ours, {phase}, peak MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    if run.is_gpu:  # times of an interpreter mean nothing
        run.record["rows"].append(row)
    print(json.dumps({key: value for key, value in row.items() if "spread" not in key}) if run.is_gpu else "measured")


def rate(run: Run, row: dict, shape: Shape, sizes: tuple, phase: str, batch: int, length: int) -> None:
    """TFLOP/s on the pairs that are seen, fraction of the bound, and ratios with their goals."""
    seconds = row.get(f"ours, {phase}")
    if seconds is None:
        return
    flops = 2 * batch * sizes[0] * row["pairs"] * sum(sizes[2]) * (1 if phase == "forward" else 3.5)
    row[f"{phase}, TFLOP/s"] = flops / seconds / 1e12
    moved = batch * length * sizes[0] * sum(sizes[2]) * 2 * 2 * (1 if phase == "forward" else 3)
    row[f"{phase}, GB/s"] = moved / seconds / 1e9
    place = int(phase != "forward")
    for kind, goals in (("flex", shape.against_flex), ("sdpa", shape.against_dense)):
        peers = [row[key] for key in row if key.startswith(kind) and key.endswith(f", {phase}")]
        if peers:
            row[f"{phase}, times {kind}"] = min(peers) / seconds
            row[f"{phase}, goal {kind}"] = None if goals is None else goals[place]
            if kind == "sdpa":
                density = row["pairs"] / (length * (length + 1) / 2)
                row[f"{phase}, of the bound"] = min(peers) * density / seconds


def pairs(pattern: Pattern, length: int) -> float:
    """Visible causal pairs of one head, averaged over heads; counted in blocks of rows."""
    key, seen, heads = torch.arange(length), 0, min(pattern.head_period, 8)
    rows = torch.arange(0, length, max(1, length // 1024))  # a sample of the queries
    for head in range(heads):
        for query in rows.split(64):
            seen += int((pattern.visible(head, query[:, None], key) & (key <= query[:, None])).sum())
    return seen / heads / len(rows) * length


def one_call(attention: Callable, sets: list, phase: str) -> None:
    tensors = sets.pop(0)
    sets.append(tensors)
    if phase == "forward":
        with torch.no_grad():
            attention(*tensors[:3])
    else:
        with_gradients(attention, tensors)


BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def dense(query, key, value, backend: SDPBackend) -> torch.Tensor:
    with sdpa_kernel(backend):
        tensors = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(*tensors, is_causal=True).transpose(1, 2)


def flex_contenders(run: Run, shape: Shape, length: int, sizes: tuple, scale: float) -> dict[str, Callable]:
    """FlexAttention as it comes, and with the options that help it."""
    if length > 32768 and run.mode == "quick":
        return {}
    torch._dynamo.reset()
    seen = VisibleKeys(shape.pattern, sizes[0], True, 1, length, length)
    mask = seen.block_mask(run.device)

    def flex(query, key, value, compiled, **options):
        tensors = (x.transpose(1, 2) for x in (query, key, value))
        return compiled(*tensors, block_mask=mask, scale=scale, **options).transpose(1, 2)

    hints = {"ROWS_GUARANTEED_SAFE": True, "PRESCALE_QK": True, "BLOCKS_ARE_CONTIGUOUS": False}
    found = {"flex": partial(flex, compiled=torch.compile(flex_attention))}
    if run.mode == "full":
        found["flex with hints"] = partial(flex, compiled=torch.compile(flex_attention), kernel_options=hints)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Models


def model_of(run: Run, recipe: str, dense: bool):
    """A recipe's model in bfloat16; `dense`: the same model with every key seen, on SDPA."""
    values = dict(load_recipe(recipe).model)
    if dense:
        values["attention_patterns"] = {"type": "full"}
    if not run.is_gpu:
        values |= {"num_hidden_layers": 2, "position_shape": [4, 16]}
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    implementation = "sdpa" if dense else "block_sparse"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return model.to(run.device, torch.bfloat16)


def train(run: Run) -> None:
    """One training step of the paper's models, dense-flash against sparse."""
    for recipe, batch, length in (("sparse_transformer/cifar10", 4, 3072), ("sparse_transformer/enwik8", 1, 12288)):
        row = {"what": f"training step, {recipe}, batch {batch}"}
        for kind in ("sparse", "dense"):
            if run.out_of_time(f"{row['what']}, {kind}"):
                continue
            try:
                model = model_of(run, recipe, kind == "dense").train()
                model.gradient_checkpointing_enable()
                ids = torch.randint(257, (batch, length if run.is_gpu else 64), device=run.device)

                def step(model=model, ids=ids):
                    model.zero_grad()
                    model(ids, labels=ids, use_cache=False).loss.backward()

                row[f"{kind} s"] = timed(run, step)
            except Exception as error:
                run.leave_out(f"{row['what']}, {kind}", error)
            finally:
                model = step = None
                if run.is_gpu:
                    torch.cuda.empty_cache()
        if "sparse s" in row and "dense s" in row and run.is_gpu:
            row["times dense"] = row["dense s"] / row["sparse s"]
        if run.is_gpu:
            run.record["models"].append(row)


def sample(run: Run) -> None:
    """Tokens a second of cached sampling, sparse and dense."""
    tokens = 128 if run.is_gpu else 4
    for kind in ("sparse", "dense"):
        if run.out_of_time(f"sampling, {kind}"):
            continue
        try:
            model = model_of(run, "sparse_transformer/enwik8", kind == "dense").eval()
            prompt = torch.randint(257, (8 if run.is_gpu else 1, 4096 if run.is_gpu else 16), device=run.device)
            begin = time.perf_counter()
            with torch.no_grad():
                generated = model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True)
            if run.is_gpu:
                torch.cuda.synchronize()
            rate = (generated.shape[1] - prompt.shape[1]) * len(prompt) / (time.perf_counter() - begin)
            if run.is_gpu:
                run.record["models"].append({"what": f"sampling enwik8, {kind}", "tokens/s, prefill included": rate})
        except Exception as error:
            run.leave_out(f"sampling, {kind}", error)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def page(record: dict) -> str:
    lines = ["# block_sparse on a GPU", "", "Made by `python scripts/gpu_check.py --output DIR`.", ""]
    lines += [f"- {key}: {shown(value)}" for part in ("machine", "calibration") for key, value in record[part].items()]
    failed = [check for check in record["checks"] if not check["passed"]]
    lines += ["", f"## Correctness: {len(record['checks'])} checks, {len(failed)} failed", ""]
    lines += [f"- FAILED {check['name']}: {check['note']}" for check in failed]
    lines += ["", "## Speed", ""]
    if not record["rows"]:
        lines += ["No row was measured."]
    for row in record["rows"]:
        lines += [f"### {row['shape']}", ""]
        lines += [f"- {key}: {shown(value)}" for key, value in row.items() if key != "shape"]
        lines += [""]
    lines += ["## Models", ""]
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


if __name__ == "__main__":
    sys.exit(main())
