"""What tensor-core kernels do to x before the launch: exact powers of two, order, any K."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcodec.pallas_kernels.operands.interpreted import in_fragment_order
from jaxcodec.pallas_kernels.operands.preparation import half_tiles

INTERPRET = jax.default_backend() != "gpu"


@pytest.mark.parametrize("K", [1024, 384, 72])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rows_are_scaled_exactly(K, dtype):
    x = (3e-5 * np.random.default_rng(1).normal(size=(5, K))).astype(dtype)
    tiles, factors = jax.jit(half_tiles, static_argnums=1)(x, INTERPRET)
    tiles, factors = np.asarray(tiles, np.float32), np.asarray(factors)
    rows = np.pad(x, ((0, 0), (0, -K % 64))).reshape(5, -1, 64).swapaxes(0, 1)
    np.testing.assert_array_equal(tiles * factors[None, :, None], in_fragment_order(rows))
    largest = np.max(np.abs(tiles), axis=(0, 2))
    assert np.all((largest >= 2.0**14) & (largest < 2.0**15))
