"""The tiles of grouped GEMMs: lists that are the same for every weight of the same groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp

TILE = 128  # rows, of one group
GROUP_ROWS = 8  # with backend "mosaic", groups begin at multiples of this many rows


def most_tiles(rows: int, groups: int) -> int:
    """Enough for any groups of so many rows together."""
    return -(-rows // TILE) + groups


def list_tiles(rows: int, sizes: jax.Array) -> jax.Array:
    """[most_tiles + 1, 3] int32: group, first row, and one past the last of its group; then how many there are.
    sizes [E] int32: rows of each group, together at most `rows`."""
    count, groups = most_tiles(rows, sizes.shape[0]), sizes.shape[0]
    ends = jnp.cumsum(sizes)
    counts = -(-sizes // TILE)
    tile_ends = jnp.cumsum(counts)
    tile = jnp.arange(count, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(tile[:, None] >= tile_ends[None, :], axis=1, dtype=jnp.int32), groups - 1)
    first = (ends - sizes)[group] + (tile - (tile_ends - counts)[group]) * TILE
    listed = jnp.stack([group, first, ends[group]], axis=1)
    return jnp.concatenate([listed, jnp.broadcast_to(tile_ends[-1], (1, 3))])
