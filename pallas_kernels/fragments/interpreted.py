"""What the per-thread primitives of `fragments_mosaic` mean, in plain jnp, for the interpreter.

Each function has the signature of its namesake there and does the same to the same refs, for the
4 warps of one warpgroup at once. Arrays are indexed by warp w of the warpgroup, lane 4 g + q (g the
row or the 8 columns of a fragment, q the features), i one of the 4 columns of a lane's words.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPS = 4  # of a warpgroup
GROUP = 8  # columns that share an alignment of 16 bytes


def _units(plan, first, turn):
    """For each warp: its column, its unit in the block and in the matrix, whether there is one."""
    warps = jax.lax.axis_index("warpgroup") * WARPS + jnp.arange(WARPS)
    column, unit = warps // plan.tiles.k_warps, turn * plan.tiles.k_warps
    unit = unit + warps % plan.tiles.k_warps
    valid = (column < plan.tiles.columns) & (unit < plan.units)
    valid &= first + unit < pl.cdiv(plan.K, plan.unit)
    return column, first + unit, valid


def _own_warps():
    return pl.ds(jax.lax.axis_index("warpgroup") * WARPS, WARPS)


def fetch(plan, codes_ref, scales_ref, ring_ref, tile, first, turn) -> None:
    """Copy the codes and scales of each warp's unit number `turn` into its ring slot."""
    column_warp, unit, _ = _units(plan, first, turn)
    codes, scales = codes_ref[...], scales_ref[...]
    m, words, N = codes.shape
    start = (tile * plan.tiles.columns + column_warp) * plan.columns
    fours = plan.columns // 4
    w, j, c, q, place, i = jnp.indices((WARPS, plan.steps, m, 4, fours, 4), sparse=True)
    own = jnp.minimum(start[w] + 4 * (place ^ 2 * q), N - 4) + i
    row = jnp.minimum((unit[w] * plan.steps + j) * 4 + q, words - 1)
    taken = codes[c, row, own].reshape(WARPS, -1)
    eights = plan.columns // GROUP
    w, scale_row, eight, n = jnp.indices((WARPS, plan.scale_rows, eights, GROUP), sparse=True)
    group = unit[w] * plan.unit // plan.g
    if plan.small_groups:
        group = jnp.minimum(unit[w] * 4 + scale_row, words - 1) * plan.word // plan.g
    columns = jnp.minimum(start[w] + GROUP * eight, N - GROUP) + n
    group = jnp.minimum(group, scales.shape[0] - 1)
    pairs = scales[group, columns]
    if scales.dtype.itemsize == 2:
        pairs = pairs.reshape(*pairs.shape[:-1], -1, 2)
    bits = jax.lax.bitcast_convert_type(pairs, jnp.uint32).reshape(WARPS, -1)
    ring_ref[turn % plan.tiles.stages, _own_warps(), :] = jnp.concatenate([taken, bits], axis=1)


def stage(plan, x_ref, stage_ref, first, chunk) -> None:
    """Write the features of a chunk, pieces of 8 swapped; zeros beyond K, nothing beyond M."""

    @pl.when((chunk < plan.chunks) & (jax.lax.axis_index("warpgroup") == 0))
    def _():
        start = (first + chunk * plan.chunk * plan.tiles.k_warps) * plan.unit
        columns = start + _swapped(plan, jnp.arange(plan.chunk_features))
        taken = x_ref[...][:, jnp.minimum(columns, plan.K - 1)]
        taken = jnp.where((columns < plan.K)[None], taken, 0)
        stage_ref[chunk % 2, pl.ds(0, plan.M), pl.ds(0, plan.chunk_features)] = taken


def arrange(plan, stage_ref, chunk) -> None:
    """Order the registers of a chunk's fragments; in place, so that nothing is left to do here."""
    if plan.small_groups:
        return

    @pl.when(jax.lax.axis_index("warpgroup") == 0)
    def _():
        x = stage_ref[chunk % 2]
        stage_ref[chunk % 2] = _arranged(plan, x)


def _arranged(plan, x):
    """x [x_rows, pitch] with the registers of two products in the order of operands."""
    registers = x.reshape(plan.x_rows, -1, 2, 2, 2)  # [row, piece, product, high, e]
    if plan.few:
        return registers.transpose(0, 1, 3, 2, 4).reshape(x.shape)
    registers = registers.reshape(-1, 2, 8, *registers.shape[1:])  # [tile, eight, g, piece, ...]
    return registers.transpose(0, 4, 2, 3, 5, 1, 6).reshape(x.shape)


def _as_before(plan, x):
    """The inverse of `_arranged`."""
    if plan.few:
        return _arranged(plan, x)
    registers = x.reshape(
        -1, 2, 8, plan.pitch // 8, 2, 2, 2
    )  # [tile, product, g, piece, high, eight]
    return registers.transpose(0, 5, 2, 3, 1, 4, 6).reshape(x.shape)


def _swapped(plan, k):
    """Where feature k of a chunk lies in a row, and which feature lies at k."""
    q = k // plan.word % 4
    return (k // 8 ^ plan.swap(q)) * 8 + k % 8


def fragments_of_x(plan, x):
    """x [rows, step] as [rows, q, product, high, e]: two pairs e of a product for lane q."""
    q, product, high, e = jnp.indices((4, plan.products, 2, 2), sparse=True)
    code, within = jnp.divmod(4 * product + 2 * high + e, plan.v)
    if plan.small_groups:
        return x[:, code * plan.word + q * plan.v + within]
    return x[:, q * plan.word + code * plan.v + within]


def fill(plan, codebooks_ref, book_ref) -> None:
    """Write the copies of every codebook vector."""

    @pl.when(jax.lax.axis_index("warpgroup") == 0)
    def _():
        rest = codebooks_ref[...].astype(jnp.float32)
        per_piece, per_table = plan.piece // 2, plan.table_bytes // 2
        table = jnp.zeros(book_ref.shape, plan.dtype)
        for part in range(plan.parts):
            rounded = rest.astype(plan.dtype)
            rest = rest - rounded.astype(jnp.float32)
            for c in range(plan.m):
                for piece in range(plan.pieces):
                    region, offset = divmod(plan.table_offset(c, part, piece), 256 * 256)
                    vectors = rounded[c, :, piece * per_piece : (piece + 1) * per_piece]
                    copies = jnp.tile(vectors, (1, per_table // per_piece))
                    table = table.at[region, :, offset // 2 : offset // 2 + per_table].set(copies)
        book_ref[...] = table


def multiply(plan, codebooks_ref, book_ref, ring_ref, stage_ref, sums, first, turn):
    """The sums after each warp's unit number `turn`."""
    _, _, valid = _units(plan, first, turn)
    slot = ring_ref[turn % plan.tiles.stages, _own_warps(), :]
    width = plan.tiles.width
    words = slot[:, : plan.code_words].reshape(WARPS, plan.steps, plan.m, 4, plan.columns // 4, 4)
    q, place = jnp.indices((4, plan.columns // 4), sparse=True)
    words = words[:, :, :, q, place ^ 2 * q]  # [w, step, c, q, 8 tile + g, i]
    words = words.reshape(*words.shape[:4], width, 8, 4).transpose(4, 0, 1, 2, 5, 3, 6)
    scales = slot[:, plan.code_words :]
    scales = jax.lax.bitcast_convert_type(scales, plan.scale_dtype).astype(jnp.float32)
    scales = scales.reshape(WARPS, plan.scale_rows, width, 4, 2, 4)  # columns 8 q + 4 half + i
    sums = sums.reshape(width, -1)
    warps = jax.lax.axis_index("warpgroup") * WARPS + jnp.arange(WARPS)
    step = (turn % plan.chunk * plan.tiles.k_warps + warps % plan.tiles.k_warps) * plan.steps
    x_chunk = stage_ref[turn // plan.chunk % 2]
    if not plan.small_groups:
        x_chunk = _as_before(plan, x_chunk)
    x_chunk = x_chunk.astype(jnp.float32)
    x_chunk = jnp.where(jnp.arange(plan.x_rows)[:, None] < plan.M, x_chunk, 0)
    x_chunk = x_chunk[:, _swapped(plan, jnp.arange(plan.chunk_features))]
    x_chunk = jnp.pad(x_chunk, ((0, 16 * plan.row_tiles - plan.x_rows), (0, 0)))
    x_chunk = x_chunk[: 8 * plan.eights].reshape(8 * plan.eights, plan.chunk_steps, plan.step)
    table = codebooks_ref[...] if plan.global_book else book_ref[...]
    for j in range(plan.steps):
        own = jnp.minimum(step + j, plan.chunk_steps - 1)
        x = jnp.stack([fragments_of_x(plan, x_chunk[:, own[w]]) for w in range(WARPS)])
        x = x.reshape(*x.shape[:3], plan.scale_rows, -1)
        for tile in range(width):
            vectors = _vectors(plan, table, words[tile, :, j])  # [w, g, q, i, product, high, e]
            vectors = vectors.reshape(*vectors.shape[:4], plan.scale_rows, -1)
            product = jnp.einsum(
                "wrqsk,wgqisk->wrgis", x, vectors, precision=jax.lax.Precision.HIGHEST
            )
            # Column 4 g + i belongs to half g % 2 of lane q = g // 2.
            product = product.reshape(WARPS, -1, 4, 2, 4, plan.scale_rows)
            scaled = jnp.einsum("wrqhis,wsqhi->wrqhi", product, scales[:, :, tile])
            scaled = jnp.where(valid[:, None, None, None, None], scaled, 0)
            scaled = scaled.reshape(WARPS, plan.eights, 8, 4, 2, 4)  # [w, eight, g, q, half, i]
            sums = sums.at[tile].add(scaled.transpose(1, 4, 0, 2, 3, 5).reshape(-1))
    return sums.reshape(-1)


def _vectors(plan, table, words):
    """Dequantized features f32 of words [w, m, g, q, i], in the order of the B fragments."""
    bits = 32 // plan.codes
    fields = [words >> jnp.uint32(bits * code) for code in range(plan.codes)]
    fields = jnp.stack(fields, axis=-1) & jnp.uint32(2**bits - 1)
    fields = fields.astype(jnp.int32)
    if plan.small_groups:
        # Lane q takes code q of the words of all 4 rows.
        fields = fields.transpose(0, 1, 2, 5, 4, 3)
    total = jnp.zeros((), jnp.float32)
    lane = jnp.arange(32).reshape(1, 8, 4, 1, 1, 1)
    element = jnp.arange(plan.piece // 2).reshape(1, 1, 1, 1, 1, -1)
    for c in range(plan.m):
        if plan.global_book:
            total = total + table[c][fields[:, c]].astype(jnp.float32)
            continue
        for part in range(plan.parts):
            pieces = []
            for piece in range(plan.pieces):
                region, offset = divmod(plan.table_offset(c, part, piece), 256 * 256)
                copies = plan.table_bytes // plan.piece
                elements = (offset + lane % copies * plan.piece) // 2 + element
                pieces.append(table[region, fields[:, c][..., None], elements])
            total = total + jnp.concatenate(pieces, axis=-1).astype(jnp.float32)
    return total.reshape(*total.shape[:4], plan.products, 2, 2)


def store_sums(plan, sums_ref, sums) -> None:
    """Write every warp's sums as [rows, columns]."""
    values = sums.reshape(plan.tiles.width, plan.eights, 2, WARPS, 8, 4, 4)
    values = values.transpose(3, 1, 4, 0, 5, 2, 6)  # [w, eight, g, tile, q, half, i]
    values = values.reshape(WARPS, 8 * plan.eights, plan.columns)[:, : plan.rows]
    sums_ref[_own_warps(), :, pl.ds(0, plan.columns)] = values


def reduce(plan, sums_ref, out_ref, tile, rank) -> None:
    """Add the sums of all warps that share columns, and write this block's share."""
    tiles = plan.tiles
    N = out_ref.shape[1]

    @pl.when(jax.lax.axis_index("warpgroup") == 0)
    def _():
        sums = sums_ref[...]
        if tiles.k_blocks == 1:
            sums = sums[None]
        used = sums[:, : tiles.columns * tiles.k_warps, : plan.M, : plan.columns]
        used = used.reshape(tiles.k_blocks, tiles.columns, tiles.k_warps, plan.M, plan.columns)
        total = used.sum(axis=(0, 2)).transpose(1, 0, 2).reshape(plan.M, -1)
        # One block writes for its cluster; the kernel shares the work.
        for eight in range(plan.block_columns // GROUP):
            n = tile * plan.block_columns + eight * GROUP

            @pl.when((n < N) & (rank == 0))
            def _(n=n, eight=eight):
                values = total[:, eight * GROUP : (eight + 1) * GROUP]
                out_ref[:, pl.ds(n, GROUP)] = values.astype(out_ref.dtype)


def zero_sums(plan):
    """Sums before the first unit."""
    return jnp.zeros((plan.tiles.width * plan.eights * 8 * WARPS * 32,), jnp.float32)


def end_copies() -> None:
    """Copies of the interpreter are done at once."""


def await_copies(pending: int) -> None:
    """Copies of the interpreter are done at once."""
    del pending


def sync_warp() -> None:
    """The interpreter runs a warpgroup as one."""


def sync_block(barrier) -> None:
    """Wait for the warpgroups of a block."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def sync_cluster(barrier) -> None:
    """Wait for the warpgroups of a cluster."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)
