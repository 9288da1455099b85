# SPDX-License-Identifier: Apache-2.0
"""Requests for structured output of the bundled model, and what stock vLLM answers."""

from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.conftest import in_process, options
from vllm_nbdiff.adapt import problems

NANO = Path(__file__).parents[2] / "examples" / "nbdiff-nano"
MASK = 2
PROMPTS = [f"<|user|>{problem.prompt}<|assistant|>" for problem in problems.held_out(24)]
LOSSLESS = [
    options(mode="ar"),
    options(mode="verify"),
    options(mode="verify", draft_length=6, draft_steps=3),
    options(mode="verify", draft_length=8, fused_commit=1),
    options(mode="auto"),
]
DIFFUSION = [
    {},
    options(threshold=0.3, small_blocks=1),
    options(algorithm="entropy", block_length=8, small_blocks=1),
    options(block_cache=1),
    {"diffusion_max_steps": 3},
    options(algorithm="margin", fused_commit=1),
]
# Without it this model writes line breaks for ever.
COMPACT = {"backend": "xgrammar", "disable_any_whitespace": True}


def settings(**more: Any) -> dict[str, Any]:
    common = {"skip_tokenizer_init": False, "structured_outputs_config": COMPACT}
    return common | {"kv_cache_memory_bytes": 1 << 27} | more


def params(constraint: dict[str, Any] | None, **more: Any) -> SamplingParams:
    wanted = None if constraint is None else StructuredOutputsParams(**constraint)
    return SamplingParams(structured_outputs=wanted, **{"temperature": 0, "max_tokens": 60} | more)


def generate(llm: Any, requests: list[tuple[str, SamplingParams]]) -> list[Any]:
    prompts, own = zip(*requests, strict=True)
    return llm.generate(list(prompts), [one.clone() for one in own], use_tqdm=False)


def stock_endings(requests: list[tuple[str, SamplingParams]], **config: Any) -> list[Any]:
    """What stock vLLM gives, decoding the same weights autoregressively, with this configuration
    of structured output."""
    from vllm import LLM

    with in_process():
        llm = LLM(
            model=str(NANO),
            hf_overrides={"architectures": ["LlamaForCausalLM"]},
            dtype="float32",
            enforce_eager=True,
            max_model_len=512,
            **settings(structured_outputs_config=config),
        )
    for _, own in requests:
        own.allowed_token_ids = [token for token in range(616) if token != MASK]
    found = endings(generate(llm, requests))
    del llm
    # Where nothing is left, stock vLLM takes token 0, and its matcher's refusal is an error.
    return [("abort", []) if end == ("error", []) else end for end in found]


def endings(outputs: list[Any]) -> list[Any]:
    """Tokens and how they ended; of what did not end by itself no tokens are kept."""
    ends = [output.outputs[0] for output in outputs]
    return [
        (end.finish_reason, list(end.token_ids) if end.finish_reason in ("stop", "length") else [])
        for end in ends
    ]
