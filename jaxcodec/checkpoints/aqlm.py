"""AQLM's Hugging Face layout: one format for all codebook linears, one scale per output feature.

    config.json        "quantization_config": {"quant_method": "aqlm", "num_codebooks": m,
                       "nbits_per_codebook": b, "in_group_size": v, "out_group_size": 1,
                       "linear_weights_not_to_quantize": [names of what stays dense]}
    <linear>.codes     [N, K // v, m], int8 for b up to 8, int16 for 16; 2**b is taken off codes of
                       2**(b - 1) and above, so that they fit
    <linear>.codebooks [m, 2**b, 1, v]
    <linear>.scales    [N, 1, 1, 1]

Letters: m codebooks, b bits a code, v weights a code, K input and N output features.
Source: AQLM (arXiv 2401.06118) section 3; its convert_to_hf.py, and QuantizedLinear of the package
`aqlm` 1.1.7, which transformers loads these checkpoints with.
"""

import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcodec.checkpoints.files import whole_number
from jaxcodec.pack import pack_codes, unpack_codes
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import FIELDS, CodebookTensor

KEY = "quantization_config"
_DENSE = "linear_weights_not_to_quantize"
# Fused, codes do not grow to 32 bits in between.
_pack = jax.jit(pack_codes, static_argnums=1)


def read_specs(
    hf: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], names: Collection[str]
) -> dict[str, CodebookSpec]:
    """Specs of the linears that have codes, by path; their g is their K.

    Args:
      hf: config.json.
      shapes: (K, N) of every linear of the blocks, by path.
      names: of the tensors in the checkpoint.

    Raises:
      ValueError: another method, an option that is missing or not supported, or a linear that
        the config calls dense and that has codes.
    """
    options, where = hf[KEY], f"config.json, {KEY}"
    method = options.get("quant_method") if isinstance(options, dict) else options
    if method != "aqlm":
        raise ValueError(f"{where}: quant_method must be 'aqlm', got {method!r}.")
    m, b, v, rows = (
        whole_number(options, key, where)
        for key in ("num_codebooks", "nbits_per_codebook", "in_group_size", "out_group_size")
    )
    if rows != 1:
        raise ValueError(
            f"{where}: out_group_size must be 1, a code for weights of one output feature; "
            f"got {rows}."
        )
    dense = options.get(_DENSE) or []
    if not isinstance(dense, list):
        raise ValueError(f"{where}: {_DENSE} must be a list of names, got {dense!r}.")
    specs = {}
    for path, (K, _) in shapes.items():
        if not any(f"model.{path}.{field}" in names for field in FIELDS):
            continue
        if f"model.{path}.weight" in dense:
            raise ValueError(f"{where}: {_DENSE} names model.{path}, which is stored as codes.")
        try:
            specs[path] = CodebookSpec(m, v, K, b)
        except ValueError as error:
            raise ValueError(f"{where} does not fit {path} with K = {K}: {error}") from None
    return specs


def write_config(
    specs: Mapping[str, CodebookSpec], shapes: Mapping[str, tuple[int, int]], dense: Collection[str]
) -> dict[str, Any]:
    """What config.json says of a checkpoint with these specs; `dense` names its other tensors.

    Raises:
      ValueError: what the layout cannot hold: linears of several formats, or several scales for
        one output feature.
    """
    (first, spec), *_ = specs.items()
    for path, other in specs.items():
        K, _ = shapes[path]
        if other.group_size != K:
            raise ValueError(
                f"AQLM's layout has one scale for each output feature; {path} is {other}, a scale "
                f"for {other.group_size} of its K = {K} weights."
            )
        if _format(other) != _format(spec):
            raise ValueError(
                f"AQLM's layout has one m, v and b for all linears; {first} is {spec}, "
                f"{path} is {other}."
            )
    # transformers 4 looks for the names of weights here, transformers 5 for those of modules.
    modules = [path for path in shapes if path not in specs]
    kept = [*sorted(dense), *(f"model.{path}" for path in modules), "lm_head"]
    if "lm_head.weight" not in dense:  # tied to the embeddings
        kept.append("lm_head.weight")
    options = {
        "quant_method": "aqlm",
        "num_codebooks": spec.num_codebooks,
        "nbits_per_codebook": spec.bits,
        "in_group_size": spec.vector_length,
        "out_group_size": 1,
        _DENSE: kept,
    }
    return {KEY: options}


def field_shapes(spec: CodebookSpec, K: int, N: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of codes, codebooks and scales of a linear [K, N]."""
    m, v = spec.num_codebooks, spec.vector_length
    return (N, K // v, m), (m, spec.codebook_size, 1, v), (N, 1, 1, 1)


def read_linear(
    name: str,
    spec: CodebookSpec,
    codes_njm: np.ndarray,
    books_mc1v: np.ndarray,
    scales_n111: np.ndarray,
) -> CodebookTensor:
    """The tensor that arrays of the shapes `field_shapes` stand for.

    Raises:
      ValueError: codes of another dtype or beyond b bits, naming the linear.
    """
    half, dtype = 2 ** (spec.bits - 1), _code_dtype(spec)
    if codes_njm.dtype != dtype:
        raise ValueError(
            f"{name}: AQLM stores codes of {spec.bits} bits as {dtype}, got {codes_njm.dtype}."
        )
    if beyond := int(np.sum((codes_njm < -half) | (codes_njm >= half))):
        raise ValueError(
            f"{name}: codes of {spec.bits} bits are stored as {-half} to {half - 1}; "
            f"{beyond} are beyond."
        )
    # Masked in their own width: what was taken off comes back.
    codes_mjn = codes_njm.transpose(2, 1, 0).view(f"u{dtype.itemsize}") & (2 * half - 1)
    codes = _pack(jnp.asarray(codes_mjn), spec.bits)
    scales_1n = scales_n111.reshape(1, -1)
    return CodebookTensor(codes, jnp.asarray(books_mc1v[:, :, 0, :]), jnp.asarray(scales_1n))


def write_linear(w: CodebookTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, codebooks and scales as the layout stores them."""
    codes_njm = np.asarray(_signed(w.codes, w.spec))
    books_mc1v = np.asarray(w.codebooks)[:, :, None, :]
    scales_n111 = np.asarray(w.scales).reshape(-1, 1, 1, 1)
    return codes_njm, books_mc1v, scales_n111


@functools.partial(jax.jit, static_argnums=1)
def _signed(words: jax.Array, spec: CodebookSpec) -> jax.Array:
    codes_mjn = unpack_codes(words, spec.bits)
    taken_off = jnp.where(codes_mjn < 2 ** (spec.bits - 1), 0, 2**spec.bits)
    return (codes_mjn - taken_off).astype(_code_dtype(spec)).transpose(2, 1, 0)


def _code_dtype(spec: CodebookSpec) -> np.dtype:
    return np.dtype(np.int8 if spec.bits <= 8 else np.int16)


def _format(spec: CodebookSpec) -> tuple[int, int, int]:
    return spec.num_codebooks, spec.vector_length, spec.bits
