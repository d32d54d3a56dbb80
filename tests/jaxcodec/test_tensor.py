"""A codebook tensor stands for what its formula says, and refuses what is no such tensor."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import (
    CodebookTensor,
    _sum_in_order,
    _sum_sorted,
    dequantize,
    random_codebook_tensor,
)

SPECS = ["m1v4g32", "m2v8g128", "m3v2b2g64", "m4v16b4g16", "m1v4b16g8"]
K, N = 128, 6


def make(text: str, dtype: jnp.dtype = jnp.float32) -> CodebookTensor:
    return random_codebook_tensor(jax.random.key(0), CodebookSpec.parse(text), K, N, dtype)


def by_definition(w: CodebookTensor, spec: CodebookSpec) -> np.ndarray:
    """W[k, n] = scales[k // g, n] * sum_c codebooks[c, code(c, k // v, n), k % v], one by one."""
    codes, books, scales = (np.asarray(x) for x in (w.codes, w.codebooks, w.scales))
    v, g, b = spec.vector_length, spec.group_size, spec.bits
    W = np.zeros((K, N))
    for k in range(K):
        word, place = divmod(k // v, 32 // b)
        for n in range(N):
            for c in range(spec.num_codebooks):
                code = int(codes[c, word, n]) >> (b * place) & (2**b - 1)
                W[k, n] += float(books[c, code, k % v])
            W[k, n] *= float(scales[k // g, n])
    return W


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("text", SPECS)
def test_dequantize_is_the_definition(text: str, dtype: jnp.dtype) -> None:
    w = make(text, dtype)
    expected = by_definition(w, CodebookSpec.parse(text))
    exact, plain = jax.jit(lambda w: (dequantize(w, jnp.float32), dequantize(w)))(w)
    np.testing.assert_allclose(exact, expected, rtol=1e-5, atol=1e-6)
    assert plain.dtype == dtype


@pytest.mark.parametrize("text", SPECS)
def test_the_spec_and_shape_are_in_the_arrays(text: str) -> None:
    w = make(text)
    assert str(w.spec) == text
    assert w.shape == (K, N)
    assert w.check() is w


@pytest.mark.parametrize("text", ["m1v4g32", "m3v2b2g64"])
def test_dequantize_has_the_derivatives_of_its_formula(text: str) -> None:
    w = make(text)

    def matrix(codebooks: jax.Array, scales: jax.Array) -> jax.Array:
        return dequantize(CodebookTensor(w.codes, codebooks, scales))

    check_grads(matrix, (w.codebooks, w.scales), order=1, modes=("rev",), rtol=1e-2)


def test_it_is_a_pytree_that_survives_jit_and_tracing() -> None:
    w = make("m2v8g128")
    again = jax.jit(lambda w: w)(w)
    jax.tree.map(np.testing.assert_array_equal, again, w)
    assert jax.eval_shape(dequantize, w).shape == (K, N)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {"scales": w.scales.at[0, 1].set(jnp.nan)},
            "scales holds 1 values that are NaN",
        ),
        (lambda w: {"codebooks": w.codebooks.at[0].set(jnp.inf)}, "codebooks holds .* infinite"),
        (lambda w: {"codes": w.codes.astype(jnp.int32)}, "packed uint32, got int32"),
        (lambda w: {"scales": w.scales.astype(jnp.bfloat16)}, "must share one of"),
        (lambda w: {"codes": w.codes[:1]}, "m = 1 codebooks, codebooks hold 2"),
        (lambda w: {"codebooks": w.codebooks[:, :100]}, "2\\*\\*b vectors, got 100"),
        (lambda w: {"scales": w.scales[:, :-1]}, r"scales must be \[K // g, N\]"),
        (lambda w: {"scales": w.scales[0]}, r"ranks \(3, 3, 2\), got \(3, 3, 1\)"),
        (lambda w: {"codebooks": w.codebooks[..., :3]}, r"\(v\) must be one of"),
    ],
)
def test_arrays_that_form_no_tensor_are_refused_by_name(change, message: str) -> None:
    w = make("m2v8g128")
    with pytest.raises(ValueError, match=f"gate_proj: .*{message}"):
        dataclasses.replace(w, **change(w)).check("gate_proj")


def test_both_ways_to_sum_a_gradient_agree() -> None:
    codes = jax.random.randint(jax.random.key(0), (4096,), 0, 32) * 2  # half of them unused
    vectors = jax.random.normal(jax.random.key(1), (4096, 8))
    by_sort = _sum_sorted(codes, vectors, size=64)
    np.testing.assert_allclose(by_sort, _sum_in_order(codes, vectors, size=64), atol=1e-4)
