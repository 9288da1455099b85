# SPDX-License-Identifier: Apache-2.0
"""vLLM's metrics and log lines of diffusion, for our models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm_nbdiff.compat.patching import patch
from vllm_nbdiff.names import is_block_diffusion

MORE_COUNTERS = {
    "vllm:diffusion_num_guessed_seeds": "Blocks begun with a guessed seed.",
    "vllm:diffusion_num_confirmed_seeds": "Guessed seeds that were right.",
    "vllm:diffusion_num_ar_steps": "Forwards of one token.",
    "vllm:diffusion_num_drafted_tokens": "Tokens drafted for verification.",
    "vllm:diffusion_num_accepted_tokens": "Drafted tokens that verification accepted.",
    "vllm:diffusion_num_fan_outs": "Drafts made for break points of texts being verified.",
    "vllm:diffusion_num_fan_out_hits": "Texts that broke off where such a draft was there.",
}
KINDS = ("diffusion", "freedave", "verify", "ar", "auto")
GRAPHS = ("full", "piecewise", "none")
"""Names of vLLM's `CUDAGraphMode` that a forward runs in."""


def export_diffusion_metrics() -> None:
    """Export vLLM's `vllm:diffusion_*` counters and log line for our models.

    Symptom: both hang on `ModelConfig.is_diffusion`, which would also ban temperature, seed and
    more, so it stays false here.
    Upstream: `LoggingStatLogger.__init__`, `PrometheusStatLogger.__init__`
    (vllm/v1/metrics/loggers.py), `SpecDecodingProm.observe`, `SpecDecodingLogging.observe`,
    `SpecDecodingLogging._log_diffusion` (vllm/v1/spec_decode/metrics.py).
    Remove when metrics depend on `diffusion_config`.
    """
    from vllm.v1.metrics.loggers import LoggingStatLogger, PrometheusStatLogger

    def prometheus(original: Callable[..., None]) -> Callable[..., None]:
        def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            if is_block_diffusion(vllm_config):
                self._spec_decoding_cls = _diffusion_counters(type(self)._spec_decoding_cls)
            original(self, vllm_config, *args, **kwargs)

        return init

    def logging(original: Callable[..., None]) -> Callable[..., None]:
        def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            original(self, vllm_config, *args, **kwargs)
            if is_block_diffusion(vllm_config):
                self.spec_decoding_logging = _diffusion_logging()

        return init

    patch(PrometheusStatLogger, "__init__", prometheus)
    patch(LoggingStatLogger, "__init__", logging)


def _diffusion_logging() -> Any:
    """vLLM's log line of diffusion steps, and which share of them CUDA graphs held."""
    from vllm.v1.spec_decode.metrics import SpecDecodingLogging

    class DiffusionLogging(SpecDecodingLogging):
        """One line an interval."""

        def _log_diffusion(self, log_fn: Callable[..., None], **figures: Any) -> None:
            steps = [sum(own) for own in zip(*self.accepted_tokens_per_pos_lists, strict=True)]
            steps = steps[len(MORE_COUNTERS) :]

            def log_more(text: str, *values: Any) -> None:
                text += ", Steps in full CUDA graphs: %d of %d"
                log_fn(text, *values, steps[GRAPHS.index("full")], sum(steps))

            super()._log_diffusion(log_more if any(steps) else log_fn, **figures)

    return DiffusionLogging(is_diffusion=True)


def _diffusion_counters(base: Any) -> type:
    """vLLM's counters of diffusion steps, and ours of what the scheduler adds to them."""
    from vllm.v1.metrics.utils import create_metric_per_engine

    class DiffusionCounters(base):
        """Counters for each engine."""

        def __init__(self, spec: Any, names: Any, values: Any, is_diffusion: bool = True) -> None:
            super().__init__(spec, names, values, is_diffusion=True)
            self._more = [
                create_metric_per_engine(
                    self._counter_cls(name=name, documentation=text, labelnames=names), values
                )
                for name, text in MORE_COUNTERS.items()
            ]
            rows = self._counter_cls(
                name="vllm:diffusion_num_rows",
                documentation="Rows that forwards computed for requests, by what they decode with.",
                labelnames=[*names, "mode"],
            )
            self._rows = {
                engine: [rows.labels(*labels, kind) for kind in KINDS]
                for engine, labels in values.items()
            }
            self._steps = self._counter_cls(
                name="vllm:diffusion_num_device_steps",
                documentation="Steps with canvases, by the CUDA graph that their forward ran in.",
                labelnames=[*names, "graph"],
            )
            self._labels = values

        def observe(self, spec_decoding_stats: Any, engine_idx: int = 0) -> None:
            super().observe(spec_decoding_stats, engine_idx)
            more, rows, steps = unpack_counts(spec_decoding_stats)
            for counter, value in zip(self._more, more, strict=True):
                counter[engine_idx].inc(value)
            for counter, value in zip(self._rows[engine_idx], rows, strict=True):
                counter.inc(value)
            for graph, value in zip(GRAPHS, steps, strict=True):
                if value:  # what is never counted is not exported: nothing without static shapes
                    self._steps.labels(*self._labels[engine_idx], graph).inc(value)

    return DiffusionCounters


def add_counts(
    stats: Any | None, more: Sequence[int], kind: str, rows: int, graph: str | None = None
) -> Any:
    """Add to vLLM's `SpecDecodingStats` (None: new ones, of a step whose forward ran in `graph`)
    what `MORE_COUNTERS` count, and the rows of a request of one of `KINDS`.

    They travel to the front end in lists that mean nothing else for diffusion.
    """
    from vllm.v1.spec_decode.metrics import SpecDecodingStats

    if stats is None:
        stats = SpecDecodingStats.new(len(MORE_COUNTERS) + len(GRAPHS))
        if graph is not None:
            stats.num_accepted_tokens_per_pos[len(MORE_COUNTERS) + GRAPHS.index(graph)] = 1
    for place, value in enumerate(more):
        stats.num_accepted_tokens_per_pos[place] += value
    stats.num_draft_tokens_per_pos[KINDS.index(kind)] += rows
    return stats


def unpack_counts(stats: Any) -> tuple[list[int], list[int], list[int]]:
    """What `add_counts` added: of `MORE_COUNTERS`, rows of `KINDS`, and steps in `GRAPHS`."""
    added, rows = stats.num_accepted_tokens_per_pos, stats.num_draft_tokens_per_pos[: len(KINDS)]
    return added[: len(MORE_COUNTERS)], rows, added[len(MORE_COUNTERS) :]
