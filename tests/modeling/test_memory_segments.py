"""Segment memory as a Cache: what it keeps, counts, drops, reorders and refuses."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch

from hf_tfamily.modeling.memory_segments import SegmentMemory, check_memory, check_same_kind
from tests.modeling.test_cache_patterns import Copied

MEM_LEN, HEADS, DIM = 4, 2, 3
CONFIG = SimpleNamespace(mem_len=MEM_LEN, num_hidden_layers=2, zero_initial_memory=False)


def fill(memory, *lengths, rows=2):
    """Take in segments of such lengths, every entry numbered by its place; the numbers come back as [B, M]."""
    place = 0
    for length in lengths:
        numbers = torch.arange(place, place + length).float() + 100 * torch.arange(rows)[:, None]
        place += length
        for i in range(2):
            if memory.projected:
                entries = numbers[:, None, :, None].expand(-1, HEADS, -1, DIM)
                memory.update(entries, -entries, i)
            else:
                states = numbers[..., None].expand(-1, -1, DIM)
                memory.past_states(states, i)
                memory.remember(states, i)
        memory.advance(length, memory.valid_keys(None, rows, length))
    return numbers_in(memory)


def numbers_in(memory):
    first = memory.layers[0].first
    return first[..., 0][:, 0] if memory.projected else first[..., 0]


kinds = pytest.mark.parametrize("projected", [False, True])


@kinds
def test_keeps_the_last_places_and_counts_all(projected):
    memory = SegmentMemory(CONFIG, projected)
    assert (memory.held, memory.get_seq_length(), memory.get_mask_sizes(5, 0)) == (0, 0, (5, 0))
    assert fill(memory, 3)[0].tolist() == [0, 1, 2]
    assert memory.get_mask_sizes(2, 0) == (5, 0)
    memory = SegmentMemory(CONFIG, projected)
    assert fill(memory, 3, 2, 1)[1].tolist() == [102, 103, 104, 105]
    assert (memory.held, memory.get_seq_length(), memory.get_mask_sizes(2, 1)) == (4, 6, (6, 2))
    assert fill(SegmentMemory(CONFIG, projected), 9)[0].tolist() == [5, 6, 7, 8]


@kinds
def test_rows_can_be_reordered_repeated_and_selected(projected):
    memory = SegmentMemory(CONFIG, projected)
    fill(memory, 3)
    memory.valid = torch.tensor([[True, True, True], [False, True, True]])
    memory.reorder_cache(torch.tensor([1, 1]))
    assert numbers_in(memory)[:, 0].tolist() == [100, 100]
    assert not memory.valid[:, 0].any()
    memory.batch_repeat_interleave(2)
    assert (len(numbers_in(memory)), len(memory.valid)) == (4, 4)
    memory.batch_select_indices(torch.tensor([0]))
    assert (len(numbers_in(memory)), len(memory.valid)) == (1, 1)


@kinds
def test_reset_forgets_everything(projected):
    memory = SegmentMemory(CONFIG, projected)
    fill(memory, 3)
    memory.reset()
    assert (memory.held, memory.get_seq_length(), memory.valid) == (0, 0, None)
    assert fill(memory, 2, rows=5).shape == (5, 2)


@kinds
def test_zero_initial_memory_holds_zeros_that_are_no_tokens(projected):
    config = SimpleNamespace(mem_len=MEM_LEN, num_hidden_layers=2, zero_initial_memory=True)
    memory = SegmentMemory(config, projected)
    assert (memory.held, memory.get_seq_length()) == (MEM_LEN, 0)
    past = memory.past_states(torch.ones(2, 3, DIM), 0)
    assert torch.equal(past, torch.zeros(2, MEM_LEN, DIM))


@torch.no_grad()
def test_256_tokens_are_written_behind_what_is_held():
    """So many entries are copied by all steps together; a cat for each token copies 256 * (64 + 1) keys and values."""
    config = SimpleNamespace(mem_len=64, num_hidden_layers=2, zero_initial_memory=False)
    memory = SegmentMemory(config, projected=True)
    fill(memory, 64)
    numbers = torch.arange(256.0).view(1, 1, -1, 1).expand(2, HEADS, -1, DIM)
    with Copied() as copied:
        for step in range(256):
            new = numbers[:, :, step : step + 1]
            keys, _ = memory.update(new, new, 0)
            assert keys.shape[2] == 65
    assert copied.total <= 2 * numbers[:, :, :1].numel() * (256 / 16 * (64 + 16 + 1) + 256)
    assert memory.layers[0].keys[0, 0, :, 0].tolist() == list(range(192, 256))


def test_gradients_and_inference_leave_alone_what_others_read():
    memory, plain = SegmentMemory(CONFIG, projected=True), SegmentMemory(CONFIG, projected=True)
    states = torch.randn(8, 2, HEADS, 2, DIM)
    learnt = []
    for number, new in enumerate(states):
        with torch.inference_mode(number % 4 < 2), torch.set_grad_enabled(number % 4 == 3):
            new = new.clone().requires_grad_(number % 4 == 3)
            keys, values = memory.update(new, new, 0)
            learnt += [(keys * values).sum()] if number % 4 == 3 else []
        expected = plain.layers[0].append(new.detach().clone(), new.detach().clone())
        torch.testing.assert_close((keys, values), expected)
    sum(learnt).backward()


def test_hidden_states_lose_their_gradient_and_stay_as_they_were():
    memory = SegmentMemory(CONFIG)
    states = torch.randn(1, 3, DIM, requires_grad=True)
    memory.past_states(states, 0)
    memory.remember(states, 0)
    held = memory.past_states(states, 0)
    assert not held.requires_grad
    memory.remember(states, 0)
    assert held.shape[1] == 3  # what a checkpointed layer will read again is not changed


def test_padding_is_remembered_until_it_is_dropped():
    memory = SegmentMemory(CONFIG)
    states = torch.zeros(2, 3, DIM)
    new = torch.tensor([[False, True, True], [True, True, True]])
    for valid in (new, None, None):
        known = memory.valid_keys(valid, 2, 3)
        for i in range(2):
            memory.past_states(states, i)
            memory.remember(states, i)
        memory.advance(3, known)
        if valid is not None:
            assert torch.equal(memory.valid, new)
    assert memory.valid is None


def test_copies_and_files_keep_the_content():
    memory = SegmentMemory(CONFIG, projected=True)
    numbers = fill(memory, 3)
    file = io.BytesIO()
    torch.save(memory, file)
    file.seek(0)
    for other in (copy.deepcopy(memory), torch.load(file, weights_only=False)):
        assert torch.equal(numbers_in(other), numbers)
        other.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(numbers_in(memory), numbers)


def test_distances_are_projected_once():
    memory = SegmentMemory(CONFIG, projected=True)
    assert memory.reach(4) == (4, False)
    table = memory.relative_keys(0, 4, lambda: torch.zeros(HEADS, 4, DIM))
    memory.relative_keys(1, 4, lambda: torch.zeros(HEADS, 4, DIM))
    assert memory.reach(3) == memory.reach(3, 1) == (4, True)
    assert memory.relative_keys(0, 4, None).data_ptr() == table.data_ptr()
    assert memory.reach(5) == (10, False)  # and some in advance
    assert SegmentMemory(CONFIG).reach(5) == (5, False)


def test_refuses_what_does_not_fit():
    memory = SegmentMemory(CONFIG)
    fill(memory, 3)
    with pytest.raises(ValueError, match="cannot be cropped"):
        memory.crop(-1)
    with pytest.raises(ValueError, match="its batch size is 2, the segment's is 3"):
        memory.past_states(torch.zeros(3, 1, DIM), 0)
    with pytest.raises(ValueError, match=r"its dtype is torch.float32, the segment's is torch.float16"):
        memory.past_states(torch.zeros(2, 1, DIM).half(), 0)
    with pytest.raises(ValueError, match="its device is cpu, the segment's is meta"):
        check_same_kind(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, device="meta"))
    with pytest.raises(ValueError, match="must be a compressive memory"):
        check_memory(memory, "compressive")
    with pytest.raises(ValueError, match="disagree about which of the earlier tokens are padding"):
        memory.check_padding(torch.tensor([[True, True, True], [True, False, True]]))
