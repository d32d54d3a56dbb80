"""The layers of a Transformer: linear (dense or codebook, with a LoRA), norm, embedding, MLP.

Letters: S streams, B rows, T tokens, D hidden, K input and N output features, R LoRA rank,
V vocabulary.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcodec.models.config import ModelConfig
from jaxcodec.pallas_kernels.matmul import codebook_matmuls
from jaxcodec.spec import WORD_BITS, CodebookSpec
from jaxcodec.tensor import CodebookTensor

# Spread of random weights, as GPT-2 and Llama start.
INIT_STD = 0.02


class Codes(nnx.Variable):
    """Indices into codebooks: integers, never differentiated, never trained by gradients."""


@dataclasses.dataclass(frozen=True)
class AdapterBank:
    """Room for several LoRA adapters in the same arrays.

    Attributes:
      slots: adapters that fit; a row of a batch names its slot.
      rank: R, the largest rank that fits; smaller ones are padded with zeros.
      targets: names of the linears that have room, such as `q_proj`.
    """

    slots: int
    rank: int
    targets: tuple[str, ...]


Slots = tuple[jax.Array | None, ...]
"""For each stream, the adapter of every row, int32 [B]; None where no row has one."""


class Linear(nnx.Module):
    """y = x W + b, where W [K, N] is a dense kernel or a codebook tensor, plus LoRAs.

    Nothing outside can tell which. Variables: `kernel` [K, N], or `codes`, `codebooks` and
    `scales` (see `CodebookTensor`); `bias` [N]; `lora_a` [slots, K, R] and `lora_b`
    [slots, R, N], the latter with alpha / rank folded in.
    """

    def __init__(
        self,
        K: int,
        N: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        bias: bool = False,
        spec: CodebookSpec | None = None,
        bank: AdapterBank | None = None,
    ):
        self.spec, self.has_bias, self.bank = spec, bias, bank
        if spec is None:
            self.kernel = nnx.Param(
                INIT_STD * jax.random.normal(rngs.params(), (K, N), jnp.float32).astype(dtype)
            )
        else:
            self._init_codebook(K, N, spec, dtype, rngs)
        if bias:
            self.bias = nnx.Param(jnp.zeros((N,), dtype))
        if bank is not None:
            self.lora_a = nnx.LoRAParam(jnp.zeros((bank.slots, K, bank.rank), dtype))
            self.lora_b = nnx.LoRAParam(jnp.zeros((bank.slots, bank.rank, N), dtype))

    def _init_codebook(
        self, K: int, N: int, spec: CodebookSpec, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        spec.check_shape(K, N)
        m, v = spec.num_codebooks, spec.vector_length
        words = K // v * spec.bits // WORD_BITS
        self.codes = Codes(jax.random.bits(rngs.params(), (m, words, N), jnp.uint32))
        books = jax.random.normal(rngs.params(), (m, spec.codebook_size, v), jnp.float32)
        self.codebooks = nnx.Param((books / m**0.5).astype(dtype))
        self.scales = nnx.Param(jnp.full((K // spec.group_size, N), INIT_STD, dtype))

    def __call__(self, x_sbtk: jax.Array, slots: Slots) -> jax.Array:
        """x [S, B, T, K] -> [S, B, T, N], adapters included."""
        (y,) = products([self], x_sbtk)
        return self.adapt(y, x_sbtk, slots)

    def adapt(self, y: jax.Array, x_sbtk: jax.Array, slots: Slots) -> jax.Array:
        """Add to stream s of row b, y [S, B, T, N], what adapter `slots[s][b]` makes of x."""
        if self.bank is None:
            return y
        with jax.named_scope("lora"):
            for s, slots_b in enumerate(slots):
                if slots_b is not None:
                    y = y.at[s].add(self._lora(x_sbtk[s], slots_b))
            return y

    def _lora(self, x_btk: jax.Array, slots: jax.Array) -> jax.Array:
        a, b = self.lora_a[...].astype(x_btk.dtype), self.lora_b[...].astype(x_btk.dtype)
        if a.shape[0] == 1:  # one adapter for all rows, as in training: no gather
            return x_btk @ a[0] @ b[0]
        return jnp.einsum("btk,bkr,brn->btn", x_btk, a[slots], b[slots])

    def codebook_tensor(self) -> CodebookTensor:
        """The weight of a linear that has a spec."""
        return CodebookTensor(self.codes[...], self.codebooks[...], self.scales[...])


_recorded: contextvars.ContextVar[list[tuple[Linear, jax.Array]] | None] = contextvars.ContextVar(
    "recorded", default=None
)


@contextlib.contextmanager
def recorded_inputs() -> Iterator[list[tuple[Linear, jax.Array]]]:
    """Collects every (linear, its input [S, B, T, K]) that is multiplied within, in order.

    For calibration: used inside a traced function, whose outputs the inputs then are.
    """
    token = _recorded.set(inputs := [])
    try:
        yield inputs
    finally:
        _recorded.reset(token)


def products(linears: Sequence[Linear], x_sbtk: jax.Array) -> list[jax.Array]:
    """x [S, B, T, K] times the weight of each linear, plus its bias, without adapters.

    Codebook weights of one format share a kernel launch.
    """
    all_codebooks = all(linear.spec is not None for linear in linears)
    if len(linears) > 1 and not all_codebooks:
        return [products([linear], x_sbtk)[0] for linear in linears]
    if (inputs := _recorded.get()) is not None:
        inputs += [(linear, x_sbtk) for linear in linears]
    biases = [linear.bias[...] if linear.has_bias else None for linear in linears]
    if all_codebooks:
        weights = [linear.codebook_tensor() for linear in linears]
        return list(codebook_matmuls(x_sbtk, weights, biases))
    y = x_sbtk @ linears[0].kernel[...].astype(x_sbtk.dtype)
    return [y if biases[0] is None else y + _last_axis(biases[0], y)]


@dataclasses.dataclass(frozen=True)
class LinearFactory:
    """Makes each linear of a model as its path says: with its spec, with room for adapters."""

    specs: Mapping[str, CodebookSpec]
    bank: AdapterBank | None
    dtype: jnp.dtype
    rngs: nnx.Rngs

    def __call__(self, path: str, K: int, N: int, bias: bool = False) -> Linear:
        name = path.rsplit(".", 1)[-1]
        bank = self.bank if self.bank is not None and name in self.bank.targets else None
        try:
            return Linear(
                K,
                N,
                dtype=self.dtype,
                rngs=self.rngs,
                bias=bias,
                spec=self.specs.get(path),
                bank=bank,
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


class RMSNorm(nnx.Module):
    """x / rms(x) * weight, the mean square in float32. Source: arXiv 1910.07467 equation 4."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return _last_axis(self.weight[...], x) * (x32 * scale).astype(x.dtype)


class Embedding(nnx.Module):
    """Rows of a table `weight` [V, D]; also the output head where embeddings are tied."""

    def __init__(self, V: int, D: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        table = jax.random.normal(rngs.params(), (V, D), jnp.float32)
        self.weight = nnx.Param((INIT_STD * table).astype(dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.weight[...][tokens]

    def logits(self, x_btd: jax.Array) -> jax.Array:
        """x [B, T, D] -> float32 [B, T, V]."""
        table = self.weight[...].astype(x_btd.dtype)
        return jnp.einsum("btd,vd->btv", x_btd, table, preferred_element_type=jnp.float32)


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)). Source: GLU variants (arXiv 2002.05202), SwiGLU."""

    def __init__(self, config: ModelConfig, linear: LinearFactory, layer: int):
        D, F = config.hidden_size, config.intermediate_size
        path = f"layers.{layer}.mlp"
        self.gate_proj = linear(f"{path}.gate_proj", D, F)
        self.up_proj = linear(f"{path}.up_proj", D, F)
        self.down_proj = linear(f"{path}.down_proj", F, D)

    def __call__(self, x_sbtd: jax.Array, slots: Slots) -> jax.Array:
        gate, up = products([self.gate_proj, self.up_proj], x_sbtd)
        gate = jax.nn.silu(self.gate_proj.adapt(gate, x_sbtd, slots))
        return self.down_proj(gate * self.up_proj.adapt(up, x_sbtd, slots), slots)


def _last_axis(vector: jax.Array, x: jax.Array) -> jax.Array:
    """`vector` in the dtype of `x`, shaped to broadcast along its last axis."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + vector.shape)
