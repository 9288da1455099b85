# SPDX-License-Identifier: Apache-2.0
"""Segment attention by xformers, to compare with and to check against: its split-K operator under
paged block-diagonal biases. Needs the extra `xformers`.

Of xformers' operators only this one takes paged keys without another package beside it. What it
asks for, read from its source (0.0.35): fp16 or bf16, heads of 16, 32, 64, 128, 256 or 512, pages
of a multiple of 64 tokens, a GPU of compute capability 8.0, and Triton's block pointers, which
Triton 3.9 removed. Lengths and flags are Python numbers, so a call cannot be replayed in a CUDA
graph with others.
"""

import itertools
from collections import defaultdict
from types import ModuleType
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .segment_table import SegmentTable
from .validation import require, require_tensor, values_are_checked

KEYS_PER_TILE = 64  # a tile of keys must lie in one page
MAX_CAUSAL_ROWS = 16  # of a sequence under a causal bias, where all need equally many
LAST_TRITON = (3, 8)


class _Piece(NamedTuple):
    """Consecutive rows of one segment; the last sees the first `kv_len` keys."""

    segment: int
    first_row: int
    rows: int
    kv_len: int
    causal: bool


def _pieces(segments: SegmentTable) -> list[_Piece]:
    """Segments of at least one row, causal ones cut to `MAX_CAUSAL_ROWS`."""
    pieces = []
    bounds = itertools.pairwise(segments.query_start.tolist())
    table = zip(bounds, segments.kv_len.tolist(), segments.causal.tolist(), strict=True)
    for segment, ((start, stop), kv_len, causal) in enumerate(table):
        step = MAX_CAUSAL_ROWS if causal else max(1, stop - start)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            # The rows after the piece are the segment's last keys, which a causal piece hides.
            seen = kv_len - (stop - last)
            pieces.append(_Piece(segment, first, last - first, seen, causal and last > first + 1))
    return pieces


def _import_fmha() -> ModuleType:
    try:
        from xformers.ops import fmha
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("xformers"):
            raise
        raise ModuleNotFoundError(
            "attention by xformers needs: pip install 'vllm-nbdiff[xformers]'", name="xformers"
        ) from error
    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found > LAST_TRITON:
        raise RuntimeError(
            f"xformers' split-K attention uses block pointers, which triton {triton.__version__} "
            f"no longer has; {'.'.join(map(str, LAST_TRITON))} is the last that does"
        )
    return fmha


def _pages_per_stride(name: str, cache: Tensor) -> int:
    """Pages that the distance between two pages amounts to: 2 where K and V alternate."""
    page_size, page, slot = cache.shape[1], *cache.stride()[:2]
    whole = page >= page_size * slot and page % (page_size * slot) == 0
    require(whole, name, "pages must lie a whole number of pages apart")
    return page // (page_size * slot)


def _one_sequence(cache: Tensor, group: int, pages_per_stride: int) -> Tensor:
    """A view of the cache as xformers takes it: [1, tokens, KV heads, query heads of each, dim]."""
    num_pages, page_size, num_kv_heads, head_dim = cache.shape
    tokens = ((num_pages - 1) * pages_per_stride + 1) * page_size
    shape = (1, tokens, num_kv_heads, group, head_dim)
    return cache.as_strided(shape, (0, *cache.stride()[1:3], 0, 1))


def _validate(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    segments: SegmentTable,
    scale: float,
    out: Tensor,
    check_values: bool | None,
) -> None:
    dtypes, host = (torch.float16, torch.bfloat16), torch.device("cpu")
    require_tensor("q", q, (None, None, None), dtypes, q.device)
    head_dim = q.shape[2]
    require_tensor("k_cache", k_cache, (None, None, None, head_dim), (q.dtype,), q.device)
    require_tensor("v_cache", v_cache, tuple(k_cache.shape), (q.dtype,), q.device)
    require_tensor("out", out, tuple(q.shape), (q.dtype,), q.device)
    page_size, num_kv_heads = k_cache.shape[1:3]
    fits = num_kv_heads > 0 and q.shape[1] % num_kv_heads == 0
    require(fits, "q", f"{q.shape[1]} heads over {num_kv_heads} KV heads")
    fits = page_size % KEYS_PER_TILE == 0
    require(fits, "k_cache", f"pages of {page_size} tokens, not a multiple of {KEYS_PER_TILE}")
    require(v_cache.stride() == k_cache.stride(), "v_cache", "strides differ from k_cache's")
    require(scale > 0, "scale", f"{scale} is not positive")
    count, int32 = segments.kv_len.numel(), (torch.int32,)
    require_tensor("kv_len", segments.kv_len, (None,), int32, host)
    require_tensor("query_start", segments.query_start, (count + 1,), int32, host)
    require_tensor("causal", segments.causal, (count,), int32, host)
    require_tensor("page_table", segments.page_table, (count, None), int32, q.device)
    if values_are_checked(check_values, q.device):
        segments.check_values(q.shape[0], k_cache.shape[0], page_size)


def xformers_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    segments: SegmentTable,
    *,
    scale: float,
    out: Tensor | None = None,
    check_values: bool | None = None,
) -> Tensor:
    """`segment_attention` by xformers: the same rows see the same keys.

    A causal segment is cut to `MAX_CAUSAL_ROWS` and reads its keys once for each of its parts. One
    call attends all bidirectional segments, and one the causal parts of each length.

    Args:
        q: [num_tokens, num_q_heads, head_dim], fp16 or bf16.
        k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim], q's dtype, of equal
            strides, pages a whole number of pages apart.
        segments: `page_table` on q's device, the other fields on the CPU.
        scale, out, check_values: as in `segment_attention`.

    Returns:
        out: [num_tokens, num_q_heads, head_dim].

    Raises:
        ModuleNotFoundError: xformers is not installed.
        RuntimeError: xformers' operator does not run on the installed Triton.
        ValueError: naming the argument that is wrong, or xformers' reasons for refusing.
    """
    fmha = _import_fmha()
    out = torch.empty_like(q) if out is None else out
    _validate(q, k_cache, v_cache, segments, scale, out, check_values)
    num_kv_heads, page_size = k_cache.shape[2], k_cache.shape[1]
    group = q.shape[1] // num_kv_heads
    apart = _pages_per_stride("k_cache", k_cache)
    keys, values = (_one_sequence(cache, group, apart) for cache in (k_cache, v_cache))
    calls: dict[int, list[_Piece]] = defaultdict(list)
    for piece in _pieces(segments):
        calls[piece.rows if piece.causal else 0].append(piece)
    bias = fmha.attn_bias
    for causal_rows, pieces in calls.items():
        kind = bias.PagedBlockDiagonalPaddedKeysMask
        if causal_rows:
            kind = bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
        rows = torch.cat([torch.arange(p.first_row, p.first_row + p.rows) for p in pieces])
        rows = rows.to(q.device)
        table = segments.page_table[[piece.segment for piece in pieces]] * apart
        mask = kind.from_seqlens(
            [piece.rows for piece in pieces],
            [piece.kv_len for piece in pieces],
            table,
            page_size,
            device=q.device,
        )
        result = fmha.memory_efficient_attention_forward(
            q[rows].view(1, len(rows), num_kv_heads, group, -1),
            keys,
            values,
            mask,
            scale=scale,
            op=fmha.triton_splitk.FwOp,
        )
        out[rows] = result[0].flatten(1, 2)
    return out
