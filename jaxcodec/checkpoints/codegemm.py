"""The packed layout of CodeGEMM's own code: one format for the seven linears of every block.

    config.json        "codegemm": {"arch_config": {"model_name": "model", "layers_name": "layers",
                       "module_names": [the seven]}, "num_codebooks": m, "nbits_per_codebook": 8,
                       "vec_len": v, "group_size": g}
    <linear>.codes     int32 [m, K // (4 v), N], four codes a word, the first in the low bits
    <linear>.codebooks [m, 256, v]
    <linear>.scales    [K // g, N]

The arrays are ours but for the sign of the words. The released kernel multiplies m1v4 and m2v8 with
g a multiple of 32; the layout holds every m, v and g.

Letters: m codebooks, b bits a code, v weights a code, g weights a scale, K input and N output
features.
Source: CodeGEMM (arXiv 2512.17970); run_convert.py, utils/swap_linear.py and
inference/codegemm_linear.py of naver-aics/codegemm at 8e9f34f.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxcodec.checkpoints import native
from jaxcodec.checkpoints.files import whole_number
from jaxcodec.checkpoints.native import field_shapes as field_shapes
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import CodebookTensor

KEY = "codegemm"
BITS = 8  # four codes to a word of 32 bits
MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_WHERE = f"config.json, {KEY}"


def read_specs(
    hf: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], names: Collection[str]
) -> dict[str, CodebookSpec]:
    """The one spec, for each linear whose module is named, by path.

    Args:
      hf: config.json.
      shapes: (K, N) of every linear of the blocks, by path.
      names: of the tensors in the checkpoint.

    Raises:
      ValueError: an option that is missing or not supported.
    """
    options = hf[KEY]
    m, b, v, g = (
        whole_number(options, key, _WHERE)
        for key in ("num_codebooks", "nbits_per_codebook", "vec_len", "group_size")
    )
    if b != BITS:
        raise ValueError(f"{_WHERE}: nbits_per_codebook must be {BITS}, got {b}.")
    try:
        spec = CodebookSpec(m, v, g)
    except ValueError as error:
        raise ValueError(f"{_WHERE}: {error}") from None
    modules = _modules(options.get("arch_config"))
    return {path: spec for path in shapes if path.split(".", 2)[2] in modules}


def write_config(
    specs: Mapping[str, CodebookSpec],
    shapes: Mapping[str, tuple[int, int]],
    dense: Collection[str],
) -> dict[str, Any]:
    """What config.json says of a checkpoint with these specs.

    Raises:
      ValueError: what the layout cannot hold: dense linears, several formats, or b other than 8.
    """
    if left := [path for path in shapes if path not in specs]:
        raise ValueError(
            f"CodeGEMM's layout has all linears of the blocks in codebooks; {left[0]} is dense, "
            f"one of {len(left)}."
        )
    (first, spec), *_ = specs.items()
    for path, other in specs.items():
        if other != spec:
            raise ValueError(
                f"CodeGEMM's layout has one format for all linears; {first} is {spec}, "
                f"{path} is {other}."
            )
    if spec.bits != BITS:
        raise ValueError(
            f"CodeGEMM's layout has codes of {BITS} bits; {first} is {spec}, of {spec.bits}."
        )
    architecture = {"layers_name": "layers", "model_name": "model", "module_names": list(MODULES)}
    options = {
        "arch_config": architecture,
        "group_size": spec.group_size,
        "vec_len": spec.vector_length,
        "num_codebooks": spec.num_codebooks,
        "nbits_per_codebook": spec.bits,
    }
    return {KEY: options}


def read_linear(
    name: str, spec: CodebookSpec, codes: np.ndarray, codebooks: np.ndarray, scales: np.ndarray
) -> CodebookTensor:
    """The tensor of these arrays.

    Raises:
      ValueError: codes of another dtype, naming the linear.
    """
    if codes.dtype != np.int32:
        raise ValueError(f"{name}: CodeGEMM stores codes as packed int32, got {codes.dtype}.")
    return native.read_linear(name, spec, codes.view(np.uint32), codebooks, scales)


def write_linear(w: CodebookTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, codebooks and scales as the layout stores them."""
    codes, codebooks, scales = native.write_linear(w)
    return codes.view(np.int32), codebooks, scales


def _modules(architecture: Any) -> list[str]:
    """`module_names`, refused unless they are linears of `model.layers`."""
    found = architecture if isinstance(architecture, dict) else {}
    modules = found.get("module_names")
    if (
        (found.get("model_name"), found.get("layers_name")) != ("model", "layers")
        or not isinstance(modules, list)
        or not all(module in MODULES for module in modules)
    ):
        raise ValueError(
            f"{_WHERE}: arch_config must name modules of model.layers, among {', '.join(MODULES)}; "
            f"got {architecture!r}."
        )
    return modules
