"""What ranks send each other is counted without processes, and is what is seen, no more."""

import pytest
import torch

from hf_tfamily.distributed import context_parallel, dense_bytes, predicted_bytes
from hf_tfamily.distributed.attention import Picked, run_around
from hf_tfamily.distributed.exchange_plan import (
    Sizes,
    Slices,
    columns_of,
    head_groups,
    needed,
    plan_exchange,
    positions_sent,
)
from hf_tfamily.modeling.attention_patterns import (
    Fixed,
    FixedBlock,
    FixedSummary,
    Full,
    Local,
    PerHead,
    Sink,
    Strided,
    Union,
)
from tests.pattern_examples import EXAMPLES

SIZES = Sizes(heads=4, key_heads=4, head_dim=8, value_dim=6)


def seen_by(pattern, length, causal, heads=4):
    """[N, N], which query sees which key in some head, from the pattern's own rule."""
    query, key = torch.arange(length)[:, None], torch.arange(length)
    seen = torch.stack([pattern.visible(head, query, key).expand(length, length) for head in range(heads)]).any(dim=0)
    return seen & (key <= query) if causal else seen


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", EXAMPLES, ids=repr)
def test_needed_are_the_keys_that_are_seen(pattern, causal):
    for length, ranks in ((50, 2), (67, 3), (23, 4), (5, 5)):
        slices, seen = Slices(length, ranks), seen_by(pattern, length, causal)
        for rank in range(ranks):
            held = slices.of(rank)
            wanted = seen[held.start : held.stop].any(dim=0)
            wanted[held.start : held.stop] = False
            assert needed(pattern, slices, causal, rank).tolist() == wanted.nonzero()[:, 0].tolist()


def test_slices_are_whole_and_even():
    for length, ranks in ((8, 8), (9, 4), (1001, 7)):
        slices = [Slices(length, ranks).of(rank) for rank in range(ranks)]
        assert [position for held in slices for position in held] == list(range(length))
        assert max(map(len, slices)) - min(map(len, slices)) <= 1


@pytest.mark.parametrize("pattern", EXAMPLES, ids=repr)
def test_what_is_sent_is_what_is_needed(pattern):
    for route in plan_exchange(pattern, Slices(67, 4), True, SIZES).routes:
        for target in range(4):
            sent = torch.cat([positions_sent(route, Slices(67, 4), source, target) for source in range(4)])
            assert torch.equal(sent, route.needed[target])
            assert not len(positions_sent(route, Slices(67, 4), target, target))


def test_all_that_is_sent_arrives():
    """Bytes of all ranks together: there forward what comes back backward."""
    for pattern in [*EXAMPLES, Strided(8), Union([Local(9), Strided(8)])]:
        forward, backward = (predicted_bytes(pattern, 67, 4, 4, 8, 4, backward=back) for back in (False, True))
        assert sum(forward) == sum(backward)


def test_a_window_needs_its_halo_alone():
    sent = predicted_bytes(Local(17), 1000, 4, heads=4, head_dim=8, itemsize=4)
    assert sent == [16 * 4 * 2 * 8 * 4] * 3 + [0]
    over_two = predicted_bytes(Local(401), 1000, 4, 4, 8, 4)  # reaches over a whole slice
    assert over_two == [(250 + 150) * 4 * 2 * 8 * 4, (250 + 150) * 4 * 2 * 8 * 4, 250 * 4 * 2 * 8 * 4, 0]


def test_fixed_needs_the_summaries_of_other_ranks():
    sent = predicted_bytes(FixedSummary(100, 4), 1000, 4, heads=4, head_dim=8, itemsize=4)
    summaries = [2, 3, 2, 3]  # blocks that end in each slice
    assert sent == [count * 4 * (3 - rank) * 4 * 2 * 8 * 4 for rank, count in enumerate(summaries)]


def test_sinks_come_from_the_first_rank():
    sent = predicted_bytes(Union([Local(11), Sink(3)]), 400, 4, heads=2, head_dim=8, itemsize=2)
    of_position = 2 * 2 * 8 * 2
    assert sent == [(10 + 3 * 3) * of_position, 10 * of_position, 10 * of_position, 0]


def test_grouped_heads_send_key_heads():
    whole = predicted_bytes(Local(17), 1000, 4, heads=8, head_dim=8, itemsize=4)
    grouped = predicted_bytes(Local(17), 1000, 4, heads=8, key_heads=2, head_dim=8, itemsize=4)
    assert [4 * sent for sent in grouped] == whole


def test_each_head_sends_what_its_own_pattern_shows():
    both = PerHead([Local(17), Sink(3)])
    one, other = (predicted_bytes(pattern, 1000, 4, 2, 8, 4) for pattern in both.patterns)
    assert predicted_bytes(both, 1000, 4, 4, 8, 4) == [sum(pair) for pair in zip(one, other)]
    groups = head_groups(both, heads=8, key_heads=4)  # each key head is read under both
    assert len(groups) == 1
    assert groups[0].pattern == both


def test_columns_are_taken_where_they_are_cheaper():
    few, many = (plan_exchange(Strided(64), Slices(4096, ranks), True, SIZES) for ranks in (2, 8))
    assert few.routes[0].columns is None
    assert many.routes[0].columns is not None
    assert columns_of(Strided(3), Slices(4096, 4), True) is None  # a rank would have none
    assert columns_of(Union([Local(8), Strided(8)]), Slices(64, 4), False) is None
    assert columns_of(Union([FixedBlock(8), Strided(8)]), Slices(64, 4), True) is None
    dealt = columns_of(Strided(10), Slices(64, 4), True)
    positions = [dealt.positions(range(64), rank) for rank in range(4)]
    assert torch.equal(torch.cat(positions).sort().values, torch.arange(64))
    assert all(len(set((some % 10).tolist())) in (2, 3) for some in positions)


def test_full_attention_is_honest():
    """Causal: each rank needs all earlier keys, half of what an all-gather sends."""
    sent = predicted_bytes(Full(), 4096, 8, heads=4, head_dim=8, itemsize=4)
    dense = dense_bytes(4096, 8, heads=4, head_dim=8, itemsize=4)
    assert sent == [dense * (7 - rank) // 7 for rank in range(8)]
    assert predicted_bytes(Full(), 4096, 8, 4, 8, 4, causal=False) == [dense] * 8


def test_the_run_around_a_slice():
    assert run_around(torch.tensor([1, 2, 5, 6, 9, 10, 12]), range(7, 9)) == (4, 5, 2)
    assert run_around(torch.tensor([1, 9]), range(3, 8)) == (1, 3, 0)
    assert run_around(torch.empty(0, dtype=torch.long), range(3, 8)) == (0, 3, 0)


def test_picked_keys_are_seen_where_they_stand():
    pattern, slices = PerHead([Union([Local(3), Sink(2)]), Fixed(5, 1)]), Slices(40, 4)
    picked = Picked(pattern, pattern, slices, True, 2)
    positions = needed(pattern, slices, True, 2)
    before, low, _ = run_around(positions, slices.of(2))
    far = positions[: before - (20 - low)]
    query = torch.arange(20, 30)[:, None]
    for head in range(2):
        found = picked.for_head(head).visible(0, query, torch.arange(len(far)))
        assert torch.equal(found, pattern.visible(head, query, far).expand_as(found))


def test_rows_shorter_than_the_ranks_are_refused():
    with pytest.raises(ValueError, match="Rows of 3 tokens cannot be cut"):
        predicted_bytes(Full(), 3, 4, 4, 8, 4)


def test_without_processes_it_says_so():
    with pytest.raises(ValueError, match="init_process_group"):
        context_parallel(torch.nn.Linear(1, 1))
