"""What every benchmark script shares: its options, checks before times, interleaved medians, rows, JSON and a page.

    bench = Benchmark("Attention under a pattern", __doc__)            # reads --json FILE, --page FILE, --quick
    if bench.holds("local, 4,096 tokens", error < budget, f"error {error:.1e}"):
        times = bench.times({"block_sparse": ours, "dense": dense})    # medians, the contenders in turn
        bench.add("local, 4,096 tokens", times["block_sparse"], times["dense"], peer_name="dense SDPA", must=20)
    sys.exit(bench.finish())

A row says how many times better than its peer we are: `ratio = peer / ours`, for times and bytes alike. A case that
fails its check has no row, is named on stderr, and makes the script fail. Run scripts as `python scripts/NAME.py`.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from hf_tfamily.whole_files import write_text as write

# glibc then keeps freed memory for whoever asks next (mallopt(3)); it reads this as a process starts.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "268435456", "MALLOC_MMAP_THRESHOLD_": "268435456"}
ALLOCATOR_NOTE = f"All run under {', '.join(f'{name}={os.environ.get(name)}' for name in ALLOCATOR)}."
ROUND_SECONDS = 0.02  # a timing repeats short calls up to this
ROUNDS, MOST_ROUNDS, SECONDS = 7, 49, 3.0  # more rounds than the first, up to the second, if all take less than this


def under_allocator() -> None:
    """Start the script again under ALLOCATOR, once, unless its environment has it.

    Nobody then pays for mapping memory anew at each call.
    """
    if any(name not in os.environ for name in ALLOCATOR):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**ALLOCATOR, **os.environ})


@contextmanager
def system_allocator() -> Iterator[None]:
    """Processes started inside give freed memory back: where peaks are measured, what is kept would hide them."""
    kept = {name: os.environ.pop(name) for name in ALLOCATOR if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


@dataclass(frozen=True)
class Measure:
    """A median and how far apart the measurements lay."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return shown(self.median)


@dataclass(frozen=True)
class Row:
    """One comparison. `must` and `stretch` are the ratios that the project wants to reach."""

    section: str
    case: str
    ours: float
    peer: float
    ratio: float
    peer_name: str
    unit: str
    must: float | None = None
    stretch: float | None = None
    ours_range: tuple[float, float] | None = None
    peer_range: tuple[float, float] | None = None

    @property
    def verdict(self) -> str:
        if self.must is None:
            return ""
        if self.ratio < self.must:
            return "missed"
        return "stretch met" if self.stretch is not None and self.ratio >= self.stretch else "met"


class Benchmark:
    """One run of a benchmark script: parses the command line, collects and prints rows, writes them out.

    Args:
        title: heads the table and the page.
        description: for `--help`; the script's docstring.
        sections: names of parts that can be run alone with `--only`.
        arguments: further options, as `argparse.ArgumentParser.add_argument` takes them: {"--threads": {...}}.
    """

    def __init__(
        self,
        title: str,
        description: str | None = None,
        sections: Iterable[str] = (),
        arguments: dict[str, dict] | None = None,
    ) -> None:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: does it run?")
        parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread, not the clock's")
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
        parser.add_argument("--page", type=Path, metavar="FILE", help="write the same as a Markdown page")
        sections = list(sections)
        if sections:
            parser.add_argument("--only", nargs="+", choices=sections, default=sections, metavar="SECTION",
                                help=f"of {', '.join(sections)}; in FILE, rows of the others stay")  # fmt: skip
        for name, options in (arguments or {}).items():
            parser.add_argument(name, **options)
        self.title = title
        self.args = parser.parse_args()
        self.quick: bool = self.args.quick
        self.cpu_time: bool = self.args.cpu_time
        if self.cpu_time:
            torch.set_num_threads(1)
        self.sections: list[str] = getattr(self.args, "only", [])
        self.rows: list[Row] = []
        self.notes: dict[str, str] = {} if sections else {"": ""}
        self.failures: list[str] = []
        self.section = ""

    def start(self, section: str, note: str = "") -> bool:
        """Rows from here on belong to `section`; False if it is not to be run. `note` explains it on the page."""
        if section not in self.sections:
            return False
        self.section = section
        self.notes[section] = note
        print(f"\n{section}\n{_header()}", flush=True)
        return True

    def holds(self, case: str, correct: bool, detail: str = "") -> bool:
        """`correct`; a case that is not has no row and makes the script fail."""
        if not correct:
            self.failures.append(f"{case}: wrong result {detail}".rstrip())
            print(self.failures[-1], file=sys.stderr, flush=True)
        return bool(correct)

    def times(self, contenders: dict[str, Callable[[], object]], rounds: int | None = None) -> dict[str, Measure]:
        """Milliseconds of each contender, called in turn in every round, after one call to warm up.

        Short calls get more rounds: the speed of a shared machine changes from second to second. With `--cpu-time`
        they hold on a machine that others use, too.
        """
        once = {name: self._seconds(run) for name, run in contenders.items()}
        repeats = {name: max(1, int(ROUND_SECONDS / seconds)) for name, seconds in once.items()}
        if rounds is None:
            a_round = sum(max(ROUND_SECONDS, seconds) for seconds in once.values())
            rounds = 3 if self.quick else min(MOST_ROUNDS, max(ROUNDS, int(SECONDS / a_round)))
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, run in contenders.items():
                seconds[name].append(self._seconds(run, repeats[name]))
        return {name: measure([s * 1e3 for s in all_of_it]) for name, all_of_it in seconds.items()}

    def _seconds(self, run: Callable[[], object], repeats: int = 1) -> float:
        clock = time.process_time if self.cpu_time else time.perf_counter
        synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        synchronize()
        start = clock()
        for _ in range(repeats):
            run()
        synchronize()
        return (clock() - start) / repeats

    def add(
        self,
        case: str,
        ours: Measure | float,
        peer: Measure | float,
        *,
        peer_name: str,
        unit: str = "ms",
        must: float | None = None,
        stretch: float | None = None,
    ) -> Row:
        """Record and print one comparison; smaller values of `unit` are better."""
        values = [m.median if isinstance(m, Measure) else float(m) for m in (ours, peer)]
        ranges = [(m.low, m.high) if isinstance(m, Measure) else None for m in (ours, peer)]
        row = Row(self.section, case, *values, values[1] / values[0], peer_name, unit, must, stretch, *ranges)
        self.rows.append(row)
        print(_line(row), flush=True)
        return row

    def finish(self) -> int:
        """Write what was asked for; the exit status: 1 if a case failed its check."""
        here = surroundings(self.cpu_time)
        record = {
            "title": self.title,
            **here,
            "runs": {section: here for section in self.notes},
            "notes": self.notes,
            "rows": [asdict(r) for r in self.rows],
        }
        if self.args.json:
            record = _with_other_sections(record, self.args.json)
            write(self.args.json, json.dumps(record, indent=1) + "\n")
        if self.args.page:
            write(self.args.page, page(record))
        return 1 if self.failures else 0


def measure(values: list[float]) -> Measure:
    return Measure(statistics.median(values), min(values), max(values))


def shown(value: float | None) -> str:
    """Three digits, for people."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def page(record: dict) -> str:
    """A record as Markdown: what was run where, then a table for each section."""
    lines = [f"# {record['title']}", ""]
    lines += [f"{name}: {record[name]}  " for name in ("date", "machine", "versions") if name in record]
    lines += ["", "```", *record["commands"], "```"]
    lines += ["", "Each ratio says how many times better than its peer we are (peer / ours)."]
    for section in dict.fromkeys(row["section"] for row in record["rows"]):
        lines += ["", *([f"## {section}", ""] if section else []), record["notes"].get(section, ""), ""]
        run = record.get("runs", {}).get(section, record)
        if any(run[name] != record[name] for name in ("machine", "versions")):
            lines += [f"Run {run['date']} on {run['machine']}; {run['versions']}.", ""]
        lines += ["| case | ours | peer | | ratio | must | stretch | |", "|---|--:|--:|---|--:|--:|--:|---|"]
        for entry in record["rows"]:
            if entry["section"] == section:
                row = Row(**entry)
                cells = (row.case, f"{shown(row.ours)} {row.unit}", f"{shown(row.peer)} {row.unit}", row.peer_name)
                cells += (f"**{shown(row.ratio)}**", shown(row.must), shown(row.stretch), row.verdict)
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _with_other_sections(record: dict, path: Path) -> dict:
    """The record with the sections that an earlier run wrote to `path` and this one did not run."""
    if not path.exists():
        return record
    before = json.loads(path.read_text())
    kept = [row for row in before["rows"] if row["section"] not in record["notes"]]
    if not kept:
        return record
    notes = {row["section"]: before["notes"].get(row["section"], "") for row in kept}
    earlier = {name: before[name] for name in ("date", "machine", "versions", "commands")}
    runs = {section: before.get("runs", {}).get(section, earlier) for section in notes} | record["runs"]
    return {
        **record,
        "commands": list(dict.fromkeys(command for run in runs.values() for command in run["commands"])),
        "runs": runs,
        "notes": notes | record["notes"],
        "rows": kept + record["rows"],
    }


def surroundings(cpu_time: bool = False) -> dict:
    """When, where and by which command this runs."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_cpu_name()}, CPU only"
    threads = "processor time of 1 thread" if cpu_time else f"{torch.get_num_threads()} threads"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{device}, {threads}",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"python {platform.python_version()}",
        "commands": [shlex.join(["python", *sys.argv])],
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _header() -> str:
    return f"{'case':<58} {'ours':>9} {'peer':>9} {'':<4} {'ratio':>7} {'must':>6} {'stretch':>7}"


def _line(row: Row) -> str:
    numbers = f"{shown(row.ours):>9} {shown(row.peer):>9} {row.unit:<4} {shown(row.ratio):>7}"
    goals = f"{shown(row.must):>6} {shown(row.stretch):>7} {row.verdict}"
    return f"{f'{row.case} / {row.peer_name}':<58} {numbers} {goals}".rstrip()
