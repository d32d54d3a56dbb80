"""A quantized block brought nearer to the dense one: floats trained on its outputs, codes fixed.

Letters: n sequences, B of a step, T tokens, D hidden.
Source: AQLM (arXiv 2401.06118) section 3, phase 3: codebooks, scales, norms and biases learn to
give the dense block's outputs for the inputs that the quantized blocks before it give.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxcodec.models.blocks import BlockModel, run_block
from jaxcodec.train.calibration import Placement, slices

# Adam's decay rates in the authors' code (Vahe1994/AQLM).
BETAS = (0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class TuningOptions:
    """How long a block is tuned.

    Attributes:
      epochs: most passes over the calibration sequences; 0 leaves the block as it is.
      learning_rate: Adam's at the start, relative to the root mean square of each variable; it
        falls linearly to 0.
      held_out: share of the sequences that are only looked at, to keep the best epoch.
      patience: epochs without a better one after which tuning stops.

    Raises:
      ValueError: a field out of range.
    """

    epochs: int = 5
    # Of 3e-4 to 1e-2 the larger the better on the shipped base; see docs/experiments.md.
    learning_rate: float = 5e-3
    held_out: float = 0.125  # AQLM's recipe holds out 256 of 2048
    patience: int = 3  # AQLM's finetune_early_stop

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.patience < 1:
            raise ValueError(
                f"epochs must be at least 0 and patience at least 1, "
                f"got {self.epochs} and {self.patience}."
            )
        if not (self.learning_rate >= 0 and 0 < self.held_out < 1):
            raise ValueError(
                "learning_rate must be at least 0 and held_out between 0 and 1, "
                f"got {self.learning_rate} and {self.held_out}."
            )


@dataclasses.dataclass(frozen=True)
class TuningResult:
    """What tuning did, as relative output errors (see `output_error`) of held-out sequences.

    Attributes:
      before: of the block as the search left it.
      after: of the epoch kept; never above `before`.
      epochs: passes made.
    """

    before: float
    after: float
    epochs: int

    def __str__(self) -> str:
        """`0.0187`, or `0.0187 -> 0.0121` where there was tuning."""
        return f"{self.before:.4f}" + (f" -> {self.after:.4f}" if self.epochs else "")


def tune_block(
    block: BlockModel,
    inputs: np.ndarray,
    targets: np.ndarray,
    options: TuningOptions,
    batch_size: int,
    seed: int,
    place: Placement,
) -> tuple[BlockModel, TuningResult]:
    """The block with floats that give more nearly `targets` [n, T, D] for `inputs` [n, T, D].

    Masters are float32; the block computes, and comes back, in its own dtypes. What counts is the
    error on held-out sequences, of the floats as they are stored; without epochs it is measured
    and nothing is changed.

    Raises:
      ValueError: too few sequences to hold one batch out of two; outputs that are not finite.
    """
    split = held_out_from(len(inputs), batch_size, options)
    held_out = slice(split, None)
    before = best = output_error(block, inputs[held_out], targets[held_out], batch_size, place)
    if not np.isfinite(before):
        raise ValueError(
            f"The block's error on held-out sequences is {before}: its outputs are not finite, or "
            f"too large for {block.dtype}."
        )
    floats, codes = nnx.split_state(block.weights, nnx.Param, ...)
    fixed = dataclasses.replace(block, weights=codes)
    units = jax.tree.map(_root_mean_square, floats)
    params = jax.tree.map(lambda x, unit: x.astype(jnp.float32) / unit, floats, units)
    # Placed before the first step as they are after it, or it would be compiled twice.
    params, adam = place.replicated((params, _adam().init(params)))
    kept = block
    steps = options.epochs * -(-split // batch_size)
    worse = epoch = step = 0
    for epoch in range(1, options.epochs + 1):
        for rows in _shuffled(split, batch_size, (seed, epoch)):
            x, target = place.rows(inputs[rows]), place.rows(targets[rows])
            rate = options.learning_rate * (1 - step / steps)
            params, adam = _step(params, adam, units, floats, fixed, x, target, rate)
            step += 1
        tuned = _merge(params, units, floats, fixed)
        error = output_error(tuned, inputs[held_out], targets[held_out], batch_size, place)
        if error < best:
            best, kept, worse = error, tuned, 0
        else:
            worse += 1
        if worse == options.patience:
            break
    return kept, TuningResult(before, best, epoch)


def output_error(
    block: BlockModel, inputs: np.ndarray, targets: np.ndarray, batch_size: int, place: Placement
) -> float:
    """|y - target|^2 / |target - x|^2: the squared error, of the size of what the block adds.

    Sums over all of `inputs` x [n, T, D] and `targets`, in float32.
    """
    sums = np.zeros(2)
    for rows in slices(len(inputs), batch_size):
        x, target = place.rows(inputs[rows]), place.rows(targets[rows])
        sums += np.asarray(_errors(run_block(block, x), x, target))
    return 0.0 if sums[0] == 0 else float(sums[0] / sums[1])


@functools.partial(jax.jit, donate_argnames=("params", "adam"))
def _step(
    params: Any,
    adam: Any,
    units: Any,
    like: Any,
    fixed: BlockModel,
    x: jax.Array,
    target: jax.Array,
    rate: jax.Array,
) -> tuple[Any, Any]:
    """One step of Adam on params, which are floats in `units`."""

    def loss(params: Any) -> jax.Array:
        error, added = _errors(run_block(_merge(params, units, like, fixed), x), x, target)
        return error / added

    updates, adam = _adam().update(jax.grad(loss)(params), adam)
    return jax.tree.map(lambda p, update: p - rate * update, params, updates), adam


def _adam() -> optax.GradientTransformation:
    # The loss is of order one and so are the parameters: the usual epsilon would swallow the
    # gradients of a large matrix's scales.
    return optax.scale_by_adam(*BETAS, eps=1e-12)


@jax.jit
def _merge(params: Any, units: Any, like: Any, fixed: BlockModel) -> BlockModel:
    floats = jax.tree.map(lambda p, u, x: (p * u).astype(x.dtype), params, units, like)
    return dataclasses.replace(fixed, weights=nnx.merge_state(floats, fixed.weights))


@jax.jit
def _errors(y: jax.Array, x: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of squares of y - target and target - x."""
    y, x, target = (z.astype(jnp.float32) for z in (y, x, target))
    return jnp.sum(jnp.square(y - target)), jnp.sum(jnp.square(target - x))


@jax.jit
def _root_mean_square(x: jax.Array) -> jax.Array:
    """Of all of x in float32; 1 where x is zero, as new biases are."""
    mean = jnp.mean(jnp.square(x.astype(jnp.float32)))
    return jnp.where(mean > 0, jnp.sqrt(mean), 1.0)


def held_out_from(count: int, batch_size: int, options: TuningOptions) -> int:
    """The first sequence that is held out: whole batches, at least one on either side.

    Where nothing is tuned, all may be.

    Raises:
      ValueError: too few sequences for that.
    """
    held_out = max(round(options.held_out * count / batch_size), 1) * batch_size
    if held_out >= count and options.epochs:
        raise ValueError(
            f"{count} calibration sequences in batches of {batch_size} leave none to tune on "
            f"beside {held_out} held out: give more sequences, or smaller batches."
        )
    return max(count - held_out, 0)


def _shuffled(count: int, batch_size: int, seed: tuple[int, int]) -> Iterator[np.ndarray]:
    """Every row below `count` once, in whole batches first, in an order that `seed` fixes."""
    order = np.random.default_rng(seed).permutation(count)
    for rows in slices(count, batch_size):
        yield order[rows]
