"""The cache of an image: what it adds to keys and values takes part in learning too."""

import pytest
import torch

from tests.modeling.test_image_transformer import CLASSES, image_ids, tiny_model


def gradients(model, ids, sizes, cache):
    """Of all weights by name, of some weighted sum of the losses of values, computed in such steps."""
    model.zero_grad()
    total, start = 0.0, 0
    for size in sizes:
        values = slice(start, start + size)
        logits = model(ids[:, values], past_key_values=cache).logits
        total = total + (logits * torch.arange(values.start, values.stop)[:, None].sin()).sum()
        start += size
    total.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("output", ["categorical", "logistic_mixture"])
@pytest.mark.parametrize("classes", [0, CLASSES])
@pytest.mark.parametrize("sizes", [[18, 18], [10, 1, 1, 1, 2, 21]])
def test_gradients_flow_through_the_past(output, classes, sizes):
    """Through keys and values, the class of the start token, and the hidden state that the values of a pixel share."""
    model = tiny_model(output, classes=classes, implementation="block_sparse").double()
    ids = image_ids(model)
    expected = gradients(model, ids, [36], None)
    found = gradients(model, ids, sizes, model.new_pattern_cache())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-9, rtol=1e-9, msg=name)
