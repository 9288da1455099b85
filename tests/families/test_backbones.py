# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is recognised by its own config.json, and its logits are those of its backbone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention

from tests.families.checkpoints import checkpoint
from tests.families.engines import serve
from tests.families.oracles import ORACLES

BLOCK, TOKENS = 8, 150
POSITIONS = torch.arange(TOKENS)
MASKS = {
    "causal": POSITIONS[:, None] >= POSITIONS,
    "block-causal": POSITIONS[:, None] // BLOCK >= POSITIONS // BLOCK,
}


def attend(layer: Attention, visible: Tensor) -> Callable[..., Tensor]:
    """Attention over the rows of one text, in place of vLLM's over its KV cache."""

    def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.view(len(x), -1, layer.head_size).transpose(0, 1) for x in (query, key, value))
        groups = layer.num_heads // layer.num_kv_heads
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = (q @ k.mT * layer.head_size**-0.5).masked_fill(~visible, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1).reshape(query.shape)

    return forward


def served_logits(model: nn.Module, config: VllmConfig, ids: Tensor, visible: Tensor) -> Tensor:
    with pytest.MonkeyPatch.context() as monkeypatch:
        for layer in model.modules():
            if isinstance(layer, Attention):
                monkeypatch.setattr(layer, "forward", attend(layer, visible))
        with set_forward_context(None, config, num_tokens=len(ids)), torch.inference_mode():
            return model.compute_logits(model(ids.int(), POSITIONS))


@pytest.mark.parametrize("family", ORACLES)
def test_logits(family: str, tmp_path: Path) -> None:
    """The served class errs no more than the oracle does in the same precision, or twice that."""
    folder = checkpoint(family, tmp_path)
    oracle, llm = ORACLES[family](folder), serve(folder)
    ids = torch.randint(250, (TOKENS,), generator=torch.Generator().manual_seed(0))

    def served(visible: Tensor) -> Tensor:
        config = llm.llm_engine.vllm_config
        (logits,) = llm.apply_model(lambda model: served_logits(model, config, ids, visible))
        return logits

    for mask, visible in MASKS.items():
        exact = oracle(ids, visible, torch.float64)
        rounding = (oracle(ids, visible, torch.float32) - exact).abs().max()
        assert (served(visible) - exact).abs().max() <= 2 * rounding, mask
