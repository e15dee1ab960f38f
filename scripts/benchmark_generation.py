"""Sampling on the CPU: `generate()` under our caches, and stock models of the same size under theirs.

    python scripts/benchmark_generation.py --json benchmarks/generation.json --page benchmarks/generation.md

Each model is first held to itself: greedy tokens with its cache are those without. `--only` runs some sections and
keeps the rows of the others in FILE; `--quick` takes few tokens.
"""

import sys
from collections.abc import Callable

import torch
from benchmarking import ALLOCATOR_NOTE, Benchmark, under_allocator
from transformers import (
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from hf_tfamily import (
    SparseTransformerConfig,
    SparseTransformerForCausalLM,
    TransformerXLConfig,
    TransformerXLForCausalLM,
)

LAYERS, WIDTH, HEADS, BATCH, IDS = 8, 256, 4, 8, 257
MEMORY = 512  # tokens
GOAL_AT = 3072  # tokens
OPTIONS = {
    "--threads": {"type": int, "default": 2},
    "--lengths": {"type": int, "nargs": "+", "default": [1024, GOAL_AT], "help": "tokens that `pictures` samples"},
}
SIZES = {"vocab_size": IDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
GATED = {"intermediate_size": 8 * WIDTH // 3}  # three matrices, so narrower for the same size
PATTERNS = [{"type": "strided", "stride": 96}] + [{"type": "local", "window": 96}] * 3
CACHES = ("dynamic", "static")
SECTIONS = {
    "pictures": "A Sparse Transformer with the patterns of the CIFAR-10 recipe (stride and window 96), "
    f"{LAYERS} layers of {WIDTH}, {BATCH} rows, float32; its peers see all earlier tokens, under the faster of their "
    f"caches. {ALLOCATOR_NOTE}",
    "memory": f"Transformer-XL with mem_len {MEMORY}, the same sizes; its peer is a Mistral whose window, and so its "
    f"cache, is as long. {ALLOCATOR_NOTE}",
    "profile": "Where a step of the Sparse Transformer goes: operators by themselves as torch.profiler sees them, and "
    "what is left of the step, Python and the calls of operators. Ratios are shares.",
    "bytes": "What the caches of `pictures` and `memory` hold after the last token.",
}


def sparse_transformer(length: int) -> PreTrainedModel:
    config = SparseTransformerConfig(
        **SIZES, position_shape=[-(-(length + 1) // 96), 32, 3], attention_patterns=PATTERNS
    )
    model = SparseTransformerForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)  # 0 at first, so that all ids would be alike
    return model


def transformer_xl(length: int) -> PreTrainedModel:
    return TransformerXLForCausalLM(TransformerXLConfig(**SIZES, mem_len=MEMORY, same_length=True))


def image_gpt(length: int) -> PreTrainedModel:
    names = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": length + 1}
    return ImageGPTForCausalImageModeling(ImageGPTConfig(vocab_size=IDS, **names))


def llama(length: int) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **GATED, max_position_embeddings=length + 1))


def mistral(length: int) -> PreTrainedModel:
    config = MistralConfig(**SIZES, **GATED, num_key_value_heads=HEADS, sliding_window=MEMORY)
    return MistralForCausalLM(config)


def made(make: Callable[[int], PreTrainedModel], length: int) -> PreTrainedModel:
    torch.manual_seed(0)
    return make(length).eval()


def generated(model: PreTrainedModel, length: int, cache: str | None = None, **options):
    """`length` new tokens of BATCH rows, greedy, none of which ends a row."""
    start = torch.full((BATCH, 1), IDS - 1)
    options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(start, cache_implementation=cache, return_dict_in_generate=True, **options)


def is_correct(bench: Benchmark, name: str, model: PreTrainedModel, length: int = 40) -> bool:
    """Greedy tokens with the cache are those without."""
    with_cache, without = (generated(model, length, use_cache=use).sequences for use in (True, False))
    return bench.holds(name, torch.equal(with_cache, without), "tokens differ")


def best_cache(bench: Benchmark, model: PreTrainedModel, length: int) -> str:
    """Which of the stock caches is faster."""
    tried = {name: (lambda name=name: generated(model, length, name)) for name in CACHES}
    times = bench.times(tried, 1)
    return min(CACHES, key=lambda name: times[name].median)


def nbytes(cache) -> int:
    """Of all tensors that a cache or its layers hold."""
    tensors = {}
    for part in (cache, *cache.layers):
        for value in vars(part).values():
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, torch.Tensor):
                    tensors[tensor.untyped_storage().data_ptr()] = tensor.nbytes
    return sum(tensors.values())


OPERATORS = {
    "matrix products": ("aten::addmm", "aten::mm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::scaled_dot_product_attention"),
    "writing and reading caches": (
        "aten::cat",
        "aten::copy_",
        "aten::index_select",
        "aten::gather",
        "aten::index_put_",
    ),
}


def profile(bench: Benchmark, length: int) -> None:
    """Milliseconds of a step by kinds of operators, beside those of a whole step."""
    model = made(sparse_transformer, length)
    times = bench.times({"step": lambda: generated(model, length)}, 3)
    step = times["step"].median / length
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        generated(model, length)
    spent = {entry.key: entry.self_cpu_time_total / 1e3 / length for entry in profiler.key_averages()}
    found = {kind: sum(spent.pop(name, 0.0) for name in names) for kind, names in OPERATORS.items()}
    found["other operators"] = sum(ms for name, ms in spent.items() if name.startswith("aten::"))
    found["Python, and calling operators"] = max(step - sum(found.values()), 0.0)
    for kind, ms in found.items():
        bench.add(f"a step's {kind}", step, ms, peer_name="part")


class Contest:
    """Our model and its peers at one length: times, and bytes of the caches that they leave."""

    def __init__(self, bench: Benchmark, ours: Callable, peers: dict[str, Callable], length: int):
        self.bench, self.length = bench, length
        self.models = {"ours": made(ours, length)} | {name: made(make, length) for name, make in peers.items()}
        self.right = all([is_correct(bench, name, model) for name, model in self.models.items()])
        short = min(length, 200)
        self.caches = {n: None if n == "ours" else best_cache(bench, m, short) for n, m in self.models.items()}
        self.bytes: dict[str, int] = {}

    def sample(self, name: str) -> None:
        found = generated(self.models[name], self.length, self.caches[name])
        self.bytes[name] = nbytes(found.past_key_values)

    def run(self, must: float | None) -> None:
        if not self.right:
            return
        times = self.bench.times({name: (lambda name=name: self.sample(name)) for name in self.models}, 1)
        speed = {name: BATCH * self.length / time.median * 1e3 for name, time in times.items()}
        for peer in list(self.models)[1:]:
            case = f"{self.length:,} tokens, {speed['ours']:,.0f} and {speed[peer]:,.0f} tokens/s"
            case += f" ({self.caches[peer]} cache)"
            self.bench.add(case, times["ours"], times[peer], peer_name=peer, must=must)


def contests(bench: Benchmark, lengths: list[int], memory_length: int) -> list[tuple[str, Contest, float | None]]:
    stock = {"Llama": llama, "ImageGPT": image_gpt}
    found = [("pictures", sparse_transformer, stock, length, 5.0 if length >= GOAL_AT else None) for length in lengths]
    found.append(("memory", transformer_xl, {"Mistral": mistral}, memory_length, 1.5))
    return [(section, Contest(bench, ours, peers, n), must) for section, ours, peers, n, must in found]


def main() -> int:
    bench = Benchmark("Sampling on the CPU", __doc__, SECTIONS, OPTIONS)
    torch.set_num_threads(1 if bench.cpu_time else bench.args.threads)
    all_of_them = contests(bench, [48, 96] if bench.quick else bench.args.lengths, 48 if bench.quick else 1024)
    for section in ("pictures", "memory"):
        if bench.start(section, SECTIONS[section]):
            for _, contest, must in (entry for entry in all_of_them if entry[0] == section):
                contest.run(must)
    if bench.start("profile", SECTIONS["profile"]):
        profile(bench, 48 if bench.quick else 400)
    if bench.start("bytes", SECTIONS["bytes"]):
        for section, contest, _ in all_of_them:
            for peer in list(contest.bytes)[1:]:
                ours, theirs = (contest.bytes[name] / 2**20 for name in ("ours", peer))
                bench.add(f"{section}, {contest.length:,} tokens", ours, theirs, peer_name=peer, unit="MiB")
    return bench.finish()


if __name__ == "__main__":
    under_allocator()
    sys.exit(main())
