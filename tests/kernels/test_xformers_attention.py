# SPDX-License-Identifier: Apache-2.0
"""Attention by xformers: its own kernel in the interpreter where it is installed, and what its
absence says. The former needs Triton up to 3.8, TRITON_INTERPRET=1 and XFORMERS_ENABLE_TRITON=1.
"""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from triton.runtime.interpreter import InterpretedFunction
from vllm_nbdiff.kernels import xformers_attention as module
from vllm_nbdiff.kernels.segment_attention import segment_attention_reference
from vllm_nbdiff.kernels.segment_table import SegmentTable
from vllm_nbdiff.kernels.xformers_attention import xformers_attention

SEGMENTS = [  # rows, KV length, causal
    (37, 37, 1),  # prefill from nothing
    (20, 213, 1),  # a later chunk of a prefill
    (32, 160, 0),  # denoise
    (32, 128, 1),  # commit
    (1, 150, 1),  # AR decode
    (0, 0, 0),  # padding
    (1, 1, 0),  # one row, one key
]


def make_case(page_size: int = 64, head_dim: int = 32) -> dict[str, Any]:
    """4/2 heads, K and V of a page side by side, NaN in what no segment sees."""
    rows, kv_len, causal = torch.tensor(SEGMENTS, dtype=torch.int32).T.contiguous().unbind()
    width = -(-int(kv_len.max()) // page_size)
    table = torch.randperm(len(SEGMENTS) * width).view(-1, width).int()
    cache = torch.full((table.numel(), 2, page_size, 2, head_dim), torch.nan, dtype=torch.float16)
    for segment, length in enumerate(kv_len.tolist()):
        keys = torch.arange(length)
        place = (table[segment, keys // page_size].long(), slice(None), keys % page_size)
        cache[place] = torch.randn(length, 2, 2, head_dim).half()
    start = torch.nn.functional.pad(rows.cumsum(0), (1, 0)).int()
    return {
        "q": torch.randn(int(rows.sum()), 4, head_dim).half(),
        "k_cache": cache[:, 0],
        "v_cache": cache[:, 1],
        "segments": SegmentTable(start, kv_len, causal, table),
        "scale": head_dim**-0.5,
    }


@pytest.fixture
def xformers_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """xformers' split-K operator, interpreted; its device check is all that keeps it from a CPU."""
    fmha = pytest.importorskip("xformers.ops.fmha")
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) > module.LAST_TRITON:
        pytest.skip(f"xformers does not run on triton {triton.__version__}")
    kernels = pytest.importorskip("xformers.ops.fmha._triton.splitk_kernels")
    if not isinstance(kernels._fwd_kernel_splitK, InterpretedFunction):
        pytest.skip("needs TRITON_INTERPRET=1 and XFORMERS_ENABLE_TRITON=1 from the start")
    monkeypatch.setattr(fmha.triton_splitk.FwOp, "SUPPORTED_DEVICES", {"cpu", "cuda"})
    yield


@pytest.mark.usefixtures("xformers_on_cpu")
def test_segments_of_every_kind_in_one_call() -> None:
    """As exact as eager fp16, by the bound of `test_segment_attention.py`."""
    case = make_case()
    exact = segment_attention_reference(**case)
    eager = segment_attention_reference(**case, compute_dtype=torch.float16)
    bound = 2 * (eager.double() - exact).abs().max()
    assert (xformers_attention(**case).double() - exact).abs().max() <= bound


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vllm-nbdiff\[xformers\]'"):
        xformers_attention(**make_case())


def test_a_causal_segment_is_cut_and_each_part_sees_its_own_keys() -> None:
    """37 rows of 37 keys: 16, 16 and 5 rows. One row needs no causal bias."""
    pieces = module._pieces(make_case()["segments"])
    prefill = [(p.first_row, p.rows, p.kv_len, p.causal) for p in pieces if p.segment == 0]
    assert prefill == [(0, 16, 16, True), (16, 16, 32, True), (32, 5, 37, True)]
    denoise, decode, single = ([p for p in pieces if p.segment == s] for s in (2, 4, 6))
    assert denoise == [module._Piece(2, 57, 32, 160, False)]
    assert decode == [module._Piece(4, 121, 1, 150, False)]
    assert single == [module._Piece(6, 122, 1, 1, False)]


@pytest.mark.parametrize("pages_side_by_side", [1, 2])
def test_the_cache_as_one_sequence(pages_side_by_side: int) -> None:
    """Page p of the cache is page p * `_pages_per_stride` of the sequence."""
    cache = torch.arange(5 * pages_side_by_side * 64 * 3 * 8.0)
    cache = cache.view(5, pages_side_by_side, 64, 3, 8)[:, -1]
    apart = module._pages_per_stride("k_cache", cache)
    assert apart == pages_side_by_side
    sequence = module._one_sequence(cache, 4, apart)
    pages = sequence.view(1, -1, 64, 3, 4, 8)[0, ::apart]
    assert torch.equal(pages, cache[:, :, :, None].expand(5, 64, 3, 4, 8))


def test_wrong_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_import_fmha", lambda: None)
    case = make_case()
    table = case["segments"]
    bad = {
        "q": {"q": case["q"].float()},
        "k_cache": make_case(page_size=16),
        "v_cache": {"v_cache": case["v_cache"].contiguous()},
        "scale": {"scale": 0.0},
        "kv_len": {"segments": table._replace(kv_len=table.kv_len.long())},
        "causal": {"segments": table._replace(causal=table.causal[:-1])},
        "query_start": {"segments": table._replace(query_start=table.query_start.to("meta"))},
        "page_table": {"segments": table._replace(page_table=table.page_table + 10**6)},
    }
    for argument, change in bad.items():
        with pytest.raises(ValueError, match=f"^{argument}: "):
            xformers_attention(**{**case, **change})
