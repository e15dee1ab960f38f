"""Trivial predictors of pictures cost what counting by hand says."""

import math

import numpy as np
import pytest

from hf_tfamily.data import load_data
from hf_tfamily.data.sequences import token_dataset
from hf_tfamily.modeling.image_processing_tokens import ImageTokenProcessor
from hf_tfamily.trivial_predictors import evenly_spread, left_bits_per_dim, left_residuals, residual_bits


def test_residuals_are_differences_from_the_left():
    values = np.array([[[5], [7]], [[4], [4]]])[None]
    assert left_residuals(values).ravel().tolist() == [5, 2, -1, 0]


def test_bits_follow_from_frequencies():
    """Of 0, 0, 1 each counted once more there are 3, 2 and, for the unseen 2, 1 in 6."""
    train, held_out = np.array([0, 0, 1]), np.array([0, 2])
    assert residual_bits(train, held_out) == pytest.approx((math.log2(6 / 3) + math.log2(6 / 1)) / 2)


def test_values_are_put_back_into_their_places():
    """Pictures whose values follow each other block by block cost the same as row by row."""
    values = np.random.default_rng(0).integers(0, 4, (3, 4, 4, 1))
    costs = []
    for order in ({}, {"order": "blocks", "block": [2, 2]}):
        processor = ImageTokenProcessor(4, 4, 1, levels=4, **order)
        dataset = token_dataset(processor(values)["input_ids"], None, ())
        costs.append(left_bits_per_dim((dataset, dataset), processor))
    assert costs[0] == costs[1]


def test_neighbours_tell_something_about_digits():
    data = load_data({"source": "digits"})
    assert left_bits_per_dim((data.train, data.eval), data.processor) < math.log2(17)


def test_places_are_evenly_spread():
    assert evenly_spread(3, 5) == [0, 1, 2]
    assert evenly_spread(10, 4) == [0, 2, 5, 7]
