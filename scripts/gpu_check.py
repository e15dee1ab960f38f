"""Everything there is to know about block_sparse on one GPU, in one command that needs nobody: right first, then fast.

    python scripts/gpu_check.py --output DIR             # at most 9 minutes; gpu_check.json, .md and .png in DIR
    python scripts/gpu_check.py --output DIR --quick     # at most 2 minutes, the main shapes
    python scripts/gpu_check.py --output DIR --correctness  # at most 2 minutes, every check and no times
    python scripts/gpu_check.py --output DIR --speed     # at most 5 minutes, the benchmark alone
    python scripts/gpu_check.py --output DIR --sweeps    # at most 9 minutes, for sweeps over lengths, densities, ...
    python scripts/gpu_check.py --output DIR --dry-run   # tiny, on the CPU, in Triton's interpreter; no times

Stages: calibration, compilation of the kernels by many processes, correctness of every kernel, dense kernels, decoding,
benchmark, training steps, sampling, sweeps while there is time. What is found is written check by check and row by row.
A row of the benchmark, and a model's, appears only if the check of these very patterns, head dimensions and dtype
passed; what failed or was out of time is listed with the reason. The exit status is 1 if any check failed.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
import transformers
from gpu_contenders import flex_contenders, sdpa_contenders, sinks_of
from gpu_correctness import (
    attend,
    check,
    check_decoding,
    check_dense_kernels,
    check_determinism,
    check_kernels,
    job,
    jobs,
    with_gradients,
)
from gpu_run import PHASES, Run, inputs, plot, timed
from gpu_shapes import SHAPES, Shape, sweeps
from torch.nn.attention import SDPBackend, sdpa_kernel

import hf_tfamily  # noqa: F401  registers the systems
from hf_tfamily.block_sparse.patterns import to_text
from hf_tfamily.block_sparse.triton import attention as triton_attention
from hf_tfamily.block_sparse.triton import distance_bias as triton_distance_bias
from hf_tfamily.block_sparse.triton import relative as triton_relative
from hf_tfamily.block_sparse.triton.call import Call
from hf_tfamily.block_sparse.triton.layout import layout
from hf_tfamily.block_sparse.triton.views import dense_kernel
from hf_tfamily.modeling.attention_patterns import Pattern
from hf_tfamily.recipes import load_recipe

MODELS_TAKE = 100  # seconds that the benchmark leaves to training and sampling
CHECKED = 1536  # tokens of a row's check
COMPILERS = 8  # processes at most, and for how many seconds they may compile
COMPILATION_TAKES = {"full": 120, "quick": 45, "sweeps": 60, "correctness": 60, "speed": 75, "dry": 120}
SPEED_FIRST = "KLMBEGACDFHIJ"  # shapes by their letter, as --speed takes them while there is time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder for the JSON, the page and the plot")
    parser.add_argument("--quick", action="store_true", help="at most 2 minutes")
    parser.add_argument("--correctness", action="store_true", help="the checks alone; at most 2 minutes")
    parser.add_argument("--speed", action="store_true", help="the benchmark alone; at most 5 minutes")
    parser.add_argument("--sweeps", action="store_true", help="lengths, head dimensions, densities; at most 9 minutes")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, in Triton's interpreter")
    parser.add_argument("--compile", metavar="I/N", help="only fill Triton's cache with every N-th of what is checked")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu_check needs a CUDA device; --dry-run goes through all stages without one.", file=sys.stderr)
        return 2
    run = Run(options)
    if options.dry_run:
        triton_attention.register_on("cpu")
        triton_relative.register_on("cpu")
        triton_distance_bias.register_on("cpu")
    if options.compile:
        compile_some(run, *map(int, options.compile.split("/")))
        return 0
    for stage in (describe, calibrate, compile_all, *STAGES.get(run.mode, STAGES["full"]), plot):
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
        machine |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "clocks": clocks()}
    query = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device=run.device)
    machine["dense kernel of views"] = dense_kernel(query, query)
    run.record["machine"] = machine
    print(machine, flush=True)


def clocks() -> str:
    """Clocks of the processors and of memory, and their limits, as the driver tells them."""
    asked = "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit"
    try:
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"


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


# ---------------------------------------------------------------------------------------------------------------------
# Compilation: what one process would do in minutes, many do at once


def compile_all(run: Run) -> None:
    """Our kernels and FlexAttention's into the caches on disk; what fails here fails again where it is reported."""
    processes = max(1, min(COMPILERS, (os.cpu_count() or 1) // 2)) if run.is_gpu else 1
    begin, end = time.monotonic(), time.monotonic() + COMPILATION_TAKES[run.mode]
    command = [sys.executable, __file__, *sys.argv[1:], "--compile"]
    started = [subprocess.Popen([*command, f"{i}/{processes}"], stdout=subprocess.DEVNULL) for i in range(processes)]
    for process in started:
        try:
            process.wait(timeout=max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            run.leave_out("compilation in advance", "out of time")
    run.record["calibration"]["compilation by processes"] = processes
    run.record["calibration"]["compilation s"] = time.monotonic() - begin


def compile_some(run: Run, first: int, processes: int) -> None:
    """Run what is checked and measured, from the first on every so many (in a dry run: the first), once each."""
    shapes = [shape for of_one in sweeps().values() for shape in of_one] if run.mode == "sweeps" else shapes_of(run)
    planned: dict[str, Callable] = {f"{shape.name}, flex": partial(run_flex, run, shape) for shape in shapes}
    checks = [] if run.mode in ("sweeps", "speed") else list(jobs(run))
    for shape in shapes:
        rest = sizes_of(run, shape)
        for batch, length, heads, key_heads in (checked_sizes(run, shape)[:4], (1, shape.length, *rest[:2])):
            sizes = (batch, length, heads, key_heads, *rest[2:])
            checks.append(job(run, f"{shape.name}, {length}", shape.pattern, sizes, has_sinks=shape.sinks))
    planned |= {one.name: lambda one=one: with_gradients(one.ours, one.tensors()) for one in checks}
    for name in list(planned)[first :: processes if run.is_gpu else len(planned)]:
        try:
            planned[name]()
        except Exception as error:
            print(f"{name}: {error}", file=sys.stderr)


def run_flex(run: Run, shape: Shape) -> None:
    sizes, length = sizes_of(run, shape), shape.length if run.is_gpu else 64
    attention = flex_contenders(shape, sizes[0], length, run.device, every=False)["flex"]()
    for phase in PHASES if run.is_gpu else PHASES[:1]:
        one_call(attention, [inputs(run, shape.batch, length, *sizes)], phase)


# ---------------------------------------------------------------------------------------------------------------------
# Benchmark


def shapes_of(run: Run) -> list[Shape]:
    if run.mode in ("sweeps", "correctness"):
        return []
    if run.mode == "speed":
        return sorted(SHAPES, key=lambda shape: SPEED_FIRST.index(shape.name[0]))
    return SHAPES if run.mode != "quick" else [shape for shape in SHAPES if shape.name[0] in "ACDEFG"]


def benchmark(run: Run) -> None:
    shapes = shapes_of(run)
    for number, shape in enumerate(shapes):
        share = (run.end - time.monotonic() - MODELS_TAKE * (run.mode == "full")) / (len(shapes) - number)
        checked_row(run, "rows", shape, share, every_flex=run.mode in ("full", "dry"))


def sweep(run: Run) -> None:
    """Along one quantity at a time, while there is time: the main shapes come first."""
    for quantity, shapes in sweeps().items():
        for shape in shapes if run.is_gpu else shapes[:1]:
            checked_row(run, "sweeps", shape, 20, every_flex=False, quantity=quantity)


def checked_row(run: Run, kind: str, shape: Shape, seconds: float, every_flex: bool, **about) -> None:
    """Times of a shape among the rows of this kind, if it is right and there is time."""
    what = f"{kind} {shape.name}"
    if run.out_of_time(what):
        return
    sizes = sizes_of(run, shape)
    checked = checked_sizes(run, shape)
    if not check(run, f"{what}, {checked[1]} tokens", shape.pattern, checked, shape.sinks):
        run.leave_out(what, "its check failed")
        return
    try:
        row = measure(run, shape, sizes, time.monotonic() + seconds, every_flex)
        if run.is_gpu:  # times of an interpreter mean nothing
            run.record[kind].append({**about, **row})
    except Exception as error:
        run.leave_out(what, error)
    run.save()
    if run.is_gpu:
        torch.cuda.empty_cache()


def sizes_of(run: Run, shape: Shape) -> tuple:
    """Heads, key heads, head dimensions, dtype."""
    if not run.is_gpu:
        return 4, 4 if shape.key_heads is None else 2, tuple(max(16, dim // 4) for dim in shape.dims), torch.bfloat16
    return shape.heads, shape.key_heads or shape.heads, shape.dims, torch.bfloat16


def checked_sizes(run: Run, shape: Shape) -> tuple:
    """Batch, length and `sizes_of` of a row's check: of one key head where a wide window asks for more tokens."""
    heads, key_heads, dims, dtype = sizes_of(run, shape)
    if not run.is_gpu:
        return 1, 64, heads, key_heads, dims, dtype
    wide = shape.pattern.reach * 5 // 4 if shape.pattern.reach < shape.length else 0
    if wide <= CHECKED:
        return 1, CHECKED, heads, key_heads, dims, dtype
    return 1, wide, heads // key_heads, 1, dims, dtype


def measure(run: Run, shape: Shape, sizes: tuple, end: float, every_flex: bool) -> dict:
    """Times of all contenders, in turn; our row says how many times faster than each peer we are."""
    length = shape.length if run.is_gpu else 64
    batch = shape.batch if run.is_gpu else 1
    sets = [inputs(run, batch, length, *sizes) for _ in range(3 if run.is_gpu else 1)]  # more than the L2 cache holds
    scale = sizes[2][0] ** -0.5
    row = {"shape": shape.name, "pairs": pairs(shape.pattern, length), **how_it_runs(shape.pattern, sets[0], scale)}
    sinks = sinks_of(sizes[0], run.device) if shape.sinks else None
    where = {"pattern": shape.pattern, "causal": True, "scale": scale, "q_offset": 0}
    contenders = {"ours": partial(attend, sinks=sinks, **where)}
    contenders |= sdpa_contenders(run.is_gpu)
    torch._dynamo.reset()
    for name, make in flex_contenders(shape, sizes[0], length, run.device, every_flex).items():
        if time.monotonic() > end and name != "flex":
            run.leave_out(f"{shape.name}, {name}", "out of time")
            continue
        try:
            begin = time.perf_counter()
            contenders[name] = make()
            row[f"{name}, mask s"] = time.perf_counter() - begin
        except Exception as error:
            run.leave_out(f"{shape.name}, {name}", error)
    for phase in PHASES:
        calls = first_calls(run, row, shape, phase, contenders, sets, end)
        times = {name: [] for name in calls}
        for _ in range({"full": 5, "dry": 1}.get(run.mode, 3)):
            for name, call in calls.items():
                times[name].append(timed(run, call))
        for name, seconds in times.items():
            row[f"{name}, {phase}"] = statistics.median(seconds)
            row[f"{name}, {phase}, spread"] = [min(seconds), max(seconds)]
        if "ours" in calls:
            row[f"ours, {phase}, again"] = timed(run, calls["ours"])  # has the machine drifted?
        rate(row, shape, sizes, phase, batch, length)
        of_machine(run, row, phase)
    print(json.dumps({key: value for key, value in row.items() if "spread" not in key}) if run.is_gpu else "measured")
    return row


def how_it_runs(pattern: Pattern, tensors: list[torch.Tensor], scale: float) -> dict:
    """What runs our kernels or which dense kernel a view is handed to, and how long the layout takes."""
    layout.cache_clear()
    begin = time.perf_counter()
    call = Call.of(*tensors[:3], None, to_text(pattern), True, scale, 0, 0)
    view = call.view
    if view is not None:
        return {"ours runs": f"{view.kernel} on a view", "layout ms": 0.0}
    launches = [launch for launches in call.launches for launch in launches]
    return {"ours runs": f"{len(launches)} launches", "layout ms": 1e3 * (time.perf_counter() - begin)}


def first_calls(run: Run, row: dict, shape: Shape, phase: str, contenders: dict, sets: list, end: float) -> dict:
    """The contenders that can do the phase: compiled, with the kernels that ran and the peak memory noted."""
    calls = {}
    for name, attention in contenders.items():
        call = partial(one_call, attention, sets, phase)
        if name.startswith("flex") and name != "flex" and time.monotonic() > end:
            run.leave_out(f"{shape.name}, {name}, {phase}", "out of time")
            continue
        try:
            begin = time.perf_counter()
            call()
            if run.is_gpu:
                torch.cuda.synchronize()
            row[f"{name}, {phase}, first call s"] = time.perf_counter() - begin
            if not name.startswith("flex"):
                row[f"{name}, {phase}, ran"] = kernels_of(run, call)
            row[f"{name}, {phase}, peak MB"] = peak_memory(run, call)
            calls[name] = call
        except Exception as error:
            run.leave_out(f"{shape.name}, {name}, {phase}", error)
    return calls


def kernels_of(run: Run, call: Callable) -> list[str]:
    """The kernels (on a CPU: operators) that take most of a call."""
    kind = torch.profiler.ProfilerActivity.CUDA if run.is_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        call()
    time_of = "self_device_time_total" if run.is_gpu else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: getattr(event, time_of), reverse=True)
    return [event.key[:80] for event in events[:3]]


def peak_memory(run: Run, call: Callable) -> float:
    if not run.is_gpu:
        call()
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def rate(row: dict, shape: Shape, sizes: tuple, phase: str, batch: int, length: int) -> None:
    """TFLOP/s on the pairs that are seen, fraction of the bound, and ratios with their goals."""
    seconds = row.get(f"ours, {phase}")
    if seconds is None:
        return
    with_backward = phase != PHASES[0]
    flops = 2 * batch * sizes[0] * row["pairs"] * sum(sizes[2]) * (3.5 if with_backward else 1)
    row[f"{phase}, TFLOP/s"] = flops / seconds / 1e12
    moved = batch * length * sizes[0] * sum(sizes[2]) * 2 * 2 * (3 if with_backward else 1)
    row[f"{phase}, GB/s"] = moved / seconds / 1e9
    # "flex": its usual blocks of 128 x 128; "flex*": the best of all its forms.
    peers = {"flex": ("flex,",), "flex*": ("flex",), "sdpa": ("sdpa",)}
    goals = {"flex": shape.against_flex, "sdpa": shape.against_dense}
    times = {key.removesuffix(f", {phase}"): row[key] for key in row if key.endswith(f", {phase}")}
    for kind, begins in peers.items():
        found = [peer for name, peer in times.items() if name == kind or name.startswith(begins)]
        if not found:
            continue
        row[f"{phase}, times {kind}"] = min(found) / seconds
        row[f"{phase}, goal {kind}"] = goals.get(kind, (None, None))[with_backward]
        if kind == "sdpa":
            density = row["pairs"] / (length * (length + 1) / 2)
            row[f"{phase}, of the bound"] = min(found) * density / seconds


def of_machine(run: Run, row: dict, phase: str) -> None:
    """Fractions of what the machine was seen to do."""
    for name, whole in (("TFLOP/s", "matmul TFLOP/s"), ("GB/s", "copy GB/s")):
        if f"{phase}, {name}" in row and whole in run.record["calibration"]:
            row[f"{phase}, {name}, of the {whole.split()[0]}'s"] = (
                row[f"{phase}, {name}"] / run.record["calibration"][whole]
            )


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


def is_right(run: Run, model) -> bool:
    """Whether the checks of all patterns of a sparse model pass, in its head dimensions."""
    config, heads = model.config, model.config.num_attention_heads
    sizes = (1, CHECKED if run.is_gpu else 64, heads, heads, (config.qk_head_dim, config.v_head_dim), torch.bfloat16)
    patterns = dict.fromkeys(model.model.patterns)
    return all([check(run, f"{pattern}, of a model", pattern, sizes) for pattern in patterns])


def train(run: Run) -> None:
    """One training step of the paper's models, sparse against dense on flash or cuDNN, never on anything slower."""
    for recipe, batch, length in (("sparse_transformer/cifar10", 4, 3072), ("sparse_transformer/enwik8", 1, 12288)):
        row = {"what": f"training step, {recipe}, batch {batch}"}
        for kind in ("sparse", "dense"):
            if run.out_of_time(f"{row['what']}, {kind}"):
                continue
            try:
                model = model_of(run, recipe, kind == "dense").train()
                if kind == "sparse" and not is_right(run, model):
                    run.leave_out(row["what"], "a check of its patterns failed")
                    break
                model.gradient_checkpointing_enable()
                ids = torch.randint(257, (batch, length if run.is_gpu else 64), device=run.device)

                def step(model=model, ids=ids):
                    model.zero_grad()
                    model(ids, labels=ids, use_cache=False).loss.backward()

                backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
                with sdpa_kernel(backends if run.is_gpu else [*backends, SDPBackend.MATH]):
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
            if kind == "sparse" and not is_right(run, model):
                run.leave_out("sampling", "a check of its patterns failed")
                return
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


CHECKS = (check_kernels, check_dense_kernels, check_decoding, check_determinism)
STAGES = {  # after the machine and the compilation; a dry run goes through all
    "full": (*CHECKS, benchmark, train, sample, sweep),
    "quick": (*CHECKS, benchmark, train, sample, sweep),
    "correctness": CHECKS,
    "speed": (benchmark,),
    "sweeps": (sweep,),
}


if __name__ == "__main__":
    sys.exit(main())
