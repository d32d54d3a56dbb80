"""How well a model predicts a text, and how closely it follows another model there.

A text is one run of tokens, cut into windows that are computed apart: window i holds the tokens
from i * stride to i * stride + window - 1, and within it each token is predicted from those before
it. Scored are, in window 0, all tokens but its first; in each later one, those that no window
before it had, except its first, which nothing predicts. Nothing is put before a window, a
beginning-of-text token is where the tokenizer put it: before the text. The loss is the mean over
all scored tokens.

With stride = window, the default, that is the convention of the programs of GPTQ (arXiv
2210.17323) and AQLM (arXiv 2401.06118), whose text is WikiText-2, the lines of its test split
joined by two line breaks, in windows of 2048 (GPTQ) or 4096 tokens (AQLM, for Llama 2); what
follows the last full window is left out. A smaller stride gives each token at least window - stride
tokens of context; from window - 1 on down, every token but the first of the text is scored once.

Letters: B windows of a batch, T tokens a window, D hidden, V vocabulary.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxcodec.models.scheme import CONVENTIONAL, Scheme
from jaxcodec.models.transformer import Model
from jaxcodec.train.data import Batch, Examples
from jaxcodec.train.loss import LossSums, kl_sums, loss_sums, sum_over_batches, sum_over_positions
from jaxcodec.train.step import batch_states, eval_step

# Of a window, where nobody says more: that of GPTQ, and of CodeGEMM's own evaluation.
WINDOW = 2048
# Tokens computed at once: enough for any matrix unit, and the attention scores of a window of 8192
# in a model of 32 heads still are 8 GB.
BATCH_TOKENS = 8192


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
      perplexity: exp(loss).
      loss: nats a token.
      accuracy: share of the tokens that had the highest logit.
      tokens: that were scored.
      windows: how many.
      window: tokens of each.
      stride: tokens from the beginning of one to the beginning of the next.
    """

    perplexity: float
    loss: float
    accuracy: float
    tokens: int
    windows: int
    window: int
    stride: int


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How closely a model follows a dense one, over the same scored tokens.

    Attributes:
      kl: KL(dense || model) = sum of p_dense (log p_dense - log p_model), nats, mean over tokens.
      top1: share of the tokens for which both have their highest logit at the same place.
      model: its own predictions of the text.
      dense: those of the dense model.
    """

    kl: float
    top1: float
    model: Perplexity
    dense: Perplexity


def perplexity(
    model: Model,
    tokens: Sequence[int] | np.ndarray,
    window: int,
    *,
    stride: int | None = None,
    tail: bool = False,
    scheme: Scheme = CONVENTIONAL,
    base: Model | None = None,
    batch_tokens: int = BATCH_TOKENS,
    quiet: bool = True,
) -> Perplexity:
    """The perplexity of a model on a text, as the module describes it.

    Models of one structure share one compiled program for each shape.

    Args:
      model: with the adapter, if any, in slot 0 of its bank.
      tokens: of the text, in one piece.
      window: tokens of a window.
      stride: None for `window`.
      tail: score what follows the last full window too, in a shorter one; a text of less than one
        window is such a window.
      scheme: who writes the cache. Under prefill_share the base writes the tokens of a window
        before the scored ones but the last: with stride = window, none.
      base: writer of prompts under prefill_share.
      batch_tokens: tokens at once, at least a window.
      quiet: show no progress; else it goes to standard error.

    Raises:
      ValueError: a window that is less than 2 or beyond the model's context, a stride that is not
        in [1, window], fewer tokens than one window (with `tail`, than 2), or one that is not in
        the vocabulary.
      FloatingPointError: the loss is not finite.
    """
    _check_context(window, model, "model")
    windows = text_windows(tokens, window, stride, tail)
    _check_tokens(windows.tokens, model, "model")
    sums = sum_over_batches(
        lambda batch: eval_step(model, base, batch, scheme),
        windows,
        max(1, batch_tokens // window),
        None if quiet else lambda sums: f"loss {sums.mean:.4f}",
    )
    return _perplexity("model", sums, windows, stride)


def agreement(
    model: Model,
    dense: Model,
    tokens: Sequence[int] | np.ndarray,
    window: int,
    *,
    stride: int | None = None,
    tail: bool = False,
    scheme: Scheme = CONVENTIONAL,
    base: Model | None = None,
    batch_tokens: int = BATCH_TOKENS,
    quiet: bool = True,
) -> Agreement:
    """How closely a model follows a dense one on a text, and both perplexities, in one pass.

    Args:
      dense: is run under `conventional`; the others are as for `perplexity`.

    Raises:
      ValueError: as `perplexity`, for either model; two vocabularies.
      FloatingPointError: as `perplexity`, for either model.
    """
    if model.config.vocab_size != dense.config.vocab_size:
        raise ValueError(
            f"The model has a vocabulary of {model.config.vocab_size} tokens, the dense model one "
            f"of {dense.config.vocab_size}: what they predict can only be compared over the same."
        )
    both = ((model, "model"), (dense, "dense model"))
    for one, name in both:
        _check_context(window, one, name)
    windows = text_windows(tokens, window, stride, tail)
    for one, name in both:
        _check_tokens(windows.tokens, one, name)
    sums = sum_over_batches(
        lambda batch: _agreement_step(model, dense, base, batch, scheme),
        windows,
        max(1, batch_tokens // window),
        None if quiet else lambda sums: f"KL {sums.kl / sums.model.count:.5f}",
    )
    return Agreement(
        sums.kl / sums.model.count,
        sums.same / sums.model.count,
        _perplexity("model", sums.model, windows, stride),
        _perplexity("dense model", sums.dense, windows, stride),
    )


def text_windows(
    tokens: Sequence[int] | np.ndarray, window: int, stride: int | None = None, tail: bool = False
) -> Examples:
    """The windows of a text as examples, whose "prompts" are the tokens that are not scored.

    Arguments and errors are those of `perplexity`.
    """
    stride = window if stride is None else stride
    if window < 2:
        raise ValueError(f"A window needs at least 2 tokens to predict one, got {window}.")
    if not 1 <= stride <= window:
        raise ValueError(f"The stride must lie in [1, window = {window}], got {stride}.")
    if tail and len(tokens) < 2:
        raise ValueError(
            f"The text has {len(tokens)} tokens, and nothing predicts the first: take a longer one."
        )
    if not tail and len(tokens) < window:
        raise ValueError(
            f"The text has {len(tokens)} tokens, less than one window of {window}: take a smaller "
            "window, a longer text, or the tail (--tail), which is all of it."
        )
    first = min(window, len(tokens))
    starts = np.arange(0, len(tokens) - first + 1, stride)
    counts = np.full(len(starts), first, np.int32)
    context = max(1, window - stride)  # in every window but the first
    if tail and len(tokens) - (starts[-1] + stride) > context:
        starts = np.append(starts, starts[-1] + stride)
        counts = np.append(counts, np.int32(len(tokens) - starts[-1]))
    given = np.full(len(starts), context, np.int32)
    given[0] = 1
    return Examples(np.asarray(tokens, np.int32), starts, counts, given, window)


def read_text(path: str | os.PathLike) -> str:
    """A text file in UTF-8.

    Raises:
      ValueError: it holds no text, or is not UTF-8.
    """
    try:
        text = Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}.") from None
    if not text.strip():
        raise ValueError(f"{path} is empty: expected a text to measure the perplexity of.")
    return text


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _AgreementSums:
    """Sums over the scored tokens; f32 [] each.

    Attributes:
      model, dense: their losses.
      kl: KL(dense || model), nats.
      same: tokens for which both have their highest logit at the same place.
    """

    model: LossSums
    dense: LossSums
    kl: jax.Array
    same: jax.Array


@functools.partial(jax.jit, static_argnames="scheme")
def _agreement_step(
    model: Model, dense: Model, base: Model | None, batch: Batch, scheme: Scheme
) -> _AgreementSums:
    model_logits, dense_logits = model.module.logits, dense.module.logits

    def sums(
        states: tuple[jax.Array, jax.Array], targets: jax.Array, mask: jax.Array
    ) -> _AgreementSums:
        ours, theirs = model_logits(states[0]), dense_logits(states[1])
        apart = kl_sums(theirs, ours, mask)
        return _AgreementSums(
            loss_sums(ours, targets, mask),
            loss_sums(theirs, targets, mask),
            apart.loss,
            apart.correct,
        )

    own = batch_states(model, base, batch, scheme)
    others = batch_states(dense, None, batch, CONVENTIONAL)
    return sum_over_positions(sums, (own, others), batch, model.config.vocab_size)


def _check_context(window: int, model: Model, name: str) -> None:
    if window > model.config.max_positions:
        raise ValueError(
            f"The window of {window} tokens is beyond the {name}'s context of "
            f"{model.config.max_positions}: take a smaller one."
        )


def _check_tokens(tokens: np.ndarray, model: Model, name: str) -> None:
    low, high = tokens.min(), tokens.max()
    if low < 0 or high >= model.config.vocab_size:
        raise ValueError(
            f"The text's tokens lie in [{low}, {high}], the {name}'s vocabulary is "
            f"[0, {model.config.vocab_size}): was it tokenized for this model?"
        )


def _perplexity(name: str, sums: LossSums, windows: Examples, stride: int | None) -> Perplexity:
    count = float(sums.count)  # not `sums.mean`, which is float32
    loss = float(sums.loss) / count
    if not math.isfinite(loss):
        raise FloatingPointError(f"The {name}'s loss on the text is {loss}: its logits are broken.")
    return Perplexity(
        perplexity=math.exp(loss),
        loss=loss,
        accuracy=float(sums.correct) / count,
        tokens=int(count),
        windows=len(windows),
        window=windows.max_length,
        stride=windows.max_length if stride is None else stride,
    )
