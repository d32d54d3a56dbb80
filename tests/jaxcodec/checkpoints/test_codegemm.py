"""CodeGEMM's packed layout against its description, in plain numpy."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxcodec.checkpoints import codegemm
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import dequantize

SHAPES = {f"layers.{i}.{module}": (64, 32) for i in range(2) for module in codegemm.MODULES}
UP = "layers.1.mlp.up_proj"
OPTIONS = {
    "arch_config": {
        "layers_name": "layers",
        "model_name": "model",
        "module_names": list(codegemm.MODULES),
    },
    "group_size": 32,
    "vec_len": 8,
    "num_codebooks": 2,
    "nbits_per_codebook": 8,
}


def packed(codes: np.ndarray) -> np.ndarray:
    """Codes [m, K // v, N] of 8 bits as int32 [m, K // v // 4, N]: byte j of word k is 4 k + j."""
    m, J, N = codes.shape
    data = bytearray()
    for c in range(m):
        for k in range(J // 4):
            for n in range(N):
                data += bytes(codes[c, 4 * k + j, n] for j in range(4))
    return np.frombuffer(bytes(data), "<i4").reshape(m, J // 4, N)


@pytest.mark.parametrize(
    ("m", "v", "dtype"), [(2, 8, np.float16), (1, 4, ml_dtypes.bfloat16), (3, 16, np.float32)]
)
def test_a_linear_is_what_the_description_says_and_is_written_as_it_was(m, v, dtype) -> None:
    K, N, g = 8 * v, 5, 2 * v
    rng = np.random.default_rng(m + v)
    codes = rng.integers(0, 256, (m, K // v, N)).astype(np.uint8)
    codes[0, 3, 0] = 255  # the word's sign
    codebooks = rng.normal(size=(m, 256, v)).astype(dtype)
    scales = rng.uniform(0.5, 1.5, (K // g, N)).astype(dtype)
    fields = packed(codes), codebooks, scales
    w = codegemm.read_linear(UP, CodebookSpec(m, v, g), *fields).check()
    assert w.spec == CodebookSpec(m, v, g)
    W = np.zeros((K, N), np.float32)
    for n in range(N):
        for j in range(K // v):
            for c in range(m):
                W[j * v : (j + 1) * v, n] += codebooks[c, codes[c, j, n]].astype(np.float32)
            W[j * v : (j + 1) * v, n] *= scales[j * v // g, n].astype(np.float32)
    np.testing.assert_array_equal(dequantize(w, jnp.float32), W)
    for again, field in zip(codegemm.write_linear(w), fields, strict=True):
        assert again.dtype == field.dtype
        np.testing.assert_array_equal(again, field)
    assert codegemm.field_shapes(w.spec, K, N) == tuple(field.shape for field in fields)


def test_codes_that_are_not_int32_are_refused() -> None:
    codes = np.zeros((1, 2, 4), np.uint32)
    with pytest.raises(ValueError, match=r"up_proj: CodeGEMM stores .* int32, got uint32"):
        codegemm.read_linear(UP, CodebookSpec(1, 4, 32), codes, np.zeros(()), np.zeros(()))


def test_the_config_is_one_format_for_all() -> None:
    specs = codegemm.read_specs({"codegemm": OPTIONS}, SHAPES, ())
    assert specs == dict.fromkeys(SHAPES, CodebookSpec.parse("m2v8g32"))
    assert codegemm.write_config(specs, SHAPES, ()) == {"codegemm": OPTIONS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nbits_per_codebook": 16}, "nbits_per_codebook must be 8, got 16"),
        ({"group_size": -1}, "group_size must be a whole number above 0, got -1"),
        ({"vec_len": 5}, r".*\(v\) must be one of .* got 5"),
        ({"arch_config": None}, "arch_config must name modules of model.layers"),
        (
            {"arch_config": {"module_names": ["mlp.up_proj"]}},
            "arch_config must name modules of model.layers",
        ),
        (
            {"arch_config": OPTIONS["arch_config"] | {"module_names": ["mlp.experts"]}},
            r"arch_config must name .* among .*; got .*\['mlp.experts'\]",
        ),
    ],
)
def test_options_that_are_not_read_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"config.json, codegemm: {message}"):
        codegemm.read_specs({"codegemm": OPTIONS | change}, SHAPES, ())


def test_what_the_layout_cannot_hold_is_named() -> None:
    specs = dict.fromkeys(SHAPES, CodebookSpec.parse("m2v8g32"))
    some = {path: spec for path, spec in specs.items() if path != UP}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj is dense, one of 1"):
        codegemm.write_config(some, SHAPES, ())
    with pytest.raises(ValueError, match=r"q_proj is m2v8g32, layers\.1\.mlp\.up_proj is m1v8g32"):
        codegemm.write_config(specs | {UP: CodebookSpec.parse("m1v8g32")}, SHAPES, ())
    with pytest.raises(ValueError, match=r"codes of 8 bits; .* is m1v4b16g32, of 16"):
        codegemm.write_config(dict.fromkeys(SHAPES, CodebookSpec.parse("m1v4b16g32")), SHAPES, ())
