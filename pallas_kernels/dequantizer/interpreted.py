"""What the dequantizer's primitive of `threads` means, in plain jnp, for the interpreter."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxcodec.pack import unpack_codes
from jaxcodec.pallas_kernels.dequantizer.plan import WARPS, Plan


def write_pieces(plan: Plan, table_ref, codes_ref, scales_ref, out_ref, first) -> None:
    """Each warp of a warpgroup writes the piece WARPS * first + its number, if there is one."""
    for i in range(4):
        piece = first * WARPS + 4 * jax.lax.axis_index("warpgroup") + i
        row, column = piece // plan.across, piece % plan.across * plan.width
        ragged = plan.N % plan.width or plan.width
        for last, width in ((False, plan.width), (True, ragged)):
            is_last = column + plan.width >= plan.N

            @pl.when((piece < plan.pieces) & (is_last == last))
            def _(row=row, column=column, width=width):
                across, down = pl.ds(column, width), pl.ds(row * plan.height, plan.height)
                codes = codes_ref[:, pl.ds(row, 1), across]
                weights_kn = _piece(plan, table_ref[...], codes, scales_ref, row, across)
                out_ref[down, across] = weights_kn.astype(out_ref.dtype)


def _piece(plan: Plan, table, codes_mjn, scales_ref, row, across):
    """Weights [height, columns] of one row of words."""
    spec = plan.spec
    books = jnp.moveaxis(table, 2, 1)[..., : spec.vector_length].astype(jnp.float32)
    books = list(books.reshape(-1, spec.codebook_size, spec.vector_length))
    codes_mjn = unpack_codes(codes_mjn, spec.bits)
    found = [jnp.take(books[c], codes, axis=0) for c, codes in enumerate(codes_mjn)]
    found_jnv = functools.reduce(jnp.add, found)
    groups = (row * plan.height + jnp.arange(plan.height)) // spec.group_size
    scales_kn = scales_ref[:, across].astype(jnp.float32)[groups]
    return found_jnv.swapaxes(1, 2).reshape(plan.height, -1) * scales_kn
