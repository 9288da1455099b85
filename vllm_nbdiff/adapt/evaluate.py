# SPDX-License-Identifier: Apache-2.0
"""Exact answers and tokens per forward of a checkpoint, on the engine that serves it.

    python -m vllm_nbdiff.adapt.evaluate --model examples/nbdiff-nano

Asks AR and mode `verify`, where the context is causal, and by block diffusion, at the checkpoint's
defaults and over thresholds and sub-blocks; prints a Markdown table and, last, one JSON line.
Forwards are those of vLLM's counter ``vllm:diffusion_num_denoising_steps``: denoise steps and
commits, without the prefill.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from vllm_nbdiff.adapt import problems
from vllm_nbdiff.adapt.lora import rank_of
from vllm_nbdiff.draft_only import is_draft_only
from vllm_nbdiff.families.family import NBDIFF, family_of

FORWARDS = "vllm:diffusion_num_denoising_steps"
AR_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "PanguEmbedded": "PanguEmbeddedForCausalLM",
}
THRESHOLDS = [0.99, 0.95, 0.9, 0.8, 0.6]
SMALL_BLOCKS = [4, 2, 1]


@dataclass(frozen=True)
class Question:
    """A conversation up to the answer, and the only answer that counts as exact."""

    messages: list[dict[str, str]]
    answer: str


@dataclass(frozen=True)
class Score:
    """One row of the table; ``small_blocks`` and ``threshold`` are None at the defaults.

    ``exact`` is in percent, ``tpf`` generated tokens per forward.
    """

    name: str
    exact: float
    tpf: float
    small_blocks: int | None = None
    threshold: float | None = None

    def line(self) -> str:
        """A row of a Markdown table."""
        return f"| {self.name} | {self.exact:.1f} % | {self.tpf:.2f} |"


def bundled_task(count: int) -> list[Question]:
    """Held-out problems of the bundled checkpoint's task."""
    return [
        Question([{"role": "user", "content": problem.prompt}], problem.answer)
        for problem in problems.held_out(count)
    ]


def from_file(path: Path, count: int) -> list[Question]:
    """The first ``count`` lines with ``messages``, whose last one is the answer."""
    lines = path.read_text(encoding="utf-8").splitlines()[:count]
    talks = [json.loads(line)["messages"] for line in lines]
    if not talks:
        raise ValueError(f"{path} is empty")
    return [Question(talk[:-1], talk[-1]["content"]) for talk in talks]


def engine(model: Path, architecture: str, lora: Path | None = None) -> Any:
    """``model`` decoded the way of ``architecture``, in the precision of its file; with room for an
    adapter like ``lora``."""
    from vllm import LLM
    from vllm.config.lora import MaxLoRARanks
    from vllm.platforms import current_platform

    config, adapters = json.loads((model / "config.json").read_text()), {}
    if lora is not None:
        rank = min(most for most in get_args(MaxLoRARanks) if most >= rank_of(lora))
        adapters = {"enable_lora": True, "max_lora_rank": rank}
    return LLM(
        model=str(model),
        dtype=config.get("dtype", "auto"),  # vLLM's own choice for float32 is a shorter type
        hf_overrides={"architectures": [architecture]},
        enforce_eager=True,
        disable_log_stats=False,
        # Stock vLLM on a CPU would claim nearly all memory of the host, or refuse to start.
        gpu_memory_utilization=0.3 if current_platform.is_cpu() else 0.9,
        **adapters,
    )


def score(
    llm: Any,
    questions: list[Question],
    max_tokens: int,
    extra: dict[str, Any] | None = None,
    lora: Path | None = None,
) -> tuple[float, float]:
    """Exact answers in percent, and tokens per forward (1 for an AR engine)."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    def forwards() -> float:
        return sum(m.value for m in llm.get_metrics() if m.name == FORWARDS)

    before = forwards()
    chats: Any = [question.messages for question in questions]
    params = SamplingParams(temperature=0, max_tokens=max_tokens, extra_args=extra)
    adapter = None if lora is None else LoRARequest("adapter", 1, str(lora))
    answers = llm.chat(chats, params, use_tqdm=True, lora_request=adapter)
    outputs = [answer.outputs[0] for answer in answers]
    right = sum(o.text.strip() == q.answer for q, o in zip(questions, outputs, strict=True))
    spent = forwards() - before
    tokens = sum(len(output.token_ids) for output in outputs)
    return 100 * right / len(questions), tokens / spent if spent else 1.0


def evaluate(
    model: Path,
    questions: list[Question],
    max_tokens: int,
    thresholds: list[float],
    small_blocks: list[int],
    lora: Path | None = None,
) -> list[Score]:
    """AR, ``verify``, the checkpoint's default options, then every setting; rows are printed as
    they come. With ``lora`` an adapter of the checkpoint is asked, a draft-only one not for AR.

    There are no rows of AR and ``verify`` where the context is block-causal: rows that see what
    comes after them in their block were never trained to predict it.
    """
    config = json.loads((model / "config.json").read_text())
    family = family_of(config["architectures"]) or NBDIFF
    rows: list[Score] = []

    def add(row: Score) -> None:
        rows.append(row)
        print(row.line(), flush=True)

    print("| decoding | exact | tokens per forward |\n|---|---|---|")
    if not family.block_causal:
        reader = None if lora is not None and is_draft_only(lora) else lora
        llm = engine(model, AR_ARCHITECTURES[config["model_type"]], reader)
        add(Score("AR", *score(llm, questions, max_tokens, lora=reader)))
        del llm
    llm = engine(model, next(iter(family.models)), lora)
    if not family.block_causal:
        verify = score(llm, questions, max_tokens, {"nbdiff_mode": "verify"}, lora)
        add(Score("verify", *verify))
    add(Score("block diffusion, default options", *score(llm, questions, max_tokens, lora=lora)))
    for small in small_blocks:
        for threshold in thresholds:
            extra = {"nbdiff_small_blocks": small, "nbdiff_threshold": threshold}
            name = f"{small} sub-block{'s' if small > 1 else ''}, threshold {threshold:g}"
            exact, tpf = score(llm, questions, max_tokens, extra, lora)
            add(Score(name, exact, tpf, small, threshold))
    return rows


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Exact answers and tokens per forward.")
    parser.add_argument("--model", type=Path, required=True, help="block-diffusion checkpoint")
    parser.add_argument("--lora", type=Path, help="adapter of it that is asked")
    parser.add_argument("--data", type=Path, help="JSON lines with messages; default: bundled task")
    parser.add_argument("--limit", type=int, default=300, help="questions to ask")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--thresholds", type=float, nargs="*", default=THRESHOLDS)
    parser.add_argument("--small-blocks", type=int, nargs="*", default=SMALL_BLOCKS)
    parser.add_argument("--out", type=Path, help="folder for evaluation.json and curve.png")
    return parser.parse_args()


def main() -> None:
    """Evaluate; print the table and the JSON line; write files if asked."""
    options = parse_arguments()
    asked = options.limit
    questions = from_file(options.data, asked) if options.data else bundled_task(asked)
    settings = (options.thresholds, options.small_blocks)
    rows = evaluate(options.model, questions, options.max_tokens, *settings, options.lora)
    *lossless, default = [row for row in rows if row.threshold is None]
    ar, verify = lossless or (None, None)
    ar_exact = None if ar is None else round(ar.exact, 2)
    summary = {
        "ar_exact": ar_exact,
        "diffusion_exact": round(default.exact, 2),
        "diffusion_tpf": round(default.tpf, 3),
        "verify_tpf": None if verify is None else round(verify.tpf, 3),
        "n": len(questions),
    }
    if options.out:
        from vllm_nbdiff.adapt.plot import threshold_curves

        options.out.mkdir(parents=True, exist_ok=True)
        result = {**summary, "rows": [asdict(row) for row in rows]}
        (options.out / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
        swept = [asdict(row) for row in rows if row.threshold is not None]
        threshold_curves(swept, ar_exact, options.out / "curve.png")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
