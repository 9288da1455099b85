# SPDX-License-Identifier: Apache-2.0
"""Rows of logits with a temperature and a banned token, as the row kernels read them.

Arguments shared by those kernels, everywhere of the same meaning:
    logits: [R, V] fp16, bf16 or fp32, last dimension contiguous, any row stride.
    temperature: [R] fp32, or None for 1. A row below `GREEDY_BELOW` is greedy, as in vLLM: its
        distribution is that of temperature 1 and its token the argmax.
    banned_id: a token that counts as -inf in every row, or None.
    needed: [R] int32 or bool; a row of 0 is not read.

A row that holds NaN or +inf, or nothing but -inf, gives token 0 with the least confidence:
probability 0, margin 0, entropy infinite.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import multiprocessor_count
from .validation import FLOAT_DTYPES, require, require_tensor

TILE = 4096  # logits that a program reads at a time
PROGRAMS_PER_PROCESSOR = 4  # of 4 warps each: enough loads in flight to cover memory latency

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
GREEDY_BELOW = tl.constexpr(1e-5)
# Stands for -inf: its weight is 0 beside any logit, and differences and products stay finite.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def load_logits(row_ptr, offsets, vocab_size, banned_id, HAS_BAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits in fp32, at least `LOWEST`, which also stands past the end of the row; NaN stays."""
    mask = offsets < vocab_size
    logits = tl.load(row_ptr + offsets, mask=mask, other=-float("inf")).to(tl.float32)
    if HAS_BAN:
        logits = tl.where(offsets == banned_id, LOWEST, logits)
    return tl.maximum(logits, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exponent_scale(temperature_ptr, row, HAS_TEMPERATURE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Factor from logits to base-2 exponents: log2(e) / T."""
    temperature = 1.0
    if HAS_TEMPERATURE:
        loaded = tl.load(temperature_ptr + row)
        temperature = tl.where(loaded < GREEDY_BELOW, 1.0, loaded)
    return LOG2_E / temperature


@triton.jit
def rows_of_program(  # type: ignore[no-untyped-def]
    logits_ptr,
    stride_logits,
    temperature_ptr,
    needed_ptr,
    num_rows,
    BLOCK_R: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_NEEDED: tl.constexpr,
):
    """[BLOCK_R] each: places in the output, whether there is such a row, the row to read (of those
    past the end row 0, of which nothing is stored), whether it is needed, `exponent_scale`; and
    [BLOCK_R, 1] pointers to the logits."""
    index = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = index < num_rows
    row = tl.where(valid, index, 0)
    needed = valid
    if HAS_NEEDED:
        needed = valid & (tl.load(needed_ptr + row) != 0)
    scale = exponent_scale(temperature_ptr, row, HAS_TEMPERATURE) + tl.zeros([BLOCK_R], tl.float32)
    return index, valid, row, needed, scale, logits_ptr + row[:, None] * stride_logits


def row_parts(num_rows: int, vocab_size: int, device: torch.device) -> tuple[int, int]:
    """Parts a row is cut into so that few rows fill the GPU too, and the tiles of a part."""
    num_tiles = triton.cdiv(vocab_size, TILE)
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * multiprocessor_count(device), num_rows)
    tiles_per_part = triton.cdiv(num_tiles, min(wanted, num_tiles))
    return triton.cdiv(num_tiles, tiles_per_part), tiles_per_part


def check_logits(
    logits: Tensor, temperature: Tensor | None, banned_id: int | None, needed: Tensor | None
) -> None:
    """Raise ValueError naming the argument with a wrong shape, dtype, device, stride or value."""
    device = logits.device
    require_tensor("logits", logits, (None, None), FLOAT_DTYPES, device)
    num_rows, vocab_size = logits.shape
    require(vocab_size > 0, "logits", "an empty vocabulary")
    if temperature is not None:
        require_tensor("temperature", temperature, (num_rows,), (torch.float32,), device)
    if banned_id is not None:
        require(0 <= banned_id < vocab_size, "banned_id", f"{banned_id} is no token")
    if needed is not None:
        require_tensor("needed", needed, (num_rows,), (torch.int32, torch.bool), device)


def columns(
    count: int, num_rows: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """[R] of 4 bytes each, uninitialised, at multiples of 16 bytes: for any other address, which
    would depend on R, Triton compiles a kernel anew."""
    padded = triton.cdiv(num_rows, 4) * 4
    return torch.empty((count, padded), dtype=dtype, device=device)[:, :num_rows].unbind()


def log_probabilities_reference(
    logits: Tensor,
    temperature: Tensor | None = None,
    banned_id: int | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Plain PyTorch ln p of the distribution described above: [R, V] in `compute_dtype`."""
    scores = logits.to(compute_dtype)
    if banned_id is not None:
        scores = scores.clone()
        scores[:, banned_id] = -torch.inf
    if temperature is not None:
        divisor = torch.where(temperature < GREEDY_BELOW.value, 1.0, temperature)
        scores = scores / divisor.to(compute_dtype)[:, None]
    return scores.log_softmax(dim=-1)


def sound_rows(logits: Tensor, banned_id: int | None) -> Tensor:
    """[R] bool: rows with a largest logit that is finite."""
    logits = logits.clone()
    if banned_id is not None:
        logits[:, banned_id] = -torch.inf
    return logits.amax(dim=-1).isfinite()
