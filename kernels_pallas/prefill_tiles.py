"""The work of a prefill attention call, cut into tiles: static sizes, and the list of tiles that XLA computes."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels_pallas.checks import PAGE_SIZE

STEP = 2 * PAGE_SIZE  # tokens of context per step of the softmax
GROUPS = 2  # computing warpgroups
UNIT = 8  # rows of one copy of queries or results: a row of wgmma's tiles
UNITS = 8  # of one warpgroup
ROWS = UNIT * UNITS

# Columns of the list of tiles; PAGE with a window alone.
FIRST, BEGIN, END, KEYS, LENGTH, SHIFT, SEGMENT, PAGE = range(8)


@dataclass(frozen=True)
class Plan:
    """Everything static about one call, from shapes and tuning alone."""

    tokens: int  # of queries; a multiple of 8 where a unit is 8 tokens
    q_heads: int
    kv_heads: int
    row_pages: int  # of the page table
    segments: int
    head_dim: int
    stages: int  # steps (K and V) in flight
    sms: int
    scale: float
    ping_pong: bool
    window: int | None = None  # tokens that a query sees; None: all
    sinks: bool = False  # each head has one

    @property
    def repeats(self) -> int:
        return self.q_heads // self.kv_heads

    @property
    def packed(self) -> bool:
        """A unit is one token's 8 heads; else it is 8 tokens of one head."""
        return self.repeats % UNIT == 0

    @property
    def group_heads(self) -> int:
        """Heads of a work item."""
        return UNIT if self.packed else 2 - self.repeats % 2

    @property
    def head_groups(self) -> int:
        return self.q_heads // self.group_heads

    @property
    def group_tokens(self) -> int:
        """Tokens of one warpgroup."""
        return UNITS if self.packed else ROWS

    @property
    def tile_tokens(self) -> int:
        return GROUPS * ROWS // self.group_heads

    @property
    def align(self) -> int:
        """A tile starts at a multiple of this many tokens."""
        return 1 if self.packed else UNIT

    @property
    def tiles(self) -> int:
        """Enough for any packing of the segments and the padding after them."""
        parts = self.segments + 1
        return (self.tokens + (self.align - 1) * parts) // self.tile_tokens + parts

    @property
    def columns(self) -> int:
        """Of the list of tiles."""
        return PAGE if self.window is None else PAGE + 1

    @property
    def items(self) -> int:
        return self.tiles * self.head_groups

    @property
    def programs(self) -> int:
        return min(self.sms, self.items)


def list_tiles(plan: Plan, row_starts: jax.Array, lengths: jax.Array) -> jax.Array:
    """Tiles of every segment and of the padding, most steps first: [tiles, plan.columns] int32.

    FIRST   first token of the tile, BEGIN and END bound those it answers for (BEGIN == END: none)
    KEYS    tokens of context to read, of the LENGTH that the segment has
    SHIFT   what added to a token gives its position in the context
    PAGE    with a window, the page of the segment that holds the first key of the tile's first token: none before it is
            read. KEYS, LENGTH and SHIFT count from the beginning of its step. Steps stay where they are in the context:
            a row's answer does not depend on where its tile begins
    """
    starts = row_starts
    ends = jnp.concatenate([row_starts[1:], jnp.full((1,), plan.tokens, jnp.int32)])
    lengths = jnp.concatenate([lengths, jnp.zeros((1,), jnp.int32)])
    base = starts // plan.align * plan.align
    counts = jnp.where(ends > starts, -(-(ends - base) // plan.tile_tokens), 0)
    tile_ends = jnp.cumsum(counts)
    tile = jnp.arange(plan.tiles, dtype=jnp.int32)
    segment = (tile[:, None] >= tile_ends[None, :-1]).sum(axis=1, dtype=jnp.int32)
    first = base[segment] + (tile - (tile_ends - counts)[segment]) * plan.tile_tokens
    begin = jnp.maximum(first, starts[segment])
    end = jnp.maximum(jnp.minimum(first + plan.tile_tokens, ends[segment]), begin)
    shift = (lengths - ends)[segment]
    keys = jnp.where(segment < plan.segments, jnp.clip(end + shift, 0, plan.row_pages * PAGE_SIZE), 0)
    keys = jnp.where(begin < end, keys, 0)
    length, pages = lengths[segment], ()
    if plan.window is not None:
        page = jnp.where(keys > 0, jnp.maximum(begin + shift - (plan.window - 1), 0) // PAGE_SIZE, 0)
        before = page * PAGE_SIZE // STEP * STEP
        keys, length, shift = jnp.maximum(keys - before, 0), length - before, shift - before
        pages = (page,)
    columns = (first, begin, end, keys, length, shift, jnp.minimum(segment, plan.segments - 1), *pages)
    # What only writes zeros goes before what does nothing.
    work = (keys + STEP - 1) // STEP * 2 + (begin < end).astype(jnp.int32)
    return jnp.stack(columns, axis=1)[jnp.argsort(-work, stable=True)]
