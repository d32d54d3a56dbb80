"""How the fragment kernel cuts a product up: tile sizes, and every size that follows from them.

Letters: M rows, K input and N output features, m codebooks, v weights a code, g weights a scale,
b bits a code. A *word* is 32 bits of codes; a *step* is 4 words along K, one for each lane of a
quad of a warp; a *unit* is the one or two steps after which a warp applies a scale.
"""

import dataclasses
import itertools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxcodec.spec import CodebookSpec

WARP, WARPGROUP = 32, 128
COLUMNS = 32  # of a warp: 4 words of a 16-byte load for each of the 8 columns of mma.sync
ENTRIES = 256
REGION_BYTES = ENTRIES * 256  # a code is byte 1 of an offset into a region, by one permutation
MAX_REGIONS = 2  # 128 KiB of the 227 KiB of an SM
SHARED_BYTES = 227 * 1024
PAD = 4  # floats after a row of sums, so that the stores of a warp meet no bank twice
GLOBAL_BITS = 16  # codebooks of 2**16 vectors stay in global memory and its caches
MAX_ROWS = 64  # beyond, sums no longer fit in registers
MAX_VECTOR = 32  # of a code of 8 bits, after joining narrower ones
COPY_BYTES = 16
# Of the tilings that are tried.
SMS = 132  # of an H100
WARPGROUPS = 4
STAGES = 4
CHUNK_BYTES = 32 * 1024
RESERVED_BYTES = 2048  # of barriers and alignment


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one launch is cut up.

    Attributes:
      columns: warps of a block side by side.
      width: tiles of 32 output features of a warp, which share its loads of x.
      k_warps: warps of a block that share those features and take turns along K.
      k_blocks: blocks that split K, which form a cluster; 1, 2, 4 or 8.
      stages: units whose codes a warp holds in shared memory or awaits (at least 2).
      steps: steps of a unit at most, 1 or 2.
      chunk: units that a warp multiplies between two barriers; their x lies in shared memory.
      warpgroups: of a block, 4 warps each.
    """

    columns: int
    k_warps: int
    width: int = 1
    k_blocks: int = 1
    stages: int = 4
    steps: int = 2
    chunk: int = 4
    warpgroups: int = 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """One launch: what is static about it, and the sizes that follow.

    Attributes:
      v: weights of a code of the kernel's, which is 8 or 16 bits.
      codes: codes in a word, 4 or 2.
      dtype: of x and of the products, bf16 or f16.
      book_dtype: of codebooks.
      scale_dtype: of scales.
    """

    M: int
    K: int
    m: int
    v: int
    codes: int
    g: int
    dtype: jnp.dtype
    book_dtype: jnp.dtype
    scale_dtype: jnp.dtype
    tiles: Tiling

    # Along K.

    @property
    def word(self) -> int:
        """Features of a word of codes."""
        return self.codes * self.v

    @property
    def words(self) -> int:
        """Words along K."""
        return self.K // self.word

    @property
    def step(self) -> int:
        """Features of a step."""
        return 4 * self.word

    @property
    def small_groups(self) -> bool:
        """Whether a step has several scales: then the lanes of a quad share each of its words."""
        return self.g % self.step != 0

    @property
    def steps(self) -> int:
        """Steps of a unit, which are of one group and short."""
        fits = self.v <= 4 and self.g % (2 * self.step) == 0
        return min(self.tiles.steps, 2) if fits else 1

    @property
    def unit(self) -> int:
        """Features of a unit."""
        return self.steps * self.step

    @property
    def all_units(self) -> int:
        """Units of the matrix."""
        return pl.cdiv(self.K, self.unit)

    @property
    def units(self) -> int:
        """Units of a block."""
        return pl.cdiv(self.all_units, self.tiles.k_blocks)

    @property
    def turns(self) -> int:
        """Units of a warp."""
        return pl.cdiv(self.units, self.tiles.k_warps)

    @property
    def chunk(self) -> int:
        """Units of a warp between two barriers."""
        return min(self.tiles.chunk, self.turns)

    @property
    def chunks(self) -> int:
        """Times that the block stages x."""
        return pl.cdiv(self.turns, self.chunk)

    @property
    def chunk_units(self) -> int:
        """Units of a block between two barriers."""
        return self.chunk * self.tiles.k_warps

    @property
    def chunk_steps(self) -> int:
        """Steps of a block between two barriers."""
        return self.chunk_units * self.steps

    # Along M.

    @property
    def few(self) -> bool:
        """At most 8 rows: rows 8 to 15 of a fragment of x then belong to the next product."""
        return self.M <= 8

    @property
    def row_tiles(self) -> int:
        """Fragments of 16 rows."""
        return pl.cdiv(self.M, 16)

    @property
    def eights(self) -> int:
        """Groups of 8 rows, of which a thread holds the sums of one row each."""
        return pl.cdiv(self.M, 8)

    @property
    def rows(self) -> int:
        """Rows of a warp's sums in shared memory."""
        return self.M if self.few else 8 * self.eights

    @property
    def sums_pitch(self) -> int:
        """Floats from one of these rows to the next."""
        return self.columns + PAD

    @property
    def products(self) -> int:
        """Products of 16 features in a step."""
        return self.word // 4

    # A chunk of x in shared memory: rows as they are, but for 16-byte pieces that change places
    # so that the lanes which load together, 2 rows and the 4 words of a step, meet no bank twice.

    @property
    def x_rows(self) -> int:
        """Rows of x in shared memory, of which M are written."""
        return self.M if self.few else 16 * self.row_tiles

    @property
    def chunk_features(self) -> int:
        """Features of x in shared memory."""
        return self.chunk_steps * self.step

    @property
    def pitch(self) -> int:
        """Elements from one row to the next."""
        return self.chunk_features + 8 * (4 if self.word == 8 else 1)

    def swap(self, q):
        """What a piece's place in the word of lane q is xored with; q an int or an array."""
        pieces = self.word // 8
        if self.small_groups or pieces < 4:
            return q * 0
        return q & 2 if pieces == 4 else q * 2

    # Threads.

    @property
    def threads(self) -> int:
        """CUDA threads of a block."""
        return self.tiles.warpgroups * WARPGROUP

    @property
    def warps(self) -> int:
        """Warps of a block; those beyond columns * k_warps only help with copies."""
        return self.threads // WARP

    @property
    def columns(self) -> int:
        """Output features of a warp."""
        return COLUMNS * self.tiles.width

    @property
    def block_columns(self) -> int:
        """Output features of a block."""
        return self.columns * self.tiles.columns

    # A warp's ring slot: words of codes, then scales.

    @property
    def code_words(self) -> int:
        """Words of codes of a unit of a warp."""
        return self.steps * self.m * 4 * self.columns

    @property
    def scale_rows(self) -> int:
        """Scales of a column in a unit."""
        return 4 if self.small_groups else 1

    @property
    def scale_words(self) -> int:
        """32-bit words of one row of scales of a warp."""
        return self.columns * jnp.dtype(self.scale_dtype).itemsize // 4

    @property
    def slot(self) -> int:
        """32-bit words of a ring slot."""
        return self.code_words + self.scale_rows * self.scale_words

    # Lookup tables: pieces of at most 16 bytes of every vector, copied side by side.

    @property
    def global_book(self) -> bool:
        """Whether vectors are looked up in global memory."""
        return self.codes == 32 // GLOBAL_BITS

    @property
    def parts(self) -> int:
        """Summands of `dtype` that stand for one codebook value: 2 where one would round it."""
        return 1 if self.book_dtype in (self.dtype, jnp.bfloat16) else 2

    @property
    def piece(self) -> int:
        """Bytes that one load looks up."""
        return min(2 * self.v, 16)

    @property
    def pieces(self) -> int:
        """Loads of one vector."""
        return 2 * self.v // self.piece

    @property
    def table_bytes(self) -> int:
        """Bytes of an entry, with all copies: 128, all banks, unless memory is short."""
        size = 128
        while self.m * self.parts * self.pieces * size > 256 * MAX_REGIONS:
            size //= 2
        return size

    @property
    def regions(self) -> int:
        """Regions of 64 KiB that hold the tables."""
        return pl.cdiv(self.m * self.parts * self.pieces * self.table_bytes, 256)

    def table_offset(self, c: int, part: int, piece: int) -> int:
        """Where the table of a piece begins, in bytes."""
        table = (c * self.parts + part) * self.pieces + piece
        per_region = 256 // self.table_bytes
        return table // per_region * REGION_BYTES + table % per_region * self.table_bytes

    # Shared memory.

    @property
    def stage_bytes(self) -> int:
        """Bytes of x that lie in shared memory."""
        return min(self.chunks, 2) * self.x_rows * self.pitch * 2

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory of a block, but for alignment."""
        ring = self.tiles.stages * self.warps * self.slot * 4
        sums = self.warps * self.rows * self.sums_pitch * 4
        tables = 0 if self.global_book else self.regions * REGION_BYTES
        return tables + max(self.stage_bytes + ring, sums)


def virtual(spec: CodebookSpec) -> tuple[int, int]:
    """(v, codes a word) of the kernel: codes narrower than 8 bits are looked up several at once."""
    if spec.bits == GLOBAL_BITS:
        return spec.vector_length, 2
    return spec.vector_length * 8 // spec.bits, 4


def refusal(
    M: int,
    K: int,
    N: int,
    spec: CodebookSpec,
    dtype: jnp.dtype,
) -> str | None:
    """Why the kernel cannot multiply x [M, K] of `dtype` by a `spec` weight; None if it can."""
    v, codes = virtual(spec)
    word = v * codes
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"tensor cores multiply bfloat16 or float16, got x of {jnp.dtype(dtype)}"
    if not 1 <= M <= MAX_ROWS:
        return f"its sums fit in registers for 1 to {MAX_ROWS} rows, got M = {M}"
    if N < 8 or N % 8:
        return (
            f"rows of scales are copied 16 bytes at a time: N must be a multiple of 8, got N = {N}"
        )
    if K % word:
        return f"K must be a multiple of the {word} features of a word of codes, got K = {K}"
    if v > MAX_VECTOR:
        return f"8 bits of codes stand for {v} features of {spec}, and it takes {MAX_VECTOR}"
    if codes == 2 and v < 4:
        return f"it looks codes of 16 bits up as at least 4 features, and {spec} has v = {v}"
    if spec.group_size % (4 * word) and (codes == 2 or v < 4 or spec.group_size % word):
        least = 4 * word if codes == 2 or v < 4 else word
        return f"a group must be a multiple of {least} features, got g = {spec.group_size}"
    if not _tilings(M, K, N, spec):
        return f"its tables, x and codes need more than {SHARED_BYTES} bytes for {spec}, M = {M}"
    return None


def tiling(M: int, K: int, N: int, spec: CodebookSpec) -> Tiling:
    """The tile sizes for x [M, K] and weights of N columns in all: the fastest by `_cycles`.

    Raises:
      NotImplementedError: the kernel cannot run these shapes, with the numbers.
    """
    if reason := refusal(M, K, N, spec, jnp.bfloat16):
        raise NotImplementedError(f"The fragment kernel cannot run: {reason}.")
    return _tilings(M, K, N, spec)[0]


def candidates(M: int, K: int, N: int, spec: CodebookSpec) -> list[Tiling]:
    """What is worth measuring for these shapes, the best guess first; at most 12."""
    if refusal(M, K, N, spec, jnp.bfloat16):
        return []
    best = _tilings(M, K, N, spec)
    more = [
        dataclasses.replace(tiles, stages=stages, chunk=chunk)
        for tiles in best[:2]
        for stages, chunk in ((tiles.stages - 1, tiles.chunk), (tiles.stages, tiles.chunk // 2))
        if stages >= 2 and chunk >= 1
    ]
    return [*best[:8], *more][:12]


def _tilings(M: int, K: int, N: int, spec: CodebookSpec) -> list[Tiling]:
    """Tilings that fit in shared memory and leave no two warps the same work, fastest first."""
    v, codes = virtual(spec)
    found = {}
    warpgroups = WARPGROUPS if M <= 32 else WARPGROUPS // 2  # 128 or 255 registers a thread
    for groups in (warpgroups, warpgroups // 2):
        # Clusters of 4 took twice as long as one block on the H100, and two tiles a warp no less.
        for columns, k_blocks in itertools.product(range(1, 4 * groups + 1), (1, 2)):
            base = Tiling(columns, 4 * groups // columns, 1, k_blocks, STAGES, 2, 1, groups)
            plan = Plan(
                M, K, spec.num_codebooks, v, codes, spec.group_size, *3 * (jnp.bfloat16,), base
            )
            if (fit := _fitted(plan)) is not None:
                found[fit.tiles] = _cycles(fit, N)
        if found:
            break
    return sorted(found, key=found.__getitem__)


def _fitted(plan: Plan) -> Plan | None:
    """The plan with as long chunks of x and as many stages as memory holds."""
    tiles = plan.tiles
    if plan.units < tiles.k_warps // 2 or (tiles.k_blocks > 1 and plan.units < tiles.k_warps):
        return None
    for stages in range(tiles.stages, 1, -1):
        chunk = max(1, CHUNK_BYTES // (tiles.k_warps * plan.unit * plan.M * 2))
        while chunk:
            fit = dataclasses.replace(
                plan, tiles=dataclasses.replace(tiles, stages=stages, chunk=min(chunk, plan.turns))
            )
            if fit.shared_bytes <= SHARED_BYTES - RESERVED_BYTES:
                return fit
            chunk //= 2
    return None


def _cycles(plan: Plan, N: int) -> float:
    """An estimate of the time on an SM, in cycles; only differences between tilings matter."""
    tiles = plan.tiles
    lookups = plan.steps * plan.codes * 4 * plan.m * plan.parts * plan.pieces
    products = plan.steps * plan.products * 4 * plan.m * plan.parts * plan.row_tiles
    x_quads = plan.unit * min(plan.M, plan.x_rows) / 64  # wavefronts of 128 bytes
    shared = tiles.width * (lookups * plan.piece / 4 + 8 * plan.steps * plan.m) + x_quads
    issued = tiles.width * (2 * lookups + 1.2 * products + 8 * plan.eights + 60) / 4
    unit = max(shared, 1.5 * products * tiles.width, issued)
    blocks = pl.cdiv(N, plan.block_columns) * tiles.k_blocks
    waves = pl.cdiv(blocks, SMS)
    staged = plan.M * plan.K * 2 / tiles.k_blocks / 48  # bytes of x at the rate of the L2
    work = plan.turns * tiles.columns * tiles.k_warps * unit
    ends = 1500 + 40 * tiles.k_warps * tiles.k_blocks + 300 * plan.chunks
    return waves * (max(work, staged) + 0.3 * min(work, staged) + ends) + 600 * (tiles.k_blocks > 1)
