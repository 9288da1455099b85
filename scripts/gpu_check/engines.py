# SPDX-License-Identifier: Apache-2.0
"""Stages that start an engine: tokens of the bundled model against stored ones, and what it took.

vLLM is imported where an engine starts: other stages need not wait for it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from scripts.gpu_check.cases import MAX_TOKENS, Case, bundled_cases
from scripts.gpu_check.options import Options
from scripts.gpu_check.result import Result, Skip

BUNDLED = Path(__file__).resolve().parents[2] / "examples" / "nbdiff-nano"
STEPS = "vllm:diffusion_num_device_steps"
UTILIZATION = 0.5
TOY_MODES = ("diffusion", "verify", "constraints")
NEEDS_GPU = "CUDA graphs need a GPU"


def bundled(options: Options, **arguments: Any) -> Any:
    """An engine that serves the bundled model as on a GPU."""
    from vllm import LLM

    settings: dict[str, Any] = {
        "model": str(BUNDLED),
        "dtype": "float32",  # what the tokens were stored in
        "max_model_len": 512,
        "max_num_seqs": 24,
        "gpu_memory_utilization": UTILIZATION,
        "disable_log_stats": False,
    }
    if options.toy:
        use_own_attention()
        nbdiff = {"static_shapes": True, "attention_kernel": "triton"}
        settings |= {"additional_config": {"nbdiff": nbdiff}, "max_num_seqs": 4}
        settings |= {"kv_cache_memory_bytes": 1 << 28}
    return LLM(**settings | arguments)


def use_own_attention() -> None:
    """Have a CPU's engine run the plugin's kernels, which Triton interprets."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from vllm_nbdiff.names import ATTENTION_BACKEND

    register_backend(AttentionBackendEnum.CPU_ATTN, ATTENTION_BACKEND)


def answers(llm: Any, cases: list[Case], limit: int = MAX_TOKENS) -> list[list[int]]:
    """Greedy tokens of cases in one batch, at most `limit` of each."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0,
            max_tokens=limit,
            detokenize=False,
            extra_args=dict(case.options),
            **{"ignore_eos": True, **case.sampling},
        )
        for case in cases
    ]
    prompts: Any = [{"prompt_token_ids": list(case.prompt)} for case in cases]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def compare(llm: Any, options: Options) -> Result:
    """One request of each mode alone, then all of them, against the stored tokens."""
    cases, limit = bundled_cases(), MAX_TOKENS
    if options.toy:
        cases, limit = [c for c in cases if c.mode in TOY_MODES and len(c.prompt) == 7], 8
    alone = {case.mode: case for case in cases}
    wrong, steps = [], {}
    for name, batches in {"alone": [[c] for c in alone.values()], "all": [cases]}.items():
        for batch in batches:
            for case, found in zip(batch, answers(llm, batch, limit), strict=True):
                if found != list(case.tokens[:limit]):
                    wrong.append(f"{case.name} of {len(batch)}")
        steps[name] = device_steps(llm)
    found_all = f"{len(wrong)} wrong: {', '.join(wrong[:4])}" if wrong else "all tokens as stored"
    detail = f"{len(cases)} requests, {len(alone)} modes: {found_all}"
    figures = {"wrong": wrong, "requests": len(cases), "steps": steps}
    return Result("wrong" if wrong else "ok", detail, figures)


def device_steps(llm: Any) -> dict[str, float]:
    """Steps that had canvases until now, by the kind of CUDA graph that they ran in."""
    return {m.labels["graph"]: m.value for m in llm.get_metrics() if m.name == STEPS}


def eager(options: Options) -> Result:
    """the bundled model without graphs: tokens of every mode"""
    return compare(bundled(options, enforce_eager=True), options)


def full_graphs(options: Options) -> Result:
    """the bundled model with full graphs, uncompiled: tokens of every mode"""
    if options.toy:
        raise Skip(NEEDS_GPU)
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    return counted(options, compilation_config=graphs)


def default(options: Options) -> Result:
    """the bundled model by default: tokens of every mode"""
    if options.toy:
        raise Skip(NEEDS_GPU)
    return counted(options)


def monitored(options: Options) -> Result:
    """the same, where a compilation or a synchronisation after warm-up is an error"""
    if options.toy:
        raise Skip("nothing is compiled or synchronised on a CPU")
    return counted(options, jit_monitor_mode="error")


def counted(options: Options, **arguments: Any) -> Result:
    """`compare`, and which steps ran in full graphs: of requests that are alone every one."""
    result = compare(bundled(options, **arguments), options)
    return judge_graphs(result)


def judge_graphs(result: Result) -> Result:
    """What `compare` found, wrong where a request that was alone left the full graphs."""
    alone, steps = result.figures["steps"]["alone"], result.figures["steps"]["all"]
    count = sum(steps.values())
    share = steps.get("full", 0) / count if count else 0.0
    result.detail += f"; {share:.0%} of {count:.0f} steps in full graphs"
    if outside := sum(alone.values()) - alone.get("full", 0):
        result.detail += f"; {outside:.0f} of requests that were alone outside of them"
    if outside or not count:
        result.status = "wrong"
    return result


def memory(options: Options) -> Result:
    """peak memory at `max_num_seqs`, half of the requests verifying, sampled"""
    if options.toy:
        raise Skip("about the memory of a GPU")
    import torch
    from vllm import SamplingParams

    count = 256
    llm = bundled(options, max_num_seqs=count, max_num_batched_tokens=count * 32)
    started = torch.cuda.max_memory_reserved()
    params = [
        SamplingParams(
            temperature=1,
            max_tokens=64,
            seed=i,
            extra_args={"nbdiff_mode": ("diffusion", "verify")[i % 2]},
        )
        for i in range(count)
    ]
    prompts: Any = [{"prompt_token_ids": list(range(10, 42))} for _ in params]
    llm.generate(prompts, params, use_tqdm=False)
    return judge_memory(
        started, torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    )


def judge_memory(started: int, most: int, total: int) -> Result:
    """Bytes reserved after start-up and at most, against the share of a GPU that vLLM was given."""
    limit = UTILIZATION * total
    detail = (
        f"{(most - started) / 2**20:.0f} MiB more than after start-up,"
        f" {most / 2**30:.2f} of {limit / 2**30:.2f} GiB"
    )
    figures = {"start_bytes": started, "most_bytes": most, "limit_bytes": limit}
    return Result("ok" if most <= limit else "wrong", detail, figures)


def model(options: Options) -> Result:
    """a checkpoint in each mode against stock vLLM's AR on the same weights"""
    if options.model is None:
        raise Skip("no --model DIR")
    from vllm_nbdiff.adapt.evaluate import AR_ARCHITECTURES
    from vllm_nbdiff.names import ARCHITECTURE

    model_type = json.loads((options.model / "config.json").read_text())["model_type"]
    if model_type not in AR_ARCHITECTURES:
        raise Skip(f"stock vLLM has no AR architecture for {model_type}")
    figures: dict[str, Any] = {}
    text, figures["ar"] = speed(options, AR_ARCHITECTURES[model_type], {})
    if options.toy:
        use_own_attention()
    for mode in ("verify", "diffusion"):
        found, figures[mode] = speed(options, ARCHITECTURE, {"nbdiff_mode": mode})
        same = sum(one == other for one, other in zip(found, text, strict=True))
        figures[f"{mode}_same_text"] = same
    gains = ", ".join(
        f"{mode} {figures[mode] / figures['ar']:.2f}" for mode in ("verify", "diffusion")
    )
    same = figures["verify_same_text"]
    detail = f"times stock AR: {gains}; verify has AR's text in {same} of {len(text)}"
    return Result("ok", detail, figures)


def speed(
    options: Options, architecture: str, extra: dict[str, Any]
) -> tuple[list[list[int]], float]:
    """Greedy texts of some prompts, and tokens a second, the second time they are asked for."""
    import gc

    from vllm import LLM, SamplingParams

    count, length = (2, 8) if options.toy else (16, 128)
    llm = LLM(
        model=str(options.model),
        hf_overrides={"architectures": [architecture]},
        dtype="float32" if options.toy else "auto",
        max_model_len=512,
        enforce_eager=options.toy,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.3 if options.toy else 0.85,
    )
    size = llm.model_config.get_vocab_size()
    prompts: Any = [
        {"prompt_token_ids": [(37 * i + 101 * j) % (size // 2) + 8 for j in range(64)]}
        for i in range(count)
    ]
    params = SamplingParams(
        temperature=0, max_tokens=length, ignore_eos=True, detokenize=False, extra_args=extra
    )
    for _ in range(2):
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
    texts = [list(output.outputs[0].token_ids) for output in outputs]
    del llm
    gc.collect()
    return texts, sum(map(len, texts)) / seconds
