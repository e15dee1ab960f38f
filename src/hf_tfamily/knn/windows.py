"""Long texts read in overlapping windows, so that each token is predicted from a stated number of tokens before it.

A document of n tokens has n - 1 predictions: its first token is context alone. A model with a memory (Transformer-XL)
reads each window segment by segment and carries its memory through the window; it is empty where a window begins.
Shapes: B windows, T positions, E width.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..stream_evaluation import has_memory
from .states import StateRecorder

LONGEST_DEFAULT = 1024


@dataclass(frozen=True)
class Window:
    """Some tokens of a document that are read together.

    Attributes:
        document: its number.
        start: its first token that is read.
        length: how many are read.
        first: the first of them behind which a prediction counts.
        entry: number of that prediction among those of all documents.
    """

    document: int
    start: int
    length: int
    first: int
    entry: int

    @property
    def end(self) -> int:
        """Number behind that of its last prediction."""
        return self.entry + self.length - self.first


@dataclass(frozen=True)
class Reading:
    """What windows gave: states before n tokens, the tokens, and their log-probabilities (None if nobody asked)."""

    entry: int
    states: torch.Tensor
    targets: torch.Tensor
    log_probabilities: torch.Tensor | None


def as_documents(tokens, vocab_size: int) -> list[np.ndarray]:
    """Ids [n], rows of ids [rows, n] or a list of documents, each [n], as a list of documents.

    Raises:
        ValueError: if there is nothing to predict, or an id that the model does not have.
    """
    if isinstance(tokens, (torch.Tensor, np.ndarray)):
        tokens = [tokens] if tokens.ndim == 1 else list(tokens)
    elif len(tokens) and np.ndim(tokens[0]) == 0:
        tokens = [tokens]
    documents = [np.asarray(document) for document in tokens]
    if not any(len(document) > 1 for document in documents):
        raise ValueError("The text is empty: a document needs two tokens, of which the second is predicted.")
    for document in documents:
        if document.ndim != 1 or document.dtype.kind not in "iu":
            raise ValueError(f"A document is ids [n], whole numbers, got {document.dtype} {list(document.shape)}.")
        if len(document) and not 0 <= document.min() <= document.max() < vocab_size:
            worst = document.max() if document.max() >= vocab_size else document.min()
            raise ValueError(
                f"The text has the id {worst}, and the model knows 0 to {vocab_size - 1}: it is of another tokenizer."
            )
    return documents


def count_predictions(documents: Sequence[np.ndarray]) -> int:
    return sum(max(0, len(document) - 1) for document in documents)


def default_window(model: PreTrainedModel) -> int:
    """As many tokens as the model has positions for, and at most LONGEST_DEFAULT; of a memory, some segments."""
    if has_memory(model):
        return min(8 * segment_length(model), LONGEST_DEFAULT)
    config = model.config.get_text_config()
    return min(getattr(config, "max_position_embeddings", None) or LONGEST_DEFAULT, LONGEST_DEFAULT)


def check_window(model: PreTrainedModel, window: int, context: int) -> None:
    """Raise ValueError unless windows can overlap by `context` and the model has positions for them."""
    if not 0 <= context < window:
        raise ValueError(f"context must be from 0 to window - 1, got context={context} and window={window}.")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and window > positions and not has_memory(model):
        raise ValueError(f"window must be at most the model's {positions} positions, got {window}.")


def windows_of(documents: Sequence[np.ndarray], window: int, context: int) -> list[Window]:
    """Every prediction once, in order, with at least `context` tokens before it but for the beginning of a document."""
    found, entry = [], 0
    for number, document in enumerate(documents):
        done, inputs = 0, len(document) - 1  # the last token is predicted and never read
        while done < inputs:
            start = max(0, min(done - context, inputs - window))
            length = min(window, inputs - start)
            found.append(Window(number, start, length, done - start, entry))
            entry, done = found[-1].end, start + length
    return found


def batches(windows: Sequence[Window], batch_size: int) -> Iterator[list[Window]]:
    """Consecutive windows of one length, at most `batch_size` at once."""
    batch: list[Window] = []
    for window in windows:
        if batch and (len(batch) == batch_size or window.length != batch[0].length):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


@torch.inference_mode()
def read(
    model: PreTrainedModel,
    recorder: StateRecorder,
    documents: Sequence[np.ndarray],
    batch: Sequence[Window],
    with_logits: bool,
) -> Reading:
    """What the model makes of a batch of windows.

    Raises:
        ValueError: if a state or a probability is not finite.
    """
    rows = [documents[w.document][w.start : w.start + w.length + 1] for w in batch]
    ids = torch.from_numpy(np.stack(rows).astype(np.int64))  # [B, T + 1]
    inputs, targets = ids[:, :-1], ids[:, 1:]
    counted = torch.arange(inputs.shape[1]) >= torch.tensor([[w.first] for w in batch])  # [B, T]
    kept = int(counted.sum(dim=1).max()) if with_logits else 1
    states, logits = _forward(model, recorder, inputs.to(model.device), kept)
    found, targets_counted, log_probabilities = states[counted], targets[counted], None
    if not found.isfinite().all():
        raise ValueError(f"Hidden states at {recorder.name} are not finite (NaN or infinite); the model is broken.")
    if with_logits:
        counted, targets = counted[:, -kept:], targets[:, -kept:]
        losses = cross_entropy(
            logits[counted.to(logits.device)].float(), targets[counted].to(logits.device), reduction="none"
        )
        log_probabilities = -losses.double().cpu()
        if not log_probabilities.isfinite().all():
            raise ValueError("Probabilities of the model are not finite (NaN or infinite); the model is broken.")
    return Reading(batch[0].entry, found, targets_counted, log_probabilities)


def _forward(
    model: PreTrainedModel, recorder: StateRecorder, inputs: torch.Tensor, kept: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """States [B, T, E], and logits [B, kept, V] of the last positions."""
    if has_memory(model):
        states, logits, memory = [], [], None
        for segment in inputs.split(segment_length(model), dim=1):
            outputs = model(input_ids=segment, past_key_values=memory, use_cache=True)
            memory = outputs.past_key_values
            states.append(recorder.states(len(segment)))
            logits.append(outputs.logits)
        return torch.cat(states, dim=1), torch.cat(logits, dim=1)[:, -kept:]
    fewer = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(input_ids=inputs, use_cache=False, **fewer).logits
    if logits.ndim != 3 or len(logits) != len(inputs):
        raise ValueError(f"{type(model).__name__} gives no logits [rows, positions, ids].")
    return recorder.states(len(inputs)), logits[:, -kept:]


def segment_length(model: PreTrainedModel) -> int:
    """Tokens that a model with a memory reads at once: as many as the memory holds."""
    return model.config.mem_len
