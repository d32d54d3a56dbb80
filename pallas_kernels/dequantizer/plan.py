"""How the dequantizer cuts a weight up, and what it can run.

Letters: K input and N output features, b bits a code, v weights a code. A piece is what a warp
writes at a time: the K of one packed word, and neighbouring columns.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxcodec.pallas_kernels.mosaic import format_refusal
from jaxcodec.pallas_kernels.operands.layout import SMS, TABLE_BITS
from jaxcodec.spec import CodebookSpec

WARP = 32
WARPGROUPS = 4  # of a block
WARPS = 4 * WARPGROUPS
BLOCKS = 2 * SMS  # whose tables fill the shared memory of a multiprocessor, and threads its slots
MOST_COLUMNS = 4  # of a lane: it loads 16 bytes of words


def refusal(spec: CodebookSpec, codebooks_dtype: jnp.dtype, dtype: jnp.dtype) -> str | None:
    """Why the kernel cannot write a `spec` weight in `dtype`; None if it can.

    It runs b up to 8, with codebooks and result in bfloat16 or float16.
    """
    if reason := format_refusal(spec):
        return reason
    if spec.bits > TABLE_BITS:
        return f"its codebooks have at most 2**{TABLE_BITS} vectors, and {spec} has b = {spec.bits}"
    for name, kind in (("codebooks", codebooks_dtype), ("result", dtype)):
        if jnp.dtype(kind) not in (jnp.bfloat16, jnp.float16):
            return f"{name} must be bfloat16 or float16, got {jnp.dtype(kind)}"
    return None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the shapes fix.

    Attributes:
      spec: the format.
      K: input features.
      N: output features.
    """

    spec: CodebookSpec
    K: int
    N: int

    @property
    def columns(self) -> int:
        """Neighbouring columns of a lane."""
        return math.gcd(MOST_COLUMNS, self.N)

    @property
    def width(self) -> int:
        """Columns of a piece."""
        return WARP * self.columns

    @property
    def height(self) -> int:
        """Weights along K of a piece."""
        return self.spec.vector_length * self.spec.codes_per_word

    @property
    def across(self) -> int:
        """Pieces side by side over the columns."""
        return pl.cdiv(self.N, self.width)

    @property
    def pieces(self) -> int:
        """Those of the whole weight."""
        return self.K // self.height * self.across

    @property
    def blocks(self) -> int:
        """Of the grid."""
        return min(BLOCKS, pl.cdiv(self.pieces, WARPS))

    @property
    def turns(self) -> int:
        """Pieces that a warp writes at most; neighbouring warps write neighbouring pieces."""
        return pl.cdiv(self.pieces, self.blocks * WARPS)
