"""The tensor-core kernel for few rows: values, races, tiles, refusals, lowering for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

from jaxcodec.pallas_kernels import mma
from jaxcodec.pallas_kernels.mma import Tiling, interpreted, plan
from jaxcodec.pallas_kernels.operands import layout
from jaxcodec.pallas_kernels.shapes import LLAMA_8B, LLAMA_70B
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import CodebookTensor, random_codebook_tensor
from tests.pallas_kernels.exact import operands, product, relative_error

INTERPRET = jax.default_backend() != "gpu"
SMALL = Tiling(rows=8, columns=64, width=16, parts=1, stages=2)
RAGGED = "m1v4g128", 5, 256, 40, Tiling(8, 32, 16, 2, 2)
# Scaled weights in float16 cost 2**-12 of themselves, float16 scales as much, and x nothing.
TOLERANCE = 5e-4
EXACT = 2e-6  # where nothing but float32 sums is rounded


@functools.partial(jax.jit, static_argnames=("tiles", "out_dtype"))
def matmul(x, weights, tiles=SMALL, out_dtype=jnp.float32):
    return mma.matmul(x, weights, tiles=tiles, interpret=INTERPRET, out_dtype=out_dtype)


@pytest.mark.parametrize(
    ("text", "M", "K", "N", "tiles"),
    [
        RAGGED,  # columns that no tile divides
        ("m2v8g128", 8, 768, 64, Tiling(8, 64, 32, 2, 2)),  # a ring that goes round
        ("m3v2g32", 27, 128, 32, Tiling(32, 32, 32, 1, 2)),  # two pairs of codebooks, small groups
        ("m1v16g64", 3, 192, 24, Tiling(8, 16, 16, 2, 4)),  # a part that ends early
        ("m2v4b4g16", 11, 128, 20, Tiling(16, 16, 16, 1, 2)),  # N that the TMA cannot copy
        ("m2v4b2g64", 1, 64, 16, Tiling(8, 16, 16, 1, 2)),  # K of half a span
        ("m2v8g256", 8, 1024, 16, Tiling(8, 16, 16, 8, 2)),  # parts that share a group
        ("m1v8b16g256", 3, 256, 16, Tiling(8, 16, 16, 2, 2)),  # a codebook in global memory
        ("m2v4b16g64", 3, 128, 16, Tiling(8, 16, 16, 1, 2)),
        ("m1v16b16g128", 3, 128, 16, Tiling(8, 16, 16, 1, 2)),
        ("m2v4g64", 50, 192, 24, Tiling(64, 16, 16, 1, 2)),
    ],
)
def test_it_is_the_product_with_the_dequantized_weight(text, M, K, N, tiles):
    x, w = operands(text, M, K, N)
    [y] = matmul(x, [w], tiles)
    assert y.shape == (M, N)
    assert relative_error(y, product(x, w)) < (EXACT if w.spec.group_size % 64 == 0 else TOLERANCE)
    if INTERPRET:
        assert not get_races().races_found


def test_codebooks_are_added_where_products_take_longer(monkeypatch):
    x, w = operands("m2v4g64", 11, 128, 16)
    tiles = Tiling(16, 16, 16, 1, 2)
    monkeypatch.setattr(plan, "FEW_PRODUCTS", 0)
    [y] = mma.matmul(x, [w], tiles=tiles, interpret=INTERPRET)  # not `matmul`, compiled otherwise
    assert relative_error(y, product(x, w)) < TOLERANCE


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_codebooks_that_bfloat16_cannot_hold(dtype):
    x, _ = operands("m2v8g64", 3, 64, 16)
    _, w = operands("m2v8g64", 3, 64, 16, dtype)
    [y] = matmul(x, [w], Tiling(8, 16, 16, 1, 2))
    assert relative_error(y, product(x, w)) < (EXACT if dtype == jnp.float16 else TOLERANCE)


@pytest.mark.skipif(INTERPRET, reason="The interpreter stalls with more threads than cores.")
@pytest.mark.parametrize(
    "tiles",
    [
        Tiling(8, 224, 32, 1, 8),
        Tiling(8, 112, 16, 2, 8),
        Tiling(16, 32, 32, 8, 2),
        Tiling(16, 16, 16, 8, 4),
        Tiling(32, 96, 16, 1, 2),
        Tiling(64, 224, 32, 1, 4),
        Tiling(64, 16, 16, 4, 2),
    ],
)
@pytest.mark.parametrize(
    ("text", "K", "N"), [("m1v4g128", 4096, 1000), ("m2v8g128", 2048, 4104), ("m1v8g64", 512, 264)]
)
def test_every_kind_of_tile(text, K, N, tiles):
    x, w = operands(text, tiles.rows - 1, K, N)
    for dtype in (jnp.float32, jnp.bfloat16):
        [y] = matmul(x, [w], tiles, dtype)
        tolerance = TOLERANCE if dtype == jnp.float32 else 3e-3
        assert relative_error(y, product(x, w)) < tolerance


def test_the_result_is_rounded_once_to_the_dtype_asked_for():
    x, w = operands("m1v4g64", 6, 128, 64, jnp.float16)
    [y], [precise] = matmul(x, [w], out_dtype=jnp.float16), matmul(x, [w])
    assert y.dtype == jnp.float16
    np.testing.assert_array_equal(y, np.asarray(precise).astype(jnp.float16))


def test_rows_of_any_magnitude():
    x, w = operands("m2v8g128", 8, 128, 64)
    powers = 2.0 ** np.array([-100, -60, -20, 0, 10, 30, 60, 100])
    x = (np.asarray(x, np.float64) * powers[:, None]).astype(jnp.bfloat16)
    x[3] = 0
    y, expected = np.asarray(matmul(x, [w])[0]), product(x, w)
    assert not np.any(y[3])
    for row in (0, 1, 2, 4, 5, 6, 7):
        assert relative_error(y[row], expected[row]) < EXACT


def test_codebooks_of_any_magnitude():
    x, w = operands("m1v4g64", 2, 64, 16)
    books = (np.asarray(w.codebooks, np.float64) * 2.0**-60).astype(w.codebooks.dtype)
    w = CodebookTensor(w.codes, books, w.scales)
    [y] = matmul(x, [w], Tiling(8, 16, 16, 1, 2))
    assert relative_error(y, product(x, w)) < EXACT


def test_weights_that_share_x():
    x, up = operands("m1v4g128", 5, 128, 72)
    _, down = operands("m1v4g128", 5, 128, 24, seed=5)
    for y, w in zip(matmul(x, [up, down]), [up, down], strict=True):
        assert relative_error(y, product(x, w)) < EXACT


def test_a_batch_equals_its_rows_alone():
    x, w = operands("m2v8g128", 8, 128, 64)
    x, y = np.asarray(x), np.asarray(matmul(x, [w])[0])
    for row in (0, 5, 7):
        np.testing.assert_array_equal(y[row : row + 1], matmul(x[row : row + 1], [w])[0])


def test_the_same_call_gives_the_same_bits():
    *shapes, tiles = RAGGED
    x, w = operands(*shapes)
    np.testing.assert_array_equal(matmul(x, [w], tiles)[0], matmul(x, [w], tiles)[0])


@pytest.mark.skipif(not INTERPRET, reason="The interpreter looks for races.")
def test_the_race_detector_sees_a_missing_barrier(monkeypatch):
    monkeypatch.setattr(interpreted, "commit_reads", lambda: None)
    x, w = operands("m1v4g128", 8, 512, 64)
    jax.block_until_ready(
        jax.jit(functools.partial(mma.matmul, tiles=SMALL, interpret=True))(x, [w])
    )
    assert get_races().races_found


@pytest.mark.parametrize(
    ("M", "K", "N", "spec", "dtype", "reason"),
    [
        (65, 4096, 4096, "m1v4g128", jnp.bfloat16, "M = 65"),
        (0, 4096, 4096, "m1v4g128", jnp.bfloat16, "M = 0"),
        (8, 4096, 4096, "m1v4g128", jnp.float32, "float32"),
        (8, 4096, 4096, "m1v4g192", jnp.bfloat16, "g = 192"),
        (8, 4096, 4, "m1v4g128", jnp.bfloat16, "N = 4"),
    ],
)
def test_refusals_name_the_number(M, K, N, spec, dtype, reason):
    refusal = mma.refusal(M, K, N, CodebookSpec.parse(spec), dtype)
    assert refusal is not None
    assert reason in refusal


def test_matmul_raises_what_refusal_says():
    x, w = operands("m1v4g128", 8, 128, 64, jnp.float32)
    with pytest.raises(NotImplementedError, match="float32"):
        mma.matmul(x, [w], interpret=INTERPRET)


def test_tiles_that_no_block_can_hold():
    x, w = operands("m4v8g64", 32, 512, 264)
    with pytest.raises(ValueError, match="shared memory"):
        mma.matmul(x, [w], tiles=Tiling(32, 128, 32, 2, 2), interpret=INTERPRET)


@pytest.mark.parametrize("M", [1, 8, 16, 64])
@pytest.mark.parametrize("spec", ["m1v4g128", "m2v8g128", "m4v8g128", "m4v2g16", "m3v16g64"])
def test_tiles_fit_real_shapes(spec, M):
    spec = CodebookSpec.parse(spec)
    for K, N in [*LLAMA_8B.values(), *LLAMA_70B.values(), (4096, 8), (128, 8192)]:
        found = mma.candidates(M, K, N, spec)
        assert found[0] == mma.tiling(M, K, N, spec)
        assert 1 <= len(set(found)) == len(found) <= plan.CANDIDATES
        for tiles in found:
            assert plan.shared_bytes(tiles, spec, scale_bytes=4) <= layout.SHARED_BYTES
            assert tiles.stages in plan.STAGES
            assert tiles.rows >= M


@pytest.mark.parametrize("M", [1, 64])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("spec", ["m1v4g128", "m2v8g128", "m3v16b8g32", "m1v8b16g4096"])
def test_lowers_for_cuda_without_a_gpu(spec, dtype, M):
    K, N = LLAMA_8B["llama_8b_gate_up"]
    make = lambda key: random_codebook_tensor(key, CodebookSpec.parse(spec), K, N, dtype)
    w = jax.eval_shape(make, jax.random.key(0))
    call = functools.partial(mma.matmul, out_dtype=dtype)
    x = jax.ShapeDtypeStruct((M, K), dtype)
    text = jax.jit(call).trace(x, [w, w]).lower(lowering_platforms=("cuda",)).as_text()
    assert "mma_matmul" in text
