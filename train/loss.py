"""Next-token cross entropy of a batch, and KL from a teacher, as sums that add up over batches.

Letters: B rows, T tokens a row, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxcodec.train.data import Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over the tokens that carry loss. Adding two gives those of both batches together.

    Attributes:
      loss: f32 [], cross entropy in nats; or KL(teacher || model).
      correct: f32 [], tokens that had the highest logit; or places where the teacher's had it.
      count: f32 [], tokens.
    """

    loss: jax.Array
    correct: jax.Array
    count: jax.Array

    def __add__(self, other: "LossSums") -> "LossSums":
        return jax.tree.map(jnp.add, self, other)

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
    with jax.named_scope("next_token_loss"):
        mask = target_mask(batch)
        targets = jnp.asarray(batch.tokens)[:, 1:]
        logits = logits[:, :-1].astype(jnp.float32)
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

    sum_x p(x) (log p(x) - log q(x)), p the teacher's and q the model's, is zero where the two
    agree. Counted are the places of `next_token_loss`. No gradient reaches the teacher.
    """
    with jax.named_scope("kl_divergence"):
        mask = target_mask(batch)
        logits = logits[:, :-1].astype(jnp.float32)
        teacher_logits = jax.lax.stop_gradient(teacher_logits[:, :-1].astype(jnp.float32))
        log_p, log_q = jax.nn.log_softmax(teacher_logits), jax.nn.log_softmax(logits)
        losses = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        agree = jnp.argmax(logits, axis=-1) == jnp.argmax(teacher_logits, axis=-1)
        return LossSums(
            loss=jnp.sum(jnp.where(mask, losses, 0)),
            correct=jnp.sum(mask & agree, dtype=jnp.float32),
            count=jnp.sum(mask, dtype=jnp.float32),
        )
