"""Compressive Transformer against Transformer-XL with as many slots of memory."""

from ..reproduction import Claim, Figures, Workspace, compare

OURS, PEER = "Compressive: 64 slots and 32 compressed", "Transformer-XL: 96 slots"
RUNS = {
    OURS: ("compressive_transformer/bible", ()),
    PEER: ("transformer_xl/bible", ("model.mem_len=96",)),
}


def measure(variant: str, seed: int, workspace: Workspace) -> Figures:
    recipe, changes = RUNS[variant]
    return {"bits": workspace.metrics(recipe, [*changes, "data.eval_limit=65536"], seed)["bits_per_byte"]}


CLAIM = Claim(
    system="Compressive Transformer",
    paper="Rae et al. 2019, arXiv:1911.05507, section 5",
    statement="compressed memories do better than a Transformer-XL that attends to as many slots",
    papers_figure="WikiText-103: perplexity 17.1 against 18.1; enwik8: 0.97 against 0.98 bits per character",
    experiment="The recipes `compressive_transformer/bible` (64 slots, and 32 that stand for 128 more bytes, by mean "
    "pooling, which learns nothing, so that parameters are the same) and `transformer_xl/bible` with 96 slots.",
    criterion="with every seed the compressed memory has fewer bits per byte than the plain one with any.",
    variants=tuple(RUNS),
    figures={"bits": "held-out bits per byte"},
    measure=measure,
    judge=lambda results: compare(results, "bits", OURS, PEER),
)
