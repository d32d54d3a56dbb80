"""Codebooks of one matrix for the inputs it sees: k-means, then floats and codes in turn.

Minimises tr(dW^T H dW) = sum over tokens of |x dW|^2 / tokens, where dW = W - W' and
H = X^T X / tokens, in rounds of

1. Adam on codebooks and scales at fixed codes (AQLM section 3.2, phase 2),
2. beam search over the codes at fixed codebooks and scales (phase 1).

Without data H = I, and the objective is the squared error of the weights.

Letters: W [K, N]; m codebooks of S = 2**b centroids, v weights a code, g weights a scale;
J = K // v code positions, G = K // g groups.
Source: AQLM (arXiv 2401.06118) section 3; the scales of CodeGEMM (arXiv 2512.17970).
"""

import dataclasses
import functools
import math
import time

import jax
import jax.numpy as jnp
import optax

from jaxcodec.pack import pack_codes, unpack_codes
from jaxcodec.quantize.beam_search import PRECISION, beam_search
from jaxcodec.quantize.kmeans import ITERATIONS, ROUNDS, quantize_kmeans, stored
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import CodebookTensor, dequantize

# Autotuning every float32 product over Triton's tilings took 10 s a shape on an H200, to pick what
# cuBLAS has anyway.
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}

# Adam's decay rates in the authors' code (Vahe1994/AQLM): no momentum, and AMSGrad.
BETAS = (0.0, 0.95)
# A round is worth its search: from the eighth round on 5 steps of Adam lead to the same error as
# AQLM's 100, and fitting the floats completely leads to no smaller one (docs/experiments.md).
# Rounds late in the run gain some 0.3 %: AQLM's tolerance of 0.01 would stop too early.
STEPS, LEARNING_RATE, TOLERANCE = 5, 1e-2, 2e-3


@dataclasses.dataclass(frozen=True)
class AdditiveOptions:
    """How much work a matrix is worth.

    Attributes:
      iterations: most Lloyd iterations for each codebook.
      refinements: rounds of least squares over all codebooks and scales after k-means.
      rounds: most rounds of Adam and beam search.
      steps: Adam steps a round.
      learning_rate: of Adam, relative to the root mean square of all codebooks, or all scales.
      beam: hypotheses a column in the search.
      tolerance: stop after a round that lowers the objective by less than this fraction of it.
      damping: added to the diagonal of H, relative to its mean, so that inputs that never
        occurred still count for something.

    Raises:
      ValueError: a field out of range.
    """

    iterations: int = ITERATIONS
    refinements: int = ROUNDS
    rounds: int = 16
    steps: int = STEPS
    learning_rate: float = LEARNING_RATE
    beam: int = 1
    tolerance: float = TOLERANCE
    damping: float = 1e-4

    def __post_init__(self) -> None:
        least = {"iterations": 1, "refinements": 0, "rounds": 0, "steps": 0, "beam": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if type(value) is not int or value < smallest:
                raise ValueError(
                    f"{name} must be a whole number, at least {smallest}, got {value!r}."
                )
        for name in ("learning_rate", "tolerance", "damping"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")


PRESETS = {
    "kmeans": AdditiveOptions(rounds=0),
    "fast": AdditiveOptions(rounds=4),
    "default": AdditiveOptions(),
    "best": AdditiveOptions(rounds=40, beam=4, tolerance=TOLERANCE / 4),
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step on the way.

    Attributes:
      name: what was done: `kmeans`, `adam`, `beam_search` or `rounded`.
      error: tr(dW^T H dW) / tr(W^T H W) after it.
      seconds: what it took; the first of its shape compiles.
    """

    name: str
    error: float
    seconds: float = dataclasses.field(compare=False)


def quantize_additive(
    W: jax.Array,
    H: jax.Array | None,
    spec: CodebookSpec,
    key: jax.Array,
    options: AdditiveOptions = PRESETS["default"],
    dtype: jnp.dtype = jnp.bfloat16,
) -> tuple[CodebookTensor, tuple[Stage, ...]]:
    """The matrix W [K, N] as codes, codebooks and scales for inputs of the Hessian H.

    Columns of W may be spread over devices; codebooks are then the same on all of them.

    Args:
      W: any float dtype; the arithmetic is float32.
      H: [K, K], X^T X / tokens; None for no data, H = I.
      spec: the format.
      key: PRNG key of all random choices.
      options: how much work.
      dtype: of codebooks and scales.

    Returns:
      (the tensor, the stages with their errors: up to rounding none is above the one before, but
      that the last one is for floats rounded to `dtype`).

    Raises:
      ValueError: as `quantize_kmeans`; H is not a Hessian of W's inputs: its shape, a value that
        is not finite, a negative diagonal, or no input at all.
    """
    start = time.perf_counter()
    start_key, search_key = jax.random.split(key)
    w = quantize_kmeans(W, spec, start_key, options.iterations, options.refinements, dtype)
    H = damped(H, w.shape[0], options.damping)
    return refine(W, H, w, search_key, options, start)


def refine(
    W: jax.Array,
    H: jax.Array,
    w: CodebookTensor,
    key: jax.Array,
    options: AdditiveOptions = PRESETS["default"],
    start: float | None = None,
) -> tuple[CodebookTensor, tuple[Stage, ...]]:
    """A codebook tensor brought nearer to W by rounds of Adam and beam search.

    Args:
      W: float [K, N].
      H: f32 [K, K].
      w: the start, [K, N].
      key: PRNG key of the orders of the search.
      options: rounds and what is in them.
      start: when the work on `w` began, by `time.perf_counter`; None for now.

    Returns:
      (the tensor in the dtype of `w`, its stages; the first is the start).

    Raises:
      ValueError: an objective that is NaN or infinite, with the stage it was found after.
    """
    spec, dtype = w.spec, w.dtype
    W = W.astype(jnp.float32)
    codes, books, scales = w.codes, w.codebooks.astype(jnp.float32), w.scales.astype(jnp.float32)
    energy = _compiled_energy(W, H)
    whole = _finite(energy, "tr(W^T H W)")
    last = time.perf_counter() if start is None else start

    def stage(name: str) -> Stage:
        nonlocal last
        error = _compiled_objective(W, H, CodebookTensor(codes, books, scales))
        error = _finite(error, f"tr(dW^T H dW) after {name}")  # waits for the device
        before, last = last, time.perf_counter()
        return Stage(name, error / whole if error > 0 else 0.0, last - before)

    stages = [stage("kmeans")]
    for i in range(options.rounds):
        before = stages[-1].error
        books, scales = fit_floats(
            W, H, energy, codes, books, scales, options.steps, options.learning_rate
        )
        stages.append(stage("adam"))
        codes = _search(W, H, codes, books, scales, jax.random.fold_in(key, i), spec, options.beam)
        stages.append(stage("beam_search"))
        if not stages[-1].error < (1 - options.tolerance) * before:
            break
    if options.rounds:
        # The codes make up for the rounding of what they point at.
        books, scales = stored(books, dtype), stored(scales, dtype)
        last_key = jax.random.fold_in(key, options.rounds)
        codes = _search(W, H, codes, books, scales, last_key, spec, options.beam)
        stages.append(stage("rounded"))
    w = CodebookTensor(codes, books.astype(dtype), scales.astype(dtype)).check("W")
    return w, tuple(stages)


def objective(W: jax.Array, H: jax.Array, w: CodebookTensor) -> jax.Array:
    """f32 [], tr(dW^T H dW) with dW = W - dequantize(w)."""
    return _energy(W.astype(jnp.float32) - dequantize(w, jnp.float32), H)


def _energy(W: jax.Array, H: jax.Array) -> jax.Array:
    """f32 [], tr(W^T H W)."""
    return jnp.sum(W * jnp.dot(H, W, precision=PRECISION))


# Compiler options belong to an outermost jit, and `objective` may be within another.
_compiled_objective, _compiled_energy = (
    jax.jit(function, compiler_options=COMPILER_OPTIONS) for function in (objective, _energy)
)


@functools.partial(jax.jit, static_argnames="steps", compiler_options=COMPILER_OPTIONS)
def fit_floats(
    W: jax.Array,
    H: jax.Array,
    energy: jax.Array,
    codes: jax.Array,
    books: jax.Array,
    scales: jax.Array,
    steps: int,
    learning_rate: float,
) -> tuple[jax.Array, jax.Array]:
    """Codebooks and scales of the least objective that Adam meets, the first ones included.

    Args:
      W: f32 [K, N].
      H: f32 [K, K].
      energy: f32 [], tr(W^T H W): the objective's unit.
      codes: packed uint32, fixed.
      books: f32 [m, S, v].
      scales: f32 [G, N].
      steps: Adam steps.
      learning_rate: relative to the root mean square of books, or scales.
    """
    # In units of their own size, so that one learning rate fits every matrix.
    units = tuple(_power_of_two(jnp.sqrt(jnp.mean(jnp.square(x)))) for x in (books, scales))
    # A scale's share of the relative objective is of order one, far above Adam's epsilon.
    unit = scales.size / jnp.where(energy > 0, energy, 1.0)
    optimizer = optax.amsgrad(learning_rate, b1=BETAS[0], b2=BETAS[1])

    def loss_and_gradient(params):
        def decode(params):
            books, scales = jax.tree.map(jnp.multiply, params, units)
            return dequantize(CodebookTensor(codes, books, scales), jnp.float32)

        W_, pull = jax.vjp(decode, params)
        dW = W - W_
        # The one product with H serves both. On a GPU it is in TF32, four times faster: the error,
        # 3e-4 of single terms, is lost in sums over all weights.
        P = jnp.dot(H, dW, precision="high")
        (gradient,) = pull(-2 * unit * P)
        return unit * jnp.sum(dW * P), gradient

    def step(_, state):
        params, adam, best, least = state
        loss, gradient = loss_and_gradient(params)
        best = jax.tree.map(lambda x, y: jnp.where(loss < least, x, y), params, best)
        updates, adam = optimizer.update(gradient, adam, params)
        return optax.apply_updates(params, updates), adam, best, jnp.minimum(loss, least)

    with jax.named_scope("adam"):
        params = jax.tree.map(jnp.divide, (books, scales), units)
        state = (params, optimizer.init(params), params, jnp.float32(jnp.inf))
        params, _, best, least = jax.lax.fori_loop(0, steps, step, state)
        loss, _ = loss_and_gradient(params)
        best = jax.tree.map(lambda x, y: jnp.where(loss < least, x, y), params, best)
        return jax.tree.map(jnp.multiply, best, units)


@functools.partial(jax.jit, static_argnames=("spec", "beam"), compiler_options=COMPILER_OPTIONS)
def _search(
    W: jax.Array,
    H: jax.Array,
    codes: jax.Array,
    books: jax.Array,
    scales: jax.Array,
    key: jax.Array,
    spec: CodebookSpec,
    beam: int,
) -> jax.Array:
    """Packed codes in, packed codes out."""
    codes_mjn = beam_search(W, H, unpack_codes(codes, spec.bits), books, scales, key, spec, beam)
    return pack_codes(codes_mjn, spec.bits)


def damped(H: jax.Array | None, K: int, damping: float) -> jax.Array:
    """f32 [K, K], symmetric and with `damping` times the mean of the diagonal added to it.

    None stands for the identity. A singular H, of fewer tokens than inputs or of inputs that are
    always zero, thereby still says something of every weight (GPTQ, arXiv 2210.17323, section
    3.3, step 3).

    Raises:
      ValueError: see `quantize_additive`.
    """
    if H is None:
        return jnp.eye(K)
    H = jnp.asarray(H, jnp.float32)
    if H.shape != (K, K):
        raise ValueError(f"H must be [K, K] with K = {K}, the inputs of W, got {list(H.shape)}.")
    if bad := int(jnp.sum(~jnp.isfinite(H))):
        raise ValueError(
            f"H holds {bad} values that are NaN or infinite: the calibration inputs do, or they "
            "are too large to be squared in float32."
        )
    diagonal = jnp.diagonal(H)
    least, mean = float(jnp.min(diagonal)), float(jnp.mean(diagonal))
    if least < 0:
        raise ValueError(
            f"H must be X^T X / tokens, and the least value of its diagonal is {least:.3g}."
        )
    if mean == 0:
        raise ValueError(
            "H must be X^T X / tokens of inputs that are not all zero, and its diagonal is 0. "
            "Leave a linear dense that is never given anything."
        )
    return (H + H.T) / 2 + damping * mean * jnp.eye(K)


def _finite(x: jax.Array, what: str) -> float:
    """The number x, refused if it is none."""
    value = float(x)
    if not math.isfinite(value):
        raise ValueError(
            f"{what} is {value}: weights or inputs are too large for products in float32; check "
            "the model and the calibration data."
        )
    return value


def _power_of_two(x: jax.Array) -> jax.Array:
    """The power of two at or below x > 0; 1 for 0."""
    return jnp.where(x > 0, jnp.exp2(jnp.floor(jnp.log2(x))), 1.0)
