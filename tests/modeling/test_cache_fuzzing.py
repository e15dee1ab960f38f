"""Caches under random sequences of calls: what a decoder says is always what a pass over everything says.

Prompts in chunks, single tokens, crops, rows reordered, repeated and selected, copies, and beams, for every decoder.
How to draw others: tests/fuzzing.py.
"""

import copy

import pytest
import torch
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutput

from tests.fuzzed_decoders import DECODERS, IDS, Decoder, call, decoders, is_refusal
from tests.fuzzing import fuzz

pytestmark = pytest.mark.slow
each_decoder = pytest.mark.parametrize(("name", "head"), DECODERS, ids=lambda x: getattr(x, "__name__", x))
CLOSE = {"rtol": 1e-6, "atol": 1e-8}
MOST_TOKENS, MOST_ROWS, START = 40, 6, 2
# What caches say that cannot be cropped; the stock pair of an encoder's and a decoder's cache raises a TypeError.
REFUSALS = ("cannot be cropped", "cannot take values back", "takes back only tokens", "only defined for dynamic cache")


class Reading:
    """A decoder in the middle of rows: its cache, and all ids so far, for the pass that it is held to."""

    def __init__(self, decoder: Decoder, rows: int, padding: list[int], patterned: bool, seed: int):
        self.decoder, self.model = decoder, decoder.build(seed)
        self.given = decoder.inputs(self.model, rows, seed)
        self.ids = torch.zeros(rows, 0, dtype=torch.long)
        self.padding = torch.tensor(padding[:rows])
        self.cache = None
        if patterned and hasattr(self.model, "new_pattern_cache"):
            self.cache = self.model.new_pattern_cache()
        if hasattr(self.cache, "activate_past_recording") and seed % 4:
            self.cache.activate_past_recording()

    @property
    def mask(self) -> torch.Tensor:
        return (torch.arange(self.ids.shape[1]) >= self.padding[:, None]).long()

    def read(self, count: int) -> None:
        count = min(count, MOST_TOKENS - self.ids.shape[1])
        if count < 1:
            return
        past = self.ids.shape[1]
        self.ids = torch.cat([self.ids, torch.randint(1, IDS, (len(self.ids), count))], dim=1)
        mask = self.mask if self.padding.any() else None
        outputs = self.say(self.ids[:, past:], mask, past_key_values=self.cache, use_cache=True)
        self.cache = outputs.past_key_values
        assert self.cache.get_seq_length() == self.ids.shape[1]
        expected = self.say(self.ids, mask, use_cache=False).logits[:, past:]
        real = self.mask[:, past:].bool()
        torch.testing.assert_close(outputs.logits[real], expected[real], **CLOSE)

    def say(self, ids, mask, **options):
        return call(self.model, self.decoder, ids, mask, self.given, **options)

    def crop(self, count: int) -> None:
        count = min(count, self.ids.shape[1] - 1)
        if self._does(lambda: self.cache.crop(-count)):
            self.ids = self.ids[:, : self.ids.shape[1] - count]

    def select(self, rows: list[int], how: str) -> None:
        rows = torch.tensor([row % len(self.ids) for row in rows])
        if how == "reorder":
            rows = torch.arange(len(self.ids)).roll(int(rows[0]))
            self.cache.reorder_cache(rows)
            self._rows(rows)
        elif self._does(lambda: self.cache.batch_select_indices(rows)):
            self._rows(rows)

    def repeat(self, times: int) -> None:
        times = min(times, MOST_ROWS // len(self.ids))
        if self._does(lambda: self.cache.batch_repeat_interleave(times)):
            self._rows(torch.arange(len(self.ids)).repeat_interleave(times))

    def _does(self, change) -> bool:
        """Does the cache take a change? One that refuses says so and stays as it is."""
        try:
            change()
        except (ValueError, TypeError) as error:
            if not any(words in str(error) for words in REFUSALS):
                raise
            return False
        return True

    def _rows(self, rows: torch.Tensor) -> None:
        self.ids, self.padding = self.ids[rows], self.padding[rows]
        self.given = {name: tensor[rows] for name, tensor in self.given.items()}

    def copy(self, count: int) -> None:
        """What is read by a copy does not concern the original."""
        mine, ids = copy.deepcopy(self.cache), self.ids
        self.read(count)
        self.cache, self.ids = mine, ids


READ = st.tuples(st.just("read"), st.one_of(st.just(1), st.integers(1, 9)))
CROP = st.tuples(st.just("crop"), st.integers(0, 5))
OPERATIONS = st.one_of(
    READ,
    CROP,
    st.tuples(st.just("select"), st.lists(st.integers(0, 5), min_size=1, max_size=3), st.just("select")),
    st.tuples(st.just("select"), st.lists(st.integers(0, 5), min_size=1, max_size=1), st.just("reorder")),
    st.tuples(st.just("repeat"), st.integers(1, 3)),
    st.tuples(st.just("copy"), st.integers(1, 4)),
)


def check(decoder: Decoder, first: int, rows: int, padding: list[int], patterned: bool, operations: list, seed: int):
    if decoder.fields.get("zero_initial_memory"):  # whose zeros padding would push out, since it takes slots
        padding = [0] * 3
    try:
        reading = Reading(decoder, rows, padding, patterned, seed)
        reading.read(first)
        for name, *arguments in operations:
            getattr(reading, name)(*arguments)
            reading.read(1)
    except ValueError as error:
        if not is_refusal(decoder, error):
            raise


@each_decoder
def test_calls_in_any_order_equal_one_pass(name, head):
    # Rows without padding, or with up to so much on the left, of which the first call reads at least all but one.
    padding = st.one_of(st.just([0] * 3), st.lists(st.integers(0, 4), min_size=3, max_size=3))
    fuzz(
        check, 25, decoder=decoders(name, head), first=st.integers(1, 12), rows=st.integers(1, 3), padding=padding,
        patterned=st.booleans(), operations=st.lists(OPERATIONS, min_size=1, max_size=7), seed=st.integers(0, 9),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["rope_decoder", "sparse_transformer"])
def test_what_was_overwritten_comes_back(name):
    """Tokens are taken back from caches that forget, as assisted decoding does."""
    fuzz(
        check, 60, decoder=decoders(name, AutoModelForCausalLM), first=st.integers(5, 15), rows=st.integers(1, 2),
        padding=st.just([0] * 3), patterned=st.just(True), seed=st.sampled_from([1, 2, 3]),
        operations=st.lists(st.one_of(READ, CROP), min_size=2, max_size=6),
    )  # fmt: skip


def check_beams(decoder: Decoder, length: int, left: int, beams: int, new: int, seed: int) -> None:
    """The scores of beams are those of a pass over what they came to; so is the order of their rows."""
    left = 0 if decoder.fields.get("zero_initial_memory") else left
    model = decoder.build(seed)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.decoder_start_token_id = START
    ids = torch.randint(1, IDS, (2, length + left))
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    ids[:, 0] = START  # generate() would put it there
    prompt = {"input_ids": ids, "attention_mask": mask}
    options = {"max_new_tokens": new, "num_beams": beams, "num_return_sequences": beams, "do_sample": False}
    try:
        given = decoder.inputs(model, 2, seed)
        if decoder.crosses:
            encoded = BaseModelOutput(given["encoder_states"])
            prompt = {"encoder_outputs": encoded, "attention_mask": given["attention_mask"], "decoder_input_ids": ids}
            prompt["decoder_attention_mask"] = mask
        found = model.generate(**prompt, **options, return_dict_in_generate=True, output_scores=True)
        rows = torch.arange(2).repeat_interleave(beams)
        sequences = found.sequences
        padded = torch.cat([mask[rows], mask.new_ones(len(rows), sequences.shape[1] - mask.shape[1])], dim=1)
        given = {name: tensor[rows] for name, tensor in given.items()}
        logits = call(model, decoder, sequences[:, :-1], padded[:, :-1], given, use_cache=False).logits
    except ValueError as error:
        if not is_refusal(decoder, error):
            raise
        return
    steps = logits[:, -(sequences.shape[1] - ids.shape[1]) :].float().log_softmax(-1)
    chosen = steps.gather(2, sequences[:, ids.shape[1] :, None])[..., 0]
    torch.testing.assert_close(found.sequences_scores, chosen.mean(dim=1), rtol=1e-4, atol=1e-4)


@each_decoder
def test_beams_score_as_one_pass(name, head):
    sizes = {"length": st.integers(1, 10), "left": st.integers(0, 3), "beams": st.integers(2, 4)}
    fuzz(check_beams, 6, decoder=decoders(name, head), **sizes, new=st.integers(1, 9), seed=st.integers(0, 9))
