"""Real processes that talk over gloo: one import, then a fork for each rank, which runs all cases in their order.

    python tests/distributed/ranks.py slices_cases 2 FOLDER

writes into the folder what came of each case; the test file beside it says them one by one.
"""

import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

TIMEOUT = 60  # seconds that a rank waits for another


def run_ranks(module: str, num_ranks: int, folder: Path, timeout: int = 540) -> dict[str, str]:
    """What came of the cases of a module, by name: "" for those that passed on all ranks, else what was said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, module, str(num_ranks), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    files = [folder / f"rank{rank}.json" for rank in range(num_ranks)]
    found = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    assert any(found), done.stdout + done.stderr
    names = dict.fromkeys(name for of_rank in found for name in of_rank)
    return {name: "\n".join(of_rank.get(name, "did not end") for of_rank in found).strip() for name in names}


def _one_rank(module, rank: int, num_ranks: int, folder: Path) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    faulthandler.enable()
    store = f"file://{folder}/store"
    wait = timedelta(seconds=TIMEOUT)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=num_ranks, timeout=wait)
    found = {}
    for name, case in module.CASES.items():
        torch.manual_seed(0)
        try:
            case()
            found[name] = ""
        except Exception:
            found[name] = f"rank {rank}:\n{traceback.format_exc()}"
            break  # others wait in vain
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    if any(found.values()):
        os._exit(1)
    distributed.destroy_process_group()


def main(name: str, num_ranks: int, folder: Path) -> None:
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    module = importlib.import_module(name)
    children = []
    for rank in range(num_ranks):
        child = os.fork()
        if child == 0:
            _one_rank(module, rank, num_ranks, folder)
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    waiting, failed = set(children), None
    while waiting:
        child, status = os.waitpid(-1, os.WNOHANG)
        waiting.discard(child)
        if status and failed is None:
            failed = time.monotonic()
        if failed is not None and time.monotonic() > failed + 10:  # the others only wait for it
            for left in waiting:
                os.kill(left, signal.SIGKILL)
        time.sleep(0.05)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
