"""All-to-all of uneven pieces that gradients flow back through, with every byte counted."""

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable


class Stream(NamedTuple):
    """What goes from every rank to every other one.

    Attributes:
        values: [B, T, ...], what this rank has.
        sent: for each rank, the indices along T that it gets, ascending.
        received: from each rank, how many come.
    """

    values: Tensor
    sent: list[Tensor]
    received: list[int]


class Wire:
    """The ranks of a group, and how many bytes this one has sent.

    Attributes:
        sent: bytes by (name, "forward" or "backward"), where a name is the number of a layer, or "memory".
    """

    def __init__(self, group: distributed.ProcessGroup | None):
        self.group = group
        self.rank = distributed.get_rank(group)
        self.size = distributed.get_world_size(group)
        self.sent: Counter = Counter()

    def exchange(self, streams: list[Stream], name: Hashable) -> list[Tensor]:
        """For each stream what comes, [B, J, ...]: that of rank 0 first. What a rank has for itself is not sent.

        All ranks must call it together, and use what it gives: it is one node of the graph, whatever the streams, so
        that all ranks go back in one order. Streams of one dtype travel together.
        """
        kinds: dict[torch.dtype, list[Stream]] = {}
        for stream in streams:
            kinds.setdefault(stream.values.dtype, []).append(stream)
        flat, gives, takes = [], [], []
        for alike in kinds.values():
            pieces = [
                [_at(stream.values, stream.sent[rank]).flatten() for stream in alike] for rank in range(self.size)
            ]
            flat.append(torch.cat([piece for of_rank in pieces for piece in of_rank]))
            gives.append([sum(map(len, of_rank)) for of_rank in pieces])
            takes.append([sum(_shape(stream, rank).numel() for stream in alike) for rank in range(self.size)])
        came = _Exchange.apply(self, name, gives, takes, *flat)
        found = {}
        for alike, whole in zip(kinds.values(), came):
            shapes = [_shape(stream, rank) for rank in range(self.size) for stream in alike]
            pieces = [piece.view(shape) for piece, shape in zip(whole.split([s.numel() for s in shapes]), shapes)]
            for index, stream in enumerate(alike):
                found[id(stream)] = torch.cat(pieces[index :: len(alike)], dim=1)
        return [found[id(stream)] for stream in streams]

    def swap(self, flat: Tensor, gives: list[int], takes: list[int], counted_as: Hashable) -> Tensor:
        """One all-to-all of numbers of any dtype."""
        flat, size = flat.contiguous(), flat.element_size()
        came = flat.new_empty(sum(takes))
        self.sent[counted_as] += size * (sum(gives) - gives[self.rank])
        sizes = ([number * size for number in numbers] for numbers in (takes, gives))
        distributed.all_to_all_single(came.view(torch.uint8), flat.view(torch.uint8), *sizes, group=self.group)
        return came

    def gather_numbers(self, numbers: Tensor) -> Tensor:
        """[R, n]: the n whole numbers of every rank."""
        gathered = [torch.empty_like(numbers) for _ in range(self.size)]
        distributed.all_gather(gathered, numbers, group=self.group)
        return torch.stack(gathered)

    def check_same(self, batch: Mapping) -> None:
        """Raise ValueError on all ranks unless all have the same tensors of tokens, by their sums."""
        tensors = [batch[name] for name in sorted(batch) if isinstance(batch[name], Tensor) and batch[name].ndim > 1]
        told = self.gather_numbers(torch.stack([_check_sum(tensor) for tensor in tensors]).sum(dim=0, keepdim=True))
        if bool((told != told[0]).any()):
            raise ValueError(
                "Ranks were given different batches; all must have the same rows, of which each keeps a part."
            )

    def sum_gradients(self, model: nn.Module) -> None:
        """Add up the gradients of all ranks, in place."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                distributed.all_reduce(parameter.grad, group=self.group)


def _check_sum(tensor: Tensor) -> Tensor:
    """A whole number [] that differs where values or their places do, but for rare chances."""
    bits = {2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.int64)
    flat = tensor.detach().contiguous().flatten()
    numbers = (flat.view(bits) if flat.is_floating_point() else flat).long()
    places = torch.arange(1, len(numbers) + 1, device=tensor.device)
    return (numbers * (places * 2654435761 % 4294967291)).sum() + len(tensor)


def _at(values: Tensor, indices: Tensor) -> Tensor:
    """[B, J, ...] of [B, T, ...]; without a look-up where the indices are a run."""
    count = len(indices)
    if count == 0 or int(indices[-1] - indices[0]) == count - 1:
        return values.narrow(1, int(indices[0]) if count else 0, count)
    return values.index_select(1, indices.to(values.device))


def _shape(stream: Stream, rank: int) -> torch.Size:
    """Of what comes from a rank."""
    return torch.Size((stream.values.shape[0], stream.received[rank], *stream.values.shape[2:]))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wire: Wire, name: Hashable, gives: list[list[int]], takes: list[list[int]], *flat: Tensor):
        ctx.wire, ctx.name, ctx.gives, ctx.takes = wire, name, gives, takes
        return tuple(wire.swap(x, give, take, (name, "forward")) for x, give, take in zip(flat, gives, takes))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        counted_as = (ctx.name, "backward")
        back = [ctx.wire.swap(x, take, give, counted_as) for x, give, take in zip(grads, ctx.gives, ctx.takes)]
        return None, None, None, None, *back
