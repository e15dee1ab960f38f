"""From neighbours to probabilities (Khandelwal et al. 2019, arXiv:1911.00172, equations 2 and 3), in log space.

Shapes: n queries, k neighbours of each, V ids.
"""

import math

import torch

LAMBDAS = tuple(step / 100 for step in range(101))


def knn_log_probabilities(
    tokens: torch.Tensor, distances: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """log p_kNN(target), equation 2: neighbours count exp(-d / T) each. -inf where none is followed by the target.

    Args:
        tokens: [n, k], what followed each neighbour.
        distances: [n, k], squared L2; infinite for a neighbour that was not found.
        targets: [n].
    """
    votes = _votes(distances, temperature)
    agreeing = votes.masked_fill(tokens != targets[:, None], -math.inf)
    return agreeing.logsumexp(dim=1)


def knn_log_distribution(
    tokens: torch.Tensor, distances: torch.Tensor, vocab_size: int, temperature: float = 1.0
) -> torch.Tensor:
    """log p_kNN of every id, [n, V] float64; arguments as in `knn_log_probabilities`."""
    votes = _votes(distances, temperature)
    sums = torch.zeros(len(votes), vocab_size, dtype=votes.dtype, device=votes.device)
    return sums.scatter_add_(1, tokens, votes.exp()).log()


def interpolate(log_knn: torch.Tensor, log_lm: torch.Tensor, lmbda: float) -> torch.Tensor:
    """log(lambda p_kNN + (1 - lambda) p_LM), equation 3, of tensors of any one shape, in float64."""
    check_lambda(lmbda)
    of_knn, of_lm = (math.log(share) if share > 0 else -math.inf for share in (lmbda, 1 - lmbda))
    return torch.logaddexp(log_knn.double() + of_knn, log_lm.double() + of_lm)


def best_lambda(log_knn: torch.Tensor, log_lm: torch.Tensor) -> tuple[float, float]:
    """The lambda of LAMBDAS under which tokens [n] are likeliest, and the mean log-probability under it."""
    means = {lmbda: float(interpolate(log_knn, log_lm, lmbda).mean()) for lmbda in LAMBDAS}
    best = max(means, key=means.get)
    return best, means[best]


def check_lambda(lmbda: float) -> None:
    """Raise ValueError unless it is a share."""
    if not 0 <= lmbda <= 1:
        raise ValueError(f"lambda must be from 0 (the model alone) to 1 (the neighbours alone), got {lmbda}.")


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless distances can be divided by it."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}.")


def _votes(distances: torch.Tensor, temperature: float) -> torch.Tensor:
    """log of each neighbour's share, [n, k] float64."""
    check_temperature(temperature)
    return (-distances.double() / temperature).log_softmax(dim=1)
