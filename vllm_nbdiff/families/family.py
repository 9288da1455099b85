# SPDX-License-Identifier: Apache-2.0
"""The facts in which block-diffusion families differ, a record a family.

Planning, decoding and scheduling read these facts; nothing else asks for a family's name. Imports
nothing of vLLM: records are read wherever requests are admitted.

Facts that follow from others are not repeated. Where the context is block-causal, blocks lie at
multiples of the block length, the tail of a prompt is fixed tokens of the first canvas, and a
commit runs under the mask of a denoise step; where it is causal, blocks are counted from the end
of the prompt and a commit is causal. A filled position is final unless the family edits, so it is
the same whether eos is looked for inside a block or after it: the text ends at the first one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

MASKED_RULES = ("confidence", "entropy", "margin", "factor", "entropy_bound", "entropy_threshold")
"""Selection rules that ask nothing of a model."""
LOSSLESS_MODES = ("verify", "ar", "auto")
ContextMask = Literal["causal", "block-causal"]
"""Who sees whom in finished text: see `Family.context`."""


@dataclass(frozen=True)
class Family:
    """How the models of a family are decoded.

    Attributes:
        name: For messages.
        models: What vLLM loads, `module:class`, by the architecture that a checkpoint's config.json
            names.
        context: Who sees whom in finished text: `causal`, or `block-causal`, where the tokens of a
            block see each other as well.
        shifts: Row i of a canvas predicts position i + 1, else position i. A causal row always
            predicts the next one.
        seed: Whether a block's first token is given by the row before it: `always`, `never`, or
            `at block start`, that is unless a prompt ends inside the block.
        inclusive: A probability equal to the threshold is above it, unless that is 1.
        cached_row_before: With the block cache a step computes the row before its sub-block too,
            which predicts the first column; else it waits for that column to be filled.
        modes: Values of `nbdiff_mode`.
        algorithms: Values of `nbdiff_algorithm`; the first one is the default.
        options: Fields of `RequestOptions` that a request may set, beside mode, algorithm,
            threshold and max_steps.
        defaults: Fields of `RequestOptions` whose default is the family's own.
        sub_block_length: Default of sub-blocks, where it divides the block length; None: a block.
        block_length: Default.
        block_length_key: Where a checkpoint's config.json holds it, beside `block_length`.
        mask_token_ids: By `model_type`, of checkpoints whose config.json has no `mask_token_id`.
        thinking_budget: Whether `thinking_token_budget` is honoured.
    """

    name: str
    models: Mapping[str, str]
    context: ContextMask
    shifts: bool
    seed: Literal["always", "never", "at block start"]
    inclusive: bool = False
    cached_row_before: bool = False
    modes: tuple[str, ...] = ("diffusion",)
    algorithms: tuple[str, ...] = MASKED_RULES
    options: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    sub_block_length: int | None = None
    block_length: int = 32
    block_length_key: str = "block_length"
    mask_token_ids: Mapping[str, int] = field(default_factory=dict)
    thinking_budget: bool = False

    @property
    def block_causal(self) -> bool:
        """Whether the context is block-causal."""
        return self.context == "block-causal"

    @property
    def known_rows(self) -> int:
        """Rows that a known token has to itself before the canvas drafted behind it: where a row
        predicts the next position it is the canvas's first one, whose last is of no use."""
        return int("verify" in self.modes and not self.shifts)

    def refusal(self, option: str, value: Any) -> str | None:
        """Why a field of `RequestOptions` does not apply, as said after its name; None: it does."""
        if option == "mode" and value not in self.modes:
            return f"={value} needs a causal context; that of {self.name} is block-causal"
        # Rules that another plugin brings are for every model.
        known = {name for family in FAMILIES for name in family.algorithms}
        if option == "algorithm" and value in known - set(self.algorithms):
            return f"={value} does not apply to {self.name}; it has {', '.join(self.algorithms)}"
        common = ("mode", "algorithm", "threshold", "max_steps", "step_map")
        if option not in (*common, *self.options):
            return f" does not apply to {self.name}"
        return None


NBDIFF = Family(
    name="NBDiff",
    models={"NBDiffForCausalLM": "vllm_nbdiff.families.nbdiff:NBDiffForCausalLM"},
    context="causal",
    shifts=True,
    seed="always",
    cached_row_before=True,
    modes=("diffusion", *LOSSLESS_MODES),
    algorithms=(*MASKED_RULES, "freedave"),
    options=(
        *("small_blocks", "block_length", "draft_length", "draft_steps", "fan_out"),
        *("fused_commit", "block_cache"),
    ),
    sub_block_length=8,
    mask_token_ids={"PanguEmbedded": 45830},
)

NEMOTRON = Family(
    name="Nemotron-Labs-Diffusion",
    models={
        "NemotronLabsDiffusionModel": "vllm_nbdiff.families.nemotron:NemotronLabsDiffusionModel"
    },
    context="causal",
    shifts=False,
    seed="always",
    inclusive=True,
    modes=("diffusion", *LOSSLESS_MODES),
    options=(
        *("small_blocks", "block_length", "draft_length", "draft_steps", "fan_out"),
        "block_cache",
    ),
    block_length_key="block_size",
    mask_token_ids={"nemotron_labs_diffusion": 100},
    thinking_budget=True,
)

SDAR = Family(
    name="SDAR",
    models={
        "SDARForCausalLM": "vllm_nbdiff.families.sdar:SDARForCausalLM",
        "SDARMoeForCausalLM": "vllm_nbdiff.families.sdar:SDARMoeForCausalLM",
    },
    context="block-causal",
    shifts=False,
    seed="never",
    algorithms=(
        *("low_confidence_dynamic", "low_confidence_static", "sequential", "entropy_bounded"),
        *MASKED_RULES,
    ),
    options=("fused_commit",),
    block_length=4,
    block_length_key="block_size",
    mask_token_ids={"sdar": 151669, "sdar_moe": 151669},
)

FAST_DLLM = Family(
    name="Fast-dLLM v2",
    models={"Fast_dLLM_QwenForCausalLM": "vllm_nbdiff.families.fast_dllm:FastDLLMQwenForCausalLM"},
    context="block-causal",
    shifts=True,
    seed="at block start",
    options=("small_blocks", "block_cache"),
    sub_block_length=8,
    block_length_key="bd_size",
    mask_token_ids={"Fast_dLLM_Qwen": 151665},
)

LLADA2 = Family(
    name="LLaDA2",
    models={"LLaDA2MoeModelLM": "vllm_nbdiff.families.llada2:LLaDA2MoeModelLM"},
    context="block-causal",
    shifts=False,
    seed="never",
    algorithms=("low_confidence_dynamic", "edit", *MASKED_RULES),
    options=("editing_threshold", "max_post_steps", "fused_commit"),
    defaults={"threshold": 0.95},
    mask_token_ids={"llada2_moe": 156895},
)

STABLE_DIFFCODER = Family(
    name="Stable-DiffCoder",
    models={
        "StableDiffcoderForCausalLM": (
            "vllm_nbdiff.families.stable_diffcoder:StableDiffcoderForCausalLM"
        )
    },
    context="block-causal",
    shifts=False,
    seed="never",
    inclusive=True,
    options=("fused_commit",),
    defaults={"threshold": 0.95},
    block_length=4,
    mask_token_ids={"llama": 5},
)

FAMILIES = (NBDIFF, NEMOTRON, SDAR, FAST_DLLM, LLADA2, STABLE_DIFFCODER)
"""Every family that is served."""


def family_of(architectures: tuple[str, ...] | list[str] | None) -> Family | None:
    """The family of a checkpoint with these `architectures`; None if it is none of ours."""
    names = set(architectures or ())
    return next((family for family in FAMILIES if names.intersection(family.models)), None)
