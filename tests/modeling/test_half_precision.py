"""float16: products of queries and keys may exceed its largest number, 65,504, and nothing becomes infinite."""

import pytest
import torch

from hf_tfamily.block_sparse import interface
from hf_tfamily.block_sparse.cpu import block_sparse_attention
from hf_tfamily.modeling.attention_patterns import Fixed, Local, Strided, Union
from hf_tfamily.modeling.configuration_sparse_transformer import SparseTransformerConfig
from hf_tfamily.modeling.modeling_sparse_transformer import SparseTransformerForCausalLM
from tests.reference.attention import dense_attention


def triton_executor():
    pytest.importorskip("triton")
    from tests.block_sparse.triton_support import triton_attention

    return triton_attention


EXECUTORS = {"pytorch": lambda: block_sparse_attention, "triton": triton_executor}
every_executor = pytest.mark.parametrize("executor", EXECUTORS)


@every_executor
@pytest.mark.parametrize("pattern", [Local(5), Union([Local(4), Strided(4)]), Fixed(8, 2)], ids=str)
def test_products_beyond_the_range(executor, pattern):
    """The products are about 16 * 100 * 100 = 160,000; the scores that are scaled have a size as usual."""
    torch.manual_seed(0)
    shape = (1, 20, 2, 16)
    query, key = (100 + 4 * torch.rand(shape).half() for _ in range(2))
    assert not torch.isfinite(torch.einsum("bthd,bshd->bhts", query, key)).all()
    value, where = torch.randn(shape).half(), {"causal": True, "scale": 1e-3, "q_offset": 0}
    ours = EXECUTORS[executor]()(query, key, value, pattern, **where)
    exact = dense_attention(*(x.double() for x in (query, key, value)), pattern, **where)
    assert (ours - exact).abs().max() <= 4 * torch.finfo(torch.float16).eps * value.abs().max()


@pytest.mark.parametrize(
    ("executor", "steps", "scale"),
    [("pytorch", 16, 2.0**24), pytest.param("triton", 3, 2.0**10, marks=pytest.mark.slow)],
)
def test_training_under_dynamic_loss_scaling(executor, steps, scale, monkeypatch):
    """Activations so large that a first scale is too much: it is halved until gradients fit, and training goes on."""
    monkeypatch.setattr(interface, "block_sparse_attention", EXECUTORS[executor]())
    torch.manual_seed(0)
    config = SparseTransformerConfig(
        vocab_size=11,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        position_shape=[4, 4],
        attention_patterns=[{"type": "local", "window": 4}, {"type": "fixed", "block": 4, "summary": 1}],
    )
    model = SparseTransformerForCausalLM(config).train()
    assert config._attn_implementation == "block_sparse"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(400)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    ids, losses, scales = torch.randint(11, (2, 16)), [], []
    for _ in range(steps):
        with torch.autocast("cpu", torch.float16):
            loss = model(ids, labels=ids).loss
        assert torch.isfinite(loss)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss))
        scales.append(scaler.get_scale())
    if scale > 2.0**16:
        assert scales[0] < scale, "the first scale was to be too much"
    assert scales[-1] == scales[-2] > 1, "the scale was to settle"
    assert losses[-1] < losses[0]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
