"""Transformer-XL's memory, against the same model that remembers one token."""

from ..reproduction import Claim, Finding, Results, compare, of_recipe

SEGMENTS = {16: 128, 64: 32}  # bytes of a segment, and rows of a batch: as many tokens in a step
MEMORIES = (128, 1)
RECIPE, COMMON = "transformer_xl/bible", ("data.eval_limit=65536",)


def name_of(length: int, memory: int) -> str:
    return f"segments of {length}, memory of {memory}"


VARIANTS = {
    name_of(length, memory): (
        f"model.mem_len={memory}",
        f"data.length={length}",
        f"training.per_device_train_batch_size={rows}",
    )
    for length, rows in SEGMENTS.items()
    for memory in MEMORIES
}


def judge(results: Results) -> Finding:
    """By the short segments; the long ones are told beside them."""
    short, long = (
        compare(results, "bits", *(name_of(length, memory) for memory in MEMORIES)) for length in sorted(SEGMENTS)
    )
    return Finding(short.verdict, f"{short.words}. With segments of 64 it is {long.verdict}: {long.words}")


CLAIM = Claim(
    system="Transformer-XL",
    paper="Dai et al. 2019, arXiv:1901.02860, section 4.2",
    statement="a memory of earlier segments lowers the loss at the same parameters and tokens",
    papers_figure="WikiText-103, 128M parameters: perplexity 26.77 with recurrence, 29.02 without",
    experiment="The recipe `transformer_xl/bible` with segments of 16 bytes, and of 64 as it stands, as many bytes in "
    "a step, with a memory of 128 places in every layer and with one of a single place. Parameters, relative "
    "positions, order of the data and steps are the same.",
    criterion="with segments of 16, which are mostly read with little before them, every seed with the memory of 128 "
    "has fewer bits per byte than any with the memory of 1; segments of 64 stand beside.",
    variants=tuple(VARIANTS),
    figures={"bits": "held-out bits per byte"},
    measure=of_recipe(RECIPE, VARIANTS, {"bits": "bits_per_byte"}, COMMON),
    judge=judge,
)
