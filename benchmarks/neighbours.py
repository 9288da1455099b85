# SPDX-License-Identifier: Apache-2.0
"""What one demanding request costs 63 plain ones: their throughput beside it over that without it.

    python -m benchmarks.neighbours
    python -m benchmarks.neighbours --save cpu-neighbours

Also over that beside one more plain request in its place. The bundled model; rounds of the three
kinds take turns, medians are compared. The engine runs in this process, so that all requests of a
round are there when its first step begins, and the CPU time of its steps is taken, to which nothing
else on the machine adds, nor what a server does in another process: vLLM's front end makes strings
of every token and of every log-probability.
"""

from __future__ import annotations

import argparse
import json
import os
from statistics import median
from time import process_time
from typing import Any

from benchmarks.nano import CHECKPOINT, DTYPE
from benchmarks.report import save

PLAIN_TOKENS, LONG_TOKENS, LONG_PROMPT = 96, 400, 1600
PLAIN = "one more plain request"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 200},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 40}, "minItems": 8},
        "size": {"type": "number"},
    },
    "required": ["name", "tags", "size"],
    "additionalProperties": False,
}


def demanding(vocab_size: int) -> dict[str, tuple[int, dict[str, Any], dict[str, Any]]]:
    """By name: tokens of the prompt, sampling parameters and options of a request."""
    words = [[5 + i % 90, 7 + i % 80, 11 + i % 70, 13 + i % 60] for i in range(128)]
    return {
        PLAIN: (20, {}, {}),
        f"prompt of {LONG_PROMPT} tokens": (LONG_PROMPT, {"max_tokens": 16}, {}),
        "freedave, 9 canvases": (20, {}, {"nbdiff_algorithm": "freedave", "nbdiff_draft_steps": 9}),
        "128 bad words of 4 tokens": (20, {"bad_word_ids": words}, {}),
        "every token but 8 a stop token": (
            20,
            {"stop_token_ids": list(range(8, vocab_size)), "min_tokens": LONG_TOKENS},
            {},
        ),
        "bias of 600 tokens": (20, {"logit_bias": dict.fromkeys(range(8, 608), 1.5)}, {}),
        "600 allowed tokens": (20, {"allowed_token_ids": list(range(8, 608))}, {}),
        "every penalty": (
            20,
            {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1},
            {},
        ),
        "temperature, top_k, top_p, min_p": (
            20,
            {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "seed": 1},
            {},
        ),
        "20 logprobs, of its prompt too": (20, {"logprobs": 20, "prompt_logprobs": 20}, {}),
        "JSON schema": (20, {"schema": SCHEMA}, {}),
        "JSON schema, verify": (20, {"schema": SCHEMA}, {"nbdiff_mode": "verify"}),
        "verify, drafts of 32": (20, {}, {"nbdiff_mode": "verify", "nbdiff_draft_length": 32}),
        "auto": (20, {}, {"nbdiff_mode": "auto"}),
    }


class Server:
    """An engine in this process, stepped until plain requests are done."""

    def __init__(self, requests: int) -> None:
        from vllm import LLM

        self.requests = requests
        self.llm = LLM(
            model=str(CHECKPOINT),
            dtype=DTYPE,
            max_num_seqs=requests,
            enable_prefix_caching=False,
            # Room for the long prompt: what a forward costs does not ask what it was trained on.
            hf_overrides={"max_position_embeddings": 2 * LONG_PROMPT},
        )
        self._next, self._seconds = 0, 0.0
        core = self.llm.llm_engine.engine_core
        get_output = core.get_output

        def timed() -> Any:
            start = process_time()
            output = get_output()
            self._seconds += process_time() - start
            return output

        core.get_output = timed

    def params(self, arguments: dict[str, Any], options: dict[str, Any]) -> Any:
        """Sampling parameters of one request."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        words = (arguments := dict(arguments)).pop("bad_word_ids", None)
        if schema := arguments.pop("schema", None):
            arguments["structured_outputs"] = StructuredOutputsParams(json=schema)
        defaults = {"temperature": 0, "max_tokens": LONG_TOKENS, "ignore_eos": True}
        params = SamplingParams(**(defaults | arguments), extra_args=options or None)
        # What vLLM derives from `bad_words` with a tokenizer.
        params._bad_words_token_ids = words
        return params

    def _add(self, number: int, length: int, params: Any) -> str:
        """The same prompt for the same `number`: texts differ in the forwards that they take."""
        self._next += 1
        prompt = [(7 * i + 11 * number) % 500 + 8 for i in range(length)]
        name = str(self._next)
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return name

    def run(self, demanding: tuple[int, dict[str, Any], dict[str, Any]] | None) -> float:
        """Tokens per CPU second of the plain requests, beside a demanding one or alone."""
        engine = self.llm.llm_engine
        plain = self.params({"max_tokens": PLAIN_TOKENS}, {})
        other = demanding and self._add(0, demanding[0], self.params(*demanding[1:]))
        left = {self._add(i, 20 + i % 7, plain) for i in range(1, self.requests)}
        before = self._seconds
        while left:
            left -= {output.request_id for output in engine.step() if output.finished}
        seconds = self._seconds - before
        if other:
            engine.abort_request([other])
        while engine.has_unfinished_requests():
            engine.step()
        return (self.requests - 1) * PLAIN_TOKENS / seconds


def main() -> None:
    """Run, print a JSON object a line, and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=64, help="in flight, the demanding one too")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, default 5")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json too")
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    server = Server(options.requests)
    vocab_size = server.llm.model_config.get_vocab_size()
    rows, requests = [], demanding(vocab_size)
    plain = requests.pop(PLAIN)
    for name, request in requests.items():
        others = {"beside": request, "beside_plain": plain, "alone": None}
        speeds: dict[str, list[float]] = {key: [] for key in others}
        for turn in range(options.rounds + 1):
            for key in list(others)[:: 1 if turn % 2 else -1]:
                speed = server.run(others[key])
                if turn:  # the first one only warms up
                    speeds[key].append(speed)
        found = {key: median(values) for key, values in speeds.items()}
        row = {
            "request": name,
            **{f"tokens_per_cpu_s_{key}": round(value, 1) for key, value in found.items()},
            "ratio": round(found["beside"] / found["alone"], 3),
            "ratio_to_plain": round(found["beside"] / found["beside_plain"], 3),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    if options.save:
        settings = {"requests": options.requests, "rounds": options.rounds}
        save(options.save, rows, settings, "benchmarks.neighbours")


if __name__ == "__main__":
    main()
