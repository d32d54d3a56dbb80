"""The tensor-core kernel for many rows: values, races, tiles, refusals, lowering for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

from jaxcodec.pallas_kernels import wgmma
from jaxcodec.pallas_kernels.operands import layout
from jaxcodec.pallas_kernels.shapes import LLAMA_8B, LLAMA_70B
from jaxcodec.pallas_kernels.wgmma import Tiling, interpreted, plan
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import CodebookTensor, random_codebook_tensor
from tests.pallas_kernels.exact import operands, product, relative_error

INTERPRET = jax.default_backend() != "gpu"
SMALL = Tiling(rows=64, strips=2, stages=2)
SPLIT = "m2v8g128", 20, 384, 72, Tiling(64, 2, 3, splits=2)
# float16 weights cost 2**-12 of themselves, float16 scales as much, and x nothing.
TOLERANCE = 5e-4


@functools.partial(jax.jit, static_argnames=("tiles", "out_dtype"))
def matmul(x, weights, tiles=SMALL, out_dtype=jnp.float32):
    return wgmma.matmul(x, weights, tiles=tiles, interpret=INTERPRET, out_dtype=out_dtype)


@pytest.mark.parametrize(
    ("text", "M", "K", "N", "tiles"),
    [
        ("m1v4g128", 70, 256, 200, SMALL),  # rows and columns that no tile divides
        SPLIT,  # parts of K that end early
        ("m3v2g32", 20, 128, 72, SMALL),  # two pairs of codebooks, two scales a step
        ("m1v16g128", 9, 128, 36, SMALL),  # N that the TMA cannot copy
        ("m4v4b4g16", 64, 128, 128, SMALL),
        ("m2v4b2g64", 1, 192, 64, Tiling(64, 2, 4)),  # K of an odd number of steps
        ("m1v8g128", 16, 128, 128, Tiling(128, 2, 2)),
        ("m2v8g64", 5, 512, 64, Tiling(32, 1, 2, parts=2)),  # more steps than one part has
        ("m1v4g128", 17, 384, 64, Tiling(32, 1, 3, parts=2, splits=2)),
        ("m2v4g32", 20, 192, 64, Tiling(32, 1, 2, parts=2)),  # a part that ends early
    ],
)
def test_it_is_the_product_with_the_dequantized_weight(text, M, K, N, tiles):
    x, w = operands(text, M, K, N)
    [y] = matmul(x, [w], tiles)
    assert y.shape == (M, N)
    assert relative_error(y, product(x, w)) < TOLERANCE
    if INTERPRET:
        assert not get_races().races_found


@pytest.mark.skipif(INTERPRET, reason="The interpreter stalls with more threads than cores.")
@pytest.mark.parametrize(
    "tiles",
    [
        Tiling(32, 1, 3, parts=4),
        Tiling(32, 2, 4, parts=2, splits=2),
        Tiling(32, 4, 4, splits=2),
        Tiling(64, 1, 3, parts=2),
        Tiling(64, 3, 2),
        Tiling(64, 4, 8),
        Tiling(128, 2, 5, cluster=2),
        Tiling(128, 3, 3),
        Tiling(256, 2, 4, cluster=2),
    ],
)
@pytest.mark.parametrize(
    ("text", "M", "K", "N"),
    [("m1v4g128", 300, 4096, 1000), ("m2v8g128", 70, 1024, 4104), ("m4v8g32", 513, 512, 264)],
)
def test_every_kind_of_tile(text, M, K, N, tiles):
    x, w = operands(text, M, K, N)
    for dtype in (jnp.float32, jnp.bfloat16):
        [y] = matmul(x, [w], tiles, dtype)
        tolerance = TOLERANCE if dtype == jnp.float32 else 3e-3
        assert relative_error(y, product(x, w)) < tolerance


def test_a_block_walks_several_tiles(monkeypatch):
    monkeypatch.setattr(plan, "SMS", 2)  # for 2 tiles along M, 2 along one N and 1 along the other
    x, first = operands("m2v8g128", 66, 128, 200)
    _, second = operands("m2v8g128", 66, 128, 64, seed=5)
    # Not `matmul`, which may have this shape compiled for another grid.
    call = functools.partial(wgmma.matmul, tiles=SMALL, interpret=INTERPRET)
    for y, w in zip(jax.jit(call)(x, [first, second]), [first, second], strict=True):
        assert relative_error(y, product(x, w)) < TOLERANCE
    if INTERPRET:
        assert not get_races().races_found


def test_the_result_is_rounded_once_to_the_dtype_asked_for():
    x, w = operands("m1v4g64", 12, 128, 128)
    [y], [precise] = matmul(x, [w], out_dtype=jnp.bfloat16), matmul(x, [w])
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, np.asarray(precise).astype(jnp.bfloat16))


def test_rows_of_any_magnitude():
    x, w = operands("m1v4g64", 12, 128, 128)
    powers = 2.0 ** np.array([-100, -60, -30, -20, -10, 0, 10, 20, 30, 60, 90, 100])
    x = (np.asarray(x, np.float64) * powers[:, None]).astype(jnp.bfloat16)
    x[3] = 0
    y, expected = np.asarray(matmul(x, [w])[0]), product(x, w)
    assert not np.any(y[3])
    for row in (0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11):
        assert relative_error(y[row], expected[row]) < TOLERANCE


def test_scales_as_small_and_as_large_as_a_weight_may_have():
    x, w = operands("m1v4g64", 12, 128, 128)
    sizes = np.where(np.arange(128) % 2 == 0, 2.0**-12, 2.0**7)
    scales = (np.asarray(w.scales, np.float64) * sizes).astype(w.scales.dtype)
    w = CodebookTensor(w.codes, w.codebooks, scales)
    y, expected = np.asarray(matmul(x, [w])[0]), product(x, w)
    for columns in (slice(0, None, 2), slice(1, None, 2)):
        assert relative_error(y[:, columns], expected[:, columns]) < TOLERANCE


def test_weights_that_share_x():
    x, up = operands("m1v4g128", 20, 128, 136)
    _, down = operands("m1v4g128", 20, 128, 24, seed=5)
    for y, w in zip(matmul(x, [up, down]), [up, down], strict=True):
        assert relative_error(y, product(x, w)) < TOLERANCE


def test_a_batch_equals_its_rows_alone():
    x, w = operands("m2v8g128", 66, 128, 64)
    x, y = np.asarray(x), np.asarray(matmul(x, [w])[0])
    for row in (0, 63, 65):
        np.testing.assert_array_equal(y[row : row + 1], matmul(x[row : row + 1], [w])[0])


def test_the_same_call_gives_the_same_bits():
    *shapes, tiles = SPLIT
    x, w = operands(*shapes)
    np.testing.assert_array_equal(matmul(x, [w], tiles)[0], matmul(x, [w], tiles)[0])


@pytest.mark.skipif(not INTERPRET, reason="The interpreter looks for races.")
def test_the_race_detector_sees_a_missing_barrier(monkeypatch):
    monkeypatch.setattr(interpreted, "commit_reads", lambda: None)
    x, w = operands("m1v4g128", 8, 256, 128)
    jax.jit(functools.partial(wgmma.matmul, tiles=SMALL, interpret=True))(x, [w])[
        0
    ].block_until_ready()
    assert get_races().races_found


@pytest.mark.parametrize(
    ("M", "K", "N", "spec", "dtype", "reason"),
    [
        (64, 4096, 4096, "m1v4g128", jnp.float32, "float32"),
        (64, 4096, 4096, "m1v8b16g128", jnp.bfloat16, "b = 16"),
        (64, 4096, 4096, "m1v8b4g8", jnp.bfloat16, "g = 8"),
        (64, 4096, 4096, "m1v8b2g128", jnp.bfloat16, "spans 128"),
        (64, 4096, 4096, "m1v16b4g128", jnp.bfloat16, "spans 128"),
        (64, 4096, 4096, "m1v4g96", jnp.bfloat16, "g = 96"),
        (0, 4096, 4096, "m1v4g128", jnp.bfloat16, "M = 0"),
        (64, 4096, 4, "m1v4g128", jnp.bfloat16, "N = 4"),
    ],
)
def test_refusals_name_the_number(M, K, N, spec, dtype, reason):
    refusal = wgmma.refusal(M, K, N, CodebookSpec.parse(spec), dtype)
    assert refusal is not None
    assert reason in refusal


def test_matmul_raises_what_refusal_says():
    x, w = operands("m1v4g128", 8, 128, 128, jnp.float32)
    with pytest.raises(NotImplementedError, match="float32"):
        wgmma.matmul(x, [w], interpret=INTERPRET)


@pytest.mark.parametrize("M", [1, 16, 64, 100, 128, 256, 512, 1024, 4096])
@pytest.mark.parametrize("spec", ["m1v4g128", "m2v8g128", "m4v8g128", "m4v2g16", "m3v16g64"])
def test_tiles_fit_real_shapes(spec, M):
    spec = CodebookSpec.parse(spec)
    for K, N in [*LLAMA_8B.values(), *LLAMA_70B.values(), (4096, 8)]:
        found = wgmma.candidates(M, K, N, spec)
        assert found[0] == wgmma.tiling(M, K, N, spec)
        assert 1 <= len(set(found)) == len(found) <= plan.CANDIDATES
        for tiles in found:
            assert plan.shared_bytes(tiles, spec, scale_bytes=4) <= layout.SHARED_BYTES
            assert tiles.stages >= 2
            # Accumulators, two fragments and what gathers them.
            assert tiles.rows // 2 + 64 <= layout.REGISTERS[tiles.warpgroups]


def lowered(f, *arguments):
    return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("M", [32, 512])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("spec", ["m1v4g128", "m2v8g128", "m3v16b8g32", "m1v2b2g64"])
def test_lowers_for_cuda_without_a_gpu(spec, dtype, M):
    K, N = LLAMA_8B["llama_8b_gate_up"]
    make = lambda key: random_codebook_tensor(key, CodebookSpec.parse(spec), K, N, dtype)
    w = jax.eval_shape(make, jax.random.key(0))
    call = functools.partial(wgmma.matmul, out_dtype=dtype)
    text = lowered(call, jax.ShapeDtypeStruct((M, K), dtype), [w, w])
    assert "wgmma_matmul" in text


def test_clusters_lower_for_cuda():
    x, w = operands("m2v8g128", 256, 256, 256)
    call = functools.partial(wgmma.matmul, tiles=Tiling(256, 2, 4, cluster=2))
    assert "wgmma_matmul" in lowered(call, x, [w])
