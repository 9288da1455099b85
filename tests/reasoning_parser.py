# SPDX-License-Identifier: Apache-2.0
"""A `--reasoning-parser-plugin`: what the bundled model writes before a colon is thought."""

from collections.abc import Sequence

from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.deepseek_r1_reasoning_parser import DeepSeekR1ReasoningParser

END = ":"


@ReasoningParserManager.register_module("colon", force=True)
class ColonReasoningParser(DeepSeekR1ReasoningParser):
    """Both tokens are in the vocabulary; the first one is in no text.

    A prompt that begins with an end is more than it can bear.
    """

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether thinking has ended there."""
        if input_ids and input_ids[0] == self.end_token_id:
            raise RuntimeError("a broken parser")
        return super().is_reasoning_end(input_ids)

    @property
    def start_token(self) -> str:
        return "~"

    @property
    def end_token(self) -> str:
        return END
