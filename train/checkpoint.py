"""A run's directory: what run it is, its checkpoints, and the exact place to go on from.

run.json        the manifest: options, and hashes of data and weights
checkpoints/N   state after step N and position in the data, written by orbax
"""

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxcodec.checkpoints.files import read_json, write_json
from jaxcodec.train.step import TrainState

MANIFEST = "run.json"
CHECKPOINTS = "checkpoints"


def digest(tree: Any) -> str:
    """sha256 in hex of a pytree's structure, shapes, dtypes and bytes."""
    sha = hashlib.sha256(str(jax.tree.structure(tree)).encode())
    for leaf in jax.tree.leaves(tree):
        array = np.ascontiguousarray(jax.device_get(leaf))
        sha.update(f"{array.dtype} {array.shape}".encode())
        sha.update(array.view(np.uint8).data if array.size else b"")
    return sha.hexdigest()


def claim_directory(directory: str | os.PathLike, manifest: dict[str, Any]) -> None:
    """Make `directory` the run that `manifest` (flat, JSON values) describes, or go on with it.

    Raises:
      ValueError: the directory belongs to another run; names every entry that differs.
    """
    path = Path(directory) / MANIFEST
    if not path.exists():
        write_json(path, manifest)
        return
    held = read_json(path)
    differing = [
        f"{key} was {held.get(key)!r} and is {manifest.get(key)!r}"
        for key in sorted(held.keys() | manifest.keys())
        if held.get(key) != manifest.get(key)
    ]
    if differing:
        raise ValueError(
            f"{directory} holds another run: {'; '.join(differing)}. "
            "Choose another directory, or run with the options it was started with."
        )


class Checkpoints:
    """The last few checkpoints of a run; one is there whole or not at all."""

    def __init__(self, directory: str | os.PathLike, keep: int = 3):
        # Written before `save` returns: the state's buffers are donated to the next step.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        path = (Path(directory) / CHECKPOINTS).resolve()
        self._manager = ocp.CheckpointManager(path, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """Steps taken at the newest checkpoint; None when there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, position: dict[str, Any]) -> None:
        """Write `state` and the data iterator's `position`, and drop the oldest beyond `keep`."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_named_leaves(state)), data=ocp.args.JsonSave(position)
        )
        self._manager.save(int(state.step), args=args)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint, bit for bit, in the structure of `like`.

        Raises:
          FileNotFoundError: there is no checkpoint.
          ValueError: it holds other leaves than `like`.
        """
        if self.latest is None:
            raise FileNotFoundError(f"{self._manager.directory} holds no checkpoint.")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _named_leaves(like))
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
        )
        restored: Any = self._manager.restore(self.latest, args=args)
        leaves = [restored["state"][name] for name in _named_leaves(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), restored["data"]


def _named_leaves(state: TrainState) -> dict[str, jax.Array]:
    """Leaves by their path: orbax need not know the classes, and a file lists readable names."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
