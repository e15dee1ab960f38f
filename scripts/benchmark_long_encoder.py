"""Long encoders on the CPU beside stock Longformer and BigBird of the same weights.

    python scripts/benchmark_long_encoder.py --json benchmarks/long_encoder.json --page benchmarks/long_encoder.md

The stock models become ours by `hf_tfamily.conversion`, which is first checked, outputs and gradients. `--only` runs
some sections and keeps the rows of the others in FILE; `--quick` takes short rows.
"""

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from benchmark_attention import BOTH, relative_error
from benchmark_stock import in_fresh_process, peak_of
from benchmarking import ALLOCATOR_NOTE, Benchmark, under_allocator
from transformers import BigBirdConfig, BigBirdModel, LongformerConfig, LongformerModel, PreTrainedModel

from hf_tfamily.conversion import convert
from hf_tfamily.modeling.modeling_long_encoder import LongEncoderModel

OPTIONS = {"--threads": {"type": int, "default": 2}}
LENGTHS, MEMORY_LENGTHS = (4096, 16_384), (4096, 8192, 16_384)
SIZES = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
WINDOW, BLOCK = 512, 64
OF_ALL = "2 layers of width 256, 4 heads of 64, intermediate 1,024, float32, one row. "
SECTIONS = {
    "Longformer": f"{OF_ALL}Windows of {WINDOW}, the first token global. {ALLOCATOR_NOTE}",
    "BigBird": f"{OF_ALL}Blocks of {BLOCK}, 3 random ones for each, the first and the last global; stock in training "
    f"mode (without dropout), since it draws no random blocks otherwise. {ALLOCATOR_NOTE}",
    "memory": "Peak memory of forward and backward beyond weights and gradients, each in a process of its own, under "
    "the system's allocator. The peer is the stock model. Linear is what doubles with the length.",
}


# ---------------------------------------------------------------------------------------------------------------------
# Models


def longformer(length: int, **sizes) -> LongformerModel:
    config = LongformerConfig(**{**SIZES, **sizes}, attention_window=WINDOW, max_position_embeddings=length + 2)
    return seeded(LongformerModel, config).eval()


def big_bird(length: int, **sizes) -> BigBirdModel:
    config = BigBirdConfig(**{**SIZES, **sizes}, block_size=BLOCK, max_position_embeddings=length)
    return seeded(BigBirdModel, config).train()


def seeded(model_class: type, config) -> PreTrainedModel:
    torch.manual_seed(0)
    return model_class(config)


MODELS = {"Longformer": longformer, "BigBird": big_bird}


def ours_of(stock: PreTrainedModel) -> LongEncoderModel:
    with tempfile.TemporaryDirectory() as home:
        stock.save_pretrained(Path(home) / "stock")
        convert(Path(home) / "stock", Path(home) / "ours")
        return LongEncoderModel.from_pretrained(Path(home) / "ours").train(stock.training)


def inputs_of(name: str, length: int) -> dict[str, torch.Tensor]:
    """One row of tokens, none of which pads."""
    ids = torch.randint(5, SIZES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "BigBird":
        return inputs
    is_global = torch.zeros_like(ids)
    is_global[:, 0] = 1
    return {**inputs, "global_attention_mask": is_global}


def forward(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def step(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    model.zero_grad()
    model(**inputs)[0].pow(3).mean().backward()  # the square of what a norm gave hardly changes


CALLS = {"forward": forward, BOTH: step}


def is_correct(bench: Benchmark, name: str, stock: PreTrainedModel, ours: LongEncoderModel, length: int) -> bool:
    """Outputs, and the gradient of all weights that both have as they are."""
    inputs, found = inputs_of(name, length), []
    for model in (stock, ours):
        step(model, inputs)
        gradients = [layer.flatten() for layer in feed_forward_gradients(model)]
        found.append((forward(model, inputs), torch.cat(gradients)))
    error = max(relative_error(mine, theirs.double()) for theirs, mine in zip(*found))
    return bench.holds(f"{name}, {length:,} tokens", error < 1e-4, f"error {error:.1e}")


def feed_forward_gradients(model: PreTrainedModel) -> list[torch.Tensor]:
    """Of the first linear layer of every feed-forward network, which depend on everything above."""
    names = (".intermediate.dense.weight", ".mlp.up_proj.weight")
    return [parameter.grad for name, parameter in model.named_parameters() if name.endswith(names)]


# ---------------------------------------------------------------------------------------------------------------------


def speed(bench: Benchmark, name: str, lengths: tuple[int, ...]) -> None:
    for length in lengths:
        stock = MODELS[name](length)
        ours = ours_of(stock)
        if not is_correct(bench, name, stock, ours, length):
            continue
        inputs = inputs_of(name, length)
        for what, call in CALLS.items():
            times = bench.times({"ours": partial(call, ours, inputs), "stock": partial(call, stock, inputs)}, 3)
            bench.add(f"{length:,} tokens, {what}", times["ours"], times["stock"], peer_name=f"stock {name}", must=3)


def memory(bench: Benchmark, lengths: tuple[int, ...]) -> None:
    for name in MODELS:
        for length in lengths:
            used = [in_fresh_process(peak_of_step, name, is_ours, length) for is_ours in (True, False)]
            bench.add(f"{name}, {length:,} tokens", *used, peer_name=f"stock {name}", unit="MiB")


def peak_of_step(name: str, is_ours: bool, length: int) -> float:
    stock = MODELS[name](length)
    model = ours_of(stock) if is_ours else stock
    step(model, inputs_of(name, min(length, 1024)))  # libraries, threads, gradients
    return peak_of(partial(step, model, inputs_of(name, length)))


def main() -> int:
    bench = Benchmark("Long encoders on the CPU", __doc__, SECTIONS, OPTIONS)
    torch.set_num_threads(1 if bench.cpu_time else bench.args.threads)
    lengths, of_memory = ((1536,), (1536, 2048)) if bench.quick else (LENGTHS, MEMORY_LENGTHS)
    runs: dict[str, Callable[[], None]] = {
        "Longformer": lambda: speed(bench, "Longformer", lengths),
        "BigBird": lambda: speed(bench, "BigBird", lengths),
        "memory": lambda: memory(bench, of_memory),
    }
    for section, note in SECTIONS.items():
        if bench.start(section, note):
            runs[section]()
    return bench.finish()


if __name__ == "__main__":
    under_allocator()
    sys.exit(main())
