"""Recurrent models over ranks: the order of ranks is the order of the sequence, and each hands its memory to the next.

A rank waits for the memory of the one before, reads its slice, and passes its own memory on, without gradients as
between segments (Dai et al. 2019, arXiv:1901.02860, section 3.2). Forward passes so follow each other; backward passes
run at once.

Shapes: B batch, N positions of a row.
"""

import io
from collections.abc import Mapping

import torch
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ..modeling import (
    memory_segments,
    modeling_compressive_transformer,
    modeling_memorizing_transformer,
    modeling_xl_sparse,
)
from ..modeling.causal_lm import IGNORED, next_tokens
from .checks import learns_next_tokens
from .exchange import Wire
from .exchange_plan import Slices

NAME = "memory"  # what the bytes are counted as
# All that a memory is made of beside tensors and numbers: nothing else is built of what another rank sends.
CLASSES = [
    kind
    for module in (
        memory_segments,
        modeling_compressive_transformer,
        modeling_memorizing_transformer,
        modeling_xl_sparse,
    )
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, (Cache, CacheLayerMixin))
]


class MemoryRanks:
    """What `context_parallel` returns for a recurrent model: as one process that reads the slices in a row, each as one
    call, with the memory of the one before.

    Attributes:
        sent: bytes that this rank has sent, by ("memory", "forward").
    """

    def __init__(self, model: PreTrainedModel, group: distributed.ProcessGroup | None):
        name = type(model).__name__
        if not name.endswith(("ForCausalLM", "Model")):
            raise ValueError(
                f"context_parallel: the head of {name} looks at whole rows, of which a rank has a slice; use data "
                "parallelism or FSDP."
            )
        self.model, self.wire = model, Wire(group)
        self.handles: list = []

    @property
    def sent(self):
        return self.wire.sent

    @property
    def rank(self) -> int:
        return self.wire.rank

    def start(self) -> "MemoryRanks":
        if getattr(self.model, "context_parallel", None) is not None:
            raise ValueError("This model is under context_parallel already.")
        self.model.context_parallel = self
        self.handles = [
            self.model.register_forward_pre_hook(self._receive, with_kwargs=True),
            self.model.register_forward_hook(self._hand_on),
        ]
        return self

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()
        del self.model.context_parallel

    def __enter__(self) -> "MemoryRanks":
        return self.start()

    def __exit__(self, *error) -> None:
        self.stop()

    def shard(self, batch: Mapping) -> dict:
        """This rank's slice of a batch that every rank has whole; the mask [B, N] up to its end. See ContextParallel.

        With `segment_length` in the config, slices are of whole segments but for the last.

        Raises:
            ValueError: for tensors that it does not know, and rows that are too short.
        """
        batch = {name: value for name, value in batch.items() if value is not None}
        tokens = batch.get("input_ids", batch.get("inputs_embeds"))
        known = {"input_ids", "inputs_embeds", "attention_mask", "labels", "shift_labels", "num_items_in_batch"}
        unknown = [name for name, value in batch.items() if isinstance(value, Tensor) and name not in known]
        if tokens is None or unknown:
            raise ValueError(f"shard cuts {', '.join(sorted(known))}, got {', '.join(map(str, batch))}.")
        self.wire.check_same(batch)
        targets = next_tokens(batch.pop("labels", None), batch.pop("shift_labels", None))
        if targets is not None and not learns_next_tokens(self.model):
            raise ValueError(f"{type(self.model).__name__} has no loss; leave the labels out.")
        held = self._slice(tokens.shape[1])
        if targets is not None:
            batch.setdefault("num_items_in_batch", (targets != IGNORED).sum())
            batch["labels"] = batch["shift_labels"] = targets[:, held.start : held.stop].contiguous()
        for name in {"input_ids", "inputs_embeds"} & set(batch):
            batch[name] = batch[name][:, held.start : held.stop].contiguous()
        if "attention_mask" in batch:
            batch["attention_mask"] = batch["attention_mask"][:, : held.stop]
        return batch

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Add up the gradients of all ranks, in place; after the last backward pass of a step."""
        self.wire.sum_gradients(self.model)

    def hand_round(self, memory):
        """The last rank's memory on the first rank, to go on with; None on all others. All ranks call it."""
        first, last = 0, self.wire.size - 1
        if self.wire.size == 1:
            return memory
        if self.rank == last:
            self._send(memory, first)
        return self._take(last) if self.rank == first else None

    def _slice(self, length: int) -> range:
        step = self.model.config.segment_length or 1
        segments = -(-length // step)
        if segments < self.wire.size:
            raise ValueError(
                f"Rows of {length} tokens have {segments} segments of {step}, too few for {self.wire.size} ranks; give "
                "longer rows, or use fewer ranks."
            )
        held = Slices(segments, self.wire.size).of(self.rank)
        return range(held.start * step, min(held.stop * step, length))

    def _receive(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.rank and kwargs.get("past_key_values") is not None:
            raise ValueError("Under context_parallel only the first rank begins with a memory; give None on others.")
        if self.rank:
            kwargs = {**kwargs, "past_key_values": self._take(self.rank - 1)}
        return args, {**kwargs, "use_cache": True}

    def _hand_on(self, model: nn.Module, args: tuple, outputs) -> None:
        if self.rank + 1 < self.wire.size:
            self._send(outputs.past_key_values, self.rank + 1)

    def _send(self, memory, rank: int) -> None:
        device = next(self.model.parameters()).device
        held = memory.layers[0].first
        if held is not None:
            memory.batch_select_indices(torch.arange(len(held), device=held.device))  # no views of larger tensors
        file = io.BytesIO()
        torch.save(memory, file)
        packed = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8).to(device)
        distributed.send(torch.tensor([len(packed)], device=device), group=self.wire.group, group_dst=rank)
        distributed.send(packed, group=self.wire.group, group_dst=rank)
        self.wire.sent[NAME, "forward"] += len(packed)

    def _take(self, rank: int):
        device = next(self.model.parameters()).device
        size = torch.empty(1, dtype=torch.long, device=device)
        distributed.recv(size, group=self.wire.group, group_src=rank)
        packed = torch.empty(int(size), dtype=torch.uint8, device=device)
        distributed.recv(packed, group=self.wire.group, group_src=rank)
        file = io.BytesIO(packed.cpu().numpy().tobytes())
        with torch.serialization.safe_globals(CLASSES):
            return torch.load(file, map_location=device, weights_only=True)
