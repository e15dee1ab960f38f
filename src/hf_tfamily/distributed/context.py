"""`context_parallel`: a model whose rows are cut over the ranks of a group, equal to one process or refused.

    with context_parallel(model, group) as ranks:
        loss = model(**ranks.shard(batch)).loss  # of this rank's targets, over the number of all
        loss.backward()
        ranks.sum_gradients()

The attention function finds the object on its module (block_sparse/interface.py) and hands over; nothing else of the
process changes.

Shapes: B batch, N positions of a row, T of them in this rank's slice, R ranks.
"""

import inspect
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from ..block_sparse.interface import SLICES as MARK
from ..block_sparse.patterns import own_pattern
from ..modeling.attention import BLOCK_SPARSE, VisibleKeys, token_positions
from ..modeling.causal_lm import IGNORED, next_token_loss, next_tokens
from .attention import attend_slices
from .checks import check_batch, check_model
from .exchange import Wire
from .exchange_plan import Sizes, Slices, plan_exchange
from .memory import MemoryRanks


def context_parallel(
    model: PreTrainedModel, group: distributed.ProcessGroup | DeviceMesh | None = None
) -> "ContextParallel | MemoryRanks":
    """Every rank of the group calls `model` with a slice of every row; ranks are in the order of the sequence.

    Args:
        model: with attn_implementation="block_sparse": one of ours, or a stock one under patterns or its own windows;
            or a recurrent one, whose memory is handed on from rank to rank under any backend.
        group: the ranks; a mesh of one dimension; None for all processes.

    Returns:
        What `with` enters; or call its `start()` and `stop()`.

    Raises:
        ValueError: for a model that would not equal one process, naming what to use.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"The mesh must have one dimension, got {group.mesh_dim_names}; give mesh['cp'].")
        group = group.get_group()
    if not distributed.is_initialized():
        raise ValueError("context_parallel needs processes that know each other: init_process_group comes first.")
    is_recurrent = hasattr(getattr(model, "base_model", model), "memory_class")
    return (MemoryRanks if is_recurrent else ContextParallel)(model, group)


class Rows(NamedTuple):
    """How the rows of a batch are cut, and how many tokens each has [B]; None if none is padded."""

    slices: Slices
    lengths: Tensor | None


class ContextParallel:
    """What `context_parallel` returns for a model that attends.

    Attributes:
        sent: bytes that this rank has sent, by (number of the layer, "forward" or "backward").
    """

    def __init__(self, model: PreTrainedModel, group: distributed.ProcessGroup | None):
        check_model(model)
        self.model = model
        self.wire = Wire(group)
        self.handles: list = []
        self.rows: Rows | None = None  # of the batch that went forward last
        self.is_forward = False
        self.attended: set[nn.Module] = set()
        self.loss_is_known = False
        self.signature = inspect.signature(model.forward)

    @property
    def sent(self):
        return self.wire.sent

    @property
    def rank(self) -> int:
        return self.wire.rank

    def start(self) -> "ContextParallel":
        """Mark the modules, and hold a small batch to one process; all ranks call it together.

        Raises:
            ValueError: if it differs.
        """
        modules = list(self.model.modules())
        if any(hasattr(module, MARK) for module in modules):
            raise ValueError("This model is under context_parallel already.")
        tokens = _few_tokens(self.model, 2 * self.wire.size + 1)
        whole = _states(self.model, {"input_ids": tokens})
        for module in modules:
            setattr(module, MARK, self)
        self.handles = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        try:
            self._check_states(_states(self.model, self.shard({"input_ids": tokens})), whole)
        except BaseException:
            self.stop()
            raise
        self.sent.clear()
        return self

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()
        for module in self.model.modules():
            if hasattr(module, MARK):
                delattr(module, MARK)

    def __enter__(self) -> "ContextParallel":
        return self.start()

    def __exit__(self, *error) -> None:
        self.stop()

    # What ranks get, and what comes of it

    def shard(self, batch: Mapping) -> dict:
        """This rank's slice of a batch that every rank has whole; all ranks call it together.

        Padding goes to the end of each row first, so that a token's slot is its position. `labels` [B, N] become
        `shift_labels`, the next tokens, before they are cut, and `num_items_in_batch` the number of targets of all
        ranks, unless it is given: the loss that the model returns is this rank's summand of the whole loss, and its
        gradients summed over the ranks are those of one process.

        Args:
            batch: input_ids [B, N] or inputs_embeds [B, N, hidden]; attention_mask [B, N]; position_ids, which must
                count the tokens; labels or shift_labels [B, N]; token_type_ids; what is no tensor stays as it is.

        Raises:
            ValueError: for batches that differ between ranks, packed rows, 4-D masks, rows with fewer positions than
                there are ranks, targets of another kind than next tokens, and tensors that it does not know.
        """
        batch = {name: value for name, value in batch.items() if value is not None}
        tokens = check_batch(batch, self.model, self.wire.size)
        self.wire.check_same(batch)
        slices = Slices(tokens.shape[1], self.wire.size)
        targets = next_tokens(batch.pop("labels", None), batch.get("shift_labels"))
        if targets is not None:
            batch["shift_labels"] = targets
            batch.setdefault("num_items_in_batch", (targets != IGNORED).sum())
        valid = batch.get("attention_mask")
        if valid is None or bool(valid.all()):
            batch.pop("attention_mask", None)
            batch["position_ids"] = torch.arange(slices.length, device=tokens.device).expand(tokens.shape[:2])
            order = None
        else:
            batch["position_ids"] = token_positions(valid)
            order = _tokens_first(valid)
        held = slices.of(self.rank)
        for name, value in batch.items():
            if isinstance(value, Tensor) and name != "num_items_in_batch":
                moved = value if order is None else _moved(value, order)
                batch[name] = moved[:, held.start : held.stop].contiguous()
        if targets is not None:
            batch["labels"] = batch["shift_labels"]  # Transformers asks for both
        return batch

    @torch.no_grad()
    def gather(self, sliced: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, N, ...] on every rank, of what each has for its slice [B, T, ...], such as logits of the last batch.

        Args:
            attention_mask: [B, N] of the batch, so that what belongs to padding goes back to its place.
        """
        starts = [self.rows.slices.of(rank) for rank in range(self.wire.size)]
        pieces = [sliced.new_empty(sliced.shape[0], len(held), *sliced.shape[2:]) for held in starts]
        rank = self.rank
        for source, piece in enumerate(pieces):  # of uneven sizes, which an all-gather need not take
            if source == rank:
                piece.copy_(sliced)
            distributed.broadcast(piece, group=self.wire.group, group_src=source)
        whole = torch.cat(pieces, dim=1)
        return whole if attention_mask is None else _moved(whole, _tokens_first(attention_mask).argsort(dim=1))

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Add up the gradients of all ranks, in place; after the last backward pass of a step."""
        self.wire.sum_gradients(self.model)

    def _check_states(self, found: list[Tensor], whole: list[Tensor]) -> None:
        held = self.rows.slices.of(self.rank)
        same = [_alike(mine, theirs[:, held.start : held.stop]) for mine, theirs in zip(found, whole)]
        told = self.wire.gather_numbers(torch.tensor([int(not all(same))], device=found[0].device))
        if bool(told.any()):
            raise ValueError(
                f"{type(self.model).__name__} whose rows are cut does not equal one process: something in it counts "
                "positions, or mixes them, by itself (use FSDP with gradient checkpointing for long rows), or ranks "
                "have different weights."
            )

    # Around the model's forward pass

    def _before(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """All ranks tell each other what they hold, and raise alike where it does not fit together."""
        said = self.signature.bind_partial(*args, **kwargs).arguments
        said = {**said, **said.pop("kwargs", {})}
        problem = self._problem(said)
        tokens = said["input_ids"] if said.get("input_ids") is not None else said.get("inputs_embeds")
        if tokens is None:
            raise ValueError("Give input_ids or inputs_embeds by their names, as shard(batch) does.")
        mask = said.get("attention_mask")
        numbers = [problem, *tokens.shape[:2], 0 if mask is None else 1]
        told = self.wire.gather_numbers(torch.tensor(numbers, device=tokens.device)).cpu()
        self._raise_alike(told)
        slices = Slices(int(told[:, 2].sum()), self.wire.size)
        lengths = None
        if bool(told[:, 3].any()):
            counts = tokens.new_full(tokens.shape[:1], tokens.shape[1], dtype=torch.long)
            counts = counts if mask is None else mask.long().sum(dim=1)
            lengths = self.wire.gather_numbers(counts).sum(dim=0)
        wrong = [0] if self._fits(slices, lengths, said, tokens) else [1]
        told = self.wire.gather_numbers(torch.tensor(wrong, device=tokens.device))
        if bool(told.any()):
            raise ValueError(
                f"Slices of rank {told[:, 0].nonzero()[:, 0].tolist()} are not those of rows that shard(batch) cut: it "
                "puts padding behind each row, and numbers positions over all ranks (packed rows cannot be cut)."
            )
        self.rows, self.is_forward = Rows(slices, lengths), True
        self.attended.clear()
        # Without a mask no model counts positions by itself: those that nobody may see are known here.
        changed = {"use_cache": False, "attention_mask": None}
        return args, {**kwargs, **{name: new for name, new in changed.items() if name in self.signature.parameters}}

    def _problem(self, said: dict) -> int:
        """The number of what in this rank's arguments cannot be, 0 for nothing."""
        backend = self.model.config._attn_implementation
        mask = said.get("attention_mask")
        targets, given = ("labels", "shift_labels", "num_items_in_batch"), {k for k, v in said.items() if v is not None}
        wrong = (
            backend != BLOCK_SPARSE,
            said.get("past_key_values") is not None or bool(said.get("use_cache")),
            said.get("position_ids") is None,
            isinstance(mask, dict) or (mask is not None and mask.ndim != 2),
            any(name in given for name in targets[:2]) and not given.issuperset(targets[1:]),
        )
        return next((number for number, applies in enumerate(wrong, 1) if applies), 0)

    def _raise_alike(self, told: Tensor) -> None:
        """told: [R, 4], the problem, B, T and whether there is a mask."""
        reasons = (
            f"only '{BLOCK_SPARSE}' exchanges keys; model.set_attn_implementation('{BLOCK_SPARSE}') first",
            "keys of other ranks are in no cache, so there is no generation and no past_key_values; leave the context",
            "positions are counted over all ranks, so forward needs the position_ids of shard(batch)",
            "a mask for pairs of tokens cannot be cut; give a 2-D attention_mask to shard(batch)",
            "labels lose a target at each cut; shard(batch) makes shift_labels and num_items_in_batch of them",
        )
        for problem in told[:, 0].tolist():
            if problem:
                raise ValueError(f"Under context_parallel {reasons[problem - 1]}.")
        if len(set(told[:, 1].tolist())) > 1:
            raise ValueError(f"Ranks hold slices of different batches, of {told[:, 1].tolist()} rows.")

    def _fits(self, slices: Slices, lengths: Tensor | None, said: dict, tokens: Tensor) -> bool:
        held = slices.of(self.rank)
        if tokens.shape[1] != len(held):
            return False
        slots = torch.arange(held.start, held.stop, device=tokens.device)[None]
        valid = torch.ones_like(slots, dtype=torch.bool) if lengths is None else slots < lengths[:, None]
        mask, positions = said.get("attention_mask"), said["position_ids"]
        if mask is not None and not torch.equal(mask.bool(), valid.expand_as(mask)):
            return False
        if mask is None and not bool(valid.all()):
            return False
        return bool(((positions == slots) | ~valid).all())

    def _after(self, model: nn.Module, args: tuple, kwargs: dict, outputs):
        """Did every layer's attention come here, and is the loss what it is taken for?"""
        self.is_forward = False
        if outputs is None:  # it failed
            return
        layers = model.config.get_text_config().num_hidden_layers
        if len(self.attended) != layers:
            raise ValueError(
                f"{len(self.attended)} of {layers} layers of {type(model).__name__} attend through '{BLOCK_SPARSE}'; "
                "the others would see their slice alone. Use FSDP with gradient checkpointing for long rows."
            )
        loss, logits = getattr(outputs, "loss", None), getattr(outputs, "logits", None)
        if loss is None or logits is None or self.loss_is_known or kwargs.get("label_smoothing"):
            return
        with torch.no_grad():
            meant = next_token_loss(
                logits, None, kwargs["shift_labels"], num_items_in_batch=kwargs["num_items_in_batch"]
            )
        if not torch.allclose(loss.float(), meant, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise ValueError(
                f"The loss of {type(model).__name__} is not the sum of its targets' cross-entropies over their number "
                f"({float(loss)}, not {float(meant)}), so slices do not add up; compute it from the logits."
            )
        self.loss_is_known = True

    # In a layer

    @torch.compiler.disable  # what is sent depends on lengths that ranks tell each other
    def attend(
        self, module: nn.Module, mask, seen: VisibleKeys, query: Tensor, key: Tensor, value: Tensor, scaling, bias=None
    ) -> tuple[Tensor, Tensor]:
        """Attention [B, T, H, Dv] of queries [B, T, H, D] to the keys of all ranks, here [B, T, Hk, D], and its
        log-sum-exp [B, H, T].

        Args:
            mask: what the model handed over; `seen`: what it says of this layer.

        Raises:
            ValueError: for scores by distance, and where another module than the model was called.
        """
        if bias is not None:
            raise ValueError(
                "Under context_parallel scores by distance (position_bias: ALiBi, T5's buckets) are not supported; use "
                "rotary or learned positions."
            )
        rows = self._rows(mask, query.shape[1])
        self.attended.add(module)
        sizes = Sizes(query.shape[2], key.shape[2], query.shape[3], value.shape[3])
        plan = plan_exchange(own_pattern(seen.pattern), rows.slices, seen.causal, sizes)
        name = getattr(module, "layer_idx", None)
        output, lse = attend_slices(plan, self.wire, query, key, value, scaling, rows.lengths, name)
        return output, lse.transpose(1, 2)

    def _rows(self, mask, length: int) -> Rows:
        """Those of the forward pass, or where a checkpoint computes a layer anew those that its mask was made for."""
        memo = getattr(mask, "memo", {})
        if self.is_forward:
            memo[MARK] = self.rows
        rows = self.rows if self.is_forward else memo.get(MARK)
        if rows is None or length != len(rows.slices.of(self.rank)):
            raise ValueError(
                "Under context_parallel call the model that was given to it, not one inside; and no gradient "
                "checkpointing for models that make no mask, as those that are not causal."
            )
        return rows


def _few_tokens(model: PreTrainedModel, length: int) -> Tensor:
    """[2, length] ids, the same on all ranks."""
    size = model.config.get_text_config().vocab_size
    return torch.randint(size, (2, length), generator=torch.Generator().manual_seed(0)).to(model.device)


@torch.no_grad()
def _states(model: PreTrainedModel, batch: dict) -> list[Tensor]:
    """Hidden states [B, T, *] of a model in evaluation, and logits where it has some."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.autocast(model.device.type, enabled=False):  # whose rounding would hide what is wrong
            outputs = model(**batch, output_hidden_states=True)
    finally:
        for module, mode in modes.items():
            module.training = mode
    states = [getattr(outputs, name, None) for name in ("last_hidden_state", "logits")]
    return [state for state in (*states, *(outputs.hidden_states or ())[-1:]) if state is not None]


def _alike(found: Tensor, wanted: Tensor) -> bool:
    """But for rounding."""
    tolerance = 1e-4 if found.dtype in (torch.float32, torch.float64) else 0.05
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


def _tokens_first(valid: Tensor) -> Tensor:
    """[B, N], in which order the slots of rows come if padding goes to their ends."""
    return valid.bool().logical_not().long().argsort(dim=1, stable=True)


def _moved(values: Tensor, order: Tensor) -> Tensor:
    """[B, N, ...] with the slots of each row in the given order [B, N]."""
    rows = torch.arange(len(order), device=values.device)[:, None]
    return values[rows, order.to(values.device)]
