# SPDX-License-Identifier: Apache-2.0
"""Start-up: what makes a block-diffusion checkpoint, and errors that name the key and the fix."""

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils import cpu_resource_utils

import vllm_nbdiff
from vllm_nbdiff.config import BlockDiffusionConfig
from vllm_nbdiff.decoding.rules import CONFIDENCE, RULES, Ranked, Rule
from vllm_nbdiff.engine_options import Allowed

FREEDAVE = {"algorithm": "freedave"}
OFFLOADING = KVTransferConfig("OffloadingConnector", engine_id="one", kv_role="kv_both")


@pytest.fixture(autouse=True)
def registered() -> None:
    vllm_nbdiff.register()


@pytest.fixture(scope="session")
def checkpoint(golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint's config without weights: start-up checks need none."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text((golden_checkpoint / "config.json").read_text())
    return folder


def start(checkpoint: Path, overrides: dict[str, Any] | None = None, **arguments: Any) -> Any:
    """The finished engine configuration."""
    keys = {"architectures": ["NBDiffForCausalLM"], "mask_token_id": 511} | (overrides or {})
    keys = {key: value for key, value in keys.items() if value is not None}
    settings = {"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 512}
    args = EngineArgs(model=str(checkpoint), hf_overrides=keys, **(settings | arguments))
    return args.create_engine_config()


def test_defaults(checkpoint: Path) -> None:
    vllm_config = start(checkpoint)
    config = BlockDiffusionConfig.from_vllm_config(vllm_config)
    assert (config.block_length, config.mask_token_id) == (32, 511)
    assert vllm_config.diffusion_config.canvas_length == 32
    assert not vllm_config.model_config.is_diffusion
    assert vllm_config.use_v2_model_runner


def test_server_wide_defaults(checkpoint: Path) -> None:
    nbdiff = {"algorithm": "entropy", "threshold": 0.5, "small_blocks": 2}
    config = BlockDiffusionConfig.from_vllm_config(
        start(checkpoint, {"block_length": 8}, additional_config={"nbdiff": nbdiff})
    )
    assert config.defaults.algorithm == "entropy" and config.defaults.threshold == 0.5
    assert (config.defaults.block_length, config.defaults.small_blocks) == (8, 2)


def test_shapes_are_static_where_graphs_are(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = {
        wanted: BlockDiffusionConfig.from_vllm_config(
            start(checkpoint, additional_config={"nbdiff": {"static_shapes": wanted}})
        )
        for wanted in (True, False)
    }
    unset = BlockDiffusionConfig.from_vllm_config(start(checkpoint))
    for on_cpu in (True, False):
        monkeypatch.setattr(current_platform, "is_cpu", lambda cpu=on_cpu: cpu)
        assert unset.static_shapes is not on_cpu
        assert all(config.static_shapes is wanted for wanted, config in configs.items())


def _reads_values(ranked: Ranked) -> torch.Tensor:
    return ranked.probability > ranked.threshold.max().item()


def _branches(ranked: Ranked) -> torch.Tensor:
    return ranked.active if ranked.active.any() else ~ranked.active


def _is_on_the_host(ranked: Ranked) -> torch.Tensor:
    return ranked.probability > torch.arange(ranked.probability.shape[1])


def _is_tensors_alone(ranked: Ranked) -> torch.Tensor:
    count = torch.arange(ranked.active.shape[1], device=ranked.active.device)
    return (ranked.probability.cumsum(1) > ranked.threshold) & (count < 3)


@pytest.mark.parametrize("takes", [_reads_values, _branches, _is_on_the_host])
def test_a_rule_that_reads_values_has_no_static_shapes(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, takes: Callable[[Ranked], torch.Tensor]
) -> None:
    """It would stop every step of a GPU."""
    monkeypatch.setitem(RULES, "good", Rule(CONFIDENCE, _is_tensors_alone, 0.5))
    static = {"additional_config": {"nbdiff": {"static_shapes": True}}}
    start(checkpoint, **static)
    monkeypatch.setitem(RULES, "bad", Rule(CONFIDENCE, takes, 0.5))
    start(checkpoint)
    with pytest.raises(ValueError, match=r"the rule 'bad' must be made of tensors .* alone"):
        start(checkpoint, **static)


def test_operators_limits(checkpoint: Path) -> None:
    nbdiff = {"max_drafts": 2, "allow": {"modes": ["diffusion", "verify"], "options": []}}
    engine = BlockDiffusionConfig.from_vllm_config(
        start(checkpoint, additional_config={"nbdiff": nbdiff | FREEDAVE})
    ).engine
    assert engine.max_drafts == 2
    assert engine.allow == Allowed(modes=("diffusion", "verify"), options=())


def test_the_rust_front_end_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match="VLLM_USE_RUST_FRONTEND is not supported"):
        start(checkpoint)


def test_installed_logits_processors_are_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM would load them, and no sampler of ours would call them."""
    entry = metadata.EntryPoint("shout", "loud.words:Shout", "vllm.logits_processors")
    installed = metadata.entry_points

    def with_one_more(**selected: str) -> Any:
        if selected.get("group") == "vllm.logits_processors":
            return metadata.EntryPoints([entry])
        return installed(**selected)

    monkeypatch.setattr(metadata, "entry_points", with_one_more)
    with pytest.raises(ValueError, match=r"logits processors .* shout = loud\.words:Shout"):
        start(checkpoint)


def test_generation_config_defaults(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    defaults = {"nbdiff_threshold": 0.7, "eos_token_id": 510}
    (tmp_path / "generation_config.json").write_text(json.dumps(defaults))
    assert BlockDiffusionConfig.from_vllm_config(start(tmp_path)).defaults.threshold == 0.7
    without = start(tmp_path, generation_config="vllm")
    assert BlockDiffusionConfig.from_vllm_config(without).defaults.threshold == 0.9


@pytest.mark.parametrize(
    ("algorithm", "threshold"),
    [("confidence", 0.7), ("entropy_bound", 0.1), ("factor", 1), ("freedave", 1)],
)
def test_a_checkpoints_threshold_is_of_its_own_algorithm(
    checkpoint: Path, tmp_path: Path, algorithm: str, threshold: float
) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps({"nbdiff_threshold": 0.7}))
    chosen = start(tmp_path, additional_config={"nbdiff": {"algorithm": algorithm}})
    assert BlockDiffusionConfig.from_vllm_config(chosen).defaults.threshold == threshold


@pytest.mark.parametrize(
    ("checkpoints", "served", "steps"),
    [("freedave", "entropy", None), ("entropy", "freedave", None), ("freedave", "freedave", 6)],
)
def test_a_checkpoints_draft_steps_are_of_its_own_algorithm(
    checkpoint: Path, tmp_path: Path, checkpoints: str, served: str, steps: int | None
) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    defaults = {"nbdiff_algorithm": checkpoints, "nbdiff_draft_steps": 6}
    (tmp_path / "generation_config.json").write_text(json.dumps(defaults))
    chosen = start(tmp_path, additional_config={"nbdiff": {"algorithm": served}})
    assert BlockDiffusionConfig.from_vllm_config(chosen).defaults.draft_steps == steps


def test_max_num_seqs_leaves_room_for_every_canvas(checkpoint: Path) -> None:
    vllm_config = start(checkpoint, max_num_batched_tokens=128, max_num_seqs=64)
    assert vllm_config.scheduler_config.max_num_seqs == 4


def test_float32_checkpoint_stays_float32_without_bfloat16_arithmetic(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert start(checkpoint, dtype="auto").model_config.dtype == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert start(checkpoint, dtype="auto").model_config.dtype == torch.bfloat16


@pytest.mark.skipif(not current_platform.is_cpu(), reason="about the CPU platform")
def test_kv_cache_takes_a_bounded_share_of_memory(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert start(checkpoint).cache_config.kv_cache_memory_bytes <= 4 << 30
    one, few, many = (
        start(checkpoint, max_num_seqs=n).cache_config.kv_cache_memory_bytes for n in (1, 32, 64)
    )
    assert one == few == many // 2  # of what so many sequences need
    assert start(checkpoint, gpu_memory_utilization=0.3).cache_config.kv_cache_memory_bytes is None
    assert start(checkpoint, kv_cache_memory_bytes=1 << 28).cache_config.kv_cache_memory_bytes == (
        1 << 28
    )


@pytest.mark.skipif(not current_platform.is_cpu(), reason="about the CPU platform")
@pytest.mark.parametrize("page_size", [128, 512])
def test_kv_cache_holds_a_sequence_however_little_memory_there_is(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, page_size: int
) -> None:
    """Whose last page holds one token, beside the page that vLLM keeps for itself."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    little = SimpleNamespace(available_memory=1 << 16)
    monkeypatch.setattr(cpu_resource_utils, "get_memory_node_info", lambda: little)
    limits: dict[str, Any] = {"block_size": page_size, "max_model_len": page_size + 1}
    cache = start(checkpoint, max_num_batched_tokens=1024, **limits).cache_config
    hf = json.loads((checkpoint / "config.json").read_text())
    heads, size = hf["num_key_value_heads"], hf["hidden_size"] // hf["num_attention_heads"]
    page = 2 * hf["num_hidden_layers"] * heads * size * 4 * page_size
    assert cache.kv_cache_memory_bytes >= 3 * page


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mask_token_id": None}, "mask_token_id is missing; set it with --hf-overrides"),
        ({"mask_token_id": 512}, r"mask_token_id must be an integer in \[0, 512\)"),
        ({"mask_token_id": "x"}, "mask_token_id must be an integer"),
        ({"block_length": 0}, "block_length must be a positive integer"),
        ({"block_length": 8.5}, "block_length must be a positive integer"),
        ({"model_type": "mistral"}, "no backbone for model_type='mistral'"),
    ],
    ids=str,
)
def test_bad_checkpoint(checkpoint: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start(checkpoint, overrides)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"additional_config": {"nbdiff": {"speed": 1}}}, "unknown key nbdiff.speed"),
        ({"additional_config": {"nbdiff": {"threshold": 2}}}, "nbdiff_threshold must be a number"),
        ({"additional_config": {"nbdiff": {"small_blocks": 5}}}, "not divisible by 5"),
        ({"additional_config": {"nbdiff": 3}}, "'nbdiff' must be an object"),
        (
            {"additional_config": {"nbdiff": {"max_steps_per_schedule": 0}}},
            "max_steps_per_schedule must be a positive integer",
        ),
        ({"max_num_batched_tokens": 16, "max_num_seqs": 1}, "must hold one whole block"),
        ({"max_num_scheduled_tokens": 16}, "--max-num-scheduled-tokens .16. must hold one whole"),
        ({"kv_offloading_size": 1}, "--kv-offloading-size is not supported"),
        ({"kv_transfer_config": OFFLOADING}, "--kv-transfer-config is not supported"),
        ({"long_prefill_token_threshold": 16}, "--long-prefill-token-threshold"),
        ({"additional_config": {"nbdiff": {"max_drafts": -1}}}, "max_drafts must be an integer"),
        ({"additional_config": {"nbdiff": {"max_drafts": True}}}, "max_drafts must be an integer"),
        (
            {"additional_config": {"nbdiff": {"max_drafts": 1, "draft_steps": 4, **FREEDAVE}}},
            r"nbdiff_draft_steps=4 drafts 3 .* allows 1",
        ),
        ({"additional_config": {"nbdiff": {"max_steps": 1 << 63}}}, "diffusion_max_steps must be"),
        (
            {"additional_config": {"nbdiff": {"draft_steps": 2, "fan_out": 4}}},
            "nbdiff_fan_out=4 does not combine with nbdiff_draft_steps above 1",
        ),
        ({"additional_config": {"nbdiff": {"allow": ["ar"]}}}, "allow must be an object of modes"),
        (
            {"additional_config": {"nbdiff": {"allow": {"mode": ["ar"]}}}},
            "allow must be an object of modes, algorithms, options, got key 'mode'",
        ),
        (
            {"additional_config": {"nbdiff": {"allow": {"modes": ["fast"]}}}},
            "nbdiff.allow.modes must be a list of diffusion, verify, ar, auto",
        ),
        (
            {"additional_config": {"nbdiff": {"allow": {"options": "mode"}}}},
            "nbdiff.allow.options must be a list of",
        ),
        ({"additional_config": {"nbdiff": {"static_shapes": 1}}}, "static_shapes must be true or"),
        ({"additional_config": {"nbdiff": {"decoder": "host"}}}, "unknown key nbdiff.decoder"),
        ({"scheduler_cls": "my.Scheduler"}, "--scheduler-cls is not supported"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds is not supported"),
        ({"logits_processors": ["a:B"]}, "--logits-processors is not supported"),
        ({"enable_return_routed_experts": True}, "--enable-return-routed-experts is not supported"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size above 1 is not supported"),
    ],
    ids=str,
)
def test_bad_arguments(checkpoint: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start(checkpoint, **arguments)
