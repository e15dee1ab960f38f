"""How well a model reads on: the loss of each token of a text, given the memory of what was before or so much context.

Losses are -log p in nats. Shapes: B streams or windows, T tokens in a segment, n tokens.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .data.streams import IGNORED, SegmentCollator, StreamDataset
from .modeling.cache_patterns import PatternCache


def has_memory(model: PreTrainedModel) -> bool:
    """Does the model itself remember segments (Transformer-XL and its relatives)?"""
    return hasattr(model.config, "mem_len")


def has_rolling_cache(model: PreTrainedModel) -> bool:
    """Is it a rotary decoder whose layers all see a window, so that its key/value cache may roll on for ever?"""
    patterns = getattr(model.config, "attention_patterns", None)
    rotary = getattr(model.config, "rope_parameters", None) is not None
    rotary = rotary and not getattr(model, "scores_distances", False)  # of keys that are forgotten, too
    return rotary and isinstance(patterns, dict) and patterns.get("type") == "local"


def empty_past(model: PreTrainedModel) -> Cache | None:
    """What a stream begins with; None where the model makes it."""
    return PatternCache.from_config(model.config) if has_rolling_cache(model) else None


def with_attention_length(model: PreTrainedModel, attention_length: int, segment_length: int) -> PreTrainedModel:
    """A copy of the model in which each query sees `attention_length` keys, itself included.

    Of a Compressive Transformer, the short memory is chosen so that it and the compressed one hold so many slots; of a
    Memorizing Transformer, the short memory has so many, and the store what is older.
    Distances that Transformer-XL never met in training, in segments of `segment_length`, count as the largest that it
    met, unless config.clamp_len says otherwise (Dai et al. 2019, arXiv:1901.02860, evaluate so too).
    """
    config = model.config
    if hasattr(config, "compressed_mem_len"):
        if attention_length <= config.compressed_mem_len:
            raise ValueError(
                f"attention_length={attention_length} must be above the {config.compressed_mem_len} slots of the "
                "compressed memory (compressed_mem_len), which stay."
            )
        changes = {"mem_len": attention_length - config.compressed_mem_len}
    elif has_memory(model):
        clamp_len = config.clamp_len or config.mem_len + segment_length - 1
        same_length = not hasattr(config, "memory_size")  # what is older is in the store, and nothing between
        changes = {"mem_len": attention_length, "same_length": same_length, "clamp_len": clamp_len}
    elif getattr(config, "rope_parameters", None) is not None and hasattr(config, "attention_patterns"):
        changes = {"attention_patterns": {"type": "local", "window": attention_length}}
    else:
        raise ValueError(
            f"A {config.model_type} has no attention length to choose: it sees its window. Models with a memory have "
            "one, and rotary decoders."
        )
    changed = type(model)._from_config(type(config).from_dict({**config.to_dict(), **changes}))
    changed.load_state_dict(model.state_dict())
    return changed.to(device=model.device, dtype=model.dtype).eval()


@torch.inference_mode()
def stream_losses(
    model: PreTrainedModel,
    ids: np.ndarray,
    length: int,
    start_id: int,
    num_streams: int = 1,
    progress: bool = False,
) -> np.ndarray:
    """The loss of every token of a text, read in segments of `length` tokens, [n].

    A model with a memory, or a rolling cache, sees through it what came before a segment; others see their segment
    alone. The text is read as `num_streams` streams at once, each of which begins with nothing before it.
    """
    model.eval()
    segments = StreamDataset(ids, num_streams, length, start_id)
    batches = DataLoader(segments, batch_size=num_streams, collate_fn=SegmentCollator())
    carries = has_memory(model) or has_rolling_cache(model)
    past, losses = empty_past(model), []
    for batch in tqdm(batches, desc="Evaluating", unit="segment", disable=not progress, leave=False):
        outputs = model(input_ids=batch["input_ids"].to(model.device), past_key_values=past, use_cache=carries)
        past = outputs.past_key_values if carries else None
        losses.append(_token_losses(outputs.logits, batch["labels"].to(model.device)))
    by_stream = torch.cat(losses, dim=1)[:, : segments.stream_length]
    return by_stream.flatten()[: len(ids)].double().cpu().numpy()


def losses_by_position(losses: np.ndarray, length: int, num_streams: int = 1) -> np.ndarray:
    """The mean loss at each position of a segment, [length], of what `stream_losses` returned for these arguments."""
    stream_length = -(-len(losses) // num_streams)
    positions = np.arange(len(losses)) % stream_length % length
    counts = np.bincount(positions, minlength=length)
    return np.bincount(positions, weights=losses, minlength=length) / np.maximum(counts, 1)


@torch.inference_mode()
def context_losses(
    model: PreTrainedModel,
    ids: np.ndarray,
    positions: np.ndarray,
    context: int,
    length: int,
    batch_size: int = 32,
    progress: bool = False,
) -> np.ndarray:
    """The loss of ids[position] given the `context` tokens before it and nothing else, for each of `positions`.

    A model with a memory reads the context in segments of `length`, the first of which is short; others in one piece,
    or as much of it as they have positions for.
    """
    if context < 1 or positions.min() < context:
        raise ValueError(f"context must be from 1 to the {positions.min()} tokens before each position, got {context}.")
    model.eval()
    pieces = _pieces(model, context, length)
    losses = []
    batches = np.array_split(positions, -(-len(positions) // batch_size))
    for batch in tqdm(batches, desc=f"Context {context}", disable=not progress, leave=False):
        windows = ids[batch[:, None] + np.arange(-sum(pieces), 1)].astype(np.int64)  # [B, context + 1]
        windows = torch.from_numpy(windows).to(model.device)
        past = None
        for piece in windows[:, :-1].split(pieces, dim=1):
            outputs = model(input_ids=piece, past_key_values=past, use_cache=has_memory(model), logits_to_keep=1)
            past = outputs.past_key_values if has_memory(model) else None
        losses.append(_token_losses(outputs.logits, windows[:, -1:])[:, 0])
    return torch.cat(losses).double().cpu().numpy()


def _pieces(model: PreTrainedModel, context: int, length: int) -> list[int]:
    """Lengths of the pieces in which a context is read."""
    if not has_memory(model):
        return [min(context, getattr(model.config, "max_position_embeddings", None) or context)]
    return [context % length] * (context % length > 0) + [length] * (context // length)


def _token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[B, T, ids], [B, T] -> [B, T]"""
    return cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")


def relative_effective_context_length(
    models: Mapping[str, PreTrainedModel],
    text: str | bytes | Sequence[int] | np.ndarray,
    r: float = 0.1,
    step: int = 100,
    longest: int = 1000,
    num_positions: int = 1000,
    length: int = 128,
    batch_size: int = 32,
    threshold: float = 0.01,
    progress: bool = False,
) -> dict[str, int]:
    """How much context each of a group of models can make use of (Dai et al. 2019, arXiv:1901.02860, section 4.3).

    The gain of a longer context is measured against the best of the models at the shorter one, so that no model looks
    good because it is bad without context.

    Args:
        models: the group, by name.
        text: token ids, or text of which UTF-8 bytes are the ids.
        r: the share of positions that count, those where the best model does worst at the shorter context.
        step: by how many tokens contexts grow, and the shortest.
        longest: the longest context that is tried.
        num_positions: number of positions in the text, evenly spaced.
        length: tokens in a segment, for models that read in segments.
        threshold: the relative gain in perplexity that a longer context must bring.

    Returns:
        For each model the context beyond which another `step` tokens no longer bring it the gain.
    """
    ids = np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8) if _is_text(text) else text
    ids = np.asarray(ids)
    if not 1 <= step <= longest < len(ids):
        raise ValueError(f"step={step}, longest={longest} and the {len(ids)} tokens of the text must be in this order.")
    if not 0 < r <= 1:
        raise ValueError(f"r must be above 0 and at most 1, got {r}.")
    positions = np.unique(np.linspace(longest, len(ids) - 1, num_positions).astype(int))

    @functools.cache
    def losses(context: int) -> np.ndarray:
        """[models, positions]"""
        arguments = (ids, positions, context, length, batch_size, progress)
        return np.stack([context_losses(model, *arguments) for model in models.values()])

    contexts = range(step, longest + 1, step)
    return {name: _effective_context(losses, model, contexts, r, threshold) for model, name in enumerate(models)}


def _effective_context(
    losses: Callable[[int], np.ndarray], model: int, contexts: Sequence[int], r: float, threshold: float
) -> int:
    """The algorithm of Dai et al. 2019, appendix C, for one model of the group."""
    for shorter, longer in zip(contexts, contexts[1:]):
        if relative_gain(losses(shorter), losses(longer)[model], r) < threshold:
            return shorter
    return contexts[-1]


def relative_gain(shorter: np.ndarray, longer: np.ndarray, r: float) -> float:
    """By how much a longer context lowers perplexity below that of the best model at the shorter one.

    Args:
        shorter: losses of all models with the shorter context, [models, positions].
        longer: losses of one model with the longer context, [positions].
        r: the share of positions that count, the hardest ones.
    """
    baseline = shorter.min(axis=0)
    hardest = np.argsort(-baseline, kind="stable")[: max(1, round(r * len(baseline)))]
    relative_loss = np.minimum(baseline, longer)[hardest].mean()  # f(c, c')
    return 1.0 - float(np.exp(relative_loss - baseline[hardest].mean()))  # g(c, c')


def _is_text(text) -> bool:
    return isinstance(text, (str, bytes))
