"""A product split over a mesh equals the product on one device, and moves no weight."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcodec.pallas_kernels import partitioning
from jaxcodec.pallas_kernels.matmul import codebook_matmuls
from jaxcodec.tensor import CodebookTensor, dequantize
from tests.pallas_kernels.exact import draw, product, weight

needs_four = pytest.mark.skipif(jax.device_count() < 4, reason="a mesh of 2 x 2 devices")
K, NS = 512, (256, 128)


def place(mesh, array, *names):
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*names)))


def split(mesh, w, axis):
    k, n = ("model", None) if axis == "K" else (None, "model")
    scales_k = k if w.scales.shape[0] > 1 else None
    return CodebookTensor(
        place(mesh, w.codes, None, k, n),
        place(mesh, w.codebooks),
        place(mesh, w.scales, scales_k, n),
    )


@needs_four
@pytest.mark.parametrize("axis", ["N", "K"])
# Groups above, as, and below a packed word, and all of K in a group.
@pytest.mark.parametrize("text", ["m2v8g128", "m2v8g32", "m2v8g8", "m1v4g512"])
def test_split_equals_whole(text, axis):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    whole = [weight(text, K, N, np.float32, seed=N) for N in NS]
    weights = [split(mesh, w, axis) for w in whole]
    x = draw((4, K))
    x_split = place(mesh, x, "data", "model" if axis == "K" else None)
    multiply = jax.jit(codebook_matmuls)
    ys = multiply(x_split, weights)
    for y, w in zip(ys, whole, strict=True):
        np.testing.assert_allclose(y, product(x, w), rtol=1e-5, atol=5e-6)
        assert y.sharding.spec[0] == "data"
    compiled = multiply.lower(x_split, weights).compile().as_text() or ""
    assert "all-gather" not in compiled
    assert ("all-reduce" in compiled) == (axis == "K")


@needs_four
@pytest.mark.parametrize("axis", ["N", "K"])
@pytest.mark.parametrize("text", ["m2v8g128", "m2v8g8", "m1v4g512"])
def test_a_weight_is_written_where_its_codes_are(text, axis):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    whole = weight(text, K, 256)
    write = jax.jit(partitioning.partitioned_weight(dequantize))
    w = split(mesh, whole, axis)
    written = write(w)
    np.testing.assert_array_equal(written, jax.jit(dequantize)(whole))
    assert written.sharding.spec[0 if axis == "K" else 1] in ("model", ("model",))
    assert "all-gather" not in (write.lower(w).compile().as_text() or "")


@needs_four
@pytest.mark.parametrize(
    ("rows", "k", "axis"),
    [
        (("data", "model"), None, "N"),
        (("model", "data"), None, "N"),
        ("model", None, "N"),
        ("model", "data", "N"),
        (("data", "model"), None, "K"),
        ("model", None, "K"),
        ("model", "data", "K"),
    ],
)
def test_an_axis_cuts_one_dimension(rows, k, axis):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    whole = [weight("m2v8g128", K, N, np.float32, seed=N) for N in NS]
    weights = [split(mesh, w, axis) for w in whole]
    x = draw((8, K))
    ys = jax.jit(codebook_matmuls)(place(mesh, x, rows, k), weights)
    for y, w in zip(ys, whole, strict=True):
        np.testing.assert_allclose(y, product(x, w), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(
    ("axes", "taken", "left"),
    [
        (None, (None,), None),
        ("model", (None, "data"), ("model",)),
        ("model", ("model",), None),
        (("data", "model"), ("model", None), ("data",)),
        ("model", (("data", "model"), None), None),
        (("a", "b", "c"), ("c", ("d", "a")), ("b",)),
    ],
)
def test_axes_that_are_left(axes, taken, left):
    assert partitioning._without(axes, *taken) == left


@needs_four
def test_groups_that_the_devices_do_not_divide_are_gathered():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    w = weight("m1v2g48", 96, 64, np.float32)
    x = draw((3, 96))
    split_x = place(mesh, x, None, "model")
    (y,) = jax.jit(lambda x, w: codebook_matmuls(x, [w]))(split_x, w)
    np.testing.assert_allclose(y, product(x, w), rtol=1e-5, atol=5e-6)
