"""Configs drawn at random: each builds a model whose outputs are finite, or is refused with the field's name.

Few and always the same in the quick tier, more in the slow one. `FUZZ_EXAMPLES=2000` asks for more; hypothesis prints
what to paste in where one fails.
"""

import dataclasses
import inspect
import math
import os

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.tiny_models import TINY

QUICK, SLOW = 25, int(os.environ.get("FUZZ_EXAMPLES", "150"))
# Values of each kind of field: ordinary ones, and those that must be refused wherever they cannot be.
SIZES = st.sampled_from([1, 2, 3, 4, 6, 8, 16, 24, 0, -1, None])
RATES = st.sampled_from([0.0, 0.1, 0.5, 1.0, -0.5, math.nan, math.inf, "a", None])
EPSILONS = st.sampled_from([1e-12, 1e-5, 0.1, -1.0, -1e-5, math.nan, math.inf, "a", None])
NAMES = st.sampled_from(["relu", "gelu", "silu", "tanh", "nope", "", 3, None])
FLAGS = st.sampled_from([True, False])
ANYTHING = st.sampled_from([1.5, math.nan, "text", [], {}, True, -(10**9)])
PATTERNS = st.recursive(
    st.one_of(
        st.builds(lambda window: {"type": "local", "window": window}, st.integers(-1, 9)),
        st.builds(lambda stride: {"type": "strided", "stride": stride}, st.integers(0, 9)),
        st.builds(lambda block, summary: {"type": "fixed", "block": block, "summary": summary}, SIZES, SIZES),
        st.builds(lambda count: {"type": "sink", "count": count}, SIZES),
        st.sampled_from([{"type": "full"}, {"type": "nope"}, {"type": "local"}, {}, 3]),
    ),
    lambda inner: st.builds(
        lambda kind, parts: {"type": kind, "patterns": parts},
        st.sampled_from(["union", "per_head"]),
        st.lists(inner, min_size=0, max_size=3),
    ),
    max_leaves=4,
)
ROTARY = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "dynamic", "yarn", "llama3", "longrope", "nope"])},
    optional={
        "rope_theta": st.sampled_from([10000.0, 1, 0, -1.0, math.nan, math.inf, "a", None]),
        "factor": st.sampled_from([1.0, 2.0, 8, 0.5, math.nan, "a", None]),
        "low_freq_factor": st.sampled_from([1.0, 0, "a"]),
        "high_freq_factor": st.sampled_from([4.0, 1.0, "a"]),
        "original_max_position_embeddings": st.sampled_from([16, 64, 0, "a"]),
        "partial_rotary_factor": st.sampled_from([0.5, 1.0, 0.0, 2.0, math.nan, "a"]),
        "beta_fast": st.sampled_from([32, 0, "a"]),
        "attention_factor": st.sampled_from([1.0, -1.0, math.nan, "a"]),
        "short_factor": st.sampled_from([[1.0] * 4, [1.0], [0.0] * 4, "a"]),
        "long_factor": st.sampled_from([[2.0] * 4, [-2.0] * 4, 3]),
    },
)
BY_NAME = {"attention_patterns": PATTERNS, "rope_parameters": ROTARY, "hidden_act": NAMES}
LEFT_ALONE = {"vocab_size", "dtype", "problem_type", "output_attentions", "output_hidden_states", "return_dict"}


def values_of(field: dataclasses.Field) -> st.SearchStrategy:
    """What a field is tried with."""
    if field.name in BY_NAME:
        return BY_NAME[field.name]
    if field.name.endswith("_eps"):
        return EPSILONS
    kinds = {bool: FLAGS, int: SIZES, float: RATES, str: st.sampled_from([field.default, "nope", "", None])}
    for kind, values in kinds.items():
        if type(field.default) is kind or (field.default is None and kind.__name__ in str(field.type)):
            return st.one_of(values, ANYTHING) if kind is not bool else values
    return ANYTHING


def own_fields(model_type: str) -> dict[str, st.SearchStrategy]:
    """The fields that a config has beyond those of every config."""
    config_class = CONFIG_MAPPING[model_type]
    ours = [cls for cls in config_class.__mro__ if "modeling" in cls.__module__ and "configuration_" in cls.__module__]
    ours = [cls for cls in ours if not cls.__module__.startswith("transformers")]
    names = {name for cls in ours for name in inspect.get_annotations(cls)}
    return {
        field.name: values_of(field)
        for field in dataclasses.fields(config_class)
        if field.name in names - LEFT_ALONE and not field.name.endswith("token_id") and field.name[0] != "_"
    }


def check(model_type: str, changes: dict) -> None:
    try:
        config = AutoConfig.for_model(model_type, **{**TINY[model_type].config, **changes})
        model = AutoModel.from_config(config).eval()
    except (ValueError, StrictDataclassError) as error:
        check_named(model_type, str(error))
        return
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            outputs = model(**TINY[model_type].inputs())
    except ValueError as error:
        check_named(model_type, str(error))
        return
    for name, tensor in outputs.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            assert torch.isfinite(tensor).all(), f"{name} is not finite"


def check_named(model_type: str, said: str) -> None:
    """An error names what is wrong: a field, or a pattern."""
    fields = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    words = fields | set(CONFIG_MAPPING[model_type].attribute_map) | {"attern", "max_position_embeddings"}
    assert any(word in said for word in words), f"no field is named: {said}"


def fuzz(model_type: str, examples: int) -> None:
    fields = own_fields(model_type)
    some = st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=4, unique=True)
    drawn = some.flatmap(lambda names: st.fixed_dictionaries({name: fields[name] for name in names}))

    @settings(
        max_examples=examples,
        derandomize=examples == QUICK,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn)
    def try_one(changes):
        check(model_type, changes)

    try_one()


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_configs_build_or_are_refused(model_type):
    fuzz(model_type, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(TINY))
def test_many_configs_build_or_are_refused(model_type):
    fuzz(model_type, SLOW)


def test_fields_are_found():
    fields = own_fields("rope_decoder")
    assert {"hidden_act", "rope_parameters", "rms_norm_eps", "num_key_value_heads", "attention_patterns"} <= set(fields)
