"""Checks of gpu_check.py: every kernel, its outputs and gradients, against float64."""

from collections.abc import Callable
from functools import partial

import torch
from gpu_run import Run, inputs
from gpu_shapes import PATTERNS

from hf_tfamily.modeling import attention_triton_views as views
from hf_tfamily.modeling.attention_patterns import FixedBlock, Full, Local, Strided, Union
from hf_tfamily.modeling.attention_patterns_base import Pattern
from hf_tfamily.modeling.attention_relative import relative_attention
from hf_tfamily.modeling.attention_relative_plan import distances_met, rows_by_distance
from hf_tfamily.modeling.attention_torch import block_sparse_attention

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BUDGET = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}  # relative errors that always pass


def with_gradients(attention: Callable, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    *inputs, grad_output = tensors
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = attention(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad_output.to(output.dtype))]


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
    return compare(run, name, ours, dense, tensors)


def compare(run: Run, name: str, ours: Callable, dense: Callable, tensors: list[torch.Tensor]) -> bool:
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


def check_relative(run: Run) -> None:
    """Scores for distances: outputs and the gradients of all five tensors."""
    length, heads, dim = (320, 4, 64) if run.is_gpu else (40, 2, 16)
    places = torch.arange(length)
    for name, pattern in {"local": Local(33), "strided merged": Union([Local(33), Strided(16)]), **PATTERNS}.items():
        if run.out_of_time(f"check relative {name}"):
            continue
        distances = distances_met(pattern, length)
        rows = rows_by_distance(distances, places[:, None] - places).to(run.device)
        seen = pattern.visible(torch.arange(heads)[:, None, None], places[:, None], places).expand(
            heads, length, length
        )
        mask = (seen & (places <= places[:, None])).to(run.device)

        def dense(query, position_query, key, value, relative_key, rows=rows, mask=mask):
            scores = torch.einsum("bthd,bshd->bhts", query, key)
            by_distance = torch.einsum("bthd,hld->bhtl", position_query, relative_key)
            scores = scores + by_distance.gather(3, rows.expand(*scores.shape))
            weights = (scores * dim**-0.5).masked_fill(~mask, float("-inf")).softmax(-1).masked_fill(~mask, 0)
            return torch.einsum("bhts,bshd->bthd", weights, value)

        def ours(*tensors, distances=distances, pattern=pattern):
            return relative_attention(*tensors, distances, pattern, scale=dim**-0.5, q_offset=0)

        for dtype_name, dtype in DTYPES.items():
            shapes = [(2, length, heads, dim)] * 4 + [(heads, len(distances), dim), (2, length, heads, dim)]
            tensors = [torch.randn(shape, device=run.device, dtype=dtype) for shape in shapes]
            compare(run, f"relative {name}, {dtype_name}", ours, dense, tensors)


def check_dense_kernels(run: Run) -> None:
    """Each dense kernel that views may be handed to, by name, through the view of a strided column."""
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
