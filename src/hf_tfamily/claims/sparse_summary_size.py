"""How many summary places the fixed pattern needs."""

from ..reproduction import Claim, compare, of_recipe
from .sparse_patterns_text import COMMON

SIZES = (1, 2, 4)
VARIANTS = {
    f"c = {size}": (f"model.attention_patterns={{type: fixed, block: 16, summary: {size}, sub_blocks: 4}}",)
    for size in SIZES
}
LEAST, MOST = f"c = {SIZES[0]}", f"c = {SIZES[-1]}"

CLAIM = Claim(
    system="Sparse Transformer",
    paper="Child et al. 2019, arXiv:1904.10509, section 4.3",
    statement="more than one summary place in a block serves the fixed pattern",
    papers_figure="none: c = 1 limits the expressivity significantly, c of 8 to 32 in blocks of 128 or 256 does well",
    experiment="The recipe of `sparse_patterns_text`, blocks of 16, with 1, 2 and 4 summary places.",
    criterion="with every seed 4 summary places have fewer bits per byte than one with any.",
    variants=tuple(VARIANTS),
    figures={"bits": "held-out bits per byte"},
    measure=of_recipe("sparse_transformer/bible", VARIANTS, {"bits": "bits_per_dim"}, COMMON),
    judge=lambda results: compare(results, "bits", MOST, LEAST),
)
