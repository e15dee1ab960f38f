"""float16 training: a loss scale that is too large costs a step and is halved, one that fits grows again."""

import pytest
import torch

from tests.loss_cases import cases

CASES = {
    name: case
    for name, case in cases().items()
    if name.endswith(("CausalLM", "Seq2SeqLM", "MaskedLM", "ImageModeling"))
}


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(ours, others):
    return all(torch.equal(one, other) for one, other in zip(ours, others))


@pytest.mark.parametrize("name", CASES)
def test_through_an_overflow_and_back(name):
    case = CASES[name]
    model, batch = case.build().train(), case.collate(case.rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)

    def step():
        """Scale before and after, and whether weights moved."""
        before, scale = weights(model), scaler.get_scale()
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch).loss
        assert torch.isfinite(loss)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return scaler.get_scale() / scale, not same(before, weights(model))

    assert step() == (1, True)
    scaler.update(2.0**40)
    steps = [step()]
    assert steps == [(0.5, False)], "the first step overflows: it is left out, and the scale halved"
    while not steps[-1][1]:
        steps.append(step())
        assert len(steps) < 40
    assert all(found == (0.5, False) for found in steps[:-1])
    grown = [steps[-1]]
    while grown[-1] != (2, True):
        grown.append(step())
        assert len(grown) < 20, "the scale was to grow again"
    assert grown[-2] == (1, True), "it grows after two steps that fit"
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
