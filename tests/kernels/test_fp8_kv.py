# SPDX-License-Identifier: Apache-2.0
"""An fp8 KV cache: written, and attended to, against plain PyTorch.

The interpreter rounds to fp8 wrongly (1.99 becomes 1), so what is written here needs no rounding.
"""

import pytest
import torch
from vllm_nbdiff.kernels.kv_scales import FP8, KVScales
from vllm_nbdiff.kernels.segment_attention import segment_attention
from vllm_nbdiff.kernels.write_kv import write_kv, write_kv_reference

from tests.kernels.attention_cases import Case, Segment, assert_as_good_as_eager, make_case

DTYPES = [torch.float16, torch.bfloat16]
SCALES = KVScales(torch.tensor(0.25), torch.tensor(2.0))
MIXED = [Segment(13, 113, 1), Segment(8, 72, 0), Segment(1, 50, 1), Segment(0, 0, 0)]


def in_fp8(case: Case) -> Case:
    return case._replace(k_cache=case.k_cache.to(FP8), v_cache=case.v_cache.to(FP8))


@pytest.mark.parametrize("processors", [None, 12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(dtype: torch.dtype, processors: int | None) -> None:
    """Softmax weights keep the rows' precision, so the bound is that of a cache in their dtype."""
    case = in_fp8(make_case(MIXED, dtype, extra_rows=3))
    assert_as_good_as_eager(case, SCALES, processors=processors)


@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_head_sizes(head_dim: int) -> None:
    assert_as_good_as_eager(in_fp8(make_case(MIXED[:2], DTYPES[0], head_dim=head_dim)), SCALES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_divides_and_saturates(dtype: torch.dtype) -> None:
    key, value = (torch.randn(13, 3, 24) * 8).to(FP8).to(dtype).repeat(1, 2, 1).split(3, dim=1)
    key = (key * SCALES.key).clone()
    value = value * SCALES.value
    key[0, 0, :2] = torch.tensor([1000.0, -1000.0]).to(dtype)
    caches = torch.zeros(4, 7, 5, 3, 24).to(FP8).unbind()
    slots = torch.randperm(35)[:13]
    slots[1::4] = -1
    write_kv(key, value, *caches[:2], slots, kv_scales=SCALES)
    write_kv_reference(key, value, *caches[2:], slots, kv_scales=SCALES)
    for ours, expected in zip(caches[:2], caches[2:], strict=True):
        assert torch.equal(ours.view(torch.uint8), expected.view(torch.uint8))
    page, offset = divmod(int(slots[0]), 5)
    assert caches[0][page, offset, 0, :2].float().tolist() == [448, -448]


def test_what_was_written_is_attended_to() -> None:
    """One page through both kernels, against attention over keys and values as they were."""
    rows = 8
    key, value = torch.randint(-8, 9, (2, rows, 2, 32)).half()
    caches = torch.zeros(2, 1, 16, 2, 32).to(FP8).unbind()
    write_kv(key, value, *caches, torch.arange(rows), kv_scales=SCALES)
    case = make_case([Segment(rows, rows, 0)], torch.float16)
    case.segments.page_table.zero_()
    ours = segment_attention(
        case.q, *caches, case.segments, scale=case.scale, kv_scales=SCALES
    ).transpose(0, 1)
    dense = torch.nn.functional.scaled_dot_product_attention(
        case.q.transpose(0, 1).double(),
        key.transpose(0, 1).double().repeat_interleave(2, dim=0),
        value.transpose(0, 1).double().repeat_interleave(2, dim=0),
    )
    # Weights and result are rounded to fp16: half an ulp each of values that are at most 8.
    bound = torch.finfo(torch.float16).eps * 8
    assert (ours.double() - dense).abs().max() <= bound


def test_wrong_arguments_are_named() -> None:
    case = make_case([Segment(4, 20, 1)], torch.float16)
    quantized = in_fp8(case)
    single = in_fp8(make_case([Segment(4, 20, 1)], torch.float32))
    with pytest.raises(ValueError, match=r"^kv_scales: .*fp8 cache needs"):
        segment_attention(*quantized, scale=1.0)
    with pytest.raises(ValueError, match=r"^kv_scales: .*fp16 or bf16"):
        segment_attention(*single, scale=1.0, kv_scales=SCALES)
    with pytest.raises(ValueError, match=r"^k_cache: dtype"):
        segment_attention(*case, scale=1.0, kv_scales=SCALES)
    with pytest.raises(ValueError, match=r"^kv_scales.value: "):
        wrong = SCALES._replace(value=torch.ones(2))
        segment_attention(*quantized, scale=1.0, kv_scales=wrong)
    new = torch.zeros(1, 2, 32).half()
    with pytest.raises(ValueError, match=r"^kv_scales: "):
        write_kv(new, new, quantized.k_cache, quantized.v_cache, torch.zeros(1).long())
