# SPDX-License-Identifier: Apache-2.0
"""Counts the small PyTorch operations of a step with a GPU's static shapes, on any CPU.

    python -m benchmarks.launches

They are those of its plan, its rows and its decisions, for each of which a GPU launches a kernel;
beside them are the forward, the row kernels that draw, and what vLLM does. Views and empty tensors
launch nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from vllm_nbdiff.engine import sampler
from vllm_nbdiff.engine.loop import ForwardLoop

MODEL = Path(__file__).parents[1] / "examples" / "nbdiff-nano"
MODES: dict[str, dict[str, Any]] = {
    "diffusion": {},
    "fused commit": {"nbdiff_fused_commit": 1},
    "freedave": {"nbdiff_algorithm": "freedave"},
    "verify": {"nbdiff_mode": "verify"},
    "ar": {"nbdiff_mode": "ar"},
}


class Launches(TorchDispatchMode):
    """Counts operations that compute or copy something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += not (func.is_view or name == "detach" or "empty" in name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_steps() -> Iterator[list[int]]:
    """Operations of every step without prompts that an engine of this process runs."""
    steps: list[int] = []
    launches = Launches()
    begin, run, draw_rows = ForwardLoop.begin, ForwardLoop.run, sampler.draw_rows

    def counted_begin(self: ForwardLoop, *args: Any) -> Any:
        launches.count = 0
        with launches:
            return begin(self, *args)

    def counted_run(self: ForwardLoop, *args: Any) -> None:
        with launches:
            run(self, *args)
        if not self.decoder.schedule.facts.prefills:
            steps.append(launches.count)

    def uncounted_draw(*args: Any, **kwargs: Any) -> Any:
        before = launches.count
        drawn = draw_rows(*args, **kwargs)
        launches.count = before
        return drawn

    changed = {"begin": counted_begin, "run": counted_run}
    try:
        for name, function in changed.items():
            setattr(ForwardLoop, name, function)
        sampler.draw_rows = uncounted_draw
        yield steps
    finally:
        ForwardLoop.begin, ForwardLoop.run = begin, run  # type: ignore[method-assign]
        sampler.draw_rows = draw_rows


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    from vllm import LLM, SamplingParams
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from vllm_nbdiff.names import ATTENTION_BACKEND

    register_backend(AttentionBackendEnum.CPU_ATTN, ATTENTION_BACKEND)
    nbdiff = {"static_shapes": True, "attention_kernel": "torch"}
    llm = LLM(
        str(MODEL), dtype="float32", max_model_len=512, enforce_eager=True,
        kv_cache_memory_bytes=1 << 27, additional_config={"nbdiff": nbdiff},
    )  # fmt: skip
    prompt: Any = {"prompt_token_ids": list(range(10, 42))}
    params = {
        name: SamplingParams(temperature=0, max_tokens=96, ignore_eos=True, extra_args=extra)
        for name, extra in MODES.items()
    }
    print("requests", "fewest", "most", sep="\t")
    batches = {name: [one] for name, one in params.items()}
    for name, own in {**batches, "all": list(params.values())}.items():
        with counted_steps() as steps:
            llm.generate([prompt] * len(own), own, use_tqdm=False)
        print(name, min(steps), max(steps), sep="\t", flush=True)


if __name__ == "__main__":
    main()
