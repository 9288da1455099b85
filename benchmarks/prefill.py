# SPDX-License-Identifier: Apache-2.0
"""Prefill of a long prompt: a block-causal context against the causal one of the same backbone.

    python -m benchmarks.prefill
    python -m benchmarks.prefill --tokens 2048 --save cpu-prefill

A random Qwen3 of about 110M parameters, served as NBDiff and as SDAR. The engines run in this
process and take turns; medians of CPU time are compared, to which nothing else on the machine adds.
Then the prompt is asked for again with another end: only what is new may be computed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

from benchmarks.report import save

CONTEXTS = {"causal": "NBDiffForCausalLM", "block-causal": "SDARForCausalLM"}
VOCAB_SIZE, BLOCK_LENGTH = 32_000, 32


def build(folder: Path) -> None:
    """Random weights, the same for both."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=4, head_dim=64, max_position_embeddings=8192,
        eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)


def serve(folder: Path, architecture: str, tokens: int) -> Any:
    """An engine that computes the whole prompt in one forward."""
    from vllm import LLM

    overrides = {
        "architectures": [architecture],
        "block_length": BLOCK_LENGTH,
        "mask_token_id": VOCAB_SIZE - 1,
    }
    return LLM(
        model=str(folder), hf_overrides=overrides, dtype="float32", skip_tokenizer_init=True,
        max_model_len=tokens + 256, max_num_batched_tokens=tokens + 256, disable_log_stats=False,
        kv_cache_memory_bytes=1 << 30,
    )  # fmt: skip


def prefill(llm: Any, prompt: list[int]) -> float:
    """CPU seconds until a prompt is computed, decoding left out."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    engine.add_request("0", {"prompt_token_ids": prompt}, params)
    start = process_time()
    engine.step()
    seconds = process_time() - start
    while engine.has_unfinished_requests():
        engine.step()
    return seconds


def computed(llm: Any) -> int:
    """Prompt tokens that were computed since the start, those from the prefix cache left out."""
    value = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return int(value["vllm:prefix_cache_queries"] - value["vllm:prefix_cache_hits"])


def compare(folder: Path, tokens: int, rounds: int) -> dict[str, Any]:
    """Medians, their ratio, and what a second request with the same beginning computes."""
    seconds: dict[str, list[float]] = {context: [] for context in CONTEXTS}
    engines = {context: serve(folder, name, tokens) for context, name in CONTEXTS.items()}
    for turn in range(rounds + 1):
        prompt = [(13 * i + 7919 * turn) % (VOCAB_SIZE - 2) for i in range(tokens)]
        for context in reversed(CONTEXTS) if turn % 2 else CONTEXTS:
            taken = prefill(engines[context], prompt)
            if turn:  # the first one only warms up
                seconds[context].append(taken)
    # The last engine has the metrics.
    again, before = engines["block-causal"], computed(engines["block-causal"])
    prefill(again, [*prompt[: tokens - 3 * BLOCK_LENGTH], *range(40)])
    row: dict[str, Any] = {f"{c}_ms": round(1e3 * median(s), 1) for c, s in seconds.items()}
    row["ratio"] = round(median(seconds["block-causal"]) / median(seconds["causal"]), 3)
    return row | {"tokens_after_a_shared_prefix": 40, "of_which_computed": computed(again) - before}


def main() -> None:
    """Run, print a JSON object, and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt, default 2048")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds, default 7")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json too")
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        row = compare(Path(folder), options.tokens, options.rounds)
    print(json.dumps(row))
    if options.save:
        settings = {"tokens": options.tokens, "rounds": options.rounds}
        save(options.save, [row], settings, "benchmarks.prefill")


if __name__ == "__main__":
    main()
