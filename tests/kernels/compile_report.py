# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel for GPUs that need not be there, and prints what it takes of them.

    python tests/kernels/compile_report.py              # for A100, H200 and B200
    python tests/kernels/compile_report.py --targets 90 --groups 4 --heads 128

A script, because the tests' own process interprets kernels: launchers run on CPU tensors, and each
launch is compiled from the types of its arguments instead of being started. Attention reads the
engine's cache layout. Columns, tab-separated:

    case       types; for attention query heads of a KV head x head size, rows, keys whole or cut
    spills     bytes of stack per thread
    size       instructions of the program
    shared     bytes of shared memory per program
    buffers    tiles of K, and as many of V, that the loop over keys has room for
    resident   programs that an SM's registers and shared memory hold: arithmetic, no measurement
"""

import argparse
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from functools import partialmethod
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton.backends.nvidia
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction
from vllm_nbdiff.kernels import attention_launch as launches
from vllm_nbdiff.kernels.attention_launch import attention_launch
from vllm_nbdiff.kernels.kv_scales import FP8, KVScales
from vllm_nbdiff.kernels.row_sample import row_sample
from vllm_nbdiff.kernels.row_statistics import row_statistics
from vllm_nbdiff.kernels.segment_attention import segment_attention
from vllm_nbdiff.kernels.segment_table import SegmentTable
from vllm_nbdiff.kernels.write_kv import write_kv

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
TRITON_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
}
# CUDA C++ Programming Guide, technical specifications per compute capability.
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
RESERVED_KIB = 1  # of an SM's shared memory for every program on it
REGISTERS = 65536
WARPS = 64


def type_of(value: object) -> str:
    if isinstance(value, Tensor):
        return "*" + TRITON_TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32"


def compile_launch(
    kernel: JITFunction, target: int, case: str, *args: Any, grid: Any, warmup: bool, **kwargs: Any
) -> None:
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    options = {k: v for k, v in kwargs.items() if k not in names}
    constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
    signature = {n: "constexpr" if n in constants else type_of(values[n]) for n in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, p in enumerate(kernel.params)
        if not p.is_constexpr
        and (
            isinstance(values[p.name], Tensor)
            or (not p.do_not_specialize and values[p.name] % 16 == 0)
        )
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    print(f"sm_{target}", case, kernel.__name__, *usage(compiled, target), sep="\t", flush=True)


def usage(compiled: CompiledKernel, target: int) -> tuple[int, int, int, int, str, int]:
    """Registers, spills, instructions, shared memory, buffers and resident programs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", "-sass", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, spills = map(int, re.findall(r"(?:REG|STACK):(\d+)", printed)[:2])
    size = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", printed, re.MULTILINE))
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    resident = min(
        REGISTERS // (-(-registers // 8) * 8 * 32 * warps),
        (SHARED_KIB[target] + RESERVED_KIB) * 1024 // (shared + RESERVED_KIB * 1024),
        WARPS // warps,
    )
    # Tiles in shared memory, [buffers, keys, head size]; page ids have a dimension less.
    tiles = re.findall(r"ttg\.local_alloc.*?memdesc<(\d+)x\d+x\d+x\w+,", compiled.asm["ttgir"])
    return registers, spills, size, shared, "/".join(sorted(set(tiles))) or "-", resident


class Shape(NamedTuple):
    """Of an attention layer with 8 KV heads, and of the segment that it sees."""

    dtype: torch.dtype
    cache_dtype: torch.dtype
    group: int
    head_dim: int
    rows: int
    page_size: int = 16

    def __str__(self) -> str:
        cache, pages = TRITON_TYPES[self.cache_dtype], f", pages of {self.page_size}"
        pages = "" if self.page_size == 16 else pages
        return f"{cache} {self.group}x{self.head_dim}, {self.rows} rows{pages}"


def attention_shapes(groups: list[int], heads: list[int], target: int) -> Iterator[Shape]:
    """Canvases of 32 rows, also where a page holds a tile of keys, a single row, and fp32, which is
    there for tests."""
    half = torch.bfloat16
    caches = (half, FP8) if target >= 89 else (half,)
    for cache_dtype, group, head_dim in product(caches, groups, heads):
        yield Shape(half, cache_dtype, group, head_dim, 32)
    yield Shape(half, half, groups[0], heads[0], 32, page_size=64)
    yield Shape(half, half, groups[0], heads[0], 1)
    yield Shape(torch.float32, torch.float32, groups[0], heads[0], 32)


def compile_attention(shape: Shape, target: int) -> None:
    dtype, cache_dtype, group, head_dim, rows, page_size = shape
    cache = torch.zeros(2, 8, page_size, 2 * head_dim, dtype=cache_dtype)
    k_cache, v_cache = cache.transpose(1, 2).split(head_dim, dim=-1)
    scales = KVScales(torch.tensor(1.0), torch.tensor(1.0)) if cache_dtype == FP8 else None
    new = torch.zeros(rows, 8, head_dim, dtype=dtype)
    JITFunction.run = partialmethod(compile_launch, target, str(shape))
    write_kv(new, new, k_cache, v_cache, torch.arange(rows), kv_scales=scales)
    start, length, causal = (torch.tensor(x, dtype=torch.int32) for x in ([0, rows], [32], [0]))
    table = SegmentTable(start, length, causal, torch.tensor([[0, 1]], dtype=torch.int32))
    q = torch.zeros(rows, 8 * group, head_dim, dtype=dtype)
    for keys, most in (("whole", 1), ("in parts", 1 << 20)):
        JITFunction.run = partialmethod(compile_launch, target, f"{shape}, keys {keys}")
        launch = attention_launch(q, k_cache, table, max_kv_len=most)
        segment_attention(q, k_cache, v_cache, table, scale=0.1, launch=launch, kv_scales=scales)


def compile_rows(dtype: torch.dtype, target: int) -> None:
    """What is read from logits of NBDiff-7B's vocabulary, without any option and with all."""
    logits, draw = torch.zeros(4, 153376, dtype=dtype), torch.zeros(4, dtype=torch.float64)
    temperature, needed = torch.ones(4), torch.ones(4, dtype=torch.int32)
    filters = {"top_k": needed.long(), "top_p": temperature, "min_p": temperature}
    common: dict[str, Any] = {"temperature": temperature, "banned_id": 1, "needed": needed}
    for options, filtered in (({}, {}), (common, filters)):
        case = f"{TRITON_TYPES[dtype]} logits{', all options' if options else ''}"
        JITFunction.run = partialmethod(compile_launch, target, case)
        row_statistics(logits, **options)
        row_sample(logits, draw=draw, **options, **filtered)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--targets", type=int, nargs="+", choices=SHARED_KIB, default=[80, 90, 100])
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 7])
    parser.add_argument("--heads", type=int, nargs="+", default=[128, 64, 96, 256])
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    print("target\tcase\tkernel\tregisters\tspills\tsize\tshared\tbuffers\tresident")
    for target in given.targets:
        launches.shared_memory = lambda device, target=target: SHARED_KIB[target] * 1024
        for shape in attention_shapes(given.groups, given.heads, target):
            compile_attention(shape, target)
        for dtype in (torch.bfloat16, torch.float32):
            compile_rows(dtype, target)


if __name__ == "__main__":
    main()
