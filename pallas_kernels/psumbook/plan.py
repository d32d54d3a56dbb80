"""How the Psumbook kernel cuts a product up: tile sizes, and every size that follows from them.

Letters: M rows, K input and N output features, m codebooks, v weights a code, g weights a scale,
b bits a code. A *quad* is 4 segments of v input features; a *tile* is the quads whose table lies
in shared memory at one time; a *span* is the columns that a warpgroup walks at once.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcodec.spec import CodebookSpec

WARP, WARPGROUP = 32, 128
WIDEST = 14336  # columns of a block at most: 28 sums a thread still fit in its registers
QUAD = 4  # segments, whose entries share a row of the table
TABLE_BYTES = 192 * 1024  # of the 227 KiB that a block may have: x and maxima need the rest
MULTIPROCESSORS = 132  # of an H100
# Cycles of shared memory that a warp's lookup takes on average when every entry has this many
# copies: the fullest of the banks decides. 32 and 16 follow from the layout, the rest is measured.
LOOKUP_CYCLES = {32: 1.0, 16: 2.0, 8: 2.9, 4: 3.1}
LARGEST = 32767.0  # of a 16-bit integer
SMALLEST = 1e-30  # products this small are as good as 0, and 1 / largest stays finite
SUM_COLUMNS = 32  # of a block of the second kernel: a cache line of partial sums
SUM_WARPGROUPS = 2


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one launch is cut up.

    Attributes:
      warpgroups: of 128 threads in a block.
      columns: neighbouring output features that a thread loads at once (4, 2 or 1).
      chunks: times that it does so for one tile; each has its sums in registers.
      words: packed words of each codebook in a tile.
      copies: of each word of the table, a bank for each up to 32 (32, 16, 8 or 4).
      ahead: chunks whose codes are on their way while one is looked up.
      blocks: of the grid at most, unless a block would have no tile.
    """

    warpgroups: int
    columns: int
    chunks: int
    words: int
    copies: int = 32
    ahead: int = 4
    blocks: int = MULTIPROCESSORS


@dataclasses.dataclass(frozen=True)
class Plan:
    """One launch: what is static about it, and the sizes that follow.

    Attributes:
      spec: the format, shared by all matrices.
      K: input features.
      widths: N of each matrix.
      columns, chunks, warpgroups, words, copies, ahead: as in Tiling, for these widths.
      splits: parts of K, for each matrix.
      exact: float32 entries instead of 16-bit integers.
    """

    spec: CodebookSpec
    K: int
    widths: tuple[int, ...]
    columns: int
    chunks: int
    warpgroups: int
    words: int
    copies: int
    ahead: int
    splits: tuple[int, ...]
    exact: bool

    @classmethod
    def of(
        cls, tiles: Tiling, K: int, widths: Sequence[int], spec: CodebookSpec, dtype: Any
    ) -> "Plan":
        """The plan of `tiles` for x of `dtype` and weights [K, N] for N in `widths`."""
        columns = math.gcd(tiles.columns, *widths)
        plan = cls(
            spec=spec,
            K=K,
            widths=tuple(widths),
            columns=columns,
            chunks=tiles.chunks * (tiles.columns // columns),
            warpgroups=tiles.warpgroups,
            words=tiles.words,
            copies=tiles.copies,
            ahead=tiles.ahead,
            splits=(1,) * len(widths),
            exact=jnp.dtype(dtype) == jnp.float32,
        )
        return dataclasses.replace(plan, splits=plan._balanced(tiles.blocks))

    def _balanced(self, blocks: int) -> tuple[int, ...]:
        """Splits of each matrix with which the slowest block of at most `blocks` ends first."""
        most = [self.tiles] * len(self.widths)  # tiles of a block

        def splits():
            return tuple(pl.cdiv(self.tiles, tiles) for tiles in most)

        best = splits()
        while max(most) > 1:
            times = [tiles * cycles for tiles, cycles in zip(most, self.tile_cycles, strict=True)]
            slowest = int(
                np.argmax([t * (tiles > 1) for t, tiles in zip(times, most, strict=True)])
            )
            most[slowest] -= 1
            if np.dot(splits(), self.column_blocks) > blocks:
                break
            best = splits()
        return best

    @property
    def tile_cycles(self) -> tuple[float, ...]:
        """Cycles of shared memory that a tile takes, for a block of each matrix."""
        lookups = self.spec.num_codebooks * self.words * self.spec.codes_per_word
        cycles = lookups * (2 if self.exact else 1) * LOOKUP_CYCLES[self.copies] / WARP
        widths = [min(N, self.block_columns) for N in self.widths]
        return tuple(self.table_bytes / 128 + cycles * width for width in widths)

    @property
    def vectors(self) -> int:
        """Codebook vectors, m 2**b."""
        return self.spec.num_codebooks * self.spec.codebook_size

    @property
    def quads(self) -> int:
        """Quads of a tile."""
        return self.words * self.spec.codes_per_word // QUAD

    @property
    def row_words(self) -> int:
        """Words of a row of the table: entries of one vector with a quad, in all copies."""
        return 2 * self.copies

    @property
    def table_bytes(self) -> int:
        """Shared memory of the table."""
        return 4 * self.quads * self.vectors * self.row_words

    @property
    def features(self) -> int:
        """Input features of a tile."""
        return QUAD * self.quads * self.spec.vector_length

    @property
    def tiles(self) -> int:
        """Tiles of K."""
        return self.K // self.features

    @property
    def threads(self) -> int:
        """CUDA threads of a block."""
        return WARPGROUP * self.warpgroups

    @property
    def turns(self) -> int:
        """Times that a thread forms the two entries of half a row of the table."""
        return pl.cdiv(2 * self.quads * self.vectors, self.threads)

    @property
    def held(self) -> int:
        """Codebook vectors that a thread holds; in turn j it needs number j % held."""
        return min(self.turns, math.lcm(self.threads, self.vectors) // self.threads)

    @property
    def span(self) -> int:
        """Columns that a warpgroup walks at once."""
        return WARPGROUP * self.columns

    @property
    def block_columns(self) -> int:
        """Columns of a block."""
        return self.chunks * self.warpgroups * self.span

    @property
    def ragged(self) -> bool:
        """Whether some blocks have columns beyond the last."""
        return any(N % self.block_columns for N in self.widths)

    @property
    def column_blocks(self) -> tuple[int, ...]:
        """Blocks side by side over the columns of each matrix."""
        return tuple(pl.cdiv(N, self.block_columns) for N in self.widths)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first block of each matrix, and the number of blocks."""
        counts = [s * c for s, c in zip(self.splits, self.column_blocks, strict=True)]
        return tuple(sum(counts[:i]) for i in range(len(counts) + 1))

    @property
    def sum_starts(self) -> tuple[int, ...]:
        """The same of the second kernel's blocks."""
        counts = [pl.cdiv(N, SUM_COLUMNS) for N in self.widths]
        return tuple(sum(counts[:i]) for i in range(len(counts) + 1))

    @property
    def window(self) -> int:
        """Input features in shared memory: those of all tiles of a block, in whole warpgroups."""
        most = max(pl.cdiv(self.tiles, splits) for splits in self.splits)
        return pl.cdiv(most * self.features, WARPGROUP) * WARPGROUP

    @property
    def layout(self) -> Any:
        """A value for each column of a span: neighbours in one thread."""
        return plgpu.Layout.WG_STRIDED((self.span,), vec_size=self.columns)


def refusal(M: int, K: int, N: int, spec: CodebookSpec, dtype: jnp.dtype) -> str | None:
    """Why the kernel cannot multiply x [M, K] of `dtype` by a `spec` weight [K, N], or None."""
    del dtype  # all of bf16, f16 and f32
    if spec.bits > 8:
        return f"its Psumbook has at most 2**8 entries a codebook, and {spec} has b = {spec.bits}"
    if M < 1:
        return f"it needs at least one row of x, got M = {M}"
    if N < 1:
        return f"it needs at least one column, got N = {N}"
    word = spec.codes_per_word * spec.vector_length
    if spec.group_size % word or K % word:
        return (
            f"a packed word holds {spec.codes_per_word} v = {word} input features, which must "
            f"divide g = {spec.group_size} and K = {K}"
        )
    return None


def tiling(M: int, K: int, N: int, spec: CodebookSpec) -> Tiling:
    """Tile sizes for x [M, K] and a `spec` weight [K, N] on a device that was never tuned.

    Raises:
      NotImplementedError: the kernel cannot run these shapes, with the numbers.
    """
    return candidates(M, K, N, spec)[0]


@functools.cache
def candidates(M: int, K: int, N: int, spec: CodebookSpec) -> list[Tiling]:
    """Tilings worth timing, the one of `tiling` first; raises as `tiling` does."""
    if reason := refusal(M, K, N, spec, jnp.dtype(jnp.float32)):
        raise NotImplementedError(f"The Mosaic Psumbook kernel cannot run: {reason}.")
    width = pl.cdiv(N, pl.cdiv(N, WIDEST))  # columns of a block, near enough
    warpgroups = 4 if width > 1024 else 2
    chunks = pl.cdiv(width, 4 * WARPGROUP * warpgroups)
    row_bytes = 8 * spec.codes_per_word // QUAD * spec.num_codebooks * spec.codebook_size
    copies = next(copies for copies in (32, 16, 8, 4) if row_bytes * copies <= TABLE_BYTES)
    return [
        Tiling(warpgroups, 4, chunks, 1, copies, ahead, MULTIPROCESSORS)
        for ahead in ((3, 4, 2) if chunks > 2 else (2, 3))
    ]
