"""A run: it can be stopped and gone on with to the same bits; its log; what it refuses."""

import contextlib
import dataclasses
import io
import json

import chex
import jax
import jax.numpy as jnp
import pytest

import jaxcodec.train.loop as loop
from jaxcodec.train.data import read_examples
from jaxcodec.train.evaluate import mean_loss
from jaxcodec.train.loop import TrainOptions, held_out_losses, train
from jaxcodec.train.step import full_training

OPTIONS = TrainOptions(
    steps=8, batch_size=4, learning_rate=1e-2, warmup_steps=2, log_every=3, checkpoint_every=2
)


class Killed(Exception):
    """Stands for the process being killed."""


@pytest.fixture(scope="module")
def examples(pairs_file, tokenizer):
    return read_examples(pairs_file, tokenizer, 8)


@pytest.fixture(scope="module")
def objective(shallow_model):
    return full_training(shallow_model)


def read_log(directory):
    lines = (directory / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def kill_after(monkeypatch, steps):
    """The process dies in the step after `steps` batches were drawn."""
    original = loop.shuffled_batches

    class Batches:
        def __init__(self, *args):
            self.inner, self.drawn = original(*args), 0
            self.get_state, self.set_state = self.inner.get_state, self.inner.set_state

        def __next__(self):
            self.drawn += 1
            if self.drawn > steps:
                raise Killed
            return next(self.inner)

    monkeypatch.setattr(loop, "shuffled_batches", Batches)


@pytest.fixture(scope="module")
def finished(objective, examples, tmp_path_factory):
    """(directory, artifact, what was printed) of a run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("run")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        artifact = train(objective, examples, OPTIONS, directory, examples)
    return directory, artifact, printed.getvalue()


def test_a_resumed_run_ends_with_the_bits_and_the_log_of_an_uninterrupted_one(
    objective, examples, finished, tmp_path, monkeypatch
):
    directory, artifact, _ = finished
    with monkeypatch.context() as patch:
        kill_after(patch, 5)  # one step past the checkpoint of step 4
        with pytest.raises(Killed):
            train(objective, examples, OPTIONS, tmp_path, examples)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')  # the line that it died in
    chex.assert_trees_all_equal(train(objective, examples, OPTIONS, tmp_path, examples), artifact)
    assert read_log(tmp_path) == read_log(directory)


def test_the_log_has_every_interval_and_checkpoint(finished):
    records = read_log(finished[0])
    assert [record["step"] for record in records] == [2, 3, 4, 6, 8]
    assert records[-1]["eval_loss"] < records[0]["loss"]
    assert records[-1]["tokens"] == OPTIONS.steps * OPTIONS.batch_size * 6
    assert records[0]["learning_rate"] == pytest.approx(OPTIONS.learning_rate * 0.75)


def test_lines_are_printed_where_there_is_no_terminal(finished):
    lines = finished[2].splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"step {i}/8" for i in (2, 3, 4, 6, 8)]
    assert all("tokens/s" in line for line in lines)
    assert "eval" in lines[-1]


def test_a_finished_run_returns_at_once(objective, examples, finished, capsys):
    directory, artifact, _ = finished
    pace = dataclasses.replace(OPTIONS, log_every=1)  # how often it speaks is not what a run is
    chex.assert_trees_all_equal(train(objective, examples, pace, directory), artifact)
    assert capsys.readouterr().out == ""


def test_a_directory_of_another_run_is_refused(objective, examples, finished):
    directory, _, _ = finished
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        train(objective, examples, dataclasses.replace(OPTIONS, seed=1), directory)
    fewer = dataclasses.replace(examples, counts=examples.counts - 1)
    with pytest.raises(ValueError, match="data was"):
        train(objective, fewer, OPTIONS, directory)
    other = jax.tree.map(lambda x: x + 1, objective.trainable)
    with pytest.raises(ValueError, match="trained_weights_at_start was"):
        train(dataclasses.replace(objective, trainable=other), examples, OPTIONS, directory)


def test_a_loss_that_is_not_finite_stops_the_run(objective, examples, tmp_path):
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), objective.trainable)
    with pytest.raises(FloatingPointError, match="The loss is nan at step 2"):
        train(dataclasses.replace(objective, trainable=broken), examples, OPTIONS, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_the_best_weights_are_kept_those_at_the_start_among_them(objective, examples, tmp_path):
    options = dataclasses.replace(OPTIONS, evaluate_every=2, keep_best=True)
    with pytest.raises(ValueError, match=r"keep_best needs held-out examples.*--eval-data"):
        train(objective, examples, options, tmp_path)
    good = train(objective, examples, options, tmp_path / "a", examples)
    losses = held_out_losses(tmp_path / "a")
    assert losses["best"] == pytest.approx(float(mean_loss(good, examples).mean), rel=1e-6)
    assert losses["best"] < losses["start"]

    spoiled = (full_training(good), examples, dataclasses.replace(options, learning_rate=1e4))
    for _ in range(2):  # the second finds the run finished
        kept = train(*spoiled, tmp_path / "b", examples)
        chex.assert_trees_all_equal(kept, good)
    losses = held_out_losses(tmp_path / "b")
    assert losses["best_step"] == 0
    assert losses["best"] == losses["start"] < losses["last"]
    seldom = dataclasses.replace(spoiled[-1], evaluate_every=3)
    with pytest.raises(ValueError, match="keep_best_every was 2 and is 3"):
        train(*spoiled[:-1], seldom, tmp_path / "b", examples)


def test_examples_beyond_the_model_are_refused(objective, examples, tmp_path):
    long = dataclasses.replace(examples, max_length=129)
    with pytest.raises(ValueError, match="max_length = 129 exceed the model's context of 128"):
        train(objective, long, OPTIONS, tmp_path)
    foreign = dataclasses.replace(examples, tokens=examples.tokens + 100)
    with pytest.raises(ValueError, match="the model knows 128"):
        train(objective, foreign, OPTIONS, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"batch_size": 4, "accumulate": 3}, "does not divide"),
    ],
)
def test_options_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**changes)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "clip_norm"])
def test_rates_that_are_none_are_refused(name):
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{name} must be at least 0 and finite"):
            TrainOptions(**{name: value})
