# SPDX-License-Identifier: Apache-2.0
"""A draft-only adapter acts in rows of canvases: causal text and its KV are the checkpoint's."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from tests.adapters import weights_of, write_adapter
from tests.conftest import counter, options, tokens_of
from tests.engine.test_fan_out import MASK, MOST, NANO, STEPS, WIDTH, forwards_of
from vllm_nbdiff import reference
from vllm_nbdiff.adapt import problems
from vllm_nbdiff.draft_only import is_draft_only, mark_draft_only
from vllm_nbdiff.reference import Context

STATIC = {"nbdiff": {"static_shapes": True, "max_drafts": 16}}
ENGINES: dict[str, dict[str, Any]] = {
    "own rows": {},
    "static": {"additional_config": STATIC},
    "asynchronous": {"additional_config": STATIC},
}
MODES = [
    options(threshold=0.5, small_blocks=4),
    options(threshold=0.9, fused_commit=1),
    options(mode="verify"),
    options(mode="verify", fan_out=3),
    options(mode="ar"),
    options(mode="auto"),
]


class DraftingContext(Context):
    """With other weights for canvases."""

    drafting: Any

    def look(self, canvas: Any) -> torch.Tensor:
        own, self.model = self.model, self.drafting
        try:
            return super().look(canvas)
        finally:
            self.model = own


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """One that is draft-only, the same one without that mark, and the checkpoint merged with it."""
    folder = tmp_path_factory.mktemp("adapters")
    merged = write_adapter(NANO, folder / "drafts", strength=1)
    write_adapter(NANO, folder / "whole", strength=1)
    mark_draft_only(folder / "drafts")
    return folder / "drafts", folder / "whole", merged


def load(merged: Path | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(NANO, attn_implementation="sdpa").float().eval()
    if merged is not None:
        model.load_state_dict(weights_of(merged), strict=False)
    return model


@pytest.fixture(scope="module")
def models(adapters: tuple[Path, Path, Path]) -> tuple[Any, Any]:
    """The checkpoint, and the one that drafts."""
    return load(), load(adapters[2])


@pytest.fixture(scope="module", params=ENGINES)
def engine(
    request: Any, make_llm: Callable[..., Any], make_async_llm: Callable[..., Any]
) -> Iterator[Any]:
    make = make_async_llm if request.param == "asynchronous" else make_llm
    yield make(
        NANO, block_length=32, mask=MASK, skip_tokenizer_init=False, max_model_len=1024,
        block_size=32, enable_lora=True, max_lora_rank=8, max_loras=2, **ENGINES[request.param],
    )  # fmt: skip


def prompts_of(engine: Any, count: int) -> list[list[int]]:
    tokenizer = engine.get_tokenizer()
    return [tokenizer.encode(f"<|user|>{p.prompt}<|assistant|>") for p in problems.held_out(count)]


def expected_text(models: tuple[Any, Any], prompt: list[int], mode: dict[str, Any]) -> list[int]:
    """By plain transformers; the adapter of `models` drafts."""
    own, drafting = models
    ends = {"max_tokens": MOST, "mask_token_id": MASK, "eos_token_ids": [1]}
    if "nbdiff_mode" in mode:
        return reference.generate_ar(own, prompt, **ends).token_ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DraftingContext, "drafting", drafting, raising=False)
        patch.setattr(reference, "Context", DraftingContext)
        small = mode.get("nbdiff_small_blocks", 2)
        return reference.generate(
            own, prompt, num_small_blocks=small, threshold=mode["nbdiff_threshold"], **ends
        ).token_ids


def test_every_mode_beside_other_adapters(
    engine: Any, adapters: tuple[Path, Path, Path], models: tuple[Any, Any]
) -> None:
    """In one batch with requests of no adapter, and of one that acts in every row."""
    own, drafting = models
    drafts, whole = (LoRARequest(a.name, i, str(a)) for i, a in enumerate(adapters[:2], 1))
    prompts = prompts_of(engine, len(MODES))
    kinds = [(drafts, models), (None, (own, own)), (whole, (drafting, drafting))]
    asked = [(m, p, kind) for m, p in zip(MODES, prompts, strict=True) for kind in kinds]
    params = [SamplingParams(temperature=0, max_tokens=MOST, extra_args=m) for m, _, _ in asked]
    given = engine.generate(
        [{"prompt_token_ids": p} for _, p, _ in asked],
        params,
        lora_request=[kind[0] for _, _, kind in asked],
        use_tqdm=False,
    )
    texts = tokens_of(given)
    expected = [expected_text(kind[1], p, m) for m, p, kind in asked]
    wrong = [i for i, text in enumerate(texts) if text != expected[i]]
    assert wrong == []
    # Else nothing is shown.
    in_drafts, nowhere, everywhere = (texts[kind : 3 * 2 : 3] for kind in range(3))
    assert in_drafts != nowhere != everywhere != in_drafts


def test_prompts_are_scored_by_the_checkpoint(
    engine: Any, adapters: tuple[Path, Path, Path]
) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    prompt = {"prompt_token_ids": prompts_of(engine, 1)[0]}
    lora = [None, *(LoRARequest(a.name, i, str(a)) for i, a in enumerate(adapters[:2], 1))]
    given = engine.generate([prompt] * 3, params, lora_request=lora, use_tqdm=False)
    own, drafts, whole = (
        [v.logprob for entry in output.prompt_logprobs if entry for v in entry.values()]
        for output in given
    )
    assert drafts == pytest.approx(own, abs=1e-4)
    assert whole != pytest.approx(own, abs=1e-2)


@torch.inference_mode()
def drafts_behind(models: tuple[Any, Any], known: list[int], width: int) -> list[Any]:
    """As `tests.engine.test_fan_out.draft_behind`, by the model that drafts on the other's KV."""
    context = DraftingContext(models[0])
    context.drafting = models[1]
    context.append(known)
    chance, token = context.look([MASK] * (width - 1)).softmax(-1).max(-1)
    return list(zip(token.tolist(), chance.tolist(), strict=True))


def test_forwards(
    engine: Any,
    adapters: tuple[Path, Path, Path],
    models: tuple[Any, Any],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of the scheme with the adapter's drafts, which are others than the checkpoint's."""
    if "own rows" in request.node.name:
        pytest.skip("what drafts are made for depends on measured times")
    monkeypatch.setattr(
        "tests.engine.test_fan_out.draft_behind", lambda model, *rest: drafts_behind(model, *rest)
    )
    adapter = LoRARequest("drafts", 1, str(adapters[0]))
    extra = options(mode="verify", draft_length=WIDTH, fan_out=16)
    params = SamplingParams(temperature=0, max_tokens=MOST, extra_args=extra)
    counts: list[tuple[float, float]] = []
    for prompt in prompts_of(engine, 4):
        text = expected_text(models, prompt, extra)
        for lora in (adapter, None):
            before = counter(engine, STEPS)
            given = engine.generate(
                [{"prompt_token_ids": prompt}], params, lora_request=lora, use_tqdm=False
            )
            assert tokens_of(given) == [text]
            drafting = models if lora else (models[0], models[0])
            expected = forwards_of(drafting, prompt, text, 16)
            counts.append((counter(engine, STEPS) - before, expected))
    assert all(made == expected for made, expected in counts)
    assert any(counts[i] != counts[i + 1] for i in range(0, len(counts), 2))


@pytest.mark.parametrize("relative", [False, True])
def test_its_folder_may_go_once_it_is_loaded(
    engine: Any,
    adapters: tuple[Path, Path, Path],
    models: tuple[Any, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    relative: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapters[0], tmp_path / "gone")
    lora = LoRARequest(f"gone {relative}", 5 + relative, "gone" if relative else f"{tmp_path}/gone")
    engine.llm_engine.add_lora(lora)
    shutil.rmtree(tmp_path / "gone")
    (prompt,) = prompts_of(engine, 1)
    params = SamplingParams(temperature=0, max_tokens=MOST, extra_args=MODES[2])
    given = engine.generate(
        [{"prompt_token_ids": prompt}], params, lora_request=lora, use_tqdm=False
    )
    assert tokens_of(given) == [expected_text(models, prompt, MODES[2])]


def test_what_says_so(tmp_path: Path, adapters: tuple[Path, Path, Path]) -> None:
    """An adapter that cannot be read is vLLM's to refuse."""
    drafts, whole, _ = adapters
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "adapter_config.json").write_text(json.dumps(["no", "object"]))
    folders = {drafts: True, whole: False, tmp_path / "list": False, tmp_path / "missing": False}
    for folder, says in folders.items():
        assert is_draft_only(folder) == says
