"""Adaptive span: the paper restated, backends, gradients of spans, their cost, freezing, what is refused."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModelForCausalLM, DynamicCache

from hf_tfamily import AdaptiveSpanConfig, AdaptiveSpanForCausalLM, AdaptiveSpanModel, PerHead
from hf_tfamily.block_sparse.plan import plan_attention
from hf_tfamily.modeling.attention_patterns import pattern_from_dict
from tests.reference.adaptive_span import adaptive_span

TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_span": 12,
    "span_ramp": 4,
}
SHARES = torch.tensor([[0.0, 0.1, 0.37, 1.0], [0.47, -0.2, 1.3, 0.26]])  # of max_span, within it and beyond
BACKENDS = ("eager", "sdpa", "flex_attention", "block_sparse")


def learned(model):
    """The spans of each layer's heads."""
    return [layer.self_attn.mask.spans for layer in model.base_model.layers]


def made(model_class=AdaptiveSpanForCausalLM, implementation="eager", **fields):
    """The same weights for the same fields, and heads of several spans."""
    torch.manual_seed(0)
    model = model_class._from_config(AdaptiveSpanConfig(**{**TINY, **fields}), attn_implementation=implementation)
    for mask, shares in zip(learned(model), SHARES):
        mask.share.data.copy_(shares)
    return model.eval()


def ids(*shape):
    return torch.randint(TINY["vocab_size"], shape)


@torch.no_grad()
def test_equals_the_paper_restated():
    model, rows = made(AdaptiveSpanModel).double(), ids(2, 23)
    found = model(rows).last_hidden_state
    for row in range(2):
        torch.testing.assert_close(found[row], adaptive_span(model, rows[row]), atol=2e-6, rtol=1e-4)


def test_spans_in_tokens():
    expected = TINY["max_span"] * SHARES.clamp(0, 1)
    torch.testing.assert_close(made().spans, expected)
    fresh = AdaptiveSpanForCausalLM(AdaptiveSpanConfig(**TINY, initial_span=3))
    torch.testing.assert_close(fresh.spans, torch.full((2, 4), 3.0))


@pytest.mark.parametrize("implementation", ["sdpa", "block_sparse"])  # flex_attention learns on GPUs alone
@pytest.mark.parametrize("frozen", [False, True])
def test_backends_agree_in_outputs_and_gradients(implementation, frozen):
    rows, mask = ids(3, 37), torch.ones(3, 37, dtype=torch.long)
    mask[0, :5] = mask[1, 30:] = 0
    labels = rows.masked_fill(mask == 0, -100)
    labels[0, 5] = -100  # what comes before it is padding
    results = []
    for backend in ("eager", implementation):
        model = made(implementation=backend).train()
        if frozen:
            model.freeze_spans()
        output = model(rows, attention_mask=mask, labels=labels)
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((output.logits[mask.bool()], output.loss, gradients))
    assert any("share" in name for name in results[0][2]) is not frozen
    for found, expected in zip(*results[::-1]):
        torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-3)


def test_short_spans_in_long_rows():
    """Where whole tiles of keys are seen by no query."""
    rows, results = ids(1, 300), []
    for backend in ("eager", "block_sparse"):
        model = made(implementation=backend, max_span=256).train()
        for spans in learned(model):
            spans.share.data.mul_(0.05)
        output = model(rows, labels=rows)
        output.loss.backward()
        results.append((output.logits, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(*results[::-1], atol=3e-5, rtol=1e-3)


@torch.no_grad()
def test_flex_attention_agrees():
    rows = ids(2, 33)
    torch.testing.assert_close(
        made(implementation="flex_attention")(rows).logits, made()(rows).logits, atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("implementation", ["eager", "block_sparse"])
def test_gradients_of_spans_are_their_differences(implementation):
    model, rows = made(implementation=implementation).double(), ids(2, 29)

    def loss():
        return torch.nn.functional.cross_entropy(model(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())

    loss().backward()
    for mask, shares in zip(learned(model), SHARES):
        for head, share in enumerate(shares.tolist()):
            if not 0 < share < 1:
                continue
            step, found = 1e-6, []
            for sign in (1, -1):
                mask.share.data[head] = share + sign * step
                with torch.no_grad():
                    found.append(loss())
            mask.share.data[head] = share
            torch.testing.assert_close(mask.share.grad[head], (found[0] - found[1]) / (2 * step), atol=1e-6, rtol=1e-4)


def test_spans_come_back_from_an_end_and_go_no_further():
    mask = learned(made())[0]
    for share, pushes in ((-0.2, (0.0, -1.0)), (1.3, (1.0, 0.0)), (0.5, (1.0, -1.0))):
        for gradient, expected in zip((1.0, -1.0), pushes):
            mask.share.data.fill_(share)
            mask.share.grad = None
            (gradient * mask() / TINY["max_span"]).sum().backward()
            assert mask.share.grad.tolist() == [expected] * 4


def test_spans_shrink_under_their_cost_alone():
    model = made(span_cost=1.0).train()
    model.lm_head.weight.data.zero_()  # so that nothing else moves them
    before = model.spans.detach()
    optimizer = torch.optim.SGD([mask.share for mask in learned(model)], lr=0.2)
    rows = ids(2, 9)
    plain = model.eval()(rows, labels=rows).loss
    loss = model.train()(rows, labels=rows).loss
    torch.testing.assert_close(loss, plain + before.mean())
    loss.backward()
    optimizer.step()
    assert (model.spans <= before).all()
    assert (model.spans < before).any()


# ---------------------------------------------------------------------------------------------------------------------
# Freezing


@pytest.mark.parametrize("implementation", BACKENDS)
@torch.no_grad()
def test_freezing_changes_no_output(implementation):
    model, rows = made(implementation=implementation), ids(2, 41)
    before = model(rows).logits
    model.freeze_spans()
    torch.testing.assert_close(model(rows).logits, before, atol=1e-5, rtol=1e-5)


def test_freezing_makes_patterns_of_what_is_seen(tmp_path):
    model = made(implementation="block_sparse")
    model.freeze_spans()
    patterns = [pattern_from_dict(values) for values in model.config.attention_patterns]
    assert all(isinstance(pattern, PerHead) for pattern in patterns)
    for layer, pattern in enumerate(patterns):
        for head in range(4):
            seen = [x for x in range(40) if pattern.visible(head, 39, 39 - x)]
            span = float(model.spans[layer, head])
            assert seen == [x for x in range(40) if TINY["span_ramp"] + span - x > 0]
    assert not any("share" in name for name, _ in model.named_parameters())
    rows = ids(2, 9)
    assert model.train()(rows, labels=rows).loss == model.eval()(rows, labels=rows).loss

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.frozen_spans
    assert again.model.patterns == model.model.patterns
    assert not any("share" in name for name, _ in again.named_parameters())
    assert torch.equal(again.spans, model.spans)
    torch.testing.assert_close(again(rows).logits, model(rows).logits)


def test_frozen_spans_read_fewer_keys():
    """Pairs of queries and keys that the plan of a layer computes."""

    def pairs(model):
        plans = [plan_attention(p, 256, 256, num_heads=4, causal=True) for p in model.model.patterns]
        return sum(
            part.tiles * part.queries.count * part.keys.count * len(group.heads)
            for plan in plans
            for group in plan.groups
            for part in group.parts
        )

    model = made(max_span=120, implementation="block_sparse")
    for mask in learned(model):
        mask.share.data.fill_(0.05)
    before = pairs(model)
    model.freeze_spans()
    assert pairs(model) < before / 3


# ---------------------------------------------------------------------------------------------------------------------
# Caches, and what is refused


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "block_sparse"])
@pytest.mark.parametrize("frozen", [False, True])
@torch.no_grad()
def test_token_by_token_is_all_at_once(implementation, frozen):
    model, rows = made(implementation=implementation).double(), ids(2, 27)
    if frozen:
        model.freeze_spans()
    whole, cache, found = model(rows).logits, DynamicCache(), []
    for part in rows.split([20, 1, 1, 3, 1, 1], dim=1):
        found.append(model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=1e-9, rtol=1e-9)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(rows, **how), model.generate(rows, use_cache=False, **how))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_span": 0}, "max_span"),
        ({"span_ramp": 0}, "span_ramp"),
        ({"span_cost": -1e-6}, "span_cost"),
        ({"initial_span": 13}, "initial_span must be 0 to max_span=12 tokens, got 13"),
        ({"initial_span": -1}, "initial_span must be 0 to max_span=12 tokens, got -1"),
        ({"position_encoding": "alibi"}, "position_encoding must be 'rotary' or 'none'"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        AdaptiveSpanConfig(**{**TINY, **fields})


def test_a_loss_outside_would_lose_the_cost():
    with pytest.raises(ValueError, match="spans pay a cost that only the model knows"):
        made().train()(ids(2, 8), num_items_in_batch=16)
