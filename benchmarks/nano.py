# SPDX-License-Identifier: Apache-2.0
"""The bundled checkpoint on held-out problems: really generated, answers checked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.engines import OPTIONS, Request
from vllm_nbdiff.adapt.problems import held_out

CHECKPOINT = Path(__file__).parent.parent / "examples" / "nbdiff-nano"
DTYPE = "float32"  # as the checkpoint is stored
MAX_TOKENS = 256
SCHEMA = {
    "type": "object",
    "properties": {name: {"type": "integer", "maximum": 9} for name in ("first", "second")},
    "required": ["first", "second"],
    "additionalProperties": False,
}


class Nano:
    """Rounds of held-out problems; every round asks others, every batch size the same."""

    name = "nano"
    dtype = DTYPE

    def __init__(self, checkpoint: Path, problems_per_round: int) -> None:
        """Raises FileNotFoundError when `checkpoint` holds no model."""
        from transformers import AutoTokenizer

        if not (checkpoint / "config.json").exists():
            raise FileNotFoundError(f"no checkpoint in {checkpoint}; name one with --nano")
        self.folder = checkpoint
        self.problems_per_round = problems_per_round
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def requests(self, mode: str, batch: int, round_index: int) -> list[Request]:
        """The requests of one round: greedy, at the mode's default options."""
        from vllm import SamplingParams

        count = max(self.problems_per_round, batch)
        problems = held_out((round_index + 1) * count)[-count:]
        extra = OPTIONS.get(mode) or None
        params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, extra_args=extra)
        return [Request(self._encode(problem.prompt), params, problem) for problem in problems]

    def _encode(self, question: str) -> list[int]:
        rendered = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        return self._tokenizer(rendered, add_special_tokens=False)["input_ids"]


class NanoJson(Nano):
    """The same problems answered under a JSON schema, where only the form can be right."""

    name = "nano json"

    def requests(self, mode: str, batch: int, round_index: int) -> list[Request]:
        """The requests of one round: greedy, at the mode's default options."""
        from vllm.sampling_params import StructuredOutputsParams

        requests = super().requests(mode, batch, round_index)
        for request in requests:
            request.params.structured_outputs = StructuredOutputsParams(json=SCHEMA)
        return [replace(request, problem=None) for request in requests]
