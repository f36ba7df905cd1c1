"""What attention and append kernels read beside activations: page tables, lengths and places, cut to op pieces."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nanoflow_jax.plan.plan import OpPiece
from nanoflow_jax.step.batch import StepBatch, StepShape

NO_PAGE = 2**30  # beyond every pool, and so is the sum with a layer's first page


class KernelInputs(NamedTuple):
    """Of one page table. writes: of each KQV piece where its K and V go, pages and slots [n]; contexts: of each GEMV
    piece its page table [n, M] and lengths [n]; prefill_table [S, M]. No layer of the table changes them."""

    writes: dict[int, tuple[jax.Array, jax.Array]]
    contexts: dict[int, tuple[jax.Array, jax.Array]]
    prefill_table: jax.Array


def kernel_inputs(
    pieces: tuple[OpPiece, ...], batch: StepBatch, shape: StepShape, table: int, num_pages: int
) -> KernelInputs:
    """Computed, be it by a maximum that changes nothing: each is then an array of its own. A slice would be handed to
    the kernels as an address inside the whole, and rows begin at multiples of 32 bytes where the kernels need 256.
    """
    writes, contexts = {}, {}
    width, first = shape.pages_per_request, table * shape.rows
    entries = slice(table * width, (table + 1) * width)
    for piece in pieces:
        rows = slice(piece.start, piece.stop)
        if piece.op == "KQV":
            pages = batch.write_pages[first + piece.start : first + piece.stop]
            writes[piece.piece] = (
                jnp.where(pages < num_pages, pages, NO_PAGE),
                jnp.maximum(batch.write_slots[rows], 0),
            )
        elif piece.op == "GEMV":
            contexts[piece.piece] = (
                jnp.maximum(batch.decode_table[rows, entries], 0),
                jnp.maximum(batch.decode_lengths[rows], 0),
            )
    whole = shape.tables == 1  # and then it begins where a kernel can read it
    return KernelInputs(
        writes, contexts, batch.prefill_table if whole else jnp.maximum(batch.prefill_table[:, entries], 0)
    )


def expected_context(shape: StepShape, num_pages: int, page_size: int) -> int:
    """Tokens of context to expect of a row: what the pool gives each decode row, at most a whole page table."""
    shared = num_pages // shape.tables * page_size // max(shape.decode_rows, 1)
    return max(1, min(shared, shape.pages_per_request * page_size))


def pack_kqv(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """One after another in one vector, so that one kernel makes all three, and those that read them take their part in
    place."""
    return jnp.concatenate([x.reshape(-1) for x in (q, k, v)])


def unpack_kqv(packed: jax.Array, groups: int, heads: int, d: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [n, h, d], k and v [n, g, d]."""
    rows = packed.size // ((heads + 2 * groups) * d)
    first, second = rows * heads * d, rows * (heads + groups) * d
    q, k, v = packed[:first], packed[first:second], packed[second:]
    return q.reshape(rows, heads, d), k.reshape(rows, groups, d), v.reshape(rows, groups, d)


def clip_segments(starts: jax.Array, lengths: jax.Array, first: int, last: int) -> tuple[jax.Array, jax.Array]:
    """Segments restricted to prefill rows [first, last): their row starts there, and each one's context after its
    last row there."""
    clipped = jnp.clip(starts, first, last)
    cut_off = starts[1:] - clipped[1:]  # rows of the segment past `last`
    return clipped - first, jnp.maximum(lengths - jnp.maximum(cut_off, 0), 0)
