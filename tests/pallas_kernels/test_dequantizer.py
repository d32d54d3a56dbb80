"""The dequantizer: bits of its values, races, refusals, lowering for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

from jaxcodec import tensor
from jaxcodec.pallas_kernels.dequantizer import dequantize, plan
from jaxcodec.pallas_kernels.shapes import LLAMA_8B
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import random_codebook_tensor
from tests.pallas_kernels.exact import weight

INTERPRET = jax.default_backend() != "gpu"


@pytest.mark.parametrize(
    ("text", "K", "N", "dtype"),
    [
        ("m1v4g128", 128, 200, jnp.bfloat16),  # a piece that ends early
        ("m2v8g128", 256, 136, jnp.float16),
        ("m3v2g16", 64, 102, jnp.bfloat16),  # columns in pairs, two pairs of codebooks
        ("m1v16g64", 128, 33, jnp.bfloat16),  # odd columns
        ("m2v4b4g16", 64, 68, jnp.float16),  # groups within a word
        ("m1v4b2g48", 192, 20, jnp.bfloat16),  # groups that begin within a word
    ],
)
def test_it_writes_the_bits_of_the_definition(text, K, N, dtype):
    w = weight(text, K, N, dtype)
    run = jax.jit(functools.partial(dequantize, dtype=dtype, interpret=INTERPRET))
    wanted = jax.jit(functools.partial(tensor.dequantize, dtype=dtype))(w)
    np.testing.assert_array_equal(run(w), wanted)
    if INTERPRET:
        assert not get_races().races_found


@pytest.mark.skipif(INTERPRET, reason="The interpreter takes minutes for it.")
@pytest.mark.parametrize("text", ["m1v4g128", "m2v8g128", "m4v8g64"])
def test_more_pieces_than_warps(text):
    w = random_codebook_tensor(jax.random.key(1), CodebookSpec.parse(text), 4096, 4096)
    wanted = jax.jit(functools.partial(tensor.dequantize, dtype=jnp.bfloat16))(w)
    np.testing.assert_array_equal(dequantize(w, jnp.bfloat16), wanted)


@pytest.mark.parametrize(
    ("text", "codebooks", "dtype", "reason"),
    [
        ("m1v8b16g128", jnp.bfloat16, jnp.bfloat16, "b = 16"),
        ("m1v4g128", jnp.float32, jnp.bfloat16, "codebooks .* got float32"),
        ("m1v4g128", jnp.bfloat16, jnp.float32, "result .* got float32"),
    ],
)
def test_refusals_name_the_number(text, codebooks, dtype, reason):
    spec = CodebookSpec.parse(text)
    with pytest.raises(NotImplementedError, match=reason):
        dequantize(random_codebook_tensor(jax.random.key(1), spec, 128, 8, codebooks), dtype)
    assert plan.refusal(spec, codebooks, dtype) is not None


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("text", ["m1v4g128", "m2v8g128", "m4v16b8g64"])
def test_lowers_for_cuda_without_a_gpu(text, dtype):
    make = lambda key: random_codebook_tensor(
        key, CodebookSpec.parse(text), *LLAMA_8B["llama_8b_down"]
    )
    w = jax.eval_shape(make, jax.random.key(0))
    run = jax.jit(functools.partial(dequantize, dtype=dtype))
    assert "dequantizer" in run.trace(w).lower(lowering_platforms=("cuda",)).as_text()
