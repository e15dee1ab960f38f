"""What attention under a pattern costs on the CPU: time and memory of block_sparse against dense attention and others.

    python scripts/benchmark_attention.py --json benchmarks/cpu_attention.json --page benchmarks/cpu_attention.md

Each case is first held to attention in float64, outputs and gradients. `--only` runs some sections and keeps the rows
of the others in FILE; `--quick` takes short sequences and few rounds. All contenders run under one allocator: see
benchmarking.under_allocator.
"""

import gc
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmarking import ALLOCATOR_NOTE, Benchmark, system_allocator, under_allocator
from torch.nn.attention.flex_attention import flex_attention

from hf_tfamily.block_sparse.cpu import block_sparse_attention
from hf_tfamily.block_sparse.relative import relative_attention
from hf_tfamily.modeling.attention import VisibleKeys
from hf_tfamily.modeling.attention_patterns import Fixed, Local, Pattern, Strided, Union, distances_met
from hf_tfamily.modeling.configuration_sparse_transformer import SparseTransformerConfig
from hf_tfamily.modeling.modeling_sparse_transformer import SparseTransformerForCausalLM
from hf_tfamily.modeling.positions import rows_by_distance

HEADS, DIM, STRIDE = 4, 64, 128
SCALE = DIM**-0.5
PATTERNS: dict[str, Pattern] = {
    "local": Local(STRIDE),
    "strided merged": Union([Local(STRIDE), Strided(STRIDE)]),
    "fixed merged, c=8": Fixed(STRIDE, 8),
    "fixed merged, c=32": Fixed(STRIDE, 32),
}
BOTH = "forward + backward"
# How many times faster than dense attention at 16,384 tokens: (must, stretch).
GOALS = {
    ("local", "float32", "forward"): (25, 30),
    ("local", "float32", BOTH): (25, 35),
    ("strided merged", "float32", "forward"): (13.5, 18),
    ("strided merged", "float32", BOTH): (13.5, 20),
    ("fixed merged, c=8", "float32", "forward"): (8.8, 11),
    ("fixed merged, c=8", "float32", BOTH): (9, 12),
    ("fixed merged, c=32", "float32", "forward"): (3.15, 3.6),
    ("fixed merged, c=32", "float32", BOTH): (3.1, 3.7),
    ("local", "bfloat16", BOTH): (15, 27),
    ("strided merged", "bfloat16", BOTH): (7, 15),
}
GOAL_LENGTH = 16_384
MEMORY_GOALS = {"forward": 1.6, BOTH: 6.0}  # KiB a token
SECTIONS = {
    "4,096 tokens": f"One sequence, 4 heads of 64, l = 128; the peer is dense causal SDPA. {ALLOCATOR_NOTE}",
    "16,384 tokens": f"The same at the length that the goals are set for. {ALLOCATOR_NOTE}",
    "65,536 tokens": "The same; one measurement of each, because the dense peer takes so long.",
    "other peers": "float32, forward at 16,384 tokens: FlexAttention compiled, with the same pattern as its block mask "
    "(forward only: it has no backward on CPUs), and the package local-attention.",
    "short sequences": "32 sequences of 1,024 tokens, float32; the peer is dense causal SDPA.",
    "relative bias": "Transformer-XL's scores by distance, float32, 4,096 tokens; the peer is the same without them.",
    "memory": "Peak memory beyond query, key, value (and the gradient of the output), outputs and gradients included, "
    "float32 at 65,536 tokens, each in a process of its own, under the system's allocator as it is; one tensor is 1 "
    "KiB a token. The peer is the goal.",
    "training step": "A Sparse Transformer of 12 layers, 256 wide, 4 heads, strided and local in turn (l = 128), "
    "float32, batch 1: loss and gradients. The peer is the same model with every layer dense, under sdpa.",
}


# ---------------------------------------------------------------------------------------------------------------------
# Contenders


def make_inputs(length: int, dtype: torch.dtype, batch: int = 1, seed: int = 0) -> list[torch.Tensor]:
    """Query, key, value, which want gradients, and the gradient of the output, [B, N, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(batch, length, HEADS, DIM, generator=generator).to(dtype) for _ in range(4)]
    return [tensor.requires_grad_() for tensor in tensors[:3]] + tensors[3:]


def sparse(query, key, value, pattern: Pattern) -> torch.Tensor:
    return block_sparse_attention(query, key, value, pattern, causal=True, scale=SCALE, q_offset=0)


def dense(query, key, value) -> torch.Tensor:
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALE).transpose(1, 2)


def contender(direction: str, attention: Callable, inputs: list[torch.Tensor], *arguments) -> Callable[[], None]:
    """A call to time: `attention(query, key, value, *arguments)`, with its gradients or without."""
    *tensors, grad_output = inputs

    def forward() -> None:
        with torch.no_grad():
            attention(*tensors, *arguments)

    def both() -> None:
        torch.autograd.grad(attention(*tensors, *arguments), tensors, grad_output)

    return forward if direction == "forward" else both


# ---------------------------------------------------------------------------------------------------------------------
# Correctness: relative errors of norms


def exact_attention(query, key, value, pattern: Pattern, rows: torch.Tensor) -> torch.Tensor:
    """Output [B, I, H, D] of the queries [B, I, H, D] at the positions `rows` [I], as one dense masked softmax."""
    keys = torch.arange(key.shape[1])
    seen = pattern.visible(0, rows[:, None], keys) & (keys <= rows[:, None])
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * SCALE
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, value)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def gradient_error(pattern: Pattern, dtype: torch.dtype, length: int = 700) -> float:
    """The largest error of outputs and gradients against float64, at a length that fits no block."""
    *tensors, grad_output = make_inputs(length, dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    actual, exact = sparse(*tensors, pattern), exact_attention(*wide, pattern, torch.arange(length))
    pairs = [(actual.detach(), exact.detach())]
    pairs += zip(
        torch.autograd.grad(actual, tensors, grad_output), torch.autograd.grad(exact, wide, grad_output.double())
    )
    return max(relative_error(*pair) for pair in pairs)


def output_error(pattern: Pattern, inputs: list[torch.Tensor]) -> float:
    """The error of 64 queries against float64."""
    query, key, value, _ = (tensor.detach() for tensor in inputs)
    rows = torch.randint(query.shape[1], (64,), generator=torch.Generator().manual_seed(1))
    exact = exact_attention(query[:, rows].double(), key.double(), value.double(), pattern, rows)
    return relative_error(sparse(query, key, value, pattern)[:, rows], exact)


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def against_dense(bench: Benchmark, length: int, rounds: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs, name = make_inputs(length, dtype), str(dtype).removeprefix("torch.")
        correct = {pattern: is_correct(bench, f"{pattern}, {name}", PATTERNS[pattern], inputs) for pattern in PATTERNS}
        for direction in ("forward", BOTH):
            calls = {"dense": contender(direction, dense, inputs)}
            calls |= {p: contender(direction, sparse, inputs, PATTERNS[p]) for p, right in correct.items() if right}
            times = bench.times(calls, rounds)
            for pattern in list(calls)[1:]:
                goal = GOALS.get((pattern, name, direction), (None, None)) if length == GOAL_LENGTH else (None, None)
                case = f"{pattern}, {name}, {direction}"
                bench.add(case, times[pattern], times["dense"], peer_name="dense SDPA", must=goal[0], stretch=goal[1])


def is_correct(bench: Benchmark, case: str, pattern: Pattern, inputs: list[torch.Tensor]) -> bool:
    error = max(gradient_error(pattern, inputs[0].dtype), output_error(pattern, inputs))
    return bench.holds(case, error < (1e-5 if inputs[0].dtype == torch.float32 else 2e-2), f"error {error:.1e}")


def other_peers(bench: Benchmark, length: int) -> None:
    inputs = make_inputs(length, torch.float32)
    query, key, value = (tensor.detach().transpose(1, 2) for tensor in inputs[:3])
    for name, pattern in PATTERNS.items():
        if not is_correct(bench, name, pattern, inputs):
            continue
        seen = VisibleKeys(pattern, HEADS, causal=True, batch_size=1, query_length=length, key_length=length)
        mask, compiled = seen.block_mask(query.device), torch.compile(flex_attention, dynamic=False)
        calls = {
            "ours": contender("forward", sparse, inputs, pattern),
            "flex": lambda mask=mask, run=compiled: run(query, key, value, block_mask=mask, scale=SCALE),
        }
        with torch.no_grad():
            times = bench.times(calls, rounds=3)
        must = 1.0 if name == "local" else None
        bench.add(f"{name}, forward", times["ours"], times["flex"], peer_name="FlexAttention", must=must)
        torch._dynamo.reset()
    for direction in ("forward", BOTH):
        calls = {
            "ours": contender(direction, sparse, inputs, PATTERNS["local"]),
            "peer": contender(direction, local_attention(), inputs),
        }
        times = bench.times(calls)
        bench.add(f"local, {direction}", times["ours"], times["peer"], peer_name="local-attention")


def local_attention() -> Callable:
    from local_attention import LocalAttention

    attention = LocalAttention(
        STRIDE, causal=True, look_backward=1, exact_windowsize=True, use_rotary_pos_emb=False, scale=SCALE
    )
    return lambda *tensors: attention(*(tensor.transpose(1, 2) for tensor in tensors)).transpose(1, 2)


def short_sequences(bench: Benchmark, batch: int) -> None:
    inputs = make_inputs(1024, torch.float32, batch)
    for direction in ("forward", BOTH):
        calls = {"dense": contender(direction, dense, inputs)}
        for name, pattern in PATTERNS.items():
            if is_correct(bench, name, pattern, inputs):
                calls[name] = contender(direction, sparse, inputs, pattern)
        times = bench.times(calls)
        for name in list(calls)[1:]:
            bench.add(f"{name}, {direction}", times[name], times["dense"], peer_name="dense SDPA", must=1.0)


def relative_bias(bench: Benchmark, length: int) -> None:
    """As models call it: position queries of their own, relative keys of the distances that are met."""
    *tensors, grad_output = make_inputs(length, torch.float32)
    position_query = tensors[0].detach().clone().requires_grad_()

    def biased(query, position_query, key, value, relative_key, pattern):
        distances = distances_met(pattern, length)
        where = {"scale": SCALE, "q_offset": 0}
        return relative_attention(query, position_query, key, value, relative_key, distances, pattern, **where)

    for name in ("local", "strided merged"):
        pattern = PATTERNS[name]
        relative_key = torch.randn(HEADS, len(distances_met(pattern, length)), DIM, requires_grad=True)
        inputs = [tensors[0], position_query, *tensors[1:], relative_key, grad_output]
        error = relative_score_error(pattern)
        if not bench.holds(name, error < 1e-5, f"error {error:.1e}"):
            continue
        for direction in ("forward", BOTH):
            calls = {
                "with": contender(direction, biased, inputs, pattern),
                "without": contender(direction, sparse, [*tensors, grad_output], pattern),
            }
            times = bench.times(calls)
            goals = {"must": 1 / 2, "stretch": 1 / 1.1}
            bench.add(f"{name}, {direction}", times["with"], times["without"], peer_name="without bias", **goals)


def relative_score_error(pattern: Pattern, length: int = 300) -> float:
    """The largest error of outputs and gradients with relative scores against float64, densely by their definition."""
    *tensors, grad_output = make_inputs(length, torch.float32)
    distances = distances_met(pattern, length)
    generator = torch.Generator().manual_seed(2)
    tensors.append(torch.randn(HEADS, len(distances), DIM, generator=generator).requires_grad_())
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]

    def exact(query, key, value, relative_key):
        distance = torch.arange(length)[:, None] - torch.arange(length)
        seen = pattern.visible(0, torch.arange(length)[:, None], torch.arange(length)) & (distance >= 0)
        of_distance = relative_key[:, rows_by_distance(distances, distance)]
        scores = torch.einsum("bihd,bjhd->bhij", query, key) + torch.einsum("bihd,hijd->bhij", query, of_distance)
        weights = (scores * SCALE).masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", weights, value)

    query, key, value, relative_key = tensors
    where = {"scale": SCALE, "q_offset": 0}
    results = relative_attention(query, query, key, value, relative_key, distances, pattern, **where), exact(*wide)
    pairs = [tuple(result.detach() for result in results)]
    pairs += zip(
        torch.autograd.grad(results[0], tensors, grad_output),
        torch.autograd.grad(results[1], wide, grad_output.double()),
        strict=True,
    )
    return max(relative_error(actual, right) for actual, right in pairs)


def memory(bench: Benchmark, length: int) -> None:
    for name in PATTERNS:
        for direction, goal in MEMORY_GOALS.items():
            with system_allocator(), multiprocessing.get_context("spawn").Pool(1) as pool:
                used = pool.apply(peak_memory, (name, direction, length))
            bench.add(f"{name}, {direction}", used, goal, peer_name="goal", unit="KiB", must=1.0)


def peak_memory(name: str, direction: str, length: int) -> float:
    """KiB a token that one call needs at its peak; run in a fresh process."""
    contender(direction, sparse, make_inputs(2048, torch.float32), PATTERNS[name])()  # libraries, threads
    call = contender(direction, sparse, make_inputs(length, torch.float32), PATTERNS[name])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    call()
    return (status("VmHWM") - before) / length


def status(field: str) -> int:
    """A field of /proc/self/status in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def training_step(bench: Benchmark, length: int, rounds: int) -> None:
    mixed = [Strided(STRIDE).to_dict(), Local(STRIDE).to_dict()]
    ours = sparse_transformer(length, mixed, "block_sparse")
    twin = sparse_transformer(length, mixed, "sdpa")
    peer = sparse_transformer(length, [{"type": "full"}], "sdpa")
    small = torch.randint(256, (1, 300))
    errors = [step(model, small) for model in (ours, twin)]
    error = relative_error(errors[0], errors[1].double())
    if bench.holds(f"{length:,} tokens", error < 1e-4, f"error {error:.1e}"):
        ids = torch.randint(256, (1, length))
        times = bench.times({"ours": lambda: step(ours, ids), "dense": lambda: step(peer, ids)}, rounds)
        bench.add(f"{length:,} tokens", times["ours"], times["dense"], peer_name="dense, sdpa")


def sparse_transformer(length: int, patterns: list[dict], implementation: str) -> SparseTransformerForCausalLM:
    torch.manual_seed(0)
    config = SparseTransformerConfig(
        vocab_size=256, hidden_size=256, num_hidden_layers=12, num_attention_heads=HEADS,
        position_shape=[length // STRIDE, STRIDE], attention_patterns=patterns,
    )  # fmt: skip
    model = SparseTransformerForCausalLM._from_config(config, attn_implementation=implementation)
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)  # the paper's 0 would hide every gradient behind it
    return model


def step(model: SparseTransformerForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The gradients of a training step, in a row."""
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def main() -> int:
    bench = Benchmark(
        "Attention under a pattern on the CPU", __doc__, SECTIONS, {"--threads": {"type": int, "default": 2}}
    )
    if not bench.cpu_time:
        torch.set_num_threads(bench.args.threads)
    quick = bench.quick
    runs: dict[str, Callable[[], None]] = {
        "4,096 tokens": lambda: against_dense(bench, 1024 if quick else 4096, 2 if quick else 7),
        "16,384 tokens": lambda: against_dense(bench, 2048 if quick else GOAL_LENGTH, 2 if quick else 15),
        "65,536 tokens": lambda: against_dense(bench, 4096 if quick else 65_536, 1),
        "other peers": lambda: other_peers(bench, 1024 if quick else GOAL_LENGTH),
        "short sequences": lambda: short_sequences(bench, 4 if quick else 32),
        "relative bias": lambda: relative_bias(bench, 1024 if quick else 4096),
        "memory": lambda: memory(bench, 8192 if quick else 65_536),
        "training step": lambda: [
            training_step(bench, n, rounds) for n, rounds in ([(384, 2)] if quick else [(3072, 5), (12_288, 2)])
        ],
    }
    for section, note in SECTIONS.items():
        if bench.start(section, note):
            runs[section]()
    return bench.finish()


if __name__ == "__main__":
    under_allocator()
    sys.exit(main())
