"""LoRA adapters: one alone, as it is trained and stored, and many in a model's bank, as served.

    y = x W + (alpha / rank) * (x A) B          Source: LoRA (arXiv 2106.09685) equation 3

Letters: K input and N output features of a linear, R rank.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxcodec.checkpoints.peft import LoraCheckpoint, read_adapter, write_adapter
from jaxcodec.models.layers import AdapterBank
from jaxcodec.models.transformer import Model, abstract_model, linear_shapes

# k_proj and v_proj write the cache: an adapter on them cannot share it.
CACHE_WRITERS = ("k_proj", "v_proj")
ICARUS_TARGETS = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weights"], meta_fields=["rank", "alpha"]
)
@dataclasses.dataclass(frozen=True)
class Adapter:
    """One LoRA, as PEFT stores it: a trainable pytree.

    Attributes:
      weights: for each path such as `layers.0.self_attn.q_proj`, (A [K, R], B [R, N]).
      rank: R.
      alpha: the product x A B is scaled by alpha / rank.

    Raises:
      ValueError: a rank that is no whole number from 1 on, or an alpha that is not finite.
    """

    weights: dict[str, tuple[jax.Array, jax.Array]]
    rank: int
    alpha: float

    def __post_init__(self) -> None:
        rank, alpha = self.rank, self.alpha
        if not isinstance(rank, int) or rank < 1 or not math.isfinite(alpha):
            raise ValueError(
                f"An adapter's rank must be 1 or more and its alpha finite, got {rank}, {alpha}."
            )

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the linears that it changes, such as `q_proj`, sorted."""
        return tuple(sorted({path.rsplit(".", 1)[-1] for path in self.weights}))

    @property
    def writes_cache(self) -> bool:
        """Whether it touches a linear that makes keys or values."""
        return any(name in CACHE_WRITERS for name in self.targets)


def check_icarus(adapter: Adapter) -> None:
    """Refuse an adapter that cannot read a shared cache.

    Raises:
      ValueError: it touches k_proj or v_proj, whose output is the cache.
    """
    touched = [name for name in CACHE_WRITERS if name in adapter.targets]
    if touched:
        raise ValueError(
            f"The adapter changes {' and '.join(touched)}, which write the shared KV cache; an "
            f"icarus adapter may change {', '.join(ICARUS_TARGETS)}. Serve it as conventional."
        )


def init_adapter(
    model: Model,
    key: jax.Array,
    rank: int = 16,
    alpha: float = 32.0,
    targets: tuple[str, ...] = ICARUS_TARGETS,
    dtype: jnp.dtype = jnp.float32,
) -> Adapter:
    """A new adapter for `model`: A random, B zero, so that it starts as the identity.

    A is uniform in +-1/sqrt(K), as PEFT's (Kaiming with a = sqrt(5)).
    """
    if unknown := sorted(set(targets) - set(ALL_TARGETS)):
        raise ValueError(f"Unknown targets {unknown}; known are {', '.join(ALL_TARGETS)}.")
    weights = {}
    for i, (path, (K, N)) in enumerate(linear_shapes(model.config)):
        if path.rsplit(".", 1)[-1] in targets:
            a_kr = jax.random.uniform(
                jax.random.fold_in(key, i), (K, rank), dtype, -(K**-0.5), K**-0.5
            )
            weights[path] = (a_kr, jnp.zeros((rank, N), dtype))
    return Adapter(weights, rank, float(alpha))


def load_adapter(directory: str | Path, model: Model) -> Adapter:
    """Read a PEFT adapter made for a model of this shape.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the file is damaged, holds an unexpected key or an option that is not supported,
        or changes a linear that `model` does not have in that shape; it is named.
    """
    stored = read_adapter(directory)
    shapes = dict(linear_shapes(model.config))
    weights = {}
    for module, (a_rk, b_nr) in stored.weights.items():
        path = module.removeprefix("model.")
        came = (a_rk.shape[1], b_nr.shape[0])
        if shapes.get(path) != came:
            expected = shapes.get(path, "no such linear")
            raise ValueError(
                f"{directory}: {module} is adapted from {came[0]} to {came[1]} features, "
                f"the model has {expected}."
            )
        weights[path] = (jnp.asarray(a_rk.T), jnp.asarray(b_nr.T))
    return Adapter(weights, stored.rank, stored.alpha)


def save_adapter(directory: str | Path, adapter: Adapter, base_name: str | None = None) -> None:
    """Write an adapter as PEFT does, so that PEFT and `load_adapter` read it back.

    Args:
      base_name: name or path of the base model, for whoever finds the adapter.
    """
    weights = {
        f"model.{path}": (np.asarray(a).T, np.asarray(b).T)
        for path, (a, b) in adapter.weights.items()
    }
    write_adapter(directory, LoraCheckpoint(weights, adapter.rank, adapter.alpha, base_name))


def with_bank(model: Model, bank: AdapterBank | None) -> Model:
    """The model with room for adapters, all zero; any bank that it had is dropped."""
    flat = dict(nnx.to_flat_state(model.weights))
    target = abstract_model(model.config, model.dtype, model.specs, bank)
    filled = []
    for path, variable in nnx.to_flat_state(target.weights):
        if isinstance(variable, nnx.LoRAParam):
            shape = variable.get_value()
            variable = nnx.LoRAParam(jnp.zeros(shape.shape, shape.dtype))
        else:
            variable = flat[path]
        filled.append((path, variable))
    return Model(model.config, nnx.from_flat_state(filled), model.specs, bank)


def set_adapter(model: Model, adapter: Adapter | None, slot: int | jax.Array) -> Model:
    """The model with `adapter` in `slot` of its bank; None clears the slot.

    Pure and differentiable in the adapter: training puts its adapter into a bank of one slot.

    Raises:
      ValueError: no bank, a rank beyond the bank's, no weights, a target without room, or shapes
        other than [K, R] and [R, N].
    """
    bank = _check_fits(model, adapter)
    if isinstance(slot, int) and not 0 <= slot < bank.slots:
        raise ValueError(f"There is no slot {slot}: the bank has {bank.slots} slots.")
    given = {} if adapter is None else dict(adapter.weights)
    scale = 0.0 if adapter is None else adapter.alpha / adapter.rank
    filled = []
    for path, variable in nnx.to_flat_state(model.weights):
        if isinstance(variable, nnx.LoRAParam):
            linear, name = ".".join(map(str, path[:-1])), str(path[-1])
            stack = variable.get_value()
            row = _padded(given.get(linear), name, scale, stack, bank.rank)
            variable = nnx.LoRAParam(stack.at[slot].set(row.astype(stack.dtype)))
        filled.append((path, variable))
    return Model(model.config, nnx.from_flat_state(filled), model.specs, bank)


def bank_positions(model: Model) -> list[int]:
    """Where, among `jax.tree.leaves(model)`, the arrays of its bank are."""
    is_variable = lambda x: isinstance(x, nnx.Variable)
    variables = jax.tree.leaves(model, is_leaf=is_variable)
    return [i for i, v in enumerate(variables) if isinstance(v, nnx.LoRAParam)]


def slot_values(model: Model, adapter: Adapter | None) -> list[np.ndarray]:
    """What `set_adapter` would write to each array of the bank, in order, on the host.

    Raises:
      ValueError: as `set_adapter`, or a value that is not finite in the bank's type.
    """
    bank = _check_fits(model, adapter)
    given = {} if adapter is None else jax.tree.map(np.asarray, adapter.weights)
    scale = 0.0 if adapter is None else adapter.alpha / adapter.rank
    values = []
    for path, variable in nnx.to_flat_state(model.weights):
        if isinstance(variable, nnx.LoRAParam):
            linear, name = ".".join(map(str, path[:-1])), str(path[-1])
            stack = variable.get_value()
            value = _padded(given.get(linear), name, scale, stack, bank.rank, np)
            value = value.astype(stack.dtype)
            if not np.all(np.isfinite(value.astype(np.float32))):
                raise ValueError(f"The adapter holds NaN or infinity in {name} of {linear}.")
            values.append(value)
    return values


@functools.partial(jax.jit, donate_argnames=("stacks",))
def write_slot(
    stacks: list[jax.Array], values: list[np.ndarray], slot: int | jax.Array
) -> list[jax.Array]:
    """The arrays of a bank with `slot_values` in a slot; compiled once for a bank."""
    return [stack.at[slot].set(value) for stack, value in zip(stacks, values, strict=True)]


def _check_fits(model: Model, adapter: Adapter | None) -> AdapterBank:
    bank = model.bank
    if bank is None:
        raise ValueError("The model has no adapter bank; make one with `with_bank`.")
    if adapter is None:
        return bank
    if not adapter.weights:
        raise ValueError("The adapter holds no weights.")
    if adapter.rank > bank.rank:
        raise ValueError(
            f"Adapter of rank {adapter.rank} in a bank of rank {bank.rank}: make the bank wider."
        )
    if missing := sorted(set(adapter.targets) - set(bank.targets)):
        raise ValueError(f"The adapter changes {missing}, the bank has room for {bank.targets}.")
    shapes = dict(linear_shapes(model.config))
    if unknown := sorted(set(adapter.weights) - set(shapes)):
        raise ValueError(f"The adapter changes {unknown}, which the model does not have.")
    for path, (a_kr, b_rn) in adapter.weights.items():
        K, N = shapes[path]
        expected = (K, adapter.rank), (adapter.rank, N)
        if (a_kr.shape, b_rn.shape) != expected:
            raise ValueError(
                f"{path}: A and B must be {list(expected[0])} and {list(expected[1])} for rank "
                f"{adapter.rank}, got {list(a_kr.shape)} and {list(b_rn.shape)}."
            )
    return bank


def _padded(
    pair: tuple[jax.Array, jax.Array] | None,
    name: str,
    scale: float,
    stack: jax.Array,
    rank: int,
    numpy: Any = jnp,
) -> Any:
    """A [K, R] or scaled B [R, N], padded with zeros to the bank's rank; by jnp or numpy."""
    if pair is None:
        return numpy.zeros(stack.shape[1:], stack.dtype)
    value, axis = (pair[0], 1) if name == "lora_a" else (pair[1] * scale, 0)
    pad = [(0, 0), (0, 0)]
    pad[axis] = (0, rank - value.shape[axis])
    return numpy.pad(value, pad)
