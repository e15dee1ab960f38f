"""Tensor parallelism on two CPU processes: every head of every system equals one process, and so does each attention
head under patterns, slopes and tables of its own; what cannot be cut is refused."""

import json

import pytest
from transformers.distributed import DistributedConfig

from tests.distributed import tp_ranks
from tests.distributed.pairs import run_ranks

pytestmark = pytest.mark.slow
CASES = [*tp_ranks.all_cases(), "stock"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(tp_ranks.two_ranks, folder)
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name, results):
    """Loss, gradients (whole, and summed over two passes), outputs, and tokens generated with a cache."""
    for found in (result["cases"][name] for result in results):
        assert max(found["loss"], found["gradients"], found["outputs"]) < 1e-5, found
        assert found.get("tokens", 0) == 0
        assert found["cut"] > 0
        assert found["held"] < 0.8 * found["all"]  # tables of positions, classifiers and norms are not cut


def test_saved_weights_are_whole(results):
    assert [result["saved"] for result in results] == [0, 0]


def test_other_backends_masks_and_caches(results):
    for result in results:
        assert result["others"].keys() == {"static cache", "sdpa", "eager", "flex_attention"}
        assert max(result["others"].values()) < 1e-5, result["others"]


def test_what_is_refused(results):
    for said in (result["said"] for result in results):
        assert "cannot deal out 1 heads to 2 processes evenly" in said["heads"]
        assert "cannot deal out 1 key heads to 2 processes evenly" in said["key heads"]
        assert "past_key_values was made for all heads" in said["cache"]
        assert "model.new_pattern_cache()" in said["cache"]


@pytest.mark.skipif(not hasattr(DistributedConfig, "dp_size"), reason="this version of Transformers does one of both")
def test_with_fsdp(tmp_path):
    """Two pairs: what FSDP2 shards is not taken for heads."""
    run_ranks(tp_ranks.four_ranks, tmp_path, ranks=4)
    for rank in range(4):
        for found in json.loads((tmp_path / f"four-{rank}.json").read_text()).values():
            assert max(found["loss"], found["gradients"]) < 1e-5, found
            assert found["held"] < 0.35
