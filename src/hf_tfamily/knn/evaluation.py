"""Perplexity with and without neighbours; lambda and the temperature are tuned on one part of a text and reported on
the rest.

Shapes: n tokens, k neighbours of each.
"""

import math
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .building import vocabulary_of
from .datastore import Datastore
from .interpolation import best_lambda, check_lambda, check_temperature, interpolate, knn_log_probabilities
from .progress import progress_bar
from .search import NPROBE
from .states import StateRecorder
from .windows import as_documents, batches, check_window, count_predictions, read, windows_of

K = 1024  # neighbours, as in the paper (section 4.1)
HALVINGS = 12  # temperatures that are tried, each half of the one before


def evaluate(
    model: PreTrainedModel,
    store: Datastore,
    tokens,
    tokenizer: PreTrainedTokenizerBase | None = None,
    k: int | None = None,
    temperature: float | None = None,
    lmbda: float | None = None,
    tuned_on: float = 0.5,
    nprobe: int = NPROBE,
    window: int | None = None,
    context: int | None = None,
    batch_size: int = 4,
    progress: bool = False,
) -> dict[str, Any]:
    """How likely the model finds a text, alone and with its neighbours in `store`.

    Args:
        tokens: as in `build_datastore`; a text that the store has not seen.
        tokenizer: whose ids they are; checked against the store's.
        k: neighbours of each token [default: 1,024, or as many as the store has].
        temperature: distances are divided by it (the paper's is 1) [default: tuned].
        lmbda: the neighbours' share [default: tuned].
        tuned_on: the share of the text, from its beginning, that tunes what is not given; figures are of the rest. Of
            all of it where both are given.
        nprobe: lists of an "ivfpq" index that each token reads.
        window, context: as in `build_datastore` [default: those of the store].

    Returns:
        tokens, perplexity and bits_per_token (the model alone), knn_perplexity and knn_bits_per_token (with the
        neighbours), lmbda, temperature, k, tuned_tokens (0 where nothing was tuned), found: the share of tokens that
        follow at least one of their neighbours.

    Raises:
        ValueError: for a store of another model or tokenizer, a text without two tokens or with too few to tune on, k
            beyond the store, lambda outside [0, 1], a temperature that is not above 0, states that are not finite.
    """
    k = min(K, len(store)) if k is None else k
    store.check_k(k)
    for value, check in ((temperature, check_temperature), (lmbda, check_lambda)):
        if value is not None:
            check(value)
    documents = as_documents(tokens, vocabulary_of(model))
    total = count_predictions(documents)
    tuned = 0 if None not in (temperature, lmbda) else _tuned_tokens(total, tuned_on)
    store.check(model, tokenizer)
    window = store.description["window"] if window is None else window
    context = min(store.description["context"], window - 1) if context is None else context
    check_window(model, window, context)
    model.eval()
    temperatures = None if temperature is None else [temperature]
    by_knn, by_lm = [], []
    with StateRecorder(model, store.description["keys"]) as recorder, progress_bar("Reading", total, 0, progress) as go:
        for batch in batches(windows_of(documents, window, context), batch_size):
            reading = read(model, recorder, documents, batch, with_logits=True)
            followers, distances = store.search(reading.states, k, nprobe)
            if temperatures is None:
                temperatures = _temperatures(distances)
            found = [knn_log_probabilities(followers, distances, reading.targets, each) for each in temperatures]
            by_knn.append(torch.stack(found))
            by_lm.append(reading.log_probabilities)
            go(len(reading.targets))
    return _figures(torch.cat(by_knn, dim=1), torch.cat(by_lm), temperatures, lmbda, tuned) | {"k": k}


def _tuned_tokens(total: int, share: float) -> int:
    if not 0 < share < 1:
        raise ValueError(f"tuned_on must be a share of the text between 0 and 1, got {share}.")
    tuned = int(total * share)
    if not 1 <= tuned < total:
        raise ValueError(
            f"The text has {total} tokens to predict, too few to tune on {share:.0%} of them and report the rest; give "
            "temperature and lambda, or more text."
        )
    return tuned


def _temperatures(distances: torch.Tensor) -> list[float]:
    """From the usual distance of a far neighbour downwards, and the paper's 1."""
    far = distances.masked_fill(distances.isinf(), -1).amax(dim=1)
    usual = float(far.median()) or 1.0
    return [1.0, *(usual / 2**halving for halving in range(HALVINGS))]


def _figures(
    by_knn: torch.Tensor, by_lm: torch.Tensor, temperatures: list[float], lmbda: float | None, tuned: int
) -> dict[str, Any]:
    """by_knn [temperatures, n] and by_lm [n], log-probabilities of tokens."""
    chosen = 0
    if tuned:
        choices = [_best(row[:tuned], by_lm[:tuned], lmbda) for row in by_knn]
        chosen = max(range(len(choices)), key=lambda row: choices[row][1])
        lmbda = choices[chosen][0]
    alone, neighbours = by_lm[tuned:], by_knn[chosen, tuned:]
    nats, knn_nats = -float(alone.mean()), -float(interpolate(neighbours, alone, lmbda).mean())
    return {
        "tokens": len(alone),
        "tuned_tokens": tuned,
        "lmbda": lmbda,
        "temperature": temperatures[chosen],
        "perplexity": math.exp(nats),
        "bits_per_token": nats / math.log(2),
        "knn_perplexity": math.exp(min(knn_nats, 700.0)),
        "knn_bits_per_token": knn_nats / math.log(2),
        "found": float(neighbours.isfinite().double().mean()),
    }


def _best(by_knn: torch.Tensor, by_lm: torch.Tensor, lmbda: float | None) -> tuple[float, float]:
    """lambda, tuned unless it is given, and the mean log-probability under it."""
    if lmbda is None:
        return best_lambda(by_knn, by_lm)
    return lmbda, float(interpolate(by_knn, by_lm, lmbda).mean())
