"""Layouts against brute force: every walk meets every visible pair once, masks are right, and the work is small."""

import pytest
import torch

from hf_tfamily.block_sparse.parts import Extent
from hf_tfamily.block_sparse.triton import layout as layout_module
from hf_tfamily.block_sparse.triton.layout import key_items, layout, row_items, table_heads
from hf_tfamily.block_sparse.triton.tables import build_table, table_pass
from hf_tfamily.modeling.attention_patterns import Block1D, Fixed, FixedSummary, Full, Local, PerHead, Strided, Union
from tests.block_sparse.test_plan import EXTENTS, HEADS, PATTERNS
from tests.reference.attention import dense_mask

BLOCK_M, BLOCK_N = 16, 8
INTERVALS = [*[p for p in PATTERNS if not getattr(p, "grid", None)], Block1D(8, 5)]
FIXED = {"start": 1, "left": 2, "full": 3, "right": 4}


def place_token(source, variant, first, step, place):
    return int(source.picked[variant, place]) if source.picked is not None else first + place * step


def walk(item, field, tile):
    """(place, whether no mask is applied) of each column of an item's walk."""
    start, left, full, right = item[field + 1 : field + 5]
    for position in range(left + full + right):
        for offset in range(tile):
            yield start + position * tile + offset, left <= position < left + full


def seen_by_rows(launches, num_heads, num_queries, num_keys):
    """[H, T, S]: how often the forward's programs show a key to a query."""
    seen = torch.zeros(num_heads, num_queries, num_keys, dtype=torch.long)
    for launch in launches:
        for item in row_items(launch, BLOCK_M, BLOCK_N, keep_idle=False).tolist():
            head, variant, first_query, first_key, first_row, rows = item[:6]
            for row in range(first_row, min(first_row + BLOCK_M, rows)):
                query = first_query + row * launch.step
                for number, source in enumerate(launch.sources):
                    low, high = (int(x[variant, query]) for x in (source.low, source.high))
                    for place, whole in walk(item, 6 + 5 * number, BLOCK_N):
                        assert not whole or low <= place < high, "a full tile must be seen whole"
                        if low <= place < high:
                            key = place_token(source, variant, first_key, launch.step, place)
                            seen[head :: launch.period, query, key] += 1
    return seen


def seen_by_keys(launches, num_heads, num_queries, num_keys):
    """The same by the programs of the gradients of keys and values."""
    seen = torch.zeros(num_heads, num_queries, num_keys, dtype=torch.long)
    for launch in launches:
        for source in launch.sources:
            items, _ = key_items(launch, source, BLOCK_N, BLOCK_M, keep_idle=False)
            for item in items.tolist():
                head, variant, first_query, first_key, first_place, number = item[:6]
                places = range(first_place, min(first_place + BLOCK_N, number))
                for row, whole in walk(item, 6, BLOCK_M):
                    if row >= item[6]:
                        continue
                    query = first_query + row * launch.step
                    low, high = (int(x[variant, query]) for x in (source.low, source.high))
                    for place in places:
                        assert not whole or low <= place < high, "a full tile must be seen whole"
                        if low <= place < high:
                            key = place_token(source, variant, first_key, launch.step, place)
                            seen[head :: launch.period, query, key] += 1
    return seen


@pytest.mark.parametrize("pattern", INTERVALS, ids=str)
def test_walks_meet_each_visible_pair_once(pattern):
    for number, (num_queries, num_keys, first_query, first_key) in enumerate(EXTENTS):
        if num_queries > 64:
            continue
        causal = number % 3 > 0
        extent = Extent(num_queries, num_keys, first_query, first_key, causal)
        offsets = {"causal": causal, "q_offset": first_query, "kv_offset": first_key}
        wanted = dense_mask(pattern, HEADS, num_queries, num_keys, **offsets).long()
        period = min(pattern.head_period, HEADS)
        for head in table_heads(pattern, HEADS):
            wanted[head::period] = 0
        launches = [launch for launches in layout(pattern, extent, HEADS) for launch in launches]
        assert torch.equal(seen_by_rows(launches, HEADS, num_queries, num_keys), wanted)
        assert torch.equal(seen_by_keys(launches, HEADS, num_queries, num_keys), wanted)


def test_splitting_keeps_the_work(monkeypatch):
    monkeypatch.setattr(layout_module, "_SPLIT_TILES", 1)
    monkeypatch.setattr(layout_module, "_UNEVEN", 0)
    extent = Extent(100, 100, 0, 0, True)
    for pattern in (Fixed(16, 4, sub_blocks=2), Union([Local(5), Strided(5)])):
        launches = [launch for launches in layout(pattern, extent, HEADS) for launch in launches]
        seen = seen_by_keys(launches, HEADS, 100, 100)
        assert torch.equal(seen, dense_mask(pattern, HEADS, 100, 100, causal=True).long())
        items, sums = key_items(launches[-1], launches[-1].sources[-1], BLOCK_N, BLOCK_M, keep_idle=False)
        assert items[:, 8:11].sum(1).max() == 1
        assert int(sums[:, 7].sum()) == len(items)


@pytest.mark.parametrize("side", [16, 32, 64])
def test_tables_hold_the_pattern(side):
    pattern = Union([Strided(3), Strided(40), Local(20)])
    extent = Extent(150, 170, 20, 0, True)
    launch = table_pass(pattern, extent, (0,), (side, side), torch.device("cpu"))
    wanted = dense_mask(pattern, 1, 150, 170, causal=True, q_offset=20)[0]
    for table, mask in ((launch.by_query, wanted), (launch.by_key, wanted.T)):
        assert torch.equal(seen_by_table(table, *mask.shape, side), mask.long())


def seen_by_table(table, num_rows, num_columns, side):
    seen = torch.zeros(num_rows, num_columns, dtype=torch.long)
    per_tile = side // table.granule
    for item in table.items.tolist():
        first_row, start, full, right = item[4], item[7], item[9], item[10]
        for entry in range((full + right) * per_tile):
            granule = int(table.listed[start + entry])
            if granule < 0:
                continue
            for row in range(first_row, min(first_row + side, num_rows)):
                for offset in range(min(table.granule, num_columns - granule * table.granule)):
                    word = int(table.bits[table.slots[start + entry], row - first_row, offset // 32])
                    whole = entry < full * per_tile
                    seen[row, granule * table.granule + offset] += 1 if whole else word >> (offset % 32) & 1
    return seen


def test_granules_are_as_coarse_as_the_pattern():
    """Blocks of 64 need no finer granule, and no masks; blocks of 16 do."""
    for block, granule in ((64, 64), (32, 32), (16, 16)):
        chosen = torch.rand(512 // 64, 512 // block) > 0.7

        def seen(row, column, chosen=chosen, block=block):
            return chosen[row // 64, column // block]

        table = build_table([seen], (0,), 512, 512, 64, torch.device("cpu"))
        assert table.granule == granule
        assert torch.equal(
            seen_by_table(table, 512, 512, 64), chosen.long().repeat_interleave(64, 0).repeat_interleave(block, 1)
        )


# ---------------------------------------------------------------------------------------------------------------------
# Work


def tiles(pattern, length, block_m=128, block_n=64, heads=8):
    """Tiles of all heads, as a fraction of dense causal attention's."""
    launches = [
        launch for launches in layout(pattern, Extent(length, length, 0, 0, True), heads) for launch in launches
    ]
    work = 0
    for launch in launches:
        items = row_items(launch, block_m, block_n, keep_idle=False)
        work += int(items[:, [8, 9, 10, 13, 14, 15]].sum()) * heads // launch.period
    return work * block_m * block_n / (heads * length * (length + 1) / 2)


@pytest.mark.parametrize(
    ("pattern", "at_most"),
    [
        (Full(), 1.02),
        (Local(128), 0.05),
        (Strided(128), 0.03),
        (Union([Local(128), Strided(128)]), 0.07),
        (Fixed(128, 32, sub_blocks=4), 0.28),
        (Fixed(128, 8, sub_blocks=4), 0.10),
    ],
    ids=str,
)
def test_the_upper_triangle_and_hidden_blocks_are_never_computed(pattern, at_most):
    """Of dense causal attention's pairs, at the length and stride of the paper's enwik8 model."""
    assert tiles(pattern, 12288) <= at_most


def test_long_walks_come_first():
    (launch,) = layout(Full(), Extent(1024, 1024, 0, 0, True), 1)[0]
    work = row_items(launch, 64, 64, keep_idle=True)[:, 8:11].sum(1)
    assert torch.equal(work, work.sort(descending=True).values)


def test_a_layout_takes_memory_for_its_queries_only(monkeypatch):
    """64k tokens: a few integers a query, whatever the pattern; nothing is evaluated pair by pair."""
    length = 1 << 16
    for pattern in (Local(1024), Strided(256), Fixed(256, 32, sub_blocks=4), Union([Local(256), Strided(256)])):
        monkeypatch.setattr(type(pattern), "visible", None)
        elements = 0
        for launches in layout(pattern, Extent(length, length, 0, 0, True), 8):
            for launch in launches:
                elements += sum(source.low.numel() + source.high.numel() for source in launch.sources)
                elements += row_items(launch, 128, 64, keep_idle=True).numel()
        assert elements <= 10 * pattern.head_period * length
        monkeypatch.undo()


def test_layouts_are_shared():
    extent = Extent(64, 64, 0, 0, True)
    assert layout(Local(5), extent, 8) is layout(Local(5), Extent(64, 64, 0, 0, True), 8)


def test_heads_that_see_alike_are_launched_together():
    extent = Extent(64, 64, 0, 0, True)
    assert len(layout(FixedSummary(8, 2, sub_blocks=4), extent, 8)) == 1
    assert len(layout(PerHead([Local(3), Strided(4), Local(5)]), extent, 6)) == 2
