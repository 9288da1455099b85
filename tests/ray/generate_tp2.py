# SPDX-License-Identifier: Apache-2.0
"""Prints, as JSON, the tokens of golden cases with tensor parallel 2 on one executor.

python generate_tp2.py {mp,ray} {host,device} CHECKPOINT < requests.json
"""

import json
import sys

from vllm import LLM, SamplingParams


def main() -> None:
    """Read requests, `{"prompt": ids, "max_tokens": n, "extra_args": {...}}` each, and answer."""
    executor, decoder, checkpoint = sys.argv[1:]
    requests = json.load(sys.stdin)
    if executor == "ray":
        import ray

        ray.init(num_cpus=2, num_gpus=2, object_store_memory=100 << 20, include_dashboard=False)
    llm = LLM(
        checkpoint,
        tensor_parallel_size=2,
        distributed_executor_backend=executor,
        skip_tokenizer_init=True,
        hf_overrides={
            "architectures": ["NBDiffForCausalLM"],
            "block_length": 8,
            "mask_token_id": 511,
        },
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        kv_cache_memory_bytes=64 << 20,
        additional_config={"nbdiff": {"decoder": decoder}},
    )
    outputs = llm.generate(
        [{"prompt_token_ids": request["prompt"]} for request in requests],
        [
            SamplingParams(
                temperature=0,
                max_tokens=request["max_tokens"],
                detokenize=False,
                extra_args=request["extra_args"],
            )
            for request in requests
        ],
        use_tqdm=False,
    )
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":
    main()
