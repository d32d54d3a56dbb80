"""Perplexity and agreement are what their definitions say, in float64 over the plain forward."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcodec.models.layers import AdapterBank
from jaxcodec.models.lora import ICARUS_TARGETS, init_adapter, set_adapter, with_bank
from jaxcodec.models.scheme import CONVENTIONAL, ICARUS, PREFILL_SHARE
from jaxcodec.models.steps import forward
from jaxcodec.models.transformer import Model
from jaxcodec.train import perplexity as module
from jaxcodec.train.loss import target_mask
from jaxcodec.train.perplexity import Perplexity, agreement, perplexity, read_text, text_windows

WINDOW = 8
BATCH = 3 * WINDOW  # the last batch is not full, and every test has one shape
ROWS = 20  # of the plain forward
TOKENS = np.random.default_rng(0).integers(1, 128, 61)


def changed(model: Model, change) -> Model:
    """The same with `change` done to every array, by numpy, which need not compile it."""
    return jax.tree.map(lambda x: jnp.asarray(change(np.asarray(x)).astype(x.dtype)), model)


@pytest.fixture(scope="module")
def model(shallow_model) -> Model:
    """One whose predictions are far from uniform."""
    return changed(shallow_model, lambda x: 4 * x)


@pytest.fixture(scope="module")
def dense(model) -> Model:
    """Another of the same structure."""
    return changed(model, np.flip)


@pytest.fixture(scope="module")
def adapted(model) -> Model:
    adapter = init_adapter(model, jax.random.key(2), 4)
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    return set_adapter(with_bank(model, AdapterBank(1, 4, ICARUS_TARGETS)), adapter, 0)


def log_probabilities(model: Model, rows: np.ndarray, **options) -> np.ndarray:
    """[rows, T, V] by the plain forward, normalized in float64."""
    padded = np.ones((ROWS, WINDOW), np.int32)
    padded[: len(rows), : rows.shape[1]] = rows
    counts = jnp.full(ROWS, rows.shape[1])
    logits = np.asarray(forward(model, jnp.asarray(padded), counts, **options), np.float64)
    logits = logits[: len(rows), : rows.shape[1]]
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def full_windows(tokens: np.ndarray) -> np.ndarray:
    return tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)


def of(model: Model, tokens: np.ndarray = TOKENS, **options) -> Perplexity:
    return perplexity(model, tokens, WINDOW, batch_tokens=BATCH, **options)


def test_windows_do_not_overlap_by_default_and_the_first_token_of_each_is_given(model):
    found = of(model)
    rows = full_windows(TOKENS)
    log_p = log_probabilities(model, rows)[:, :-1]
    losses = -np.take_along_axis(log_p, rows[:, 1:, None], axis=-1)
    # as the programs of GPTQ and AQLM do: means of windows, times tokens, over all tokens
    expected = np.sum(losses.mean(axis=(1, 2)) * WINDOW) / (len(rows) * WINDOW)
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert found.perplexity == math.exp(found.loss)
    assert found.accuracy == np.mean(log_p.argmax(axis=-1) == rows[:, 1:])
    assert (found.windows, found.tokens, found.window, found.stride) == (7, 49, 8, 8)


@pytest.mark.parametrize(
    ("stride", "tail"), [(8, True), (7, True), (3, True), (3, False), (1, True)]
)
def test_each_token_is_scored_once_with_the_context_that_the_stride_leaves(stride, tail):
    windows = text_windows(TOKENS, WINDOW, stride, tail)
    scored = []
    batch = windows.rows(np.arange(len(windows)))
    for start, mask in zip(windows.starts, np.asarray(target_mask(batch)), strict=True):
        offsets = np.flatnonzero(mask) + 1
        scored += (start + offsets).tolist()
        if start:
            assert offsets[0] == max(1, WINDOW - stride)
    assert scored == sorted(set(scored))
    unscored = set(range(61)) - set(scored)
    if stride < WINDOW:  # nothing but the first token, and without a tail the last few
        assert unscored == {0, *(() if tail else range(scored[-1] + 1, 61))}
        assert len(unscored) - 1 < stride
    else:  # the first of each window
        assert unscored == set(windows.starts.tolist())


def test_a_tail_is_a_shorter_window_and_padding_counts_nothing(model):
    found, full = of(model, tail=True), of(model)
    log_p = log_probabilities(model, TOKENS[None, 56:])[0]
    losses = [-log_p[t, TOKENS[57 + t]] for t in range(4)]
    assert found.tokens == full.tokens + 4
    total = full.loss * full.tokens + sum(losses)
    assert found.loss == pytest.approx(total / found.tokens, rel=1e-5)


def test_a_text_of_less_than_one_window_is_its_own_tail(model):
    found = of(model, TOKENS[:5], tail=True)
    log_p = log_probabilities(model, TOKENS[None, :5])[0]
    losses = [-log_p[t, TOKENS[t + 1]] for t in range(4)]
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert (found.windows, found.tokens) == (1, 4)


follow = functools.partial(agreement, tokens=TOKENS, window=WINDOW, batch_tokens=BATCH)


def test_agreement_is_the_divergence_from_the_dense_model(model, dense):
    found = follow(model, dense)
    rows = full_windows(TOKENS)
    log_q, log_p = (log_probabilities(m, rows)[:, :-1] for m in (model, dense))
    assert found.kl == pytest.approx(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), -1)), rel=1e-5)
    assert found.top1 == np.mean(log_p.argmax(axis=-1) == log_q.argmax(axis=-1))
    for ours, alone in ((found.model, model), (found.dense, dense)):
        apart = of(alone)
        assert ours.loss == pytest.approx(apart.loss, rel=1e-5)
        assert ours.accuracy == apart.accuracy
    assert abs(follow(dense, model).kl - found.kl) > 0.01  # the other direction is another number


def test_a_model_agrees_with_itself(model):
    found = follow(model, model)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.top1 == 1


@pytest.mark.parametrize("scheme", [CONVENTIONAL, ICARUS, PREFILL_SHARE])
def test_every_scheme_is_scored_by_its_own_forward(model, dense, adapted, scheme):
    base = model if scheme == PREFILL_SHARE else None
    answering = dense if base else adapted
    found = of(answering, stride=3, scheme=scheme, base=base)
    windows = text_windows(TOKENS, WINDOW, 3)
    rows = windows.rows(np.arange(len(windows)))
    options = {"scheme": scheme, "slots": None if base else jnp.zeros(ROWS, jnp.int32)}
    if base:
        given = np.ones(ROWS, np.int32)
        given[: len(windows)] = rows.prompt_lengths
        options |= {"base": base, "prompt_lengths": jnp.asarray(given)}
    log_p = log_probabilities(answering, rows.tokens, **options)
    losses = [
        -log_p[i, t - 1, rows.tokens[i, t]]
        for i in range(len(windows))
        for t in range(rows.prompt_lengths[i], WINDOW)
    ]
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    other = of(answering if base else model, stride=3)
    assert abs(found.loss - other.loss) > 1e-3  # who writes the cache, or the adapter, matters


def test_models_of_one_structure_share_a_program(model, dense):
    follow(model, dense)
    before = module._agreement_step._cache_size()
    follow(changed(model, lambda x: x / 2), dense, tokens=TOKENS[:50])
    assert module._agreement_step._cache_size() == before


def test_progress_leaves_standard_output_alone(model, capsys):
    of(model, quiet=False)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1].startswith("step 3/3  loss ")


@pytest.mark.parametrize(
    ("tokens", "window", "options", "message"),
    [
        (TOKENS[:7], 8, {}, "has 7 tokens, less than one window of 8"),
        (TOKENS[:1], 8, {"tail": True}, "has 1 tokens, and nothing predicts the first"),
        (TOKENS, 1, {}, "at least 2 tokens"),
        (TOKENS, 129, {}, "window of 129 tokens is beyond the model's context of 128"),
        (TOKENS, 8, {"stride": 9}, "must lie in"),
        (TOKENS, 8, {"stride": 0}, "must lie in"),
        (TOKENS + 100, 8, {}, "was it tokenized for this model"),
        (TOKENS - 100, 8, {}, "was it tokenized for this model"),
        (TOKENS, 8, {"scheme": PREFILL_SHARE}, "needs the base"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, tokens, window, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, tokens, window, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 64}, "vocabulary of 128 tokens, the dense model one of 64"),
        ({"max_positions": 4}, "beyond the dense model's context of 4"),
    ],
)
def test_models_that_cannot_be_compared_are_refused(model, change, message):
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, **change))
    with pytest.raises(ValueError, match=message):
        follow(model, other)


def test_a_broken_model_has_no_perplexity(model):
    with pytest.raises(FloatingPointError, match="model's loss on the text is nan"):
        of(changed(model, lambda x: x * np.nan))


@pytest.mark.parametrize(
    ("content", "message"), [(b" \n", "is empty"), (b"\xff\xfe", "not a text in UTF-8")]
)
def test_a_text_file_holds_text(tmp_path, content, message):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / "text.txt")
