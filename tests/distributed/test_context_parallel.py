"""Rows cut over two and four real processes equal one process; bytes sent are those foretold."""

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.slices_cases import CASES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, 4])
def found(request, tmp_path_factory):
    return run_ranks("slices_cases", request.param, tmp_path_factory.mktemp(f"ranks{request.param}"))


@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_process(found, name):
    assert found.get(name, "never ran") == ""
