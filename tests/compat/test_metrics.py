# SPDX-License-Identifier: Apache-2.0
"""Metrics of block diffusion.

A test named `test_..._is_needed` that fails means that the patch can go.
"""

from prometheus_client import REGISTRY
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import LoggingStatLogger, PrometheusStatLogger

from tests.compat.conftest import stock
from vllm_nbdiff import compat


def test_metrics_patch_is_needed(served: VllmConfig) -> None:
    """For our models vLLM alone counts no diffusion steps, nor logs them."""

    def exported() -> set[str]:
        return {metric.name for metric in REGISTRY.collect() if "diffusion" in metric.name}

    def logs_diffusion(logger: LoggingStatLogger) -> bool:
        return logger.spec_decoding_logging.is_diffusion

    bare = PrometheusStatLogger.__new__(PrometheusStatLogger)
    stock(PrometheusStatLogger, "__init__")(bare, served)
    assert exported() == set()
    metrics = PrometheusStatLogger(served)
    assert {"vllm:diffusion_num_denoising_steps", "vllm:diffusion_num_ar_steps"} <= exported()
    counts = compat.add_counts(None, (1, 2, 3, 4, 5, 6, 7), "verify", 70, "full")
    # The step is counted with its first request.
    counts = compat.add_counts(counts, (10, 0, 0, 0, 0, 0, 0), "ar", 8, "full")
    metrics.spec_decoding_prom.observe(counts)
    family = {metric.name: metric for metric in REGISTRY.collect()}
    values = [
        family[f"vllm:diffusion_num_{name}"].samples[0].value
        for name in ("guessed_seeds", "confirmed_seeds", "ar_steps", "fan_outs")
    ]
    assert values == [11, 2, 3, 6]
    rows = {
        sample.labels["mode"]: sample.value
        for sample in family["vllm:diffusion_num_rows"].samples
        if sample.name.endswith("_total")
    }
    assert rows == {"diffusion": 0, "freedave": 0, "verify": 70, "ar": 8, "auto": 0}
    steps = [
        (sample.labels["graph"], sample.value)
        for sample in family["vllm:diffusion_num_device_steps"].samples
        if sample.name.endswith("_total")
    ]
    assert steps == [("full", 1)]

    quiet = LoggingStatLogger.__new__(LoggingStatLogger)
    stock(LoggingStatLogger, "__init__")(quiet, served)
    assert not logs_diffusion(quiet) and logs_diffusion(LoggingStatLogger(served))


def test_the_log_line_has_graphs_where_there_are_any(served: VllmConfig) -> None:
    logging = LoggingStatLogger(served).spec_decoding_logging

    def line(*graphs: str | None) -> str:
        for graph in graphs:
            logging.observe(compat.add_counts(None, [0] * 7, "ar", 1, graph))
        lines: list[str] = []
        logging.log(lambda text, *values: lines.append(text % values))
        return lines[0].rpartition(", ")[2]

    assert line("full", "none", "full", "piecewise") == "Steps in full CUDA graphs: 2 of 4"
    assert line("none") == "Steps in full CUDA graphs: 0 of 1"
    assert line(None, None) == "Canvas positions evaluated: 0"
