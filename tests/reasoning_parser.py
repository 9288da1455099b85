# SPDX-License-Identifier: Apache-2.0
"""A `--reasoning-parser-plugin`: what the bundled model writes before a colon is thought."""

from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.deepseek_r1_reasoning_parser import DeepSeekR1ReasoningParser

END = ":"


@ReasoningParserManager.register_module("colon", force=True)
class ColonReasoningParser(DeepSeekR1ReasoningParser):
    """Both tokens are in the vocabulary; the first one is in no text."""

    @property
    def start_token(self) -> str:
        return "~"

    @property
    def end_token(self) -> str:
        return END
