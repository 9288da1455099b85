# SPDX-License-Identifier: Apache-2.0
"""The attention backend that runs segments on the kernels of `vllm_nbdiff.kernels`.

vLLM's `CUSTOM` backend once registered (`compat.register_attention_backend`). Every request of a
batch is a segment with a causal flag on the device, so one launch serves prompts, commits and
denoise steps, and a CUDA graph can be replayed for any mixture of the last two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.config.cache import CacheDType
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheSpec, is_quantized_kv_cache

from vllm_nbdiff.config import BlockDiffusionConfig
from vllm_nbdiff.engine.kv_copies import KVCopies
from vllm_nbdiff.kernels.attention_launch import AttentionLaunch, attention_launch
from vllm_nbdiff.kernels.kv_scales import FP8, KVScales
from vllm_nbdiff.kernels.segment_attention import segment_attention
from vllm_nbdiff.kernels.segment_attention_reference import segment_attention_reference
from vllm_nbdiff.kernels.segment_table import SegmentTable
from vllm_nbdiff.kernels.write_kv import write_kv, write_kv_reference


@dataclass
class SegmentMetadata:
    """The segments of a batch, on the device, and bounds that the host knows."""

    segments: SegmentTable
    num_tokens: int
    max_query_len: int
    max_kv_len: int
    launch: AttentionLaunch | None = None
    """As the first layer found it, for all of them. What a graph is captured with is made for that
    alone, so one that cuts keys holds the kernel that does. Upstream: `CudaGraphManager.capture`
    (vllm/v1/worker/gpu/cudagraph_utils.py)"""


class SegmentMetadataBuilder(AttentionMetadataBuilder[SegmentMetadata]):
    """A view of the runner's own buffers, so that CUDA graphs see them change."""

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """All but our own kernel read lengths back to the host."""
        kernel = BlockDiffusionConfig.from_vllm_config(vllm_config).engine.attention_kernel
        own = kernel in (None, "triton")
        return AttentionCGSupport.ALWAYS if own else AttentionCGSupport.NEVER

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SegmentMetadata:
        common = common_attn_metadata
        causal = common.causal
        if not isinstance(causal, torch.Tensor):
            causal = torch.full_like(common.seq_lens, int(causal))
        return SegmentMetadata(
            segments=SegmentTable(
                query_start=common.query_start_loc[: common.num_reqs + 1],
                kv_len=common.seq_lens[: common.num_reqs],
                causal=causal[: common.num_reqs],
                page_table=common.block_table_tensor[: common.num_reqs],
            ),
            num_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_kv_len=common.max_seq_len,
        )


class SegmentAttentionBackend(AttentionBackend):
    """Attention of segments over vLLM's paged KV cache."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = [
        *("auto", "float16", "bfloat16"),
        *("fp8", "fp8_e4m3"),
    ]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return SegmentAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return SegmentMetadataBuilder

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True


class SegmentAttentionImpl(AttentionImpl[SegmentMetadata]):
    """One layer's attention."""

    copies: KVCopies | None = None
    """Rows whose KV is written once more; None: no model state asks for it."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        assert attn_type == AttentionType.DECODER
        refused: dict[str, Any] = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap,
            "KV sharing": kv_sharing_target_layer_name,
        }
        for name, value in refused.items():
            if value is not None:
                raise ValueError(
                    f"{name} is not supported by the block-diffusion attention backend; use "
                    "--attention-backend TRITON_ATTN"
                )
        if sinks is not None:
            raise ValueError("attention sinks are not supported with block diffusion")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        engine = BlockDiffusionConfig.from_vllm_config(get_current_vllm_config()).engine
        kernel = engine.attention_kernel or "triton"
        self.runs_kernels = kernel == "triton"
        self._attend, self._write = KERNELS[kernel]
        self._is_fp8 = is_quantized_kv_cache(kv_cache_dtype)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SegmentMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of query [T, heads, head_size] into output, KV being in place."""
        assert output_scale is None and output_block_scale is None
        if attn_metadata is None:  # memory profiling
            return output.fill_(0)
        count = attn_metadata.num_tokens
        keys, values = self.split(kv_cache)
        if self.runs_kernels and attn_metadata.launch is None:
            attn_metadata.launch = attention_launch(
                query[:count],
                keys,
                attn_metadata.segments,
                max_query_len=attn_metadata.max_query_len,
                max_kv_len=attn_metadata.max_kv_len,
            )
        self._attend(
            query[:count],
            keys,
            values,
            attn_metadata.segments,
            scale=self.scale,
            launch=attn_metadata.launch,
            out=output[:count],
            kv_scales=self.scales(layer),
        )
        return output

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write key and value [T, kv_heads, head_size] of rows whose slot is not -1, and copies."""
        count = len(slot_mapping)
        self._write(
            key[:count],
            value[:count],
            *self.split(kv_cache),
            slot_mapping,
            copies=self.copies and self.copies.given,
            kv_scales=self.scales(layer),
        )

    def scales(self, layer: AttentionLayer) -> KVScales | None:
        """Factors of the layer's fp8 cache."""
        return KVScales(layer._k_scale, layer._v_scale) if self._is_fp8 else None

    def split(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[pages, page_size, kv_heads, head_size] of keys and of values.

        vLLM's cache is [pages, kv_heads, page_size, 2 * head_size].
        """
        if self._is_fp8:
            kv_cache = kv_cache.view(FP8)
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return keys, values


def _torch_attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    segments: SegmentTable,
    *,
    scale: float,
    out: torch.Tensor,
    kv_scales: KVScales | None,
    launch: None,
) -> None:
    found = segment_attention_reference(
        q,
        k_cache,
        v_cache,
        segments,
        scale=scale,
        kv_scales=kv_scales,
        compute_dtype=torch.float32,
    )
    out.copy_(found)


KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {
    "triton": (
        partial(segment_attention, check_values=False),
        partial(write_kv, check_values=False),
    ),
    "torch": (_torch_attend, write_kv_reference),
}
"""By `nbdiff.attention_kernel`: attention and KV write."""
