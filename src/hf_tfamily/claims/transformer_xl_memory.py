"""Transformer-XL's memory, against the same model that remembers one token."""

from ..reproduction import Claim, compare, of_recipe

MEMORY, NONE = "memory of 128", "memory of 1"
RECIPE, COMMON = "transformer_xl/bible", ("data.eval_limit=65536",)
VARIANTS = {MEMORY: ("model.mem_len=128",), NONE: ("model.mem_len=1",)}

CLAIM = Claim(
    system="Transformer-XL",
    paper="Dai et al. 2019, arXiv:1901.02860, section 4.2",
    statement="a memory of earlier segments lowers the loss at the same parameters and tokens",
    papers_figure="WikiText-103, 128M parameters: perplexity 26.77 with recurrence, 29.02 without",
    experiment="The recipe `transformer_xl/bible`, segments of 64 bytes, with a memory of 128 places in every layer "
    "and with one of a single place; parameters, relative positions, order of the data and steps are the same.",
    criterion="with every seed the memory of 128 has fewer bits per byte than the memory of 1 with any.",
    variants=tuple(VARIANTS),
    figures={"bits": "held-out bits per byte"},
    measure=of_recipe(RECIPE, VARIANTS, {"bits": "bits_per_byte"}, COMMON),
    judge=lambda results: compare(results, "bits", MEMORY, NONE),
)
