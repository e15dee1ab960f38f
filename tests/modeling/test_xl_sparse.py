"""XLSparse equals the loops of its reference in every backend, however a text is cut, padded, cached or trained."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import hf_tfamily  # noqa: F401
from hf_tfamily.modeling.configuration_xl_sparse import XLSparseConfig
from hf_tfamily.modeling.memory_segments import SegmentMemory
from hf_tfamily.modeling.modeling_xl_sparse import (
    SparseSegmentMemory,
    XLSparseForCausalLM,
    XLSparseForSequenceClassification,
    XLSparseModel,
)
from tests.block_sparse.test_cpu import LargestTensor
from tests.reference.xl_sparse import xl_sparse

VOCAB = 11
LOCAL = {"type": "local", "window": 3}
STRIDED = {"type": "strided", "stride": 3}
FIXED = {"type": "fixed", "block": 4, "summary": 1, "sub_blocks": 2}
MERGED = {"type": "union", "patterns": [LOCAL, STRIDED]}
PATTERNS = {
    "merged": MERGED,
    "interleaved": [LOCAL, FIXED],
    "per_head": {"type": "per_head", "patterns": [MERGED, {"type": "fixed_block", "block": 4}]},
    "blind": {"type": "fixed_summary", "block": 4, "summary": 2},  # the first queries see nothing
}
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
every_backend = pytest.mark.parametrize("attention", ["block_sparse", "eager", "sdpa"])


def build(model_class=XLSparseForCausalLM, pattern="merged", attention=None, **fields):
    """A model in evaluation mode; norms and biases are random as well."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "mem_len": 30}
    fields = {**sizes, "attention_patterns": PATTERNS[pattern], "initializer_range": 0.4, **fields}
    model = model_class._from_config(XLSparseConfig(**fields), attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def tokens(*shape):
    return torch.randint(0, VOCAB, shape)


def read(model, segments, memory=None, **kwargs):
    """Hidden states or logits of consecutive segments, and the memory after them."""
    outputs = []
    for segment in segments:
        output = model(segment, past_key_values=memory, use_cache=True, **kwargs)
        memory = output.past_key_values
        outputs.append(output[0])
    return torch.cat(outputs, dim=1), memory


# -- the definition ----------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize(
    ("pattern", "fields"),
    [
        ("merged", {}),
        ("merged", {"mem_len": 5, "same_length": True, "norm_first": True}),
        ("interleaved", {"mem_len": 5, "untie_r": True, "clamp_len": 4}),
        ("per_head", {"head_dim": 3, "same_length": True, "mem_len": 6}),
        ("blind", {}),
    ],
)
def test_equals_the_loops_with_gradients(pattern, fields, attention):
    model = build(XLSparseModel, pattern, attention, **fields).double().train()
    segments = tokens(1, 13).split([5, 4, 4], dim=1)
    expected = xl_sparse(model, segments)
    direction = torch.randn_like(expected)
    parameters = list(model.parameters())
    expected_gradients = torch.autograd.grad(expected, parameters, direction)
    tolerance = 1e-10

    output, memory = read(model, segments)
    assert not memory.projected
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=0)
    for mine, theirs in zip(torch.autograd.grad(output, parameters, direction), expected_gradients):
        torch.testing.assert_close(mine, theirs, atol=10 * tolerance, rtol=tolerance)
    with torch.no_grad():
        output, memory = read(model.eval(), segments)
    assert memory.projected
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=0)


@pytest.mark.slow
@torch._dynamo.config.patch(automatic_dynamic_shapes=False)  # on the CPU, dynamic sizes do not compile with a bias
def test_flex_attention_equals_block_sparse():
    model = build(XLSparseModel, num_attention_heads=1, head_dim=16, hidden_size=16)
    segments = tokens(2, 9).split([4, 5], dim=1)
    with torch.no_grad():
        expected, _ = read(model, segments)
        model.set_attn_implementation("flex_attention")
        output, _ = read(model, segments)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


@every_pattern
@every_backend
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fields", [{}, {"mem_len": 5, "same_length": True}])
def test_segments_make_one_pass_where_the_memory_covers_the_reach(pattern, attention, training, fields):
    model = build(pattern=pattern, attention=attention, **fields).train(training)
    ids = tokens(2, 17)
    with torch.set_grad_enabled(training):
        whole = model(ids).logits
        for cut in ([5, 7, 5], [1] * 17, [16, 1]):
            pieces, _ = read(model, ids.split(cut, dim=1))
            torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=0)


def test_windows_and_blocks_need_no_longer_memory_than_they_reach():
    model = build(pattern="interleaved", attention_patterns=[LOCAL, {"type": "fixed_block", "block": 4}], mem_len=3)
    ids = tokens(2, 17)
    pieces, _ = read(model, ids.split([5, 7, 5], dim=1))
    torch.testing.assert_close(pieces, model(ids).logits, atol=1e-5, rtol=0)


@every_backend
def test_without_cover_a_query_sees_what_the_memory_has(attention):
    """Distances beyond mem_len are still met inside a long segment."""
    model = build(XLSparseModel, "merged", attention, mem_len=4).double()
    segments = tokens(1, 16).split([12, 4], dim=1)
    torch.testing.assert_close(read(model, segments)[0], xl_sparse(model, segments), atol=1e-5, rtol=0)


# -- what it costs -----------------------------------------------------------------------------------------------------


def test_block_sparse_is_the_default():
    assert build().config._attn_implementation == "block_sparse"
    assert XLSparseForCausalLM(XLSparseConfig()).config._attn_implementation == "block_sparse"


@pytest.mark.parametrize("training", [True, False])
def test_relative_keys_are_projected_for_the_distances_met_alone(training):
    model = build(XLSparseModel, mem_len=12, attention_patterns=[MERGED, LOCAL]).train(training)
    rows = []
    for layer in model.layers:
        layer.self_attn.r_proj.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    with torch.set_grad_enabled(training):
        read(model, tokens(1, 24).split(12, dim=1))
    # 0, 1, 2 and every third distance below 12, then below 24 (or 48, in advance); of the local layer those below 3
    assert rows == [6, 3, 10 if training else 18, 3]
    if not training:
        rows.clear()
        with torch.no_grad():
            _, memory = read(model, tokens(1, 24).split(12, dim=1))
            rows.clear()
            read(model, tokens(1, 9).split(1, dim=1), memory)
        assert rows == []


def test_layers_remember_as_far_as_their_patterns_reach():
    memory = SparseSegmentMemory(build(attention_patterns=[MERGED, LOCAL, FIXED], num_hidden_layers=3).config)
    assert memory.enough == [30, 2, 30]
    model = build(XLSparseModel, attention_patterns=[MERGED, LOCAL])
    _, memory = read(model, tokens(2, 12).split(4, dim=1))
    assert [layer.held for layer in memory.layers] == [12, 2]
    assert (memory.held, memory.get_seq_length()) == (12, 12)


@pytest.mark.parametrize("training", [True, False])
def test_no_tensor_is_segment_times_keys(training):
    length, mem_len = 256, 512
    pattern = {"type": "union", "patterns": [{"type": "local", "window": 8}, {"type": "strided", "stride": 64}]}
    model = build(XLSparseModel, mem_len=mem_len, attention_patterns=pattern).train(training)
    segments = tokens(1, length + mem_len).split([mem_len, length], dim=1)
    with torch.set_grad_enabled(training), LargestTensor() as largest:
        output, _ = read(model, segments)
        if training:
            output.sum().backward()
    assert largest.elements < length * (length + mem_len) / 4


# -- training ----------------------------------------------------------------------------------------------------------


@every_pattern
def test_long_inputs_are_read_in_segments_with_or_without_checkpointing(pattern):
    model = build(pattern=pattern, segment_length=4, mem_len=6).train()
    ids = tokens(2, 10)
    output = model(ids, labels=ids)
    output.loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    assert output.past_key_values.get_seq_length() == 10
    pieces, _ = read(build_like(model, segment_length=None), ids.split(4, dim=1))
    torch.testing.assert_close(output.logits, pieces)

    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids, past_key_values=SparseSegmentMemory(model.config)).loss.backward()
    for parameter, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def build_like(model, **fields):
    """A model of the same weights with another config."""
    config = copy.deepcopy(model.config)
    for name, value in fields.items():
        setattr(config, name, value)
    other = type(model)(config)
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


def test_a_step_of_training_in_bfloat16_under_autocast():
    model = build(segment_length=4).train()
    ids = tokens(2, 12)
    exact = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    torch.testing.assert_close(loss, exact, atol=0.05, rtol=0.05)


# -- generation, padding, files ----------------------------------------------------------------------------------------


@every_pattern
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_memory_equals_without(pattern, beams):
    model = build(pattern=pattern)
    options = {"max_new_tokens": 9, "num_beams": beams, "do_sample": False, "output_scores": True}
    options["return_dict_in_generate"] = True
    cached = model.generate(tokens(2, 4), **options)
    plain = model.generate(cached.sequences[:, :4], use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    assert cached.past_key_values.projected
    torch.testing.assert_close(torch.stack(cached.scores), torch.stack(plain.scores), atol=1e-4, rtol=0)


@every_pattern
@every_backend
def test_left_padding_changes_nothing(pattern, attention):
    model = build(pattern=pattern, attention=attention, pad_token_id=0)
    ids = tokens(2, 6).clamp(min=1)
    alone = model.generate(ids[:1, 2:], max_new_tokens=8, do_sample=False)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    padded = model.generate(ids.masked_fill(mask == 0, 0), attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(padded[0, 6:], alone[0, 4:])


@every_pattern
@every_backend
@pytest.mark.parametrize("training", [True, False])
def test_padding_inside_the_memory_is_never_seen(pattern, attention, training):
    """Row 0 ends early in its first segment and begins late in its second."""
    model = build(XLSparseModel, pattern, attention).train(training)
    ids = tokens(2, 17)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, 4:8] = 0
    with torch.set_grad_enabled(training):
        first = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
        second = model(ids[:, 6:11], attention_mask=mask, past_key_values=first.past_key_values)
        third = model(ids[:, 11:], past_key_values=second.past_key_values)
        alone, _ = read(model, [ids[:1, :4], ids[:1, 8:11], ids[:1, 11:]])
        other, _ = read(model, [ids[1:, :6], ids[1:, 6:11], ids[1:, 11:]])
    seen = torch.cat([first[0][0, :4], second[0][0, 2:], third[0][0]])
    torch.testing.assert_close(seen, alone[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat([output[0][1] for output in (first, second, third)]), other[0])


@every_pattern
@every_backend
@pytest.mark.parametrize("training", [True, False])
def test_positions_outlive_the_padding_that_the_memory_has_forgotten(pattern, attention, training):
    model = build(XLSparseModel, pattern, attention, mem_len=5, same_length=True).train(training)
    ids = tokens(2, 20)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    with torch.set_grad_enabled(training):
        first = model(ids[:, :6], attention_mask=mask, use_cache=True)
        rest, memory = read(model, ids[:, 6:].split([6, 7, 1], dim=1), first.past_key_values)
        alone, _ = read(model, ids[:1, 3:].split([3, 6, 7, 1], dim=1))
    assert (memory.valid, memory.forgotten_padding.tolist()) == (None, [3, 0])
    torch.testing.assert_close(torch.cat([first[0][0, 3:], rest[0]]), alone[0], atol=1e-5, rtol=0)


@every_pattern
@pytest.mark.parametrize("training", [True, False])
def test_rows_may_be_padded_by_more_than_the_memory_holds(pattern, training):
    """Then the rows' tokens stand further apart than there are keys."""
    model = build(XLSparseModel, pattern, "eager", mem_len=5).train(training)
    ids = tokens(2, 32)
    mask = torch.ones(2, 26, dtype=torch.long)
    mask[0, :24] = 0
    outputs = []
    for attention in ("eager", "block_sparse"):
        model.set_attn_implementation(attention)
        with torch.set_grad_enabled(training):
            first = model(ids[:, :26], attention_mask=mask, use_cache=True)
            rest, _ = read(model, ids[:, 26:].split([3, 2, 1], dim=1), first.past_key_values)
        outputs.append(rest)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


def test_beams_carry_their_positions_along():
    model = build(pattern="interleaved", mem_len=5)
    ids, mask = tokens(3, 8), torch.ones(3, 8, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        memory = model(ids, attention_mask=mask, use_cache=True).past_key_values
        order, more = torch.tensor([2, 0, 0]), tokens(1, 2).expand(3, 2)
        other = copy.deepcopy(memory)
        other.reorder_cache(order)
        expected = model(more, past_key_values=memory).logits[order]
        torch.testing.assert_close(model(more, past_key_values=other).logits, expected)
    memory.reset()
    assert (memory.held, memory.get_seq_length(), memory.forgotten_padding) == (0, 0, None)


def test_classifies_a_long_text_by_its_last_token():
    model = build(XLSparseForSequenceClassification, segment_length=4, pad_token_id=0, num_labels=3)
    ids = tokens(2, 10).clamp(min=1)
    ids[0, 7:] = 0
    output = model(ids, attention_mask=(ids != 0).long(), labels=torch.tensor([0, 2]))
    torch.testing.assert_close(output.logits[:1], model(ids[:1, :7]).logits, atol=1e-5, rtol=0)
    output.loss.backward()


def test_saved_models_come_back(tmp_path):
    model = build(pattern="interleaved", cutoffs=[4, 8], div_val=2)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.attention_patterns == PATTERNS["interleaved"]
    ids = tokens(1, 5)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_refuses_what_does_not_fit():
    model = build()
    with pytest.raises(ValueError, match=r"must be a sparse segment memory, .* got a SegmentMemory"):
        model(tokens(1, 3), past_key_values=SegmentMemory(model.config))
    with torch.no_grad():
        memory = model(tokens(2, 9), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="remembers a batch of 2 rows"):
        model(tokens(1, 3), past_key_values=memory)
    with pytest.raises(ValueError, match="nothing can be learnt"):
        model.train()(tokens(2, 3), past_key_values=memory)
    with pytest.raises(ValueError, match=r"\[2, 9 \+ 3\], got \[2, 3\]"):
        model.eval()(tokens(2, 3), past_key_values=memory, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="takes no position_ids"):
        model(tokens(1, 3), position_ids=torch.arange(3)[None])
    with pytest.raises(ValueError, match="does not support dropout of attention weights"):
        build(attention_dropout=0.1).train()(tokens(1, 3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mem_len": 0}, "mem_len must be at least 1, got 0"),
        ({"zero_initial_memory": True}, "zero_initial_memory=True has no meaning"),
        ({"attention_patterns": {"type": "lokal", "window": 3}}, "did you mean 'local'"),
        ({"attention_patterns": []}, "attention_patterns is an empty list"),
        (
            {"attention_patterns": {"type": "per_head", "patterns": [LOCAL] * 3}},
            "does not divide num_attention_heads=2",
        ),
        ({"attention_patterns": {"type": "window_2d", "size": 2}}, "is for pictures, not for text"),
    ],
)
def test_refuses_configs(fields, message):
    with pytest.raises(Exception, match=message):
        build(**fields)
