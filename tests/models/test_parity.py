"""Against transformers: the fixtures' logits and greedy continuations of every architecture."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxcodec.models.load import load_model, namespace, save_model
from jaxcodec.models.steps import forward, generate

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = ("llama31", "llama_tied_bf16", "qwen2", "qwen2_sliding", "qwen3", "mistral")


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_are_those_of_transformers(case: str) -> None:
    expected = load_file(FIXTURES / case / "expected.safetensors")
    tokens, lengths = expected["tokens"], expected["lengths"]
    model = load_model(FIXTURES / case, jnp.float32)
    logits = np.asarray(forward(model, jnp.asarray(tokens), jnp.asarray(lengths)))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            logits[row, :length], expected["logits"][row, :length], atol=1e-4, rtol=0
        )
    prompts = [tokens[row, :length].tolist() for row, length in enumerate(lengths)]
    assert generate(model, prompts, 64) == expected["greedy"].tolist()


@pytest.mark.parametrize("case", CASES)
def test_saved_again_it_is_the_same_model(case: str, tmp_path: Path) -> None:
    model = load_model(FIXTURES / case)
    save_model(tmp_path, model)
    again = load_model(tmp_path)
    assert again.config == model.config
    assert namespace(again) == namespace(model)
    assert (tmp_path / "config.json").read_text().count("rope_theta") == 1
