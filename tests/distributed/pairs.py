"""The processes of a test, which talk by gloo. One that fails ends the others, and the test with its traceback."""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed


def run_ranks(work: Callable[[Path], None], folder: Path, ranks: int = 2) -> None:
    """Call `work(folder)`, a function of a module, in that many processes of one group."""
    with tempfile.TemporaryDirectory() as meeting:  # a new place: what another group left would be taken for answers
        processes = torch.multiprocessing.spawn(_rank, (work, folder, ranks, meeting), ranks, join=False)
        while not processes.join():
            pass


def _rank(rank: int, work: Callable[[Path], None], folder: Path, ranks: int, meeting: str) -> None:
    torch.set_num_threads(1)
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}.items():
        os.environ[name] = str(value)
    os.environ |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    store, timeout = f"file://{meeting}/store", timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timeout)
    try:
        work(folder)
    finally:
        distributed.destroy_process_group()
