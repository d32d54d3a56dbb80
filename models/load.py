"""Models on disk: Hugging Face directories, and ours, which are the same with codebook linears.

    config.json                  Hugging Face's; with codebooks also
                                 "jaxcodec": {"format": 1, "specs": {linear path: "m2v8g128"}}
    model.safetensors (shards)   tensors by Hugging Face's names; a codebook linear has
                                 <name>.codes, .codebooks and .scales where a dense one has .weight

Letters: K input and N output features.
"""

import hashlib
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxcodec.checkpoints.files import read_json, write_json
from jaxcodec.checkpoints.safetensors import read_tensors, write_tensors
from jaxcodec.models.config import ModelConfig
from jaxcodec.models.transformer import Model, Specs, abstract_model, linear_shapes
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import CodebookTensor

CONFIG_FILE = "config.json"
FORMAT = 1
DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}
TOKENIZER_FILES = (
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


def load_model(directory: str | Path, dtype: jnp.dtype | None = None) -> Model:
    """Read a model, dense or with codebook linears, strictly: every tensor used, none missing.

    Args:
      directory: holds config.json and safetensors.
      dtype: of floats in memory; None for that of the embedding on disk.

    Raises:
      FileNotFoundError: the directory, config.json, the weights or a shard is missing.
      ValueError: an unknown architecture, a damaged file, or tensors that are missing, not
        expected, of a wrong shape, or NaN in a scale or codebook; all are named.
    """
    directory = Path(directory)
    hf = read_json(directory / CONFIG_FILE)
    config, specs = ModelConfig.from_hf(hf), _read_specs(hf)
    tensors = _without_derived(read_tensors(directory), config)
    if dtype is None:
        stored = tensors.get(_EMBEDDING)
        dtype = jnp.bfloat16 if stored is None else stored.dtype
    _check_specs(config, specs)
    target = abstract_model(config, dtype, specs)
    variables = dict(nnx.to_flat_state(target.weights))
    names = {path: hf_name(path) for path in variables}
    _check_names(directory, tensors, names.values())
    _check_shapes(directory, tensors, variables, names)
    loaded = [
        (path, variable.replace(_to_device(tensors[names[path]], path, variable.get_value().dtype)))
        for path, variable in variables.items()
    ]
    model = Model(config, nnx.from_flat_state(loaded), specs)
    check_codebooks(model)
    return model


def save_model(directory: str | Path, model: Model, extra: Mapping[str, Any] | None = None) -> None:
    """Write `model` so that `load_model` (and, where dense, transformers) reads it back.

    Adapters in a bank are not part of it. A failure leaves files that were there as they were.

    Args:
      extra: further keys for config.json, such as how the model was made.
    """
    directory = Path(directory)
    tensors = {}
    for path, variable in nnx.to_flat_state(model.weights):
        if not isinstance(variable, nnx.LoRAParam):
            value = np.asarray(variable.get_value())
            tensors[hf_name(path)] = value.T if path[-1] == "kernel" else value
    hf = model.config.to_hf() | {"torch_dtype": jnp.dtype(model.dtype).name}
    if model.specs:
        hf["jaxcodec"] = {"format": FORMAT, "specs": {p: str(s) for p, s in model.specs}}
    write_tensors(directory, tensors)
    write_json(directory / CONFIG_FILE, hf | dict(extra or {}))


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
    """Copy the tokenizer's files from one model directory to another, where there are any."""
    for name in TOKENIZER_FILES:
        if (file := Path(source) / name).is_file():
            shutil.copy(file, Path(target) / name)


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


def check_codebooks(model: Model) -> None:
    """Refuse NaN or infinity in the codebooks and scales of a model, naming the linear."""
    variables = dict(nnx.to_flat_state(model.weights))
    for linear, _ in model.specs:
        path = tuple(int(p) if p.isdigit() else p for p in linear.split("."))
        fields = ("codes", "codebooks", "scales")
        CodebookTensor(*(variables[*path, f].get_value() for f in fields)).check(linear)


def _read_specs(hf: Mapping[str, Any]) -> Specs:
    ours = hf.get("jaxcodec")
    if ours is None:
        return ()
    if ours.get("format") != FORMAT:
        raise ValueError(
            f"config.json has jaxcodec format {ours.get('format')!r}, this version reads {FORMAT}."
        )
    specs = ours.get("specs")
    if not isinstance(specs, dict) or not all(isinstance(s, str) for s in specs.values()):
        raise ValueError(f"config.json: jaxcodec specs must be texts by linear, got {specs!r}.")
    return tuple(sorted((p, CodebookSpec.parse(s)) for p, s in specs.items()))


def _check_specs(config: ModelConfig, specs: Specs) -> None:
    linears = dict(linear_shapes(config)) if specs else {}
    if unknown := [path for path, _ in specs if path not in linears]:
        raise ValueError(
            f"config.json has specs for {', '.join(unknown)}, which are no linears of its blocks."
        )


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
        f"{what} {', '.join(sorted(which))}"
        for what, which in (
            ("missing", expected - tensors.keys()),
            ("not expected", tensors.keys() - expected),
        )
        if which
    ]
    if problems:
        raise ValueError(f"{directory}: tensors do not match config.json: {'; '.join(problems)}.")


def _check_shapes(
    directory: Path,
    tensors: Mapping[str, np.ndarray],
    variables: Mapping[tuple[Any, ...], nnx.Variable],
    names: Mapping[tuple[Any, ...], str],
) -> None:
    problems = []
    for path, variable in variables.items():
        shape, came = variable.get_value().shape, tensors[names[path]].shape
        expected = shape[::-1] if path[-1] == "kernel" else shape
        if came != expected:
            problems.append(f"{names[path]} must be {list(expected)}, got {list(came)}")
    if problems:
        raise ValueError(f"{directory}: {'; '.join(problems)}.")


def _to_device(tensor: np.ndarray, path: tuple[Any, ...], dtype: jnp.dtype) -> jax.Array:
    if path[-1] == "codes" and tensor.dtype != np.uint32:
        raise ValueError(f"{hf_name(path)} must be packed uint32, got {tensor.dtype}.")
    return jnp.asarray(tensor.T if path[-1] == "kernel" else tensor).astype(dtype)
