"""What crosses from model code to the engine: patterns and masks of any copy, by their data, and a version number."""

import logging
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from hf_tfamily.block_sparse import block_sparse_attention_forward, interface
from hf_tfamily.block_sparse.patterns import ForeignPattern, from_text, own_mask, own_pattern, to_text
from hf_tfamily.modeling import attention, attention_patterns
from hf_tfamily.modeling.attention import VisibleKeys, attend_with_lse, eager_attention_forward, lower_mask
from hf_tfamily.modeling.attention_patterns import FixedSummary, Full, Local, Pattern, PerHead, Strided, Union
from tests.copies import copy_of_modeling
from tests.hub.examples import NAMES, main_head
from tests.tiny_models import TINY, batch_for, tiny_config, tiny_model

HEADS, BATCH, LENGTH, DIM, VALUE_DIM = 4, 2, 12, 8, 6
CPU = torch.device("cpu")
PADDING = torch.ones(BATCH, LENGTH).long()
PADDING[0, :3] = 0
PACKED = torch.tensor([[*range(5), *range(7)]]).expand(BATCH, -1)


@pytest.fixture(scope="module")
def copy():
    with copy_of_modeling() as copied:
        yield copied


@dataclass(frozen=True)
class Case:
    """A call of attention: how many queries there are, and what a model's forward got."""

    queries: int = LENGTH
    causal: bool = True
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    key_length: int = LENGTH
    device_position: bool = False

    def visible(self, copied, pattern):
        """The VisibleKeys of a copy, for a pattern of it."""
        past = 0 if self.queries == LENGTH else LENGTH - self.queries
        hidden_states = torch.zeros(BATCH, self.queries, 1)
        return copied("attention").visible_keys(
            pattern,
            HEADS,
            hidden_states,
            self.attention_mask,
            self.position_ids,
            torch.tensor(past) if self.device_position else past,
            self.key_length,
            causal=self.causal,
        )

    def tokens(self):
        """[B, T] bool, which queries are tokens: what padding sees is nobody's business."""
        valid = torch.ones(BATCH, LENGTH) if self.attention_mask is None else self.attention_mask
        return valid[:, LENGTH - self.queries :].bool()


CASES = {
    "plain": Case(),
    "bidirectional": Case(causal=False),
    "padded": Case(attention_mask=PADDING),
    "padded, bidirectional": Case(attention_mask=PADDING, causal=False),
    "packed": Case(position_ids=PACKED),
    "chunk after a past": Case(queries=4),
    "one token": Case(queries=1),
    "one padded token": Case(queries=1, attention_mask=PADDING),
    "static cache": Case(queries=4, key_length=20),
    "static cache, padded": Case(queries=4, key_length=20, attention_mask=PADDING),
    "static cache, one token": Case(queries=1, key_length=20, device_position=True),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def patterns_of(copied):
    of = copied("attention_patterns")
    return {
        "per head": of.PerHead([of.Local(3), of.Union([of.Strided(4), of.FixedSummary(4, 1)])]),
        "block_2d": of.Block2D(2, 2, 1, 1).bind((4, 5, 1)),
        "intersection": of.Intersection([of.Local(7), of.Strided(2)]),
    }


def tensors(case, dtype=torch.float64):
    query = torch.randn(BATCH, HEADS, case.queries, DIM, dtype=dtype)
    key = torch.randn(BATCH, HEADS // 2, case.key_length, DIM, dtype=dtype)
    value = torch.randn(BATCH, HEADS // 2, case.key_length, VALUE_DIM, dtype=dtype)
    return query, key, value


def module_under(implementation):
    module = nn.Module().eval()
    module.config = SimpleNamespace(_attn_implementation=implementation)
    return module


def outputs_and_gradients(function, mask, case, inputs):
    """What attention gives to the queries that are tokens, and the gradients of a weighted sum of it."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = function(module_under("eager"), *leaves, mask, scaling=0.5)[0][case.tokens()]
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def assert_engine_equals_eager(seen, case, dense=None):
    inputs = tensors(case)
    ours = outputs_and_gradients(block_sparse_attention_forward, seen, case, inputs)
    law = outputs_and_gradients(eager_attention_forward, seen.dense(CPU) if dense is None else dense, case, inputs)
    for mine, expected in zip(ours, law):
        torch.testing.assert_close(mine, expected, atol=1e-9, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Masks and patterns of another copy


@each_case
@pytest.mark.parametrize("name", ["per head", "block_2d", "intersection"])
def test_masks_of_a_copy_are_computed_by_their_data(copy, case, name):
    seen = case.visible(copy, patterns_of(copy)[name])
    assert type(seen) is not VisibleKeys
    assert_engine_equals_eager(seen, case)


@pytest.mark.parametrize("name", ["per head", "block_2d", "intersection"])
def test_a_pattern_of_a_copy_becomes_the_packages(copy, name):
    ours = patterns_of(lambda _: attention_patterns)[name]
    theirs = patterns_of(copy)[name]
    assert theirs != ours
    assert own_pattern(theirs) == ours
    assert own_pattern(theirs) is own_pattern(patterns_of(copy)[name]), "worked out once"


def test_a_mask_is_translated_once_for_all_layers(copy):
    seen = CASES["padded"].visible(copy, patterns_of(copy)["per head"])
    assert own_mask(seen) is own_mask(seen)


def test_a_mask_of_the_first_seam_is_taken():
    """It has neither the version nor the fields that came later."""
    case = CASES["padded"]
    new = case.visible(lambda _: attention, PerHead([Local(3), Strided(4)]))
    later = {"global_tokens", "most_global", "memo"}
    old = SimpleNamespace(**{f.name: getattr(new, f.name) for f in fields(VisibleKeys) if f.name not in later})
    assert not hasattr(old, "seam")
    assert_engine_equals_eager(old, case, dense=new.dense(CPU))


def test_a_mask_of_a_newer_seam_is_refused(copy, monkeypatch):
    monkeypatch.setattr(copy("attention").VisibleKeys, "seam", attention.SEAM + 1)
    seen = CASES["plain"].visible(copy, patterns_of(copy)["per head"])
    with pytest.raises(ValueError, match=r"newer than the installed hf_tfamily \(seam 3, 2 is known\); upgrade"):
        assert_engine_equals_eager(seen, CASES["plain"])


def twin_of_a_copy(copied, **changes):
    """A Sparse Transformer of the copy, with weights that are not all alike."""
    model_class = copied("modeling_sparse_transformer").SparseTransformerForCausalLM
    model = model_class(model_class.config_class(**{**TINY["sparse_transformer"].config, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def test_a_model_of_a_copy_runs_on_the_installed_engine(copy, monkeypatch):
    calls, operator = [], interface.block_sparse_attention
    monkeypatch.setattr(interface, "block_sparse_attention", lambda *a, **k: calls.append(1) or operator(*a, **k))
    model = twin_of_a_copy(copy)
    assert model.config._attn_implementation == "block_sparse"
    assert_model_equals_eager(model)
    assert len(calls) == model.config.num_hidden_layers


def assert_model_equals_eager(model):
    """Logits and gradients."""
    ids, found = torch.arange(26).view(2, 13) % 90 + 1, []
    for implementation in ("block_sparse", "eager"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        logits = model(ids).logits
        logits.square().mean().backward()
        found.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    for mine, expected in zip(*found):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Somebody's own pattern


def own_class(base, name):
    """A pattern that says of itself only what is seen: keys whose position adds up with the query's, and oneself."""

    @dataclass(frozen=True)
    class Sums(base):
        type: ClassVar[str] = name
        modulus: int = 3
        remainder: int = 0

        def visible(self, head, query, key):
            return ((query + key) % self.modulus == self.remainder) | (query == key)

    return Sums


@pytest.fixture(scope="module")
def foreign(copy):
    """A class that the copy knows and the package does not."""
    made = own_class(copy("attention_patterns").Pattern, "sums")
    assert made.type not in attention_patterns.PATTERN_TYPES
    return made


def foreign_patterns(foreign, of):
    return {
        "alone": foreign(),
        "in a union": of.Union([of.Local(2), foreign(4, 1)]),
        "per head": of.PerHead([of.Strided(3), foreign(5)]),
        "in an intersection": of.Intersection([of.Local(6), foreign(2)]),
    }


@each_case
@pytest.mark.parametrize("name", ["alone", "in a union", "per head", "in an intersection"])
def test_a_pattern_that_only_a_copy_knows_is_computed_by_its_own_rule(copy, foreign, case, name):
    pattern = foreign_patterns(foreign, copy("attention_patterns"))[name]
    assert any(isinstance(inner, ForeignPattern) for inner in attention_patterns.walk(own_pattern(pattern)))
    assert_engine_equals_eager(case.visible(copy, pattern), case)


def test_known_patterns_beside_it_keep_their_cost(copy, foreign):
    union = own_pattern(foreign_patterns(foreign, copy("attention_patterns"))["in a union"])
    assert union.parts[0] == Local(2)
    mixed = own_pattern(foreign_patterns(foreign, copy("attention_patterns"))["per head"])
    assert mixed.for_head(0) == Strided(3)
    assert isinstance(mixed.for_head(1), ForeignPattern)


def test_a_model_of_a_copy_follows_a_pattern_that_only_it_knows(copy, foreign):
    patterns = [{"type": "sums", "modulus": 4}, {"type": "local", "window": 3}]
    model = twin_of_a_copy(copy, attention_patterns=patterns)
    assert model.config._attn_implementation == "block_sparse"
    assert_model_equals_eager(model)


def test_many_such_patterns_are_kept_apart(copy, foreign):
    """Each has a number of its own in the operators, also when the backward comes long after."""
    case = Case()
    inputs = tensors(case)
    waiting = []
    for modulus in range(1, 71):
        seen = case.visible(copy, foreign(modulus))
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = block_sparse_attention_forward(module_under("eager"), *leaves, seen, scaling=0.5)[0]
        waiting.append((seen, leaves, output))
    for modulus in range(1000, 1300):  # more than any cache holds
        assert_engine_equals_eager(case.visible(copy, foreign(modulus)), case) if modulus % 50 == 0 else (
            block_sparse_attention_forward(module_under("eager"), *inputs, case.visible(copy, foreign(modulus)))
        )
    for seen, leaves, output in waiting:
        output.square().sum().backward()
        others = [tensor.clone().requires_grad_() for tensor in inputs]
        law = eager_attention_forward(module_under("eager"), *others, seen.dense(CPU), scaling=0.5)[0]
        law.square().sum().backward()
        torch.testing.assert_close(output, law, atol=1e-9, rtol=0)
        for mine, expected in zip(leaves, others):
            torch.testing.assert_close(mine.grad, expected.grad, atol=1e-9, rtol=0)


def test_two_classes_of_one_name_are_kept_apart(copy):
    """Of two checkpoints, each with a class of its author's own: the dicts are equal, the rules are not."""
    base = copy("attention_patterns").Pattern
    first = own_class(base, "sums_too")
    copy("attention_patterns").PATTERN_TYPES.pop("sums_too")

    @dataclass(frozen=True)
    class Second(base):
        type: ClassVar[str] = "sums_too"
        modulus: int = 3
        remainder: int = 0

        def visible(self, head, query, key):
            return query - key < self.modulus

    case = Case()
    for pattern in (first(), Second(), first()):
        assert_engine_equals_eager(case.visible(copy, pattern), case)


def test_a_field_that_the_package_does_not_know_is_not_left_out(copy):
    """A newer copy's Local may have one more."""
    base = copy("attention_patterns").Local

    @dataclass(frozen=True)
    class Local(base):
        skip: int = 0

        def visible(self, head, query, key):
            return super().visible(head, query, key) & (query - key >= self.skip)

    case = Case()
    pattern = Local(window=5, skip=2)
    assert pattern.to_dict() == {"type": "local", "window": 5, "skip": 2}
    assert_engine_equals_eager(case.visible(copy, pattern), case)


@pytest.fixture
def of_the_package():
    """A class of a user's own, derived from the package's Pattern."""
    yield own_class(Pattern, "own_sums")
    del attention_patterns.PATTERN_TYPES["own_sums"]


@each_case
def test_a_class_derived_from_the_packages_pattern_works(of_the_package, case):
    for pattern in (of_the_package(), Union([Local(2), of_the_package(4, 1)]), PerHead([Full(), of_the_package(5)])):
        assert_engine_equals_eager(case.visible(lambda _: attention, pattern), case)


def test_a_field_that_would_be_taken_for_a_fact_is_refused():
    """A plan that believed it would be wrong."""
    with pytest.raises(TypeError, match=r"Every\.period is the name of a fact that patterns tell; choose another"):

        @dataclass(frozen=True)
        class Every(Pattern):
            type: ClassVar[str] = "every"
            period: int = 3

    assert "every" not in attention_patterns.PATTERN_TYPES


def test_a_class_that_is_defined_anew_has_its_new_rule():
    """As in a notebook whose cell is run again."""
    case = Case()
    try:
        for shift in (0, 1, 0):

            @dataclass(frozen=True)
            class Edited(Pattern):
                type: ClassVar[str] = "edited"
                window: int = 3

                def visible(self, head, query, key, shift=shift):
                    return (query - key < self.window + shift) & (key <= query)

            for pattern in (Edited(), Union([Strided(4), Edited(2)])):
                assert_engine_equals_eager(case.visible(lambda _: attention, pattern), case)
    finally:
        del attention_patterns.PATTERN_TYPES["edited"]


def test_texts_of_another_process_name_patterns_by_what_they_say(of_the_package, foreign):
    """An exported program outlives the numbers of the process that made it."""
    pattern = Union([Local(2), of_the_package(4, 1)])
    number, described = to_text(pattern).split(" ", 1)
    assert from_text(f"{number} {described}") is pattern
    assert from_text(f"{int(number) + 1000} {described}") == pattern
    _, described = to_text(own_pattern(foreign(7))).split(" ", 1)
    with pytest.raises(ValueError, match="Unknown pattern type 'sums'"):
        from_text(f"0 {described}")


# ---------------------------------------------------------------------------------------------------------------------
# Which engine is there


def older(module, query, key, value, attention_mask, **kwargs):
    raise AssertionError("an older engine must not be asked")


@pytest.fixture(params=["none", "without a version", "older"])
def engine(request, monkeypatch):
    """What is registered in place of the engine, and what a refusal then asks for."""
    found = AttentionInterface._global_mapping  # register() only adds
    if request.param == "none":
        monkeypatch.delitem(found, "block_sparse")
        return "`import hf_tfamily` before loading the model; see https"
    monkeypatch.setitem(found, "block_sparse", fake := lambda *a, **k: older(*a, **k))
    if request.param == "older":
        fake.version = 1
        return "`import hf_tfamily` in a version that speaks seam 2 .upgrade it: what is there speaks seam 1"
    return "`import hf_tfamily` before loading the model; see https"


@pytest.fixture
def log(caplog):
    """Warnings of modeling/, said anew."""
    logging.Logger.warning_once.cache_clear()
    yield caplog
    logging.Logger.warning_once.cache_clear()


FOLLOWING = dict.fromkeys(NAMES, ()) | dict.fromkeys(
    ("rope_decoder", "vanilla_encoder", "vanilla_transformer"), (("attention_patterns", [Local(4).to_dict()]),)
)


def answers(model, name, implementation):
    model.set_attn_implementation(implementation)
    torch.manual_seed(1)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return model(**batch_for(name, main_head(name), labels=False))[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_system_runs_without_an_engine(engine, name):
    torch.manual_seed(0)
    model = tiny_model(name, main_head(name), **dict(FOLLOWING[name]))
    assert model.config._attn_implementation == "sdpa"
    expected = answers(model, name, "eager")
    for implementation in ("sdpa", "flex_attention") if model._supports_flex_attn else ("sdpa",):
        torch.testing.assert_close(answers(model, name, implementation), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_block_sparse_is_refused_without_an_engine(engine, name):
    with pytest.raises(ImportError, match=engine):
        main_head(name).from_config(tiny_config(name), attn_implementation="block_sparse")
    model = tiny_model(name, main_head(name))
    with pytest.raises(ImportError, match=engine):
        model.set_attn_implementation("block_sparse")
    assert model.config._attn_implementation == "sdpa"


def test_the_default_says_once_what_it_costs(engine, log):
    for _ in range(2):
        for name in NAMES:
            tiny_model(name, main_head(name), **dict(FOLLOWING[name]))
    said = [record.getMessage() for record in log.records if "N x N" in record.getMessage()]
    assert len(said) == 1
    assert "under sdpa" in said[0]
    assert "`import hf_tfamily`" in said[0]
    assert attention.PROJECT in said[0]


def test_models_without_patterns_say_nothing(engine, log):
    for name in ("rope_decoder", "vanilla_encoder", "vanilla_transformer", "transformer_xl"):
        tiny_model(name, main_head(name))
    assert not log.records


def test_with_the_engine_patterns_run_on_it(log):
    for name in NAMES:
        follows = getattr(tiny_config(name, **dict(FOLLOWING[name])), "attention_patterns", None) is not None
        wanted = "block_sparse" if follows else "sdpa"
        assert tiny_model(name, main_head(name), **dict(FOLLOWING[name])).config._attn_implementation == wanted
    assert not log.records
    assert ALL_ATTENTION_FUNCTIONS["block_sparse"] is block_sparse_attention_forward
    assert block_sparse_attention_forward.version == attention.SEAM


# ---------------------------------------------------------------------------------------------------------------------
# The log-sum-exp


def with_lse(implementation, seen, case, inputs):
    """Output and log-sum-exp of the tokens, and the gradients of a weighted sum of both."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    mask = lower_mask(seen, implementation, CPU)
    output, lse = attend_with_lse(module_under(implementation), *leaves, mask, scaling=0.5)
    assert lse.shape == (BATCH, HEADS, case.queries)
    output, lse = output[case.tokens()], lse.transpose(1, 2)[case.tokens()]
    finite = lse[lse.isfinite()]
    weights = torch.linspace(-1, 2, finite.numel(), dtype=finite.dtype)
    loss = (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() + (finite * weights).sum()
    loss.backward()
    return [output.detach(), lse.detach(), *(leaf.grad for leaf in leaves)]


LSE_PATTERNS = {
    "full": Full(),
    "per head": PerHead([Local(3), Strided(4)]),
    "union": Union([Local(3), FixedSummary(4, 1)]),
    "blind rows": FixedSummary(5, 1),
}


@each_case
@pytest.mark.parametrize("name", LSE_PATTERNS)
def test_log_sum_exp_of_the_engine_equals_eager(case, name):
    seen, inputs = case.visible(lambda _: attention, LSE_PATTERNS[name]), tensors(case)
    for mine, expected in zip(*(with_lse(backend, seen, case, inputs) for backend in ("block_sparse", "eager"))):
        torch.testing.assert_close(mine, expected, atol=1e-9, rtol=0)


def test_eager_hands_out_what_the_weights_were_divided_by():
    case = CASES["padded"]
    seen, (query, key, value) = case.visible(lambda _: attention, LSE_PATTERNS["union"]), tensors(case)
    _, weights = eager_attention_forward(module_under("eager"), query, key, value, seen.dense(CPU), scaling=0.5)
    _, lse = attend_with_lse(module_under("eager"), query, key, value, seen.dense(CPU), scaling=0.5)
    scores = query @ key.repeat_interleave(2, dim=1).mT * 0.5
    by_hand = torch.where(seen.dense(CPU), (scores - lse[..., None]).exp(), 0.0)
    torch.testing.assert_close(weights, by_hand.nan_to_num(0.0))


def test_a_row_that_sees_nothing_has_a_log_sum_exp_of_minus_infinity():
    case = Case()
    for implementation in ("eager", "block_sparse"):
        seen = case.visible(lambda _: attention, LSE_PATTERNS["blind rows"])
        lse = with_lse(implementation, seen, case, tensors(case))[1]
        lse = lse.view(BATCH, LENGTH, HEADS)
        assert (lse[:, :4] == float("-inf")).all()
        assert lse[:, 4:].isfinite().all()


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_others_hand_out_no_log_sum_exp(implementation):
    case = Case()
    with pytest.raises(ValueError, match=f"'{implementation}' hands out no log-sum-exp; use 'eager' or 'block_sparse'"):
        with_lse(implementation, case.visible(lambda _: attention, Local(3)), case, tensors(case))


# ---------------------------------------------------------------------------------------------------------------------
# Global tokens


def loops(seen, pattern):
    """[B, H, T, S]: pattern or a global token on either side, and causality, padding and packing."""
    table = torch.zeros(BATCH, HEADS, seen.query_length, seen.key_length, dtype=torch.bool)
    slots = torch.arange(seen.key_length).expand(BATCH, -1).tolist()
    positions = slots if seen.key_positions is None else seen.key_positions.tolist()
    documents = torch.zeros(BATCH, seen.key_length) if seen.key_documents is None else seen.key_documents
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(size) for size in table.shape)).tolist():
        place = seen.query_offset + i
        query, key = positions[b][place], positions[b][j]
        shown = pattern.visible(h, query, key) or seen.global_tokens[b, place] or seen.global_tokens[b, j]
        ordered = not seen.causal or key <= query
        valid = seen.key_valid is None or seen.key_valid[b, j]
        table[b, h, i, j] = bool(shown and ordered and valid and documents[b, place] == documents[b, j])
    return table


@pytest.mark.parametrize("name", ["plain", "bidirectional", "padded, bidirectional", "packed", "chunk after a past"])
def test_global_tokens_see_and_are_seen(name):
    case, pattern = CASES[name], PerHead([Local(2), Strided(5)])
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    tokens[0, 4] = tokens[1, 0] = tokens[1, 9] = True
    plain = case.visible(lambda _: attention, pattern)
    values = {f.name: getattr(plain, f.name) for f in fields(VisibleKeys) if f.init}
    seen = VisibleKeys(**{**values, "global_tokens": tokens})
    expected = loops(seen, pattern)
    assert not torch.equal(expected, plain.dense(CPU).expand_as(expected))
    assert torch.equal(seen.dense(CPU).expand_as(expected), expected)
    sizes = (BATCH, HEADS, seen.query_length, seen.key_length)
    assert torch.equal(create_mask(seen.mask_mod(), *sizes, device="cpu"), expected)
    blocks = seen.block_mask(CPU)
    assert torch.equal(create_mask(blocks.mask_mod, *sizes, device="cpu"), expected)
    partial = blocks.kv_num_blocks.expand(BATCH, HEADS, -1)
    full = blocks.full_kv_num_blocks.expand(BATCH, HEADS, -1)
    assert torch.equal((partial + full)[..., 0] > 0, expected.any(-1).any(-1))
    assert not seen.is_plain
    assert_engine_equals_eager(seen, case)
