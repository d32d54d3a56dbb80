"""Quantizing with data: better outputs, the same bits however it is run, and nothing lost."""

import dataclasses
import errno
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcodec.models.blocks import take_block
from jaxcodec.models.config import ModelConfig
from jaxcodec.models.steps import forward
from jaxcodec.models.transformer import Model, init_model, linear_shapes
from jaxcodec.quantize.additive import AdditiveOptions
from jaxcodec.spec import CodebookSpec
from jaxcodec.train import quantized_blocks
from jaxcodec.train.block_tuning import TuningOptions, tune_block
from jaxcodec.train.calibration import Placement, calibrate, embedded
from jaxcodec.train.ptq import QuantizeOptions, quantize_model, select_specs
from jaxcodec.train.quantization_report import QuantizationReport

SPEC = CodebookSpec.parse("m2v4b4g32")
MATRIX = AdditiveOptions(iterations=3, refinements=1, rounds=1, steps=5)
OPTIONS = QuantizeOptions(MATRIX, TuningOptions(epochs=2), batch_size=4)
# Few of the 128 tokens, so that inputs lie in part of the space.
TOKENS = np.random.default_rng(0).integers(0, 24, (12, 16), np.int32)


@pytest.fixture(scope="module")
def dense(config: ModelConfig) -> Model:
    """Weights large enough for a block to do something; one shape, for few compilations."""
    square = dataclasses.replace(config, num_kv_heads=4, intermediate_size=64)
    model = init_model(square, jax.random.key(3))
    larger = [
        (path, v.replace(4 * v.get_value()) if path[-1] == "kernel" else v)
        for path, v in nnx.to_flat_state(model.weights)
    ]
    return dataclasses.replace(model, weights=nnx.from_flat_state(larger))


@pytest.fixture(scope="module")
def whole(dense: Model) -> tuple[Model, QuantizationReport]:
    return quantize_model(dense, SPEC, TOKENS, OPTIONS, quiet=True)


def same(one: Model, other: Model) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def output_error(model: Model, dense: Model) -> float:
    counts = jnp.full((len(TOKENS),), TOKENS.shape[1])
    wanted = forward(dense, TOKENS, counts)
    return float(jnp.linalg.norm(forward(model, TOKENS, counts) - wanted) / jnp.linalg.norm(wanted))


def test_knowing_the_inputs_brings_the_outputs_nearer(dense: Model, whole) -> None:
    blind, _ = quantize_model(dense, SPEC, None, OPTIONS, quiet=True)
    assert output_error(whole[0], dense) < 0.8 * output_error(blind, dense)


def test_tuning_is_never_worse_and_changes_floats_alone(dense: Model, whole) -> None:
    model, report = whole
    options = dataclasses.replace(OPTIONS, tuning=TuningOptions(epochs=0))
    untuned, before = quantize_model(dense, SPEC, TOKENS, options, quiet=True)
    for one, other in zip(report.blocks, before.blocks, strict=True):
        assert one.tuning.after <= one.tuning.before
        assert other.tuning.after == other.tuning.before
    assert report.blocks[0].tuning.before == before.blocks[0].tuning.before
    assert report.blocks[0].tuning.after < report.blocks[0].tuning.before
    for (path, tuned), (_, start) in zip(
        nnx.to_flat_state(model.weights), nnx.to_flat_state(untuned.weights), strict=True
    ):
        first = path[:2] == ("layers", 0)  # the second block was quantized for other inputs
        equal = np.array_equal(tuned.get_value(), start.get_value())
        assert equal == (not first or path[-1] == "codes") or path[:2] == ("layers", 1)


def test_tuning_that_diverges_changes_nothing(dense: Model) -> None:
    block, states = take_block(dense, 0), embedded(dense, TOKENS)
    states.targets[:] = 2 * states.inputs
    options = TuningOptions(epochs=1, learning_rate=1e38)
    tuned, result = tune_block(block, states.inputs, states.targets, options, 4, 0, Placement())
    assert result.after == result.before
    jax.tree.map(np.testing.assert_array_equal, tuned, block)


def test_a_block_that_stays_dense_is_not_touched(dense: Model) -> None:
    specs = select_specs(dense.config, SPEC, [(r"layers\.0\.", None)])
    # Enough text for what is tuned to hold on other text, too.
    tokens = np.random.default_rng(0).integers(0, 24, (48, 16), np.int32)
    model, report = quantize_model(dense, specs, tokens, OPTIONS, quiet=True)
    same(take_block(model, 0).weights, take_block(dense, 0).weights)
    assert report.blocks[0].tuning is None
    assert report.blocks[1].tuning.after < report.blocks[1].tuning.before


def test_hessians_are_those_of_the_inputs(dense: Model) -> None:
    states = embedded(dense, TOKENS)
    H = calibrate(take_block(dense, 0), states, 4, Placement())["self_attn.q_proj"]
    x = np.asarray(dense.embedding, np.float64)[TOKENS].reshape(-1, 64)
    weight = dict(nnx.to_flat_state(dense.weights))["layers", 0, "input_layernorm", "weight"]
    normed = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + dense.config.norm_eps)
    normed = normed * np.asarray(weight.get_value())
    np.testing.assert_allclose(H, normed.T @ normed / len(x), rtol=1e-4, atol=1e-3)


def test_a_stopped_run_goes_on_and_ends_with_the_same_bits(
    dense: Model, whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def write(path: Path, *arguments) -> None:
        made.append(path.name)
        if len(made) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, *arguments)

    original = quantized_blocks.write_tensor_file
    monkeypatch.setattr(quantized_blocks, "write_tensor_file", write)
    with pytest.raises(OSError, match="No space left"):
        quantize_model(dense, SPEC, TOKENS, OPTIONS, tmp_path, quiet=True)
    assert [p.name for p in (tmp_path / "blocks").iterdir()] == ["00000.safetensors"]
    model, report = quantize_model(dense, SPEC, TOKENS, OPTIONS, tmp_path, quiet=True)
    assert made == ["00000.safetensors", "00001.safetensors", "00001.safetensors"]
    same(model, whole[0])
    errors = lambda report: [(linear.name, linear.activation_error) for linear in report.linears]
    assert errors(report) == errors(whole[1])
    again, _ = quantize_model(dense, SPEC, TOKENS, OPTIONS, tmp_path, quiet=True)
    assert len(made) == 3
    same(again, whole[0])


def test_the_directory_of_another_run_is_refused(dense: Model, tmp_path: Path) -> None:
    options = QuantizeOptions(AdditiveOptions(1, 0, rounds=0), TuningOptions(epochs=0))
    quantize_model(dense, SPEC, None, options, tmp_path, quiet=True)
    for change, difference in (
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"matrix": AdditiveOptions(2, 0, rounds=0)}, "matrix.iterations was 1 and is 2"),
    ):
        other = dataclasses.replace(options, **change)
        with pytest.raises(ValueError, match=f"holds another run: {difference}"):
            quantize_model(dense, SPEC, None, other, tmp_path, quiet=True)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="devices was '1 x cpu' and is '2 x cpu'"):
        quantize_model(dense, SPEC, None, options, tmp_path, mesh=mesh, quiet=True)
    *_, (name, _) = linear_shapes(dense.config)
    other = select_specs(dense.config, SPEC, [(re.escape(name), None)])
    with pytest.raises(ValueError, match=rf"run: specs\.{name} was '{SPEC}' and is None\. Choose"):
        quantize_model(dense, other, None, options, tmp_path, quiet=True)
    with pytest.raises(ValueError, match="calibration was None"):
        quantize_model(dense, SPEC, TOKENS, options, tmp_path, quiet=True)
    doubled = dataclasses.replace(dense, weights=jax.tree.map(lambda x: 2 * x, dense.weights))
    with pytest.raises(ValueError, match="weights was"):
        quantize_model(doubled, SPEC, None, options, tmp_path, quiet=True)


def test_a_damaged_block_is_refused(dense: Model, tmp_path: Path) -> None:
    options = QuantizeOptions(AdditiveOptions(1, 0, rounds=0), TuningOptions(epochs=0))
    quantize_model(dense, SPEC, None, options, tmp_path, quiet=True)
    path = tmp_path / "blocks" / "00001.safetensors"
    whole = path.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for damaged, sentence in ((whole[:-10], "is truncated"), (flipped, "is damaged")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"00001\.safetensors {sentence}"):
            quantize_model(dense, SPEC, None, options, tmp_path, quiet=True)
    path.write_bytes(whole.replace(b"seconds", b"minutes"))  # of a report of another version
    with pytest.raises(ValueError, match=r"00001\.safetensors holds no report of this version"):
        quantize_model(dense, SPEC, None, options, tmp_path, quiet=True)


def test_hidden_states_on_disk_change_nothing(dense: Model, whole, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, activations="disk")
    model, _ = quantize_model(dense, SPEC, TOKENS, options, tmp_path, quiet=True)
    same(model, whole[0])


def test_four_devices_make_the_same_codes(dense: Model, whole) -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    model, _ = quantize_model(dense, SPEC, TOKENS, OPTIONS, mesh=mesh, quiet=True)
    for (path, one), (_, other) in zip(
        nnx.to_flat_state(model.weights), nnx.to_flat_state(whole[0].weights), strict=True
    ):
        if path[-1] == "codes":
            np.testing.assert_array_equal(one.get_value(), other.get_value())
        else:
            np.testing.assert_allclose(one.get_value(), other.get_value(), rtol=1e-2, atol=1e-3)


def test_inputs_that_are_not_finite_are_named(dense: Model) -> None:
    weights = dict(nnx.to_flat_state(dense.weights))
    table = dense.embedding.at[TOKENS[0, 0]].set(jnp.nan)
    weights["embed_tokens", "weight"] = nnx.Param(table)
    broken = dataclasses.replace(dense, weights=nnx.from_flat_state(weights))
    with pytest.raises(ValueError, match=r"layers\.0\.\S+: H holds .* NaN or infinite"):
        quantize_model(broken, SPEC, TOKENS, OPTIONS, quiet=True)


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (TOKENS[0], r"must be integers \[n, T\], got int32 \[16\]"),
        (TOKENS.astype(np.float32), "must be integers"),
        (TOKENS[:0], "holds no tokens"),
        (TOKENS + 128, "from 128 to 151, the model knows 0 to 127"),
        (np.zeros((4, 200), np.int32), "200 tokens exceed the model's context of 128"),
        (TOKENS[:4], "leave none to tune on"),
    ],
)
def test_what_is_no_calibration_is_refused(
    dense: Model, tokens, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        quantize_model(dense, SPEC, tokens, OPTIONS, tmp_path, quiet=True)
    assert not any(tmp_path.iterdir())  # before the work begins


def test_batches_that_devices_cannot_share_are_refused(dense: Model) -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    options = dataclasses.replace(OPTIONS, batch_size=3)
    with pytest.raises(ValueError, match="do not divide over 4 devices"):
        quantize_model(dense, SPEC, TOKENS, options, mesh=mesh, quiet=True)


def test_formats_are_mixed_by_name(dense: Model) -> None:
    wide = CodebookSpec.parse("m1v4b4g32")
    specs = select_specs(
        dense.config, SPEC, [(r"layers\.0\.self_attn", None), ("down_proj|o_proj", wide)]
    )
    formats = dict(specs)
    assert not any(name.startswith("layers.0.self_attn") for name in formats)
    assert formats["layers.0.mlp.down_proj"] == formats["layers.1.self_attn.o_proj"] == wide
    assert formats["layers.1.mlp.up_proj"] == SPEC
    options = QuantizeOptions(AdditiveOptions(1, 0, rounds=0), TuningOptions(epochs=1))
    model, report = quantize_model(dense, specs, TOKENS, options, quiet=True)
    assert dict(model.specs) == formats
    assert {linear.name: linear.stored for linear in report.linears} == {
        name: str(spec) for name, spec in specs
    }
    names = {name for name, _ in linear_shapes(dense.config)}
    kept = {
        ".".join(map(str, p[:-1])) for p, _ in nnx.to_flat_state(model.weights) if p[-1] == "kernel"
    }
    assert kept == names - formats.keys()


def test_an_exception_that_never_counts_is_refused(dense: Model) -> None:
    wide = CodebookSpec.parse("m1v4b4g32")
    overrides = [("o_proj", wide), (r"layers\.0\.", None)]
    narrow = select_specs(dense.config, SPEC, overrides)  # what is left of block 0 stays dense
    assert [name for name, _ in narrow if name.startswith("layers.0.")] == [
        "layers.0.self_attn.o_proj"
    ]
    with pytest.raises(ValueError, match=r"'layers.*o_proj' never counts"):
        select_specs(dense.config, SPEC, [*overrides, (r"layers\.1\..*o_proj", None)])
    same_again = [*overrides, (r"layers\.1\..*o_proj", wide)]  # says what holds already
    assert select_specs(dense.config, SPEC, same_again) == narrow


def test_without_tuning_any_number_of_sequences_will_do(dense: Model) -> None:
    options = QuantizeOptions(AdditiveOptions(1, 0, rounds=0), TuningOptions(epochs=0))
    _, report = quantize_model(dense, SPEC, TOKENS[:1], options, quiet=True)
    assert all(block.tuning.before > 0 for block in report.blocks if block.tuning is not None)
    tuned = dataclasses.replace(options, tuning=TuningOptions(epochs=1))
    with pytest.raises(ValueError, match="leave none to tune on"):
        quantize_model(dense, SPEC, TOKENS[:1], tuned, quiet=True)


@pytest.mark.parametrize(
    ("expression", "sentence"), [("o_proj(", "is no regular"), ("gate$", "is found in no linear")]
)
def test_expressions_that_name_nothing_are_refused(dense: Model, expression, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        select_specs(dense.config, SPEC, [(expression, SPEC)])


def test_the_report_survives_its_file(whole, tmp_path: Path) -> None:
    whole[1].write(tmp_path)
    content = json.loads((tmp_path / "quantization.json").read_text())
    assert len(content["blocks"]) == 2
    stages = {"calibration", "kmeans", "adam", "beam_search", "rounded", "tuning", "next inputs"}
    assert content["blocks"][0]["seconds"].keys() == stages | {"rest"}
