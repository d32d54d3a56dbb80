"""How a model and its cache lie on several devices: tensor parallel, by the names of parameters.

Linears that widen (q, k, v, gate, up) split their outputs, those that narrow (o, down) their
inputs, so that one sum over devices follows each attention and each MLP (Megatron-LM, arXiv
1909.08053). The cache splits its KV heads. Rows of a batch split over the axis "data".

Letters: m codebooks, K input and N output features, R LoRA rank, V vocabulary, D hidden.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcodec.models.cache import KVCache
from jaxcodec.models.transformer import Model

DATA, MODEL = "data", "model"
SPLIT_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
SPLIT_INPUTS = ("o_proj", "down_proj")
# Which axis of each variable of a linear runs along its inputs K and its outputs N.
_AXES = {
    "kernel": {"K": 0, "N": 1},
    "bias": {"N": 0},
    "codes": {"K": 1, "N": 2},
    "scales": {"K": 0, "N": 1},
    "lora_a": {"K": 1},
    "lora_b": {"N": 2},
}


def make_mesh(model_parallel: int = 1) -> Mesh:
    """All devices as a mesh of axes "data" and "model", the latter of `model_parallel` devices.

    Raises:
      ValueError: the number of devices is not a multiple of `model_parallel`.
    """
    devices = jax.device_count()
    if devices % model_parallel:
        raise ValueError(f"{devices} devices do not divide into groups of {model_parallel}.")
    shape = (devices // model_parallel, model_parallel)
    return jax.make_mesh(shape, (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def shard_model(model: Model, mesh: Mesh) -> Model:
    """The model with every variable placed on `mesh` as `partition` says."""
    placed = [
        (path, variable.replace(_place(variable.get_value(), partition(path), mesh)))
        for path, variable in nnx.to_flat_state(model.weights)
    ]
    return dataclasses.replace(model, weights=nnx.from_flat_state(placed))


def shard_cache(cache: KVCache, mesh: Mesh) -> KVCache:
    """The cache [L, pages, page, G, A] with its KV heads G split over the axis "model"."""
    spec = PartitionSpec(None, None, None, MODEL, None)
    return KVCache(_place(cache.k, spec, mesh), _place(cache.v, spec, mesh))


def partition(path: tuple[Any, ...]) -> PartitionSpec:
    """Which axis of the variable at `path` is split over the axis "model", if any."""
    module, name = path[-2], path[-1]
    if module == "embed_tokens":
        return PartitionSpec(MODEL, None)
    side = "N" if module in SPLIT_OUTPUTS else "K" if module in SPLIT_INPUTS else None
    axis = None if side is None else _AXES.get(name, {}).get(side)
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, MODEL)


def _place(array: jax.Array, spec: PartitionSpec, mesh: Mesh) -> jax.Array:
    # An axis that the mesh does not divide, such as one scale group along K, is replicated.
    fits = [
        name if name is not None and size % mesh.shape[name] == 0 else None
        for name, size in zip(spec, array.shape, strict=False)
    ]
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*fits)))
