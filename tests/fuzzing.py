"""How tests draw at random: always the same examples, unless asked for others.

FUZZ_SEED=7 pytest -m slow tests/...        other examples; what a failing test says to use again
FUZZ_EXAMPLES=2000 pytest -m slow tests/... so many
FUZZ_SECONDS=600 pytest -m slow tests/...   with one seed after the other, until each test has had its time
"""

import os
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

SEED = int(os.environ.get("FUZZ_SEED", "0"))
SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))


def fuzz(check: Callable[..., Any], examples: int, **drawn: SearchStrategy) -> None:
    """Call `check` with that many draws, by keyword; hypothesis makes the first that fails small and shows it."""
    examples, number, start = int(os.environ.get("FUZZ_EXAMPLES", examples)), SEED, time.monotonic()
    while number == SEED or time.monotonic() < start + SECONDS:
        print(f"FUZZ_SEED={number} FUZZ_EXAMPLES={examples}")
        _batch(check, examples, number, drawn)
        number += 1


def _batch(check: Callable[..., Any], examples: int, number: int, drawn: dict[str, SearchStrategy]) -> None:
    @seed(number)
    @settings(
        max_examples=examples, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck)
    )
    @given(**drawn)
    def try_one(**values):
        check(**values)

    try_one()
