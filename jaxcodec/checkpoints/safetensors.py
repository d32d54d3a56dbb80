"""Tensors on disk as Hugging Face stores them: one safetensors file, or shards with an index.

    model.safetensors                       everything, or
    model-00001-of-00003.safetensors ...    shards, and
    model.safetensors.index.json            {"metadata": ..., "weight_map": {tensor: shard}}

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, data).
"""

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxcodec.checkpoints.files import read_json, replacement, write_json

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # the shard size of Hugging Face's own checkpoints

# transformers refuses a file whose metadata does not name one of its frameworks.
METADATA = {"format": "pt"}

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "BOOL": np.dtype(np.bool_),
}

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def read_tensors(directory: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint directory, by name; bf16 comes as `ml_dtypes.bfloat16`.

    The arrays are read-only views of memory-mapped files: bytes are read when they are used.

    Raises:
      FileNotFoundError: no such directory, no safetensors file in it, or a shard that the index
        names is missing.
      ValueError: a truncated or malformed file, an index that does not describe its shards
        exactly, or an index beside a single file. The sentence names the file and the tensor.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"There is no checkpoint directory {directory}.")
    single, index = directory / FILE, directory / INDEX
    if single.exists() and index.exists():
        raise ValueError(f"{directory} holds both {FILE} and {INDEX}: remove the one out of date.")
    if index.exists():
        return _read_shards(directory, _read_index(index))
    if not single.exists():
        raise FileNotFoundError(f"{directory} holds neither {FILE} nor {INDEX}.")
    return read_tensor_file(single)


def read_tensor_file(path: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of one safetensors file, as read-only views of the memory-mapped file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated or malformed, or a tensor has a dtype outside `DTYPES`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        # Opening checks the header: valid JSON, offsets in order, every byte of the file covered.
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}.") from None
    if not names:
        return {}  # an empty file cannot be mapped from its data on
    header, start = _read_header(path)
    data = np.memmap(path, np.uint8, mode="r")[start:]
    return {name: _view(path, name, header[name], data) for name in names}


def write_tensors(
    directory: str | Path,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `tensors` (numpy or jax arrays) to `directory` in place of the checkpoint there.

    One file, or shards of at most `shard_bytes` (a larger tensor gets its own) with an index.
    Every file is complete and on the disk before the first replaces an old one, so a full disk
    leaves the old checkpoint as it was.

    Raises:
      OSError: a file cannot be written.
      ValueError: a tensor has a dtype outside `DTYPES`.
    """
    directory = Path(directory)
    shards = _split(tensors, shard_bytes)
    total = len(shards)
    names = [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    if total == 1:
        names = [FILE]
    if total > 1:
        names.append(INDEX)  # the last to take its place: it makes the shards one checkpoint
    with replacement(*(directory / name for name in names)) as temporaries:
        for temporary, shard in zip(temporaries, shards, strict=False):
            _save(temporary, shard, metadata)
        if total > 1:
            write_json(temporaries[-1], _index(dict(zip(names, shards, strict=False))))
    for path in directory.iterdir():
        if path.name not in names and (path.name in (FILE, INDEX) or _SHARD.fullmatch(path.name)):
            path.unlink()


def write_tensor_file(
    path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file in place of `path`, whole or not at all.

    Raises:
      OSError: the file cannot be written.
      ValueError: a tensor has a dtype outside `DTYPES`.
    """
    with replacement(Path(path)) as [temporary]:
        _save(temporary, tensors, metadata)


def _read_index(path: Path) -> dict[str, str]:
    content = read_json(path)
    unexpected = sorted(set(content) - {"metadata", "weight_map"})
    weight_map = content.get("weight_map")
    if unexpected or not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f'{path} must hold "metadata" and a "weight_map" from tensor to shard, '
            f"got the keys {sorted(content)}."
        )
    for name, shard in weight_map.items():
        # A shard lies beside its index: a path could lead out of the checkpoint.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{path}: the shard of {name} must be a file name, got {shard!r}.")
    return weight_map


def _read_shards(directory: Path, weight_map: dict[str, str]) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(weight_map.values())):
        path = directory / shard
        if not path.is_file():
            raise FileNotFoundError(f"{directory / INDEX} names the shard {shard}: it is missing.")
        held = read_tensor_file(path)
        expected = {name for name, home in weight_map.items() if home == shard}
        for name in sorted(expected - held.keys()):
            raise ValueError(f"{path} lacks the tensor {name}, which the index places there.")
        for name in sorted(held.keys() - expected):
            home = weight_map.get(name, "no shard")
            raise ValueError(f"{path} holds the tensor {name}, which the index places in {home}.")
        tensors |= held
    return tensors


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def _view(path: Path, name: str, entry: dict[str, Any], data: np.ndarray) -> np.ndarray:
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ValueError(
            f"{path}: {name} has the dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}."
        )
    begin, end = entry["data_offsets"]
    return data[begin:end].view(np.ndarray).view(dtype).reshape(entry["shape"])


def _split(tensors: Mapping[str, Any], shard_bytes: int) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


def _index(shards: dict[str, dict[str, Any]]) -> dict[str, Any]:
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard.values())
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _save(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None) -> None:
    # The library writes the bytes as they lie in memory: they must be in C order.
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    for name, array in arrays.items():
        if array.dtype not in DTYPES.values():
            raise ValueError(f"{path}: {name} has a dtype that is not stored, {array.dtype}.")
    mode = path.stat().st_mode
    try:
        save_file(arrays, path, METADATA | dict(metadata or {}))
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}.") from error
    path.chmod(mode)  # the library makes a private file of its own and renames it
