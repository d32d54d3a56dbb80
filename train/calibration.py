"""What a block reads and must give back: hidden states outside the device, and Hessians of them.

Letters: n sequences, B of them at once, T tokens, D hidden, K input features of a linear.
Source: GPTQ (arXiv 2210.17323) section 3 for H; AQLM (arXiv 2401.06118) section 3 for the way
through the blocks: each reads what the quantized ones before it give.
"""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcodec.models.blocks import BlockModel, run_block, run_block_recording
from jaxcodec.models.sharding import DATA
from jaxcodec.models.tokenizer import Tokenizer
from jaxcodec.models.transformer import Model
from jaxcodec.train.data import read_examples

Hessians = dict[str, jax.Array]


def read_calibration(
    path: str | os.PathLike, tokenizer: Tokenizer, sequences: int, length: int
) -> np.ndarray:
    """The first `sequences` windows of `length` tokens of a JSONL file, int32 [n, T].

    Texts are joined as in pretraining. A shorter file gives fewer windows.

    Raises:
      ValueError: as `read_examples`; a file of fewer than `length` tokens.
    """
    examples = read_examples(path, tokenizer, length, pack=True)
    whole = np.flatnonzero(examples.counts == length)[:sequences]
    if not len(whole):
        raise ValueError(
            f"{path} holds {len(examples.tokens)} tokens, not one sequence of {length}: give more "
            "text, or a smaller length."
        )
    return np.asarray(examples.rows(whole).tokens)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where work is done: one device, or a mesh over whose axis "data" batches and columns split.

    Attributes:
      mesh: None for JAX's default device.
    """

    mesh: Mesh | None = None

    @property
    def name(self) -> str:
        """How many devices of which kind, such as `1 x NVIDIA H200`."""
        devices = jax.devices()[:1] if self.mesh is None else self.mesh.devices.ravel()
        return f"{len(devices)} x {devices[0].device_kind}"

    def replicated(self, tree):
        """A pytree, whole on every device."""
        return jax.device_put(tree, self._sharding())

    def rows(self, x: np.ndarray) -> jax.Array:
        """Sequences [B, ...], split over the devices."""
        return jax.device_put(x, self._sharding(DATA))

    def columns(self, W: jax.Array) -> jax.Array:
        """A matrix [K, N], its columns split over the devices where they divide it."""
        split = self.mesh is not None and W.shape[1] % self.mesh.shape[DATA] == 0
        return jax.device_put(W, self._sharding(None, DATA) if split else self._sharding())

    def check_batch(self, batch_size: int, sequences: int) -> None:
        """Refuse batches that the devices cannot share evenly."""
        count = 1 if self.mesh is None else self.mesh.shape[DATA]
        if batch_size % count or sequences % count:
            raise ValueError(
                f"{sequences} calibration sequences in batches of {batch_size} do not divide over "
                f"{count} devices: give multiples of {count}."
            )

    def _sharding(self, *axes: str | None):
        if self.mesh is None:
            return jax.devices()[0]
        return NamedSharding(self.mesh, PartitionSpec(*axes))


@dataclasses.dataclass(frozen=True)
class HiddenStates:
    """Hidden states of all calibration sequences, outside the device, rewritten block after block.

    Attributes:
      inputs: [n, T, D], what the block at hand reads.
      targets: [n, T, D], what the dense block makes of them.
    """

    inputs: np.ndarray
    targets: np.ndarray


def embedded(model: Model, tokens: np.ndarray, on_disk: Path | None = None) -> HiddenStates:
    """What the first block reads for tokens [n, T], and room for its targets.

    Args:
      on_disk: directory of two files that hold the states and are gone with the process; None for
        host memory.

    Raises:
      OSError: the disk cannot hold them; said now, not once they are written.
    """
    table_vd = np.asarray(model.embedding)
    shape = (*tokens.shape, table_vd.shape[1])
    states = HiddenStates(*(_room(shape, table_vd.dtype, on_disk) for _ in range(2)))
    for row, ids in zip(states.inputs, tokens, strict=True):
        row[:] = table_vd[ids]
    return states


def calibrate(
    block: BlockModel, states: HiddenStates, batch_size: int, place: Placement
) -> Hessians:
    """Write what the dense block makes of the inputs as targets; returns Hessians of its linears.

    Returns:
      f32 [K, K], X^T X / tokens, by path; of linears that share an input the first.
    """
    sums: Hessians = {}
    for rows in slices(len(states.inputs), batch_size):
        x_btd = place.rows(states.inputs[rows])
        y_btd, sums = _calibrate(block, x_btd, sums, place.mesh)
        states.targets[rows] = y_btd
    tokens = states.inputs.shape[0] * states.inputs.shape[1]
    return {name: H / tokens for name, H in sums.items()}


def advance(block: BlockModel, inputs: np.ndarray, batch_size: int, place: Placement) -> None:
    """Replace hidden states [n, T, D] by what the block makes of them."""
    for rows in slices(len(inputs), batch_size):
        inputs[rows] = run_block(block, place.rows(inputs[rows]))


def slices(count: int, size: int) -> Iterator[slice]:
    """`count` rows, `size` at a time."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _room(shape: tuple[int, ...], dtype: np.dtype, on_disk: Path | None) -> np.ndarray:
    if on_disk is None:
        return np.empty(shape, dtype)
    on_disk.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=on_disk) as file:
        os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)) * dtype.itemsize)
        return np.memmap(file, dtype, "r+", shape=shape)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="sums")
def _calibrate(
    block: BlockModel, x_btd: jax.Array, sums: Hessians, mesh: Mesh | None
) -> tuple[jax.Array, Hessians]:
    y_btd, inputs = run_block_recording(block, x_btd)
    with jax.named_scope("hessians"):
        added = {name: _gram(X_btk, mesh) for name, X_btk in inputs.items()}
        return y_btd, {name: H + sums[name] if sums else H for name, H in added.items()}


def _gram(X_btk: jax.Array, mesh: Mesh | None) -> jax.Array:
    """X^T X [K, K] in float32, the sequences added in their order on any number of devices."""
    H_bkl = jnp.einsum(
        "btk,btl->bkl", X_btk, X_btk, precision="highest", preferred_element_type=jnp.float32
    )
    if mesh is not None:
        H_bkl = jax.lax.with_sharding_constraint(H_bkl, NamedSharding(mesh, PartitionSpec()))
    return functools.reduce(jnp.add, H_bkl)
