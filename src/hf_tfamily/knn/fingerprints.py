"""Is it the same model, is it the same tokenizer? What a datastore remembers of both.

Of a model: its class, its config but for bookkeeping, and of each weight its name, shape, type, the sum of its bits
(which any single change alters) and some of its values. Of a tokenizer: its vocabulary, and what it makes of a sample.
"""

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Fields of a config that say nothing about what is computed.
BOOKKEEPING = {
    *("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache", "auto_map"),
    *("output_hidden_states", "output_attentions", "return_dict", "id2label", "label2id", "quantization_config"),
    *("chunk_size_feed_forward", "chunk_size_lm_head", "_attn_implementation", "attn_implementation"),
}
SAMPLED = 64  # values of each weight
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PROBE = "The quick brown fox, 3.14 \u00e9\u4e2d\u6587\n\tdef f(x): return x  # jumps\r\n"


def model_fingerprint(model: PreTrainedModel) -> dict[str, str]:
    """{"class", "dtype", "sha256"}"""
    fields = {name: value for name, value in model.config.to_diff_dict().items() if name not in BOOKKEEPING}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(_bits_of(weight.detach()).tobytes())
    return {"class": type(model).__name__, "dtype": str(model.dtype), "sha256": digest.hexdigest()}


def _bits_of(weight: torch.Tensor):
    """The sum of a weight's bits and some of its values, as integers [1 + SAMPLED at most]."""
    flat = weight.contiguous().flatten().view(INTEGERS[weight.element_size()])
    some = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].long()
    return torch.cat([flat.sum(dtype=torch.int64)[None], some]).cpu().numpy()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any] | None:
    """{"class", "ids", "sha256"}; None without a tokenizer."""
    if tokenizer is None:
        return None
    vocabulary = sorted(tokenizer.get_vocab().items())
    probe = tokenizer(PROBE)["input_ids"]
    digest = hashlib.sha256(json.dumps([vocabulary, probe]).encode()).hexdigest()
    return {"class": type(tokenizer).__name__, "ids": len(tokenizer), "sha256": digest}


def in_words(fingerprint: dict[str, Any]) -> str:
    """Such as "LlamaForCausalLM (torch.float32, 1a2b3c4d5e6f)"."""
    kind, *others = fingerprint.values()
    return f"{kind} ({', '.join(str(other)[:14] for other in others)})"


def check_same(kept: dict[str, Any] | None, here: dict[str, Any] | None, what: str, where: str) -> None:
    """Raise ValueError, naming both, if what is `here` is not what a store remembers; unknown ones are not compared."""
    if kept is None or here is None or kept["sha256"] == here["sha256"]:
        return
    raise ValueError(
        f"{where} belongs to another {what}: {in_words(kept)}, and this is {in_words(here)}. Its neighbours would mean "
        f"nothing here; build a store of this {what}'s own."
    )
