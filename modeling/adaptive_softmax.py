"""Adaptive input and softmax of Transformer-XL: frequent words get wide embeddings, rare ones narrow ones.

The vocabulary, sorted by frequency, is cut into clusters at `cutoffs`; embeddings of cluster i have
embedding_size / div_val**i dimensions (Grave et al. 2017, arXiv:1609.04309; Baevski and Auli 2019, arXiv:1809.10853).

Shapes: N tokens, V vocabulary, C clusters, Vi words and Ei dimensions of cluster i.
"""

import torch
from torch import nn


def cluster_bounds(vocab_size: int, cutoffs: list[int]) -> list[tuple[int, int]]:
    """First word, and the one after the last, of each cluster."""
    ends = [0, *cutoffs, vocab_size]
    return list(zip(ends, ends[1:]))


class Affine(nn.Module):
    """A linear layer that counts as a part of the embeddings, not as an nn.Linear.

    Input and output side share weights, so tools that adapt every nn.Linear alone would part them.
    """

    def __init__(self, width: int, out_features: int, bias: bool = True):
        super().__init__()
        like = nn.Linear(width, out_features, bias)
        self.weight, self.bias = like.weight, like.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., out_features]."""
        return nn.functional.linear(states, self.weight, self.bias)


class Narrowing(Affine):
    """A projection as on the input side, [hidden, Ei], used the other way round."""

    def __init__(self, width: int, hidden_size: int):
        super().__init__(width, hidden_size, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., Ei]."""
        return states @ self.weight


class AdaptiveEmbedding(nn.Module):
    """Word embeddings of several widths, projected to one.

    With div_val 1 all clusters are equally wide: they share a projection, or need none where embedding_size is
    hidden_size.
    """

    def __init__(self, vocab_size: int, embedding_size: int, hidden_size: int, cutoffs: list[int], div_val: int = 1):
        super().__init__()
        self.bounds = cluster_bounds(vocab_size, cutoffs)
        self.num_embeddings, self.embedding_dim = vocab_size, hidden_size
        self.widths = [embedding_size // div_val**i for i in range(len(self.bounds))]
        projected = self.widths if div_val > 1 else self.widths[:1]
        if div_val == 1 and embedding_size == hidden_size:
            projected = []
        self.clusters = nn.ModuleList(nn.Embedding(end - start, e) for (start, end), e in zip(self.bounds, self.widths))
        self.projections = nn.ModuleList(Affine(width, hidden_size, bias=False) for width in projected)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[...] ids -> [..., hidden]."""
        embeddings = None
        for i, ((start, end), cluster) in enumerate(zip(self.bounds, self.clusters)):
            mine = (input_ids >= start) & (input_ids < end)
            embedded = cluster(input_ids[mine] - start)
            if embeddings is None:  # in the table's own dtype, also where projections run in a lower one
                embeddings = embedded.new_zeros(*input_ids.shape, self.embedding_dim)
            if self.projections:
                embedded = self.projections[i % len(self.projections)](embedded)
            embeddings = embeddings.masked_scatter(mine[..., None], embedded.to(embeddings.dtype))
        return embeddings


class AdaptiveSoftmax(nn.Module):
    """Log-probabilities of words: those of the first cluster, and of the other clusters as wholes, times those within.

    Args:
        like: the input embeddings; clusters and projections have their sizes, so that they can be tied.
    """

    def __init__(self, like: AdaptiveEmbedding):
        super().__init__()
        self.bounds = like.bounds
        self.out_features, widths = like.num_embeddings, like.widths
        self.clusters = nn.ModuleList(Affine(width, end - start) for width, (start, end) in zip(widths, self.bounds))
        projected = widths if like.projections else []
        self.projections = nn.ModuleList(Narrowing(width, like.embedding_dim) for width in projected)
        self.rare_clusters = Affine(widths[0], len(widths) - 1) if len(widths) > 1 else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> log-probabilities [..., V]."""
        frequent, rare = self._first_cluster(hidden_states)
        tails = [self._within(i, hidden_states) + rare[..., i - 1, None] for i in range(1, len(self.clusters))]
        return torch.cat([frequent, *tails], dim=-1)

    def token_losses(self, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood [N] of targets [N] at hidden states [N, hidden]; 0 where the target is below 0.

        Only the clusters that targets fall into are computed, each for its own tokens.
        """
        if targets.device.type == "cpu" and bool((targets >= self.out_features).any()):
            largest, got = self.out_features - 1, targets.max().item()
            raise ValueError(f"labels must lie in [0, {largest}], or below 0 to be ignored, got {got}.")
        frequent, rare = self._first_cluster(hidden_states)
        losses = frequent.new_zeros(targets.shape)
        for i, (start, end) in enumerate(self.bounds):
            mine = ((targets >= start) & (targets < end)).nonzero().squeeze(-1)
            words = targets[mine, None] - start
            if i == 0:
                found = frequent[mine].gather(-1, words).squeeze(-1)
            else:
                found = self._within(i, hidden_states[mine]).gather(-1, words).squeeze(-1) + rare[mine, i - 1]
            losses = losses.index_put((mine,), -found)
        return losses

    def tied_keys(self, prefix: str, embedding: AdaptiveEmbedding, embedding_prefix: str, tie_projections) -> dict:
        """Parameters shared with the input side, {own name: its name}."""
        tied = {
            f"{prefix}.clusters.{i}.weight": f"{embedding_prefix}.clusters.{i}.weight"
            for i in range(len(self.clusters))
        }
        for i in range(len(self.projections)):
            if tie_projections[i]:
                other = i % len(embedding.projections)
                tied[f"{prefix}.projections.{i}.weight"] = f"{embedding_prefix}.projections.{other}.weight"
        return tied

    def _first_cluster(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities [..., V0] of the first cluster's words, and [..., C - 1] of the other clusters."""
        narrow = self._narrow(0, hidden_states)
        scores = [self.clusters[0](narrow)]
        if self.rare_clusters is not None:
            scores.append(self.rare_clusters(narrow))
        return _log_softmax(torch.cat(scores, dim=-1)).split([self.bounds[0][1], len(self.clusters) - 1], dim=-1)

    def _within(self, i: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [..., Vi] of cluster i's words, given the cluster."""
        return _log_softmax(self.clusters[i](self._narrow(i, hidden_states)))

    def _narrow(self, i: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., Ei]."""
        return self.projections[i](hidden_states) if self.projections else hidden_states


def _log_softmax(scores: torch.Tensor) -> torch.Tensor:
    return scores.log_softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
