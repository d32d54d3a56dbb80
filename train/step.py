"""What trains under each scheme, and one optimizer step of it: pure, jitted, state in, state out.

Letters: B rows, T tokens, V vocabulary, A micro-batches that are accumulated into one step.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxcodec.models.config import ModelConfig
from jaxcodec.models.layers import AdapterBank
from jaxcodec.models.lora import Adapter, check_icarus, set_adapter, with_bank
from jaxcodec.models.scheme import CONVENTIONAL, ICARUS, PREFILL_SHARE, Scheme
from jaxcodec.models.steps import hidden_states
from jaxcodec.models.transformer import Model
from jaxcodec.train.data import Batch
from jaxcodec.train.loss import (
    LossSums,
    kl_divergence,
    kl_sums,
    loss_sums,
    next_token_loss,
    sum_over_positions,
)

PyTree = Any
Models = Callable[[PyTree, PyTree], tuple[Model, Model | None]]
TrainStep = Callable[["TrainState", PyTree, Batch], tuple["TrainState", dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a run trains, what it leaves alone, and the model that the two make.

    Attributes:
      scheme: who writes the cache while it trains.
      trainable: float32 master weights to start from: an `Adapter`, or the floats of a model.
      frozen: everything else; no gradient is taken of it.
      models: pure (trainable, frozen) -> (model in training with its adapter in slot 0 of its
        bank, base that writes prompts under prefill_share or None), in the base's dtype.
      teacher: pure frozen -> the model whose next-token distribution is the target, or None where
        the tokens of the data are.
    """

    scheme: Scheme
    trainable: PyTree
    frozen: PyTree
    models: Models
    teacher: Callable[[PyTree], Model | None] = lambda frozen: None

    @property
    def config(self) -> ModelConfig:
        """Of the model in training."""
        model, _ = jax.eval_shape(self.models, self.trainable, self.frozen)
        return model.config

    def artifact(self, trainable: PyTree) -> Model | Adapter:
        """What a run leaves behind: the adapter, or the whole model in its own dtype."""
        if isinstance(trainable, Adapter):
            return trainable
        model, _ = self.models(trainable, self.frozen)
        return model

    def optimizer(
        self, optimizer: optax.GradientTransformation, schedule: optax.Schedule
    ) -> optax.GradientTransformation:
        """The run's optimizer of `trainable`, given one of weights and the schedule of its rate."""
        return optimizer

    def settle(self, trainable: PyTree) -> tuple[PyTree, dict[str, jax.Array]]:
        """What follows the optimizer in every step, pure, and metrics of it, f32 []."""
        return trainable, {}

    def manifest(self) -> dict[str, Any]:
        """What tells this run from others besides its weights; flat, JSON values."""
        if not isinstance(self.trainable, Adapter):
            return {}
        adapter = self.trainable
        targets = ", ".join(adapter.targets)
        return {"rank": adapter.rank, "alpha": adapter.alpha, "targets": targets}


def full_training(model: Model) -> Objective:
    """All floats of `model`: kernels, or codebooks and scales where the codes stay; `conventional`.

    With the codes frozen this is how a model that k-means quantized is brought back.
    """
    trainable, frozen, merge = split_floats(model)
    return Objective(
        CONVENTIONAL, trainable, frozen, lambda floats, rest: (merge(floats, rest), None)
    )


def decode_module_training(model: Model, base: Model) -> Objective:
    """All floats of `model`, which reads the prompts' cache that `base` wrote: `prefill_share`.

    Source: PrefillShare (arXiv 2602.12029), cache-conditioned fine-tuning; loss on the response.

    Raises:
      ValueError: the two models' caches do not have the same shape.
    """
    _check_same_cache(model.config, base.config)
    trainable, rest, merge = split_floats(model)

    def models(trainable: PyTree, frozen: tuple[Model, Model]) -> tuple[Model, Model]:
        rest, base = frozen
        return merge(trainable, rest), base

    return Objective(PREFILL_SHARE, trainable, (rest, base), models)


def adapter_training(base: Model, adapter: Adapter, scheme: Scheme = ICARUS) -> Objective:
    """A LoRA on the frozen `base`, under `icarus` (two streams) or `conventional` (one).

    Source: ICaRus (arXiv 2603.13281) equations 4 and 5: the base writes every key and value, the
    adapted decoder reads them, and the loss is on its output alone.

    Raises:
      ValueError: an icarus adapter on k_proj or v_proj; a scheme that trains no adapter.
    """
    if scheme == PREFILL_SHARE:
        raise ValueError("prefill_share trains a decode module, not an adapter.")
    if scheme == ICARUS:
        check_icarus(adapter)
    room = with_bank(base, AdapterBank(1, adapter.rank, adapter.targets))
    return Objective(
        scheme, _master(adapter), room, lambda a, frozen: (set_adapter(frozen, a, 0), None)
    )


def distillation(model: Model, teacher: Model) -> Objective:
    """All floats of a quantized `model`, drawn to the next-token distribution of `teacher`.

    The loss is KL(teacher || model) in nats a token. Codes stay; see pv_tuning.py for them.
    Source: PV-Tuning (arXiv 2405.14852) and its authors' code, which tune end to end so.

    Raises:
      ValueError: `model` is dense, or `teacher` does not know its vocabulary or its context.
    """
    check_teacher(model, teacher)
    trainable, rest, merge = split_floats(model)
    return Objective(
        CONVENTIONAL,
        trainable,
        (rest, teacher),
        lambda floats, frozen: (merge(floats, frozen[0]), None),
        lambda frozen: frozen[1],
    )


def check_teacher(model: Model, teacher: Model) -> None:
    """Refuse a dense `model`, and a `teacher` that does not speak its language.

    Raises:
      ValueError: says which of the two, and what to do.
    """
    if not model.specs:
        raise ValueError(
            "The model is dense, so there is nothing to bring back: quantize it first, and give "
            "the dense one as the teacher."
        )
    if model.config.vocab_size != teacher.config.vocab_size:
        raise ValueError(
            "Teacher and model must share one vocabulary; the teacher has "
            f"{teacher.config.vocab_size} tokens, the model {model.config.vocab_size}."
        )
    if model.config.max_positions > teacher.config.max_positions:
        raise ValueError(
            f"The teacher's context of {teacher.config.max_positions} tokens is shorter than the "
            f"model's {model.config.max_positions}."
        )


def batch_states(model: Model, base: Model | None, batch: Batch, scheme: Scheme) -> jax.Array:
    """Hidden states [B, T, D] of the model with, if it has a bank, the adapter in slot 0."""
    shared = scheme == PREFILL_SHARE
    return hidden_states(
        model,
        jnp.asarray(batch.tokens),
        jnp.asarray(batch.counts),
        scheme,
        prompt_lengths=jnp.asarray(batch.prompt_lengths) if shared else None,
        base=base,
        slots=None if model.bank is None else jnp.zeros_like(batch.counts),
    )


def batch_logits(model: Model, base: Model | None, batch: Batch, scheme: Scheme) -> jax.Array:
    """f32 [B, T, V] of the same."""
    return model.module.logits(batch_states(model, base, batch, scheme))


def batch_loss(
    model: Model,
    base: Model | None,
    batch: Batch,
    scheme: Scheme,
    teacher: Model | None = None,
) -> LossSums:
    """KL(teacher || model), or cross entropy with the batch's tokens where there is no teacher."""
    logits = batch_logits(model, base, batch, scheme)
    if teacher is None:
        return next_token_loss(logits, batch)
    return kl_divergence(batch_logits(teacher, None, batch, CONVENTIONAL), logits, batch)


@functools.partial(jax.jit, static_argnames="scheme")
def eval_step(
    model: Model,
    base: Model | None,
    batch: Batch,
    scheme: Scheme,
    teacher: Model | None = None,
) -> LossSums:
    """The same without a step: never more than `LOGITS_AT_ONCE` logits of a model."""
    logits, states = model.module.logits, batch_states(model, base, batch, scheme)
    if teacher is None:
        sums = lambda states, targets, mask: loss_sums(logits(states), targets, mask)
        return sum_over_positions(sums, states, batch, model.config.vocab_size)
    told, others = teacher.module.logits, batch_states(teacher, None, batch, CONVENTIONAL)
    sums = lambda both, _, mask: kl_sums(told(both[1]), logits(both[0]), mask)
    return sum_over_positions(sums, (states, others), batch, model.config.vocab_size)


def split_floats(model: Model) -> tuple[PyTree, Model, Callable[[PyTree, Model], Model]]:
    """Float32 masters of the floats, the model that holds the rest, and how to join the two."""
    floats, rest = nnx.split_state(with_bank(model, None).weights, nnx.Param, ...)
    dtypes = jax.tree.map(lambda x: x.dtype, floats)

    def merge(trainable: PyTree, rest: Model) -> Model:
        cast = jax.tree.map(lambda x, dtype: x.astype(dtype), trainable, dtypes)
        return dataclasses.replace(rest, weights=nnx.merge_state(cast, rest.weights))

    return _master(floats), dataclasses.replace(model, weights=rest, bank=None), merge


def _master(tree: PyTree) -> PyTree:
    # A copy even of float32: the step donates its state, and the model must outlive it.
    return jax.tree.map(
        lambda x: jnp.array(x, jnp.float32 if _is_float(x) else x.dtype, copy=True), tree
    )


def _is_float(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _floats(tree: PyTree) -> PyTree:
    """`tree` with None in place of the leaves that no gradient is taken of."""
    return jax.tree.map(lambda x: x if _is_float(x) else None, tree)


def _with_floats(tree: PyTree, floats: PyTree) -> PyTree:
    """`tree` with the leaves of `floats`."""
    return jax.tree.map(
        lambda new, old: old if new is None else new, floats, tree, is_leaf=lambda x: x is None
    )


def _check_same_cache(model: ModelConfig, base: ModelConfig) -> None:
    for field in ("vocab_size", "num_layers", "num_kv_heads", "head_dim"):
        if getattr(model, field) != getattr(base, field):
            raise ValueError(
                f"The decode module reads the base's cache, so both need one {field}; "
                f"it has {getattr(model, field)}, the base {getattr(base, field)}."
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Best:
    """The artifact of least loss on held-out examples so far.

    Attributes:
      loss: f32 [], nats a token.
      artifact: the model or adapter.
    """

    loss: jax.Array
    artifact: PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes; donated to it.

    Attributes:
      step: i32 [], steps taken.
      trainable: float32 master weights; integers, which a settling may change, as they are.
      optimizer: the optimizer's own state.
      best: None where the last weights count.
    """

    step: jax.Array
    trainable: PyTree
    optimizer: PyTree
    best: Best | None = None


def init_state(
    objective: Objective, optimizer: optax.GradientTransformation, keep_best: bool = False
) -> TrainState:
    """The state before the first step; it shares no buffer with `objective`."""
    trainable = _master(objective.trainable)
    state = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(_floats(trainable)))
    return with_best(state, objective, jnp.inf) if keep_best else state


def with_best(state: TrainState, objective: Objective, loss: float) -> TrainState:
    """`state` whose weights are its best, as copies: the step donates both."""
    artifact = jax.tree.map(jnp.copy, objective.artifact(state.trainable))
    return dataclasses.replace(state, best=Best(jnp.float32(loss), artifact))


def make_schedule(learning_rate: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, then a cosine down to a tenth of it at `steps`."""
    if not 0 <= warmup_steps < steps:
        raise ValueError(
            f"warmup_steps (--warmup-steps) must lie in [0, steps = {steps}), got {warmup_steps}."
        )
    return optax.warmup_cosine_decay_schedule(
        # from 1/warmup, so that no step is spent at a rate of zero
        init_value=learning_rate / max(warmup_steps, 1),
        peak_value=learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=steps,
        # A tenth is where Chinchilla (arXiv 2203.15556) and Llama (2302.13971) let it end.
        end_value=learning_rate / 10,
    )


def make_optimizer(
    schedule: optax.Schedule, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """AdamW after clipping by global norm; decay acts on matrices, not norms, biases or codebooks.

    Source: AdamW (arXiv 1711.05101); b2 = 0.95 as in Llama (arXiv 2302.13971) section 2.2.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=weight_decay, mask=_is_matrix),
    )


def _is_matrix(tree: PyTree) -> PyTree:
    def decays(path: jax.tree_util.KeyPath, leaf: jax.Array) -> bool:
        name = jax.tree_util.keystr(path)
        return leaf.ndim == 2 and "scales" not in name

    return jax.tree_util.tree_map_with_path(decays, tree)


def make_train_step(
    objective: Objective, optimizer: optax.GradientTransformation, accumulate: int = 1
) -> TrainStep:
    """One step: gradient of the mean loss over the counted tokens of the batch, then `optimizer`.

    Args:
      objective: its scheme and functions; the arrays come with the call.
      accumulate: A; the batch runs as A micro-batches one after the other. B must be a multiple
        of A. Loss and gradient are sums divided once, so the result is that of the whole batch.

    Returns:
      Jitted (state, frozen, batch) -> (state, metrics), the state donated; metrics are f32 []:
      loss (nats a token), accuracy, grad_norm (before clipping), tokens (all in the batch), and
      those of the objective's settling.
    """

    def loss(
        floats: PyTree, trainable: PyTree, frozen: PyTree, batch: Batch
    ) -> tuple[jax.Array, LossSums]:
        model, base = objective.models(_with_floats(trainable, floats), frozen)
        teacher = objective.teacher(frozen)
        sums = batch_loss(model, base, batch, objective.scheme, teacher)
        return sums.loss, sums

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(
        state: TrainState, frozen: PyTree, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        floats = _floats(state.trainable)

        def add(total: PyTree, rows: Batch) -> tuple[PyTree, None]:
            gradient, sums = jax.grad(loss, has_aux=True)(floats, state.trainable, frozen, rows)
            return jax.tree.map(jnp.add, total, (gradient, sums)), None

        zero = jnp.zeros((), jnp.float32)
        start = (jax.tree.map(jnp.zeros_like, floats), LossSums(zero, zero, zero))
        (total, sums), _ = jax.lax.scan(add, start, _micro_batches(batch, accumulate))
        gradient = jax.tree.map(lambda g: g / jnp.maximum(sums.count, 1), total)
        with jax.named_scope("optimizer"):
            updates, optimizer_state = optimizer.update(gradient, state.optimizer, floats)
            floats = optax.apply_updates(floats, updates)
            trainable, settled = objective.settle(_with_floats(state.trainable, floats))
        metrics = {
            "loss": sums.mean,
            "accuracy": sums.accuracy,
            "grad_norm": optax.tree.norm(gradient),
            "tokens": jnp.sum(batch.counts, dtype=jnp.float32),
        }
        return TrainState(state.step + 1, trainable, optimizer_state, state.best), metrics | settled

    return train_step


def _micro_batches(batch: Batch, accumulate: int) -> Batch:
    B = batch.tokens.shape[0]
    if B % accumulate:
        raise ValueError(f"A batch of {B} rows does not divide into {accumulate} micro-batches.")
    return jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
