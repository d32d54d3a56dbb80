"""The gather kernel itself: values, races, tiles, refusals, the same bits, lowering for CUDA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

from jaxcodec.pallas_kernels import psumbook
from jaxcodec.pallas_kernels.psumbook import Tiling, candidates, refusal, tiling
from jaxcodec.pallas_kernels.psumbook import interpreted as twins
from jaxcodec.pallas_kernels.psumbook.plan import TABLE_BYTES, Plan
from jaxcodec.pallas_kernels.shapes import (
    LLAMA_8B,
    LLAMA_8B_TOGETHER,
    LLAMA_70B,
    LLAMA_70B_TOGETHER,
)
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import random_codebook_tensor
from tests.pallas_kernels.exact import draw, product, relative_error, weight

INTERPRET = jax.default_backend() != "gpu"
ONE = Tiling(warpgroups=1, columns=4, chunks=1, words=1, books=1, ahead=1, blocks=1)
TWO_SPLITS = Tiling(warpgroups=2, columns=4, chunks=1, words=1, books=1, ahead=2, blocks=2)
TWO_CHUNKS = Tiling(warpgroups=1, columns=2, chunks=2, words=1, books=1, ahead=3, blocks=3)
TWO_WORDS = Tiling(warpgroups=2, columns=4, chunks=1, words=2, books=1, ahead=1, blocks=2)
TWO_BOOKS = Tiling(warpgroups=1, columns=4, chunks=1, words=1, books=2, ahead=1, blocks=3)
IDLE_THREADS = Tiling(warpgroups=3, columns=1, chunks=1, words=1, books=3, ahead=1, blocks=2)
# (spec, M, K, N of each weight, tiles), between them every branch of the kernel.
CASES = {
    "two_books": ("m2v8g128", 1, 256, (256,), TWO_BOOKS),
    # Blocks of two tiles: the compiler then knows which codes are never asked for.
    "rows": ("m1v4g64", 2, 64, (64,), TWO_SPLITS),
    "a_tile_of_two_words": ("m1v4g64", 1, 128, (64,), TWO_WORDS),
    "columns_of_several_blocks": ("m1v4g32", 1, 96, (600,), TWO_CHUNKS),
    "uneven_splits": ("m1v8g32", 1, 224, (40,), TWO_CHUNKS),
    "odd_columns": ("m1v4g64", 1, 128, (201,), TWO_SPLITS),
    "several_weights": ("m1v4g64", 1, 128, (520, 8, 1), TWO_SPLITS),
    "small_groups": ("m3v4g16", 1, 64, (64,), TWO_CHUNKS),
    "half_the_books_of_long_vectors": ("m4v16g64", 1, 128, (32,), TWO_BOOKS),
    "a_tile_for_each_book_and_a_scale_for_all": ("m2v8g256", 1, 256, (32,), TWO_SPLITS),
    "narrow_codes": ("m1v4b4g128", 1, 256, (32,), TWO_WORDS),
    "narrowest_codes": ("m3v2b2g128", 1, 128, (32,), IDLE_THREADS),
}
ACCURACY = {jnp.float32: 1e-6, jnp.bfloat16: 1e-4, jnp.float16: 1e-4}


def operands(spec, M, K, Ns, dtype=jnp.bfloat16):
    return draw((M, K), dtype), [weight(spec, K, N, dtype, seed) for seed, N in enumerate(Ns, 1)]


@functools.cache
def compiled(tiles, out_dtype, interpret):
    call = functools.partial(psumbook.matmul, tiles=tiles, out_dtype=out_dtype, interpret=interpret)
    return jax.jit(call)


def multiply(x, weights, tiles, out_dtype=jnp.float32, interpret=INTERPRET):
    return compiled(tiles, out_dtype, interpret)(x, weights)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
    equals_the_reference(name, jnp.bfloat16)


@pytest.mark.parametrize("name", ["two_books", "odd_columns", "narrow_codes"])
def test_equals_the_reference_in_float32(name):
    equals_the_reference(name, jnp.float32)


def equals_the_reference(name, dtype):
    spec, M, K, Ns, tiles = CASES[name]
    x, weights = operands(spec, M, K, Ns, dtype)
    for y, w in zip(multiply(x, weights, tiles), weights, strict=True):
        assert y.shape == (x.shape[0], w.shape[1])
        assert relative_error(y, product(x, w)) < ACCURACY[dtype]
    if INTERPRET:
        assert not get_races().races_found


def test_results_of_the_wanted_dtype():
    x, weights = operands("m1v4g64", 1, 128, (64,))
    [y] = multiply(x, weights, ONE, jnp.float16)
    [exact] = multiply(x, weights, ONE)
    assert y.dtype == jnp.float16
    np.testing.assert_array_equal(y, np.asarray(exact).astype(jnp.float16))


def test_float32_activations_with_narrow_weights():
    x, weights = operands("m1v4g64", 1, 128, (64,))
    x = draw(x.shape, seed=2)
    assert relative_error(multiply(x, weights, ONE)[0], product(x, weights[0])) < 1e-6


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_one_activation_may_outweigh_all_others(scale):
    *shapes, tiles = CASES["a_tile_for_each_book_and_a_scale_for_all"]
    x, weights = operands(*shapes)
    x = (np.asarray(x, np.float64) * scale).astype(jnp.bfloat16)
    x[0, 5] = 300 * scale
    assert relative_error(multiply(x, weights, tiles)[0], product(x, weights[0])) < 2e-4


def test_zeros_give_zeros_and_what_is_not_finite_spreads():
    x, weights = operands("m1v4g64", 1, 128, (64,))
    x = np.array(x)
    np.testing.assert_array_equal(multiply(0 * x, weights, ONE)[0], 0)
    for broken in (np.nan, np.inf):
        x[0, 3] = broken
        assert not np.isfinite(np.asarray(multiply(x, weights, ONE)[0])).any()


def interpreted(name):
    *shapes, tiles = CASES[name]
    with jax.default_device(jax.devices("cpu")[0]):
        x, weights = operands(*shapes)
        fresh = compiled.__wrapped__(tiles, jnp.float32, interpret=True)
        jax.block_until_ready(fresh(x, weights))


def test_the_race_detector_sees_a_missing_barrier(monkeypatch):
    monkeypatch.setattr(twins, "sync", lambda barrier: None)
    interpreted("two_books")
    assert get_races().races_found


def test_a_batch_equals_its_rows_alone():
    *shapes, tiles = CASES["rows"]
    x, weights = operands(*shapes)
    [together] = multiply(x, weights, tiles)
    x = np.asarray(x)
    alone = [multiply(x[r : r + 1], weights, tiles)[0] for r in range(2)]
    np.testing.assert_array_equal(together, np.concatenate(alone))


def test_the_same_call_gives_the_same_bits():
    *shapes, tiles = CASES["two_books"]
    x, weights = operands(*shapes)
    np.testing.assert_array_equal(*(multiply(x, weights, tiles)[0] for _ in range(2)))


def test_the_default_tiles():
    x, weights = operands("m2v8g128", 1, 128, (64,))
    assert relative_error(multiply(x, weights, None)[0], product(x, weights[0])) < 1e-4


@pytest.mark.parametrize(
    ("M", "K", "N", "spec", "reason"),
    [
        (1, 4096, 4096, "m1v8b16g128", "b = 16"),
        (0, 4096, 4096, "m2v8g128", "M = 0"),
        (1, 4096, 0, "m2v8g128", "N = 0"),
        (1, 4096, 4096, "m2v8g8", "4 v = 32 input features, which must divide g = 8"),
        (1, 4096, 4096, "m1v16g32", "4 v = 64 input features, which must divide g = 32"),
    ],
)
def test_refusals_name_the_number(M, K, N, spec, reason):
    spec = CodebookSpec.parse(spec)
    assert reason in (refusal(M, K, N, spec, jnp.bfloat16) or "")
    with pytest.raises(NotImplementedError, match=reason):
        tiling(M, K, [N], spec)


def test_a_matmul_refuses_too():
    x, weights = operands("m2v8g128", 1, 256, (64,))
    with pytest.raises(NotImplementedError, match="M = 0"):
        psumbook.matmul(x[:0], weights)


@pytest.mark.parametrize("spec", ["m1v4g128", "m2v8g128", "m3v4g32", "m4v8g128", "m2v4b4g128"])
@pytest.mark.parametrize("shape", [*LLAMA_8B.values(), *LLAMA_70B.values(), (16384, 53248)])
def test_tiles_fit_real_shapes(spec, shape):
    spec = CodebookSpec.parse(spec)
    found = candidates(1, shape[0], shape[1:], spec)
    assert len(set(found)) == len(found) <= 6
    for tiles in found:
        plan = Plan.of(tiles, shape[0], shape[1:], spec, jnp.bfloat16)
        assert plan.table_bytes <= TABLE_BYTES
        assert spec.group_size % plan.features == 0
        assert shape[0] % plan.features == 0
        assert spec.num_codebooks % plan.books == 0
        assert plan.starts[-1] <= tiles.blocks
        assert plan.splits[0] <= plan.tiles


def test_tiles_are_no_wider_than_the_widest_of_several_weights():
    spec = CodebookSpec.parse("m2v8g128")
    K, Ns = LLAMA_8B_TOGETHER["llama_8b_qkv"]
    plan = Plan.of(tiling(1, K, Ns, spec), K, Ns, spec, jnp.bfloat16)
    assert plan.block_columns == max(Ns)


def test_every_split_of_several_weights_has_its_share():
    spec = CodebookSpec.parse("m2v8g128")
    K, Ns = LLAMA_70B_TOGETHER["llama_70b_qkv"]
    plan = Plan.of(tiling(1, K, Ns, spec), K, Ns, spec, jnp.bfloat16)
    assert plan.splits[0] >= plan.splits[1] == plan.splits[2] > 1


def lowered(f, *arguments):
    return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("spec", "Ns", "dtype"),
    [
        ("m1v4g128", (14336,), jnp.bfloat16),
        ("m2v8g128", (4096, 1024, 1024), jnp.float16),
        ("m2v8g128", (201,), jnp.bfloat16),
        ("m4v8g128", (14336,), jnp.float32),
        ("m2v4b4g128", (201,), jnp.float32),
    ],
)
def test_lowers_for_cuda_without_a_gpu(spec, Ns, dtype):
    make = lambda N: jax.eval_shape(
        lambda key: random_codebook_tensor(key, CodebookSpec.parse(spec), 4096, N, dtype),
        jax.random.key(0),
    )
    x = jax.ShapeDtypeStruct((2, 4096), dtype)
    call = functools.partial(psumbook.matmul, out_dtype=dtype)
    text = lowered(call, x, [make(N) for N in Ns])
    assert "psumbook_partial_sums" in text
    assert text.count("mosaic_gpu") >= 2


def test_tilings_are_values():
    assert dataclasses.replace(ONE, ahead=1) == ONE
