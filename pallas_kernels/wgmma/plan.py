"""How the wgmma kernel cuts a product into blocks: what it can run, tile sizes, order of tiles.

Letters: M rows, K input and N output features, m codebooks, b bits a code, v weights a code,
g weights a scale. A strip is the 64 columns of a warpgroup, a step is what a block passes along K
at a time: 64 for each of its parts.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from jaxcodec.pallas_kernels.operands.layout import (
    K_TILE,
    REGISTERS,
    SHARED_BYTES,
    SMS,
    scale_rows,
    table_shape,
    word_rows,
)
from jaxcodec.spec import CodebookSpec

STRIP = 64  # output features of a warpgroup, the fixed size of wgmma
# Rows, strips and parts of a block that its registers hold: rows / 2 sums, 32 of two fragments, and
# those that gather. More strips read x fewer times, more rows use a fragment more often, more parts
# occupy a multiprocessor where there are few columns.
BLOCKS = (
    *((32, 4, 1), (32, 2, 2), (32, 1, 4), (64, 2, 1), (64, 3, 1), (64, 4, 1), (64, 2, 2)),
    *((128, 2, 1), (128, 3, 1), (256, 2, 1)),
)
ROWS = (32, 64, 128, 256)
GATHER_REGISTERS = 80  # that a thread needs besides its sums: 32 of fragments, and what gathers
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
MIN_SPLIT_K = 256  # less would not fill the rings
MAX_STAGES = 10
CANDIDATES = 6
# Rows of x that all columns pass before the next rows: of the 50 MB of L2 they may take 16, because
# each half of the L2 keeps its own copy.
BAND_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one call is cut into blocks.

    Attributes:
      rows: rows of x in a block, the n of wgmma (32, 64, 128 or 256).
      strips: of 64 columns in a block.
      stages: steps along K in the rings of shared memory (at least 2).
      parts: warpgroups that share a strip and take turns along K; a block has strips * parts of
        them, at most 4, and adds their sums.
      splits: parts of K that different blocks take, summed after the kernel.
      cluster: blocks that share a tile of x and load it once (1 or 2).
    """

    rows: int
    strips: int
    stages: int
    parts: int = 1
    splits: int = 1
    cluster: int = 1

    @property
    def warpgroups(self) -> int:
        """Those that gather and multiply."""
        return self.strips * self.parts

    @property
    def step(self) -> int:
        """Weights along K in a step."""
        return self.parts * K_TILE

    def check(self, spec: CodebookSpec) -> None:
        """Refuse what no block can be.

        Raises:
          ValueError: sizes that do not exist, that do not fit each other or the registers, or that
            leave no room for two stages.
        """
        sizes = self.rows in ROWS and self.cluster in (1, 2) and min(self.strips, self.parts) >= 1
        held = self.rows // 2 + GATHER_REGISTERS <= REGISTERS.get(self.warpgroups, 0)
        g = spec.group_size
        if not (sizes and held and self.splits >= 1) or (self.step % g and g % self.step):
            raise ValueError(f"{self} cannot be tiles of a {spec} weight.")
        if fitting(self, spec).stages < 2:  # the copies of a step wait for the step before
            raise ValueError(f"{self} needs more shared memory than a block has for {spec}.")


def tiling(M: int, K: int, Ns: Sequence[int], spec: CodebookSpec) -> Tiling:
    """The tile sizes for x [M, K] and `spec` weights [K, N_i] on a device never tuned."""
    return candidates(M, K, Ns, spec)[0]


def candidates(M: int, K: int, Ns: Sequence[int], spec: CodebookSpec) -> list[Tiling]:
    """What is worth timing for x [M, K] and `spec` weights [K, N_i], the heuristic's choice first.

    The weights share a launch.
    """
    found = []
    splits = [n for n in SPLITS if n == 1 or K >= n * MIN_SPLIT_K]
    blocks = [block for block in BLOCKS if _suits(*block, M, spec)]
    for (rows, strips, parts), split, cluster in itertools.product(blocks, splits, (1, 2)):
        if parts > 1 and cluster > 1:
            continue  # few rows, of which each block reads little
        tiles = fitting(Tiling(rows, strips, MAX_STAGES, parts, split, cluster), spec, 4)
        if tiles.stages >= 2:
            found.append(tiles)
    return sorted(found, key=lambda tiles: _microseconds(tiles, M, K, Ns, spec))[:CANDIDATES]


def _suits(rows: int, strips: int, parts: int, M: int, spec: CodebookSpec) -> bool:
    """Whether a block of this kind can run M rows and may be the fastest."""
    step, g = parts * K_TILE, spec.group_size
    if step % g and g % step:
        return False  # the scales of a step would begin within a group
    fewest = next((n for n in (32, 64, 128) if n >= M), 128)
    # Wide blocks were slower than their estimate where several share the columns.
    return rows >= fewest and (strips * parts == 2 or rows >= M)


def fitting(tiles: Tiling, spec: CodebookSpec, scale_bytes: int = 2) -> Tiling:
    """The same tiles with no more stages than shared memory holds; 0 if it holds none."""
    for stages in range(tiles.stages, 0, -1):
        found = dataclasses.replace(tiles, stages=stages)
        if shared_bytes(found, spec, scale_bytes) <= SHARED_BYTES:
            return found
    return dataclasses.replace(tiles, stages=0)


def shared_bytes(tiles: Tiling, spec: CodebookSpec, scale_bytes: int = 2) -> int:
    """Bytes of shared memory that a block takes, at most."""
    columns = tiles.strips * STRIP
    x = tiles.rows * tiles.step * 2
    codes = spec.num_codebooks * word_rows(spec) * tiles.parts * columns * 4
    scales = scale_rows(spec, tiles.step) * columns * scale_bytes
    factors = 2 * tiles.rows * 4
    others = (tiles.parts - 1) * columns * tiles.rows * 4  # sums of parts that the first adds
    results = tiles.strips * 2 * STRIP // 2 * 128  # two buffers of half a strip's width in rows
    padding = 4096  # each ring begins at a multiple of 1024; barriers take less than that
    table = 2 * int(np.prod(table_shape(spec)))
    return table + tiles.stages * (x + codes + scales) + factors + others + results + padding


def _microseconds(tiles: Tiling, M: int, K: int, Ns: Sequence[int], spec: CodebookSpec) -> float:
    """About the time of the kernel and of the sum over splits on an H100, to sort tilings by."""
    plan = Plan.of(M, K, Ns, tiles)
    rows, warpgroups = tiles.rows, tiles.warpgroups
    tensor_cores = 2 * rows * warpgroups  # cycles of a step
    # Cycles of shared memory: lookups, x read by wgmma, x and words as they are copied and read.
    memory = (64 * spec.num_codebooks + rows + 12) * warpgroups + rows * tiles.parts
    # Fitted to times at 4096x4096, 4096x14336 and 8192x28672, M = 64 to 4096.
    step = max(tensor_cores + 75, 1.02 * memory + 110)
    step += (tiles.cluster - 1) * (-10 if rows == 256 else 10)  # waiting costs, less traffic pays
    waves = pl.cdiv(plan.total, plan.blocks)
    kernel = 3 + waves * (plan.steps * step / 1755 + 0.6 + 0.005 * rows)
    if tiles.splits == 1:
        return kernel
    megabytes = tiles.splits * M * sum(Ns) * 4 / 1e6
    return kernel + 1 + 0.2 * megabytes + 0.2 * max(0, megabytes - 16)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the shapes and the tiling fix: sizes of a block, and which tile comes when.

    Attributes:
      steps: steps along K of a tile, an even number: two fragments alternate.
      stages: slots of a ring.
      columns: columns of a block.
      row_tiles: tiles along M.
      starts: of each weight its first tile along N, counted through all, and their number.
      band: tiles along M that pass all columns together.
      tiles: the tiling.
    """

    steps: int
    stages: int
    columns: int
    row_tiles: int
    starts: tuple[int, ...]
    band: int
    tiles: Tiling

    @classmethod
    def of(cls, M: int, K: int, Ns: Sequence[int], tiles: Tiling) -> "Plan":
        """The plan for x [M, K] and weights [K, N_i]."""
        steps = 2 * pl.cdiv(K, 2 * tiles.step * tiles.splits)
        columns = tiles.strips * STRIP
        row_tiles = pl.cdiv(M, tiles.rows)
        band = max(1, min(row_tiles, BAND_BYTES // (2 * K * tiles.rows)))
        starts = np.cumsum([0] + [pl.cdiv(N, columns * tiles.cluster) for N in Ns])
        # With more, the factors of a tile could be overwritten before the tile is stored.
        stages = min(tiles.stages, steps)
        return cls(steps, stages, columns, row_tiles, tuple(map(int, starts)), band, tiles)

    @property
    def total(self) -> int:
        """Tiles, those of a cluster counted as one."""
        return self.tiles.splits * self.row_tiles * self.starts[-1]

    @property
    def blocks(self) -> int:
        """Clusters in the grid: each walks every `blocks`-th tile."""
        return min(self.total, SMS // self.tiles.cluster)

    def slot(self, step):
        """Where in a ring a step lies."""
        return jax.lax.rem(step, self.stages)

    def place(self, block, i, peer):
        """Weight, part of K, first row and first column of the i-th tile of a block."""
        per_split = self.row_tiles * self.starts[-1]
        per_band = self.band * self.starts[-1]
        tile = block + i * self.blocks
        split, tile = jax.lax.div(tile, per_split), jax.lax.rem(tile, per_split)
        first, tile = jax.lax.div(tile, per_band) * self.band, jax.lax.rem(tile, per_band)
        height = jnp.minimum(self.band, self.row_tiles - first)
        row, column = first + jax.lax.rem(tile, height), jax.lax.div(tile, height)
        weight, start = 0, 0
        for begin, end in itertools.pairwise(self.starts[:-1]):
            weight += (column >= end).astype(jnp.int32)
            start += (column >= end).astype(jnp.int32) * (end - begin)
        column = ((column - start) * self.tiles.cluster + peer) * self.columns
        return weight, split, row * self.tiles.rows, column
