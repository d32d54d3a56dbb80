"""How a kernel's call splits over several devices: rows, inputs and outputs, as a dense dot does.

A kernel is opaque to XLA, which would gather a sharded weight on every device. Here the call is
cut along the mesh axes that its operands already lie on; where the inputs K are split, the
devices' float32 sums are added before the result is rounded.

Letters: M rows, K input and N output features, m codebooks, v weights a code, g weights a scale.
"""

import dataclasses
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


def partitioned_weight(
    dequantize: Callable[[CodebookTensor], jax.Array],
) -> Callable[[CodebookTensor], jax.Array]:
    """`dequantize` of a weight to [K, N], as a function that XLA's partitioner can split."""

    @custom_partitioning
    def call(w: CodebookTensor) -> jax.Array:
        return dequantize(w)

    def rule(mesh: Mesh, operands: Sequence[Any], results: Sequence[Any]):
        del mesh
        (_, words, _), (groups, _) = operands[0].shape, operands[2].shape
        axes = _Axes.of(results[0].shape[0], words, groups)
        text = f"m {axes.codes} n, m c v, {axes.scales} n -> {axes.x} n"
        whole = sorted((*axes.whole, "m", "c", "v"), key=text.index)  # in the order of the text
        return text, {"need_replication_factors": tuple(whole), **axes.sizes}

    def partition(mesh: Mesh, operands, result):
        [w] = operands
        k, whole = _cut(mesh, w), w.scales.shape[0] == 1
        n = _without(result.sharding.spec[1], k)
        place = lambda *names: NamedSharding(mesh, PartitionSpec(*names))
        inputs = [place(None, k, n), place(), place(None if whole else k, n)]
        inputs = jax.tree.unflatten(jax.tree.structure(operands), inputs)
        return mesh, dequantize, place(k, n), inputs

    call.def_partition(partition=partition, sharding_rule=rule)
    return call


@dataclasses.dataclass(frozen=True)
class _Axes:
    """How an einsum names the K of its operands.

    K is cut at the outermost of its factors, whole groups and whole words of packed codes, which
    the axes of x, codes and scales all begin with.

    Attributes:
      x, codes, scales: the axis of each that runs along K, with its factors.
      whole: factors that are never cut.
      reduction: the others, over which a product sums.
      sizes: of factors that are no axis by themselves.
    """

    x: str
    codes: str
    scales: str
    whole: tuple[str, ...]
    reduction: tuple[str, ...]
    sizes: dict[str, int]

    @classmethod
    def of(cls, K: int, words: int, groups: int) -> "_Axes":
        """For K inputs in so many packed words and groups."""
        if max(words, groups) % min(words, groups):  # no cut but at both
            return cls("k", "w", "g", ("k", "w", "g"), (), {})
        outer, inner = min(words, groups), max(words, groups)
        sizes = {"o": outer, "i": inner // outer, "f": K // inner}
        coarse, fine, x = (_axis(sizes, names) for names in ("o", "oi", "oif"))
        codes, scales = (coarse, fine) if words < groups else (fine, coarse)
        # Only factors that are no axis by themselves may have their sizes given.
        inside = {name: n for name, n in sizes.items() if n > 1 and name not in (x, codes, scales)}
        reduction = tuple(name for name in "oi" if sizes[name] > 1)
        return cls(x, codes, scales, ("f",), reduction, inside)


def _sharding_rule(mesh: Mesh, operands: Sequence[Any], results: Sequence[Any]):
    """The einsum of the call: x, then codes, codebooks and scales of each weight."""
    del mesh
    (_, K), words, groups = operands[0].shape, operands[1].shape[1], operands[3].shape[0]
    axes = _Axes.of(K, words, groups)
    inputs, outputs, whole = [f"r {axes.x}"], [], axes.whole
    for i in range(len(results)):
        inputs += [f"m{i} {axes.codes} n{i}", f"m{i} c{i} v{i}", f"{axes.scales} n{i}"]
        outputs.append(f"r n{i}")
        whole = (*whole, *(f"{letter}{i}" for letter in "mcv"))
    factors = {"reduction_factors": axes.reduction, "need_replication_factors": whole}
    return f"{', '.join(inputs)} -> {', '.join(outputs)}", {**factors, **axes.sizes}


def _axis(sizes: dict[str, int], names: str) -> str:
    """An axis of the einsum as the product of its factors above 1; `u` for none."""
    names = "".join(name for name in names if sizes[name] > 1)
    return names if len(names) == 1 else f"({' '.join(names)})" if names else "u"


def _partition(multiply: Multiply, dtype: jnp.dtype, mesh: Mesh, operands, results):
    """Shardings that agree with each other, and the local call between them.

    Each mesh axis cuts one dimension: K before rows, and rows before N.
    """
    x, weights = operands
    k = _cut(mesh, weights[0])
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


def _cut(mesh: Mesh, w: Any) -> Axes:
    """The mesh axes that cut the K of a weight; None where a device would get half a word."""
    k = w.codes.sharding.spec[1]
    m, v, g, b = _format(w)
    K = w.codes.shape[1] * (32 // b) * v
    return k if k is None or _divides(K, _devices(mesh, k), CodebookSpec(m, v, g, b)) else None


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
