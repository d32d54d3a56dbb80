"""A run's directory: what run it is, its checkpoints, and the exact place to go on from.

run.json        the manifest: options, and hashes of data and weights
checkpoints/N   state after step N and position in the data, written by orbax
"""

import asyncio
import contextlib
import errno
import hashlib
import json
import logging
import os
import reprlib
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxcodec.checkpoints.files import first_few, read_json, write_json
from jaxcodec.train.step import TrainState

MANIFEST = "run.json"
CHECKPOINTS = "checkpoints"
MOST_SAID = 200  # characters of what TensorStore says, which is pages too
# Orbax's words for a checkpoint that is whole, and of another model.
OTHER_LEAVES = ("structures do not match", "not compatible with the stored shape")
# TensorStore's words for files that are cut, changed or gone.
DAMAGE = ("OUT_OF_RANGE", "DATA_LOSS", "FAILED_PRECONDITION", "NOT_FOUND", "INVALID_ARGUMENT")
_SHORT = reprlib.Repr(maxstring=64, maxother=64)


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
      ValueError: the directory belongs to another run, and names the entries that differ, of many
        the first; or it holds other things than a run.
    """
    check_claim(directory)
    path = Path(directory) / MANIFEST
    if not path.exists():
        write_json(path, manifest)
        return
    held = read_json(path)
    differing = [
        f"{key} was {_SHORT.repr(held.get(key))} and is {_SHORT.repr(manifest.get(key))}"
        for key in sorted(held.keys() | manifest.keys())
        if held.get(key) != manifest.get(key)
    ]
    if differing:
        raise ValueError(
            f"{directory} holds another run: {'; '.join(first_few(differing))}. "
            "Choose another directory, or run with the options it was started with."
        )


def check_claim(directory: str | os.PathLike) -> None:
    """Refuse a directory that is neither new, nor empty, nor that of a run.

    Files whose names begin with a dot do not count: a process that was killed may leave them.

    Raises:
      ValueError: as said.
    """
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{directory} is a file; give a directory, new or empty.")
    if not path.exists() or (path / MANIFEST).exists():
        return
    if any(not file.name.startswith(".") for file in path.iterdir()):
        raise ValueError(
            f"{directory} is not empty, and holds no run to go on with: give a new directory."
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
        """Write `state` and the data iterator's `position`, and drop the oldest beyond `keep`.

        Raises:
          OSError: it cannot be written, on a full disk for instance; those before it are kept.
        """
        self._check_room(state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_named_leaves(state)), data=ocp.args.JsonSave(position)
        )
        with _unlogged():
            try:
                self._manager.save(int(state.step), args=args)
            except (OSError, ValueError) as error:
                raise OSError(
                    f"The checkpoint of step {int(state.step)} could not be written, those before "
                    f"it are kept: {error}"
                ) from error

    def _check_room(self, state: TrainState) -> None:
        """Refuse a disk without room for `state`, before orbax's threads meet its end.

        TensorStore prints a traceback for each write that is then under way.
        """
        need = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self._manager.directory).free
        if need > free:
            raise OSError(
                errno.ENOSPC,
                f"The checkpoint of step {int(state.step)} needs {need:,} bytes, and the disk has "
                f"{free:,}: those before it are kept, make room and go on",
                str(self._manager.directory),
            )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint, bit for bit, in the structure of `like`.

        Raises:
          FileNotFoundError: there is no checkpoint.
          ValueError: it holds other leaves than `like`, or it is damaged; then it says what to do.
        """
        if self.latest is None:
            raise FileNotFoundError(f"{self._manager.directory} holds no checkpoint.")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _named_leaves(like))
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
        )
        restored: Any = None
        with _unlogged(), _patient_loops():
            try:
                restored = self._manager.restore(self.latest, args=args)
            except Exception as error:  # TensorStore's own are of no narrower class
                raise self._refusal(error.__cause__ or error) from None
        leaves = [restored["state"][name] for name in _named_leaves(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), restored["data"]

    def _refusal(self, reason: BaseException) -> BaseException:
        """What to raise where the newest checkpoint cannot be read."""
        said = str(reason.args[0] if isinstance(reason, KeyError) and reason.args else reason)
        shown = textwrap.shorten(said, MOST_SAID)
        what = f"The checkpoint of step {self.latest} in {self._manager.directory}"
        if any(words in said for words in OTHER_LEAVES):
            return ValueError(
                f"{what} holds other arrays than this run ({shown}): another version of the "
                "library wrote it, go on with that one or give another directory."
            )
        absent = isinstance(reason, json.JSONDecodeError | KeyError | FileNotFoundError)
        if not absent and not (isinstance(reason, ValueError) and said.startswith(DAMAGE)):
            return reason  # the machine's trouble, or the library's: the checkpoint may be whole
        before = [step for step in self._manager.all_steps() if step != self.latest]
        where = f"goes on from step {max(before)}" if before else "begins anew"
        return ValueError(
            f"{what} is damaged ({shown}): remove the folder "
            f"{self._manager.directory / str(self.latest)}, and the run {where}."
        )


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Orbax's threads log the traceback of every error that it then raises."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


class _PatientLoop(asyncio.SelectorEventLoop):
    """An event loop that cancels what it began, and waits for that, before it closes."""

    def close(self) -> None:
        if not self.is_closed() and (pending := asyncio.all_tasks(self)):
            for task in pending:
                task.cancel()
            self.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        super().close()


@contextlib.contextmanager
def _patient_loops() -> Iterator[None]:
    """Orbax closes its loop at the first read that fails; each that is under way prints a page."""
    new_event_loop = asyncio.new_event_loop
    asyncio.new_event_loop = _PatientLoop
    try:
        yield
    finally:
        asyncio.new_event_loop = new_event_loop


def _named_leaves(state: TrainState) -> dict[str, jax.Array]:
    """Leaves by their path: orbax need not know the classes, and a file lists readable names."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
