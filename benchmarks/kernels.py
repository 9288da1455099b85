# SPDX-License-Identifier: Apache-2.0
"""Times the kernels against their memory floor and against what else could do the job.

    python -m benchmarks.kernels                  # on a CUDA GPU
    python -m benchmarks.kernels --toy            # on any CPU: the same code on toy shapes, in
                                                  # Triton's interpreter; its times mean nothing

Shapes are those of a denoise step of NBDiff-7B: 32 query rows per request, 32/8 heads of 128, bf16,
vocabulary 153376, 8 rows of logits per request (one sub-block). Every contender runs from a CUDA
graph with a cold L2 cache; `bytes` are those that must move at least once, `share` compares their
rate with the copy bandwidth measured in the same run. A contender's result is checked before it is
timed. Columns are tab-separated.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

if "--toy" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from vllm_nbdiff.kernels.canvas_update import canvas_update
from vllm_nbdiff.kernels.row_sample import row_sample
from vllm_nbdiff.kernels.row_statistics import row_statistics
from vllm_nbdiff.kernels.segment_attention import segment_attention
from vllm_nbdiff.kernels.segment_table import SegmentTable
from vllm_nbdiff.kernels.write_kv import write_kv

from benchmarks.timing import Run, copy_bandwidth, describe, measure_of


@dataclass(frozen=True)
class Shapes:
    """One denoise step of a model: per request `block` query rows and `sub_block` logit rows."""

    q_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    block: int
    sub_block: int
    page_size: int
    dtype: torch.dtype
    device: str


NBDIFF_7B = Shapes(32, 8, 128, 153376, 32, 8, 16, torch.bfloat16, "cuda")
TOY = Shapes(4, 2, 32, 1021, 8, 4, 16, torch.float32, "cpu")


@dataclass(frozen=True)
class Case:
    """Contenders for one job; the first is ours."""

    kernel: str
    requests: int
    context: int
    num_bytes: int
    contenders: dict[str, Run]


def size_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def int32(values: object, device: str) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=device)


def vllm_is_usable(shapes: Shapes) -> bool:
    return shapes.device == "cuda" and importlib.util.find_spec("vllm") is not None


def vllm_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, table: SegmentTable, scale: float, longest: int
) -> Run:
    """vLLM's Triton unified attention, bidirectional."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    out = torch.empty_like(q)

    def run() -> Tensor:
        unified_attention(
            q=q,
            k=k_cache,
            v=v_cache,
            out=out,
            cu_seqlens_q=table.query_start,
            max_seqlen_q=q.shape[0] // table.num_segments,
            seqused_k=table.kv_len,
            max_seqlen_k=longest,
            softmax_scale=scale,
            causal=False,
            window_size=(-1, -1),
            block_table=table.page_table,
            softcap=0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
        )
        return out

    return run


def attention_case(shapes: Shapes, requests: int, context: int) -> Case:
    """A canvas per request over `context` committed tokens, its own KV included in kv_len."""
    s, device = shapes, shapes.device
    kv_len = context + s.block
    pages = triton.cdiv(kv_len, s.page_size)
    cache_shape = (requests * pages, 2, s.page_size, s.kv_heads, s.head_dim)
    k_cache, v_cache = torch.randn(cache_shape, dtype=s.dtype, device=device).unbind(1)
    page_table = torch.randperm(requests * pages, device=device).view(requests, pages)
    q = torch.randn(requests * s.block, s.q_heads, s.head_dim, dtype=s.dtype, device=device)
    table = SegmentTable(
        int32(torch.arange(requests + 1) * s.block, device),
        int32([kv_len] * requests, device),
        int32([0] * requests, device),
        int32(page_table, device),
    )
    scale = s.head_dim**-0.5

    def gathered(cache: Tensor) -> Tensor:
        rows = cache[page_table].flatten(1, 2)[:, :kv_len]
        return rows.transpose(1, 2).contiguous()

    dense_k, dense_v = gathered(k_cache), gathered(v_cache)
    dense_q = q.view(requests, s.block, s.q_heads, s.head_dim).transpose(1, 2)

    def ours() -> Tensor:
        return segment_attention(
            q, k_cache, v_cache, table, scale=scale, max_query_len=s.block, max_kv_len=kv_len
        )

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(dense_q, dense_k, dense_v, enable_gqa=True)

    contenders: dict[str, Run] = {"ours": ours, "sdpa, KV gathered beforehand": sdpa}
    expected = sdpa().transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(ours(), expected, atol=2e-2, rtol=2e-2)
    if vllm_is_usable(shapes):
        contenders["vllm triton"] = vllm_attention(q, k_cache, v_cache, table, scale, kv_len)
        torch.testing.assert_close(contenders["vllm triton"](), expected, atol=2e-2, rtol=2e-2)
    return Case("segment_attention", requests, context, size_of(dense_k, dense_v, q, q), contenders)


def write_case(shapes: Shapes, requests: int) -> Case:
    s, tokens = shapes, requests * shapes.block
    slots = torch.randperm(tokens, device=s.device)
    key = torch.randn(tokens, s.kv_heads, s.head_dim, dtype=s.dtype, device=s.device)
    pages = triton.cdiv(tokens, s.page_size)
    cache_shape = (2, pages, s.page_size, s.kv_heads, s.head_dim)
    cache = torch.zeros(cache_shape, dtype=s.dtype, device=s.device)
    flat = cache.view(2, pages * s.page_size, s.kv_heads, s.head_dim)

    def indexed() -> None:
        flat[0].index_copy_(0, slots, key)
        flat[1].index_copy_(0, slots, key)

    contenders: dict[str, Run] = {
        "ours": lambda: write_kv(key, key, cache[0], cache[1], slots),
        "index_copy_": indexed,
    }
    return Case("write_kv", requests, 0, 4 * size_of(key), contenders)


def row_cases(shapes: Shapes, requests: int) -> Iterator[Case]:
    """Statistics and draws of `sub_block` rows per request."""
    s, rows = shapes, requests * shapes.sub_block
    logits = torch.randn(rows, s.vocab_size, dtype=s.dtype, device=s.device) * 3
    seed = torch.arange(rows, device=s.device)
    step = int32([0] * rows, s.device)
    temperature = torch.ones(rows, device=s.device)
    top_p = torch.full((rows,), 0.9, device=s.device)

    def eager_statistics() -> tuple[Tensor, Tensor, Tensor]:
        log_p = logits.float().log_softmax(dim=-1)
        p = log_p.exp()
        top = p.topk(2, dim=-1)
        return top.indices[:, 0], top.values, -(p * log_p).sum(dim=-1)

    statistics: dict[str, Run] = {
        "ours": lambda: row_statistics(logits),
        "eager fp32": eager_statistics,
    }
    expected = eager_statistics()[1][:, 0]
    torch.testing.assert_close(row_statistics(logits).probability, expected, atol=1e-5, rtol=1e-3)
    if vllm_is_usable(shapes):
        from vllm.model_executor.models.diffusion_gemma_sampler import sample_row_stats

        temps = torch.ones(requests, device=s.device)
        statistics["vllm row kernel (with a draw)"] = lambda: sample_row_stats(
            logits, temps, s.sub_block, 0, None
        )
    yield Case("row_statistics", requests, 0, size_of(logits), statistics)

    def eager_draw() -> Tensor:
        return logits.float().softmax(dim=-1).multinomial(1)

    key = {"seed": seed, "position": seed, "step": step, "temperature": temperature}
    draws: dict[str, Run] = {
        "ours": lambda: row_sample(logits, **key),
        "ours, top-p 0.9": lambda: row_sample(logits, **key, top_p=top_p),
        "eager fp32 multinomial": eager_draw,
    }
    yield Case("row_sample", requests, 0, size_of(logits), draws)


def canvas_case(shapes: Shapes, requests: int) -> Case:
    s, mask_token_id = shapes, 1
    shape = (requests, s.block)
    canvas = torch.full(shape, mask_token_id, dtype=torch.int32, device=s.device)
    proposed = torch.full_like(canvas, 7)
    p = torch.rand(shape, device=s.device)

    def ours() -> object:
        return canvas_update(
            canvas, proposed, p, p, p, mask_token_id=mask_token_id, eos_token_ids=eos, **rules
        )

    eos = int32([2], s.device)
    rules = {
        "rule": int32([0] * requests, s.device),
        "parameter": torch.full((requests,), 0.9, device=s.device),
        "sub_block_length": int32([s.sub_block] * requests, s.device),
    }
    num_bytes = size_of(canvas, canvas, proposed, p, p, p)
    return Case("canvas_update", requests, 0, num_bytes, {"ours": ours})


def cases(shapes: Shapes, requests: list[int], contexts: list[int]) -> Iterator[Case]:
    for count in requests:
        for context in contexts:
            yield attention_case(shapes, count, context)
        yield write_case(shapes, count)
        yield from row_cases(shapes, count)
        yield canvas_case(shapes, count)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--toy", action="store_true", help="toy shapes in the interpreter, on CPU")
    parser.add_argument("--requests", type=int, nargs="+", help="default 1 8 32 128; toy 1 3")
    parser.add_argument("--contexts", type=int, nargs="+", help="default 512 to 32768; toy 0 45")
    options = parser.parse_args()
    if not options.toy and not torch.cuda.is_available():
        parser.error("no CUDA GPU; --toy runs on CPU")
    shapes = TOY if options.toy else NBDIFF_7B
    requests = options.requests or ([1, 3] if options.toy else [1, 8, 32, 128])
    contexts = options.contexts or ([0, 45] if options.toy else [512, 2048, 8192, 32768])

    torch.manual_seed(0)
    measure, bandwidth = measure_of(shapes.device), copy_bandwidth(shapes.device)
    print(f"# {describe(shapes.device)}")
    print(f"# copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    print("kernel\trequests\tcontext\tcontender\tus\tMB\tshare")
    for case in cases(shapes, requests, contexts):
        for name, run in case.contenders.items():
            seconds = measure(run)
            share = case.num_bytes / seconds / bandwidth
            figures = f"{seconds * 1e6:.1f}\t{case.num_bytes / 1e6:.3f}\t{share:.3f}"
            print(f"{case.kernel}\t{case.requests}\t{case.context}\t{name}\t{figures}", flush=True)


if __name__ == "__main__":
    main()
