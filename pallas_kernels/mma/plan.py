"""How the mma kernel cuts a product into blocks: what it can run, and tile sizes.

Letters: M rows, K input and N output features, m codebooks, b bits a code, v weights a code,
g weights a scale. A span is the 128 weights along K that a warp multiplies at a time, and a step
what a block passes along K at a time: a span for each of its parts.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcodec.pallas_kernels.operands import layout
from jaxcodec.pallas_kernels.operands.layout import (
    K_TILE,
    SHARED_BYTES,
    SMS,
    TABLE_BITS,
    scale_rows,
    table_shape,
    word_rows,
)
from jaxcodec.spec import CodebookSpec

SPAN_TILES = 2  # tiles of 64 along K
SPAN = SPAN_TILES * K_TILE
MMA_COLUMNS = 16  # rows of the first operand of an mma
WIDTHS = (MMA_COLUMNS, 2 * MMA_COLUMNS)  # columns of a warp
MAX_COLUMNS = 240  # with 8 more, what the TMA copies at a time is below its 256
MIN_WARPS, MAX_WARPS = 4, 16
ROWS = (8, 16, 32, 64)  # of a block: more would not leave registers for their sums
MAX_ROWS = ROWS[-1]
PARTS = (1, 2, 3, 4, 8)  # with 6 the last step is half empty: 1.1 to 1.3 times as slow as 4
STAGES = (8, 4, 2)  # powers of two, by which a remainder is a mask
CANDIDATES = 6
FEW_PRODUCTS = 3 * 2**29  # beyond the first codebook's; see `adds_codebooks`
MOST_SCALE_BYTES = 4  # candidates serve weights of every dtype


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one call is cut into blocks.

    Attributes:
      rows: rows of x in a block (8, 16, 32 or 64), all of them.
      columns: of a block.
      width: columns of a warp, 16 or 32: more read x fewer times.
      parts: warps that share columns and take turns along K; their sums are added in the block.
      stages: steps along K in the rings of shared memory, a power of two.
    """

    rows: int
    columns: int
    width: int
    parts: int
    stages: int

    @property
    def warps(self) -> int:
        """Those that gather and multiply."""
        return self.columns // self.width * self.parts

    @property
    def warpgroups(self) -> int:
        """Of 4 warps; the last may have idle ones."""
        return pl.cdiv(self.warps, 4)

    @property
    def step(self) -> int:
        """Weights along K in a step."""
        return self.parts * SPAN

    def check(self, spec: CodebookSpec) -> None:
        """Refuse what no block can be.

        Raises:
          ValueError: sizes that do not exist, do not fit each other, or leave no room for a stage.
        """
        sizes = self.rows in ROWS and self.width in WIDTHS and self.stages in STAGES
        sizes = sizes and self.columns in range(self.width, MAX_COLUMNS + 1, self.width)
        g = spec.group_size
        if not (sizes and 1 <= self.parts <= self.warps <= MAX_WARPS) or (
            self.step % g and g % self.step
        ):
            raise ValueError(f"{self} cannot be tiles of a {spec} weight.")
        if not fitting(self, spec).stages:
            raise ValueError(f"{self} needs more shared memory than a block has for {spec}.")


def refusal(M: int, K: int, N: int, spec: CodebookSpec, dtype: jnp.dtype) -> str | None:
    """Why the kernel cannot multiply x [M, K] of `dtype` by a `spec` weight [K, N]; None if it can.

    It runs what the wgmma kernel does, and codebooks of 2**16 vectors, up to 64 rows, where g is
    16, 32, 64 or a multiple of 128.
    """
    g = spec.group_size
    if M > MAX_ROWS:
        return f"it holds at most {MAX_ROWS} rows of x, got M = {M}"
    if g % SPAN and g not in (16, 32, 64):
        return f"g must be 16, 32, 64 or a multiple of {SPAN}, and {spec} has g = {g}"
    return layout.refusal(M, K, N, spec, dtype, most_bits=16)


def adds_codebooks(rows: int, K: int, N: int, spec: CodebookSpec) -> bool:
    """Whether blocks of `rows` add the vectors of several codebooks in float16, then multiply once.

    They must where scales multiply weights. Else each codebook can be multiplied by itself, and
    nothing is rounded. From 16 rows on products take time of their own, and bringing x into float16
    takes about 3 us whatever the size. On an H200, m2v8g128, us added against each by itself: 16
    rows 20.8 and 17.9 at 14336x4096, 21.3 and 19.7 at 8192x8192, 56.8 and 68.3 at 8192x28672; 32
    rows 12.8 and 10.4 at 4096x4096, 25.2 and 30.3 at 4096x14336. With three codebooks, which cost
    twice the further products, adding begins to pay at half as many rows x K x N.
    (benchmarks/results/h200/mma_adds.json)
    """
    if spec.group_size % K_TILE:
        return True
    products = (spec.num_codebooks - 1) * rows * K * N
    return rows > ROWS[0] and products > FEW_PRODUCTS


def tiling(M: int, K: int, Ns: Sequence[int], spec: CodebookSpec) -> Tiling:
    """The tile sizes for x [M, K] and `spec` weights [K, N_i] on a device never tuned."""
    return candidates(M, K, Ns, spec)[0]


def candidates(M: int, K: int, Ns: Sequence[int], spec: CodebookSpec) -> list[Tiling]:
    """What is worth timing for x [M, K] and `spec` weights [K, N_i], the heuristic's choice first.

    The weights share a launch.
    """
    found = []
    rows = next(rows for rows in ROWS if rows >= M)
    sizes = [(n, width) for width in WIDTHS for n in range(width, MAX_COLUMNS + 1, width)]
    for (columns, width), parts in itertools.product(sizes, PARTS):
        tiles = Tiling(rows, columns, width, parts, STAGES[0])
        aligned = tiles.step % spec.group_size == 0 or spec.group_size % tiles.step == 0
        if MIN_WARPS <= tiles.warps <= MAX_WARPS and aligned and (tiles.step <= K or parts == 1):
            tiles = fitting(tiles, spec, MOST_SCALE_BYTES)
            if tiles.stages:
                found.append(tiles)
    return sorted(found, key=lambda tiles: _cost(tiles, K, Ns, spec))[:CANDIDATES]


def fitting(tiles: Tiling, spec: CodebookSpec, scale_bytes: int = 2) -> Tiling:
    """The same tiles with no more stages than shared memory holds; 0 if it holds too few."""
    for stages in STAGES:
        if stages <= tiles.stages:
            found = dataclasses.replace(tiles, stages=stages)
            if shared_bytes(found, spec, scale_bytes) <= SHARED_BYTES:
                return found
    return dataclasses.replace(tiles, stages=0)


def shared_bytes(tiles: Tiling, spec: CodebookSpec, scale_bytes: int = 2) -> int:
    """Bytes of shared memory that a block takes, at most."""
    x = tiles.rows * tiles.step * 2
    words = spec.num_codebooks * word_rows(spec) * SPAN_TILES * tiles.parts
    codes = words * code_columns(tiles, spec) * 4
    scales = scale_rows(spec, tiles.step) * scale_columns(tiles) * scale_bytes
    sums = tiles.parts * tiles.rows * tiles.columns * 4
    padding = 4096  # each ring begins at a multiple of 1024; barriers take less than that
    table = 2 * int(np.prod(table_shape(spec))) if spec.bits <= TABLE_BITS else 0
    return table + tiles.stages * (x + codes + scales) + sums + padding


def code_columns(tiles: Tiling, spec: CodebookSpec) -> int:
    """Columns of packed words that a block copies.

    4 lanes that share a column read different rows: 8 columns more than a multiple of 16 put those
    into different banks. A slot of the ring stays a multiple of 128 bytes, as the TMA needs.
    """
    words = spec.num_codebooks * word_rows(spec) * SPAN_TILES * tiles.parts
    return tiles.columns + 8 * (words % 4 == 0)


def scale_columns(tiles: Tiling) -> int:
    """Columns of scales that a block copies: a copy is a multiple of 128 bytes."""
    return pl.cdiv(tiles.columns, 64) * 64


def _cost(tiles: Tiling, K: int, Ns: Sequence[int], spec: CodebookSpec) -> float:
    """About the cycles of the slowest multiprocessor, to sort tilings by.

    Fitted to the times of benchmarks/results/h200/tuner.json: what it puts first takes 1.02 times
    as long as the best of six in the mean of the 144 launches of 1 to 32 rows, 1.33 times at worst.
    """
    waves = pl.cdiv(sum(pl.cdiv(N, tiles.columns) for N in Ns), SMS)
    steps = pl.cdiv(K, tiles.step)
    # Cycles of shared memory for a warp's span: lookups and words, x, and what is copied.
    lookups = 18 * spec.num_codebooks * tiles.width // MMA_COLUMNS
    span = SPAN_TILES * (lookups + tiles.rows + 2)
    latency = 700  # of a step from the arrival of its codes to the last sum
    # A block begins and ends in about 3000, and adds the sums of a part in 100.
    return waves * (3000 + steps * max(tiles.warps * span, latency) + 100 * tiles.parts)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the shapes and the tiling fix.

    Attributes:
      steps: along K.
      starts: of each weight its first block, and their number.
      tiles: the tiling.
      spec: the format.
      adds_codebooks: see the function of that name.
    """

    steps: int
    starts: tuple[int, ...]
    tiles: Tiling
    spec: CodebookSpec
    adds_codebooks: bool

    @classmethod
    def of(cls, K: int, Ns: Sequence[int], tiles: Tiling, spec: CodebookSpec) -> "Plan":
        """The plan for weights [K, N_i]."""
        starts = np.cumsum([0] + [pl.cdiv(N, tiles.columns) for N in Ns])
        adds = adds_codebooks(tiles.rows, K, sum(Ns), spec)
        return cls(pl.cdiv(K, tiles.step), tuple(map(int, starts)), tiles, spec, adds)

    @property
    def scales_sums(self) -> bool:
        """Whether scales multiply sums of tiles; else weights, whose column has several groups."""
        return self.spec.group_size % K_TILE == 0

    @property
    def x_transforms(self) -> tuple:
        """How rows of x lie in shared memory: 64 inputs of all rows together, swizzled."""
        return plgpu.TilingTransform((self.tiles.rows, K_TILE)), plgpu.SwizzleTransform(128)

    @property
    def words(self) -> int:
        """Packed words along the K of a span."""
        return word_rows(self.spec) * SPAN_TILES

    @property
    def groups(self) -> int:
        """Scales along the K of a span."""
        return scale_rows(self.spec, SPAN)
