"""Every head trains under `torch.use_deterministic_algorithms(True)`, which fills what nobody wrote with NaN; the same
step twice gives the same bits."""

from contextlib import contextmanager

import pytest
import torch

from tests.loss_cases import cases

CASES = cases()


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def one_step(case, backend):
    """The loss and all weights after a step of training."""
    model = case.build().train()
    model.set_attn_implementation(backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = model(**case.collate(case.rows[:4])).loss
    loss.backward()
    optimizer.step()
    return [loss.detach(), *(weight.detach() for weight in model.parameters())]


@pytest.mark.parametrize("backend", ["eager", "sdpa", "block_sparse"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_of_every_head(name, backend):
    with deterministic():
        try:
            first = one_step(CASES[name], backend)
        except ValueError as error:
            if f"'{backend}'" not in str(error):
                raise
            pytest.skip(f"no {backend} here")
        second = one_step(CASES[name], backend)
    for one, other in zip(first, second):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)
