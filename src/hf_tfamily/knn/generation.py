"""`generate()` with neighbours: a logits processor that reads the key of the last token as it passes through the model.

Shapes: B rows (rows times beams under beam search), V ids, E width.
"""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from .datastore import Datastore
from .evaluation import K
from .interpolation import check_lambda, check_temperature, interpolate, knn_log_distribution
from .search import NPROBE
from .states import StateRecorder, check_model


class KNNLogitsProcessor(LogitsProcessor):
    """Mixes the neighbours' votes into each next token (Khandelwal et al. 2019, equation 3).

        with KNNLogitsProcessor(model, store, lmbda=0.25, temperature=10.0) as memory:
            model.generate(prompt, logits_processor=[memory])

    Greedy, sampling and beam search, with or without a cache, and batches padded on the left. Out come
    log-probabilities; temperature, top_k and top_p of `generate` then work on the mixture. A token that an earlier
    processor has forbidden stays forbidden.

    Assisted generation and `guidance_scale` run the model several times for a token, or for several tokens at once, and
    are refused.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: Datastore,
        tokenizer: PreTrainedTokenizerBase | None = None,
        lmbda: float = 0.25,
        temperature: float = 1.0,
        k: int | None = None,
        nprobe: int = NPROBE,
    ):
        """
        Args:
            model: of which the store is.
            tokenizer: checked against the store's, if given.
            lmbda, temperature: as `evaluate` found them, say.
            k: neighbours of each token [default: 1,024, or as many as the store has].
            nprobe: lists of an "ivfpq" index that each token reads.

        Raises:
            ValueError: for a store of another model or tokenizer, k beyond the store, lambda outside [0, 1], a
                temperature that is not above 0.
        """
        check_model(model)
        check_lambda(lmbda)
        check_temperature(temperature)
        self.k = min(K, len(store)) if k is None else k
        store.check_k(self.k)
        store.check(model, tokenizer)
        self.store, self.lmbda, self.temperature, self.nprobe = store, lmbda, temperature, nprobe
        self.recorder = StateRecorder(model, store.description["keys"])
        self.length: int | None = None  # of the rows that it was last called with

    def __enter__(self) -> "KNNLogitsProcessor":
        self.recorder.__enter__()
        self.length = None
        return self

    def __exit__(self, *error) -> None:
        self.recorder.__exit__(*error)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """[B, T] ids, [B, V] scores -> [B, V] log-probabilities."""
        self._check_forwards(input_ids)
        queries = self.recorder.states(len(scores))[:, -1]  # [B, E]
        if not queries.isfinite().all():
            raise ValueError(f"Hidden states at {self.recorder.name} are not finite (NaN or infinite).")
        self.recorder.forget()
        followers, distances = self.store.search(queries, self.k, self.nprobe)
        log_knn = knn_log_distribution(followers, distances, scores.shape[-1], self.temperature).to(scores.device)
        mixed = interpolate(log_knn, scores.double().log_softmax(dim=-1), self.lmbda)
        return mixed.masked_fill(scores == -torch.inf, -torch.inf).to(scores.dtype)

    def _check_forwards(self, input_ids: torch.LongTensor) -> None:
        """Is the last state that of the last token? The prompt alone may come in several forward passes."""
        forwards, length = self.recorder.forwards, input_ids.shape[1]
        if not self.recorder.hooks:
            raise ValueError(
                "Generate inside `with KNNLogitsProcessor(...) as memory:`, where it sees the model's keys."
            )
        goes_on = self.length is not None and length == self.length + 1
        several = len(forwards) > 1 and (goes_on or sum(forwards) > length)
        if not forwards or several:
            raise ValueError(
                f"For one token the model ran {len(forwards)} times, so that its state cannot be told: neighbours work "
                "with greedy, sampling and beam search, and neither with assisted generation nor with guidance_scale."
            )
        self.length = length


@torch.inference_mode()
def continue_texts(
    model: PreTrainedModel,
    store: Datastore,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    new_tokens: int,
    greedy: bool = False,
    **options,
) -> list[str]:
    """Each prompt and how the model goes on with it; `options` are those of KNNLogitsProcessor."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(model.device)
    arguments = {"max_new_tokens": new_tokens, "do_sample": not greedy, "pad_token_id": tokenizer.pad_token_id}
    names = ("input_ids", "attention_mask")
    with KNNLogitsProcessor(model, store, tokenizer, **options) as memory:
        ids = model.generate(**{name: inputs[name] for name in names}, logits_processor=[memory], **arguments)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)
