# SPDX-License-Identifier: Apache-2.0
"""One engine, stock vLLM decoding autoregressively or ours in any mode, and one measured round."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from vllm_nbdiff.adapt.problems import Problem, is_exact

if TYPE_CHECKING:
    from pathlib import Path

    from vllm import SamplingParams

STOCK, OURS = "LlamaForCausalLM", "NBDiffForCausalLM"
AR, DIFFUSION, VERIFY, TWO_FORWARDS = "ar", "diffusion", "verify", "two_forwards"
# What is measured, `ar` on stock vLLM, the rest on our engine; `nbdiff_ar` is our mode `ar`.
MODES = (AR, DIFFUSION, "fused", "block_cache", VERIFY, TWO_FORWARDS, "nbdiff_ar", "auto")
# One position a step, and the same text by FreeDave: only where text is really generated.
FREEDAVE = "freedave"
REAL_MODES = ("one", FREEDAVE)
OPTIONS: dict[str, dict[str, Any]] = {
    DIFFUSION: {},
    "fused": {"nbdiff_fused_commit": 1},
    "block_cache": {"nbdiff_block_cache": 1},
    VERIFY: {"nbdiff_mode": "verify"},
    TWO_FORWARDS: {"nbdiff_mode": "verify", "nbdiff_fan_out": 0},
    "nbdiff_ar": {"nbdiff_mode": "ar"},
    "auto": {"nbdiff_mode": "auto"},
    "one": {"nbdiff_threshold": 1.0},
    FREEDAVE: {"nbdiff_algorithm": "freedave"},
}
BLOCK_DIFFUSION = (DIFFUSION, "fused", "block_cache")
KV_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Request:
    """A prompt, its sampling parameters and, where the answer can be checked, the problem."""

    prompt: list[int]
    params: SamplingParams
    problem: Problem | None = None


@dataclass(frozen=True)
class Sample:
    """What one engine did in one round."""

    tokens: int
    """Generated tokens."""
    seconds: float
    """Wall time of all requests, prefill included."""
    forwards: int
    """Decode forwards, summed over the requests that took part in each."""
    model_seconds: float
    """Part of `seconds` spent in the model's forward and logits."""
    exact: int
    """Right answers."""
    problems: int
    """Requests with an answer that can be checked."""


class Engine:
    """A vLLM engine that answers rounds of requests and counts what they cost."""

    def __init__(self, architecture: str, model: Path, dtype: str) -> None:
        """
        Args:
            architecture: `STOCK` or `OURS`; both serve the same weights.
            model: checkpoint folder with a Llama backbone.
            dtype: of weights and KV cache.
        """
        from vllm import LLM

        self.stock = architecture == STOCK
        self.llm = LLM(
            model=str(model),
            dtype=dtype,
            skip_tokenizer_init=not (model / "tokenizer.json").exists(),
            hf_overrides={"architectures": [architecture]},
            kv_cache_memory_bytes=KV_CACHE_BYTES,
            use_tqdm_on_load=False,
            # vLLM's counters give the diffusion forwards; AR needs none and goes without.
            disable_log_stats=self.stock,
            worker_extension_cls="benchmarks.forward_timer.ForwardTimer",
        )
        self.llm.collective_rpc("start_forward_timer")

    def run(self, requests: list[Request], batch: int) -> Sample:
        """Answer `requests`, `batch` at a time."""
        forwards, model_seconds = self._forwards(), self._model_seconds()
        outputs: list[Any] = []
        start = perf_counter()
        for first in range(0, len(requests), batch):
            group = requests[first : first + batch]
            outputs += self.llm.generate(
                [{"prompt_token_ids": request.prompt} for request in group],
                [request.params for request in group],
                use_tqdm=False,
            )
        seconds = perf_counter() - start
        completions = [output.outputs[0] for output in outputs]
        tokens = sum(len(completion.token_ids) for completion in completions)
        return Sample(
            tokens=tokens,
            seconds=seconds,
            forwards=tokens if self.stock else self._forwards() - forwards,
            model_seconds=self._model_seconds() - model_seconds,
            exact=sum(
                is_exact(request.problem, completion.text)
                for request, completion in zip(requests, completions, strict=True)
                if request.problem is not None
            ),
            problems=sum(request.problem is not None for request in requests),
        )

    def force_acceptance(self, chance: float) -> None:
        """Have verification take every drafted token with this chance, whatever the model says."""
        self.llm.collective_rpc("force_acceptance", args=(chance,))

    def close(self) -> None:
        """Stop the engine's process and free what it holds.

        vLLM does it when the engine is collected, which reference cycles delay, or in a finalizer
        at exit; and where a temporary folder was made before vLLM was imported, the interpreter
        waits for the process before it calls any finalizer, for ever.
        """
        self.llm.llm_engine.engine_core.shutdown()

    def _forwards(self) -> int:
        if self.stock:
            return 0
        counters = {metric.name: metric for metric in self.llm.get_metrics()}
        return int(counters["vllm:diffusion_num_denoising_steps"].value)

    def _model_seconds(self) -> float:
        return self.llm.collective_rpc("read_forward_timer")[0]
