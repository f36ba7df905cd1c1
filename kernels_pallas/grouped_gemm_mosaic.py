"""Grouped GEMMs for Hopper (sm_90a) with Mosaic GPU: a persistent program per SM has two warpgroups that multiply and
one that copies.

A work item is a tile of 128 rows of one group by a block of columns; each computing warpgroup has 64 of the rows. XLA
lists the tiles that there are, so that rows which no group has cost nothing. Groups begin at multiples of eight rows,
the unit in which results are stored: a tile at a group's end stores no row of the next. With a gate, an item has the
same columns of both products, and stores what the gate makes of them.

Items go through the columns of a tile first: SMs that run side by side read the same rows, which come from L2, and each
its own part of a weight, which is read from memory once for every 128 rows of its group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.checks import check_dtypes
from kernels_pallas.expected import scheduled_as
from kernels_pallas.gate import Gate
from kernels_pallas.group_tiles import GROUP_ROWS, TILE, list_tiles, most_tiles
from kernels_pallas.mosaic_parts import LOG2_E, WGMMA, drain, tiled
from kernels_pallas.tuning import BLOCK_LIMIT, GroupedTuning

GROUPS = 2  # computing warpgroups
ROWS = TILE // GROUPS  # of one of them
STEP = 64  # of K: 128 bytes, as wide as a swizzled row
COMPUTE_REGISTERS, COPY_REGISTERS = 232, 40
OTHER = 2048  # bytes of shared memory for barriers and alignment


@dataclass(frozen=True)
class Plan:
    """Everything static about one call."""

    rows: int
    experts: int
    columns: int
    inputs: int
    gate: Gate | None
    bias: bool
    block: int  # columns of an item
    stages: int
    sms: int

    @property
    def parts(self) -> int:
        """Products of an item."""
        return 1 if self.gate is None else 2

    @property
    def tiles(self) -> int:
        return most_tiles(self.rows, self.experts)

    @property
    def blocks(self) -> int:
        return self.columns // self.block

    @property
    def programs(self) -> int:
        return min(self.sms, self.tiles * self.blocks)


def make_plan(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, gate: Gate | None, tuning: GroupedTuning
) -> Plan:
    """The widest block of columns that divides them, and the stages that then fit."""
    parts = 1 if gate is None else 2
    columns = weight.shape[-2]
    block = next(b for b in (256, 192, 128, 64) if columns % b == 0 and b * parts <= tuning.block)
    stage = 2 * STEP * (TILE + parts * block)
    room = BLOCK_LIMIT - OTHER - 2 * TILE * block
    return Plan(
        rows=x.shape[0],
        experts=weight.shape[0],
        columns=columns,
        inputs=x.shape[1],
        gate=gate,
        bias=bias is not None,
        block=block,
        stages=min(tuning.stages, room // stage),
        sms=tuning.sms,
    )


def _body(plan: Plan) -> Callable[..., None]:
    steps, stages = plan.inputs // STEP, plan.stages
    shape = (ROWS, plan.block)

    def body(
        x: Any,  # [R, K] bf16, global memory
        weight: Any,  # [E * parts, N, K] bf16
        tiles: Any,  # [plan.tiles + 1, 3] int32
        bias: Any,  # [E * parts, N] bf16, or None
        out: Any,  # [R, N] bf16
        x_s: Any,  # [stages, TILE, STEP] bf16, shared memory
        weight_s: Any,  # [stages, parts, block, STEP] bf16
        out_s: Any,  # [GROUPS, ROWS, block] bf16
        full: Any,  # barriers: [stages]
        free: Any,
    ) -> None:
        program, role = lax.axis_index("program"), lax.axis_index("role")
        items = tiles[plan.tiles, 0] * plan.blocks
        turns = lax.div(jnp.maximum(items - program, 0) + (plan.programs - 1), jnp.int32(plan.programs))

        def place(turn: jax.Array) -> tuple[jax.Array, ...]:
            """Expert; the tile's first row in x, and those it answers for; first column."""
            item = program + turn * plan.programs
            tile = lax.div(item, jnp.int32(plan.blocks))
            expert, first, end = (tiles[tile, column] for column in range(3))
            at = pl.multiple_of(jnp.minimum(first, plan.rows - TILE), GROUP_ROWS)
            return expert, at, first, end, pl.multiple_of((item - tile * plan.blocks) * plan.block, 64)

        def load(turn: jax.Array, done: jax.Array) -> jax.Array:
            expert, at, _, _, column = place(turn)

            def step(i: jax.Array, _: None) -> None:
                number = done + i
                slot = lax.rem(number, jnp.int32(stages))
                pl.when(number >= stages)(partial(plgpu.barrier_wait, free.at[slot]))
                inputs = pl.ds(pl.multiple_of(i * STEP, STEP), STEP)
                plgpu.copy_gmem_to_smem(x.at[pl.ds(at, TILE), inputs], x_s.at[slot], full.at[slot])
                for part in range(plan.parts):
                    block = weight.at[expert * plan.parts + part, pl.ds(column, plan.block), inputs]
                    plgpu.copy_gmem_to_smem(block, weight_s.at[slot, part], full.at[slot])

            lax.fori_loop(0, steps, step, None)
            return done + steps

        def products(done: jax.Array, *accs: Any) -> list[jax.Array]:
            def step(i: jax.Array, _: None) -> None:
                number = done + i
                slot = lax.rem(number, jnp.int32(stages))
                plgpu.barrier_wait(full.at[slot])
                rows = x_s.at[slot, pl.ds(role * ROWS, ROWS)]
                for part, acc in enumerate(accs):
                    plgpu.wgmma(acc, rows, weight_s.at[slot, part].transpose((1, 0)))
                plgpu.wgmma_wait(plan.parts)  # those of the step before are done
                before = lax.rem(number + (stages - 1), jnp.int32(stages))
                pl.when(i > 0)(lambda: plgpu.barrier_arrive(free.at[before]))

            lax.fori_loop(0, steps, step, None)
            found = [acc[...] for acc in accs]
            plgpu.barrier_arrive(free.at[lax.rem(done + (steps - 1), jnp.int32(stages))])
            return found

        def gated(gate: Gate, first: jax.Array, second: jax.Array) -> jax.Array:
            first, second = jnp.minimum(first, gate.limit), jnp.clip(second, -gate.limit, gate.limit)
            return first / (1.0 + jnp.exp2(first * (-gate.alpha * LOG2_E))) * (second + gate.shift)

        def compute(turn: jax.Array, done: jax.Array) -> jax.Array:
            expert, at, first, end, column = place(turn)
            accs = [plgpu.WGMMAAccumulatorRef(shape, jnp.float32)] * plan.parts
            found = pl.run_scoped(partial(products, done), *accs)
            if plan.bias:
                for part in range(plan.parts):
                    row = bias.at[expert * plan.parts + part, pl.ds(column, plan.block)]
                    loaded = plgpu.load(row, layout=WGMMA.reduce(0), optimized=False).astype(jnp.float32)
                    found[part] += lax.broadcast_in_dim(loaded, shape, (1,))
            # Rounded as products on their own would be.
            found = [value.astype(jnp.bfloat16).astype(jnp.float32) for value in found]
            result = found[0] if plan.gate is None else gated(plan.gate, *found)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last item's result has left
            out_s.at[role][...] = result.astype(jnp.bfloat16)
            plgpu.commit_smem()
            columns, mine = pl.ds(column, plan.block), at + role * ROWS
            for unit in range(ROWS // GROUP_ROWS):
                row = pl.multiple_of(mine + unit * GROUP_ROWS, GROUP_ROWS)

                @pl.when((first <= row) & (row < end))
                def _(unit: int = unit, row: jax.Array = row) -> None:
                    part = out_s.at[role, pl.ds(unit * GROUP_ROWS, GROUP_ROWS)]
                    plgpu.copy_smem_to_gmem(part, out.at[pl.ds(row, GROUP_ROWS), columns])

            return done + steps

        @pl.when(role < GROUPS)
        def _() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            lax.fori_loop(0, turns, compute, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(role == GROUPS)
        def _() -> None:
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            drain(lax.fori_loop(0, turns, load, jnp.int32(0)), stages, free)

    if plan.bias:
        return body
    return lambda x, weight, tiles, *rest: body(x, weight, tiles, None, *rest)


def grouped_gemm_mosaic(
    x: jax.Array, weight: jax.Array, sizes: jax.Array, *, bias: jax.Array | None, gate: Gate | None,
    tiles: jax.Array | None, tuning: GroupedTuning, expected_rows: int | None, interpret: Any,
) -> jax.Array:  # fmt: skip
    """As `kernels_pallas.grouped_gemm`, which describes the arguments and has checked their shapes."""
    check_mosaic(x, weight, bias)
    short = max(0, TILE - x.shape[0])
    rows = jnp.pad(x, ((0, short), (0, 0))) if short else x
    plan = make_plan(rows, weight, bias, gate, tuning)

    kernel = plgpu.kernel(
        _body(plan),
        out_type=jax.ShapeDtypeStruct((plan.rows, plan.columns), jnp.bfloat16),
        scratch_types=[
            tiled((plan.stages, TILE, STEP)),
            tiled((plan.stages, plan.parts, plan.block, STEP)),
            tiled((GROUPS, ROWS, plan.block)),
            plgpu.Barrier(num_barriers=plan.stages, num_arrivals=1 + plan.parts),
            plgpu.Barrier(num_barriers=plan.stages, num_arrivals=GROUPS),
        ],
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=GROUPS + 1,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="grouped_gemm",
    )
    tiles = list_tiles(plan.rows, sizes) if tiles is None else tiles
    args = [rows, weight.reshape(-1, plan.columns, plan.inputs), tiles]
    if bias is not None:
        args.append(bias.reshape(-1, plan.columns))
    with scheduled_as(_expected_us(plan, x.shape[0] if expected_rows is None else expected_rows, tuning)):
        out = kernel(*args)
    return out[: x.shape[0]] if short else out


def _expected_us(plan: Plan, rows: int, tuning: GroupedTuning) -> float | None:
    """Microseconds of a call with so many rows in groups of one size."""
    if tuning.expected is None:
        return None
    tiles = min(plan.experts, max(rows // GROUP_ROWS, 1)) * max(1, -(-rows // (plan.experts * TILE)))
    wide = plan.parts * plan.columns
    weights = 2 * min(plan.experts, rows) * wide * plan.inputs
    moved = weights + 2 * rows * (plan.inputs + plan.columns)
    return tuning.expected.us(
        moved=moved,
        flops=2 * tiles * TILE * wide * plan.inputs,
        sms=min(plan.sms, tiles * plan.blocks),
        all_sms=tuning.sms,
    )


def check_mosaic(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> None:
    """Raises ValueError, one line that names the argument, for what the kernel does not take."""
    check_dtypes(*((name, value, (jnp.bfloat16,)) for name, value in (("x", x), ("weight", weight), ("bias", bias))))
    columns, inputs = weight.shape[-2:]
    if columns % STEP or inputs % STEP:
        raise ValueError(f"weight: {columns} x {inputs}; backend 'mosaic' accepts multiples of {STEP}")
    if x.shape[0] % GROUP_ROWS or x.shape[0] == 0:
        raise ValueError(f"x: {x.shape[0]} rows; backend 'mosaic' accepts multiples of {GROUP_ROWS}")
