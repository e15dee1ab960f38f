"""What warm-up and the scale of the embeddings are worth to a Transformer with norms behind its sums."""

from ..reproduction import Claim, Finding, Results, all_of, compare, of_recipe

PAPERS, NO_WARMUP, NO_SCALE = "as in the paper", "no warm-up", "embeddings not scaled"
VARIANTS = {
    PAPERS: ("training.warmup_steps=150",),
    NO_WARMUP: ("training.warmup_steps=0",),
    NO_SCALE: ("training.warmup_steps=150", "model.scale_embedding=false"),
}
COMMON = ("model.norm_first=false", "training.weight_decay=0", "data.eval_limit=65536")


def judge(results: Results) -> Finding:
    return all_of(*(compare(results, "bits", PAPERS, other) for other in (NO_WARMUP, NO_SCALE)))


CLAIM = Claim(
    system="Transformer",
    paper="Vaswani et al. 2017, arXiv:1706.03762, sections 3.4 and 5.3",
    statement="warming up the learning rate and multiplying embeddings by the square root of their width serve "
    "training",
    papers_figure="none: the paper does both and measures neither",
    experiment="The recipe `vanilla_transformer/bible` with the paper's norms behind the sums, 600 steps at a learning "
    "rate of 2e-3: as in the paper, without warm-up, and without the scale.",
    criterion="with every seed the paper's way has fewer bits per byte than either of the others with any.",
    variants=tuple(VARIANTS),
    figures={"bits": "held-out bits per byte"},
    measure=of_recipe("vanilla_transformer/bible", VARIANTS, {"bits": "bits_per_byte"}, COMMON),
    judge=judge,
)
