"""Small decoders drawn at random, of every system, with whatever changes who sees whom: what fuzzing tests share."""

import math
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from hf_tfamily.auto import SYSTEMS
from hf_tfamily.modeling.configuration_compressive_transformer import COMPRESSIONS
from hf_tfamily.modeling.configuration_rope_decoder import POSITION_ENCODINGS as ROPE_ENCODINGS
from hf_tfamily.modeling.configuration_vanilla_transformer import POSITION_ENCODINGS as VANILLA_ENCODINGS
from tests.fuzzed_patterns import HEADS, sequences
from tests.tiny_models import TINY, tiny_config

GENERATORS = (AutoModelForCausalLM, AutoModelForSeq2SeqLM)
DECODERS = [(system.name, head) for system in SYSTEMS for head in system.heads if head in GENERATORS]
POSITIONS = 64  # most that a row may have
IDS = 90  # ordinary ones are from 1 to below this
RECURRENT = [name for name in TINY if TINY[name].recurrent]


class Decoder(NamedTuple):
    """A system, its head, fields of its config, and what computes attention."""

    name: str
    head: type
    fields: dict[str, Any]
    backend: str

    @property
    def recurrent(self) -> bool:
        return self.name in RECURRENT

    @property
    def crosses(self) -> bool:
        return self.head is AutoModelForSeq2SeqLM

    def build(self, seed: int) -> PreTrainedModel:
        """With weights so large that what is seen shows."""
        torch.manual_seed(seed)
        config = tiny_config(self.name, **self.fields)
        model = self.head.from_config(config).eval().double()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
        model.set_attn_implementation(self.backend)
        return model

    def inputs(self, model: PreTrainedModel, rows: int, seed: int) -> dict[str, torch.Tensor]:
        """What a decoder is given beside its own ids: nothing, or what an encoder has read of a padded source."""
        if not self.crosses:
            return {}
        torch.manual_seed(seed)
        sides = self.fields.get("source_image_size", [7])  # a picture has all of its values
        source = torch.randint(1, IDS, (rows, math.prod(sides) * self.fields.get("num_channels", 1)))
        mask = torch.ones_like(source)
        if self.name in ("universal_transformer", "vanilla_transformer"):
            mask[0, 5:] = 0
        with torch.no_grad():
            states = model.get_encoder()(input_ids=source, attention_mask=mask).last_hidden_state
        return {"encoder_states": states, "attention_mask": mask}


def call(
    model: PreTrainedModel, decoder: Decoder, ids: torch.Tensor, mask: torch.Tensor | None, given: dict, **options
):
    """A forward pass over the decoder's ids [B, T], of which `mask` [B, past + T] says what is no padding."""
    with torch.no_grad():
        if not decoder.crosses:
            return model(input_ids=ids, attention_mask=mask, **options)
        encoded = (given["encoder_states"],)
        padding = {"attention_mask": given["attention_mask"], "decoder_attention_mask": mask}
        return model(encoder_outputs=encoded, decoder_input_ids=ids, **padding, **options)


def _patterns(draw) -> list[dict]:
    return [pattern.to_dict() for pattern in draw(st.lists(sequences(), min_size=1, max_size=2))]


def _rope(draw) -> dict:
    rotary = st.sampled_from([{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}])
    return {
        "position_encoding": draw(st.sampled_from(ROPE_ENCODINGS)),
        "num_key_value_heads": draw(st.sampled_from([1, 2, HEADS])),
        "rotary_layout": draw(st.sampled_from(["half", "interleaved"])),
        "rope_parameters": {"rope_theta": 100.0, **draw(rotary)},
        "attention_patterns": draw(st.sampled_from([None, ...])) and _patterns(draw),
    }


def _sparse(draw) -> dict:
    return {
        "position_shape": draw(st.sampled_from([[64], [8, 8]])),
        "attention_patterns": _patterns(draw),
        "norm": draw(st.sampled_from(["layer", "rms"])),
        "output_vocab_size": draw(st.sampled_from([None, IDS])),
    }


def _vanilla(draw) -> dict:
    return {
        "position_encoding": draw(st.sampled_from(VANILLA_ENCODINGS)),
        "norm_first": draw(st.booleans()),
        "max_relative_position": draw(st.integers(1, 20)),
        "attention_patterns": draw(st.sampled_from([None, ...])) and _patterns(draw),
        "eos_token_id": None,
    }


def _universal(draw) -> dict:
    return {**_vanilla(draw), "adaptive": draw(st.booleans()), "num_hidden_layers": draw(st.integers(1, 4))}


def _spans(draw) -> dict:
    longest = draw(st.integers(1, 2 * POSITIONS))
    rope = {**_rope(draw), "position_encoding": draw(st.sampled_from(["rotary", "none"]))}
    spans = {"max_span": longest, "initial_span": draw(st.integers(0, longest)), "span_ramp": draw(st.integers(1, 40))}
    return {**rope, **spans}


def _image(draw) -> dict:
    block = {"type": "block_2d", "height": 4, "width": 2, "flange_height": 2, "flange_width": 1}
    patterns = draw(st.sampled_from([block, {"type": "block_1d", "block": 7, "flange": 3}, None]))
    mixed = draw(st.booleans())
    channels = draw(st.sampled_from([1, 3] if mixed else [1]))
    return {
        "attention_patterns": patterns or _patterns(draw),
        "output": "logistic_mixture" if mixed else "categorical",
        "num_channels": channels,
        "num_classes": draw(st.sampled_from([0, 3])),
        "num_values": IDS,
        "num_mixtures": 2,
        "image_size": [8, 8] if channels == 1 else [5, 4],
        "source_image_size": [8, 8] if channels == 1 else [2, 2],
    }


def _xl(draw) -> dict:
    # Memories that lose nothing, not even zeros, or queries that see as much whatever the memory.
    same_length = draw(st.booleans())
    return {
        "mem_len": draw(st.integers(1, 9)) if same_length else POSITIONS,
        "same_length": same_length,
        "untie_r": draw(st.booleans()),
        "clamp_len": draw(st.sampled_from([None, 5])),
        "norm_first": draw(st.booleans()),
        "zero_initial_memory": same_length and draw(st.booleans()),
        **draw(st.sampled_from([{}, {"cutoffs": [20, 50], "div_val": 2}, {"embedding_size": 24}])),
    }


def _compressive(draw) -> dict:
    small = {"mem_len": POSITIONS, "compressed_mem_len": 4, "compression_rate": draw(st.integers(1, 4))}
    return {**small, "compression": draw(st.sampled_from(COMPRESSIONS)), "clamp_len": draw(st.sampled_from([None, 5]))}


def _memorizing(draw) -> dict:
    # A short memory that loses nothing: how a text is cut changes what is in the store.
    store = {"memory_size": draw(st.sampled_from([0, 9])), "num_neighbors": draw(st.integers(1, 9))}
    order = {"untie_r": draw(st.booleans()), "norm_first": draw(st.booleans())}
    return {"mem_len": POSITIONS, "memory_layer": draw(st.integers(0, 1)), **store, **order}


def _xl_sparse(draw) -> dict:
    return {"mem_len": POSITIONS, "attention_patterns": _patterns(draw), "untie_r": draw(st.booleans())}


FIELDS = {
    "adaptive_span": _spans,
    "compressive_transformer": _compressive,
    "image_transformer": _image,
    "memorizing_transformer": _memorizing,
    "rope_decoder": _rope,
    "sparse_transformer": _sparse,
    "transformer_xl": _xl,
    "universal_transformer": _universal,
    "vanilla_transformer": _vanilla,
    "xl_sparse": _xl_sparse,
}


@st.composite
def decoders(draw, name: str, head: type) -> Decoder:
    """Of one system and head."""
    return Decoder(name, head, FIELDS[name](draw), draw(st.sampled_from(["eager", "sdpa", "block_sparse"])))


def is_refusal(decoder: Decoder, error: ValueError) -> bool:
    """Does an error say that this backend cannot do it, and which can; or that pictures are never padded?"""
    said = str(error)
    padding = "takes no padding" in said or "takes no position_ids" in said
    return padding or (f"attn_implementation='{decoder.backend}'" in said and "'eager'" in said)
