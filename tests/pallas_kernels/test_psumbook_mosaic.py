"""The gather kernel itself: races, tiles, refusals, the same bits twice, lowering for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcodec.pallas_kernels import psumbook_mosaic
from jaxcodec.pallas_kernels.psumbook import reference
from jaxcodec.pallas_kernels.shapes import LLAMA_8B, LLAMA_70B, TINY
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import random_codebook_tensor

INTERPRET = jax.default_backend() != "gpu"
M2V8 = CodebookSpec.parse("m2v8g128")


matmul = jax.jit(functools.partial(psumbook_mosaic.matmul, interpret=INTERPRET))


def operands(name, M, dtype=jnp.float32):
    text, K, N = TINY[name]
    w = random_codebook_tensor(jax.random.key(3), CodebookSpec.parse(text), K, N, dtype)
    return jax.random.normal(jax.random.key(4), (M, K), dtype), w


def interpreted(name, M):
    with jax.default_device(jax.devices("cpu")[0]):
        x, w = operands(name, M)
        jax.jit(lambda x, w: psumbook_mosaic.matmul(x, w, interpret=True))(x, w).block_until_ready()


@pytest.mark.parametrize(("name", "M"), [("tiny_two_column_tiles", 1), ("tiny_ragged_columns", 5)])
def test_no_races(name, M):
    interpreted(name, M)
    assert not get_races().races_found


def test_the_race_detector_sees_a_missing_barrier(monkeypatch):
    monkeypatch.setattr(plgpu, "barrier_arrive", lambda barrier: None)
    monkeypatch.setattr(plgpu, "barrier_wait", lambda barrier: None)
    interpreted("tiny_m1v4", 1)
    assert get_races().races_found


def test_several_chunks_of_columns_in_one_block(monkeypatch):
    monkeypatch.setattr(psumbook_mosaic, "MIN_BLOCKS", 1)
    monkeypatch.setattr(psumbook_mosaic, "COLUMN_TILES", (128,))
    x, w = operands("tiny_two_column_tiles", 2)
    assert psumbook_mosaic.tiling(2, *w.shape, w.spec).chunks == 4
    # Not `matmul`, which may have this shape compiled with other tiles.
    y = jax.jit(lambda x, w: psumbook_mosaic.matmul(x, w, interpret=INTERPRET))(x, w)
    np.testing.assert_allclose(y, reference(x, w), rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("M", [2, 3, 4, 6])
def test_a_batch_equals_its_rows_alone(M):
    x, w = operands("tiny_m2v8", M)
    alone = jnp.concatenate([matmul(x[r : r + 1], w) for r in range(M)])
    # The partial sums are added by XLA, whose order may differ between the two programs.
    np.testing.assert_allclose(matmul(x, w), alone, rtol=1e-6, atol=1e-6)


def test_the_same_call_gives_the_same_bits():
    x, w = operands("tiny_m1v4", 4, jnp.bfloat16)
    np.testing.assert_array_equal(matmul(x, w), matmul(x, w))


@pytest.mark.parametrize(
    ("M", "K", "N", "spec", "reason"),
    [
        (1, 4096, 4096, "m1v8b16g128", "b = 16"),
        (0, 4096, 4096, "m2v8g128", "M = 0"),
        (1, 4096, 100, "m2v8g128", "N = 100"),
        (1, 4096, 4096, "m2v8g8", "multiple of 4 v = 32, divides g = 8"),
        (1, 4096, 4096, "m1v16g32", "4 v = 64, divides g = 32"),
    ],
)
def test_refusals_name_the_number(M, K, N, spec, reason):
    with pytest.raises(NotImplementedError, match=reason):
        psumbook_mosaic.tiling(M, K, N, CodebookSpec.parse(spec))


@pytest.mark.parametrize("M", [1, 2, 4, 8])
@pytest.mark.parametrize("spec", ["m1v4g128", "m2v8g128", "m1v4g32", "m4v4g128", "m4v8g128"])
def test_tiles_fit_real_shapes(spec, M):
    spec = CodebookSpec.parse(spec)
    for K, N in [*LLAMA_8B.values(), *LLAMA_70B.values()]:
        tiles = psumbook_mosaic.tiling(M, K, N, spec)
        assert K % tiles.k_tile == 0
        assert spec.group_size % tiles.k_tile == 0
        assert tiles.k_tile % (4 * spec.vector_length) == 0
        entries = tiles.k_tile // spec.vector_length * spec.num_codebooks * 256 * tiles.rows
        assert 4 * entries <= psumbook_mosaic.PSUMBOOK_BYTES


def lowered(f, *arguments):
    return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("M", [1, 4])
@pytest.mark.parametrize("spec", ["m1v4g128", "m2v8g128"])
@pytest.mark.parametrize("shape", ["llama_8b_gate_up", "llama_8b_k_v"])
def test_lowers_for_cuda_without_a_gpu(shape, spec, M, dtype):
    K, N = LLAMA_8B[shape]
    make = lambda key: random_codebook_tensor(key, CodebookSpec.parse(spec), K, N, dtype)
    w = jax.eval_shape(make, jax.random.key(0))
    text = lowered(psumbook_mosaic.matmul, jax.ShapeDtypeStruct((M, K), dtype), w)
    assert text.count("mosaic_gpu") >= 1
    assert "psumbook_matmul" in text


def test_lowers_inside_a_larger_program():
    K, F = LLAMA_8B["llama_8b_gate_up"]
    make = lambda K, N: jax.eval_shape(
        lambda key: random_codebook_tensor(key, M2V8, K, N), jax.random.key(0)
    )

    def mlp(x, up, down):
        hidden = jax.nn.silu(psumbook_mosaic.matmul(x, up))
        return x + psumbook_mosaic.matmul(hidden, down)

    x = jax.ShapeDtypeStruct((2, K), jnp.bfloat16)
    assert "psumbook_matmul" in lowered(mlp, x, make(K, F), make(F, K))
