"""Next-token cross entropy and KL from a teacher, as sums over positions and batches.

Letters: B rows, T tokens a row, t positions of a chunk, D hidden, V vocabulary.
"""

import contextlib
import dataclasses
import operator
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcodec.train.data import Batch, Examples, batches_in_order
from jaxcodec.train.progress import progress

# 256 MB of float32: 512 positions of a vocabulary of 128k, which keep a matrix unit busy.
LOGITS_AT_ONCE = 2**26


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over the tokens that carry loss; those of two batches add up, field by field.

    Attributes:
      loss: f32 [], cross entropy in nats; or KL(teacher || model).
      correct: f32 [], tokens that had the highest logit; or places where the teacher's had it.
      count: f32 [], tokens.
    """

    loss: jax.Array
    correct: jax.Array
    count: jax.Array

    @property
    def mean(self) -> jax.Array:
        """Nats a token; 0 where no token carries loss."""
        return self.loss / jnp.maximum(self.count, 1)

    @property
    def accuracy(self) -> jax.Array:
        """Share of the tokens predicted, or agreed on; 0 where no token carries loss."""
        return self.correct / jnp.maximum(self.count, 1)


def target_mask(batch: Batch) -> jax.Array:
    """bool [B, T - 1]: whether the prediction made at position t, of token t + 1, is counted."""
    target = jnp.arange(1, batch.tokens.shape[1])[None, :]
    after_prompt = target >= jnp.asarray(batch.prompt_lengths)[:, None]
    return after_prompt & (target < jnp.asarray(batch.counts)[:, None])


def next_token_loss(logits: jax.Array, batch: Batch) -> LossSums:
    """Cross entropy of `logits` [B, T, V] against the next tokens, in float32.

    Counted are the tokens from prompt_lengths[b] to counts[b] - 1 of every row.
    """
    return loss_sums(logits[:, :-1], jnp.asarray(batch.tokens)[:, 1:], target_mask(batch))


def loss_sums(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> LossSums:
    """Cross entropy of `logits` [..., V] against `targets` int32 [...] where `mask`, in float32."""
    with jax.named_scope("next_token_loss"):
        logits = logits.astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - chosen
        return LossSums(
            # where, not a product: a row of padding may hold NaN or infinity
            loss=jnp.sum(jnp.where(mask, losses, 0)),
            correct=jnp.sum(mask & (jnp.argmax(logits, axis=-1) == targets), dtype=jnp.float32),
            count=jnp.sum(mask, dtype=jnp.float32),
        )


def kl_divergence(teacher_logits: jax.Array, logits: jax.Array, batch: Batch) -> LossSums:
    """KL(teacher || model) of the next token's distributions, both logits [B, T, V], in float32.

    Counted are the places of `next_token_loss`.
    """
    return kl_sums(teacher_logits[:, :-1], logits[:, :-1], target_mask(batch))


def kl_sums(teacher_logits: jax.Array, logits: jax.Array, mask: jax.Array) -> LossSums:
    """KL(teacher || model) of distributions given by logits [..., V], where `mask`, in float32.

    sum_x p(x) (log p(x) - log q(x)), p the teacher's and q the model's, is zero where the two
    agree. No gradient reaches the teacher.
    """
    with jax.named_scope("kl_divergence"):
        logits = logits.astype(jnp.float32)
        teacher_logits = jax.lax.stop_gradient(teacher_logits.astype(jnp.float32))
        log_p, log_q = jax.nn.log_softmax(teacher_logits), jax.nn.log_softmax(logits)
        losses = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        agree = jnp.argmax(logits, axis=-1) == jnp.argmax(teacher_logits, axis=-1)
        return LossSums(
            loss=jnp.sum(jnp.where(mask, losses, 0)),
            correct=jnp.sum(mask & agree, dtype=jnp.float32),
            count=jnp.sum(mask, dtype=jnp.float32),
        )


def sum_over_positions[Sums](
    sums: Callable[[Any, jax.Array, jax.Array], Sums], states: Any, batch: Batch, vocab_size: int
) -> Sums:
    """The sum of `sums` over chunks of positions, so that logits need not all exist at once.

    Args:
      sums: (states [B, t, D], targets int32 [B, t], mask bool [B, t]) -> a tree of sums; what it
        makes logits of is at most `LOGITS_AT_ONCE / vocab_size` positions, or one a row.
      states: [B, T, D], or a tree of such.
      batch: of the same tokens; targets and mask are those of `next_token_loss`.
    """
    mask = target_mask(batch)
    B, positions = mask.shape
    t = max(1, min(positions, LOGITS_AT_ONCE // (B * vocab_size)))
    chunks = -(-positions // t)

    def split(x: jax.Array) -> jax.Array:  # [B, T - 1, ...] -> [chunks, B, t, ...]
        padding = [(0, 0), (0, chunks * t - positions), *[(0, 0)] * (x.ndim - 2)]
        return jnp.moveaxis(jnp.pad(x, padding).reshape(B, chunks, t, *x.shape[2:]), 1, 0)

    parts = (jax.tree.map(lambda x: x[:, :-1], states), jnp.asarray(batch.tokens)[:, 1:], mask)
    each = jax.lax.map(lambda part: sums(*part), jax.tree.map(split, parts))
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), each)


def sum_over_batches[Sums](
    step: Callable[[Batch], Sums],
    examples: Examples,
    batch_size: int,
    show: Callable[[Sums], str] | None = None,
) -> Sums:
    """The sum of `step` over all of `examples`: its leaves are Python floats, so in float64.

    Args:
      batch_size: examples a batch; the last one is filled with empty rows.
      show: what to say of the sums so far, beside a bar on standard error; None shows nothing.
    """
    batch_size = min(batch_size, len(examples))
    batches = -(-len(examples) // batch_size)
    shown = contextlib.nullcontext() if show is None else progress(batches, 0, stderr=True)
    start, total = time.perf_counter(), None
    with shown as report:
        for done, batch in enumerate(batches_in_order(examples, batch_size), 1):
            sums = jax.tree.map(float, step(batch))
            total = sums if total is None else jax.tree.map(operator.add, total, sums)
            if report is not None and show is not None:
                left = (time.perf_counter() - start) / done * (batches - done)
                report(done, show(total), left)
    assert total is not None, "there are no empty Examples"
    return total
