# SPDX-License-Identifier: Apache-2.0
"""How thinking ends, where a model is served without a tokenizer."""

from __future__ import annotations

from typing import Any


def reasoning_config(end_token_id: int) -> Any:
    """A `ReasoningConfig` of one token that ends thinking.

    Symptom: vLLM refuses `thinking_token_budget` without a reasoning config, and makes one from
    strings only, by a tokenizer. Upstream: `ReasoningConfig.initialize_token_ids`
    (vllm/config/reasoning.py). Remove when a reasoning config can be given token ids.
    """
    from vllm.config import ReasoningConfig

    config = ReasoningConfig()
    # What begins thinking is asked for by vLLM alone: a budget here counts every token.
    config._reasoning_start_token_ids = [end_token_id]
    config._reasoning_end_token_ids = [end_token_id]
    config._natural_reasoning_end_token_ids = [end_token_id]
    return config
