"""Post-training quantization of a loaded model: every linear of its blocks becomes codebooks.

Embeddings, norms and the head stay as they are. Data-free: k-means of each matrix by itself.
Letters: K input and N output features.
"""

import contextlib
import time

import jax
from flax import nnx

from jaxcodec.models.layers import Codes
from jaxcodec.models.transformer import Model, linear_shapes
from jaxcodec.quantize.kmeans import ITERATIONS, ROUNDS, quantize_kmeans, relative_error
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import CodebookTensor
from jaxcodec.train.progress import progress
from jaxcodec.train.quantization_report import LinearReport, QuantizationReport


def quantize_model(
    model: Model,
    spec: CodebookSpec,
    key: jax.Array | None = None,
    *,
    iterations: int = ITERATIONS,
    rounds: int = ROUNDS,
    quiet: bool = False,
) -> tuple[Model, QuantizationReport]:
    """The model with q, k, v, o, gate, up and down projections of all blocks quantized by k-means.

    Args:
      model: dense; biases and a bank of adapters stay as they are.
      spec: format of all linears.
      key: PRNG key; None for `jax.random.key(0)`. The same key gives the same model.
      iterations: see `quantize_kmeans`.
      rounds: see `quantize_kmeans`.
      quiet: show no progress.

    Raises:
      ValueError: a linear that is already quantized, that `spec` cannot hold, or that has a
        value that is not finite; it is named. Shapes are checked before the work begins.
    """
    names = _names(model, spec)
    key = jax.random.key(0) if key is None else key
    variables = dict(nnx.to_flat_state(model.weights))
    linears = []
    shown = contextlib.nullcontext() if quiet else progress(len(names), 0)
    start = time.perf_counter()
    with shown as report:
        for i, name in enumerate(names):
            path = tuple(int(part) if part.isdigit() else part for part in name.split("."))
            W = variables.pop((*path, "kernel")).get_value()
            w, linear = _quantize(name, W, spec, jax.random.fold_in(key, i), iterations, rounds)
            variables[*path, "codes"] = Codes(w.codes)
            variables[*path, "codebooks"] = nnx.Param(w.codebooks)
            variables[*path, "scales"] = nnx.Param(w.scales)
            linears.append(linear)
            if report is not None:
                left = (time.perf_counter() - start) / (i + 1) * (len(names) - i - 1)
                report(i + 1, f"{name}  error {linear.relative_error:.4f}", left)
    specs = tuple(sorted((name, spec) for name in names))
    quantized = Model(model.config, nnx.from_flat_state(variables), specs, model.bank)
    return quantized, QuantizationReport(tuple(linears), quantized.nbytes)


def _names(model: Model, spec: CodebookSpec) -> list[str]:
    """The linears to quantize, all of which `spec` can hold."""
    if model.specs:
        name, before = model.specs[0]
        raise ValueError(f"{name} is already quantized, as {before}; quantize the dense model.")
    shapes = dict(linear_shapes(model.config))
    for name, shape in shapes.items():
        try:
            spec.check_shape(*shape)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return list(shapes)


def _quantize(
    name: str, W: jax.Array, spec: CodebookSpec, key: jax.Array, iterations: int, rounds: int
) -> tuple[CodebookTensor, LinearReport]:
    start = time.perf_counter()
    try:
        w = quantize_kmeans(W, spec, key, iterations, rounds, W.dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    error = relative_error(W, w)  # waits for the device
    seconds = time.perf_counter() - start
    return w, LinearReport(name, *w.shape, str(spec), w.bits_per_weight, error, seconds)
