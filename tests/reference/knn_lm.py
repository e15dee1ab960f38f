"""kNN-LM in loops (Khandelwal et al. 2019, arXiv:1911.00172, equations 2 and 3)."""

import math


def squared_distance(first, second):
    return sum((a - b) ** 2 for a, b in zip(first, second))


def neighbours(query, keys, k):
    """(distance, number of the key) of the k nearest keys."""
    return sorted((squared_distance(query, key), number) for number, key in enumerate(keys))[:k]


def knn_distribution(query, keys, values, vocab_size, k, temperature):
    """p_kNN of every token, equation 2."""
    weights = [0.0] * vocab_size
    for distance, number in neighbours(query, keys, k):
        weights[values[number]] += math.exp(-distance / temperature)
    total = sum(weights)
    return [weight / total for weight in weights]


def interpolated(p_knn, p_lm, lmbda):
    """Equation 3."""
    return [lmbda * a + (1 - lmbda) * b for a, b in zip(p_knn, p_lm)]


def datastore(states_of, documents, window, context):
    """(state, next token) of every token but a document's first, each read with at least `context` tokens before it.

    states_of: a list of ids -> the state at each.
    """
    keys, values = [], []
    for document in documents:
        inputs, done = document[:-1], 0
        while done < len(inputs):
            start = max(0, min(done - context, len(inputs) - window))
            part = inputs[start : start + window]
            states = states_of(part)
            for position in range(done - start, len(part)):
                keys.append(states[position])
                values.append(document[start + position + 1])
            done = start + len(part)
    return keys, values
