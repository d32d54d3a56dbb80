"""Models on disk: Hugging Face directories, and the same with codebook linears.

    config.json                  Hugging Face's; with codebooks also the key of a layout
    model.safetensors (shards)   tensors by Hugging Face's names; a codebook linear has
                                 <name>.codes, .codebooks and .scales where a dense one has .weight

The layouts are ours, CodeGEMM's and AQLM's: see jaxcodec/checkpoints/layouts.py.

Letters: K input and N output features.
"""

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxcodec.checkpoints.files import first_few, read_json, write_json
from jaxcodec.checkpoints.layouts import Layout, config_in, layout_named, recognise
from jaxcodec.checkpoints.safetensors import read_tensors, write_tensors
from jaxcodec.models.config import ModelConfig
from jaxcodec.models.transformer import Model, Specs, abstract_model, linear_shapes
from jaxcodec.tensor import FIELDS, FLOAT_DTYPES, CodebookTensor

CONFIG_FILE = "config.json"
REPORT_FILE = "quantization.json"  # how a quantized model was made
DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
)
# Rotary frequencies that old Llama checkpoints carry; they follow from config.json.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model directory whose names, shapes and dtypes are those that config.json asks for.

    Attributes:
      hf: config.json.
      config: what it says of the Transformer.
      layout: of the codebook linears.
      specs: of the codebook linears, sorted by path.
      tensors: by name, as they lie on disk, memory-mapped; without those that others determine.
    """

    hf: Mapping[str, Any]
    config: ModelConfig
    layout: Layout
    specs: Specs
    tensors: Mapping[str, np.ndarray]

    @property
    def dense(self) -> dict[str, np.ndarray]:
        """All tensors but codes, codebooks and scales."""
        fields = {f"model.{path}.{field}" for path, _ in self.specs for field in FIELDS}
        return {name: tensor for name, tensor in self.tensors.items() if name not in fields}

    def linear(self, path: str) -> CodebookTensor:
        """The weight of a codebook linear, such as `layers.0.mlp.up_proj`.

        Raises:
          ValueError: codes beyond their bits, codebooks and scales of different dtypes, or values
            that are not finite, naming the linear.
        """
        codes, codebooks, scales = (self.tensors[f"model.{path}.{field}"] for field in FIELDS)
        w = self.layout.read_linear(path, dict(self.specs)[path], codes, codebooks, scales)
        return w.check(path)


def open_model(directory: str | Path) -> Checkpoint:
    """Open a model directory in any layout strictly: every tensor known, none missing.

    Raises:
      FileNotFoundError: the directory, config.json, the weights or a shard is missing.
      ValueError: an unknown architecture, a damaged file, or tensors that are missing, not
        expected, or of a wrong shape or dtype; all are named.
    """
    directory = Path(directory)
    tensors, hf = read_tensors(directory), read_json(directory / CONFIG_FILE)
    config, layout = ModelConfig.from_hf(hf), recognise(hf)
    shapes = dict(linear_shapes(config))
    specs = tuple(sorted(layout.read_specs(hf, shapes, tensors.keys()).items()))
    tensors = _without_derived(tensors, config)
    expected = {}
    for path, variable in nnx.to_flat_state(abstract_model(config, specs=specs).weights):
        shape = variable.get_value().shape
        expected[hf_name(path)] = shape[::-1] if path[-1] == "kernel" else shape
    for path, spec in specs:
        for field, shape in zip(FIELDS, layout.field_shapes(spec, *shapes[path]), strict=True):
            expected[f"model.{path}.{field}"] = shape
    _check_names(directory, tensors, expected)
    _check_arrays(directory, tensors, expected)
    return Checkpoint(hf, config, layout, specs, tensors)


def load_model(directory: str | Path, dtype: jnp.dtype | None = None) -> Model:
    """Read a model, dense or with codebook linears in any layout; strictly, as `open_model` does.

    Args:
      directory: holds config.json and safetensors.
      dtype: of floats in memory; None for that of the embedding on disk, where codebooks and
        scales keep their own.

    Raises:
      FileNotFoundError: the directory, config.json, the weights or a shard is missing.
      ValueError: as of `open_model`; or codes beyond their bits, or a scale or codebook that is
        not finite in `dtype`; the linear is named.
    """
    checkpoint = open_model(directory)
    loaded = {}
    for linear, _ in checkpoint.specs:
        w = checkpoint.linear(linear)
        if dtype is not None:
            books, scales = w.codebooks.astype(dtype), w.scales.astype(dtype)
            w = CodebookTensor(w.codes, books, scales).check(linear)
        loaded |= {f"model.{linear}.{field}": getattr(w, field) for field in FIELDS}
    if dtype is None:
        dtype = checkpoint.tensors[_EMBEDDING].dtype
    target = abstract_model(checkpoint.config, dtype, checkpoint.specs)
    filled = []
    for path, variable in nnx.to_flat_state(target.weights):
        name = hf_name(path)
        if (value := loaded.pop(name, None)) is None:
            stored = checkpoint.tensors[name]
            value = jnp.asarray(stored.T if path[-1] == "kernel" else stored).astype(dtype)
        filled.append((path, variable.replace(value)))
    return Model(checkpoint.config, nnx.from_flat_state(filled), checkpoint.specs)


def save_model(
    directory: str | Path,
    model: Model,
    extra: Mapping[str, Any] | None = None,
    layout: str = "jaxcodec",
) -> None:
    """Write `model` so that `load_model` (and, where dense, transformers) reads it back.

    Adapters in a bank are not part of it. A failure leaves files that were there as they were.

    Args:
      extra: further keys for config.json, such as how the model was made; what the model says
        itself is not among them.
      layout: of codebook linears: "jaxcodec", "codegemm" or "aqlm".

    Raises:
      OSError: a file cannot be written.
      ValueError: what the layout cannot hold, by name.
    """
    directory, written = Path(directory), layout_named(layout)
    dense, fields = {}, {}
    for path, variable in nnx.to_flat_state(model.weights):
        value = variable.get_value()
        if path[-1] in FIELDS:
            fields[hf_name(path)] = value
        elif not isinstance(variable, nnx.LoRAParam):
            value = np.asarray(value)
            dense[hf_name(path)] = value.T if path[-1] == "kernel" else value
    linears = [
        (path, CodebookTensor(*(fields[f"model.{path}.{field}"] for field in FIELDS)))
        for path, _ in model.specs
    ]
    shapes = dict(linear_shapes(model.config))
    hf = dict(extra or {}) | model.config.to_hf() | {"torch_dtype": jnp.dtype(model.dtype).name}
    hf = config_in(written, hf, dict(model.specs), shapes, dense.keys())
    write_tensors(directory, dense | stored_linears(written, linears))
    write_json(directory / CONFIG_FILE, hf)


def stored_linears(
    layout: Layout, linears: Iterable[tuple[str, CodebookTensor]]
) -> dict[str, np.ndarray]:
    """Codes, codebooks and scales of linears, (path, weight), by name as `layout` stores them."""
    return {
        f"model.{path}.{field}": array
        for path, w in linears
        for field, array in zip(FIELDS, layout.write_linear(w), strict=True)
    }


def copy_companions(source: str | Path, target: str | Path) -> None:
    """Copy what lies beside the weights in a model directory, as far as there is any of it.

    That is the tokenizer, and how to generate.
    """
    for name in COMPANIONS:
        if (file := Path(source) / name).is_file():
            shutil.copyfile(file, Path(target) / name)


def other_config(source: str | Path) -> dict[str, Any]:
    """A directory's config.json for the `extra` of `save_model`, which keeps what it does not know.

    Left out are the dtype, by its newer name, and the code files of a model of its own.

    Raises:
      ValueError: a number that JSON does not have.
    """
    path = Path(source) / CONFIG_FILE
    kept = {k: v for k, v in read_json(path).items() if k not in ("dtype", "auto_map")}
    try:
        json.dumps(kept, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from None
    return kept


def hf_name(path: tuple[Any, ...]) -> str:
    """Hugging Face's name of the variable at `path`."""
    name = ".".join(map(str, path))
    name = name.removesuffix("kernel") + "weight" if path[-1] == "kernel" else name
    return name if path[0] == "lm_head" else f"model.{name}"


def namespace(model: Model) -> str:
    """Content hash (SHA-256, hex) of what writes the KV cache: config, dtype and weights.

    Adapters in the bank are left out: they are not part of the base.
    """
    digest = hashlib.sha256(repr((model.config, model.specs, model.dtype)).encode())
    for path, variable in nnx.to_flat_state(model.weights):
        if not isinstance(variable, nnx.LoRAParam):
            value = np.ascontiguousarray(variable.get_value())
            digest.update(repr((path, value.dtype, value.shape)).encode())
            digest.update(value.view(np.uint8).data)
    return digest.hexdigest()


def _without_derived(tensors: dict[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """The tensors less those that others determine: rotary frequencies, and a tied head."""
    if config.tie_embeddings and _HEAD in tensors and _EMBEDDING in tensors:
        if not np.array_equal(tensors[_HEAD], tensors[_EMBEDDING]):
            raise ValueError(
                f"config.json ties the embeddings, but {_HEAD} differs from {_EMBEDDING}."
            )
        tensors = {name: t for name, t in tensors.items() if name != _HEAD}
    return {name: t for name, t in tensors.items() if not _DERIVED.fullmatch(name)}


def _check_names(directory: Path, tensors: Mapping[str, Any], names: Iterable[str]) -> None:
    expected = set(names)
    problems = [
        f"{what} {', '.join(first_few(sorted(which)))}"
        for what, which in (
            ("missing", expected - tensors.keys()),
            ("not expected", tensors.keys() - expected),
        )
        if which
    ]
    if problems:
        raise ValueError(f"{directory}: tensors do not match config.json: {'; '.join(problems)}.")


def _check_arrays(
    directory: Path,
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Refuse wrong shapes, and floats that are none; a layout knows the dtype of its codes."""
    problems = []
    for name, expected in shapes.items():
        tensor = tensors[name]
        if tensor.shape != expected:
            problems.append(f"{name} must be {list(expected)}, got {list(tensor.shape)}")
        elif not name.endswith(".codes") and tensor.dtype not in FLOAT_DTYPES:
            problems.append(f"{name} must be bfloat16, float16 or float32, got {tensor.dtype}")
    if problems:
        raise ValueError(f"{directory}: {'; '.join(problems)}.")
