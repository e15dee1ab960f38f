"""Runs that are killed (kill -9) at random moments and gone on with end with the weights of one that was left alone.

    python scripts/kill_loop.py --page benchmarks/kills.md

Each kind of run is made once without a disturbance. Then it is begun anew and killed `--kills` times, with `--resume`
each time, until it is finished; the two model.safetensors have to be the same bytes. When a run is killed follows from
the files that it has written by then, with a random delay where that leaves room, so that slow machines kill inside the
run too. The page says what had been written when a process died.

Processes are forked from this one, which has imported everything: for Linux.
"""

import argparse
import hashlib
import os
import random
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for tests.distributed, which makes Accelerate shard on a CPU

import datasets  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402, F401
import torch  # noqa: E402
from torch import distributed  # noqa: E402

from hf_tfamily import training  # noqa: E402
from hf_tfamily.checkpoints import checkpoints_in, step_of  # noqa: E402
from hf_tfamily.manifest import MANIFEST  # noqa: E402
from hf_tfamily.recipes import load_recipe  # noqa: E402
from tests.distributed.fsdp_ranks import fsdp2_on_a_cpu  # noqa: E402

STEPS, SAVE_STEPS = 160, 4
SIZES = "vocab_size: 257, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2"
SPARSE = f"model_type: sparse_transformer, {SIZES}, max_position_embeddings: 32, resid_dropout: 0.1"
PATTERNS = "attention_patterns: [{type: local, window: 8}, {type: strided, stride: 8}]"
XL = f"model_type: transformer_xl, {SIZES}, mem_len: 12, hidden_dropout: 0.1"
RECIPE = """
title: A run to be killed
model: {{{model}}}
data: {{source: {source}, path: {text}, length: 32}}
training: {{max_steps: {steps}, save_steps: {save_steps}, save_total_limit: {limit}, logging_steps: 1,
  per_device_train_batch_size: 4, per_device_eval_batch_size: 8, learning_rate: 1e-2, eval_strategy: steps,
  eval_steps: 50}}
"""
WAIT = 300  # seconds after which a run that shows nothing new is taken for one that hangs


@dataclass(frozen=True)
class Kind:
    """A kind of run: in words, its model, its data's source, checkpoints that are kept, and its number of processes."""

    words: str
    model: str
    source: str
    limit: int
    ranks: int = 1


KINDS = {
    "stock": Kind("Sparse Transformer, stock Trainer", f"{SPARSE}, {PATTERNS}", "text_file", 2),
    "recurrent": Kind("Transformer-XL, RecurrentTrainer, save_total_limit=1", XL, "text_file_stream", 1),
    "fsdp2": Kind("Sparse Transformer, FSDP2 in two processes", f"{SPARSE}, {PATTERNS}", "text_file", 2, ranks=2),
}


@dataclass
class Kill:
    """What a run was killed over: the moment that was waited for, whom it hit, and what was there afterwards."""

    moment: str
    whom: str
    left: str


@dataclass
class Outcome:
    """What came of one kind."""

    kills: list[Kill] = field(default_factory=list)
    runs: int = 0
    same: bool = True


# ---------------------------------------------------------------------------------------------------------------------
# Processes


class Processes:
    """The processes of one run, one a rank; their output goes into the file `log`."""

    def __init__(self, kind: Kind, recipe: Path, output: Path, log: Path):
        self.log, self.codes = log, {}
        meeting = tempfile.mkdtemp(dir=log.parent)  # a new place: what killed processes left would be taken for answers
        sys.stdout.flush()
        self.pids = [self._fork(kind, recipe, output, rank, meeting) for rank in range(kind.ranks)]

    def _fork(self, kind: Kind, recipe: Path, output: Path, rank: int, meeting: str) -> int:
        if pid := os.fork():
            return pid
        code = 1
        try:
            file = os.open(self.log, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
            os.dup2(file, 1)
            os.dup2(file, 2)
            with group_of(kind, rank, meeting):
                training.train(load_recipe(recipe), output, resume=True)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def running(self) -> bool:
        """Do all of them? Raises RuntimeError, with what was said, if one has failed."""
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        if any(self.codes.values()):
            self.kill(range(len(self.pids)))
            raise RuntimeError(f"A run has failed:\n{self.log.read_text()[-5000:]}")
        return len(self.codes) < len(self.pids)

    def kill(self, ranks) -> None:
        """kill -9, and wait until they are gone."""
        left = [self.pids[rank] for rank in ranks if self.pids[rank] not in self.codes]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        for pid in left:
            self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextmanager
def group_of(kind: Kind, rank: int, meeting: str) -> Iterator[None]:
    """A process of its own, or one of a group under FSDP2."""
    torch.set_num_threads(1)
    if kind.ranks == 1:
        yield
        return
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(kind.ranks))
    where = {"init_method": f"file://{meeting}/store", "rank": rank, "world_size": kind.ranks}
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60), **where)
    with fsdp2_on_a_cpu("SHARDED_STATE_DICT"):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Moments


def moments(run: training.RunFolder, draw: random.Random) -> dict[str, Callable[[], float | None]]:
    """What to wait for, by name: each says after how many seconds to kill now, or None if it is not yet time."""
    reached = newest(run.partial)
    later, files = reached + SAVE_STEPS * draw.randint(1, 6), draw.randint(1, 6)
    lock, began = run.output.with_name(run.output.name + ".lock"), time.time()

    def starting():
        return draw.uniform(0, 0.5) if lock.exists() else None

    def training_goes_on():
        return draw.uniform(0, 0.1) if newest(run.partial) >= later else None

    def checkpoint_is_written():
        unfinished = run.partial / f"checkpoint-{newest(run.partial, whole=False)}"
        written = step_of(unfinished) >= later and len(names_in(unfinished)) >= files
        new = written and not (unfinished / MANIFEST).exists() and changed_at(unfinished) > began
        return 0.0 if new else None

    def finishing():
        return draw.uniform(0, 0.5) if (run.partial / "finished").exists() else None

    return {
        "a checkpoint is written": checkpoint_is_written,
        "it trains": training_goes_on,
        "it starts": starting,
        "it finishes": finishing,
    }


def newest(partial: Path, whole: bool = True) -> int:
    """The step of the newest checkpoint that has a manifest, or of any; 0 if there is none."""
    found = [folder for folder in checkpoints_in(partial) if not whole or (folder / MANIFEST).exists()]
    return step_of(found[-1]) if found else 0


def changed_at(folder: Path) -> float:
    """When something in it was last made or removed: one that an earlier kill left is no news."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def names_in(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.rglob("*") if path.is_file())
    except OSError:  # it is being written or removed
        return []


def what_is_left(run: training.RunFolder) -> str:
    """Where the process was, as its files say."""
    if run.output.exists():
        return "the finished folder"
    if (run.partial / "finished").exists():
        return f"a finished folder half written ({len(names_in(run.partial / 'finished'))} files)"
    checkpoints = checkpoints_in(run.partial)
    whole = [folder for folder in checkpoints if (folder / MANIFEST).exists()]
    left = whole[-1].name if whole else "no whole checkpoint"
    half = [
        f"{folder.name} half written ({len(names_in(folder))} files)" for folder in checkpoints if folder not in whole
    ]
    return ", ".join([left, *half])


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def kill_again_and_again(name: str, kills: int, seed: int, folder: Path) -> Outcome:
    """One undisturbed run of a kind, and others that are killed until there were so many kills."""
    kind, draw, outcome = KINDS[name], random.Random(f"{name} {seed}"), Outcome()
    recipe = write_recipe(name, folder)
    straight = training.RunFolder(folder / f"{name}-straight")
    finish(Processes(kind, recipe, straight.output, folder / f"{name}-straight.log"))
    expected = digest(straight.output)
    print(f"{name}: left alone, model.safetensors is {expected[:16]}", flush=True)
    waited_for = order_of(kills, draw)
    while waited_for:
        if outcome.runs > kills + 3:
            raise RuntimeError(f"{name}: {outcome.runs} runs were finished before they could be killed {kills} times.")
        outcome.runs += 1
        run = training.RunFolder(folder / f"{name}-{outcome.runs}")
        while not run.output.exists():
            processes = Processes(kind, recipe, run.output, folder / f"{name}-{outcome.runs}.log")
            kill = disturb(processes, run, waited_for[0], draw) if waited_for else finish(processes)
            if kill is not None:
                outcome.kills.append(kill)
                waited_for.pop(0)
                print(
                    f"{name}: kill {len(outcome.kills)} of {kills} while {kill.moment}; left: {kill.left}", flush=True
                )
        same = digest(run.output) == expected
        outcome.same &= same
        print(f"{name}: killed, model.safetensors is {'the same' if same else 'ANOTHER'}", flush=True)
    return outcome


def order_of(kills: int, draw: random.Random) -> list[str]:
    """Moments in an order of their own; the last one is when the run finishes."""
    cycle = ["a checkpoint is written", "it trains", "a checkpoint is written", "it starts"]
    chosen = [cycle[number % len(cycle)] for number in range(kills - 1)]
    draw.shuffle(chosen)
    return [*chosen, "it finishes"][:kills]


def disturb(processes: Processes, run: training.RunFolder, moment: str, draw: random.Random) -> Kill | None:
    """Kill a run at a moment; None if it was finished before."""
    is_time, since = moments(run, draw)[moment], time.monotonic()
    while processes.running():
        if (delay := is_time()) is not None:
            time.sleep(delay)
            return strike(processes, run, moment, draw)
        if time.monotonic() > since + WAIT:
            processes.kill(range(len(processes.pids)))
            raise RuntimeError(f"Nothing has happened for {WAIT} seconds:\n{processes.log.read_text()[-5000:]}")
        time.sleep(0.0005)
    return None


def strike(processes: Processes, run: training.RunFolder, moment: str, draw: random.Random) -> Kill | None:
    """kill -9 to one process, and to others a little later, as a launcher does it; None if it came too late."""
    everyone = list(range(len(processes.pids)))
    draw.shuffle(everyone)
    processes.kill(everyone[:1])
    if everyone[1:]:
        time.sleep(draw.uniform(0, 0.5))
        processes.kill(everyone[1:])
    if processes.codes[processes.pids[everyone[0]]] != -signal.SIGKILL:
        return None
    return Kill(moment, f"process {everyone[0]} first" if everyone[1:] else "", what_is_left(run))


def finish(processes: Processes) -> None:
    while processes.running():
        time.sleep(0.05)


def write_recipe(name: str, folder: Path) -> Path:
    kind, text, recipe = KINDS[name], folder / "text.txt", folder / f"{name}.yaml"
    text.write_text(" ".join(f"{number} is {number % 7} and {number % 11}." for number in range(2000)))
    values = {"model": kind.model, "source": kind.source, "text": text, "limit": kind.limit}
    recipe.write_text(RECIPE.format(**values, steps=STEPS, save_steps=SAVE_STEPS))
    return recipe


def digest(finished: Path) -> str:
    return hashlib.sha256((finished / "model.safetensors").read_bytes()).hexdigest()


def page(outcomes: dict[str, Outcome], seed: int, command: str) -> str:
    lines = [
        "# Runs that were killed",
        "",
        "```",
        command,
        "```",
        "",
        f"Each kind of run: {STEPS} steps, a checkpoint every {SAVE_STEPS}, dropout; moments drawn with seed {seed}.",
        "It was made once without a disturbance, then killed (kill -9) and gone on with (`--resume`) until it was",
        "finished. What is compared are the bytes of model.safetensors. [What protects runs](../docs/surviving.md).",
    ]
    for name, outcome in outcomes.items():
        weights = "**the same weights, bit for bit**" if outcome.same else "**OTHER WEIGHTS**"
        lines += [
            "",
            f"## {KINDS[name].words}",
            "",
            f"{len(outcome.kills)} kills in {outcome.runs} runs: {weights}.",
            "",
        ]
        lines += ["| | killed while | left |", "|--:|---|---|"]
        for number, kill in enumerate(outcome.kills, 1):
            whom = f" ({kill.whom})" if kill.whom else ""
            lines.append(f"| {number} | {kill.moment}{whom} | {kill.left} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="of each kind of run")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--page", type=Path, help="write what happened there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = {name: kill_again_and_again(name, args.kills, args.seed, Path(folder)) for name in args.kinds}
    text = page(outcomes, args.seed, shlex.join(["python", "scripts/kill_loop.py", *sys.argv[1:]]))
    if args.page:
        args.page.write_text(text, encoding="utf-8")
    return 0 if all(outcome.same for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
