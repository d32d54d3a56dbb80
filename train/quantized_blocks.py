"""Finished blocks of a quantization on disk: what a stopped run goes on from.

<directory>/run.json                    what run this is: options, and hashes of weights and data
<directory>/blocks/00000.safetensors    every variable of the block by its path within it; its
                                        report is JSON in the file's metadata, beside a hash
                                        of the variables
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from safetensors import safe_open

from jaxcodec.checkpoints.safetensors import read_tensor_file, write_tensor_file
from jaxcodec.models.blocks import BlockModel
from jaxcodec.models.layers import Codes
from jaxcodec.models.transformer import Specs
from jaxcodec.train.checkpoint import digest
from jaxcodec.train.quantization_report import BlockReport

FOLDER = "blocks"
_REPORT, _DIGEST = "report", "sha256"


def write_block(directory: Path, layer: int, block: BlockModel, report: BlockReport) -> None:
    """Write a block and its report as one file, whole or not at all.

    Raises:
      OSError: the file cannot be written, on a full disk for instance; others are as they were.
    """
    tensors = {
        ".".join(map(str, path)): jax.device_get(variable.get_value())
        for path, variable in nnx.to_flat_state(block.weights)
    }
    path = _path(directory, layer)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {_REPORT: json.dumps(dataclasses.asdict(report)), _DIGEST: digest(tensors)}
    write_tensor_file(path, tensors, metadata)


def read_block(
    directory: Path, layer: int, dense: BlockModel, specs: Specs
) -> tuple[BlockModel, BlockReport] | None:
    """The block that a run has finished, its arrays those of the mapped file, or None.

    Args:
      dense: the block that it was made from.
      specs: formats of its linears, by paths within the block.

    Raises:
      ValueError: the file is damaged, or does not hold exactly the variables of such a block.
    """
    path = _path(directory, layer)
    if not path.exists():
        return None
    tensors = read_tensor_file(path)
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
    fields = [f"{name}.{f}" for name, _ in specs for f in ("codes", "codebooks", "scales")]
    kept = [".".join(map(str, p)) for p, _ in nnx.to_flat_state(dense.weights)]
    replaced = {f"{name}.kernel" for name, _ in specs}
    if tensors.keys() != set(fields) | (set(kept) - replaced):
        raise ValueError(f"{path} does not hold the variables of block {layer}: remove it.")
    if metadata.get(_DIGEST) != digest(tensors):
        raise ValueError(
            f"{path} is damaged, its bytes are not those that were written: remove it."
        )
    variables: dict[tuple[Any, ...], nnx.Variable] = {
        tuple(name.split(".")): (Codes if name.endswith(".codes") else nnx.Param)(x)
        for name, x in tensors.items()
    }
    block = BlockModel(dense.config, nnx.from_flat_state(variables), specs)
    try:
        return block, BlockReport.from_json(json.loads(metadata[_REPORT]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no report of this version ({error!r}): remove it."
        ) from None


def _path(directory: Path, layer: int) -> Path:
    return directory / FOLDER / f"{layer:05d}.safetensors"
