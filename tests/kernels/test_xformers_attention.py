# SPDX-License-Identifier: Apache-2.0
"""Attention by xformers: its own kernel in the interpreter where it is installed, and what its
absence says. The former needs Triton up to 3.8, TRITON_INTERPRET=1 and XFORMERS_ENABLE_TRITON=1.
"""

import sys
from collections.abc import Iterator

import pytest
import torch
import triton
from triton.runtime.interpreter import InterpretedFunction
from vllm_nbdiff.kernels import xformers_attention as module
from vllm_nbdiff.kernels.segment_attention import segment_attention_reference
from vllm_nbdiff.kernels.xformers_attention import xformers_attention

from tests.kernels.attention_cases import Case, Segment, make_case

CASE = [
    Segment(rows=37, kv_len=37, causal=1),  # prefill from nothing
    Segment(rows=20, kv_len=213, causal=1),  # a later chunk of a prefill
    Segment(rows=32, kv_len=160, causal=0),  # denoise
    Segment(rows=32, kv_len=128, causal=1),  # commit
    Segment(rows=1, kv_len=150, causal=1),  # AR decode
    Segment(rows=0, kv_len=0, causal=0),  # padding
    Segment(rows=1, kv_len=1, causal=0),  # one row, one key
]


def case_of(page_size: int = 64) -> Case:
    return make_case(CASE, torch.float16, page_size=page_size)


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
    case = case_of()
    exact = segment_attention_reference(*case, scale=case.scale)
    eager = segment_attention_reference(*case, scale=case.scale, compute_dtype=torch.float16)
    bound = 2 * (eager.double() - exact).abs().max()
    ours = xformers_attention(*case, scale=case.scale)
    assert (ours.double() - exact).abs().max() <= bound


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vllm-nbdiff\[xformers\]'"):
        xformers_attention(*case_of(), scale=1.0)


def test_a_causal_segment_is_cut_and_each_part_sees_its_own_keys() -> None:
    """37 rows of 37 keys: 16, 16 and 5 rows. One row needs no causal bias."""
    pieces = module._pieces(case_of().segments)
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
    case = case_of()
    table = case.segments
    bad = {
        "q": case._replace(q=case.q.float()),
        "k_cache": case_of(page_size=16),
        "v_cache": case._replace(v_cache=case.v_cache.contiguous()),
        "kv_len": case._replace(segments=table._replace(kv_len=table.kv_len.long())),
        "causal": case._replace(segments=table._replace(causal=table.causal[:-1])),
        "query_start": case._replace(
            segments=table._replace(query_start=table.query_start.to("meta"))
        ),
        "page_table": case._replace(segments=table._replace(page_table=table.page_table + 10**6)),
    }
    for argument, wrong in bad.items():
        with pytest.raises(ValueError, match=f"^{argument}: "):
            xformers_attention(*wrong, scale=1.0)
    with pytest.raises(ValueError, match=r"^scale: "):
        xformers_attention(*case, scale=0.0)
