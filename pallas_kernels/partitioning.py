"""How a kernel's call splits over several devices: rows, inputs and outputs, as a dense dot does.

A kernel is opaque to XLA, which would gather a sharded weight on every device. Here the call is
cut along the mesh axes that its operands already lie on; where the inputs K are split, the
devices' float32 sums are added before the result is rounded.

Letters: M rows, K input and N output features, m codebooks, v weights a code, g weights a scale.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import CodebookTensor

# (x [M, K], weights [K, N_i], dtype of the results) -> [M, N_i]
Multiply = Callable[[jax.Array, tuple[CodebookTensor, ...], jnp.dtype], Sequence[jax.Array]]

Axes = str | tuple[str, ...] | None  # of a mesh, that cut one dimension


def partitioned(multiply: Multiply, dtype: jnp.dtype) -> Callable[..., list[jax.Array]]:
    """`multiply` as a function of (x, weights) that XLA's partitioner can split.

    Weights of the tuple share one format. On a single device this is `multiply` itself.
    """

    @custom_partitioning
    def call(x: jax.Array, weights: tuple[CodebookTensor, ...]) -> list[jax.Array]:
        return list(multiply(x, weights, dtype))

    call.def_partition(
        partition=functools.partial(_partition, multiply, dtype), sharding_rule=_sharding_rule
    )
    return call


def _sharding_rule(mesh: Mesh, operands: Sequence[Any], results: Sequence[Any]):
    """The einsum of the call: x, then codes, codebooks and scales of each weight.

    K is cut at the outermost of its factors, whole groups and whole words of packed codes, which
    the axes of x, codes and scales all begin with.
    """
    del mesh
    (_, K), words, groups = operands[0].shape, operands[1].shape[1], operands[3].shape[0]
    if max(words, groups) % min(words, groups):  # no cut but at both
        return _einsum(len(results), "k", "w", "g", reduction=(), whole=("k", "w", "g"))
    outer, inner = min(words, groups), max(words, groups)
    sizes = {"o": outer, "i": inner // outer, "f": K // inner}
    coarse, fine, all_of_k = (_axis(sizes, names) for names in ("o", "oi", "oif"))
    codes_k, scales_k = (coarse, fine) if words < groups else (fine, coarse)
    # Only factors that are no axis by themselves may have their sizes given.
    axes = (all_of_k, codes_k, scales_k)
    inside = {name: n for name, n in sizes.items() if n > 1 and name not in axes}
    reduction = tuple(name for name in "oi" if sizes[name] > 1)
    rule, factors = _einsum(len(results), *axes, reduction=reduction, whole=("f",))
    return rule, {**factors, **inside}


def _axis(sizes: dict[str, int], names: str) -> str:
    """An axis of the einsum as the product of its factors above 1; `u` for none."""
    names = "".join(name for name in names if sizes[name] > 1)
    return names if len(names) == 1 else f"({' '.join(names)})" if names else "u"


def _einsum(weights: int, x_k: str, codes_k: str, scales_k: str, reduction, whole):
    inputs, outputs = [f"r {x_k}"], []
    for i in range(weights):
        inputs += [f"m{i} {codes_k} n{i}", f"m{i} c{i} v{i}", f"{scales_k} n{i}"]
        outputs.append(f"r n{i}")
    whole = (*whole, *(f"{letter}{i}" for i in range(weights) for letter in "mcv"))
    factors = {"reduction_factors": reduction, "need_replication_factors": whole}
    return f"{', '.join(inputs)} -> {', '.join(outputs)}", factors


def _partition(multiply: Multiply, dtype: jnp.dtype, mesh: Mesh, operands, results):
    """Shardings that agree with each other, and the local call between them.

    Each mesh axis cuts one dimension: K before rows, and rows before N.
    """
    x, weights = operands
    k = weights[0].codes.sharding.spec[1]
    K, spec = x.shape[1], CodebookSpec(*_format(weights[0]))
    if k is not None and not _divides(K, _devices(mesh, k), spec):
        k = None
    row = _without(x.sharding.spec[0], k)
    whole = weights[0].scales.shape[0] == 1  # one scale for all of K is everybody's
    place = lambda *names: NamedSharding(mesh, PartitionSpec(*names))
    inputs, outputs = [place(row, k)], []
    for result in results:
        n = _without(result.sharding.spec[1], row, k)
        inputs += [place(None, k, n), place(), place(None if whole else k, n)]
        outputs.append(place(row, n))

    def local(x: jax.Array, weights: tuple[CodebookTensor, ...]) -> list[jax.Array]:
        if k is None:
            return list(multiply(x, weights, dtype))
        partial = multiply(x, weights, jnp.dtype(jnp.float32))
        return [jax.lax.psum(y, k).astype(dtype) for y in partial]

    structure = jax.tree.structure(operands)
    return mesh, local, outputs, jax.tree.unflatten(structure, inputs)


def _format(w: Any) -> tuple[int, int, int, int]:
    m, size, v = w.codebooks.shape
    b = (size - 1).bit_length()
    K = w.codes.shape[1] * (32 // b) * v
    return m, v, K // w.scales.shape[0], b


def _names(axes: Axes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


def _without(axes: Axes, *taken: Axes) -> Axes:
    """The mesh axes of a dimension that cut none of those in `taken`; None if none is left."""
    used = {name for others in taken for name in _names(others)}
    return tuple(name for name in _names(axes) if name not in used) or None


def _devices(mesh: Mesh, axes: Axes) -> int:
    count = 1
    for name in _names(axes):
        count *= mesh.shape[name]
    return count


def _divides(K: int, devices: int, spec: CodebookSpec) -> bool:
    """Whether each device gets whole groups and whole words."""
    word = spec.vector_length * spec.codes_per_word
    return K % (devices * word) == 0 and (
        spec.group_size == K or K % (devices * spec.group_size) == 0
    )
