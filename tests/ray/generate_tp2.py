# SPDX-License-Identifier: Apache-2.0
"""Prints, as JSON, the tokens of golden cases with tensor parallel 2 on one executor.

python generate_tp2.py {mp,ray} {dynamic,static} CHECKPOINT HF_OVERRIDES [PARSER] < requests.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams


def main() -> None:
    """Read requests, `{"prompt": ids, "params": {...}}` each, and answer.

    Where the checkpoint has a tokenizer they may have a `constraint`, that of an answer if PARSER,
    a `structured_outputs_config`, tells it from thoughts.
    """
    executor, shapes, checkpoint, overrides, *parser = sys.argv[1:]
    requests = json.load(sys.stdin)
    if executor == "ray":
        import ray

        ray.init(num_cpus=2, num_gpus=2, object_store_memory=100 << 20, include_dashboard=False)
    llm = LLM(
        checkpoint,
        tensor_parallel_size=2,
        distributed_executor_backend=executor,
        skip_tokenizer_init=not (Path(checkpoint) / "tokenizer.json").exists(),
        hf_overrides=json.loads(overrides),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        kv_cache_memory_bytes=64 << 20,
        additional_config={"nbdiff": {"static_shapes": shapes == "static"}},
        structured_outputs_config=json.loads(parser[0]) if parser else {},
    )
    outputs = llm.generate(
        [{"prompt_token_ids": request["prompt"]} for request in requests],
        [params_of(request) for request in requests],
        use_tqdm=False,
    )
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


def params_of(request: dict[str, Any]) -> SamplingParams:
    """What a request asks for."""
    constraint = request.get("constraint")
    wanted = StructuredOutputsParams(**constraint) if constraint else None
    return SamplingParams(structured_outputs=wanted, **request["params"])


if __name__ == "__main__":
    main()
