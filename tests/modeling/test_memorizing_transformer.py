"""The Memorizing Transformer equals the loops of its reference; its store holds what it should, and nothing else."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from transformers import AutoModelForCausalLM

import hf_tfamily  # noqa: F401
from hf_tfamily.modeling import modeling_memorizing_transformer as modeling
from hf_tfamily.modeling.configuration_memorizing_transformer import MemorizingTransformerConfig
from hf_tfamily.modeling.memory_segments import SegmentMemory
from hf_tfamily.modeling.modeling_memorizing_transformer import (
    MemorizingMemory,
    MemorizingTransformerForCausalLM,
    MemorizingTransformerModel,
    Store,
    empty_store,
    recall,
)
from hf_tfamily.recurrent_training import load_memory, save_memory
from tests.reference.memorizing_transformer import memorizing_transformer

VOCAB = 11
CUTS = [4, 3, 5, 1, 1, 7]


def build(model_class=MemorizingTransformerForCausalLM, attention="sdpa", **fields):
    """A small model in evaluation mode; norms, biases and gates are random as well."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    memory = {"mem_len": 3, "memory_size": 6, "num_neighbors": 2, "initializer_range": 0.4}
    config = MemorizingTransformerConfig(**{**sizes, **memory, **fields})
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def tokens(*shape):
    return torch.randint(0, VOCAB, shape)


def read(model, segments, memory=None, mask=None):
    """First outputs of consecutive segments, and the memory after them."""
    outputs, end = [], 0
    for segment in segments:
        end += segment.shape[1]
        seen = None if mask is None else mask[:, :end]
        output = model(segment, past_key_values=memory, use_cache=True, attention_mask=seen)
        outputs.append(output[0])
        memory = output.past_key_values
    return torch.cat(outputs, dim=1), memory


# -- the paper ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm_first": True, "untie_r": True, "memory_layer": 0},
        {"memory_size": 40, "num_neighbors": 40},  # everything there is
        {"memory_size": 1, "num_neighbors": 1, "clamp_len": 4},
        {"memory_size": 0},
        {"mem_len": 1, "memory_size": 3, "num_neighbors": 3, "num_hidden_layers": 1},
    ],
    ids=str,
)
def test_equals_the_loops_with_gradients(fields):
    model = build(MemorizingTransformerModel, **fields).double().train()
    segments = tokens(2, sum(CUTS)).split(CUTS, dim=1)
    expected = memorizing_transformer(model, segments)
    output, memory = read(model, segments)
    assert memory.get_seq_length() == sum(CUTS)
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)

    direction, parameters = torch.randn_like(expected), list(model.parameters())
    mine = torch.autograd.grad((output * direction).sum(), parameters)
    theirs = torch.autograd.grad((expected * direction).sum(), parameters, allow_unused=True)
    for gradient, other in zip(mine, theirs):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if other is None else other)
    with torch.no_grad():
        output, memory = read(model.eval(), segments)
    assert memory.projected
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "block_sparse"])
def test_backends_agree(attention):
    segments = tokens(2, sum(CUTS)).split(CUTS, dim=1)
    model = build(attention=attention)
    with torch.no_grad():
        torch.testing.assert_close(read(model, segments)[0], read(build(), segments)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@torch._dynamo.config.patch(automatic_dynamic_shapes=False)  # on the CPU, dynamic sizes do not compile with a bias
def test_flex_attention_agrees():
    sizes = {"num_attention_heads": 1, "head_dim": 16, "hidden_size": 16}
    segments = tokens(2, 9).split([4, 5], dim=1)
    with torch.no_grad():
        found, expected = (read(build(attention=name, **sizes), segments)[0] for name in ("flex_attention", "sdpa"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_an_empty_store_changes_nothing_and_gives_every_parameter_a_gradient():
    model = build().train()
    ids = tokens(2, 3)
    before = model(ids).logits
    model.model.layers[1].self_attn.gate.bias.data.fill_(9.0)
    assert torch.equal(model(ids).logits, before)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert not model.model.layers[1].self_attn.gate.bias.grad.any()


def test_a_closed_gate_is_a_model_without_a_store():
    ids = tokens(2, 20).split(5, dim=1)
    model, without = build(), build(memory_size=0)
    assert not torch.allclose(read(model, ids)[0], read(without, ids)[0], atol=1e-3)
    model.model.layers[1].self_attn.gate.bias.data.fill_(-200.0)
    torch.testing.assert_close(read(model, ids)[0], read(without, ids)[0])


def test_nothing_is_learnt_through_the_store():
    """It holds constants; queries, their scale and the gate learn from what they find."""
    model = build(MemorizingTransformerModel).double().train()
    *filling, last = tokens(2, 20).split(5, dim=1)
    _, memory = read(model, filling)
    assert not memory.stored_keys.requires_grad
    assert not memory.stored_values.requires_grad
    output = model(last, past_key_values=memory)[0]
    output.square().sum().backward()
    attention = model.layers[1].self_attn
    assert all(p.grad.any() for p in (attention.gate.bias, attention.q_norm.scale, attention.q_proj.weight))


# -- the look-up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 3, 7, 50])
@pytest.mark.parametrize("at_once", [1, 40, 2**22])
def test_looks_up_some_queries_at_a_time(number, at_once, monkeypatch):
    """The same however many at once; a row with fewer tokens looks up those, and one without any is finite."""
    monkeypatch.setattr(modeling, "NUMBERS_AT_ONCE", at_once)
    query, keys, values = (torch.randn(3, 2, n, 4, dtype=torch.float64) for n in (5, 7, 7))
    counts = torch.tensor([30, 2, 0])
    query.requires_grad_()
    found = recall(query, Store(keys, values, counts), number, 0.5)
    for row, count in enumerate((7, 2)):
        scores = query[row] @ keys[row, :, :count].transpose(-1, -2) * 0.5
        best, chosen = scores.topk(min(number, count), dim=-1)
        for head in range(2):
            expected = best[head].softmax(-1)[:, None] @ values[row, head][chosen[head]]
            torch.testing.assert_close(found[row, head], expected.squeeze(1))
    assert found.isfinite().all()
    (gradient,) = torch.autograd.grad(found[:2].sum(), query)
    assert gradient.isfinite().all()


def test_low_precision():
    for dtype in (torch.bfloat16, torch.float16):
        model = build().to(dtype)
        with torch.no_grad():
            logits, memory = read(model, tokens(2, 20).split(5, dim=1))
        assert logits.isfinite().all()
        assert memory.stored_keys.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        logits, memory = read(build().train(), tokens(2, 20).split(5, dim=1))
    assert logits.isfinite().all()
    assert memory.stored_keys.dtype == torch.bfloat16
    logits.float().square().sum().backward()


# -- the store ---------------------------------------------------------------------------------------------------------

CONFIG = SimpleNamespace(mem_len=2, num_hidden_layers=1, zero_initial_memory=False, memory_size=5)


def put(memory, *numbers, valid=None):
    """Hand over keys that are these numbers, of which the last mem_len stay in the short memory."""
    entries = torch.tensor(numbers).float()[:, None, :, None].expand(-1, 2, -1, 3)
    memory.put_away(entries, -entries, None if valid is None else torch.tensor(valid))


def stored(memory):
    """The numbers of each row, in the order in which they came."""
    rows = []
    for row, count in enumerate(memory.stored.tolist()):
        slots = [n % memory.memory_size for n in range(max(0, count - memory.memory_size), count)]
        rows.append([int(memory.stored_keys[row, 0, slot, 0]) for slot in slots])
        assert rows[-1] == [-int(memory.stored_values[row, 1, slot, 2]) for slot in slots]
    return rows


@pytest.mark.parametrize("gradients", [False, True])
def test_a_ring_of_the_newest_tokens(gradients):
    memory = MemorizingMemory(CONFIG)
    with torch.set_grad_enabled(gradients):
        put(memory, [1, 2])
        assert memory.store is None
        put(memory, [1, 2, 3])
        assert stored(memory) == [[1]]
        put(memory, [2, 3, 4, 5])
        assert stored(memory) == [[1, 2, 3]]
        put(memory, [4, 5, 6, 7, 8, 9])
        assert stored(memory) == [[3, 4, 5, 6, 7]]
        assert memory.stored_keys.shape[2] == 5
        put(memory, list(range(20, 40)))
        assert stored(memory) == [[33, 34, 35, 36, 37]]


def test_what_a_layer_reads_again_is_left_alone():
    memory = MemorizingMemory(CONFIG)
    put(memory, list(range(10)))
    store = memory.store
    before = store.keys.clone()
    put(memory, [90, 91, 92])
    assert torch.equal(store.keys, before)
    with torch.no_grad():
        held = memory.stored_keys
        put(memory, [95, 96, 97])
        assert memory.stored_keys is held  # in place where nobody will
    with torch.inference_mode():
        memory = MemorizingMemory(CONFIG)
        put(memory, list(range(10)))
    with torch.no_grad():
        put(memory, [90, 91, 92])
    assert stored(memory) == [[4, 5, 6, 7, 90]]


def test_padding_is_never_stored():
    memory = MemorizingMemory(CONFIG)
    put(memory, [1, 2, 3, 4], [5, 6, 7, 8], valid=[[False, True, True, True], [True, False, True, True]])
    assert stored(memory) == [[2], [5]]
    put(memory, [1, 2, 3, 4], [5, 6, 7, 8], valid=[[False] * 4, [True] * 4])
    assert stored(memory) == [[2], [5, 5, 6]]
    put(memory, list(range(20, 30)), list(range(30, 40)), valid=[[False] * 10, [True] * 10])
    assert stored(memory) == [[2], [33, 34, 35, 36, 37]]


def test_rows_can_be_reordered_repeated_selected_forgotten_and_reset():
    memory = MemorizingMemory(CONFIG)
    put(memory, [1, 2, 3], [4, 5, 6])
    memory.reorder_cache(torch.tensor([1, 0]))
    assert stored(memory) == [[4], [1]]
    memory.batch_repeat_interleave(2)
    assert stored(memory) == [[4], [4], [1], [1]]
    memory.batch_select_indices(torch.tensor([3, 0]))
    assert stored(memory) == [[1], [4]]
    memory.forget(torch.tensor([False, True]))
    assert stored(memory) == [[1], []]
    put(memory, [7, 8, 9], [7, 8, 9])
    assert stored(memory) == [[1, 7], [7]]
    memory.reset()
    assert memory.store is None
    put(memory, [7, 8, 9])
    assert stored(memory) == [[7]]


@pytest.mark.parametrize("gradients", [False, True])
def test_a_row_that_forgot_begins_anew(gradients):
    """And its neighbor goes on as if nothing had been."""
    model, ids = build(), tokens(2, 24)
    with torch.set_grad_enabled(gradients):
        _, memory = read(model, ids[:, :12].split(4, dim=1))
        kept = copy.deepcopy(memory)
        memory.forget(torch.tensor([True, False]))
        found, _ = read(model, ids[:, 12:].split(4, dim=1), memory)
        alone, _ = read(model, ids[:1, 12:].split(4, dim=1))
        other, _ = read(model, ids[:, 12:].split(4, dim=1), kept)
    torch.testing.assert_close(found[:1], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], other[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found[0], other[0], atol=1e-2)


def test_files_keep_the_store(tmp_path):
    model = build()
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            _, memory = read(model, tokens(2, 20).split(5, dim=1))
        ids, file = tokens(2, 3), io.BytesIO()
        torch.save(memory, file)
        file.seek(0)
        others = [copy.deepcopy(memory), torch.load(file, weights_only=False)]
        if gradients:  # what training keeps
            save_memory(memory, tmp_path / "memory.safetensors")
            others.append(load_memory(model, tmp_path / "memory.safetensors"))
        with torch.set_grad_enabled(gradients):
            expected = model(ids, past_key_values=memory).logits
            for other in others:
                assert torch.equal(model(ids, past_key_values=other).logits, expected)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    """Layers that run once more in the backward pass look up the store as it was."""
    model = build().double().train()  # re-entrant checkpointing adds up in another order
    segments = tokens(2, 20).split(5, dim=1)

    def gradients():
        model.zero_grad()
        logits, memory = read(model, segments, MemorizingMemory(model.config))
        logits.square().sum().backward()
        return [parameter.grad for parameter in model.parameters()], memory

    expected, memory = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found, other = gradients()
    torch.testing.assert_close(memory.stored_keys, other.stored_keys)
    for gradient, wanted in zip(found, expected):
        torch.testing.assert_close(gradient, wanted)


# -- generation and padding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [1, 7, 15])
def test_generates_what_reading_step_by_step_says(prompt):
    model = build()
    ids = tokens(2, prompt)
    generated = model.generate(ids, max_new_tokens=20, do_sample=False)
    with torch.no_grad():
        logits, memory = read(model, generated[:, :-1].split([prompt, *[1] * 19], dim=1))
    assert torch.equal(logits[:, prompt - 1 :].argmax(-1), generated[:, prompt:])
    assert memory.stored.tolist() == [prompt + 19 - 3] * 2


@pytest.mark.parametrize("gradients", [False, True])
def test_token_by_token_of_either_kind(gradients):
    model, segments = build(), tokens(2, 16).split(1, dim=1)
    with torch.set_grad_enabled(gradients):
        output, memory = read(model, segments)
    assert memory.projected != gradients
    exact = model.double()
    expected = exact.lm_head(memorizing_transformer(exact.model, segments))
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-4)


def test_beams_carry_their_stores_along():
    model = build()
    beams = model.generate(tokens(2, 9), num_beams=3, num_return_sequences=2, max_new_tokens=12, do_sample=False)
    assert beams.shape[0] == 4
    with torch.no_grad():
        _, memory = read(model, tokens(3, 12).split(4, dim=1))
        order, ids = torch.tensor([2, 0, 0]), tokens(1, 2).expand(3, 2)
        other = copy.deepcopy(memory)
        other.reorder_cache(order)
        expected = model(ids, past_key_values=memory).logits[order]
        torch.testing.assert_close(model(ids, past_key_values=other).logits, expected)
    assert model.generate(tokens(2, 9), do_sample=True, top_k=3, max_new_tokens=12).shape == (2, 21)


@pytest.mark.parametrize("gradients", [False, True])
def test_left_padding_changes_nothing(gradients):
    """Row 0 has two tokens fewer, which stand where the others' first segment is; both store their own tokens."""
    model, ids = build(), tokens(2, 18)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with torch.set_grad_enabled(gradients):
        padded, memory = read(model, ids.split([6, 6, 6], dim=1), mask=mask)
        alone, single = read(model, [ids[:1, 2:6], ids[:1, 6:12], ids[:1, 12:]])
        other, _ = read(model, ids[1:].split([6, 6, 6], dim=1))
    torch.testing.assert_close(padded[:1, 2:], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(padded[1:], other, atol=1e-5, rtol=1e-4)
    assert memory.stored.tolist() == [13, 15]
    assert single.stored.tolist() == [13]


def test_generates_under_left_padding():
    model, ids = build(), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    greedy = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    together = model.generate(ids, attention_mask=mask, **greedy)
    alone = model.generate(ids[:1, 3:], attention_mask=mask[:1, 3:], **greedy)
    assert torch.equal(together[0, 9:], alone[0, 6:])


# -- files and bad input -----------------------------------------------------------------------------------------------


def test_another_memory_size_after_training(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    ids = tokens(2, 40).split(5, dim=1)
    for size in (0, 2, 6, 100):
        larger = AutoModelForCausalLM.from_pretrained(tmp_path, memory_size=size)
        with torch.no_grad():
            logits, memory = read(larger, ids)
            assert torch.allclose(logits, read(model, ids)[0], atol=1e-5) == (size == 6)
        slots = 0 if memory.store is None else memory.stored_keys.shape[2]
        assert min(size, 37) <= slots <= size


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_neighbors": 33, "memory_size": 32}, "num_neighbors=33 must be at most memory_size=32"),
        ({"num_neighbors": 0}, "num_neighbors must be at least 1"),
        ({"memory_size": -1}, "memory_size must be at least 0"),
        ({"memory_layer": 2, "num_hidden_layers": 2}, "memory_layer must be 0 to 1"),
        ({"memory_layer": -1}, "memory_layer must be 0 to 5"),
        ({"same_length": True}, "same_length=True has no meaning"),
        ({"zero_initial_memory": True}, "zero_initial_memory=True has no meaning"),
    ],
)
def test_configs_that_are_refused(fields, said):
    with pytest.raises(StrictDataclassClassValidationError, match=said):
        MemorizingTransformerConfig(**fields)


@pytest.mark.parametrize(("layers", "layer"), [(1, 0), (2, 1), (4, 2), (6, 4), (12, 8)])
def test_the_memory_layer_is_in_the_upper_half(layers, layer):
    assert MemorizingTransformerConfig(num_hidden_layers=layers).memory_layer == layer


def test_refuses_what_does_not_fit():
    model = build()
    with pytest.raises(ValueError, match=r"must be a memorizing memory, .* got a SegmentMemory"):
        model(tokens(1, 3), past_key_values=SegmentMemory(model.config))
    with torch.no_grad():
        _, memory = read(model, tokens(2, 12).split(6, dim=1))
    with pytest.raises(ValueError, match="remembers a batch of 2 rows"):
        model(tokens(1, 3), past_key_values=memory)
    with pytest.raises(ValueError, match="nothing can be learnt"):
        model.train()(tokens(2, 3), past_key_values=memory)
    for rows in (torch.tensor([True]), torch.tensor([1, 0])):
        with pytest.raises(ValueError, match=r"rows must be bool of shape \[2\]"):
            memory.forget(rows)
    with pytest.raises(ValueError, match="cannot be cropped"):
        memory.crop(-1)
    like = torch.zeros(2, 2, 1, 4)
    with pytest.raises(ValueError, match=r"its dtype is torch.float32, the segment's is torch.float64"):
        recall(like.double(), empty_store(like), 2, 1.0)
