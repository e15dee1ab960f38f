"""What a larger store gives a Memorizing Transformer: of all bytes, and of names that the text had long before."""

import re
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM

from .. import plots
from ..data import load_data
from ..recipes import load_recipe
from ..reproduction import Claim, Figures, Finding, Results, Verdict, Workspace
from ..stream_evaluation import stream_losses

RECIPE, TRAINED = "memorizing_transformer/bible", 2048
SIZES = {f"store of {size:,}": size for size in (0, 512, 2048, 8192)}
WITHOUT = "trained without a store"
STREAMS, STREAM_BYTES = 4, 16384  # of held-out text
NAME = re.compile(rb"(?<=[a-z,;:] )[A-Z][a-z]{2,}")  # a capitalised word within a sentence
KINDS = {"names": 1, "new_names": 2, "other": 3}


def kinds_of(text: bytes, stream_bytes: int, near: int) -> np.ndarray:
    """[bytes], which of KINDS each byte is.

    Args:
        stream_bytes: streams begin at its multiples, and know nothing of each other.
        near: how far back a query sees without a store. A name that occurred within it is among the other bytes.
    """
    kinds, last = np.full(len(text), KINDS["other"]), {}
    for match in NAME.finditer(text):
        start, stream = match.start(), match.start() // stream_bytes
        before = last.get((stream, match[0]))
        last[stream, match[0]] = start
        if before is None:
            kinds[start : match.end()] = KINDS["new_names"]
        elif start - before > near:
            kinds[start : match.end()] = KINDS["names"]
    return kinds


def measure(variant: str, seed: int, workspace: Workspace) -> Figures:
    changes = ["data.eval_limit=32768", *(["model.memory_size=0"] if variant == WITHOUT else [])]
    folder = workspace.train(RECIPE, changes, seed)
    model = AutoModelForCausalLM.from_pretrained(folder, memory_size=SIZES.get(variant, 0))
    recipe = load_recipe(RECIPE)
    data, length = load_data(recipe.data), recipe.data["length"]
    stream_bytes = 4096 if workspace.quick else STREAM_BYTES
    ids = data.eval[: STREAMS * stream_bytes]
    bits = stream_losses(model, ids, length, data.start_id, STREAMS) / np.log(2)
    kinds = kinds_of(ids.astype(np.uint8).tobytes(), stream_bytes, recipe.model["mem_len"] + length)
    return {"bits": float(bits.mean()), **{kind: float(bits[kinds == n].mean()) for kind, n in KINDS.items()}}


def judge(results: Results) -> Finding:
    """By the means over seeds, since all sizes of one seed are read by the same weights."""
    means = {figure: [results.mean(size, figure) for size in SIZES] for figure in ("bits", "names", "other")}
    falls = all(larger < smaller for smaller, larger in zip(means["bits"], means["bits"][1:]))
    gains = {figure: bits[0] - bits[-1] for figure, bits in means.items()}
    words = (
        f"from no store to the largest, bits per byte go from {means['bits'][0]:.3f} to {means['bits'][-1]:.3f}, those "
        f"of names from long ago from {means['names'][0]:.3f} to {means['names'][-1]:.3f}; a model trained without a "
        f"store has {results.mean(WITHOUT, 'bits'):.3f} and {results.mean(WITHOUT, 'names'):.3f}"
    )
    if falls and gains["names"] > gains["other"]:
        return Finding(Verdict.FOUND, words)
    return Finding(Verdict.OTHER if gains["bits"] < 0 else Verdict.NOT_FOUND, words)


def draw(results: Results, axes: Any) -> None:
    for figure, words, colour in (("bits", "all bytes", plots.BLUE), ("names", "names from long ago", plots.ORANGE)):
        means = [results.mean(size, figure) for size in SIZES]
        axes.plot(range(len(SIZES)), means, "o-", color=colour, label=words)
        axes.axhline(results.mean(WITHOUT, figure), color=colour, linestyle="--", linewidth=1)
    axes.set_xticks(range(len(SIZES)), [f"{size:,}" for size in SIZES.values()])
    axes.set(xlabel="bytes in the store (dashed: trained without one)", ylabel="bits per byte")
    axes.legend()


CLAIM = Claim(
    system="Memorizing Transformer",
    paper="Wu et al. 2022, arXiv:2203.08913, section 4",
    statement="perplexity falls as the store grows, also beyond the size of training, and names gain most",
    papers_figure="perplexity falls up to a store of 262,144 tokens; the single figures are not quoted here",
    experiment=f"The recipe `memorizing_transformer/bible`, trained with a store of {TRAINED:,} bytes for 400 steps, "
    f"reads {STREAMS} streams of {STREAM_BYTES:,} held-out bytes with other stores and the same weights; beside it one "
    "that was trained without a store. A name is a capitalised word within a sentence; from long ago, if the stream "
    "had it before what a query sees without a store.",
    criterion="in the mean over seeds each larger store has fewer bits per byte than the one before, and names from "
    "long ago gain more than bytes that are no names.",
    variants=(*SIZES, WITHOUT),
    figures={
        "bits": "bits per byte",
        "names": "names from long ago",
        "new_names": "new names",
        "other": "other bytes",
    },
    measure=measure,
    judge=judge,
    draw=draw,
)
