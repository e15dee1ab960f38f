"""Attention sinks: a window alone ruins a language model, a window and the first keys hardly do."""

import math
from functools import cache

import torch
from torch.nn.functional import cross_entropy

from ..modeling.attention_patterns import Full, Local, Sink, Union
from ..reproduction import Claim, Figures, Finding, Results, Verdict, Workspace
from ..reproduction.trained_weights import excerpts, installed_weights, load
from ..stock_models import set_attention_patterns

DENSE, WINDOW, SINKS = "all keys", "a window of 256", "a window of 252 and 4 sinks"
PATTERNS = {DENSE: Full(), WINDOW: Local(256), SINKS: Union([Local(252), Sink(4)])}
EXCERPTS, LENGTH, AFTER = 3, 2048, 512
HARM = 1.25  # times the perplexity with all keys


@cache
def weights():
    """Of SmolLM2, loaded once for all measurements."""
    return load(installed_weights())


@torch.inference_mode()
def measure(variant: str, seed: int, workspace: Workspace) -> Figures:
    """The perplexity of the excerpt whose number is the seed."""
    model, tokenizer = weights()
    length, after = (160, 80) if workspace.quick else (LENGTH, AFTER)
    ids = list(excerpts(tokenizer, EXCERPTS, length))[seed]
    set_attention_patterns(model, PATTERNS[variant])
    losses = cross_entropy(model(ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="none")
    return {"perplexity": math.exp(float(losses[after - 1 :].mean()))}


def judge(results: Results) -> Finding:
    """Found if sinks repair, text by text, what a window spoils."""
    perplexities = [results.values(variant, "perplexity") for variant in PATTERNS]
    worse = [window / dense for dense, window, _ in zip(*perplexities)]
    repaired = [sinks / dense for dense, _, sinks in zip(*perplexities)]
    words = (
        f"the window alone has {min(worse):.2f} to {max(worse):.2f} times the perplexity of all keys, with sinks "
        f"{min(repaired):.2f} to {max(repaired):.2f} times"
    )
    if max(repaired) < HARM < min(worse):
        return Finding(Verdict.FOUND, words)
    return Finding(Verdict.OTHER if min(repaired) > max(worse) else Verdict.NOT_FOUND, words)


CLAIM = Claim(
    system="Attention sinks",
    paper="Xiao et al. 2023, arXiv:2309.17453, section 3, table 1",
    statement="a window ruins a model that was trained to see everything, and a window with the first four keys does "
    "not",
    papers_figure="Llama-2-13B on PG19, windows of 1,024: perplexity 5,158 alone, 5.40 with four sinks, about as with "
    "all keys",
    experiment=f"SmolLM2-135M, a Llama that others trained, reads {EXCERPTS} excerpts of {LENGTH:,} tokens of the King "
    f"James Bible; what follows token {AFTER} counts. An excerpt stands for a seed.",
    criterion=f"in every excerpt the window alone has more than {HARM} times the perplexity of all keys, and the "
    "window with sinks less than that.",
    variants=tuple(PATTERNS),
    figures={"perplexity": "perplexity per token"},
    measure=measure,
    judge=judge,
    seeds=tuple(range(EXCERPTS)),
    needs=("gguf",),  # and the package of the weights, which is found without being imported
)
