"""What is kept stays bounded however long a program runs, and threads that use one model at once do not disturb it.

Counted, not timed: tensors that live, their bytes, and how many entries caches hold.
"""

import functools
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_tfamily.block_sparse import attend
from hf_tfamily.modeling.attention_patterns import Fixed, Local, PerHead, RandomBlocks, Sink, Strided, Union
from tests.tiny_models import TINY, all_heads, tiny_model

LOCAL, STRIDED = {"type": "local", "window": 5}, {"type": "strided", "stride": 4}
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SYSTEMS = {  # each under block_sparse
    "sparse_transformer": {"attention_patterns": [LOCAL]},
    "memorizing_transformer": {"mem_len": 8, "memory_size": 16, "num_neighbors": 4},
    "transformer_xl": {"mem_len": 16},
    "xl_sparse": {"mem_len": 16, "attention_patterns": [{"type": "union", "patterns": [LOCAL, STRIDED]}]},
}
# Caches of our own without a bound, and why.
BY_CLASS = "by classes of models and layers, of which a program has few"
UNBOUNDED = {
    **dict.fromkeys(("_arguments", "_uses_interface", "_computing_class", "_dropout_paths"), BY_CLASS),
    "_cutter.<locals>.trimmed": "while one plan is made",
}
GENERATORS = [(name, head) for name, head in all_heads() if head in (AutoModelForCausalLM, AutoModelForSeq2SeqLM)]


def our_caches() -> list:
    return [
        found
        for found in gc.get_objects()
        if type(found) is functools._lru_cache_wrapper and found.__module__.startswith("hf_tfamily")
    ]


def test_every_cache_has_a_bound():
    caches = our_caches()
    assert len(caches) > 20
    unbounded = {cache.__qualname__ for cache in caches if cache.cache_info().maxsize is None}
    assert unbounded <= set(UNBOUNDED)


def live_tensors() -> tuple[int, int]:
    """How many there are, and their bytes; without those that an export of another test left, which have none."""
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return len(found), sum(x.untyped_storage().nbytes() for x in found)


def resident_bytes() -> int:
    """What the process holds of the machine's memory; 0 where the system does not say."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * 4096 if file.exists() else 0


def assert_flat(work: Callable[[int], None], times: int) -> None:
    """From the middle on nothing grows: caches are full by then, and the allocator has what it needs."""
    counts = []
    for start, end in ((0, times // 2), (times // 2, times)):
        for number in range(start, end):
            work(number)
        counts.append((*live_tensors(), resident_bytes()))
    (tensors, held, resident), (tensors_after, held_after, resident_after) = counts
    assert tensors_after <= 1.3 * tensors + 50, counts
    assert held_after <= 1.3 * held + (1 << 20), counts
    assert resident_after <= resident + (24 << 20), counts


def lengths(most: int) -> Iterator[int]:
    """Each in turn, so that no two calls that follow each other are alike."""
    while True:
        yield from range(1, most)


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_thousand_calls_of_generate(name):
    model = tiny_model(name, AutoModelForCausalLM, **SMALL, **SYSTEMS[name])
    model.set_attn_implementation("block_sparse")
    length = lengths(90)

    def generate(number):
        model.generate(
            torch.randint(1, 90, (1 + number % 2, next(length))), max_new_tokens=2, do_sample=number % 3 == 0
        )

    assert_flat(generate, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_two_thousand_steps_of_training(name):
    """Recurrent models hand on their memory."""
    model = tiny_model(name, AutoModelForCausalLM, **SMALL, **SYSTEMS[name]).train()
    model.set_attn_implementation("block_sparse")
    optimizer, memory, length = torch.optim.AdamW(model.parameters()), {}, lengths(70)

    def step(number):
        ids = torch.randint(1, 90, (2, 1 + next(length)))
        outputs = model(ids, labels=ids, **memory)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if TINY[name].recurrent:
            memory["past_key_values"] = outputs.past_key_values

    assert_flat(step, 2000)


@pytest.mark.slow
def test_a_thousand_lengths():
    """Every call has a plan that no earlier one had; forward and backward."""
    patterns = [
        Union([Local(9), Strided(8)]),
        PerHead([Local(5), Fixed(8, 2)]),
        Union([RandomBlocks(4, 1), Sink(2)]),
    ]

    def call(number):
        query = torch.randn(1, 2, 1 + number * 7919 % 1000, 4, requires_grad=True)  # none twice, in no order
        attend(query, query, query, patterns[number % 3], causal=True).sum().backward()

    assert_flat(call, 1000)


def prompts(name: str, count: int) -> list[dict[str, torch.Tensor]]:
    """Of different lengths, the first row padded on the left."""
    found = []
    for number in range(count):
        ids = torch.randint(1, 90, (2, 4 + 3 * number))
        mask = torch.ones_like(ids)
        mask[0, : 1 + number % 3] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "head"), GENERATORS, ids=lambda value: getattr(value, "__name__", value))
def test_four_threads_generate_what_one_does(name, head):
    """Greedily and by beams, from one model at once, all caches cold."""
    model = tiny_model(name, head)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    given = prompts(name, 8)
    ways = [{"num_beams": 1 + 2 * (number % 2), "max_new_tokens": 6, "do_sample": False} for number in range(8)]
    for backend in ("eager", "sdpa", "block_sparse"):
        model.set_attn_implementation(backend)
        try:
            expected = [model.generate(**prompt, **way) for prompt, way in zip(given, ways)]
        except ValueError as error:
            assert backend in str(error)  # noqa: PT017
            continue
        for cache in our_caches():
            cache.cache_clear()
        found, start = [None] * 8, threading.Barrier(4)

        def work(thread, found=found, start=start):
            start.wait()
            for number in range(8):
                place = (number + 2 * thread) % 8
                output = model.generate(**given[place], **ways[place])
                if found[place] is None:
                    found[place] = output
                elif not torch.equal(found[place], output):
                    found[place] = torch.zeros(0)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one, other in zip(found, expected):
            assert one is not None
            assert torch.equal(one, other)
