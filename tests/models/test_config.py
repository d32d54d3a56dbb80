"""config.json in both spellings, and what is refused."""

import dataclasses
from typing import Any

import pytest

from jaxcodec.models.config import Llama3Rope, ModelConfig, rope_frequencies

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "eos_token_id": [128001, 128008, 128009],
}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_both_spellings_mean_the_same() -> None:
    old = LLAMA | {"rope_theta": 500000.0, "rope_scaling": SCALING}
    new = LLAMA | {"rope_parameters": SCALING | {"rope_theta": 500000.0}}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)
    assert ModelConfig.from_hf(new).rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 8192)
    assert ModelConfig.from_hf(new).eos_ids == (128001, 128008, 128009)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_written_and_read_again_it_is_equal(model_type: str) -> None:
    config = ModelConfig.from_hf(LLAMA | {"model_type": model_type, "rope_scaling": SCALING})
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_sliding_windows_follow_each_architecture() -> None:
    mistral = LLAMA | {"model_type": "mistral"}
    assert set(ModelConfig.from_hf(mistral | {"sliding_window": None}).windows) == {None}
    assert set(ModelConfig.from_hf(mistral).windows) == {4096}
    qwen = LLAMA | {"model_type": "qwen2", "sliding_window": 512, "max_window_layers": 30}
    assert set(ModelConfig.from_hf(qwen).windows) == {None}
    sliding = ModelConfig.from_hf(qwen | {"use_sliding_window": True})
    assert sliding.windows == (None,) * 30 + (512,) * 2
    assert ModelConfig.from_hf(sliding.to_hf()) == sliding


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones() -> None:
    plain = ModelConfig.from_hf(LLAMA)
    scaled = dataclasses.replace(plain, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 8192))
    ratio = [b / a for a, b in zip(rope_frequencies(plain), rope_frequencies(scaled), strict=True)]
    assert ratio[0] == 1.0
    assert ratio[-1] == pytest.approx(1 / 8)
    assert ratio == sorted(ratio, reverse=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "Unknown architecture.*'gpt2'.*llama"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"hidden_size": "4096"}, "hidden_size must be a whole number above 0, got '4096'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, "),
        ({"eos_token_id": "</s>"}, "must be token ids, got '</s>'"),
        ({"num_key_value_heads": 5}, "32.*5"),
    ],
)
def test_what_would_change_the_result_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(LLAMA | change)
