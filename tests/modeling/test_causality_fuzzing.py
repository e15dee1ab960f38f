"""Decoders drawn at random: what comes later changes nothing before it, and padding changes no real token.

How to draw others: tests/fuzzing.py. Known and documented (docs/systems/transformer_xl.md): under `segment_length`,
padding on the left moves the borders of segments, so that is not drawn here.
"""

import pytest
import torch
from hypothesis import strategies as st
from transformers import AutoModelForMaskedLM

from hf_tfamily.modeling.configuration_vanilla_transformer import POSITION_ENCODINGS
from tests.fuzzed_decoders import DECODERS, IDS, Decoder, call, decoders, is_refusal
from tests.fuzzed_patterns import sequences
from tests.fuzzing import fuzz
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.slow
each_decoder = pytest.mark.parametrize(("name", "head"), DECODERS, ids=lambda x: getattr(x, "__name__", x))
CLOSE = {"rtol": 1e-6, "atol": 1e-8}
SEEDS = st.integers(0, 9)


def check_causality(decoder: Decoder, length: int, place: int, segment: int | None, seed: int) -> None:
    if decoder.recurrent:
        decoder = decoder._replace(fields={**decoder.fields, "segment_length": segment})
    model, ids = decoder.build(seed), torch.randint(1, IDS, (2, length))
    changed = ids.clone()
    changed[:, place:] = torch.randint(1, IDS, changed[:, place:].shape)
    try:
        given = decoder.inputs(model, 2, seed)
        logits, others = (call(model, decoder, each, None, given).logits for each in (ids, changed))
    except ValueError as error:
        if not is_refusal(decoder, error):
            raise
        return
    torch.testing.assert_close(others[:, :place], logits[:, :place], **CLOSE)
    assert not torch.isnan(logits).any()


@each_decoder
def test_the_future_changes_nothing(name, head):
    drawn = {"length": st.integers(1, 40), "place": st.integers(0, 30), "segment": st.sampled_from([None, 1, 5, 8])}
    fuzz(check_causality, 25, decoder=decoders(name, head), **drawn, seed=SEEDS)


def check_padding(decoder: Decoder, length: int, left: int, right: int, seed: int) -> None:
    model, ids = decoder.build(seed), torch.randint(1, IDS, (2, length))
    padded = torch.nn.functional.pad(ids, (left, right), value=3)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
    try:
        given = decoder.inputs(model, 2, seed)
        expected = call(model, decoder, ids, None, given).logits
        found = call(model, decoder, padded, mask, given).logits[:, left : left + length]
    except ValueError as error:
        if not is_refusal(decoder, error):
            raise
        return
    torch.testing.assert_close(found, expected, **CLOSE)


PADDING = {"length": st.integers(1, 30), "left": st.integers(0, 9), "right": st.integers(0, 9), "seed": SEEDS}


@each_decoder
def test_padding_changes_no_real_token(name, head):
    fuzz(check_padding, 25, decoder=decoders(name, head), **PADDING)


def test_padding_of_encoders():
    def check(fields, length, left, right, seed):
        torch.manual_seed(seed)
        model = tiny_model("vanilla_encoder", AutoModelForMaskedLM, **fields).double()
        ids = torch.randint(1, IDS, (2, length))
        padded = torch.nn.functional.pad(ids, (left, right), value=3)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
        found = model(padded, attention_mask=mask).logits[:, left : left + length]
        torch.testing.assert_close(found, model(ids).logits, **CLOSE)

    patterns = st.lists(sequences().map(lambda pattern: pattern.to_dict()), min_size=1, max_size=2)
    fields = st.fixed_dictionaries(
        {
            "position_encoding": st.sampled_from(POSITION_ENCODINGS),
            "attention_patterns": st.one_of(st.none(), patterns),
            "attn_implementation": st.sampled_from(["eager", "sdpa"]),
        }
    )
    fuzz(check, 40, fields=fields, **PADDING)
