# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of decodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from vllm_nbdiff.compat.patching import patch
from vllm_nbdiff.names import ATTENTION_BACKEND, is_block_diffusion


def uses_own_attention(vllm_config: Any) -> bool:
    """Whether attention is the plugin's own."""
    backend = vllm_config.attention_config.backend
    return backend is not None and backend.get_path() == ATTENTION_BACKEND


def capture_any_decode() -> None:
    """Have full graphs of our models on our own attention take any rows of decodes.

    Called by our ModelState: only workers need it, and importing the module takes time.

    Symptom: a full graph takes requests of exactly a block's rows, and steps of `ar`, `verify`,
    fused commits or shorter blocks run piecewise. Graphs of decodes of any length are there, for
    adaptive verification alone; they have as many requests as tokens, of which the grid of an
    attention launch is made, so there is one for batches of fewer as well.
    Upstream: `CudaGraphManager._init_candidates` (vllm/v1/worker/gpu/cudagraph_utils.py).
    Remove when a model state may ask for graphs of any decode.
    """
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    def any_decode(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def init(self: Any) -> None:
            config = self.vllm_config
            if not (is_block_diffusion(config) and uses_own_attention(config)):
                return original(self)
            self.varlen_decode = True
            self.decode_query_len = config.scheduler_config.max_num_batched_tokens
            original(self)
            block = config.diffusion_config.canvas_length
            for descs in (*self._candidates.values(), *self._capture_descs.values()):
                descs[:] = [own for desc in descs for own in _by_requests(desc, block)]
            return None

        return init

    patch(CudaGraphManager, "_init_candidates", any_decode)


def _by_requests(desc: Any, block: int) -> Iterable[Any]:
    """A graph of decodes for batches of requests with whole blocks, with a quarter of one, and with
    any number of rows; other graphs as they are."""
    if desc.max_query_len is None:
        return [desc]
    counts = {-(-parts * desc.num_tokens // block) for parts in (1, 4, block)}
    return [replace(desc, num_reqs=n) for n in sorted(counts) if n < desc.num_reqs] + [desc]
