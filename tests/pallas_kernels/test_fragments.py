"""The fragment kernel itself: values, races, tiles, refusals, the same bits, lowering for CUDA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

from jaxcodec.pallas_kernels import fragments
from jaxcodec.pallas_kernels.fragments import Tiling, candidates, refusal, tiling
from jaxcodec.pallas_kernels.fragments import interpreted as twins
from jaxcodec.pallas_kernels.reference import reference
from jaxcodec.pallas_kernels.shapes import LLAMA_8B, LLAMA_70B
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import random_codebook_tensor

INTERPRET = jax.default_backend() != "gpu"
ONE_WARPGROUP = Tiling(columns=1, k_warps=4, stages=3, chunk=1, warpgroups=1)
TWO_CHUNKS = Tiling(columns=2, k_warps=2, stages=2, chunk=1, warpgroups=1)
LONG_CHUNKS = Tiling(columns=1, k_warps=2, stages=2, chunk=3, warpgroups=1)
IDLE_WARPS = Tiling(columns=3, k_warps=2, stages=3, chunk=2, warpgroups=2)
CLUSTER = Tiling(columns=1, k_warps=4, k_blocks=2, stages=3, chunk=1, warpgroups=1)
# (spec, M, K, N of each weight, tiles), between them every branch of the kernel.
CASES = {
    "one_row": ("m1v4g128", 1, 256, (64,), ONE_WARPGROUP),
    "a_ragged_last_tile": ("m2v8g128", 3, 512, (72,), ONE_WARPGROUP),
    "eight_rows_two_chunks": ("m1v4g128", 8, 1024, (64,), TWO_CHUNKS),
    "nine_rows": ("m1v4g128", 9, 512, (40,), TWO_CHUNKS),
    "rows_of_three_fragments": ("m2v8g128", 33, 256, (32,), ONE_WARPGROUP),
    "uneven_turns": ("m1v8g128", 2, 896, (32,), LONG_CHUNKS),
    "several_weights": ("m1v4g128", 4, 256, (64, 8, 40), IDLE_WARPS),
    "a_cluster": ("m1v8g128", 5, 1152, (64,), CLUSTER),
    "a_cluster_of_several_weights": ("m1v4g128", 17, 512, (32, 64), CLUSTER),
    "small_groups": ("m3v4g16", 5, 64, (64,), TWO_CHUNKS),
    "small_groups_of_long_vectors": ("m4v16g64", 2, 128, (32,), ONE_WARPGROUP),
    "short_vectors": ("m1v2g32", 2, 96, (32,), ONE_WARPGROUP),
    "part_of_a_step": ("m1v4g192", 2, 192, (32,), ONE_WARPGROUP),
    "scale_of_a_row": ("m2v4g1024", 2, 1024, (32,), LONG_CHUNKS),
    "narrow_codes": ("m1v4b4g128", 2, 256, (32,), ONE_WARPGROUP),
    "narrowest_codes": ("m2v2b2g128", 2, 128, (32,), ONE_WARPGROUP),
    "wide_codes": ("m1v8b16g64", 2, 192, (32,), ONE_WARPGROUP),
}


def operands(spec, M, K, Ns, dtype=jnp.bfloat16, book_dtype=None):
    make = lambda i, N: random_codebook_tensor(
        jax.random.key(i), CodebookSpec.parse(spec), K, N, book_dtype or dtype
    )
    return jax.random.normal(jax.random.key(9), (M, K), dtype), [*map(make, range(len(Ns)), Ns)]


def multiply(x, weights, tiles, out_dtype=jnp.float32, interpret=INTERPRET):
    call = functools.partial(
        fragments.matmul, tiles=tiles, out_dtype=out_dtype, interpret=interpret
    )
    return jax.jit(call)(x, weights)


def check(x, weights, ys, bound=1e-5):
    for y, w in zip(ys, weights, strict=True):
        wanted = np.asarray(reference(x.astype(jnp.float32), w), np.float64)
        error = np.linalg.norm(np.asarray(y, np.float64) - wanted) / np.linalg.norm(wanted)
        assert error < bound


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
    *shapes, tiles = CASES[name]
    x, weights = operands(*shapes)
    check(x, weights, multiply(x, weights, tiles))


@pytest.mark.parametrize("spec", ["m2v8g128", "m1v8b16g128"])
@pytest.mark.parametrize(
    ("dtype", "book_dtype", "bound"),
    [
        (jnp.float16, jnp.float16, 1e-5),
        (jnp.float16, jnp.bfloat16, 1e-5),
        (jnp.float16, jnp.float32, 1e-5),
        # Two bf16 hold 16 bits of a codebook value.
        (jnp.bfloat16, jnp.float16, 2e-5),
        (jnp.bfloat16, jnp.float32, 2e-5),
    ],
)
def test_dtypes(spec, dtype, book_dtype, bound):
    x, weights = operands(spec, 2, 256, (32,), dtype, book_dtype)
    (y,) = multiply(x, weights, ONE_WARPGROUP)
    assert y.dtype == jnp.float32
    check(x, weights, [y], bound)


@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float16])
def test_a_narrow_result_is_the_wide_one_rounded(out_dtype):
    x, weights = operands("m1v4g128", 3, 256, (64,))
    (wide,) = multiply(x, weights, ONE_WARPGROUP)
    (narrow,) = multiply(x, weights, ONE_WARPGROUP, out_dtype)
    np.testing.assert_array_equal(narrow, wide.astype(out_dtype))


def test_the_same_call_gives_the_same_bits():
    x, weights = operands("m2v8g128", 8, 512, (64,))
    first, second = (multiply(x, weights, ONE_WARPGROUP)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("M", [2, 8, 11])
def test_a_batch_equals_its_rows_alone(M):
    x, weights = operands("m2v8g128", M, 512, (32,))
    (y,) = multiply(x, weights, ONE_WARPGROUP)
    rows = range(M) if M < 9 else (0, 10)
    for r in rows:
        (alone,) = multiply(x[r : r + 1], weights, ONE_WARPGROUP)
        np.testing.assert_allclose(y[r], alone[0], rtol=1e-5, atol=1e-5)


def interpreted(name):
    with jax.default_device(jax.devices("cpu")[0]):
        *shapes, tiles = CASES[name]
        jax.block_until_ready(multiply(*operands(*shapes), tiles, interpret=True))


@pytest.mark.parametrize("name", ["eight_rows_two_chunks", "several_weights", "a_cluster"])
def test_no_races(name):
    interpreted(name)
    assert not get_races().races_found


@pytest.mark.parametrize(
    ("barrier", "name"), [("sync_block", "several_weights"), ("sync_cluster", "a_cluster")]
)
def test_the_race_detector_sees_a_missing_barrier(monkeypatch, barrier, name):
    monkeypatch.setattr(twins, barrier, lambda _: None)
    interpreted(name)
    assert get_races().races_found


@pytest.mark.parametrize(
    ("M", "K", "N", "spec", "dtype", "reason"),
    [
        (0, 4096, 4096, "m2v8g128", "bfloat16", "M = 0"),
        (65, 4096, 4096, "m2v8g128", "bfloat16", "M = 65"),
        (1, 4096, 4096, "m2v8g128", "float32", "float32"),
        (1, 4096, 100, "m2v8g128", "bfloat16", "N = 100"),
        (1, 4096, 4, "m2v8g128", "bfloat16", "N = 4"),
        (1, 1032, 4096, "m1v4g4", "bfloat16", "K = 1032"),
        (1, 4096, 4096, "m1v4g8", "bfloat16", "g = 8"),
        (1, 4096, 4096, "m1v2g8", "bfloat16", "g = 8"),
        (1, 4096, 4096, "m1v8b16g32", "bfloat16", "g = 32"),
        (1, 4096, 4096, "m1v2b16g128", "bfloat16", "v = 2"),
        (1, 4096, 4096, "m1v16b2g128", "bfloat16", "64 features"),
    ],
)
def test_refusals_name_the_number(M, K, N, spec, dtype, reason):
    assert reason in str(refusal(M, K, N, CodebookSpec.parse(spec), jnp.dtype(dtype)))


def test_weights_of_one_launch_are_alike():
    x, (w,) = operands("m1v4g128", 1, 256, (64,))
    _, (other,) = operands("m1v4g64", 1, 256, (64,))
    with pytest.raises(ValueError, match="m1v4g64"):
        fragments.matmul(x, [w, other])


@pytest.mark.parametrize("M", [1, 4, 8, 16, 32, 33, 64])
@pytest.mark.parametrize(
    "spec", ["m1v4g128", "m2v8g128", "m4v16g64", "m3v4g32", "m1v8b16g128", "m1v2g32", "m1v4b4g128"]
)
def test_tiles_fit_real_shapes(spec, M):
    spec = CodebookSpec.parse(spec)
    for K, N in [*LLAMA_8B.values(), *LLAMA_70B.values()]:
        every = candidates(M, K, N, spec)
        assert every[0] == tiling(M, K, N, spec)
        assert 1 <= len(every) <= 12
        assert len(set(every)) == len(every)
        for tiles in every:
            assert all(value >= 1 for value in dataclasses.astuple(tiles))
            assert tiles.columns * tiles.k_warps <= 4 * tiles.warpgroups


def lowered(f, *arguments):
    return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("M", [1, 16, 64])
@pytest.mark.parametrize("spec", ["m1v4g128", "m2v8g128", "m4v16g64", "m3v4g32", "m1v8b16g128"])
@pytest.mark.parametrize("shape", ["llama_8b_k_v", "llama_70b_down"])
def test_lowers_for_cuda_without_a_gpu(shape, spec, M):
    K, N = {**LLAMA_8B, **LLAMA_70B}[shape]
    make = lambda key: random_codebook_tensor(key, CodebookSpec.parse(spec), K, N)
    w = jax.eval_shape(make, jax.random.key(0))
    x = jax.ShapeDtypeStruct((M, K), jnp.bfloat16)
    text = lowered(lambda x, w: fragments.matmul(x, [w, w]), x, w)
    assert text.count("mosaic_gpu") >= 1
    assert "codebook_fragments" in text


def test_lowers_every_case():
    for *shapes, tiles in CASES.values():
        x, weights = jax.eval_shape(functools.partial(operands, *shapes))
        lowered(functools.partial(fragments.matmul, tiles=tiles), x, weights)
