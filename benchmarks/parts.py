# SPDX-License-Identifier: Apache-2.0
"""Where the time of serving the bundled model goes: parts of a schedule, on a CPU.

    python -m benchmarks.parts
    python -m benchmarks.parts --modes verify auto --batches 1 64 --save cpu-parts

The engine runs in this process; requests come in groups, as in `make bench`. Shares are of wall
time, rest included; microseconds are those of a forward of the model.
"""

from __future__ import annotations

import argparse
import json
import os
from time import perf_counter
from typing import Any

from benchmarks.forward_timer import Clock
from benchmarks.nano import CHECKPOINT, DTYPE
from benchmarks.report import save

MAX_TOKENS = 256
WARM_UP, MEASURED = 32, 64


def timed(llm: Any) -> dict[str, Clock]:
    """Clocks of the parts of the engine's steps, none inside another one but for `steps`."""
    from vllm_nbdiff.engine.forward import PagedBatch

    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    loop = core.model_executor.driver_worker.worker.model_runner.model_state.loop
    parts = {
        "model's forward": (loop.model, "forward"),
        "logits": (loop.model, "compute_logits"),
        "plan": (loop.decoder, "plan"),
        "rows and metadata": (PagedBatch, "forward"),
        "decisions": (loop.decoder, "decide"),
        "what auto learns": (loop.auto, "_learn"),
        "what auto chooses": (loop.auto.chooser, "choose"),
        "scheduler": (core.scheduler, "schedule"),
        "scheduler's update": (core.scheduler, "update_from_output"),
        "steps": (engine, "step"),
    }
    clocks = {name: Clock() for name in parts}
    for name, (owner, function) in parts.items():
        setattr(owner, function, clocks[name].timed(getattr(owner, function)))
    return clocks


def measure(llm: Any, clocks: dict[str, Clock], mode: str, batch: int) -> dict[str, Any]:
    """Shares of wall time in percent, and microseconds a forward."""
    from vllm import SamplingParams

    from vllm_nbdiff.adapt.problems import held_out

    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, extra_args={"nbdiff_mode": mode})
    chats: list[Any] = [
        [{"role": "user", "content": problem.prompt}] for problem in held_out(MEASURED + batch)
    ]

    def run(count: int) -> float:
        start = perf_counter()
        for first in range(0, count, batch):
            llm.chat(chats[first : first + batch], params, use_tqdm=False)
        return perf_counter() - start

    run(WARM_UP)
    for clock in clocks.values():
        clock.calls, clock.seconds = 0, 0.0
    seconds = run(MEASURED)
    forwards = clocks["model's forward"].calls
    parts = {name: clock.seconds for name, clock in clocks.items() if name != "steps"}
    parts["rest of a step"] = clocks["steps"].seconds - sum(parts.values())
    parts["outside of steps"] = seconds - clocks["steps"].seconds
    return {
        "mode": mode,
        "batch": batch,
        "forwards": forwards,
        "steps": clocks["steps"].calls,
        "microseconds": {name: round(1e6 * own / forwards) for name, own in parts.items()},
        "percent": {name: round(100 * own / seconds, 1) for name, own in parts.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parts", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--modes", nargs="+", default=["verify", "auto", "diffusion", "ar"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--save", metavar="NAME", help="also write results/NAME.json")
    given = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    llm = LLM(str(CHECKPOINT), dtype=DTYPE, max_model_len=512, kv_cache_memory_bytes=1 << 28)
    clocks = timed(llm)
    rows = []
    for mode in given.modes:
        for batch in given.batches:
            rows.append(measure(llm, clocks, mode, batch))
            print(json.dumps(rows[-1]), flush=True)
    if given.save:
        settings = {"warm_up": WARM_UP, "measured": MEASURED}
        save(given.save, rows, settings, module="benchmarks.parts")


if __name__ == "__main__":
    main()
