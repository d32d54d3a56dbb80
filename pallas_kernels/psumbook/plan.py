"""How the Psumbook kernel cuts a product up: tile sizes, and every size that follows from them.

Letters: M rows, K input and N output features, m codebooks, v weights a code, g weights a scale,
b bits a code. A *quad* is 4 segments of v input features; a *tile* is the quads and codebooks whose
table lies in shared memory at one time; a *span* is the columns that a warpgroup walks at once.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcodec.pallas_kernels.mosaic import format_refusal
from jaxcodec.spec import CodebookSpec

WARP, WARPGROUP = 32, 128
QUAD = 4  # segments, whose entries share a row of the table
COPIES = 32  # of a word, one for each bank: two 16-bit entries, or a float32 one in half as many
MAX_ROWS = 64  # far beyond those where anything else is slower
TABLE_BYTES = 192 * 1024  # of the 227 KiB that a block may have: x and maxima need the rest
MULTIPROCESSORS = 132  # of an H100
WARPGROUPS = 4  # of wide blocks: 3, 6 and 7 were slower, 8 no faster
MOST_WARPGROUPS = 8  # 1024 threads
WIDEST = 14336  # columns of a block at most: 28 sums a thread still fit in its registers
MOST_CHUNKS = WIDEST // (WARPGROUPS * WARPGROUP * QUAD)
HELD_REGISTERS = 40  # of a thread, for codes and scales that are on their way
LARGEST = 32767.0  # of a 16-bit integer
SMALLEST = 1e-30  # products this small are as good as 0, and 1 / largest stays finite
SUM_COLUMNS = 32  # of a block of the second kernel, 4 of each thread
SUM_WARPGROUPS = 2


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one launch is cut up.

    Attributes:
      warpgroups: of 128 threads in a block.
      columns: neighbouring output features that a thread loads at once (4, 2 or 1).
      chunks: times that it does so for one tile; each has its sums in registers.
      words: packed words of K in a tile; several only of all books.
      books: codebooks in a tile; divides m.
      ahead: chunks whose codes are on their way while one is looked up.
      blocks: of the grid at most, unless a block would have no tile.
    """

    warpgroups: int
    columns: int
    chunks: int
    words: int
    books: int
    ahead: int = 4
    blocks: int = MULTIPROCESSORS

    def check(self, spec: CodebookSpec) -> None:
        """Refuse what no block can be.

        Raises:
          ValueError: sizes that do not exist, or that do not fit the format or shared memory.
        """
        m, word = spec.num_codebooks, spec.codes_per_word * spec.vector_length
        sums = self.chunks * self.columns * self.warpgroups * WARPGROUP
        table = self.words * self.books * spec.codes_per_word * spec.codebook_size * 2 * COPIES
        sizes = self.columns in (1, 2, 4) and 1 <= self.warpgroups <= MOST_WARPGROUPS
        divides = m % self.books == 0 and spec.group_size % (self.words * word) == 0
        if not (sizes and divides and sums <= WIDEST and table <= TABLE_BYTES) or (
            self.words > 1 and self.books < m
        ):
            raise ValueError(f"{self} cannot be tiles of a {spec} weight.")


@dataclasses.dataclass(frozen=True)
class Plan:
    """One launch: what is static about it, and the sizes that follow.

    Attributes:
      spec: the format, shared by all matrices.
      K: input features.
      widths: N of each matrix.
      columns, chunks, warpgroups, words, books, ahead: as in Tiling, for these widths.
      splits: parts of the tiles, for each matrix.
      exact: float32 entries and partial sums instead of 16-bit integers.
    """

    spec: CodebookSpec
    K: int
    widths: tuple[int, ...]
    columns: int
    chunks: int
    warpgroups: int
    words: int
    books: int
    ahead: int
    splits: tuple[int, ...]
    exact: bool

    @classmethod
    def of(
        cls, tiles: Tiling, K: int, widths: Sequence[int], spec: CodebookSpec, dtype: Any
    ) -> "Plan":
        """The plan of `tiles` for x of `dtype` and weights [K, N] for N in `widths`."""
        columns = math.gcd(tiles.columns, *widths)
        chunks = tiles.chunks * (tiles.columns // columns)
        # Tiles are chosen for the sum of the widths, and may be too wide for each of them.
        needed = min(chunks, pl.cdiv(max(widths), tiles.warpgroups * WARPGROUP * columns))
        ahead = tiles.ahead if needed == chunks else min(tiles.ahead, max(needed, 2))
        plan = cls(
            spec=spec,
            K=K,
            widths=tuple(widths),
            columns=columns,
            chunks=needed,
            warpgroups=tiles.warpgroups,
            words=tiles.words,
            books=tiles.books,
            ahead=ahead,
            splits=(1,) * len(widths),
            exact=jnp.dtype(dtype) == jnp.float32,
        )
        return dataclasses.replace(plan, splits=plan._balanced(tiles.blocks))

    def _balanced(self, blocks: int) -> tuple[int, ...]:
        """Splits of each matrix with which the slowest block of at most `blocks` ends first."""

        def splits(cycles: int) -> tuple[int, ...]:
            shares = [min(max(cycles // own, 1), self.tiles) for own in self.tile_cycles]
            return tuple(pl.cdiv(self.tiles, share) for share in shares)

        def fits(cycles: int) -> bool:
            return np.dot(splits(cycles), self.column_blocks) <= blocks

        longest = self.tiles * max(self.tile_cycles)
        return splits(bisect.bisect_left(range(longest), True, key=fits))

    @property
    def tile_cycles(self) -> tuple[int, ...]:
        """Cycles of shared memory that a tile takes, for a block of each matrix."""
        lookups = self.books * self.words * self.spec.codes_per_word * (2 if self.exact else 1)
        widths = [min(N, self.block_columns) for N in self.widths]
        return tuple(self.table_bytes // 128 + lookups * pl.cdiv(N, WARP) for N in widths)

    @property
    def vectors(self) -> int:
        """Codebook vectors of a tile."""
        return self.books * self.spec.codebook_size

    @property
    def quads(self) -> int:
        """Quads of a tile."""
        return self.words * self.spec.codes_per_word // QUAD

    @property
    def row_words(self) -> int:
        """Words of a row of the table: entries of one vector with a quad, in all copies."""
        return 2 * COPIES

    @property
    def table_bytes(self) -> int:
        """Shared memory of the table."""
        return 4 * self.quads * self.vectors * self.row_words

    @property
    def features(self) -> int:
        """Input features of a tile."""
        return QUAD * self.quads * self.spec.vector_length

    @property
    def parts(self) -> int:
        """Tiles of the same input features, each of other books."""
        return self.spec.num_codebooks // self.books

    @property
    def tiles(self) -> int:
        """Tiles of a matrix."""
        return self.K // self.features * self.parts

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
        most = min((most + self.parts - 2) // self.parts + 1, self.tiles // self.parts)
        return pl.cdiv(most * self.features, WARPGROUP) * WARPGROUP

    @property
    def partial_dtype(self) -> Any:
        """Of partial sums: integers in units of the largest of a block, or float32."""
        return jnp.float32 if self.exact else jnp.int16

    @property
    def layout(self) -> Any:
        """A value for each column of a span: neighbours in one thread."""
        return plgpu.Layout.WG_STRIDED((self.span,), vec_size=self.columns)


def refusal(M: int, K: int, N: int, spec: CodebookSpec, dtype: jnp.dtype) -> str | None:
    """Why the kernel cannot multiply x [M, K] of `dtype` by a `spec` weight [K, N], or None."""
    del dtype  # all of bf16, f16 and f32
    if reason := format_refusal(spec):
        return reason
    if spec.bits > 8:
        return f"its Psumbook has at most 2**8 entries a codebook, and {spec} has b = {spec.bits}"
    if not 1 <= M <= MAX_ROWS:
        return f"it reads the codes once a row, for 1 to {MAX_ROWS} rows of x, got M = {M}"
    if N < 1:
        return f"it needs at least one column, got N = {N}"
    word = spec.codes_per_word * spec.vector_length
    if spec.group_size % word or K % word:
        return (
            f"a packed word holds {spec.codes_per_word} v = {word} input features, which must "
            f"divide g = {spec.group_size} and K = {K}"
        )
    code_bytes = 4 * spec.num_codebooks * (K // word) * N
    if code_bytes >= 2**31:
        return f"its offsets have 32 bits, and the codes {code_bytes} bytes"
    return None


def tiling(M: int, K: int, Ns: Sequence[int], spec: CodebookSpec) -> Tiling:
    """Tile sizes for x [M, K] and `spec` weights [K, N_i] on a device that was never tuned.

    Raises:
      NotImplementedError: the kernel cannot run these shapes, with the numbers.
    """
    return candidates(M, K, Ns, spec)[0]


def candidates(M: int, K: int, Ns: Sequence[int], spec: CodebookSpec) -> list[Tiling]:
    """At most 6 tilings worth timing, the one of `tiling` first; raises as `tiling` does."""
    N = sum(Ns)
    if reason := refusal(M, K, N, spec, jnp.dtype(jnp.float32)):
        raise NotImplementedError(f"The Mosaic Psumbook kernel cannot run: {reason}.")
    m, word = spec.num_codebooks, spec.codes_per_word * spec.vector_length
    # Two words of a column share the conversion of their sum and its scale.
    words = 2 if m == 1 and spec.group_size % (2 * word) == 0 else 1
    sizes = [(words, {1: 1, 2: 2, 3: 3, 4: 2}[m]), (1, 1)]
    across = pl.cdiv(N, WIDEST)  # blocks

    def time(size: tuple[int, int]) -> float:
        """Of the slowest block, in words; a tile of one took a fifth longer for each."""
        own = math.prod(size)
        tiles = K // word * m // own
        return own * pl.cdiv(tiles, max(MULTIPROCESSORS // across, 1)) * (1.2 if own == 1 else 1)

    sizes.sort(key=time)
    best = _tiling(N, across, 4, *sizes[0])
    halved = _tiling(N, across, 2, *sizes[0])
    if best.warpgroups < WARPGROUPS and best.columns > 1:
        halved = dataclasses.replace(best, warpgroups=WARPGROUPS, columns=best.columns // 2)
    found = [
        best,
        dataclasses.replace(best, ahead=max(best.ahead // 2, 1)),
        dataclasses.replace(best, ahead=best.ahead + 2),
        halved,
        _tiling(N, across, 4, *sizes[1]),
        _tiling(N, 2 * across, 4, *sizes[0]),
    ]
    return list(dict.fromkeys(found))


def _tiling(N: int, across: int, columns: int, words: int, books: int) -> Tiling:
    """The tiling with `across` blocks over N columns, of which a thread loads `columns` at once."""
    width = pl.cdiv(N, across)
    warpgroups = WARPGROUPS if width > 1024 else 2
    while columns > 1 and warpgroups * WARPGROUP * columns > width:
        columns //= 2
    chunks = min(pl.cdiv(width, warpgroups * WARPGROUP * columns), MOST_CHUNKS)
    held = max(HELD_REGISTERS // (columns * words * books + columns // 2), 1)
    # On an H200 (benchmarks/results/h200/tuner.json): with 4 chunks or more, two ahead took 0.81 to
    # 1.05 of the time of four; with 3 chunks, three ahead 0.87 of the time of one.
    ahead = min(chunks if chunks <= 3 else 2, held)
    return Tiling(warpgroups, columns, chunks, words, books, ahead)
