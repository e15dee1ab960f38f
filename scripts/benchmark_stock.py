"""What windows cost stock models on the CPU: time and memory under block_sparse, sdpa and eager, with the same weights.

    python scripts/benchmark_stock.py --json benchmarks/stock.json --page benchmarks/stock.md

Each model is first held to the same model under eager, outputs and gradients, at a length that fits no block. `--only`
runs some sections and keeps the rows of the others in FILE; `--quick` takes short rows.
"""

import gc
import multiprocessing
import sys
from collections.abc import Callable
from functools import partial

import torch
from benchmark_attention import BOTH, relative_error, status
from benchmarking import ALLOCATOR_NOTE, Benchmark, system_allocator, under_allocator
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_tfamily  # noqa: F401  registers block_sparse

WINDOW, LAYERS, SINK_WINDOW = 512, 12, 128
MOST_KEPT = 8192  # tokens
OPTIONS = {
    "--threads": {"type": int, "default": 2},
    "--lengths": {
        "type": int,
        "nargs": "+",
        "default": [4096, 16_384],
        "help": "tokens of a row; goals are the last's",
    },
}
TEXT = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "pad_token_id": 0,
}
OF_SIX = ["sliding_attention"] * 5 + ["full_attention"]
SECTIONS = {
    "attention": "One layer's attention: 8 query heads of 64, 2 key heads, window 512, float32; the peer is sdpa with "
    f"the mask that Transformers makes for it. {ALLOCATOR_NOTE}",
    "attention's memory": "Peak memory of one call beyond query, key and value, each in a process of its own, under "
    "the system's allocator.",
    "Mistral": "12 layers, width 512, 8 heads of 64, 2 key heads, intermediate 1,408, vocabulary 8,192, window 512 in "
    "every layer; float32, one row; steps of more than 8,192 tokens with gradient checkpointing. The goal is 0.9 of "
    "what the share of attention in the peer's time allows, if attention alone were as much faster as it is by itself. "
    f"{ALLOCATOR_NOTE}",
    "Gemma 3": "The same sizes, 5 layers with a window of 512 to 1 that sees all; the goal is 10 % within what the one "
    "full layer in six allows.",
    "memory of a step": "Peak memory of a whole training step beyond weights, each in a process of its own, under the "
    "system's allocator. What the other layers keep for the backward is in both.",
    "gpt-oss": "One layer's attention with learned sinks, window 128, 8 query heads of 64, 2 key heads: peak memory of "
    "forward and backward beyond the layer's input. Its only stock way on a CPU is eager.",
}


# ---------------------------------------------------------------------------------------------------------------------
# Models


def mistral(implementation: str, **changes) -> PreTrainedModel:
    config = MistralConfig(**{**TEXT, "intermediate_size": 1408, "sliding_window": WINDOW, **changes})
    return made(MistralForCausalLM, config, implementation)


def gemma3(implementation: str, **changes) -> PreTrainedModel:
    sizes = {**TEXT, "intermediate_size": 1408, "sliding_window": WINDOW, "layer_types": OF_SIX * (LAYERS // 6)}
    return made(Gemma3ForCausalLM, Gemma3TextConfig(**{**sizes, **changes}), implementation)


def gpt_oss(implementation: str, **changes) -> PreTrainedModel:
    sizes = {**TEXT, "num_hidden_layers": 1, "intermediate_size": 64, "num_local_experts": 2, "num_experts_per_tok": 1}
    sizes |= {"sliding_window": SINK_WINDOW, "layer_types": ["sliding_attention"]}
    return made(GptOssForCausalLM, GptOssConfig(**{**sizes, **changes}), implementation)


def made(model_class: type, config, implementation: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return model_class._from_config(config, attn_implementation=implementation)


MODELS = {"Mistral": mistral, "Gemma 3": gemma3, "gpt-oss": gpt_oss}


def step(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """A training step; longer rows than the machine could keep the layers of are checkpointed."""
    model.train()
    if ids.shape[1] > MOST_KEPT:
        model.gradient_checkpointing_enable()
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def prefill(model: PreTrainedModel, ids: torch.Tensor) -> None:
    model.eval()
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, logits_to_keep=1)


def is_correct(bench: Benchmark, name: str, length: int = 700, window: int = 60) -> bool:
    """Logits and all gradients against eager, in two layers with a window much shorter than the row."""
    kinds = {} if name == "Mistral" else {"layer_types": OF_SIX[-2:]}
    small = {"num_hidden_layers": 2, "sliding_window": window, **kinds}
    ours, twin = MODELS[name]("block_sparse", **small), MODELS[name]("eager", **small)
    ids = torch.randint(1, TEXT["vocab_size"], (1, length), generator=torch.Generator().manual_seed(1))
    found = []
    for model in (ours, twin):
        step(model, ids)
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        with torch.no_grad():
            found.append((model(input_ids=ids, use_cache=False).logits, torch.cat(gradients)))
    error = max(relative_error(*pair) for pair in zip(*found))
    return bench.holds(name, error < 1e-5, f"error {error:.1e}")


# ---------------------------------------------------------------------------------------------------------------------
# One layer's attention


def attention_call(implementation: str, length: int, direction: str) -> Callable[[], None]:
    """A call of what the backend computes in one layer, with the mask that Transformers hands to it."""
    model = mistral(implementation, num_hidden_layers=1, vocab_size=8)
    layer = model.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, heads, length, 64, generator=generator).requires_grad_() for heads in (8, 2, 2)]
    grad_output = torch.randn(1, length, 8, 64, generator=generator)
    mask = mask_of(model, length)

    def call():
        attention = ALL_ATTENTION_FUNCTIONS[implementation]
        return attention(layer, *tensors, mask, scaling=layer.scaling, sliding_window=WINDOW)[0]

    def forward() -> None:
        with torch.no_grad():
            call()

    return forward if direction == "forward" else lambda: torch.autograd.grad(call(), tensors, grad_output)


def mask_of(model: PreTrainedModel, length: int):
    """What the model hands to its first layer as attention_mask."""
    seen = []
    attention = model.model.layers[0].self_attn
    handle = attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        model.model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    handle.remove()
    return seen[0]


def attention(bench: Benchmark, lengths: list[int]) -> None:
    for length in lengths if is_correct(bench, "Mistral") else ():
        for direction in ("forward", BOTH):
            calls = {name: attention_call(name, length, direction) for name in ("block_sparse", "sdpa")}
            times = bench.times(calls, 3)
            must = 15 if length == lengths[-1] else None
            case = f"{length:,} tokens, {direction}"
            bench.add(case, times["block_sparse"], times["sdpa"], peer_name="sdpa", must=must)


def attention_memory(bench: Benchmark, length: int) -> None:
    for direction in ("forward", BOTH):
        used = [in_fresh_process(peak_of_attention, name, length, direction) for name in ("block_sparse", "sdpa")]
        bench.add(f"{length:,} tokens, {direction}", *used, peer_name="sdpa", unit="MiB", must=8)


# ---------------------------------------------------------------------------------------------------------------------
# Whole models


def whole_model(bench: Benchmark, name: str, lengths: list[int]) -> None:
    """Training step and prefill, and what the share of attention in the peer's time allows."""
    if not is_correct(bench, name):
        return
    models = {implementation: MODELS[name](implementation) for implementation in ("block_sparse", "sdpa", "eager")}
    for length in lengths:
        ids = torch.randint(1, TEXT["vocab_size"], (1, length), generator=torch.Generator().manual_seed(2))
        for what, direction, run in (("step", BOTH, step), ("prefill", "forward", prefill)):
            # Eager's weights of all layers together, or of one long row, are more than the machine holds.
            peers = ("sdpa", "eager") if length == lengths[0] != lengths[-1] and run is prefill else ("sdpa",)
            for key in ("block_sparse", *peers):
                run(models[key], ids[:, :300])  # libraries, threads
            calls = {key: partial(run, models[key], ids) for key in ("block_sparse", *peers)}
            times = bench.times(calls, 1 if length == lengths[-1] else 3)
            share, allowed = what_attention_allows(bench, name, length, direction, times["sdpa"].median)
            case = f"{length:,} tokens, {what}; windows are {share:.0%} of sdpa's time, which allows {allowed:.3g}"
            must = round(0.9 * allowed, 2) if length == lengths[-1] else None
            for peer in peers:
                bench.add(case, times["block_sparse"], times[peer], peer_name=peer, must=must)


def what_attention_allows(
    bench: Benchmark, name: str, length: int, direction: str, whole: float
) -> tuple[float, float]:
    """The share of windowed attention in the peer's milliseconds, and how many times faster a whole call can be."""
    kinds = ["forward", BOTH] if direction == BOTH and length > MOST_KEPT else [direction]  # checkpoints attend again
    calls = {(key, kind): attention_call(key, length, kind) for key in ("block_sparse", "sdpa") for kind in kinds}
    times = bench.times(calls, 3)
    windows = LAYERS if name == "Mistral" else LAYERS - LAYERS // 6
    ours, peer = (windows * sum(times[key, kind].median for kind in kinds) for key in ("block_sparse", "sdpa"))
    share = min(peer / whole, 1.0)
    return share, 1 / (1 - share + ours / whole)


def step_memory(bench: Benchmark, length: int) -> None:
    for name in ("Mistral", "Gemma 3"):
        used = [in_fresh_process(peak_of_step, name, key, length) for key in ("block_sparse", "sdpa")]
        bench.add(f"{name}, {length:,} tokens", *used, peer_name="sdpa", unit="MiB")


def gpt_oss_memory(bench: Benchmark, length: int) -> None:
    if is_correct(bench, "gpt-oss"):
        used = [in_fresh_process(peak_of_sinks, key, length) for key in ("block_sparse", "eager")]
        bench.add(f"{length:,} tokens, {BOTH}", *used, peer_name="eager", unit="MiB", must=20)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def in_fresh_process(function: Callable[..., float], *arguments) -> float:
    with system_allocator(), multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_of(call: Callable[[], object]) -> float:
    """MiB that a call needs at its peak beyond what is there before it."""
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = status("VmRSS")
    call()
    return max(status("VmHWM") - before, 1) / 1024


def peak_of_attention(implementation: str, length: int, direction: str) -> float:
    attention_call(implementation, 600, direction)()  # libraries, threads
    return peak_of(attention_call(implementation, length, direction))


def peak_of_step(name: str, implementation: str, length: int) -> float:
    model = MODELS[name](implementation)
    step(model, torch.randint(1, TEXT["vocab_size"], (1, 600)))  # libraries, threads, gradients
    return peak_of(partial(step, model, torch.randint(1, TEXT["vocab_size"], (1, length))))


def peak_of_sinks(implementation: str, length: int) -> float:
    model = gpt_oss(implementation, vocab_size=8)
    layer = model.model.layers[0].self_attn

    def both(length: int) -> Callable[[], object]:
        states = torch.randn(1, length, TEXT["hidden_size"]).requires_grad_()
        position_embeddings = model.model.rotary_emb(states, torch.arange(length)[None])
        mask = mask_of(model, length)
        return lambda: layer(states, attention_mask=mask, position_embeddings=position_embeddings)[0].sum().backward()

    both(600)()
    return peak_of(both(length))


def main() -> int:
    bench = Benchmark("Windows of stock models on the CPU", __doc__, SECTIONS, OPTIONS)
    torch.set_num_threads(1 if bench.cpu_time else bench.args.threads)
    lengths, long, of_sinks = bench.args.lengths, 16_384, 8192
    if bench.quick:
        lengths, long, of_sinks = [600, 1200], 1200, 1200
    runs: dict[str, Callable[[], None]] = {
        "attention": lambda: attention(bench, lengths),
        "attention's memory": lambda: attention_memory(bench, long),
        "Mistral": lambda: whole_model(bench, "Mistral", lengths),
        "Gemma 3": lambda: whole_model(bench, "Gemma 3", lengths),
        "memory of a step": lambda: step_memory(bench, long),
        "gpt-oss": lambda: gpt_oss_memory(bench, of_sinks),
    }
    for section, note in SECTIONS.items():
        if bench.start(section, note):
            runs[section]()
    return bench.finish()


if __name__ == "__main__":
    under_allocator()
    sys.exit(main())
