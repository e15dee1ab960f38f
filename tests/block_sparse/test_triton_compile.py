"""What the Triton kernels become, read without a GPU: spills of the machine code, and how often they are compiled."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

WITHOUT_INTERPRETER = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
RECOMPILATIONS = """
import torch, triton
from triton.backends.compiler import GPUTarget
from hf_tfamily.block_sparse.triton import attention, call, launch
from hf_tfamily.modeling.attention_patterns import Fixed, Local, Strided, Union
from hf_tfamily.block_sparse.patterns import to_text

class Driver:  # a GPU that is not there: enough to compile for
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

triton.runtime.driver.set_active(Driver())
call._check = lambda *_: None
call.view_of = lambda *_: None

def only_compile(kernel):
    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: kernel.warmup(*args, grid=grid, **kwargs)
    return Kernel()

kernels = call.kernels()
names = ("forward", "delta", "query_grad", "key_grad", "key_grad_sum")
launched = kernels._replace(**{name: only_compile(getattr(kernels, name)) for name in names})
launch.kernels = call.kernels = lambda: launched

def compiled():
    return sum(len(cache[0]) for name in names for cache in getattr(kernels, name).device_caches.values())

for pattern in (Local(300), Fixed(32, 8), Union([Local(16), Strided(16)])):
    counts = []
    for length, past in ((256, 0), (2000, 0), (512, 0), (333, 17), (1000, 3), (1111, 0)):
        q = torch.zeros(1, length, 2, 16, dtype=torch.bfloat16)
        k = torch.zeros(1, length + past, 2, 16, dtype=torch.bfloat16)
        where = (to_text(pattern), True, 0.5, past, 0)
        output, lse = attention.forward(q, k, k, None, *where)
        attention.backward(output, q, k, k, None, output, lse, *where)
        counts.append(compiled())
    print(pattern, counts)
    assert counts[-1] == counts[1], counts  # a short and a long sequence may take tiles of different sizes
print("held")
"""


def compile_cases(*options):
    command = [sys.executable, "-m", "tests.block_sparse.compile_kernels", *options]
    result = subprocess.run(command, capture_output=True, text=True, env=WITHOUT_INTERPRETER)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " 0 that spill or do not fit" in result.stdout


def test_a_sample_of_the_tiles_does_not_spill():
    compile_cases("--cases", "sample", "--arch", "90")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90"])
def test_no_entry_spills(arch):
    """Each once; `python -m tests.block_sparse.compile_kernels` compiles all that a call can ask of them."""
    compile_cases("--cases", "entries", "--arch", arch)


@pytest.mark.slow
def test_a_new_length_compiles_nothing():
    command = [sys.executable, "-c", RECOMPILATIONS]
    result = subprocess.run(command, capture_output=True, text=True, env=WITHOUT_INTERPRETER)
    assert "held" in result.stdout, result.stdout[-3000:] + result.stderr[-3000:]
