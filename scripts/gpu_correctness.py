"""Checks of gpu_check.py: every kernel, its outputs and gradients, against float64."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from gpu_contenders import sinks_of
from gpu_run import Run, inputs
from gpu_shapes import PATTERNS

from hf_tfamily.block_sparse.cpu import block_sparse_attention
from hf_tfamily.block_sparse.decode import attend_one
from hf_tfamily.block_sparse.distance_bias import biased_attention
from hf_tfamily.block_sparse.interface import with_sinks
from hf_tfamily.block_sparse.relative import relative_attention
from hf_tfamily.block_sparse.triton import views
from hf_tfamily.modeling.attention import VisibleKeys
from hf_tfamily.modeling.attention_patterns import FixedBlock, Full, Local, Pattern, Strided, Union, distances_met
from hf_tfamily.modeling.positions import rows_by_distance

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BUDGET = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}  # relative errors that always pass


def with_gradients(attention: Callable, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    *inputs, grad_output = tensors
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = attention(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad_output.to(output.dtype))]


def attend(query, key, value, sinks: torch.Tensor | None = None, **where) -> torch.Tensor:
    """Ours; learned sinks [H] are applied through the log-sum-exp, whose gradient the backward takes."""
    if sinks is None:
        return block_sparse_attention(query, key, value, **where)
    output, lse = block_sparse_attention(query, key, value, return_lse=True, **where)
    return with_sinks(output, lse.transpose(1, 2), sinks)[0]


def masked(query, key, value, mask: torch.Tensor, scale: float, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """Dense attention under a mask [H, N, N] or [B, H, N, N], in the dtype of its inputs; nothing seen gives 0.

    `sinks` [H]: the score of one key more for each head, without a value.
    """
    groups = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (key, value))
    scores = (query.transpose(1, 2) @ key.mT * scale).masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks[:, None, None].to(scores.dtype).expand(*scores.shape[:3], 1)
        return (torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ value).transpose(1, 2)
    weights = scores.softmax(-1).masked_fill(~mask, 0)
    return (weights @ value).transpose(1, 2)


class Job(NamedTuple):
    """A check: our attention and the dense one that defines it, and what makes their inputs."""

    name: str
    ours: Callable
    dense: Callable
    tensors: Callable[[], list[torch.Tensor]]


def job(
    run: Run, name: str, pattern: Pattern, sizes: tuple, causal: bool = True, key_valid=None, has_sinks: bool = False
) -> Job:
    """`sizes`: batch, length, heads, key heads, head dimensions, dtype."""
    _, length, heads, _, dims, _ = sizes
    scale = dims[0] ** -0.5
    mask = partial(visible, run, pattern, heads, length, causal, key_valid)
    sinks = sinks_of(heads, run.device) if has_sinks else None
    where = {"pattern": pattern, "causal": causal, "scale": scale, "q_offset": 0, "key_valid": key_valid}

    def dense(query, key, value):
        return masked(query, key, value, mask(), scale, sinks)

    return Job(name, partial(attend, sinks=sinks, **where), dense, partial(inputs, run, *sizes))


def visible(run: Run, pattern: Pattern, heads: int, length: int, causal: bool, key_valid=None) -> torch.Tensor:
    """[H, N, N] or [B, H, N, N] bool."""
    head, places = torch.arange(heads, device=run.device)[:, None, None], torch.arange(length, device=run.device)
    mask = pattern.visible(head, places[:, None], places).expand(heads, length, length)
    mask = mask & (places <= places[:, None]) if causal else mask
    return mask if key_valid is None else mask & key_valid[:, None, None]


def check(run: Run, name: str, pattern: Pattern, sizes: tuple, has_sinks: bool = False) -> bool:
    return compare(run, job(run, name, pattern, sizes, has_sinks=has_sinks))


def compare(run: Run, job: Job, outcome: Callable = with_gradients) -> bool:
    """Ours against float64: within the budget, or twice the error of dense attention in the dtype."""
    worst = 0.0
    try:
        tensors = job.tensors()
        exact = outcome(job.dense, [x.double() for x in tensors])
        plain = outcome(job.dense, tensors)
        poison(run)
        for mine, theirs, true in zip(outcome(job.ours, tensors), plain, exact):
            size = torch.maximum(true.norm(), 1e-2 * exact[0].norm())  # gradients that are 0 have no relative error
            error, peer = ((x.double() - true).norm() / size for x in (mine, theirs))
            ratio = float(error / max(BUDGET[tensors[0].dtype], 2 * float(peer)))
            worst = max(worst, ratio) if ratio == ratio else float("inf")
        note = f"error over budget {worst:.2f}"
    except Exception as failure:
        worst, note = float("inf"), f"{type(failure).__name__}: {failure}"[:300]
    run.record["checks"].append({"name": job.name, "passed": worst <= 1, "note": note})
    print(f"{'ok ' if worst <= 1 else 'BAD'} {job.name}: {note}", flush=True)
    run.save()
    return worst <= 1


def poison(run: Run) -> None:
    """Leave NaN in the memory that is handed out next: what a kernel does not write shows."""
    sizes = [1 << power for power in range(10, 25)] if run.is_gpu else []
    del [torch.full((size,), float("nan"), device=run.device) for size in sizes][:]


def jobs(run: Run) -> Iterator[Job]:
    """All checks of kernels, those of every system's patterns first."""
    yield from kernel_jobs(run)
    yield from wide_jobs(run)
    yield from relative_jobs(run)
    yield from bias_jobs(run)


def kernel_jobs(run: Run) -> Iterator[Job]:
    """Every pattern in every dtype; padding, grouped heads, odd lengths, Dqk != Dv, not causal."""
    length = 333 if run.is_gpu else 48
    for dtype_name, dtype in DTYPES.items():
        for name, pattern in PATTERNS.items():
            sizes = (2, length, 4, 2, (64, 64) if run.is_gpu else (16, 16), dtype)
            yield job(run, f"{name}, {dtype_name}", pattern, sizes)
    valid = torch.rand(2, length, device=run.device) > 0.3
    all_dims = {"quick": [(64, 128)], "dry": [(16, 32)]}.get(run.mode, [(32, 32), (96, 96), (64, 128), (128, 128)])
    for name, pattern in PATTERNS.items():
        if run.mode == "dry" and name not in ("fixed merged", "by table"):
            continue
        for dims in all_dims:
            sizes = (2, length, 4, 1, dims, torch.bfloat16)
            yield job(run, f"{name}, {dims}, padding", pattern, sizes, key_valid=valid)
            yield job(run, f"{name}, {dims}, not causal", pattern, sizes, causal=False)


def wide_jobs(run: Run) -> Iterator[Job]:
    """Heads of 192 and 256, learned sinks, and windows with a dilation."""
    length, usual = (333, (64, 64)) if run.is_gpu else (48, (16, 16))
    all_dims = [(256, 256), (192, 192), (192, 128)] if run.is_gpu else [(64, 48)]
    patterns = {name: PATTERNS[name] for name in ("local", "fixed merged", "strided merged", "by table")}
    for dtype_name, dims in product(("bf16", "fp32"), all_dims):
        for name, pattern in patterns.items():
            yield job(run, f"{name}, {dims}, {dtype_name}", pattern, (2, length, 4, 2, dims, DTYPES[dtype_name]))
    for name in ("local", "strided merged"):
        for dtype_name, dtype in DTYPES.items():
            sizes = (2, length, 4, 2, usual, dtype)
            yield job(run, f"{name}, sinks, {dtype_name}", PATTERNS[name], sizes, has_sinks=True)
    for pattern in (Local(9, dilation=4), Union([Local(20), Local(9, dilation=8)])):
        yield job(run, f"{pattern}", pattern, (2, length, 4, 2, usual, torch.bfloat16))


def relative_jobs(run: Run) -> Iterator[Job]:
    """Scores for distances: outputs and the gradients of all five tensors."""
    dtypes = {"bf16": torch.bfloat16} if run.mode == "quick" else DTYPES
    for name, pattern in PATTERNS.items():
        for dtype_name, dtype in dtypes.items():
            yield relative_job(run, f"relative {name}, {dtype_name}", pattern, dtype)


def relative_job(run: Run, name: str, pattern: Pattern, dtype: torch.dtype) -> Job:
    length, heads, dim = (320, 4, 64) if run.is_gpu else (40, 2, 16)
    places = torch.arange(length)
    distances = distances_met(pattern, length)
    rows = rows_by_distance(distances, places[:, None] - places).to(run.device)
    shapes = [(2, length, heads, dim)] * 4 + [(heads, len(distances), dim), (2, length, heads, dim)]

    def dense(query, position_query, key, value, relative_key):
        scores = torch.einsum("bthd,bshd->bhts", query, key)
        by_distance = torch.einsum("bthd,hld->bhtl", position_query, relative_key)
        scores = (scores + by_distance.gather(3, rows.expand(*scores.shape))) * dim**-0.5
        mask = visible(run, pattern, heads, length, True)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).masked_fill(~mask, 0)
        return torch.einsum("bhts,bshd->bthd", weights, value)

    def ours(*tensors):
        return relative_attention(*tensors, distances, pattern, scale=dim**-0.5, q_offset=0)

    return Job(name, ours, dense, lambda: [torch.randn(shape, device=run.device, dtype=dtype) for shape in shapes])


def bias_jobs(run: Run) -> Iterator[Job]:
    """Biases by distance, causal and not: outputs and the gradients of all four tensors."""
    names = ("local", "strided merged", "fixed merged", "by table")
    for (dtype_name, dtype), name, causal in product(DTYPES.items(), names, (True, False)):
        if run.mode != "quick" or dtype == torch.bfloat16:
            title = f"bias by distance, {name}, {dtype_name}{'' if causal else ', not causal'}"
            yield bias_job(run, title, PATTERNS[name], dtype, causal)


def bias_job(run: Run, name: str, pattern: Pattern, dtype: torch.dtype, causal: bool) -> Job:
    length, heads, dim = (320, 4, 64) if run.is_gpu else (40, 4, 16)
    places, distances = torch.arange(length), torch.arange(1 - length, length)
    rows = rows_by_distance(distances, places[:, None] - places).to(run.device)
    of_keys = (2, length, heads // 2, dim)
    shapes = [(2, length, heads, dim), of_keys, of_keys, (heads, len(distances)), (2, length, heads, dim)]

    def dense(query, key, value, table):
        key, value = (x.repeat_interleave(2, 2) for x in (key, value))
        scores = torch.einsum("bthd,bshd->bhts", query, key) * dim**-0.5 + table[:, rows]
        mask = visible(run, pattern, heads, length, causal)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).masked_fill(~mask, 0)
        return torch.einsum("bhts,bshd->bthd", weights, value)

    def ours(*tensors):
        return biased_attention(*tensors, distances, pattern, causal=causal, scale=dim**-0.5, q_offset=0)

    return Job(name, ours, dense, lambda: [torch.randn(shape, device=run.device, dtype=dtype) for shape in shapes])


def check_kernels(run: Run) -> None:
    for one in jobs(run):
        if not run.out_of_time(f"check {one.name}"):
            compare(run, one)


def check_decoding(run: Run) -> None:
    """One token at a time over a static buffer: on a GPU one CUDA graph, replayed wherever the token stands."""
    length, heads, dim = (256, 4, 64) if run.is_gpu else (48, 4, 16)
    places = list(range(0, length, length // 8 + 1))
    for name, pattern in PATTERNS.items():
        if run.out_of_time(f"check decoding {name}"):
            continue

        def ours(query, key, value, _, pattern=pattern):
            place, one = torch.zeros((), dtype=torch.long, device=run.device), query[:, :1].clone()

            def step() -> torch.Tensor:
                seen = VisibleKeys(pattern, heads, True, 2, 1, length, query_offset=place, all_places=True)
                return attend_one(seen, one, key, value, dim**-0.5)[0]

            replay, outputs = graphed(run, step), []
            for at in places:
                place.fill_(at)
                one.copy_(query[:, at : at + 1])
                outputs.append(replay().clone())
            return torch.cat(outputs, 1)

        def dense(query, key, value, _, pattern=pattern):
            return masked(query, key, value, visible(run, pattern, heads, length, True), dim**-0.5)[:, places]

        tensors = partial(inputs, run, 2, length, heads, 2, (dim, dim), torch.bfloat16)
        with torch.no_grad():
            compare(run, Job(f"decoding {name}", ours, dense, tensors), lambda run, tensors: [run(*tensors)])


def graphed(run: Run, call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """`call` as one CUDA graph; on a CPU as it is."""
    if not run.is_gpu:
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


def check_determinism(run: Run) -> None:
    """The same call gives the same bits, gradients too."""
    for name, pattern in PATTERNS.items():
        one = job(run, f"same bits, {name}", pattern, (2, 333 if run.is_gpu else 48, 4, 2, (64, 64), torch.bfloat16))
        tensors = one.tensors()
        try:
            first, second = (with_gradients(one.ours, tensors) for _ in range(2))
            passed, note = all(map(torch.equal, first, second)), "twice the same call"
        except Exception as failure:
            passed, note = False, f"{type(failure).__name__}: {failure}"[:300]
        run.record["checks"].append({"name": one.name, "passed": passed, "note": note})


def check_dense_kernels(run: Run) -> None:
    """Each dense kernel that views may be handed to, by name, through the view of a strided column."""
    names = ("flash", "cudnn") if run.is_gpu else ()
    chosen = views.dense_kernel
    for name in names:
        views.dense_kernel = lambda *_, name=name: name
        try:
            for pattern in (Full(), Strided(16), FixedBlock(16)):
                sizes = (2, 256 if run.is_gpu else 32, 4, 2, (64, 64), torch.bfloat16)
                check(run, f"dense kernel {name}, {pattern}", pattern, sizes)
        finally:
            views.dense_kernel = chosen
