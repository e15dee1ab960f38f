"""Adaptive embeddings equal look-ups word by word, the adaptive softmax PyTorch's own."""

import pytest
import torch
from torch import nn

from hf_tfamily.modeling.adaptive_softmax import AdaptiveEmbedding, AdaptiveSoftmax, cluster_bounds

VOCAB, HIDDEN, CUTOFFS = 23, 8, [5, 11]
SHAPES = {
    "narrowing": {"embedding_size": 8, "cutoffs": CUTOFFS, "div_val": 2},
    "one width": {"embedding_size": 8, "cutoffs": CUTOFFS, "div_val": 1},
    "one projection": {"embedding_size": 6, "cutoffs": CUTOFFS, "div_val": 1},
    "no clusters": {"embedding_size": 6, "cutoffs": [], "div_val": 1},
}
shapes = pytest.mark.parametrize("shape", SHAPES)


def build(shape):
    embedding = AdaptiveEmbedding(VOCAB, hidden_size=HIDDEN, **SHAPES[shape]).double()
    return embedding, AdaptiveSoftmax(embedding).double()


@shapes
def test_every_word_has_its_own_projected_row(shape):
    embedding, _ = build(shape)
    words = embedding(torch.arange(VOCAB))
    for word in range(VOCAB):
        cluster = next(i for i, (start, end) in enumerate(embedding.bounds) if start <= word < end)
        row = embedding.clusters[cluster].weight[word - embedding.bounds[cluster][0]]
        if embedding.projections:
            row = embedding.projections[min(cluster, len(embedding.projections) - 1)].weight @ row
        torch.testing.assert_close(words[word], row)
    ids = torch.randint(VOCAB, (2, 7))
    assert torch.equal(embedding(ids), words[ids])


@shapes
def test_token_losses_are_the_log_probabilities_with_their_gradients(shape):
    _, softmax = build(shape)
    hidden = torch.randn(9, HIDDEN, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(VOCAB, (9,))
    targets[3] = -100
    log_probabilities = softmax(hidden)
    torch.testing.assert_close(log_probabilities.exp().sum(-1), torch.ones(9, dtype=torch.float64))
    expected = -log_probabilities.gather(-1, targets.clamp(min=0)[:, None])[:, 0] * (targets >= 0)
    losses = softmax.token_losses(hidden, targets)
    torch.testing.assert_close(losses, expected)
    inputs = [hidden, *softmax.parameters()]
    for mine, other in zip(torch.autograd.grad(losses.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)):
        torch.testing.assert_close(mine, other)


def test_equals_pytorch():
    _, softmax = build("narrowing")
    oracle = nn.AdaptiveLogSoftmaxWithLoss(HIDDEN, VOCAB, CUTOFFS, div_value=2.0, head_bias=True).double()
    with torch.no_grad():
        softmax.projections[0].weight.copy_(torch.eye(HIDDEN))
        oracle.head.weight.copy_(torch.cat([softmax.clusters[0].weight, softmax.rare_clusters.weight]))
        oracle.head.bias.copy_(torch.cat([softmax.clusters[0].bias, softmax.rare_clusters.bias]))
        for i, tail in enumerate(oracle.tail, start=1):
            softmax.clusters[i].bias.zero_()
            tail[0].weight.copy_(softmax.projections[i].weight.T)
            tail[1].weight.copy_(softmax.clusters[i].weight)
    hidden, targets = torch.randn(9, HIDDEN, dtype=torch.float64), torch.randint(VOCAB, (9,))
    torch.testing.assert_close(softmax(hidden), oracle.log_prob(hidden))
    torch.testing.assert_close(-softmax.token_losses(hidden, targets), oracle(hidden, targets).output)


def test_the_loss_computes_each_cluster_for_its_own_tokens_only():
    _, softmax = build("narrowing")
    rows = []
    for cluster in softmax.clusters:
        cluster.register_forward_hook(lambda module, args, output: rows.append(output.shape))
    softmax.token_losses(torch.randn(6, HIDDEN, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 6, -100]))
    assert rows == [(6, 5), (1, 6), (0, 12)]


def test_ties_name_the_input_sides_parameters():
    embedding, softmax = build("narrowing")
    tied = softmax.tied_keys("head", embedding, "words", [False, True, True])
    assert tied == {
        **{f"head.clusters.{i}.weight": f"words.clusters.{i}.weight" for i in range(3)},
        **{f"head.projections.{i}.weight": f"words.projections.{i}.weight" for i in (1, 2)},
    }
    embedding, softmax = build("one projection")
    assert softmax.tied_keys("head", embedding, "words", [False, False, True])["head.projections.2.weight"] == (
        "words.projections.0.weight"
    )


def test_refuses_targets_beyond_the_vocabulary():
    _, softmax = build("narrowing")
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 22\], or below 0 to be ignored, got 23"):
        softmax.token_losses(torch.randn(1, HIDDEN, dtype=torch.float64), torch.tensor([23]))


def test_bounds():
    assert cluster_bounds(10, [3, 7]) == [(0, 3), (3, 7), (7, 10)]
