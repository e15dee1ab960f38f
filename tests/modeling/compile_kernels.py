"""Compiles every entry of the kernels' configuration table without a GPU, and reads what it takes from the binary.

    python -m tests.modeling.compile_kernels [--arch 80 90] [--dims 64,64 64,128] [--quick]

prints one line for each: kernel, walk, dtype, head dimensions, options, registers, bytes on the stack (spills), shared
memory. Ends with status 1 if anything spills or does not fit.
"""

import argparse
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

from hf_tfamily.modeling import attention_triton_configs as configs
from hf_tfamily.modeling import attention_triton_kernels as kernels
from hf_tfamily.modeling.attention_triton_key_gradients import key_grad_kernel
from hf_tfamily.modeling.attention_triton_query_gradients import query_grad_kernel

SHARED_MEMORY = {80: 99 << 10, 90: 227 << 10}  # 99 KiB: what all of compute capability 8 have
FUNCTIONS = {
    configs.FORWARD: kernels.forward_kernel,
    configs.QUERY_GRAD: query_grad_kernel,
    configs.KEY_GRAD: key_grad_kernel,
}
DIMS = [(16, 16), (32, 32), (64, 64), (96, 96), (128, 128), (64, 128)]
RANGE, PICKED, TABLE, NONE = (kind.value for kind in (kernels.RANGE, kernels.PICKED, kernels.TABLE, kernels.NONE))


class Case(NamedTuple):
    arch: int
    kernel: str
    walk: str
    dtype: str
    dims: tuple[int, int]
    kind: int
    other: int = NONE
    granule: int = 16
    has_valid: bool = True

    @property
    def tile(self) -> configs.Tile:
        dim = max(map(_padded, self.dims))
        return configs.tile_for(self.kernel, self.walk, dim, self.dtype == "fp32", older=self.arch < 90)


class Usage(NamedTuple):
    registers: int
    stack: int
    shared: int


def cases(arch: int, all_dims: list[tuple[int, int]], quick: bool = False) -> Iterator[Case]:
    """Every tile of the table, with padding and with both kinds of columns that suit the kernel.

    `quick`: head dimension 64 in bf16, one kind of columns.
    """
    for kernel, walk in configs.HALF:
        if walk in (configs.TABLE, configs.BIASED_TABLE):
            kinds = [(TABLE, NONE, 16), (TABLE, NONE, 32)]
        elif kernel == configs.KEY_GRAD:
            kinds = [(RANGE, NONE, 16), (PICKED, NONE, 16)]
        else:
            kinds = [(RANGE, PICKED, 16), (PICKED, NONE, 16)]
        for kind in kinds[:1] if quick else kinds:
            for dims in [(64, 64)] if quick else all_dims:
                yield Case(arch, kernel, walk, "bf16", dims, *kind)
    if quick:
        return
    for kernel, dims in product(FUNCTIONS, all_dims):
        source = (RANGE, NONE) if kernel == configs.KEY_GRAD else (RANGE, PICKED)
        yield Case(arch, kernel, configs.WIDE, "fp16", dims, *source, has_valid=False)
        yield Case(arch, kernel, configs.WIDE, "fp32", dims, *source)
        if _padded(max(dims)) <= 64:
            yield Case(arch, kernel, configs.TABLE, "fp32", dims, TABLE)


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
        "HAS_BIAS": case.walk in (configs.BIASED, configs.BIASED_TABLE),
        "MERGE": False,
        "FINAL": True,
        "ADD": False,
        "SPLIT": False,
        "PRECISION": "tf32x3",
        "UPCAST": False,
    }
    signature, attributes, values = {}, {}, {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], values[(place,)] = "constexpr", constants[name]
        else:
            signature[name] = _type(name, case)
            aligned = name.startswith("stride_") and name not in kernels.LENGTHS and name != "stride_br"
            if aligned or name.endswith("_ptr"):
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, values, attributes)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    return Usage(*_resources(compiled.asm["cubin"]), compiled.metadata.shared)


def _padded(dim: int) -> int:
    return next(size for size in configs.HEAD_DIMS if dim <= size)


def _type(name: str, case: Case) -> str:
    if name in ("scale", "score_scale"):
        return "fp32"
    if not name.endswith("_ptr"):
        return "i32"
    whole = ("items_ptr", "low_ptr", "high_ptr", "listed_ptr", "slots_ptr", "bits_ptr")
    if name.endswith(whole):
        return "*i32"
    if name == "valid_ptr":
        return "*u8"
    return "*fp32" if name in ("lse_ptr", "delta_ptr", "workspace_ptr") else f"*{case.dtype}"


def _resources(binary: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text.stdout)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=SHARED_MEMORY)
    parser.add_argument("--quick", action="store_true", help="head dimension 64 in bfloat16 only")
    parser.add_argument("--dims", nargs="+", default=DIMS, type=lambda text: tuple(map(int, text.split(","))))
    options = parser.parse_args()
    bad = count = 0
    for arch in options.arch:
        for case in cases(arch, options.dims, options.quick):
            usage = compile_case(case)
            good = usage.stack == 0 and usage.shared <= SHARED_MEMORY[arch]
            count, bad = count + 1, bad + (not good)
            print(f"{'ok ' if good else 'BAD'} {' '.join(map(str, case))} {tuple(case.tile)} {usage}", flush=True)
    print(f"triton {triton.__version__}: {count} configurations, {bad} that spill or do not fit")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
