"""A base made, quantized and measured, all of it tiny."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import base_text, larger_base, quality
from jaxcodec.checkpoints.files import read_json
from jaxcodec.models.load import load_model, save_model
from jaxcodec.models.tokenizer import PretrainedTokenizer
from jaxcodec.models.transformer import abstract_model, init_model, linear_shapes
from jaxcodec.spec import CodebookSpec
from jaxcodec.train.perplexity import agreement, perplexity

SPEC = "m1v4b4g32"


def test_the_larger_base_has_27_million_parameters():
    model = abstract_model(larger_base.model_config())
    assert sum(x.size for x in jax.tree.leaves(model.weights)) == pytest.approx(27.3e6, rel=1e-2)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A few kilobytes of code."""
    folder = tmp_path_factory.mktemp("text")
    for name, count in ((base_text.TRAIN, 60), (base_text.HELDOUT, 20)):
        base_text._write(
            folder / name, [f"def f{name[0]}{i}(x):\n    pass\n" for i in range(count)]
        )
    shutil.copyfile(folder / base_text.TRAIN, folder / base_text.CALIBRATION)
    (folder / base_text.FACTS).write_text("{}")
    return folder


def test_a_larger_base_is_written_with_its_text(text, tmp_path, monkeypatch):
    shutil.copytree(text, tmp_path / "text")

    def train(objective, examples, how, directory, watched):
        # Every token but the first is predicted once.
        np.testing.assert_array_equal(examples.starts[1:], examples.starts[:-1] + 15)
        assert set(examples.prompt_lengths) == {1}
        directory.mkdir()
        (directory / "log.jsonl").write_text('{"step": 2, "loss": 1.5, "seconds": 0.1}\n')
        return objective.artifact(objective.trainable)

    monkeypatch.setattr(larger_base, "train", train)
    options = larger_base.Options(
        work=tmp_path, steps=2, batch_size=2, layers=1, shrink=8, window=16
    )
    facts = larger_base.make(options)
    assert facts["losses"] == [{"step": 2, "loss": 1.5}]
    assert read_json(tmp_path / larger_base.FACTS) == facts
    for name in (base_text.CALIBRATION, base_text.HELDOUT):
        assert (tmp_path / name).read_bytes() == (text / name).read_bytes()
    tokens = base_text.read_tokens(tmp_path / base_text.HELDOUT, PretrainedTokenizer(tmp_path))
    found = perplexity(load_model(tmp_path), tokens, 16)
    assert facts["heldout"]["loss"] == pytest.approx(found.loss, rel=1e-3)


@pytest.fixture(scope="module")
def options(text, tmp_path_factory) -> quality.Options:
    """A base all of whose linears are [64, 64]: one shape to compile for."""
    folder = tmp_path_factory.mktemp("quality")
    config = larger_base.model_config(layers=1, shrink=8)
    config = dataclasses.replace(config, intermediate_size=64, num_heads=1, num_kv_heads=1)
    save_model(folder / "base", init_model(config, jax.random.key(0)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(larger_base.TOKENIZER / name, folder / "base" / name)
    return quality.Options(
        out=folder / "quality.json",
        base=folder / "base",
        name="tiny",
        text=text,
        specs=(SPEC,),
        sequences=8,
        window=16,
        batch_size=2,
        epochs=1,
        steps=2,
        selection=4,
        preset="kmeans",
    )


@pytest.fixture(scope="module")
def runs() -> list[tuple]:
    """What the runs of training were given; each gives back the model that it got."""
    return []


@pytest.fixture(scope="module")
def rows(options, runs) -> dict[str, quality.Row]:
    def train(objective, examples, how, directory, selection):
        runs.append((objective, examples, how, selection))
        return objective.artifact(objective.trainable)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "train", train)
        return {row["stage"]: row for row in quality.measure(options)}


def test_there_is_a_row_for_every_stage(rows):
    assert tuple(rows) == quality.STAGES
    assert all(row["seconds"] > 0 for stage, row in rows.items() if stage != "dense")
    assert all(rows[stage]["kl"] > 0 for stage in quality.STAGES[1:])
    assert len({row["heldout_tokens"] for row in rows.values()}) == 1


def test_kl_and_pv_start_alike_and_only_one_changes_codes(rows, runs, options):
    (kl, *of_kl), (pv, *of_pv) = runs
    assert rows["kl"]["kl"] == rows["pv"]["kl"] == rows["block"]["kl"]
    assert (kl.options.max_code_change, pv.options.max_code_change > 0) == (0, True)
    text = quality.read(options)
    for examples, how, selection in (of_kl, of_pv):
        assert how.keep_best
        assert how.steps == options.steps
        np.testing.assert_array_equal(examples.tokens, text.tuning.reshape(-1))
        np.testing.assert_array_equal(selection.tokens, text.selection.reshape(-1))


def test_the_dense_row_is_the_base_itself(rows, options):
    dense, text = load_model(options.base), quality.read(options)
    expected = perplexity(dense, text.heldout.reshape(-1), options.window)
    assert rows["dense"]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert rows["dense"]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows["dense"]["top1"] == 1


def test_the_measured_model_is_the_quantized_one(options, rows):
    spec, dense = CodebookSpec.parse(SPEC), load_model(options.base)
    options = dataclasses.replace(options, stages=("kmeans",))
    text = quality.read(options)
    ((_, model, _),) = quality.stages(dense, spec, text, options)
    tokens = text.heldout.reshape(-1)
    found = agreement(model, dense, tokens, options.window)
    assert rows["kmeans"]["kl"] == pytest.approx(found.kl, rel=1e-3)
    stored = sum(
        8 * x.get_value().nbytes
        for path, x in _variables(model)
        if path[-1] in ("codes", "codebooks", "scales")
    )
    weights = sum(K * N for _, (K, N) in linear_shapes(dense.config))
    values = 2 * sum(  # float32 here, 16 bits in the row
        8 * x.get_value().nbytes // 4
        for path, x in _variables(model)
        if path[-1] in ("codebooks", "scales")
    )
    assert rows["kmeans"]["bits_per_weight"] == pytest.approx((stored - values) / weights)
    assert rows["kmeans"]["nominal_bits_per_weight"] == 4 / 4 + 16 / 32


def _variables(model):
    return nnx.to_flat_state(model.weights)


def test_no_window_serves_two_ends(options):
    text, tokenizer = quality.read(options), PretrainedTokenizer(options.base)
    calibration = base_text.read_tokens(options.text / base_text.CALIBRATION, tokenizer)
    both = np.concatenate([text.tuning, text.selection]).reshape(-1)
    np.testing.assert_array_equal(both, calibration[: both.size])
    assert len(text.selection) == options.selection
    heldout = base_text.read_tokens(options.text / base_text.HELDOUT, tokenizer)
    np.testing.assert_array_equal(text.heldout.reshape(-1), heldout[: text.heldout.size])


def test_options_that_cannot_be_met_are_refused(options):
    with pytest.raises(ValueError, match="start from block"):
        dataclasses.replace(options, stages=("kmeans", "pv"))
    with pytest.raises(ValueError, match="The stages are"):
        dataclasses.replace(options, stages=("magic",))
    with pytest.raises(ValueError, match="give more text"):
        quality.read(dataclasses.replace(options, sequences=10_000))
