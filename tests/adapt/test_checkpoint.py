# SPDX-License-Identifier: Apache-2.0
"""Loading a causal checkpoint, giving it a mask token, writing one that names itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import vllm_nbdiff
from vllm_nbdiff.adapt.checkpoint import MASK_TOKEN, ensure_mask_token, load, mark
from vllm_nbdiff.config import BlockDiffusionConfig
from vllm_nbdiff.families.family import FAST_DLLM

VOCAB = 12
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", **special)


def make_model(vocab_size: int = VOCAB, tied: bool = True, **keys: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=tied, **SIZES, **keys)
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [VOCAB, VOCAB + 5])
def test_added_mask_token_starts_in_the_middle(tied: bool, rows: int) -> None:
    model, tokenizer = make_model(rows, tied), make_tokenizer()
    ids = torch.arange(VOCAB)[None]
    before = model(input_ids=ids).logits[0, :, :VOCAB]
    token = ensure_mask_token(model, tokenizer)
    assert token == VOCAB == tokenizer.mask_token_id == tokenizer.convert_tokens_to_ids(MASK_TOKEN)
    assert model.config.vocab_size == max(rows, VOCAB + 1)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        torch.testing.assert_close(layer.weight[token], layer.weight[:VOCAB].mean(dim=0))
    after = model(input_ids=ids).logits[0, :, :VOCAB]
    torch.testing.assert_close(after, before)


def test_known_mask_token_is_kept() -> None:
    model = make_model()
    assert ensure_mask_token(model, make_tokenizer(mask_token="w7")) == 7
    assert model.config.vocab_size == VOCAB
    model.config.mask_token_id = 9
    tokenizer = make_tokenizer()
    assert ensure_mask_token(model, tokenizer) == 9 == tokenizer.mask_token_id


def test_marked_checkpoint_names_itself(tmp_path: Path) -> None:
    make_model(mask_token_id=3).save_pretrained(tmp_path)
    mark(tmp_path, tmp_path, 16, 7, {"nbdiff_threshold": 0.8})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["NBDiffForCausalLM"]
    assert (config["block_length"], config["mask_token_id"]) == (16, 7)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["nbdiff_threshold"] == 0.8
    assert GenerationConfig.from_pretrained(tmp_path).nbdiff_threshold == 0.8


@pytest.mark.parametrize("biased", [False, True])
def test_block_causal_checkpoint_is_recognised_as_fast_dllm(tmp_path: Path, biased: bool) -> None:
    """By vLLM, told nothing; its class asks `qkv_bias` for biases, which Qwen2 has."""
    from vllm.engine.arg_utils import EngineArgs

    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCAB, **SIZES)) if biased else make_model()
    model.save_pretrained(tmp_path)
    mark(tmp_path, tmp_path, 16, 7, {"nbdiff_threshold": 0.8}, "block-causal")
    vllm_nbdiff.register()
    args = EngineArgs(model=str(tmp_path), skip_tokenizer_init=True, max_model_len=128)
    served = args.create_engine_config()
    config = BlockDiffusionConfig.from_vllm_config(served)
    assert config.family is FAST_DLLM
    assert (config.block_length, config.mask_token_id) == (16, 7)
    assert config.defaults.threshold == 0.8
    assert served.model_config.hf_config.qkv_bias is biased


def test_pangu_stays_pangu(tmp_path: Path) -> None:
    """Loaded as Llama with biases, every weight included, and written as what it was."""
    source, out = tmp_path / "source", tmp_path / "out"
    model = make_model(tied=False, attention_bias=True)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    model.save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    config.pop("attention_bias")
    config |= {"model_type": "PanguEmbedded", "bias": True, "auto_map": {"AutoConfig": "x.Y"}}
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"] * 7
    (source / "config.json").write_text(json.dumps(config))

    loaded, tokenizer = load(source, torch.float32)
    assert loaded.config.rope_parameters["rope_theta"] == config["rope_theta"]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    token = ensure_mask_token(loaded, tokenizer)
    loaded.save_pretrained(out)
    mark(out, source, 32, token)
    with pytest.raises(ValueError, match=r"--context block-causal .* --model .*PanguEmbedded"):
        load(source, torch.float32, context="block-causal")
    written = json.loads((out / "config.json").read_text())
    assert written["model_type"] == "PanguEmbedded" and written["bias"] is True
    assert written["rope_theta"] == config["rope_theta"] and written["vocab_size"] == VOCAB + 1
    assert "auto_map" not in written


def test_models_that_fast_dllm_is_not_are_refused(tmp_path: Path) -> None:
    for model in (
        Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCAB, head_dim=8, **SIZES)),
        make_model(attention_bias=True),
        make_model(mlp_bias=True),
    ):
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"--context block-causal .* --model"):
            load(tmp_path, torch.float32, context="block-causal")


def test_unservable_models_are_refused(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="gpt2"):
        load(tmp_path, torch.float32)
    config = Qwen2Config(vocab_size=VOCAB, use_sliding_window=True, max_window_layers=0, **SIZES)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sliding"):
        load(tmp_path, torch.float32)
