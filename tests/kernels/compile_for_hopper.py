# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel for sm_90 without a GPU: the launchers run on CPU tensors, and each launch
is compiled from the types of its arguments instead of being started.

A script, because the tests' own process interprets kernels: `python compile_for_hopper.py`. Prints
one line per launch: kernel, registers, stack bytes (spills), shared memory bytes.
"""

import re
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import triton.backends.nvidia
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
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


def type_of(value: object) -> str:
    if isinstance(value, Tensor):
        return "*" + TRITON_TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32"


def compile_launch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
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
    compiled = triton.compile(source, target=HOPPER, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"(?:REG|STACK):(\d+)", usage)[:2]
    print(f"{kernel.__name__} {registers} {stack} {compiled.metadata.shared}", flush=True)


def launch_attention(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """NBDiff-7B: 32 query rows, 32/8 heads of 128."""
    from vllm_nbdiff.kernels.kv_scales import KVScales
    from vllm_nbdiff.kernels.segment_attention import segment_attention
    from vllm_nbdiff.kernels.segment_table import SegmentTable
    from vllm_nbdiff.kernels.write_kv import write_kv

    cache = torch.zeros(2, 2, 16, 8, 128, dtype=cache_dtype)
    k_cache, v_cache = cache.unbind(1)
    scales = KVScales(torch.tensor(1.0), torch.tensor(1.0)) if cache_dtype != dtype else None
    new = torch.zeros(32, 8, 128, dtype=dtype)
    write_kv(new, new, k_cache, v_cache, torch.arange(32), kv_scales=scales)
    start, length, causal = (torch.tensor(x, dtype=torch.int32) for x in ([0, 32], [32], [0]))
    table = SegmentTable(start, length, causal, torch.tensor([[0, 1]], dtype=torch.int32))
    q = torch.zeros(32, 32, 128, dtype=dtype)
    for splits in (1, 4):
        segment_attention(
            q, k_cache, v_cache, table, scale=0.1, num_kv_splits=splits, kv_scales=scales
        )


def launch_rows(dtype: torch.dtype) -> None:
    from vllm_nbdiff.kernels.row_sample import row_sample
    from vllm_nbdiff.kernels.row_statistics import row_statistics

    logits, draw = torch.zeros(4, 153376, dtype=dtype), torch.zeros(4, dtype=torch.float64)
    temperature, needed = torch.ones(4), torch.ones(4, dtype=torch.int32)
    row_statistics(logits)
    row_statistics(logits, temperature=temperature, banned_id=1, needed=needed)
    row_sample(logits, draw=draw)
    row_sample(
        logits,
        draw=draw,
        temperature=temperature,
        banned_id=1,
        needed=needed,
        top_k=needed.long(),
        top_p=temperature,
        min_p=temperature,
    )


def main() -> None:
    warnings.simplefilter("ignore")
    JITFunction.run = compile_launch
    for dtype in (torch.bfloat16, torch.float32):
        launch_attention(dtype, dtype)
        launch_rows(dtype)
    launch_attention(torch.bfloat16, torch.float8_e4m3fn)


if __name__ == "__main__":
    main()
