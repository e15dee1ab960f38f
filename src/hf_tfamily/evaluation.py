"""Bits per dimension: how many bits a model spends on each value of held-out data.

Shapes: B examples in a batch, N values in an example, V token ids.
"""

import math

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .data import NextTokenCollator
from .stream_evaluation import relative_effective_context_length as relative_effective_context_length


@torch.inference_mode()
def bits_per_dim(model: PreTrainedModel, dataset, batch_size: int = 32, progress: bool = False) -> float:
    """Mean over all values of `dataset` of -log2 p(value | start, values before it).

    Args:
        model: a causal model; it is put in evaluation mode and stays where it is.
        dataset: examples with `input_ids` [start, x0 ... x(N-1)], all of one length.
        batch_size: the result does not depend on it: sums are taken in float64 and divided once.
    """
    model.eval()
    batches = DataLoader(dataset, batch_size=batch_size, collate_fn=NextTokenCollator())
    nats, values = 0.0, 0
    for batch in tqdm(batches, desc="Evaluating", disable=not progress, leave=False):
        targets = batch["shift_labels"].to(model.device)  # [B, N]
        logits = model(input_ids=batch["input_ids"].to(model.device), use_cache=False).logits  # [B, N, V]
        losses = cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        nats += losses.double().sum().item()
        values += targets.numel()
    return nats / values / math.log(2)
