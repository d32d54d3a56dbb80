"""One block of a Transformer at a time, as a model too large for its device is quantized.

Letters: B rows, T tokens, D hidden, K input and N output features.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcodec.models.cache import KVCache, identity_table
from jaxcodec.models.config import ModelConfig
from jaxcodec.models.layers import Codes, LinearFactory, recorded_inputs
from jaxcodec.models.transformer import Block, Model, Specs
from jaxcodec.tensor import CodebookTensor

Path = tuple[Any, ...]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weights"], meta_fields=["config", "specs"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class BlockModel:
    """One block's weights with all that is needed to run it: an ordinary jit argument.

    Blocks of the same sizes and formats run the same compiled program, wherever they come from.

    Attributes:
      config: of a model of this block alone.
      weights: its variables; paths begin within the block, at `self_attn` or `mlp`.
      specs: (path, spec) of its linears that are stored as codebooks, sorted by path.
    """

    config: ModelConfig
    weights: nnx.State
    specs: Specs = ()

    @property
    def module(self) -> Block:
        """A Flax module with these weights; to change it does not change the block."""
        return nnx.merge(_structure(self.config, self.specs), self.weights, copy=True)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the activations."""
        return dict(nnx.to_flat_state(self.weights))["input_layernorm", "weight"].get_value().dtype

    @property
    def kernels(self) -> dict[str, jax.Array]:
        """The dense linears by path, [K, N] each, in the module's order."""
        return {
            ".".join(map(str, path[:-1])): variable.get_value()
            for path, variable in nnx.to_flat_state(self.weights)
            if path[-1] == "kernel"
        }

    def quantized(self, tensors: Mapping[str, CodebookTensor]) -> "BlockModel":
        """The block with codebooks in place of the dense linears named in `tensors`."""
        variables = dict(nnx.to_flat_state(self.weights))
        for name, w in tensors.items():
            path = tuple(name.split("."))
            del variables[*path, "kernel"]
            variables[*path, "codes"] = Codes(w.codes)
            variables[*path, "codebooks"] = nnx.Param(w.codebooks)
            variables[*path, "scales"] = nnx.Param(w.scales)
        specs = dict(self.specs) | {name: w.spec for name, w in tensors.items()}
        return BlockModel(self.config, nnx.from_flat_state(variables), tuple(sorted(specs.items())))


def take_block(model: Model, layer: int) -> BlockModel:
    """Block `layer` of a model; its arrays are the model's own, none is copied.

    Raises:
      ValueError: the model has no such block, or has room for adapters, which a block has not.
    """
    if not 0 <= layer < model.config.num_layers:
        raise ValueError(f"The model has {model.config.num_layers} blocks; there is no {layer}.")
    if model.bank is not None:
        raise ValueError("A block is taken from a model without a bank of adapters.")
    config = dataclasses.replace(model.config, num_layers=1, windows=(model.config.windows[layer],))
    weights = nnx.from_flat_state(
        [
            (path[2:], variable)
            for path, variable in nnx.to_flat_state(model.weights)
            if path[:2] == ("layers", layer)
        ]
    )
    prefix = f"layers.{layer}."
    specs = [(p.removeprefix(prefix), s) for p, s in model.specs if p.startswith(prefix)]
    return BlockModel(config, weights, tuple(specs))


def with_blocks(model: Model, blocks: Mapping[int, BlockModel]) -> Model:
    """The model with `blocks` in place of its own of those numbers."""
    variables = [
        (path, variable)
        for path, variable in nnx.to_flat_state(model.weights)
        if not (path[0] == "layers" and path[1] in blocks)
    ]
    replaced = tuple(f"layers.{layer}." for layer in blocks)
    specs = [(path, spec) for path, spec in model.specs if not path.startswith(replaced)]
    for layer, block in blocks.items():
        flat = nnx.to_flat_state(block.weights)
        variables += [(("layers", layer, *path), variable) for path, variable in flat]
        specs += [(f"layers.{layer}.{path}", spec) for path, spec in block.specs]
    weights = nnx.from_flat_state(variables)
    return dataclasses.replace(model, weights=weights, specs=tuple(sorted(specs)))


@jax.jit
def run_block(block: BlockModel, x_btd: jax.Array) -> jax.Array:
    """Hidden states [B, T, D] after the block, of whole sequences from position 0 on."""
    return _run(block.module, block, x_btd)


@jax.jit
def run_block_recording(
    block: BlockModel, x_btd: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The same, and the input [B, T, K] of every linear by its path; those that share one, once.

    See `SHARED_INPUTS` for which those are.
    """
    module = block.module
    names = {id(node): path for path, node in nnx.iter_graph(module)}
    with recorded_inputs() as recorded:
        y_btd = _run(module, block, x_btd)
    inputs = {".".join(map(str, names[id(linear)])): x[0] for linear, x in recorded}
    return y_btd, {name: inputs[name] for name in set(SHARED_INPUTS.values())}


# The linear whose input each linear reads.
SHARED_INPUTS = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
}


def _run(module: Block, block: BlockModel, x_btd: jax.Array) -> jax.Array:
    B, T, _ = x_btd.shape
    # A page as long as the sequences: the cache is then [B, T], and XLA need not gather.
    cache, table = KVCache.zeros(block.config, B, T, block.dtype), identity_table(B, T, T)
    counts = jnp.full((B,), T, jnp.int32)
    keep = jnp.ones((B, T), bool)
    y_sbtd, _ = module(x_btd[None], cache, table, keep, counts, (None,))
    return y_sbtd[0]


@functools.lru_cache(maxsize=64)  # one for each format of a mixed model; the trace needs them
def _structure(config: ModelConfig, specs: Specs) -> nnx.GraphDef[Block]:
    def build() -> Block:
        formats = {f"layers.0.{path}": spec for path, spec in specs}
        factory = LinearFactory(formats, None, jnp.float32, nnx.Rngs(params=jax.random.key(0)))
        return Block(config, factory, 0)

    return nnx.graphdef(nnx.eval_shape(build))
