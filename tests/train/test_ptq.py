"""Quantizing a model: its linears and nothing else, reported, saved and loaded again."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcodec.checkpoints.safetensors import read_tensors, write_tensors
from jaxcodec.models.config import ModelConfig
from jaxcodec.models.load import load_model, save_model
from jaxcodec.models.steps import forward
from jaxcodec.models.transformer import Model, init_model, linear_shapes
from jaxcodec.quantize.additive import AdditiveOptions
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import CodebookTensor, dequantize
from jaxcodec.train import ptq
from jaxcodec.train.block_tuning import TuningOptions
from jaxcodec.train.ptq import PRESETS, QuantizeOptions, quantize_model
from jaxcodec.train.quantization_report import QuantizationReport, inspect_model

SPEC = CodebookSpec.parse("m2v4b4g32")
MATRIX = AdditiveOptions(iterations=3, refinements=1, rounds=1, steps=5)
OPTIONS = QuantizeOptions(MATRIX, TuningOptions(epochs=2), batch_size=4)
KMEANS = dataclasses.replace(PRESETS["kmeans"], matrix=AdditiveOptions(1, 0, rounds=0))


@pytest.fixture(scope="module")
def dense(shallow: ModelConfig) -> Model:
    config = dataclasses.replace(
        shallow, model_type="qwen2", attention_bias=True, num_kv_heads=4, intermediate_size=64
    )  # all linears have one shape, for few compilations
    return init_model(config, jax.random.key(2))


@pytest.fixture(scope="module")
def quantized(dense: Model) -> tuple[Model, QuantizationReport]:
    return quantize_model(dense, SPEC, options=PRESETS["kmeans"], quiet=True)


def state(model: Model) -> dict[str, jax.Array]:
    flat = nnx.to_flat_state(model.weights)
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def test_all_linears_of_the_blocks_and_nothing_else_changes(dense: Model, quantized) -> None:
    model, _ = quantized
    names = [name for name, _ in linear_shapes(dense.config)]
    assert [name for name, _ in model.specs] == sorted(names)
    before, after = state(dense), state(model)
    linear = {f"{name}.{field}" for name in names for field in ("codes", "codebooks", "scales")}
    assert after.keys() - linear == before.keys() - {f"{name}.kernel" for name in names}
    for name in after.keys() - linear:
        np.testing.assert_array_equal(after[name], before[name])


def test_the_model_computes_with_what_its_codes_stand_for(dense: Model, quantized) -> None:
    model, _ = quantized
    flat, before = state(model), dict(nnx.to_flat_state(dense.weights))
    for name, _ in linear_shapes(dense.config):
        w = CodebookTensor(*(flat[f"{name}.{f}"] for f in ("codes", "codebooks", "scales")))
        path = tuple(int(part) if part.isdigit() else part for part in name.split("."))
        before[*path, "kernel"] = nnx.Param(dequantize(w))
    by_hand = dataclasses.replace(dense, weights=nnx.from_flat_state(before))
    tokens, counts = jnp.arange(8)[None, :], jnp.array([8])
    np.testing.assert_allclose(
        forward(model, tokens, counts), forward(by_hand, tokens, counts), atol=1e-4
    )


def test_the_report_counts_every_bit(dense: Model, quantized) -> None:
    model, report = quantized
    shapes = dict(linear_shapes(dense.config))
    assert [linear.name for linear in report.linears] == list(shapes)
    sizes = {name: value.nbytes for name, value in state(model).items()}
    assert report.nbytes == sum(sizes.values()) == model.nbytes
    stored = sum(
        size for name, size in sizes.items() if name.endswith((".codes", ".codebooks", ".scales"))
    )
    weights = sum(K * N for K, N in shapes.values())
    assert report.bits_per_weight == pytest.approx(8 * stored / weights)
    for linear in report.linears:
        assert (linear.K, linear.N) == shapes[linear.name]
        assert 0.1 < linear.relative_error < 0.4
        assert linear.seconds > 0


def test_it_is_saved_loaded_and_inspected(quantized, tmp_path: Path) -> None:
    model, report = quantized
    save_model(tmp_path, model)
    report.write(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.specs == model.specs
    jax.tree.map(np.testing.assert_array_equal, state(loaded), state(model))
    assert inspect_model(tmp_path) == report
    hf = json.loads((tmp_path / "config.json").read_text())
    assert set(hf["jaxcodec"]["specs"].values()) == {str(SPEC)}


def test_the_table_names_every_linear_and_the_totals(quantized) -> None:
    _, report = quantized
    table = str(report)
    for linear in report.linears:
        assert linear.name in table
        assert f"{linear.relative_error:.4f}" in table
    assert f"{report.nbytes:,} bytes" in table
    assert f"{report.bits_per_weight:.3f} bits per weight" in table


def test_a_dense_model_is_inspected_too(dense: Model, tmp_path: Path) -> None:
    save_model(tmp_path, dense)
    report = inspect_model(tmp_path)
    assert {linear.stored for linear in report.linears} == {"float32"}
    assert report.bits_per_weight == 32
    assert report.nbytes == dense.nbytes


def test_progress_is_plain_lines_where_there_is_no_terminal(dense: Model, capsys) -> None:
    quantize_model(dense, SPEC, options=KMEANS)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("block 1/1  error 0.")
    assert line.endswith("0:00:00 left")


def test_a_layer_that_the_spec_cannot_hold_is_named(dense: Model) -> None:
    with pytest.raises(ValueError, match=r"layers\.0\..*: m1v4g128: K = 64 is not a multiple"):
        quantize_model(dense, CodebookSpec.parse("m1v4g128"), quiet=True)


def test_weights_that_are_not_finite_are_named(dense: Model, monkeypatch) -> None:
    flat = dict(nnx.to_flat_state(dense.weights))
    path = ("layers", 0, "mlp", "up_proj", "kernel")
    flat[path] = nnx.Param(flat[path].get_value().at[0, 0].set(jnp.nan))
    broken = dataclasses.replace(dense, weights=nnx.from_flat_state(flat))
    monkeypatch.setattr(ptq, "_quantize_block", None)  # before any work
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj holds 1 values that are NaN"):
        quantize_model(broken, SPEC, options=KMEANS, quiet=True)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, None])
def test_a_seed_that_is_none_is_refused(seed) -> None:
    with pytest.raises(ValueError, match="seed must be a whole number from 0 to 4294967295"):
        dataclasses.replace(KMEANS, seed=seed)


def test_a_format_may_be_named(dense: Model, quantized) -> None:
    named, _ = quantize_model(dense, str(SPEC), options=KMEANS, quiet=True)
    assert named.specs == quantized[0].specs


def test_a_quantized_model_is_not_quantized_again(quantized) -> None:
    with pytest.raises(ValueError, match="is already quantized, as m2v4b4g32"):
        quantize_model(quantized[0], SPEC, quiet=True)


def test_damage_is_named_by_inspect(quantized, tmp_path: Path) -> None:
    save_model(tmp_path, quantized[0])
    tensors = {name: np.array(tensor) for name, tensor in read_tensors(tmp_path).items()}
    name = "model.layers.0.mlp.up_proj.scales"
    write_tensors(tmp_path, tensors | {name: np.full_like(tensors[name], np.nan)})
    with pytest.raises(ValueError, match=r"up_proj: scales holds .* NaN"):
        inspect_model(tmp_path)
    del tensors[name]
    write_tensors(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"missing model\.layers\.0\.mlp\.up_proj\.scales"):
        inspect_model(tmp_path)
