"""Rows in fp8 for Hopper with Mosaic GPU, in one pass over memory: what a GEMM reads, or the gate of what one gave.

A row cannot be written before its largest magnitude is known, so it waits in shared memory, in bfloat16: 57 KB of the
28,672 columns of a 70B's MLP. A persistent grid, one program per SM, takes rows in groups; a group's columns are dealt
to the program's warpgroups in chunks, which come in through a few slots of each warpgroup's own. After the last chunk
the warpgroups exchange each row's largest magnitude, the one thing that they share, and each rounds the chunks that it
kept: every thread reads what it wrote itself. The values leave from registers, 128 bytes of a warp.

Groups, because a chunk's channel scales come with it: four bytes a column, twice the bytes of a row, out of the L2
cache. Rows of a group share them.

A group does not cross the pieces that rows come in. The last of a piece begins early enough to be whole, and writes
only the rows that the one before it did not. A row's result depends neither on the others, nor on its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.checks import FP8, FP8_MAX, check_dtypes
from kernels_pallas.expected import expected_us, scheduled_as
from kernels_pallas.gate import Gate
from kernels_pallas.mosaic_parts import LOG2_E
from kernels_pallas.rows_fp8 import LEAST, next_power_of_two
from kernels_pallas.tuning import BLOCK_LIMIT, RowsTuning

WARPS = 4  # of a warpgroup
ROW_UNIT = 128  # a row size is a multiple of this
MAX_ROW = 65_536
OTHER = 3072  # bytes of shared memory for maxima, barriers and alignment


@dataclass(frozen=True)
class Plan:
    """Everything static about one call."""

    row_size: int  # of the result
    spans: tuple[tuple[int, int], ...]  # of each piece: first row and number of rows
    gate: Gate | None
    bound: float | None
    power_of_two: bool
    group: int  # rows
    warpgroups: int
    stages: int  # chunks in shared memory on their way in, of each warpgroup
    programs: int

    @property
    def line(self) -> int:
        """Elements that a warp reads at once."""
        return 32 * vector(self.row_size)

    @property
    def chunks(self) -> int:
        """Of a row, [4, line] each."""
        return self.row_size // (WARPS * self.line)

    @property
    def halves(self) -> int:
        return 1 if self.gate is None else 2

    @property
    def groups(self) -> list[int]:
        """Of each piece."""
        return [-(-rows // self.group) for _, rows in self.spans]


def vector(row_size: int) -> int:
    """Elements that a thread reads at once: 8 bytes where a row divides so."""
    return gcd(row_size // ROW_UNIT, 4)


def _sigmoid(x: jax.Array) -> jax.Array:
    """By the hardware's 2^x, without the steps that make it good to the last bits of float32: bfloat16 drops those."""
    return 1 / (1 + jnp.exp2(x * -LOG2_E))


def _body(plan: Plan) -> Callable[..., None]:
    width = vector(plan.row_size)
    tiling = plgpu.Tiling(((WARPS, plan.line), (width,)))
    layout = plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    load = partial(plgpu.load, layout=layout)
    bring = partial(plgpu.copy_gmem_to_smem, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
    chunk = (WARPS, plan.line)

    def clipped(wide: jax.Array) -> jax.Array:
        return wide if plan.bound is None else jnp.clip(wide, -plan.bound, plan.bound)

    def scale_of(most: jax.Array) -> jax.Array:
        """Of a largest magnitude. It keeps order, so that the largest of a row's scales is that of its largest."""
        scale = jnp.maximum(clipped(most.astype(jnp.bfloat16).astype(jnp.float32)) / FP8_MAX, LEAST)
        return next_power_of_two(scale) if plan.power_of_two else scale

    def body(
        # Pieces [n, halves, chunks, 4, line] in global memory; with a gate the scales of tokens [n] and of channels
        # [2, chunks, 4, line]. Then written: values [n, chunks, 4, line] and scales [n].
        *refs: Any,
        x_s: Any,  # [warpgroups * stages, group, halves, 4, line], shared memory
        row_s: Any,  # [group, chunks, 4, line]
        scale_s: Any,  # [2, group, warpgroups, 4] float32, by parity of the group: what a warp has seen needs it
        full: Any,  # barriers: [warpgroups * stages]
        all_there: Any,  # barrier of the warpgroups
        channel_s: Any = None,  # [warpgroups * stages, 2, 4, line] float32
    ) -> None:
        pieces, (*given, values, scales) = refs[: len(plan.spans)], refs[len(plan.spans) :]
        program, role = lax.axis_index("program"), lax.axis_index("role")
        groups = lax.div(sum(plan.groups) - program + (plan.programs - 1), jnp.int32(plan.programs))
        turns = lax.div(plan.chunks - role + (plan.warpgroups - 1), jnp.int32(plan.warpgroups))  # of a group

        def place(group: jax.Array) -> tuple[list[jax.Array], list[jax.Array], jax.Array, jax.Array]:
            """Whether the program's group is of each piece; its first row there; that of the result; how many of its
            rows the group before it has."""
            number = program + group * plan.programs
            mine, rows, first, known, groups_before, rows_before = [], [], jnp.int32(0), jnp.int32(0), 0, 0
            for (start, size), count in zip(plan.spans, plan.groups, strict=True):
                local = number - groups_before
                wanted = local * plan.group
                row = jnp.minimum(wanted, size - plan.group)
                here = (local >= 0) & (local < count)
                mine.append(here)
                rows.append(start + row)
                first = jnp.where(here, rows_before + row, first)
                known = jnp.where(here, wanted - row, known)
                groups_before, rows_before = groups_before + count, rows_before + size
            return mine, rows, first, known

        def at(turn: jax.Array) -> jax.Array:
            """The chunk of a turn."""
            return role + turn * plan.warpgroups

        def bring_chunk(item: jax.Array) -> None:
            mine, rows = place(lax.div(item, turns))[:2]
            column, slot = at(lax.rem(item, turns)), role * plan.stages + lax.rem(item, jnp.int32(plan.stages))
            for ref, here, row in zip(pieces, mine, rows, strict=True):

                @pl.when(here)
                def _(ref: Any = ref, row: Any = row) -> None:
                    bring(ref.at[pl.ds(row, plan.group), :, column], x_s.at[slot], full.at[slot])

            if plan.gate is not None:
                bring(given[1].at[:, column], channel_s.at[slot], full.at[slot])

        def gated(slot: jax.Array, row: int, channel: list[jax.Array], token: jax.Array) -> jax.Array:
            """[4, line] float32 of a row of the group."""
            halves = [load(x_s.at[slot, row, half]).astype(jnp.float32) for half in range(plan.halves)]
            if plan.gate is None:
                return halves[0]
            both = (half * token * scale for half, scale in zip(halves, channel, strict=True))
            return plan.gate(*both, sigmoid=_sigmoid)

        items = groups * turns
        pl.loop(jnp.int32(0), jnp.minimum(items, plan.stages))(bring_chunk)

        @pl.loop(jnp.int32(0), groups)
        def _(group: jax.Array) -> None:
            first, known = place(group)[2:]
            tokens = [jnp.float32(1) if plan.gate is None else given[0][first + i] for i in range(plan.group)]

            def take(turn: jax.Array, most: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                item = group * turns + turn
                slot = role * plan.stages + lax.rem(item, jnp.int32(plan.stages))
                plgpu.barrier_wait(full.at[slot])
                channel = [] if plan.gate is None else [load(channel_s.at[slot, half]) for half in range(2)]
                seen = []
                for row in range(plan.group):
                    wide = gated(slot, row, channel, tokens[row])
                    row_s[row, at(turn)] = wide.astype(jnp.bfloat16)
                    seen.append(jnp.maximum(most[row], jnp.abs(wide)))
                plgpu.commit_smem()  # all threads have read the slot

                @pl.when(item + plan.stages < items)
                def _() -> None:
                    bring_chunk(item + plan.stages)

                return tuple(seen)

            nothing = plgpu.layout_cast(jnp.zeros(chunk, jnp.float32), layout)
            most = lax.fori_loop(jnp.int32(0), turns, take, (nothing,) * plan.group)
            parity = lax.rem(group, jnp.int32(2))
            for row in range(plan.group):
                scale_s[parity, row, role] = scale_of(most[row].max(axis=1))
            plgpu.barrier_arrive(all_there)
            plgpu.barrier_wait(all_there)
            found, factors = [], []
            for row in range(plan.group):
                scale = scale_s[parity, row, 0, 0]
                for warp in range(1, plan.warpgroups * WARPS):
                    scale = jnp.maximum(scale, scale_s[parity, row, warp // WARPS, warp % WARPS])
                found.append(scale)
                factors.append(1 / scale)

            @pl.loop(jnp.int32(0), turns)
            def _(turn: jax.Array) -> None:
                for row in range(plan.group):
                    wide = clipped(load(row_s.at[row, at(turn)]).astype(jnp.float32))

                    @pl.when(row >= known)
                    def _(row: int = row, wide: jax.Array = wide) -> None:
                        values[first + row, at(turn)] = (wide * factors[row]).astype(FP8)

            @pl.when(role == 0)
            def _() -> None:
                for row in range(plan.group):

                    @pl.when(row >= known)
                    def _(row: int = row) -> None:
                        scales[first + row] = found[row]

    return body


def make_plan(
    row_size: int,
    spans: Sequence[tuple[int, int]],
    gate: Gate | None,
    bound: float | None,
    power_of_two: bool,
    tuning: RowsTuning,
) -> Plan:
    """Groups that take the fewest rows of the busiest program; of those the largest, as far as they fit."""
    halves = 1 if gate is None else 2
    chunk = WARPS * 32 * vector(row_size)
    warpgroups = min(tuning.max_warpgroups, row_size // chunk)
    found = []
    for group in range(1, min(tuning.max_group, *(size for _, size in spans)) + 1):
        slot = chunk * (2 * halves * group + (0 if gate is None else 4 * halves))
        stages = (BLOCK_LIMIT - OTHER - 2 * group * row_size) // (warpgroups * slot)
        if stages < 2 and group > 1:
            break
        groups = sum(-(-size // group) for _, size in spans)
        programs = min(tuning.sms, groups)
        found.append((-(-groups // programs) * group, -group, min(stages, tuning.max_stages), programs))
    _, group, stages, programs = min(found)
    return Plan(row_size, tuple(spans), gate, bound, power_of_two, -group, warpgroups, stages, programs)


def rows_to_fp8_mosaic(
    pieces: Sequence[jax.Array], spans: Sequence[tuple[int, int]], scales: tuple[jax.Array, jax.Array] | None, *,
    gate: Gate | None, bound: float | None, power_of_two: bool, tuning: RowsTuning, interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """As `kernels_pallas.rows_to_fp8`, which describes the arguments and has checked their shapes; spans: first row
    and number of rows of each piece."""
    halves = 1 if gate is None else 2
    row_size = pieces[0].shape[1] // halves
    check_mosaic(pieces, row_size)
    kept = [(x, span) for x, span in zip(pieces, spans, strict=True) if span[1]]
    n = sum(size for _, (_, size) in kept)
    if n == 0:
        return jnp.zeros((0, row_size), FP8), jnp.zeros(0, jnp.float32)
    plan = make_plan(row_size, [span for _, span in kept], gate, bound, power_of_two, tuning)
    slots, row = plan.warpgroups * plan.stages, (plan.chunks, WARPS, plan.line)
    chunk = row[1:]
    args = [x.reshape(x.shape[0], halves, *row) for x, _ in kept]
    more: dict[str, Any] = {}
    if scales is not None:
        args += [scales[0], scales[1].reshape(halves, *row)]
        more["channel_s"] = plgpu.SMEM((slots, halves, *chunk), jnp.float32)
    kernel = plgpu.kernel(
        _body(plan),
        out_type=(jax.ShapeDtypeStruct((n, *row), FP8), jax.ShapeDtypeStruct((n,), jnp.float32)),
        scratch_types={
            "x_s": plgpu.SMEM((slots, plan.group, halves, *chunk), jnp.bfloat16),
            "row_s": plgpu.SMEM((plan.group, *row), jnp.bfloat16),
            "scale_s": plgpu.SMEM((2, plan.group, plan.warpgroups, WARPS), jnp.float32),
            "full": plgpu.Barrier(num_barriers=slots, num_arrivals=1 if scales is None else 2),
            "all_there": plgpu.Barrier(num_arrivals=plan.warpgroups),
            **more,
        },
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=plan.warpgroups,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name="rows_to_fp8",
    )
    moved = n * row_size * (2 * halves + 1)
    with scheduled_as(expected_us(tuning.expected, moved, plan.programs, tuning.sms)):
        values, found = kernel(*args)
    return values.reshape(n, row_size), found


def check_mosaic(pieces: Sequence[jax.Array], row_size: int) -> None:
    """Raises ValueError, one line that names the argument, for what the kernel does not take."""
    check_dtypes(*(("x", x, (jnp.bfloat16,)) for x in pieces))
    if row_size % ROW_UNIT or not ROW_UNIT <= row_size <= MAX_ROW:
        raise ValueError(
            f"x: rows of {row_size} in the result; backend 'mosaic' accepts multiples of {ROW_UNIT} from {ROW_UNIT} "
            f"to {MAX_ROW}"
        )
