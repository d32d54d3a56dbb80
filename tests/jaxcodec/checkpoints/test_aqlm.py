"""AQLM's layout against its description, in plain numpy, and against AQLM's own dequantization."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxcodec.checkpoints import aqlm
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import dequantize

FIXTURES = Path(__file__).parents[2] / "fixtures"
SHAPES = {"layers.0.mlp.up_proj": (64, 24), "layers.0.mlp.down_proj": (32, 64)}
UP, DOWN = SHAPES
OPTIONS = {
    "quant_method": "aqlm",
    "num_codebooks": 2,
    "nbits_per_codebook": 8,
    "in_group_size": 8,
    "out_group_size": 1,
    "linear_weights_not_to_quantize": ["model.layers.0.mlp.down_proj.weight", "lm_head.weight"],
}
NAMES = {f"model.{UP}.codes", f"model.{UP}.codebooks", f"model.{UP}.scales"}


def matrix(m: int, b: int, v: int, K: int, N: int) -> tuple[np.ndarray, ...]:
    """Random codes as numbers from 0, then codebooks and scales as the layout has them."""
    rng = np.random.default_rng(m * 1000 + b * 10 + v)
    codes = rng.integers(0, 2**b, (N, K // v, m))
    codes[0, 0, 0], codes[-1, -1, -1] = 2**b - 1, 2 ** (b - 1)  # both ends of the negative half
    codebooks = rng.normal(size=(m, 2**b, 1, v)).astype(np.float16)
    return codes, codebooks, rng.uniform(0.5, 1.5, (N, 1, 1, 1)).astype(np.float16)


def stored(codes: np.ndarray, b: int) -> np.ndarray:
    signed = [c - 2**b if c >= 2 ** (b - 1) else c for c in codes.ravel().tolist()]
    return np.array(signed, np.int8 if b <= 8 else np.int16).reshape(codes.shape)


def by_definition(codes: np.ndarray, codebooks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """W [N, K]: a row's j-th run of v weights is its scale times the sum of its codes' vectors."""
    N, J, m = codes.shape
    v = codebooks.shape[-1]
    W = np.zeros((N, J * v), np.float32)
    for n in range(N):
        for j in range(J):
            for c in range(m):
                W[n, j * v : (j + 1) * v] += codebooks[c, codes[n, j, c], 0]
        W[n] *= np.float32(scales[n, 0, 0, 0])
    return W


@pytest.mark.parametrize(
    ("m", "b", "v"), [(2, 8, 8), (1, 16, 4), (3, 4, 16), (4, 2, 2), (8, 8, 32)]
)
def test_a_linear_is_what_the_description_says_and_is_written_as_it_was(
    m: int, b: int, v: int
) -> None:
    K, N = 2 * v * 32 // b, 3
    codes, codebooks, scales = matrix(m, b, v, K, N)
    fields = stored(codes, b), codebooks, scales
    w = aqlm.read_linear(UP, CodebookSpec(m, v, K, b), *fields).check()
    assert w.spec == CodebookSpec(m, v, K, b)
    np.testing.assert_array_equal(
        dequantize(w, jnp.float32).T, by_definition(codes, codebooks, scales)
    )
    for again, field in zip(aqlm.write_linear(w), fields, strict=True):
        assert again.dtype == field.dtype
        np.testing.assert_array_equal(again, field)
    shapes = tuple(field.shape for field in fields)
    assert aqlm.field_shapes(w.spec, K, N) == shapes


@pytest.mark.parametrize(
    ("name", "text"), [("1x16g8", "m1v8b16"), ("1x8g8", "m1v8"), ("3x4g16", "m3v16b4")]
)
def test_aqlm_dequantizes_to_the_same_bits(name: str, text: str) -> None:
    tensors = load_file(FIXTURES / "aqlm.safetensors")
    codes, scales, W = (tensors[f"{name}.{part}"] for part in ("codes", "scales", "weight"))
    spec = CodebookSpec.parse(f"{text}g{W.shape[1]}")
    if spec.bits == 16:  # see large_codebook in make_aqlm.py
        entries = np.arange(spec.codebook_size * spec.vector_length) * 40503 % 2**16 - 2**15
        codebooks = (entries / 2**14).astype(np.float16).reshape(1, -1, 1, spec.vector_length)
    else:
        codebooks = tensors[f"{name}.codebooks"]
    w = aqlm.read_linear(name, spec, codes, codebooks, scales).check()
    np.testing.assert_array_equal(dequantize(w, jnp.float32).T, W)


def test_codes_of_another_width_or_beyond_their_bits_are_refused() -> None:
    codes, codebooks, scales = matrix(1, 4, 4, 64, 3)
    spec = CodebookSpec.parse("m1v4b4g64")
    with pytest.raises(
        ValueError, match=r"up_proj: AQLM stores codes of 4 bits as int8, got int64"
    ):
        aqlm.read_linear(UP, spec, codes, codebooks, scales)
    fields = stored(codes, 4)
    fields[0, :2, 0] = 8, -9
    with pytest.raises(ValueError, match=r"up_proj: codes of 4 bits .* -8 to 7; 2 are beyond"):
        aqlm.read_linear(UP, spec, fields, codebooks, scales)


def test_the_config_names_what_is_quantized() -> None:
    specs = aqlm.read_specs({"quantization_config": OPTIONS}, SHAPES, NAMES)
    assert specs == {UP: CodebookSpec.parse("m2v8g64")}
    dense = [f"model.{DOWN}.weight", "model.norm.weight"]
    written = aqlm.write_config(specs, SHAPES, dense)["quantization_config"]
    kept = written.pop("linear_weights_not_to_quantize")
    assert written == {key: OPTIONS[key] for key in written}
    assert sorted(kept) == sorted([*dense, f"model.{DOWN}", "lm_head", "lm_head.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method must be 'aqlm', got 'gptq'"),
        ({"out_group_size": 8}, "out_group_size must be 1, .* got 8"),
        ({"num_codebooks": 9}, r"up_proj .*\(m\) must be one of \(1, 2, 3, 4, 5, 6, 7, 8\), got 9"),
        ({"nbits_per_codebook": 12}, r"up_proj .*\(b\) must be one of .* got 12"),
        ({"in_group_size": 64}, r"up_proj .*\(v\) must be one of .* got 64"),
        ({"in_group_size": "8"}, "in_group_size must be a whole number above 0, got '8'"),
        ({"linear_weights_not_to_quantize": "lm_head"}, "must be a list of names"),
        ({"linear_weights_not_to_quantize": [f"model.{UP}.weight"]}, "up_proj, which is stored as"),
    ],
)
def test_options_that_are_not_read_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aqlm.read_specs({"quantization_config": OPTIONS | change}, SHAPES, NAMES)


def test_a_missing_option_is_named() -> None:
    options = {key: value for key, value in OPTIONS.items() if key != "in_group_size"}
    with pytest.raises(ValueError, match="quantization_config lacks 'in_group_size'"):
        aqlm.read_specs({"quantization_config": options}, SHAPES, NAMES)


def test_what_the_layout_cannot_hold_is_named() -> None:
    groups = {UP: CodebookSpec.parse("m2v8g32")}
    with pytest.raises(ValueError, match=r"up_proj is m2v8g32, a scale for 32 of its K = 64"):
        aqlm.write_config(groups, SHAPES, [])
    several = {UP: CodebookSpec.parse("m2v8g64"), DOWN: CodebookSpec.parse("m1v8g32")}
    with pytest.raises(ValueError, match=r"up_proj is m2v8g64, layers\.0\.mlp\.down_proj is m1v8"):
        aqlm.write_config(several, SHAPES, [])
