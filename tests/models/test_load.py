"""Loading is strict: what is missing, extra, misshapen or not finite is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcodec.checkpoints.safetensors import read_tensors, write_tensors
from jaxcodec.models.load import copy_companions, load_model, namespace, save_model
from jaxcodec.models.lora import AdapterBank, set_adapter, with_bank
from jaxcodec.models.steps import forward
from jaxcodec.models.transformer import Model, init_model
from jaxcodec.spec import CodebookSpec

FIXTURES = Path(__file__).parents[1] / "fixtures"
SPECS = (
    ("layers.0.mlp.gate_proj", CodebookSpec.parse("m2v4b4g32")),
    ("layers.1.self_attn.o_proj", CodebookSpec.parse("m1v4b8g32")),
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of a fixture, to be damaged."""
    shutil.copytree(FIXTURES / "llama31", tmp_path / "model")
    return tmp_path / "model"


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = {name: np.array(tensor) for name, tensor in read_tensors(directory).items()}
    edit(tensors)
    write_tensors(directory, tensors)


def test_unknown_architecture_is_named(checkpoint: Path) -> None:
    edit_config(checkpoint, model_type="mamba")
    with pytest.raises(ValueError, match="'mamba'.*llama, qwen2, qwen3, mistral"):
        load_model(checkpoint)


def test_missing_extra_and_misshapen_tensors_are_named(checkpoint: Path) -> None:
    def rename(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.mlp.up.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")

    edit_tensors(checkpoint, rename)
    with pytest.raises(ValueError, match=r"missing .*mlp\.up_proj.*not expected .*mlp\.up\.weight"):
        load_model(checkpoint)


def test_a_misshapen_tensor_is_named_with_both_shapes(checkpoint: Path) -> None:
    def cut(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]

    edit_tensors(checkpoint, cut)
    with pytest.raises(ValueError, match=r"model\.norm\.weight must be \[\d+\], got \[\d+\]"):
        load_model(checkpoint)


def test_a_truncated_file_is_named(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        load_model(checkpoint)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "qwen2", tmp_path / "model")
    (tmp_path / "model" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003.safetensors"):
        load_model(tmp_path / "model")


def test_a_head_that_contradicts_tied_embeddings_is_refused(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "llama_tied_bf16", tmp_path / "model")

    def add_head(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit_tensors(tmp_path / "model", add_head)
    load_model(tmp_path / "model")  # a tied head that is stored twice is no contradiction

    def change_head(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"][0] += 1

    edit_tensors(tmp_path / "model", change_head)
    with pytest.raises(ValueError, match=r"ties the embeddings, but lm_head\.weight differs"):
        load_model(tmp_path / "model")


def test_codebook_linears_come_back_bit_for_bit(config, key: jax.Array, tmp_path: Path) -> None:
    model = init_model(config, key, jnp.bfloat16, SPECS)
    save_model(tmp_path, model, {"made_by": "a test"})
    again = load_model(tmp_path)
    assert again.specs == SPECS
    assert namespace(again) == namespace(model)
    assert json.loads((tmp_path / "config.json").read_text())["made_by"] == "a test"


@pytest.mark.parametrize("field", ["scales", "codebooks"])
def test_nan_in_a_scale_or_codebook_is_refused(
    field: str, config, key: jax.Array, tmp_path: Path
) -> None:
    save_model(tmp_path, init_model(config, key, specs=SPECS))

    def poison(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"model.layers.0.mlp.gate_proj.{field}"].flat[3] = np.nan

    edit_tensors(tmp_path, poison)
    with pytest.raises(ValueError, match=rf"mlp\.gate_proj: {field} holds 1 values .* NaN"):
        load_model(tmp_path)


def test_a_spec_that_the_tensors_do_not_have_is_refused(
    config, key: jax.Array, tmp_path: Path
) -> None:
    save_model(tmp_path, init_model(config, key, specs=SPECS))
    specs = {path: str(spec) for path, spec in SPECS} | {"layers.0.mlp.gate_proj": "m1v4b4g32"}
    edit_config(tmp_path, jaxcodec={"format": 1, "specs": specs})
    with pytest.raises(ValueError, match=r"gate_proj\.codes must be .* got"):
        load_model(tmp_path)
    edit_config(tmp_path, jaxcodec={"format": 1, "specs": {"lm_head": "m1v4g32"}})
    with pytest.raises(ValueError, match="specs for lm_head, which are no linears"):
        load_model(tmp_path)
    edit_config(tmp_path, jaxcodec={"format": 1, "specs": {"layers.0.mlp.gate_proj": 3}})
    with pytest.raises(ValueError, match="specs must be texts"):
        load_model(tmp_path)
    edit_config(tmp_path, jaxcodec={"format": 9, "specs": specs})
    with pytest.raises(ValueError, match="format 9, this version reads 1"):
        load_model(tmp_path)


def test_namespace_is_of_the_weights_that_write_the_cache(
    base: Model, banked: Model, random_adapter
) -> None:
    with_adapter = set_adapter(banked, random_adapter(base, 0), 1)
    assert namespace(with_adapter) == namespace(base)
    assert namespace(jax.tree.map(lambda x: 1.5 * x, base)) != namespace(base)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    assert namespace(half) != namespace(base)


def test_adapters_are_not_saved_with_their_base(
    base: Model, random_adapter, random_tokens, tmp_path: Path
) -> None:
    model = set_adapter(with_bank(base, AdapterBank(1, 4, ("q_proj",))), None, 0)
    save_model(tmp_path, model)
    tokens, counts = random_tokens((1, 4)), jnp.array([4])
    np.testing.assert_array_equal(
        forward(load_model(tmp_path), tokens, counts), forward(base, tokens, counts)
    )


def test_the_tokenizer_travels_with_a_model(tmp_path: Path) -> None:
    copy_companions(FIXTURES / "tokenizer", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
