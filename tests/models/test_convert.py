"""Checkpoints in other layouts, not made by our writers: loaded exactly, converted bit for bit."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxcodec.models.config import ModelConfig
from jaxcodec.models.convert import convert_model
from jaxcodec.models.load import load_model, namespace, open_model, save_model
from jaxcodec.models.steps import forward
from jaxcodec.models.transformer import abstract_model, linear_shapes
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import dequantize
from jaxcodec.train.quantization_report import inspect_model

FIXTURES = Path(__file__).parents[1] / "fixtures"
AQLM = FIXTURES / "aqlm"
dequantized = jax.jit(dequantize, static_argnums=1)
V, G = 4, 16  # of the CodeGEMM checkpoint: K is 48, 64 or 80


def edit(directory: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def assert_same_files(one: Path, other: Path) -> None:
    """The same tensors to the bit, and configs that say the same."""
    a, b = (load_file(directory / "model.safetensors") for directory in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].shape == b[name].shape
        assert a[name].tobytes() == b[name].tobytes()
    a, b = config_of(one), config_of(other)
    lists = [c.get("quantization_config", {}).get("linear_weights_not_to_quantize") for c in (a, b)]
    assert sorted(lists[0] or []) == sorted(lists[1] or [])
    for config in (a, b):
        config.get("quantization_config", {}).pop("linear_weights_not_to_quantize", None)
    assert a == b


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """A CodeGEMM checkpoint by its description, and what its linears stand for.

    Codebooks and scales are bf16, all else float32. One block, to be quick.
    """
    directory = tmp_path_factory.mktemp("packed") / "model"
    shutil.copytree(FIXTURES / "qwen3", directory)
    rng, matrices = np.random.default_rng(0), {}

    def quantize(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.1.")]:
            del tensors[name]
        for name in sorted(name for name in tensors if "_proj.weight" in name):
            N, K = tensors.pop(name).shape
            linear = name.removesuffix(".weight")
            codes = rng.integers(0, 256, (2, K // V, N)).astype(np.uint8)
            books = rng.normal(size=(2, 256, V)).astype(ml_dtypes.bfloat16)
            scales = rng.uniform(0.1, 0.2, (K // G, N)).astype(ml_dtypes.bfloat16)
            by_four = codes.reshape(2, K // V // 4, 4, N).transpose(0, 1, 3, 2)
            tensors[f"{linear}.codes"] = np.ascontiguousarray(by_four).view("<i4")[..., 0]
            tensors[f"{linear}.codebooks"], tensors[f"{linear}.scales"] = books, scales
            vectors = sum(books[c].astype(np.float32)[codes[c]] for c in range(2))
            W = vectors.transpose(0, 2, 1).reshape(K, N)
            matrices[linear.removeprefix("model.")] = W * np.repeat(scales, G, 0).astype(np.float32)

    edit(directory, quantize)
    modules = [f"self_attn.{x}_proj" for x in "qkvo"]
    modules += [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    options = {
        "arch_config": {"layers_name": "layers", "model_name": "model", "module_names": modules},
        "group_size": G,
        "vec_len": V,
        "num_codebooks": 2,
        "nbits_per_codebook": 8,
    }
    edit_config(directory, codegemm=options, num_hidden_layers=1, layer_types=["full_attention"])
    (directory / "quantization.json").write_text('{"linears": []}')
    (directory / "tokenizer.json").write_text("{}")
    return directory, matrices


@pytest.fixture(scope="module")
def ours(packed, tmp_path_factory) -> Path:
    """The same in our layout."""
    directory = tmp_path_factory.mktemp("ours") / "model"
    convert_model(packed[0], directory, "jaxcodec")
    return directory


def test_a_packed_codegemm_checkpoint_is_what_its_description_says(packed) -> None:
    directory, matrices = packed
    checkpoint = open_model(directory)
    assert dict(checkpoint.specs) == dict.fromkeys(matrices, CodebookSpec(2, V, G))
    for path, W in matrices.items():
        np.testing.assert_array_equal(dequantized(checkpoint.linear(path), jnp.float32), W)


def test_codebooks_keep_their_dtype_in_a_model_of_another(packed, ours: Path) -> None:
    mixed = load_model(packed[0])
    assert mixed.dtype == jnp.float32
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(mixed.weights)} == {
        "float32",
        "bfloat16",
        "uint32",
    }
    tokens, counts = jnp.arange(8)[None], jnp.array([8])
    whole = load_model(packed[0], jnp.float32)
    np.testing.assert_allclose(
        forward(mixed, tokens, counts), forward(whole, tokens, counts), atol=1e-4
    )
    assert namespace(load_model(ours)) == namespace(mixed)


def test_codegemm_to_ours_and_back_is_the_same(packed, ours: Path, tmp_path: Path) -> None:
    assert "codegemm" not in config_of(ours)
    for name in ("quantization.json", "tokenizer.json"):
        assert (ours / name).read_bytes() == (packed[0] / name).read_bytes()
    convert_model(ours, tmp_path / "again", "codegemm")
    assert_same_files(packed[0], tmp_path / "again")


def test_an_aqlm_checkpoint_computes_what_aqlm_computes() -> None:
    expected = load_file(AQLM / "expected.safetensors")
    checkpoint = open_model(AQLM)
    assert {f"model.{path}" for path, _ in checkpoint.specs} == expected.keys() - {
        "tokens",
        "logits",
    }
    for path, _ in checkpoint.specs:
        W = dequantized(checkpoint.linear(path), jnp.float32)
        np.testing.assert_array_equal(W.T, expected[f"model.{path}"])
    tokens = jnp.asarray(expected["tokens"])[None]
    logits = forward(load_model(AQLM, jnp.float32), tokens, jnp.array([tokens.size]))
    np.testing.assert_allclose(logits[0], expected["logits"], atol=1e-4)


def test_aqlm_to_ours_and_back_is_the_same(tmp_path: Path) -> None:
    convert_model(AQLM, tmp_path / "ours", "jaxcodec")
    assert namespace(load_model(tmp_path / "ours")) == namespace(load_model(AQLM))
    convert_model(tmp_path / "ours", tmp_path / "again", "aqlm")
    assert_same_files(AQLM, tmp_path / "again")


@pytest.mark.parametrize(
    ("layout", "text"), [("codegemm", "m1v8g32"), ("aqlm", "m2v2b16"), ("aqlm", "m4v4b4")]
)
def test_a_model_saved_in_a_layout_loads_bit_for_bit(
    layout: str, text: str, config: ModelConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, num_layers=1, windows=(None,), intermediate_size=64)
    shapes = dict(linear_shapes(config)).items()
    texts = {path: f"{text}g{K}" if layout == "aqlm" else text for path, (K, _) in shapes}
    specs = tuple((path, CodebookSpec.parse(text)) for path, text in sorted(texts.items()))
    model, rng = abstract_model(config, jnp.bfloat16, specs), np.random.default_rng(0)
    model = jax.tree.map(lambda leaf: random_array(rng, leaf), model)
    save_model(tmp_path, model, layout=layout)
    assert namespace(load_model(tmp_path)) == namespace(model)


def random_array(rng: np.random.Generator, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    numbers = rng.integers(0, 2**32, leaf.shape, np.uint32)
    return jnp.asarray(numbers if leaf.dtype == np.uint32 else (numbers / 2**32).astype(leaf.dtype))


def test_progress_names_each_linear(ours: Path, tmp_path: Path) -> None:
    said = []

    @contextlib.contextmanager
    def progress(total: int, start: int) -> Iterator[Callable[[int, str, float], None]]:
        yield lambda step, text, left: said.append((step, total, text))

    convert_model(ours, tmp_path / "out", "codegemm", progress)
    names = [path for path, _ in open_model(ours).specs]
    assert said == [(i + 1, 7, f"{name}  m2v4g16") for i, name in enumerate(names)]


@pytest.mark.parametrize(
    ("layout", "message"),
    [("aqlm", "m2v4g16, a scale for 16 of its K"), ("gguf", "jaxcodec, codegemm, aqlm, got")],
)
def test_what_a_layout_cannot_hold_is_refused(
    layout: str, message: str, ours: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        convert_model(ours, tmp_path / "out", layout)
    assert os.listdir(tmp_path) == []


def test_a_model_with_a_dense_linear_is_no_codegemm(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj is dense, one of 1"):
        convert_model(AQLM, tmp_path / "out", "codegemm")
    assert os.listdir(tmp_path) == []


def test_a_dense_model_has_nothing_to_convert(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is dense: there is nothing to convert"):
        convert_model(FIXTURES / "llama31", tmp_path / "out", "aqlm")
    with pytest.raises(ValueError, match="The model is dense"):
        save_model(tmp_path / "out", load_model(FIXTURES / "llama31"), layout="aqlm")
    assert os.listdir(tmp_path) == []


def test_what_is_there_is_left_alone(ours: Path, packed, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; give a new directory"):
        convert_model(ours, tmp_path, "codegemm")
    with pytest.raises(ValueError, match="is a file; give a new directory"):
        convert_model(ours, tmp_path / "notes", "codegemm")
    assert os.listdir(tmp_path) == ["notes"]


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file can grow beyond 64 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_leaves_nothing(ours: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="could not be written"):
        convert_model(ours, tmp_path / "out", "codegemm")
    assert os.listdir(tmp_path) == []


DAMAGE: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], str]] = {
    "missing": (lambda t: t.pop(f"{Q}.scales"), r"missing .*q_proj\.scales"),
    "extra": (lambda t: t.update({f"{Q}.zeros": np.zeros(1)}), r"not expected .*q_proj\.zeros"),
    "shape": (lambda t: t.update({f"{Q}.codes": t[f"{Q}.codes"][:-1]}), r"codes must be \[.* got"),
    "dtype": (lambda t: t.update({f"{Q}.codes": t[f"{Q}.codes"].astype(np.int64)}), "got int64"),
    "books": (lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].astype("f8")}), "got float64"),
    "mixed": (lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].astype("f4")}), "must share one"),
    "nan": (lambda t: t[f"{Q}.codebooks"].reshape(-1).put(3, np.nan), "codebooks holds 1 .* NaN"),
}
Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("layout", ["codegemm", "aqlm"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(layout: str, damage: str, packed, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(packed[0] if layout == "codegemm" else AQLM, directory)
    change, message = DAMAGE[damage]
    edit(directory, change)
    with pytest.raises(ValueError, match=f"q_proj.*{message}|{message}"):
        convert_model(directory, tmp_path / "out", "jaxcodec")
    assert os.listdir(tmp_path) == ["model"]


def test_a_truncated_file_is_named(packed, tmp_path: Path) -> None:
    shutil.copytree(packed[0], tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        convert_model(tmp_path / "model", tmp_path / "out", "jaxcodec")


def test_a_config_of_two_layouts_or_of_an_unknown_one_is_refused(packed, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(packed[0], directory)
    edit_config(directory, quantization_config=config_of(AQLM)["quantization_config"])
    with pytest.raises(ValueError, match="holds both codegemm and quantization_config"):
        load_model(directory)
    edit_config(directory, codegemm=None, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ValueError, match="quant_method must be 'aqlm', got 'gptq'"):
        load_model(directory)


def test_inspect_shows_every_layout(packed, ours: Path) -> None:
    report = inspect_model(packed[0])
    assert report == inspect_model(ours)
    assert {linear.stored for linear in report.linears} == {"m2v4g16"}
    stored = {linear.name: linear.stored for linear in inspect_model(AQLM).linears}
    assert stored["layers.0.mlp.down_proj"] == "float16"
    assert stored["layers.0.mlp.up_proj"] == "m2v8g64"
