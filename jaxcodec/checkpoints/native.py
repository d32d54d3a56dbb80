"""Our own layout: a spec for each linear, and the arrays of `CodebookTensor` as they are.

    config.json        "jaxcodec": {"format": 1, "specs": {linear path: "m2v8g128"}}
    <linear>.codes     uint32 [m, K // (v * 32 // b), N]
    <linear>.codebooks [m, 2**b, v]
    <linear>.scales    [K // g, N]

Letters: m codebooks, b bits a code, v weights a code, g weights a scale, K input and N output
features.
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import CodebookTensor

KEY = "jaxcodec"
FORMAT = 1


def read_specs(
    hf: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], names: Collection[str]
) -> dict[str, CodebookSpec]:
    """Specs of the codebook linears, by path; none where config.json has no key of ours.

    Args:
      hf: config.json.
      shapes: (K, N) of every linear of the blocks, by path.
      names: of the tensors in the checkpoint.

    Raises:
      ValueError: another format, or specs that are no texts or are of no linear.
    """
    ours = hf.get(KEY)
    if ours is None:
        return {}
    if not isinstance(ours, dict) or ours.get("format") != FORMAT:
        found = ours.get("format") if isinstance(ours, dict) else ours
        raise ValueError(f"config.json has jaxcodec format {found!r}, this version reads {FORMAT}.")
    specs = ours.get("specs")
    if not isinstance(specs, dict) or not all(isinstance(s, str) for s in specs.values()):
        raise ValueError(f"config.json: jaxcodec specs must be texts by linear, got {specs!r}.")
    if unknown := [path for path in specs if path not in shapes]:
        raise ValueError(
            f"config.json has specs for {', '.join(unknown)}, which are no linears of its blocks."
        )
    return {path: CodebookSpec.parse(text) for path, text in specs.items()}


def write_config(
    specs: Mapping[str, CodebookSpec],
    shapes: Mapping[str, tuple[int, int]],
    dense: Collection[str],
) -> dict[str, Any]:
    """What config.json says of a checkpoint with these specs."""
    return {KEY: {"format": FORMAT, "specs": {path: str(spec) for path, spec in specs.items()}}}


def field_shapes(spec: CodebookSpec, K: int, N: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of codes, codebooks and scales of a linear [K, N]."""
    m, v = spec.num_codebooks, spec.vector_length
    words = K // (v * spec.codes_per_word)
    return (m, words, N), (m, spec.codebook_size, v), (K // spec.group_size, N)


def read_linear(
    name: str, spec: CodebookSpec, codes: np.ndarray, codebooks: np.ndarray, scales: np.ndarray
) -> CodebookTensor:
    """The tensor of these arrays.

    Raises:
      ValueError: codes of another dtype, naming the linear.
    """
    if codes.dtype != np.uint32:
        raise ValueError(f"{name}: codes must be packed uint32, got {codes.dtype}.")
    return CodebookTensor(jnp.asarray(codes), jnp.asarray(codebooks), jnp.asarray(scales))


def write_linear(w: CodebookTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, codebooks and scales as the layout stores them."""
    return np.asarray(w.codes), np.asarray(w.codebooks), np.asarray(w.scales)
