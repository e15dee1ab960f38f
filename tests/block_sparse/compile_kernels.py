"""Compiles the kernels' configuration table without a GPU, and reads what each entry takes from the machine code.

    python -m tests.block_sparse.compile_kernels [--cases all entries sample] [--arch 80 90] [--dims 64,64 64,128]
    python -m tests.block_sparse.compile_kernels --output benchmarks/triton_compile

prints one line for each configuration that a call can lead to: registers, bytes on the stack (spills), shared memory.
`all` of them, each of the table's `entries` at least once, or a `sample` of each kernel. With --output they are kept
in a JSON file beside those of other versions of Triton and, where the table still has their tiles, those that were not
compiled anew; a page is made of all. With --missing only what is not kept there is compiled, which is enough after a
change of the table, not of a kernel. Ends with status 1 if anything spills or does not fit.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_tfamily.block_sparse.triton import kernels
from hf_tfamily.block_sparse.triton import tiles as configs
from hf_tfamily.block_sparse.triton.key_gradients import key_grad_kernel, key_grad_sum_kernel
from hf_tfamily.block_sparse.triton.query_gradients import delta_kernel, query_grad_kernel
from tests.block_sparse.compile_page import page

SHARED_MEMORY = {80: 99 << 10, 90: 227 << 10}  # a block's; 99 KiB: of 8.6 and 8.9, which take 8.0's entries (163 KiB)
KEY_GRAD_SUM, DELTA = "key_grad_sum", "delta"
FUNCTIONS = {
    configs.FORWARD: kernels.forward_kernel,
    configs.QUERY_GRAD: query_grad_kernel,
    configs.KEY_GRAD: key_grad_kernel,
    KEY_GRAD_SUM: key_grad_sum_kernel,
    DELTA: delta_kernel,
}
DIMS = [(16, 16), (32, 32), (64, 64), (96, 96), (128, 128), (64, 128), (256, 256), (192, 128)]
RANGE, PICKED, TABLE, NONE = (kind.value for kind in (kernels.RANGE, kernels.PICKED, kernels.TABLE, kernels.NONE))
TABLES = (configs.TABLE, configs.BIASED_TABLE)


class Case(NamedTuple):
    """What a kernel is compiled for. `later`: it adds to what earlier launches left, and of keys only some queries."""

    arch: int
    kernel: str
    walk: str
    dtype: str
    dims: tuple[int, int]
    kind: int
    other: int = NONE
    granule: int = 16
    has_valid: bool = True
    later: bool = False

    @property
    def tile(self) -> configs.Tile:
        if self.kernel == DELTA:
            return configs.Tile(64, 64, 4, 3)
        kernel = configs.KEY_GRAD if self.kernel == KEY_GRAD_SUM else self.kernel
        dim = max(map(_padded, self.dims))
        tile = configs.tile_for(kernel, self.walk, dim, self.dtype == "fp32", older=self.arch < 90)
        if self.kernel == KEY_GRAD_SUM:
            return tile._replace(num_warps=configs.sum_warps(dim, tile.block_n), num_stages=3)
        return tile


class Usage(NamedTuple):
    registers: int
    stack: int
    shared: int

    def fits(self, case: Case) -> bool:
        return self.stack == 0 and self.shared <= SHARED_MEMORY[case.arch]


# ---------------------------------------------------------------------------------------------------------------------
# Cases


def all_cases(arch: int, all_dims: list[tuple[int, int]]) -> Iterator[Case]:
    """Every tile with every source that suits the kernel, and padding; the first in other dtypes and launches too."""
    rows = list(product(configs.HALF, all_dims))
    for (kernel, walk), dims in rows:
        yield Case(arch, kernel, walk, "bf16", dims, *_sources(kernel, walk)[0])
    for (kernel, walk), dims in rows:
        yield Case(arch, kernel, walk, "fp32", dims, *_sources(kernel, walk)[0])
    for dims in all_dims:
        yield Case(arch, DELTA, configs.WIDE, "bf16", dims, RANGE)
        for walk in (configs.WIDE, configs.NARROW, configs.FEW):
            yield Case(arch, KEY_GRAD_SUM, walk, "bf16", dims, PICKED)
    for (kernel, walk), dims in rows:
        first, *others = _sources(kernel, walk)
        yield Case(arch, kernel, walk, "bf16", dims, *first, has_valid=False, later=True)
        for source in others:
            case = Case(arch, kernel, walk, "bf16", dims, *source)
            if case.granule <= case.tile.block_m:
                yield case
        yield Case(arch, kernel, walk, "fp16", dims, *first)


def entry_cases(arch: int, all_dims: list[tuple[int, int]]) -> Iterator[Case]:
    """Each entry of the table once, in the head dimension that asks most of it."""
    seen = set()
    for (kernel, walk), dtype, dim in product(configs.HALF, ("bf16", "fp32"), (32, 64, 128, 256)):
        case = Case(arch, kernel, walk, dtype, (dim, dim), *_sources(kernel, walk)[0])
        code = (kernel, dtype, dim, case.kind, case.tile, _is_biased(case))  # walks may share it
        if (dim, dim) in all_dims and code not in seen:
            seen.add(code)
            yield case


def sample_cases(arch: int, all_dims: list[tuple[int, int]]) -> Iterator[Case]:
    """One of each kernel."""
    for kernel in (configs.FORWARD, configs.QUERY_GRAD, configs.KEY_GRAD):
        yield Case(arch, kernel, configs.NARROW, "bf16", (64, 64), *_sources(kernel, configs.NARROW)[0])


CASES = {"all": all_cases, "entries": entry_cases, "sample": sample_cases}


def _sources(kernel: str, walk: str) -> list[tuple[int, int, int]]:
    """(kind, other, granule) that a kernel may walk over, that with the largest code first."""
    if walk in TABLES:
        return [(TABLE, NONE, 16), (TABLE, NONE, 32), (TABLE, NONE, 64)]
    if kernel == configs.KEY_GRAD:
        return [(RANGE, NONE, 16), (PICKED, NONE, 16)]
    return [(RANGE, PICKED, 16), (RANGE, NONE, 16), (PICKED, NONE, 16)]


# ---------------------------------------------------------------------------------------------------------------------
# Compilation


def compile_case(case: Case) -> Usage:
    """Registers, stack and shared memory of the machine code."""
    function, tile = FUNCTIONS[case.kernel], case.tile
    constants = {
        "D": case.dims[0],
        "DV": case.dims[1],
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": _padded(case.dims[0]),
        "BLOCK_DV": _padded(case.dims[1]),
        "KIND": case.kind,
        "OTHER": case.other,
        "GRANULE": case.granule,
        "HAS_VALID": case.has_valid,
        "HAS_BIAS": _is_biased(case),
        "GRAD_BIAS": _is_biased(case),
        "MERGE": case.later,
        "FINAL": True,
        "ADD": case.later,
        "SPLIT": case.later,
        "PRECISION": tile.precision,
        "UPCAST": False,
        "stride_br": 1,  # a bias is dense, and what is 1 is compiled for
    }
    signature, attributes, values = {}, {}, {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], values[(place,)] = "constexpr", constants[name]
        else:
            signature[name] = _type(name, case)
            if name.endswith("_ptr") or (name.startswith("stride_") and name not in kernels.LENGTHS):
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, values, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=tile.options)
    return Usage(*_resources(compiled.asm["cubin"]), compiled.metadata.shared)


def _is_biased(case: Case) -> bool:
    return case.walk in (configs.BIASED, configs.BIASED_TABLE)


def _padded(dim: int) -> int:
    return next(size for size in configs.HEAD_DIMS if dim <= size)


def _type(name: str, case: Case) -> str:
    if name in ("scale", "score_scale"):
        return "fp32"
    if not name.endswith("_ptr"):
        return "i32"
    if name.endswith(("items_ptr", "low_ptr", "high_ptr", "listed_ptr", "slots_ptr", "bits_ptr")):
        return "*i32"
    if name == "valid_ptr":
        return "*u8"
    is_sum = case.later and name in ("grad_query_ptr", "grad_key_ptr", "grad_value_ptr")
    return "*fp32" if is_sum or name in ("lse_ptr", "delta_ptr", "workspace_ptr") else f"*{case.dtype}"


def _resources(binary: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text.stdout)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


# ---------------------------------------------------------------------------------------------------------------------
# Command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="all", choices=CASES)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=SHARED_MEMORY)
    parser.add_argument("--dims", nargs="+", default=DIMS, type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--walks", nargs="+", help="only these rows of the table")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    parser.add_argument("--missing", action="store_true", help="only what OUTPUT.json does not hold")
    options = parser.parse_args()
    rows, bad = [], 0
    known = {_case_of(row) for row in kept_rows(options.output)} if options.missing else ()
    for case in (case for arch in options.arch for case in CASES[options.cases](arch, options.dims)):
        if case in known or (options.walks and case.walk not in options.walks):
            continue
        usage = compile_case(case)
        good = usage.fits(case)
        bad += not good
        rows.append({**case._asdict(), "tile": tuple(case.tile), **usage._asdict()})
        print(f"{'ok ' if good else 'BAD'} {' '.join(map(str, case))} {tuple(case.tile)} {usage}", flush=True)
    print(f"triton {triton.__version__}: {len(rows)} configurations, {bad} that spill or do not fit")
    if options.output and rows:
        write_report(options.output, rows)
    return bad > 0


def kept_rows(output: Path) -> list[dict]:
    """What earlier runs of this version of Triton compiled, where the table still has its tiles."""
    table = _tables(output).get(triton.__version__, {"columns": [], "rows": []})
    rows = [dict(zip(table["columns"], row)) for row in table["rows"]]
    return [row for row in rows if _case_of(row).tile == configs.Tile(*row["tile"])]


def _tables(output: Path) -> dict[str, dict]:
    path = output.with_suffix(".json")
    return json.loads(path.read_text()) if path.exists() else {}


def write_report(output: Path, rows: list[dict]) -> None:
    """Into the JSON beside what it has, a table for each version; the page is made of all."""
    path, tables = output.with_suffix(".json"), _tables(output)
    rows = list({_case_of(row): row for row in [*kept_rows(output), *rows]}.values())
    tables[triton.__version__] = {"columns": list(rows[0]), "rows": [list(row.values()) for row in rows]}
    record = {version: [dict(zip(table["columns"], row)) for row in table["rows"]] for version, table in tables.items()}
    for name, text in ((path, json.dumps(tables, separators=(",", ":"))), (output.with_suffix(".md"), page(record))):
        temporary = name.with_suffix(".tmp")
        temporary.write_text(text + "\n")
        temporary.replace(name)


def _case_of(row: dict) -> Case:
    return Case(**{name: tuple(row[name]) if name == "dims" else row[name] for name in Case._fields})


if __name__ == "__main__":
    sys.exit(main())
