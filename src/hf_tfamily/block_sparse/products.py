"""A part of a plan (parts.py) and its gradients by batched matrix products, in chunks of tiles.

Flash kernels are slow where tiles are small, and give no gradient to what is added to the scores. Here scores and their
gradients lie in memory (`ScoreMemory`) such that sums along distances, and along the queries that share a key, are
plain products as well.

Legend: B batch, H heads, N tokens, D head dimension; of one part: A tiles, I queries and J keys of a tile; G tiles,
batch entries or heads taken together.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .parts import Group, Part, Tokens

MASKED = -1e30  # not -inf: a row without keys then keeps a finite LSE, far below any real one
LOG2_E = math.log2(math.e)
_PIECE = 1 << 20  # scores taken together: few enough to stay in the processor's cache
_DELTA_PIECE = 1 << 17  # elements of outputs taken together


# ---------------------------------------------------------------------------------------------------------------------
# Keys of a group


class Keys:
    """The keys of a group: all of the sequence, or those picked by its index; and which of them are hidden."""

    def __init__(self, group: Group, key: Tensor, key_valid: Tensor | None) -> None:
        self.group = group
        self.heads = slice(group.heads.start, group.heads.stop, group.heads.step)
        self.index = self._index(key)
        self.hidden = self._hidden(key, key_valid)

    def _index(self, key: Tensor) -> tuple[Tensor, Tensor] | None:
        """(token, key head) of each picked key, [J, heads] together."""
        index = self.group.index
        if index is None:
            return None
        heads = torch.arange(key.shape[2])[self.heads]
        if index.dim() == 2 and len(heads) < index.shape[1]:
            heads = heads.repeat_interleave(index.shape[1] // len(heads))
        return index.view(len(index), -1).to(key.device), heads.to(key.device)

    def _hidden(self, key: Tensor, key_valid: Tensor | None) -> Tensor | None:
        """What is added to the scores of each key, 0 or a huge negative number: [B, J, heads or 1]."""
        hidden = None if key_valid is None else ~key_valid[:, :, None]
        if hidden is not None and self.index:
            hidden = hidden[:, self.index[0], 0]
        if self.group.absent is not None:
            absent = self.group.absent.view(len(self.group.absent), -1).to(key.device)
            hidden = absent.expand(key.shape[0], -1, -1) if hidden is None else hidden | absent
        return None if hidden is None else additive(hidden, wide(key.dtype))

    def pick(self, x: Tensor) -> Tensor:
        """From [B, S, Hk, D] the keys of the group, [B, J, heads, D]; a view where they are the sequence itself."""
        return x[:, :, self.heads] if self.index is None else x[:, *self.index]

    def pick_zeros(self, grad: Tensor) -> Tensor:
        """Where the gradient of what was picked is summed up."""
        return grad[:, :, self.heads] if self.index is None else torch.zeros_like(grad[:, *self.index])

    def put_back(self, grad: Tensor, picked: Tensor) -> None:
        """Add the gradient of what was picked to that of the sequence."""
        if self.index is None:
            return
        if self.group.index.dim() == 1 and grad.device.type == "cpu":  # five times as fast, elsewhere not deterministic
            grad[:, :, self.heads].index_add_(1, self.index[0][:, 0], picked)
        else:
            torch.ops.aten.index_put_(grad, [None, *self.index], picked, accumulate=True)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces: what is taken together


class Piece(NamedTuple):
    """One tile of all heads and batch entries, or several tiles of all heads, or several of either of one head."""

    heads: range
    batch: range
    tiles: range

    @property
    def count(self) -> int:
        return len(self.heads) * len(self.batch) * len(self.tiles)

    def of_keys(self, q: Tensor, k: Tensor) -> "Piece":
        """The same with key heads, each of which serves H / Hk heads."""
        if q.shape[2] == k.shape[2]:
            return self
        first = self.heads.start * k.shape[2] // q.shape[2]
        return self._replace(heads=range(first, first + len(self.heads)))


def pieces(part: Part, q: Tensor, k: Tensor, *, backward: bool) -> list[Piece]:
    """How a part is cut, for queries [B, T, H, D] and keys [B, S, Hk, D]. Cached: not to be written to."""
    most = _PIECE if backward else _PIECE // 2  # measured: the backward does not gain from smaller ones
    batch, _, heads, dim = q.shape
    return _cut(part, batch, heads, dim, heads == k.shape[2], most, backward)


@lru_cache(maxsize=128)
def _cut(part: Part, batch: int, heads: int, dim: int, own_keys: bool, most: int, backward: bool) -> list[Piece]:
    """`own_keys`: no key head serves several heads; `most` scores at once."""
    at_once = max(1, most // (part.queries.count * part.keys.count))
    if part.tiles <= heads * batch <= at_once and own_keys:
        return [Piece(range(heads), range(batch), range(tile, tile + 1)) for tile in range(part.tiles)]
    columns = part.queries.stride > 1 and part.keys.stride > 1
    if columns and backward and batch <= part.tiles and own_keys:  # the heads of a token lie together
        at_once = most // (part.queries.count * max(part.keys.count, dim))
        some = _split(part.tiles, max(1, at_once // heads))
        return [Piece(range(heads), range(entry, entry + 1), tiles) for tiles in some for entry in range(batch)]
    if batch > part.tiles:
        one_head = [(some, tile) for tile in _split(part.tiles, 1) for some in _split(batch, at_once)]
    else:
        one_head = [(entry, some) for entry in _split(batch, 1) for some in _split(part.tiles, at_once)]
    return [Piece(range(head, head + 1), *which) for which in one_head for head in range(heads)]


def _split(count: int, at_once: int) -> Iterator[range]:
    """Runs of at most `at_once`, as long as each other."""
    size = math.ceil(count / math.ceil(count / at_once))
    return (range(count)[start : start + size] for start in range(0, count, size))


def tiles_of(x: Tensor, tokens: Tokens, piece: Piece) -> Tensor:
    """The tiles of a tensor [B, N, H, D], [G, tokens of a tile, D]: a view, overlapping where the tiles do.

    [heads, batch, tiles, tokens of a tile, D] where G would have no one stride.
    """
    batch, token, head, entry = x.stride()
    step, heads, entries, tiles = tokens.step * token, *map(len, piece)
    first = piece.heads.start * head + piece.batch.start * batch + tokens.start * token + piece.tiles.start * step
    count = heads * entries * tiles
    if count in (heads, entries, tiles):
        sizes, strides = (count,), (head if heads == count else batch if entries == count else step,)
    else:
        sizes, strides = (heads, entries, tiles), (head, batch, step)
    sizes, strides = (*sizes, tokens.count, x.shape[3]), (*strides, tokens.stride * token, entry)
    return x.as_strided(sizes, strides, x.storage_offset() + first)


class Space:
    """Scratch by name that the pieces of one call use one after another: fresh memory costs more than most of what is
    done in it."""

    def __init__(self, like: Tensor):
        self.dtype, self.device, self.flat = like.dtype, like.device, {}

    def take(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        flat = self.flat.get(name)
        if flat is None or flat.numel() < size:
            flat = self.flat[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return flat[:size].view(shape)

    def read(self, name: str, x: Tensor, tokens: Tokens, piece: Piece) -> Tensor:
        """tiles_of(...) as [G, tokens of a tile, D]; a copy where that is no view, or in another dtype."""
        tiles = tiles_of(x, tokens, piece)
        if x.dtype != self.dtype and overlaps(tokens, piece):  # what tiles share is converted once
            alone = replace(tokens, count=tokens.count + (len(piece.tiles) - 1) * tokens.step)
            span = tiles_of(x, alone, piece._replace(tiles=piece.tiles[:1]))
            copy = self.take(name, *span.shape[1:]).copy_(span[0])
            dim = x.shape[3]
            return copy.as_strided((piece.count, tokens.count, dim), (tokens.step * dim, dim, 1))
        if x.dtype != self.dtype or tiles.dim() > 3:
            tiles = self.take(name, *tiles.shape).copy_(tiles)
        return tiles if tiles.dim() == 3 else tiles.flatten(0, 2)


def overlaps(tokens: Tokens, piece: Piece) -> bool:
    """Do neighbouring tiles of a piece share tokens?"""
    return len(piece.tiles) > 1 and tokens.stride == 1 and 0 < tokens.step < tokens.count


def of_piece(x: Tensor, piece: Piece) -> Tensor:
    """From [A or 1, H or 1, ...] what belongs to a piece: [G or 1, ...]."""
    tiles = slice(piece.tiles.start, piece.tiles.stop) if x.shape[0] > 1 else slice(1)
    heads = slice(piece.heads.start, piece.heads.stop) if x.shape[1] > 1 else slice(1)
    if x.shape[0] == 1 and (x.shape[1] == 1 or len(piece.heads) == 1):
        return x[0, heads]
    x = x[tiles, heads].transpose(0, 1)[:, None]
    sizes = len(piece.heads), len(piece.batch), len(piece.tiles)
    return x.expand(*sizes, *x.shape[3:]).flatten(0, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Scores in memory


class ScoreMemory:
    """Scores [G, I, J] of up to `count` tiles, amid entries that hold `fill`.

    Rows lie `pitch` apart and tiles I * (pitch + 1), so that the scores of one distance lie pitch + 1 apart throughout,
    and, with `outside` + 1 chunks of I keys in a row, those of one key `pitch` apart from tile to tile: three views.
    """

    def __init__(
        self,
        space: Space,
        name: str,
        part: Part,
        count: int,
        pitch: int,
        *,
        fill: float = 0.0,
        outside: int = 0,
    ):
        self.num_queries, self.num_keys, self.pitch, self.outside = part.queries.count, part.keys.count, pitch, outside
        self.count, self.tile = count, self.num_queries * (pitch + 1)
        self.first = self.num_queries + outside * self.tile
        self.flat = space.take(name, self.first + (count + outside) * self.tile).fill_(fill)

    def by_key(self, count: int) -> Tensor:
        """[G, I, J]"""
        sizes, strides = (count, self.num_queries, self.num_keys), (self.tile, self.pitch, 1)
        return self.flat.as_strided(sizes, strides, self.first + self.pitch - self.num_keys)

    def by_distance(self, count: int, heads: int, columns: range) -> Tensor:
        """[heads, G / heads * I, columns]: column c of the i-th query of a tile is its key c - (I - 1) + i."""
        sizes = (heads, count // heads * self.num_queries, len(columns))
        strides = (count // heads * self.tile, self.pitch + 1, 1)
        return self.flat.as_strided(
            sizes, strides, self.first + self.pitch - self.num_keys - self.num_queries + 1 + columns.start
        )

    def by_chunk(self, count: int) -> Tensor:
        """[G + outside, I keys, pitch queries]: for each chunk of keys the queries of the tiles that have it."""
        sizes = (count + self.outside, self.num_queries, self.pitch)
        first = self.first - self.outside * (self.tile - self.num_queries)
        return self.flat.as_strided(sizes, (self.tile, 1, self.pitch), first)

    def clear_after(self, count: int) -> None:
        """Zeros in the tiles that by_chunk sees behind the first `count`."""
        if count < self.count:
            self.flat.narrow(0, self.first + count * self.tile, self.outside * self.tile).zero_()


class Scores(Protocol):
    """What is added to the scores of a part and has gradients of its own."""

    pitch: int  # that its ScoreMemory needs

    def by_key(self, piece: Piece) -> Tensor:
        """[G, I, J] in base 2"""

    def backward(self, gradient: ScoreMemory, piece: Piece) -> None:
        """Take in the gradient of unscaled scores."""


# ---------------------------------------------------------------------------------------------------------------------
# A part


@dataclass(frozen=True)
class Work:
    """What parts read, [B, T, H, D] of queries and [B, S, Hk, D] of keys, and what they are added to.

    Forward: `output` and `lse` [B, T, H, 1] so far, the latter in base 2. Backward: `lse` over all parts, and
    `delta` = scale * sum(grad_out * output) [B, T, H, 1].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    scale: float
    space: Space
    output: Tensor | None = None
    grad_out: Tensor | None = None
    delta: Tensor | None = None
    grad_q: Tensor | None = None
    grad_k: Tensor | None = None
    grad_v: Tensor | None = None


@dataclass(frozen=True)
class Extra:
    """What is added to the scores of a part.

    Attributes:
        biases: [A or 1, H or 1, I, J], that hide keys.
        hidden: [B, S, H, 1], the same for each key.
        scores: what has gradients of its own.
    """

    biases: list[Tensor]
    hidden: Tensor | None = None
    scores: Scores | None = None

    def scores_of(self, q: Tensor, k: Tensor, work: Work, part: Part, piece: Piece) -> Tensor:
        """All scores of a piece in base 2, [G, I, J], for queries [G, I, D] and keys [G, J, D]."""
        total = work.space.take("scores", piece.count, q.shape[1], k.shape[1])
        total.baddbmm_(q, k.mT, beta=0, alpha=work.scale * LOG2_E)
        if self.scores:
            total.add_(self.scores.by_key(piece))
        for bias in self.biases:
            total.add_(of_piece(bias, piece))
        if self.hidden is not None:
            total.add_(work.space.read("hidden", self.hidden, part.keys, piece).mT)
        return total


def forward_part(part: Part, work: Work, extra: Extra) -> None:
    """Merge a part into the output and LSE so far, in place."""
    space = work.space
    for piece in pieces(part, work.q, work.k, backward=False):
        of_keys = piece.of_keys(work.q, work.k)
        q = space.read("q", work.q, part.queries, piece)
        k, v = (space.read(name, x, part.keys, of_keys) for name, x in (("k", work.k), ("v", work.v)))
        scores = extra.scores_of(q, k, work, part, piece)
        top = scores.amax(-1, keepdim=True)
        weights = scores.sub_(top).exp2_()
        total = weights.sum(-1, keepdim=True)
        out, lse = (tiles_of(x, part.queries, piece) for x in (work.output, work.lse))
        part_out = torch.bmm(weights, v, out=space.take("of queries", *q.shape)).view(out.shape)
        part_lse, total = top.add_(total.log2()).view(lse.shape), total.view(lse.shape)
        if part.writes:
            torch.div(part_out, total, out=out)
            lse.copy_(part_lse)
        else:
            merged = torch.logaddexp2(lse.contiguous(), part_lse)  # slow where entries lie apart
            out.lerp_(part_out.div_(total), torch.exp2(part_lse.sub_(merged)))
            lse.copy_(merged)


def scaled_delta(grad_out: Tensor, output: Tensor, scale: float) -> Tensor:
    """scale * sum(grad_out * output) [B, T, H, 1], in chunks of tokens."""
    delta = grad_out.new_empty((*grad_out.shape[:3], 1), dtype=wide(grad_out.dtype))
    at_once = max(1, _DELTA_PIECE // max(1, grad_out[:, :1].numel()))
    for some, *pair in zip(*(x.split(at_once, 1) for x in (delta, grad_out, output)), strict=True):
        torch.sum(pair[0].to(delta.dtype) * pair[1], -1, keepdim=True, out=some).mul_(scale)
    return delta


def backward_part(part: Part, work: Work, extra: Extra) -> None:
    """Add up the gradients of a part, exactly: with P = exp(S - LSE) over all parts, each stands alone."""
    space, plan = work.space, pieces(part, work.q, work.k, backward=True)
    if work.q.shape[2] > work.k.shape[2]:  # query heads add up in a key head, from zero
        part = replace(part, writes_keys=False, fresh_keys=range(0))
    largest = max(piece.count for piece in plan)
    pitch = max(part.keys.count, extra.scores.pitch if extra.scores else 0)
    outside = _outside(part, plan, pitch)
    pitch = (outside + 1) * part.queries.count if outside else pitch
    memories = [ScoreMemory(space, name, part, largest, pitch, outside=outside) for name in ("weights", "grad_scores")]
    queries = [_Queries(space, name, part, largest, outside) for name in ("grad_out", "q")]
    if not outside:
        zero_keys(part.fresh_keys, work.grad_k, work.grad_v)
    for piece in plan:
        of_keys = piece.of_keys(work.q, work.k)
        grad_out, q = (tiles.read(x, piece) for tiles, x in zip(queries, (work.grad_out, work.q)))
        lse, delta = (space.read(name, getattr(work, name), part.queries, piece) for name in ("lse", "delta"))
        k, v = (space.read(name, getattr(work, name), part.keys, of_keys) for name in ("k", "v"))
        some = extra.scores_of(q, k, work, part, piece).sub_(lse)
        weights, grad_scores = (memory.by_key(piece.count) for memory in memories)
        torch.exp2(some, out=weights)  # MKL's exp takes ten times as long where the result underflows
        some.baddbmm_(grad_out, v.mT, beta=0, alpha=work.scale).sub_(delta)
        torch.mul(some, weights, out=grad_scores)
        put(work.grad_q, torch.bmm(grad_scores, k, out=space.take("of queries", *q.shape)), part, piece)
        if extra.scores:
            extra.scores.backward(memories[1], piece)
        for total, memory, tiles in zip((work.grad_v, work.grad_k), memories, queries):
            _put_keys(total, memory, tiles, part, of_keys, space)


def _put_keys(total: Tensor, memory: ScoreMemory, tiles: "_Queries", part: Part, piece: Piece, space: Space) -> None:
    """Write or add to [B, S, Hk, D] the sums of queries, weighed by what is in memory, that the keys of a piece get."""
    if tiles.outside:
        memory.clear_after(piece.count)
        queries, weights = tiles.by_chunk(piece.count), memory.by_chunk(piece.count)
        of_chunks = space.take("of keys", len(queries), part.queries.count, total.shape[3])
        _put_chunks(total, torch.bmm(weights, queries, out=of_chunks), part, piece)
    else:
        of_tiles = space.take("of keys", piece.count, part.keys.count, total.shape[3])
        torch.bmm(memory.by_key(piece.count).mT, tiles.inner, out=of_tiles)
        _put_tiles(total, of_tiles, part.keys, piece, writes=part.writes_keys)


def _outside(part: Part, plan: list[Piece], pitch: int) -> int:
    """How many more chunks than one the keys of a tile are, where tiles advance by one chunk of queries and keys."""
    queries, keys = part.queries, part.keys
    even = queries.stride == keys.stride == 1 and queries.step == keys.step == queries.count
    chunks = math.ceil(keys.count / queries.count)
    return chunks - 1 if even and len(plan[0].tiles) > 1 and chunks * queries.count >= pitch else 0


class _Queries:
    """What belongs to the queries of a piece, amid zeros for the tiles outside it that share keys with its tiles."""

    def __init__(self, space: Space, name: str, part: Part, count: int, outside: int):
        self.space, self.name, self.tokens, self.outside = space, name, part.queries, outside
        self.most = count + 2 * outside

    def read(self, x: Tensor, piece: Piece) -> Tensor:
        """Tiles [G, I, D] of [B, T, H, D]"""
        if self.outside:
            end = self.outside + piece.count
            self.tiles = self.space.take(self.name, self.most, self.tokens.count, x.shape[3])
            self.tiles[: self.outside] = 0
            self.tiles[end : end + self.outside] = 0
            self.inner = self.tiles[self.outside : end].copy_(tiles_of(x, self.tokens, piece))
        else:
            self.inner = self.space.read(self.name, x, self.tokens, piece)
        return self.inner

    def by_chunk(self, count: int) -> Tensor:
        """For each chunk of keys the queries of the tiles that have it, [G + outside, (outside + 1) * I, D]."""
        num_queries, dim = self.tiles.shape[1:]
        sizes = (count + self.outside, (self.outside + 1) * num_queries, dim)
        return self.tiles.as_strided(sizes, (num_queries * dim, dim, 1), self.tiles.storage_offset())


def put(total: Tensor, gradient: Tensor, part: Part, piece: Piece) -> None:
    """Write or add the gradient [G, I, D] of query tiles to [B, T, H, D]."""
    view = tiles_of(total, part.queries, piece)
    gradient = gradient.view(view.shape)
    view.copy_(gradient) if part.writes else view.add_(gradient)


def zero_keys(fresh: range, *gradients: Tensor) -> None:
    """Zeros for the fresh keys of a part, before it is added to its gradients [B, S, Hk, D]."""
    for gradient in gradients:
        gradient[:, fresh.start : fresh.stop].zero_()


def _put_chunks(total: Tensor, chunks: Tensor, part: Part, piece: Piece) -> None:
    """Put chunks of keys [G + outside, I, D], the last of a tile's window at its end, to [B, S, Hk, D].

    Fresh keys are written, but for those that the tile before this piece has too; all others are added to.
    """
    keys = chunks.flatten(0, 1)[-part.keys.count % part.queries.count :]
    start = part.keys.start + piece.tiles.start * part.keys.step
    earlier = start - part.keys.step + part.keys.count if piece.tiles.start else 0
    first = max(part.fresh_keys.start, earlier) - start if part.fresh_keys else len(keys)
    total = total[piece.batch.start, start : start + len(keys), piece.heads.start]
    total[:first].add_(keys[:first])
    total[first:].copy_(keys[first:])


def _put_tiles(total: Tensor, tiles: Tensor, tokens: Tokens, piece: Piece, *, writes: bool) -> None:
    """Write or add key tiles [G, J, D] to [B, S, Hk, D]; to be added, neighbours may share tokens."""
    if len(piece.tiles) > 1 and tokens.step == 0:
        tiles, piece = tiles.sum(0, keepdim=True), piece._replace(tiles=piece.tiles[:1])
    view = tiles_of(total, tokens, piece)
    tiles = tiles.view_as(view)
    if writes:
        view.copy_(tiles)
        return
    width = tokens.step if overlaps(tokens, piece) else tokens.count
    for start in range(0, tokens.count, width):  # in tokens that are not yet shared
        view[..., start : start + width, :].add_(tiles[..., start : start + width, :])


def causal_bias(part: Part, like: Tensor, dtype: torch.dtype) -> Tensor:
    """[1, 1, I, J]: what hides the keys behind the i-th of a tile from its i-th query."""
    return _causal_bias(part.queries.count, part.keys.count, like.device, dtype)


@lru_cache(maxsize=16)
def _causal_bias(num_queries: int, num_keys: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        hidden = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).triu(1)
        return additive(hidden[None, None], dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What scores and sums are held in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """A huge negative number where `hidden`, 0 elsewhere."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, MASKED)
