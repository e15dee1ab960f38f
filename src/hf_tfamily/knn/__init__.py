"""kNN-LM: a memory outside the model (Khandelwal et al. 2019, arXiv:1911.00172), for any causal language model.

A datastore holds, for every token of a text, the model's hidden state before it and the token itself. Later, the tokens
that followed the nearest states vote on the next one, and their distribution is mixed with the model's:

    store = knn.build_datastore(model, ids, "store")
    knn.evaluate(model, store, other_ids)
    with knn.KNNLogitsProcessor(model, store, lmbda=0.25) as memory:
        model.generate(prompt, logits_processor=[memory])

Searching needs faiss: pip install "hf-tfamily[knn]".
"""

from .building import build_datastore
from .datastore import Datastore
from .evaluation import evaluate
from .generation import KNNLogitsProcessor, continue_texts
from .interpolation import interpolate, knn_log_distribution, knn_log_probabilities
from .sources import load_model, read_tokens

__all__ = [
    "Datastore",
    "KNNLogitsProcessor",
    "build_datastore",
    "continue_texts",
    "evaluate",
    "interpolate",
    "knn_log_distribution",
    "knn_log_probabilities",
    "load_model",
    "read_tokens",
]
