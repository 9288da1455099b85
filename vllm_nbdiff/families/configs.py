# SPDX-License-Identifier: Apache-2.0
"""Configurations of the model types that transformers does not know.

Their checkpoints carry such a class as remote code, which is not run.
"""

from typing import Any

from transformers import (
    LlamaConfig,
    Ministral3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)


class PanguEmbeddedConfig(LlamaConfig):
    """Llama with biases on q, k, v and o; defaults are those of openPangu-Embedded-7B.

    Source: configuration_openpangu_dense.py of the openPangu-Embedded-7B checkpoint.
    """

    model_type = "PanguEmbedded"

    bias: bool = True
    vocab_size: int = 153376
    hidden_size: int = 4096
    intermediate_size: int = 12800
    num_hidden_layers: int = 34
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    rope_theta: float = 16_000_000.0
    bos_token_id: int | None = 1
    eos_token_id: Any = 45892
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = False


class NemotronLabsDiffusionConfig(Ministral3Config):
    """Ministral 3, whose defaults are those of Nemotron-Labs-Diffusion-8B."""

    model_type = "nemotron_labs_diffusion"

    @property
    def llama_4_scaling(self) -> dict[str, Any] | None:
        """The growth of queries with their position, as vLLM's Mistral layers look for it."""
        rope = self.rope_parameters
        beta = rope.get("llama_4_scaling_beta")
        original = rope.get("original_max_position_embeddings")
        return beta and {"beta": beta, "original_max_position_embeddings": original}


class SDARConfig(Qwen3Config):
    """Qwen3."""

    model_type = "sdar"


class SDARMoeConfig(Qwen3MoeConfig):
    """Qwen3-MoE."""

    model_type = "sdar_moe"


class FastDLLMQwenConfig(Qwen2Config):
    """Qwen2, asking vLLM's Llama for its biases on q, k and v."""

    model_type = "Fast_dLLM_Qwen"

    qkv_bias: bool = True


class LLaDA2MoeConfig(PreTrainedConfig):
    """Bailing-MoE 2; defaults are those of LLaDA2.0-mini.

    Source: configuration_llada2_moe.py of the LLaDA2.0-mini checkpoint.
    """

    model_type = "llada2_moe"

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 600_000.0
    partial_rotary_factor: float = 0.5
    rope_parameters: dict[str, Any] | None = None
    use_bias: bool = False
    use_qkv_bias: bool = False
    use_qk_norm: bool = True
    use_rmsnorm: bool = True
    norm_head: bool = False
    embedding_dropout: float = 0.0
    tie_word_embeddings: bool = False
    num_experts: int = 256
    num_experts_per_tok: int = 8
    num_shared_experts: int = 1
    moe_intermediate_size: int = 512
    first_k_dense_replace: int = 1
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    score_function: str = "sigmoid"
    moe_router_enable_expert_bias: bool = True
    router_dtype: str | None = "fp32"
    use_sliding_window: bool = False
    sliding_window: int | None = None
    pad_token_id: int | None = 156892
    eos_token_id: Any = 156892

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.get("expert_capacity"):
            raise ValueError(
                "expert_capacity: LLaDA2.2 chooses experts by block, which is not supported"
            )
        super().__post_init__(**kwargs)
        # The checkpoints hold a length that their model does not read; vLLM would.
        if not self.use_sliding_window:
            self.sliding_window = None


CONFIGS: tuple[type[PreTrainedConfig], ...] = (
    *(PanguEmbeddedConfig, NemotronLabsDiffusionConfig, SDARConfig, SDARMoeConfig),
    *(FastDLLMQwenConfig, LLaDA2MoeConfig),
)
