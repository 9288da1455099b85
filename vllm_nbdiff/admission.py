# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for: checked when it is admitted, so that no worker meets anything else.

vLLM checks most parameters when `SamplingParams` is made, by value. Here the types, what vLLM
leaves open, and how much of a parameter one request may bring (limits.py).
"""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING

from vllm_nbdiff.decoding.rules import RULES
from vllm_nbdiff.limits import (
    GRAMMAR_BACKENDS,
    INT32_MAX,
    INT64_MAX,
    INT64_MIN,
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS_CHARACTERS,
    MAX_GRAMMAR_CHARACTERS,
    MAX_LOGIT_BIAS,
    MAX_LOGIT_BIASES,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_LOGPROBS,
    MAX_PATTERN_SIZE,
    MAX_REPEATED_TOKENS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MIN_TOP_P,
    RANGES,
    Range,
)
from vllm_nbdiff.refusal import OptionError, check_texts, refuse
from vllm_nbdiff.request import parse_options
from vllm_nbdiff.request_options import FREEDAVE, RequestOptions

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from vllm.sampling_params import SamplingParams

    from vllm_nbdiff.config import BlockDiffusionConfig

_OPTIONAL = ("max_tokens", "stream_interval", "logprobs", "prompt_logprobs")
_FLAGS = (
    *("ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens"),
    "include_stop_str_in_output",
)


def validate_params(params: SamplingParams, config: BlockDiffusionConfig) -> None:
    """Check what a client asks for, before any work is spent on it.

    Raises VLLMValidationError (HTTP 400) naming the parameter.
    """
    _refuse_unsupported(params, config)
    _check_numbers(params, config)
    _check_token_lists(params, config)
    _check_strings(params)
    _check_grammar(params, _check_options(params, config), config)


def validate_request(
    params: SamplingParams, prompt_token_ids: Sequence[int] | None, config: BlockDiffusionConfig
) -> None:
    """Check one request once vLLM has added the tokens of `bad_words` and the model's stop ids.

    Raises VLLMValidationError (HTTP 400) naming the parameter.
    """
    validate_params(params, config)
    _check_bad_words(params.bad_words_token_ids or (), config)
    _check_something_left(params, config)
    if prompt_token_ids is not None:
        validate_prompt(prompt_token_ids, config)


def validate_prompt(ids: Sequence[int], config: BlockDiffusionConfig) -> None:
    """Check a prompt's tokens.

    Raises VLLMValidationError (HTTP 400) naming the prompt.
    """
    if ids and not 0 <= min(ids) <= max(ids) < config.vocab_size:
        refuse("prompt", f"has a token id outside the vocabulary of {config.vocab_size}")
    if config.mask_token_id in ids and not config.engine.allow_mask_token_in_prompt:
        refuse(
            "prompt",
            f"contains the mask token (id {config.mask_token_id}); to allow it, start the server "
            'with --additional-config \'{"nbdiff": {"allow_mask_token_in_prompt": true}}\'',
        )


def validate_room(num_tokens: int, config: BlockDiffusionConfig, max_model_len: int) -> None:
    """Check that the first canvas of a prompt of so many tokens can be scheduled.

    Where the context is block-causal it holds the tail of the prompt as well, so it has more rows
    than tokens that it emits; with static shapes rows are scheduled tokens, below the model's
    length. Raises VLLMValidationError (HTTP 400) naming the prompt.
    """
    length = config.block_length
    if not (config.family.block_causal and config.static_shapes and num_tokens % length):
        return
    if num_tokens > max_model_len - length:
        refuse(
            "prompt",
            f"has {num_tokens} tokens; one that ends inside a block must leave room for a whole "
            f"block of {length} below --max-model-len ({max_model_len})",
        )


def validate_envelope(priority: int, **texts: str | None) -> None:
    """Check what goes to the engine beside parameters and prompt, by the names of the fields.

    Raises VLLMValidationError (HTTP 400) naming the field.
    """
    priorities = Range(INT64_MIN, INT64_MAX, whole=True)
    if not priorities.holds(priority):
        refuse("priority", f"must be {priorities}, got {reprlib.repr(priority)}")
    for name, text in texts.items():
        check_texts(name, text)


def clamp(params: SamplingParams, config: BlockDiffusionConfig, max_model_len: int) -> None:
    """Bring what has no effect beyond a limit to that limit, in the engine's copy of `params`.

    As vLLM does with `top_k` in its sampler and with a small temperature.
    """
    params.top_k = min(params.top_k, config.vocab_size)
    params.top_p = max(params.top_p, MIN_TOP_P)
    assert params.max_tokens is not None
    params.max_tokens = min(params.max_tokens, max_model_len)
    params.min_tokens = min(params.min_tokens, params.max_tokens)
    if params.thinking_token_budget is not None:
        params.thinking_token_budget = min(params.thinking_token_budget, max_model_len)


def _refuse_unsupported(params: SamplingParams, config: BlockDiffusionConfig) -> None:
    """Refuse a standard sampling parameter that block diffusion cannot honour."""
    budget = params.thinking_token_budget is not None
    if budget and config.family.thinking_budget and config.end_think_token_id is None:
        refuse(
            "thinking_token_budget",
            "needs the one token that ends thinking: start the server with --reasoning-parser, "
            "--reasoning-config or --hf-overrides '{\"end_think_token_id\": N}'",
        )
    unsupported = {
        "prompt_logprobs": params.prompt_logprobs is not None and config.family.block_causal,
        "prompt_logprob_token_ids": (
            params.prompt_logprob_token_ids is not None and config.family.block_causal
        ),
        "thinking_token_budget": budget and not config.family.thinking_budget,
        "trace_decode_token_ids": bool(params.trace_decode_token_ids),
        "watermarking": params.watermarking is True,
    }
    for name, used in unsupported.items():
        if used:
            refuse(name, "is not supported with block-diffusion models")


def _check_numbers(params: SamplingParams, config: BlockDiffusionConfig) -> None:
    for name, bounds in RANGES.items():
        value = getattr(params, name)
        if not bounds.holds(value) and not (value is None and name in _OPTIONAL):
            refuse(name, f"must be {bounds}, got {reprlib.repr(value)}")
    for name in _FLAGS:
        if not isinstance(value := getattr(params, name), bool):
            refuse(name, f"must be true or false, got {reprlib.repr(value)}")
    if params.logprobs == -1 and config.vocab_size > MAX_LOGPROBS:
        refuse("logprobs", f"must be at most {MAX_LOGPROBS}, got -1 for all tokens")
    # Of `n` completions, the last one's seed is `seed + n - 1`.
    seeds = Range(INT64_MIN, INT64_MAX - (params.n - 1), whole=True)
    if params.seed is not None and not seeds.holds(params.seed):
        refuse("seed", f"must be {seeds}, got {reprlib.repr(params.seed)}")
    repetition = params.repetition_detection
    if repetition is not None:
        sizes = Range(0, MAX_PATTERN_SIZE, whole=True)
        for size in (repetition.max_pattern_size, repetition.min_pattern_size):
            if not sizes.holds(size):
                refuse("repetition_detection", f"must have pattern sizes of at most {sizes.high}")
        if not Range(0, INT32_MAX, whole=True).holds(repetition.min_count):
            refuse("repetition_detection", f"must have a min_count of at most {INT32_MAX}")
        if repetition.min_count * repetition.max_pattern_size > MAX_REPEATED_TOKENS:
            refuse(
                "repetition_detection",
                f"must have a min_count times max_pattern_size of at most {MAX_REPEATED_TOKENS}",
            )


def _check_token_lists(params: SamplingParams, config: BlockDiffusionConfig) -> None:
    bias = params.logit_bias or {}
    for name, ids, limit in (
        ("stop_token_ids", params.stop_token_ids or (), MAX_STOP_TOKEN_IDS),
        ("allowed_token_ids", params.allowed_token_ids or (), MAX_ALLOWED_TOKEN_IDS),
        ("logprob_token_ids", params.logprob_token_ids or (), MAX_LOGPROB_TOKEN_IDS),
        ("logit_bias", bias, MAX_LOGIT_BIASES),
    ):
        _check_token_ids(name, ids, limit, config.vocab_size)
    biases = Range(-MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
    for value in bias.values():
        if not biases.holds(value):
            refuse("logit_bias", f"must hold {biases} for each token, got {reprlib.repr(value)}")


def _check_token_ids(name: str, ids: Collection[int], limit: int, vocab_size: int) -> None:
    if len(ids) > limit:
        refuse(name, f"must hold at most {limit} token ids, got {len(ids)}")
    vocabulary = Range(0, vocab_size - 1, whole=True)
    for token in ids:
        if not vocabulary.holds(token):
            refuse(
                name,
                f"must hold token ids, integers below the vocabulary size {vocab_size}, got "
                f"{reprlib.repr(token)}",
            )


def _check_strings(params: SamplingParams) -> None:
    assert isinstance(params.stop, list)  # vLLM made it one
    if len(params.stop) > MAX_STOP_STRINGS:
        refuse("stop", f"must hold at most {MAX_STOP_STRINGS} strings, got {len(params.stop)}")
    if sum(map(len, params.bad_words or ())) > MAX_BAD_WORDS_CHARACTERS:
        refuse("bad_words", f"must hold at most {MAX_BAD_WORDS_CHARACTERS} characters together")
    for name in ("stop", "bad_words", "extra_args"):
        check_texts(name, getattr(params, name))


def _check_bad_words(words: Sequence[Sequence[int]], config: BlockDiffusionConfig) -> None:
    from vllm import envs

    count, total = envs.VLLM_MAX_NUM_BAD_WORDS, envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS
    if len(words) > count or sum(map(len, words)) > total:
        refuse(
            "bad_words",
            f"must be at most {count} words of {total} tokens together, got {len(words)} of "
            f"{sum(map(len, words))} (with and without a space before it a word counts twice)",
        )
    for word in words:
        if len(word) > MAX_BAD_WORD_TOKENS:
            refuse("bad_words", f"must be words of at most {MAX_BAD_WORD_TOKENS} tokens each")
        _check_token_ids("bad_words", word, total, config.vocab_size)


def _check_something_left(params: SamplingParams, config: BlockDiffusionConfig) -> None:
    """Refuse constraints that leave no token; longer bad words depend on the text."""
    allowed = params.allowed_token_ids or range(config.vocab_size)
    banned = {config.mask_token_id}
    words = params.bad_words_token_ids or ()
    for name, tokens in (
        ("allowed_token_ids", ()),
        ("bad_words", [word[0] for word in words if len(word) == 1]),
        ("min_tokens", params.all_stop_token_ids if params.min_tokens else ()),
    ):
        banned.update(tokens)
        if all(token in banned for token in allowed):
            refuse(
                name,
                "leaves no token to generate: not the mask token, none outside allowed_token_ids, "
                "no bad word, and no stop token before min_tokens",
            )


def _check_options(params: SamplingParams, config: BlockDiffusionConfig) -> RequestOptions:
    from vllm.exceptions import VLLMValidationError

    if not isinstance(params.extra_args, dict | None):
        refuse("extra_args", f"must be an object, got {reprlib.repr(params.extra_args)}")
    try:
        options = parse_options(params.extra_args, config)
    except OptionError as error:
        raise VLLMValidationError(str(error), parameter=error.key) from None
    if options.algorithm == FREEDAVE and params.temperature > 0:
        refuse(
            "temperature",
            f"must be 0 with nbdiff_algorithm={FREEDAVE}, which is greedy, got "
            f"{params.temperature}",
        )
    return options


def _check_grammar(
    params: SamplingParams, options: RequestOptions, config: BlockDiffusionConfig
) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    wanted = params.structured_outputs
    if wanted is None:
        return
    if not isinstance(wanted, StructuredOutputsParams):
        refuse("structured_outputs", "must be StructuredOutputsParams")
    if options.algorithm == FREEDAVE or RULES[options.algorithm].edits:
        refuse("structured_outputs", f"does not apply to nbdiff_algorithm={options.algorithm}")
    backend = wanted._backend  # vLLM has chosen it, at the second look
    if backend not in (None, *GRAMMAR_BACKENDS):
        refuse("structured_outputs", f"needs backend {backend}; there are {GRAMMAR_BACKENDS}")
    check_texts("structured_outputs", vars(wanted))
    if len(repr(vars(wanted))) > MAX_GRAMMAR_CHARACTERS:
        refuse("structured_outputs", f"must be at most {MAX_GRAMMAR_CHARACTERS} characters")
