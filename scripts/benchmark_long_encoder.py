"""Long encoders on the CPU: stock Longformer and BigBird against the same weights as a long encoder under block_sparse.

    python scripts/benchmark_long_encoder.py --json benchmarks/long_encoder.json --page benchmarks/long_encoder.md

Before it is timed, each model's outputs are held to the stock one's at that length, and at the first its gradients,
too. `--only` runs some sections and keeps the rows of the others in FILE; `--quick` takes short rows and small models.
"""

import sys
import tempfile
from collections.abc import Callable
from functools import partial

import torch
from benchmark_attention import BOTH, relative_error
from benchmark_stock import in_fresh_process, peak_of
from benchmarking import ALLOCATOR_NOTE, Benchmark, under_allocator
from transformers import BigBirdConfig, BigBirdModel, LongformerConfig, LongformerModel, PreTrainedModel

from hf_tfamily import LongEncoderModel
from hf_tfamily.conversion import convert

LENGTHS, MEMORY_LENGTHS = [4096, 16_384], [4096, 8192, 16_384]
TOLERANCE = 1e-4  # of outputs and gradients, relative to their norm
MUST, LINEAR = 3, 0.8
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
REACH = {"attention_window": 512, "block_size": 64, "num_random_blocks": 3}
QUICK = {"sizes": {"hidden_size": 32, "intermediate_size": 64}, "reach": {"attention_window": 64, "block_size": 16}}
OPTIONS = {"--threads": {"type": int, "default": 2}}
SECTIONS = {
    "Longformer": "2 layers, width 256, 4 heads, window 512, the first token global; float32, one row, outputs and "
    f"gradients equal to {TOLERANCE:g}. {ALLOCATOR_NOTE}",
    "BigBird": "The same sizes, blocks of 64, 3 random ones; in training mode without dropout, since in evaluation "
    f"stock BigBird draws no random blocks. {ALLOCATOR_NOTE}",
    "memory": "Peak memory of forward and backward beyond weights, each in a process of its own, under the system's "
    "allocator. Last, ours of a token in the longest row against that in the shortest: 1 is linear.",
}


# ---------------------------------------------------------------------------------------------------------------------
# Models


def longformer(longest: int) -> LongformerModel:
    config = LongformerConfig(
        **SIZES,
        attention_window=REACH["attention_window"],
        max_position_embeddings=longest + 2,  # positions count from pad_token_id + 1
        pad_token_id=1,
        layer_norm_eps=1e-5,
    )
    return LongformerModel(config, add_pooling_layer=False)


def big_bird(longest: int) -> BigBirdModel:
    reach = {name: REACH[name] for name in ("block_size", "num_random_blocks")}
    return BigBirdModel(BigBirdConfig(**SIZES, **reach, max_position_embeddings=longest), add_pooling_layer=False)


MODELS = {"Longformer": longformer, "BigBird": big_bird}


def pair(name: str, longest: int) -> dict[str, PreTrainedModel]:
    """A stock model and the same weights as ours."""
    torch.manual_seed(0)
    stock = MODELS[name](longest).train()
    with tempfile.TemporaryDirectory() as folder:
        stock.save_pretrained(f"{folder}/stock")
        convert(f"{folder}/stock", f"{folder}/ours")
        ours = LongEncoderModel.from_pretrained(f"{folder}/ours", attn_implementation="block_sparse").train()
    return {"ours": ours, "stock": stock}


def batch(name: str, length: int) -> dict[str, torch.Tensor]:
    """One row of random ids; Longformer's first token is global, BigBird's edges are by themselves."""
    ids = torch.randint(5, SIZES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(length))
    if name == "BigBird":
        return {"input_ids": ids}
    first = torch.zeros_like(ids)
    first[:, 0] = 1
    return {"input_ids": ids, "global_attention_mask": first}


def forward(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def both(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    model.zero_grad()
    states = model(**inputs).last_hidden_state
    (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()


def norm_of_gradients(model: PreTrainedModel) -> torch.Tensor:
    return sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None).sqrt()


def is_correct(bench: Benchmark, name: str, models: dict[str, PreTrainedModel], length: int, gradients: bool) -> bool:
    """Outputs at that length, and the norm of all gradients."""
    inputs = batch(name, length)
    errors = [relative_error(*(forward(models[key], inputs) for key in ("ours", "stock")))]
    if gradients:
        for model in models.values():
            both(model, inputs)
        errors.append(relative_error(*(norm_of_gradients(models[key]) for key in ("ours", "stock"))))
    return bench.holds(f"{name}, {length:,} tokens", max(errors) < TOLERANCE, f"error {max(errors):.1e}")


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def times(bench: Benchmark, name: str, lengths: list[int]) -> None:
    models = pair(name, max(lengths))
    for length in lengths:
        if not is_correct(bench, name, models, length, gradients=length == lengths[0]):
            continue
        for direction, run in (("forward", forward), (BOTH, both)):
            calls: dict[str, Callable] = {key: partial(run, models[key], batch(name, length)) for key in models}
            found = bench.times(calls, 3 if length == lengths[0] else 1)
            bench.add(f"{length:,} tokens, {direction}", found["ours"], found["stock"], peer_name="stock", must=MUST)


def memory(bench: Benchmark, lengths: list[int]) -> None:
    for name in MODELS:
        peaks = [peak_alone(bench, name, "ours", length) for length in lengths]
        for length, ours in zip(lengths, peaks):
            stock = peak_alone(bench, name, "stock", length)
            bench.add(f"{name}, {length:,} tokens", ours, stock, peer_name="stock", unit="MiB")
        short, long = (1024 * peaks[place] / lengths[place] for place in (0, -1))
        bench.add(f"{name}, a token of {lengths[-1]:,}", long, short, unit="KiB", must=LINEAR,
                  peer_name=f"ours of {lengths[0]:,}")  # fmt: skip


def peak_alone(bench: Benchmark, name: str, which: str, length: int) -> float:
    """In a process of its own, which takes seconds to start; --quick does without."""
    arguments = (name, which, length, SIZES, REACH)
    return peak_of_both(*arguments) if bench.quick else in_fresh_process(peak_of_both, *arguments)


def peak_of_both(name: str, which: str, length: int, sizes: dict, reach: dict) -> float:
    """MiB of forward and backward at their peak; a new process is told the sizes."""
    SIZES.update(sizes)
    REACH.update(reach)
    model = pair(name, max(length, 2048))[which]
    both(model, batch(name, min(length, 1024)))  # libraries, threads, gradients
    return peak_of(partial(both, model, batch(name, length)))


def main() -> int:
    bench = Benchmark("Long encoders on the CPU", __doc__, SECTIONS, OPTIONS)
    torch.set_num_threads(1 if bench.cpu_time else bench.args.threads)
    lengths, memory_lengths = LENGTHS, MEMORY_LENGTHS
    if bench.quick:
        SIZES.update(QUICK["sizes"])
        REACH.update(QUICK["reach"])
        lengths, memory_lengths = [320, 512], [512, 1024]
    runs: dict[str, Callable[[], None]] = {
        "Longformer": lambda: times(bench, "Longformer", lengths),
        "BigBird": lambda: times(bench, "BigBird", lengths),
        "memory": lambda: memory(bench, memory_lengths),
    }
    for section, note in SECTIONS.items():
        if bench.start(section, note):
            runs[section]()
    return bench.finish()


if __name__ == "__main__":
    under_allocator()
    sys.exit(main())
