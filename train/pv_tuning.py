"""PV-Tuning: codes are trained beside the floats of a quantized model, against a dense teacher.

A code has no gradient, but the weights w that it stands for have one. Each linear keeps a buffer
phi, a dense matrix that starts at w and takes the optimizer's steps at the gradient dL/dw: the
straight-through estimator. In every step

    P  codebooks, scales and all other floats take a step of their own optimizer,
    V  of the groups of v weights, the share tau whose |phi - w|^2 is largest gets the codes that
       come closest to phi; all other codes stay.

Only small changes of few codes keep to the region where the gradient holds: hence tau.

Letters: K input and N output features, m codebooks, v weights a code, J = K // v code positions,
g weights a scale, k groups chosen of the J * N.
Source: PV-Tuning (arXiv 2405.14852), the linearized V step on a subspace; names and constants are
those of its authors' code (Vahe1994/AQLM).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxcodec.models.layers import Codes
from jaxcodec.models.scheme import CONVENTIONAL
from jaxcodec.models.transformer import Model
from jaxcodec.pack import pack_codes, unpack_codes
from jaxcodec.quantize.beam_search import beam_search
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import CodebookTensor, dequantize
from jaxcodec.train.step import Objective, PyTree, check_teacher, split_floats

# Groups that tell how far codes lie apart: a mean of so many is known to one or two per cent.
SAMPLED_GROUPS = 4096


@dataclasses.dataclass(frozen=True)
class PVOptions:
    """How codes are trained; the floats are `TrainOptions`' matter.

    Attributes:
      max_code_change: tau, the largest share of a linear's groups that a step gives other codes,
        rounded up to whole groups; 0 trains floats alone. The authors' max_code_change_per_step.
      code_learning_rate: peak rate of a buffer, in units of `code_spacing`. The authors' code_lr is
        relative to the norm of the matrix alone, as in LAMB (arXiv 1904.00962): 0.01 for 2 bits and
        thousands of steps of a million tokens. A code changes once its buffer has left the code's
        cell. At 3 and 4 bits cells are smaller, and steps of that size would be noise; at 2 bits
        0.06 is 0.02 to 0.03 of the norm, for the hundreds of steps that this is meant for.
      code_decay: decay of the mean square of a buffer's gradient. The authors' code_beta2; their
        code_beta1 is 0, so that no mean is kept.
      beam: hypotheses of the search for the codes of a group; it is exact for m = 1. The authors'
        beam_size.
      delta_decay: share of phi - w that is forgotten after each step: 0 keeps the buffers, 1 starts
        them anew at w. The authors' delta_decay.

    Raises:
      ValueError: a field out of range.
    """

    max_code_change: float = 0.01
    code_learning_rate: float = 0.06
    code_decay: float = 0.95
    beam: int = 5
    delta_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_code_change", "delta_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}.")
        if not 0 <= self.code_decay < 1:
            raise ValueError(
                f"code_decay must lie in [0, 1), got {self.code_decay}: with 1 no gradient would "
                "ever count."
            )
        if not 0 < self.code_learning_rate < math.inf:
            raise ValueError(
                f"code_learning_rate must be positive and finite, got {self.code_learning_rate}."
            )
        if self.beam < 1:
            raise ValueError(f"beam must be at least 1, got {self.beam}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PVWeights:
    """What a run trains; `codes` and `buffers` by the path of their linear.

    Attributes:
      floats: float32 masters of codebooks, scales and all that is not quantized.
      codes: uint32 as in `CodebookTensor`.
      buffers: phi, f32 [K, N].
    """

    floats: nnx.State
    codes: dict[str, jax.Array]
    buffers: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PVTuning(Objective):
    """An objective whose steps end with new codes.

    Attributes:
      options: how codes are trained.
      spacings: `code_spacing` of each linear at the start, by its path.
      quantized: pure `PVWeights` -> the model that they are, in its own dtype.
    """

    options: PVOptions
    spacings: dict[str, float]
    quantized: Callable[[PVWeights], Model]

    def artifact(self, trainable: PVWeights) -> Model:
        """The quantized model."""
        return self.quantized(trainable)

    def optimizer(
        self, optimizer: optax.GradientTransformation, schedule: optax.Schedule
    ) -> optax.GradientTransformation:
        """`optimizer` for the floats, LAMB without momentum for the buffers."""
        rate = self.options.code_learning_rate
        buffers = optax.chain(
            optax.scale_by_rms(self.options.code_decay, eps_in_sqrt=False, bias_correction=True),
            optax.scale_by_trust_ratio(),
            optax.stateless(self._in_spacings),
            optax.scale_by_learning_rate(lambda n: rate * schedule(n)),
        )
        return optax.partition({"floats": optimizer, "buffers": buffers}, _fields)

    def _in_spacings(self, updates: PyTree, _: PyTree | None = None) -> PyTree:
        """Updates of buffers, of the norm of their matrices, times its linear's spacing each."""
        buffers = {name: self.spacings[name] * x for name, x in updates.buffers.items()}
        return dataclasses.replace(updates, buffers=buffers)

    def settle(self, trainable: PVWeights) -> tuple[PVWeights, dict[str, jax.Array]]:
        """The V step. Metric code_change: the share of all groups that got other codes."""
        tensors = codebook_tensors(self.quantized(trainable))
        codes, buffers, changed = {}, {}, jnp.zeros((), jnp.int32)
        with jax.named_scope("v_step"):
            for names in _alike(tensors):
                w = _stack([tensors[name] for name in names])
                phi = _stack([trainable.buffers[name] for name in names])
                # One at a time, compiled once.
                found = jax.lax.map(lambda x: recode(*x, self.options), (w, phi))
                changed += jnp.sum(found[-1])
                for i, name in enumerate(names):
                    codes[name], buffers[name] = found[0][i], found[1][i]
        groups = sum(math.prod(w.shape) // w.spec.vector_length for w in tensors.values())
        return PVWeights(trainable.floats, codes, buffers), {"code_change": changed / groups}

    def manifest(self) -> dict[str, Any]:
        """The options, and what the rate of the codes is relative to."""
        return {**dataclasses.asdict(self.options), "code_learning_rate_unit": "code_spacing"}


def pv_tuning(model: Model, teacher: Model, options: PVOptions = PVOptions()) -> PVTuning:
    """Codes and floats of a quantized `model`, drawn to the distribution of `teacher`.

    The loss is that of `distillation`: KL(teacher || model) in nats a token. Beside codes and
    floats it takes two dense float32 matrices a linear, the buffer and its gradient's mean square.

    Raises:
      ValueError: `model` is dense, or `teacher` does not know its vocabulary or its context.
    """
    check_teacher(model, teacher)
    floats, rest, merge = split_floats(model)
    tensors = codebook_tensors(model)

    def quantized(weights: PVWeights) -> Model:
        codes: Any = {(*_path(name), "codes"): Codes(x) for name, x in weights.codes.items()}
        held = dataclasses.replace(rest, weights=nnx.from_flat_state(codes))
        return merge(weights.floats, held)

    def models(weights: PVWeights, teacher: Model) -> tuple[Model, None]:
        return _straight_through(quantized(weights), weights.buffers), None

    return PVTuning(
        scheme=CONVENTIONAL,
        trainable=PVWeights(
            floats,
            {name: w.codes for name, w in tensors.items()},
            {name: dequantize(w, jnp.float32) for name, w in tensors.items()},
        ),
        frozen=teacher,
        models=models,
        teacher=lambda teacher: teacher,
        options=options,
        spacings={name: float(code_spacing(w)) for name, w in tensors.items()},
        quantized=quantized,
    )


def codebook_tensors(model: Model) -> dict[str, CodebookTensor]:
    """The quantized weights of a model, by the path of their linear."""
    variables = dict(nnx.to_flat_state(model.weights))

    def tensor(path: tuple[Any, ...]) -> CodebookTensor:
        fields = ("codes", "codebooks", "scales")
        return CodebookTensor(*(variables[*path, field].get_value() for field in fields))

    return {name: tensor(_path(name)) for name, _ in model.specs}


@jax.jit
def code_spacing(w: CodebookTensor) -> jax.Array:
    """How far a code lies from the next, f32 []: of a group of weights, relative to its norm.

    The distance from a code's vector to the nearest other vector of its codebook, root mean square
    over the groups, or 4096 of many; the least of all codebooks, over the norm of the groups'
    unscaled vectors. Codebooks whose vectors are all alike do not count; 0 if
    none is left, where codes say nothing. Near 0.5 and 0.35 for one and two codebooks of 2 bits a
    weight, 0.2 for 3 bits, 0.12 for 4.
    """
    codes_mjn = unpack_codes(w.codes, w.spec.bits)
    books_msv = w.codebooks.astype(jnp.float32)
    books_msv /= jnp.maximum(jnp.max(jnp.abs(books_msv)), jnp.finfo(jnp.float32).tiny)
    squares = [_to_next(*pair) for pair in zip(books_msv, codes_mjn, strict=True)]
    ones = dataclasses.replace(w, codebooks=books_msv, scales=jnp.ones(w.scales.shape))
    norm = w.spec.vector_length * jnp.mean(jnp.square(dequantize(ones, jnp.float32)))
    least = jnp.min(jnp.stack(squares))
    return jnp.where(jnp.isfinite(least) & (norm > 0), jnp.sqrt(least / norm), 0.0)


def _to_next(book_sv: jax.Array, codes_jn: jax.Array) -> jax.Array:
    """Mean square of the distances from groups' vectors to the next; inf if there is none."""
    codes = codes_jn.reshape(-1)
    codes = codes[:: -(-len(codes) // SAMPLED_GROUPS)]

    def nearest(i: jax.Array) -> jax.Array:
        square_s = jnp.sum(jnp.square(book_sv - book_sv[i][None]), axis=1)
        return jnp.min(jnp.where(square_s > 0, square_s, jnp.inf))

    return jnp.mean(jax.lax.map(nearest, codes, batch_size=64))


@functools.partial(jax.jit, static_argnames="options")
def recode(
    w: CodebookTensor, phi: jax.Array, options: PVOptions
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The V step of one linear: codes closer to the buffer in the groups farthest from it.

    At most k = ceil(max_code_change * J * N) groups get other codes, and none ends farther away.

    Args:
      w: the weight [K, N] before the step.
      phi: its buffer, f32 [K, N].

    Returns:
      (packed codes, the buffer after the step, int32 [] number of groups whose codes changed).
    """
    spec, (K, N) = w.spec, w.shape
    v, m = spec.vector_length, spec.num_codebooks
    k = math.ceil(options.max_code_change * (K // v * N))
    if not k:
        return w.codes, phi, jnp.zeros((), jnp.int32)
    delta_jvn = (phi - dequantize(w, jnp.float32)).reshape(-1, v, N)
    _, chosen = jax.lax.top_k(jnp.sum(jnp.square(delta_jvn), axis=1).reshape(-1), k)
    j, n = chosen // N, chosen % N
    codes_mjn = unpack_codes(w.codes, spec.bits)
    old_mk = codes_mjn[:, j, n]
    # A group is a matrix [v, 1] with one code position and one scale; all k are its columns.
    new_mk = beam_search(
        phi.reshape(-1, v, N)[j, :, n].T,
        jnp.eye(v),
        old_mk[:, None],
        w.codebooks.astype(jnp.float32),
        w.scales.astype(jnp.float32)[j // (spec.group_size // v), n][None],
        jax.random.key(0),  # of the order of the positions: there is one
        CodebookSpec(m, v, v, spec.bits),
        options.beam,
    )[:, 0]
    changed = jnp.sum(jnp.any(new_mk != old_mk, axis=0), dtype=jnp.int32)
    new = dataclasses.replace(w, codes=pack_codes(codes_mjn.at[:, j, n].set(new_mk), spec.bits))
    if options.delta_decay:
        phi += options.delta_decay * (dequantize(new, jnp.float32) - phi)
    return new.codes, phi, changed


def changed_share(before: Model, after: Model) -> float:
    """Share of the groups of all linears whose codes differ between two models of one format."""
    old, new = codebook_tensors(before), codebook_tensors(after)
    changed = groups = 0
    for name, w in old.items():
        a, b = (unpack_codes(x.codes, w.spec.bits) for x in (w, new[name]))
        changed += int(jnp.sum(jnp.any(a != b, axis=0)))
        groups += a[0].size
    return changed / groups


def _straight_through(model: Model, buffers: dict[str, jax.Array]) -> Model:
    """`model` with dense linears of the same values, whose gradient also goes to `buffers`."""
    variables = dict(nnx.to_flat_state(model.weights))
    for name, w in codebook_tensors(model).items():
        path, phi = _path(name), buffers[name]
        kernel = dequantize(w, jnp.float32) + (phi - jax.lax.stop_gradient(phi))
        for field in ("codes", "codebooks", "scales"):
            del variables[*path, field]
        variables[*path, "kernel"] = nnx.Param(kernel.astype(w.dtype))
    return Model(model.config, nnx.from_flat_state(variables), (), model.bank)


def _alike(tensors: dict[str, CodebookTensor]) -> list[list[str]]:
    """Names of linears by shape and format."""
    found: dict[Any, list[str]] = {}
    for name, w in tensors.items():
        found.setdefault((w.shape, w.spec), []).append(name)
    return list(found.values())


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _fields(weights: PyTree) -> PyTree:
    """For each leaf the field of `PVWeights` that it is in."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].name, weights)


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))
