"""What multiplying by a codebook weight means, for every implementation of it.

The expected numbers are computed here in numpy float64 from the definition alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcodec.pallas_kernels import dequantizer
from jaxcodec.pallas_kernels import matmul as matmul_module
from jaxcodec.pallas_kernels.matmul import KERNELS, choose, codebook_matmul, codebook_matmuls
from jaxcodec.pallas_kernels.shapes import TINY
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import CodebookTensor
from tests.pallas_kernels.exact import draw, relative_error, weight

ON_GPU = jax.default_backend() == "gpu"
PLAIN = ("reference", "psumbook")
# What runs in float32, where errors show.
EXACT = (*PLAIN, "psumbook_mosaic")
# Rows for each kernel that fill none of its tiles.
ROWS = {"psumbook_mosaic": 1, "mma_mosaic": 3, "wgmma_mosaic": 67}


def operands(name, dtype, M):
    """Random x [M, K] and weight [K, N], made in numpy so that nothing compiles for them."""
    text, K, N = TINY[name]
    spec, draw = CodebookSpec.parse(text), np.random.default_rng(1)
    m, v = spec.num_codebooks, spec.vector_length
    codes = draw.integers(0, 2**32, (m, K // (4 * v), N), dtype=np.uint32)
    codebooks = draw.normal(size=(m, 256, v)) / np.sqrt(m * K)
    scales = draw.uniform(0.5, 1.5, (K // spec.group_size, N))
    w = CodebookTensor(*map(jnp.asarray, (codes, codebooks.astype(dtype), scales.astype(dtype))))
    return jnp.asarray(draw.normal(size=(M, K)).astype(dtype)), w


@functools.partial(jax.jit, static_argnames=("implementation", "preferred_element_type"))
def matmul(x, w, implementation=None, preferred_element_type=None):
    return codebook_matmul(
        x,
        w,
        implementation=implementation,
        preferred_element_type=preferred_element_type,
        interpret=not ON_GPU,
    )


def expected(x, w, dy):
    """y, and the gradients of sum(y * dy) with respect to x, codebooks and scales, in float64."""
    m, size, v = w.codebooks.shape
    codes = np.asarray(w.codes)
    fields = codes[:, :, None, :] >> (8 * np.arange(4, dtype=np.uint32))[:, None] & np.uint32(255)
    codes = fields.reshape(m, -1, codes.shape[-1]).astype(np.int64)
    x, dy, books, scales = (np.asarray(a, np.float64) for a in (x, dy, w.codebooks, w.scales))
    K, N = w.shape
    g = K // scales.shape[0]
    vectors = np.sum([books[c][codes[c]] for c in range(m)], axis=0)
    unscaled = vectors.transpose(0, 2, 1).reshape(K, N)
    scales_kn = np.repeat(scales, g, axis=0)
    dweight = x.T @ dy
    dscales = (dweight * unscaled).reshape(-1, g, N).sum(axis=1)
    dvectors = (dweight * scales_kn).reshape(K // v, v, N).transpose(0, 2, 1)
    dbooks = np.zeros_like(books)
    for c in range(m):
        np.add.at(dbooks[c], codes[c], dvectors)
    weight = unscaled * scales_kn
    return x @ weight, dy @ weight.T, dbooks, dscales


def assert_close(actual, wanted, dtype):
    """Within the rounding of `dtype`, and of float32 sums on the scale of the whole array."""
    actual = np.asarray(actual, np.float64)
    bound = float(jnp.finfo(dtype).eps) * np.abs(wanted) + 4e-6 * np.abs(wanted).max()
    worst = np.max(np.abs(actual - wanted) / bound)
    assert worst <= 1, f"error is {worst:.2f} times its bound"


CASES = [
    # An interpreted kernel takes as much longer as there are rows.
    (implementation, name, jnp.float32, 1 + i % (5 if implementation in PLAIN else 2))
    for implementation in EXACT
    for i, name in enumerate(TINY)
] + [
    (implementation, name, dtype, M)
    for implementation in PLAIN
    for name, dtype, M in [
        ("tiny_m1v4", jnp.bfloat16, 2),
        ("tiny_m2v8", jnp.bfloat16, 1),
        ("tiny_m1v4", jnp.float16, 4),
    ]
]


@pytest.mark.parametrize(("implementation", "name", "dtype", "M"), CASES)
def test_values_and_gradients(implementation, name, dtype, M):
    x, w = operands(name, dtype, M)
    dy = draw((M, w.shape[1]), dtype)

    def run(x, w, dy):
        y, pull_back = jax.vjp(lambda x, w: matmul(x, w, implementation), x, w)
        dx, dw = pull_back(dy)
        return y, dx, dw.codebooks, dw.scales

    for actual, wanted in zip(jax.jit(run)(x, w, dy), expected(x, w, dy), strict=True):
        assert actual.dtype == dtype
        assert_close(actual, wanted, dtype)


@pytest.mark.parametrize(
    ("name", "dtype"), [("tiny_m1v4", jnp.bfloat16), ("tiny_m2v8", jnp.float16)]
)
@pytest.mark.parametrize("implementation", KERNELS)
def test_kernels_of_16_bit_rows_round_less_than_the_rows(implementation, name, dtype):
    M = ROWS[implementation]
    x, w = operands(name, dtype, M)
    dy = draw((M, w.shape[1]))

    def run(x, w, dy):
        multiply = lambda x, w: matmul(x, w, implementation, jnp.float32)
        y, pull_back = jax.vjp(multiply, x, w)
        dx, dw = pull_back(dy)
        return y, dx, dw.codebooks, dw.scales

    y, *gradients = jax.jit(run)(x, w, dy)
    exact, *exact_gradients = expected(x, w, dy)
    assert y.dtype == jnp.float32
    assert relative_error(y, exact) <= 1e-3
    # Backwards the weight is rounded to the dtype of x, and so is the result.
    for actual, wanted in zip(gradients, exact_gradients, strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, wanted) <= 2 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("implementation", [None, "mma_mosaic"])
def test_weights_that_share_x(implementation):
    x, w = operands("tiny_m2v8", jnp.bfloat16, 3)
    half = CodebookTensor(w.codes[..., :128], -w.codebooks, w.scales[:, :128])
    coarse = dataclasses.replace(w, scales=w.scales[:1])  # another group size: another launch
    bias = jnp.arange(128, dtype=jnp.bfloat16)
    ys = jax.jit(
        lambda x, weights: codebook_matmuls(
            x,
            weights,
            (None, bias, None),
            implementation=implementation,
            preferred_element_type=jnp.float32,
            interpret=not ON_GPU,
        )
    )(x, [w, half, coarse])
    for y, own, b in zip(ys, (w, half, coarse), (0, bias, 0), strict=True):
        wanted = expected(x, own, np.zeros((3, own.shape[1])))[0]
        assert relative_error(np.asarray(y) - np.asarray(b, np.float32), wanted) <= 1e-3


@pytest.mark.parametrize("implementation", PLAIN)
def test_mixed_dtypes_keep_that_of_x(implementation):
    x, w = operands("tiny_m2v8", jnp.bfloat16, 2)
    x = x.astype(jnp.float32)
    y = matmul(x, w, implementation)
    assert y.dtype == jnp.float32
    assert_close(y, expected(x, w, np.zeros((2, w.shape[1])))[0], jnp.float32)


@pytest.mark.parametrize("implementation", PLAIN)
def test_leading_axes_are_rows(implementation):
    x, w = operands("tiny_m2v8", jnp.float32, 4)
    y = matmul(x, w, implementation)
    folded = matmul(x.reshape(2, 2, -1), w, implementation)
    single = matmul(x[0], w, implementation)
    assert folded.shape == (2, 2, w.shape[1])
    assert single.shape == (w.shape[1],)
    np.testing.assert_allclose(folded.reshape(y.shape), y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(single, y[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", PLAIN)
def test_vmap_of_rows_and_of_weights(implementation):
    x, w = operands("tiny_m1v4", jnp.float32, 2)
    _, other = operands("tiny_m1v4", jnp.float32, 2)
    other = dataclasses.replace(other, scales=2 * other.scales)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), w, other)
    op = lambda x, w: matmul(x, w, implementation)
    y = op(x, w)
    over_rows = jax.jit(jax.vmap(op, in_axes=(0, None)))(x, w)
    np.testing.assert_allclose(over_rows, y, rtol=1e-5, atol=1e-6)
    over_weights = jax.jit(jax.vmap(op, in_axes=(None, 0)))(x, stacked)
    np.testing.assert_allclose(over_weights, jnp.stack([y, 2 * y]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", PLAIN)
def test_gradient_of_vmap(implementation):
    x, w = operands("tiny_m1v4", jnp.float32, 2)
    loss = lambda x: jax.vmap(lambda row: matmul(row, w, implementation))(x).sum()
    _, dx, _, _ = expected(x, w, np.ones((2, w.shape[1])))
    assert_close(jax.jit(jax.grad(loss))(x), dx, jnp.float32)


def test_vmap_of_a_kernel():
    x, w = operands("tiny_row_scale", jnp.float32, 2)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), w, w)
    y = matmul(x, w, "reference")
    op = lambda x, w: matmul(x, w, "psumbook_mosaic")
    over_rows = jax.jit(jax.vmap(op, in_axes=(0, None)))(x, w)
    np.testing.assert_allclose(over_rows, y, rtol=1e-5, atol=1e-5)
    over_weights = jax.jit(jax.vmap(op, in_axes=(None, 0)))(x[:1], stacked)
    np.testing.assert_allclose(over_weights, jnp.stack([y[:1], y[:1]]), rtol=1e-5, atol=1e-5)


def test_a_bias_is_added_before_rounding_and_has_a_gradient():
    x, w = operands("tiny_m2v8", jnp.bfloat16, 2)
    bias = jnp.linspace(-1, 1, w.shape[1], dtype=jnp.bfloat16)
    multiply = lambda bias: codebook_matmul(x, w, bias)
    exact = expected(x, w, np.zeros((2, w.shape[1])))[0] + np.asarray(bias, np.float64)
    assert_close(multiply(bias), exact, jnp.bfloat16)
    dbias = jax.grad(lambda bias: multiply(bias).astype(jnp.float32).sum())(bias)
    np.testing.assert_array_equal(dbias, jnp.full_like(bias, 2))


def test_wide_codes_have_a_psumbook_too():
    x, w = draw((3, 32)), weight("m1v8b16g32", 32, 48)
    np.testing.assert_allclose(
        matmul(x, w, "psumbook"), matmul(x, w, "reference"), rtol=1e-5, atol=1e-6
    )


def test_the_rule_chooses_a_kernel_where_it_can_run():
    spec = CodebookSpec.parse("m2v8g128")
    assert choose(1, 4096, [14336], spec, jnp.float32) == (
        "psumbook_mosaic" if ON_GPU else "reference"
    )
    for M in (1, 4, 64, 4096):
        name = choose(M, 4096, [14336], spec, jnp.bfloat16)
        assert name in KERNELS or name == "dequantize" if ON_GPU else name == "reference"
    assert choose(4096, 4096, [14336], spec, jnp.float32) == "reference"
    assert choose(0, 4096, [14336], spec, jnp.float32) == "reference"


def test_the_chosen_implementation_agrees():
    x, w = operands("tiny_m2v8", jnp.float32, 1)
    assert_close(codebook_matmul(x, w), expected(x, w, np.zeros((1, 256)))[0], jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_dense_product_in_the_dtype_of_x_only_rounds_the_weight(dtype):
    x, w = operands("tiny_m1v4", dtype, 3)
    exact = expected(x, w, np.zeros((3, w.shape[1])))[0]
    actual = np.asarray(matmul(x, w, "dequantize"), np.float64)
    magnitudes = dataclasses.replace(w, codebooks=jnp.abs(w.codebooks))
    sizes = expected(jnp.abs(x), magnitudes, np.zeros((3, w.shape[1])))[0]
    # Half a unit in the last place of each weight, half of the result, and float32 sums.
    bound = float(jnp.finfo(dtype).eps) / 2 * (sizes + np.abs(exact)) + 4e-6 * np.abs(exact).max()
    assert np.all(np.abs(actual - exact) <= bound)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_that_cannot_run_says_why(name):
    x, w = operands("tiny_m2v8", jnp.bfloat16, 1)
    with pytest.raises(ValueError, match=r"Unknown implementation 'mosaic'; there are"):
        codebook_matmul(x, w, implementation="mosaic")
    if not ON_GPU:
        with pytest.raises(NotImplementedError, match=f"{name!r} cannot run: it needs a GPU"):
            codebook_matmul(x, w, implementation=name)


@pytest.mark.parametrize("text", ["m8v32g128", "m5v8g128", "m1v32g128"])
def test_formats_that_no_kernel_holds_are_multiplied_without(text):
    spec = CodebookSpec.parse(text)
    for kernel in KERNELS.values():
        assert "at most m = 4" in kernel.refusal(1, 256, 64, spec, jnp.bfloat16)
    assert "at most m = 4" in (dequantizer.refusal(spec, jnp.bfloat16, jnp.bfloat16) or "")
    x, w = draw((3, 256)), weight(text, 256, 64, dtype=jnp.float32)
    y, pull_back = jax.vjp(codebook_matmul, x, w)
    dy = draw(y.shape)
    wanted = expected(x, w, np.asarray(dy))
    dx, dw = pull_back(dy)
    actual = y, dx, dw.codebooks, dw.scales
    for value, exact in zip(actual, wanted, strict=True):
        assert_close(value, exact, jnp.float32)


def test_no_rows_give_no_rows():
    x, w = operands("tiny_m2v8", jnp.bfloat16, 1)
    assert codebook_matmul(x[:0], w).shape == (0, w.shape[1])


def test_wrong_k_names_both_numbers():
    x, w = operands("tiny_m2v8", jnp.bfloat16, 1)
    with pytest.raises(ValueError, match=r"K = 256 .* got \[1, 255\]"):
        codebook_matmul(x[:, :-1], w)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float8_e4m3fn])
def test_wrong_dtype_is_named(dtype):
    x, w = operands("tiny_m2v8", jnp.bfloat16, 1)
    with pytest.raises(TypeError, match=f"x must be .* got {jnp.dtype(dtype).name}"):
        codebook_matmul(x.astype(dtype), w)
    with pytest.raises(TypeError, match="uint32, got int32"):
        codebook_matmul(x, dataclasses.replace(w, codes=w.codes.astype(jnp.int32)))
    with pytest.raises(TypeError, match=f"scales must be .* got {jnp.dtype(dtype).name}"):
        codebook_matmul(x, dataclasses.replace(w, scales=w.scales.astype(dtype)))


def test_results_have_a_float_dtype():
    x, w = operands("tiny_m2v8", jnp.bfloat16, 1)
    with pytest.raises(TypeError, match="result must be .* got int8"):
        codebook_matmul(x, w, preferred_element_type=jnp.int8)
    with pytest.raises(TypeError, match="bias must be .* got complex64"):
        codebook_matmul(x, w, jnp.zeros(w.shape[1], jnp.complex64))


def test_what_is_no_array_or_weight_is_named():
    x, w = operands("tiny_m2v8", jnp.bfloat16, 1)
    with pytest.raises(TypeError, match="x must be an array, got list"):
        codebook_matmul([1.0], w)
    with pytest.raises(TypeError, match="must be a CodebookTensor, got ArrayImpl"):
        codebook_matmul(x, x)
    with pytest.raises(TypeError, match="codebook_matmul takes one"):
        codebook_matmuls(x, w)


@pytest.mark.parametrize("capability", ["8.0", "10.0", "12.0"])
def test_kernels_are_for_hopper_alone(monkeypatch, capability):
    class Device:
        platform, device_kind, compute_capability = "gpu", "Some GPU", capability

    monkeypatch.setattr(matmul_module, "_default_device", Device)
    for M in (1, 8, 64):
        spec = CodebookSpec.parse("m2v8g128")
        assert choose(M, 4096, [4096], spec, jnp.bfloat16) == "dequantize"


@pytest.mark.parametrize(
    ("dtype", "written"), [(jnp.bfloat16, True), (jnp.float16, True), (jnp.float32, False)]
)
def test_hopper_writes_dense_weights_with_a_kernel(monkeypatch, dtype, written):
    class Device:
        platform, device_kind, compute_capability = "gpu", "Some GPU", "9.0"

    monkeypatch.setattr(matmul_module, "_default_device", Device)

    def loss(x, w):
        return codebook_matmul(x, w, implementation="dequantize").astype(jnp.float32).sum()

    x, w = operands("tiny_m2v8", dtype, 2)
    wide = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), (x, w))
    for call, arguments in [(jax.grad(loss), (x, w)), (jax.vmap(jax.grad(loss)), wide)]:
        text = jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        assert ("dequantizer" in text) == written


def test_more_weights_than_a_launch_takes():
    x, w = operands("tiny_m2v8", jnp.bfloat16, 1)
    ys = codebook_matmuls(x, [w] * 17)
    assert len(ys) == 17
    np.testing.assert_array_equal(ys[16], codebook_matmul(x, w))


def test_wrong_scales_and_no_columns_are_refused():
    x, w = operands("tiny_m2v8", jnp.bfloat16, 1)
    with pytest.raises(ValueError, match=r"N = 256, got \[2, 255\]"):
        codebook_matmul(x, dataclasses.replace(w, scales=w.scales[:, :-1]))
    empty = CodebookTensor(w.codes[..., :0], w.codebooks, w.scales[..., :0])
    with pytest.raises(ValueError, match="N = 0"):
        codebook_matmul(x, empty)


def test_codebooks_that_a_code_can_overrun_are_refused():
    x, w = operands("tiny_m2v8", jnp.bfloat16, 1)
    with pytest.raises(ValueError, match="one for every code, got 200"):
        codebook_matmul(x, dataclasses.replace(w, codebooks=w.codebooks[:, :200]))
    with pytest.raises(ValueError, match="m = 2 codebooks, codebooks hold 1"):
        codebook_matmul(x, dataclasses.replace(w, codebooks=w.codebooks[:1]))


def test_a_bias_of_another_length_is_refused():
    x, w = operands("tiny_m2v8", jnp.bfloat16, 1)
    with pytest.raises(ValueError, match=r"N = 256, got \[255\]"):
        codebook_matmul(x, w, jnp.zeros(255))
    with pytest.raises(ValueError, match="Expected a bias .* 2, got 1"):
        codebook_matmuls(x, [w, w], [None])
    with pytest.raises(ValueError, match="at least one weight"):
        codebook_matmuls(x, [])
