"""Every stock language model whose rows are cut over two processes equals one process, or is refused by name."""

import pytest

from tests.distributed.ranks import run_ranks


@pytest.mark.slow
def test_every_stock_model(tmp_path):
    assert run_ranks("stock_cases", 2, tmp_path) == {"every stock model": ""}
