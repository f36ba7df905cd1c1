"""Residual addition and RMS norm for Hopper with Mosaic GPU, in one pass over memory.

Bytes are all it has: x and update come in once, the sum and its norm leave once, where an addition and a norm apart
read the sum again. A persistent grid, one program per SM; its warpgroups take the program's rows in turn and share
nothing but the norm's weight. A warpgroup brings its next rows in with bulk copies, and a slot of shared memory that
held x and update of a row holds its sum and norm afterwards, so all slots are rows on their way in or out.

A row is lines in chunks of four, one for each warp. Squares are added up in each thread, then within each warp by
shuffles, then over the four warps through a scratch of the warpgroup's own: Mosaic's reduction across warps has one
scratch for the whole block, so that only one warpgroup could compute. That order is the row size's alone: a row's
result depends neither on the other rows, nor on its place among them, nor on how the update comes.

Gathered columns come as one tensor copy of a row's parts, not as a copy each: with every copy, all 128 threads arrive
at its barrier.

An update that an fp8 GEMM gave is multiplied by the scales of its row, which is a number, and of its columns, which lie
in shared memory beside the weight, and rounded, as the kernel that this spares would do. They take the room of a row or
two: rows of 8192 leave five, for two warpgroups.

In fp8 the norm goes once more through the update's slot: its largest magnitude is found as the squares are, and what
leaves is one byte an element, from a row of shared memory of the warpgroup's own, and the scale.

The automatic barriers around every store are off (there would be two per chunk): each thread writes over the very
elements that it read, and what crosses threads is between the explicit barriers of `commit_smem`. The total is read
again from shared memory, not kept: the longest rows would not fit into the registers.
"""

from __future__ import annotations

from collections.abc import Callable
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
from kernels_pallas.rows_fp8 import LEAST
from kernels_pallas.tuning import BLOCK_LIMIT, AddNormTuning

WARPS = 4  # of a warpgroup
ROW_UNIT = 128  # a row size is a multiple of this
MAX_SECTIONS = 8  # of a row
MAX_ROW, MAX_SCALED_ROW = 16_384, 8192
OTHER = 4096  # bytes of shared memory for partial sums, largest magnitudes, barriers and alignment (1024 each)


@dataclass(frozen=True)
class Plan:
    """Everything static about one call."""

    rows: int
    row_size: int
    parts: int  # that a row of the update comes in
    weight_row: int
    bias: bool
    scaled: bool
    eps: float
    quantise: bool
    bound: float | None
    warpgroups: int
    stages: int  # rows in shared memory, of each warpgroup
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
    def row(self) -> tuple[int, ...]:
        return self.chunks, WARPS, self.line

    @property
    def row_parts(self) -> tuple[int, ...]:
        return self.parts, self.chunks // self.parts, WARPS, self.line


def vector(row_size: int) -> int:
    """Elements that a thread reads at once, at most 8 bytes. From the row size alone, because it fixes the order of the
    sum, and such that a row has eight sections where it can."""
    return gcd(row_size // (MAX_SECTIONS * ROW_UNIT), 4) if row_size % (MAX_SECTIONS * ROW_UNIT) == 0 else 1


def sections(row_size: int) -> int:
    """Pieces that a row is worked on in: whole chunks each, and whole numbers of them in a part of the update. Few,
    because what Mosaic compiles grows with them."""
    return gcd(row_size // (ROW_UNIT * vector(row_size)), MAX_SECTIONS)


def _layout(plan: Plan) -> Any:
    """Of chunks: a line for each warp, neighbouring elements for neighbouring threads."""
    width = vector(plan.row_size)
    tiling = plgpu.Tiling(((WARPS, 32 * width), (width,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def _body(plan: Plan) -> Callable[..., None]:
    layout = _layout(plan)
    load = partial(plgpu.load, layout=layout)
    bring = partial(plgpu.copy_gmem_to_smem, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
    size = plan.chunks // sections(plan.row_size)
    part_size = plan.chunks // plan.parts
    of_row = [pl.ds(chunk, size) for chunk in range(0, plan.chunks, size)]
    of_part = [(part, pl.ds(chunk, size)) for part in range(plan.parts) for chunk in range(0, part_size, size)]

    def body(
        x: Any,  # [n, *row], row = [chunks, 4, line]; global memory
        update: Any,  # [parts, n, chunks / parts, 4, line]
        weight: Any,  # [R, *row]
        # With a bias [*row]; with scales of rows [n] and of columns [*row] float32; then written: total [n, *row] and
        # normed [n, parts, chunks / parts, 4, line], or in fp8 values [n, *row] and scales [n].
        *rest: Any,
        x_s: Any,  # [warpgroups * stages, *row], shared memory: x, then total
        update_s: Any,  # [warpgroups * stages, parts, chunks / parts, 4, line]: update, then normed
        fixed_s: Any,  # [1 or 2, *row]: weight, bias
        sums_s: Any,  # [warpgroups, 4] float32
        full: Any,  # barriers: [warpgroups * stages]
        fixed_full: Any,  # barrier
        values_s: Any = None,  # [warpgroups, *row] float8_e4m3fn
        most_s: Any = None,  # [warpgroups, 4] float32
        columns_s: Any = None,  # [*row] float32
    ) -> None:
        bias, rest = rest[: plan.bias], rest[plan.bias :]
        scales, (total, *normed) = rest[: 2 * plan.scaled], rest[2 * plan.scaled :]
        program, role = lax.axis_index("program"), lax.axis_index("role")
        rows = lax.div(plan.rows - program + (plan.programs - 1), jnp.int32(plan.programs))
        turns = lax.div(rows - role + (plan.warpgroups - 1), jnp.int32(plan.warpgroups))

        def place(turn: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Row, its slot in shared memory."""
            row = program + (role + turn * plan.warpgroups) * plan.programs
            return row, role * plan.stages + lax.rem(turn, jnp.int32(plan.stages))

        def bring_row(turn: jax.Array) -> None:
            row, slot = place(turn)
            bring(x.at[row], x_s.at[slot], full.at[slot])
            bring(update.at[:, row], update_s.at[slot], full.at[slot])

        def wide_norm(x: jax.Array) -> jax.Array:
            wide = x.astype(jnp.float32)
            return wide if plan.bound is None else jnp.clip(wide, -plan.bound, plan.bound)

        def quantise_row(role: jax.Array, slot: jax.Array, row: jax.Array, most: jax.Array) -> None:
            values, scales = normed
            most_s[role] = most.max(axis=0).max(axis=1)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # all but the total: the last row's values have left
            plgpu.commit_smem()
            warps = [most_s[role, warp] for warp in range(WARPS)]
            largest = jnp.maximum(jnp.maximum(warps[0], warps[1]), jnp.maximum(warps[2], warps[3]))
            scale = jnp.maximum(largest / FP8_MAX, LEAST)
            for section, in_part in zip(of_row, of_part, strict=True):
                values_s[role, section] = (wide_norm(load(update_s.at[slot, *in_part])) / scale).astype(FP8)
            scales[row] = scale
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(values_s.at[role], values.at[row])

        ahead = plan.stages - 1
        pl.loop(jnp.int32(0), jnp.minimum(turns, ahead))(bring_row)

        @pl.when(role == 0)
        def _() -> None:
            bring(weight.at[plan.weight_row], fixed_s.at[0], fixed_full)
            for ref in bias:
                bring(ref, fixed_s.at[1], fixed_full)
            for ref in scales[1:]:
                bring(ref, columns_s, fixed_full)

        plgpu.barrier_wait(fixed_full)

        @pl.loop(jnp.int32(0), turns)
        def _(turn: jax.Array) -> None:
            row, slot = place(turn)
            of_this_row = [ref[row] for ref in scales[:1]]
            plgpu.barrier_wait(full.at[slot])
            squares = plgpu.layout_cast(jnp.zeros((size, WARPS, plan.line), jnp.float32), layout)
            for section, in_part in zip(of_row, of_part, strict=True):
                added = load(update_s.at[slot, *in_part])
                for scale in of_this_row:
                    added = (added.astype(jnp.float32) * scale * load(columns_s.at[section])).astype(jnp.bfloat16)
                value = load(x_s.at[slot, section]) + added
                if plan.bias:
                    value += load(fixed_s.at[1, section])
                x_s[slot, section] = value
                wide = value.astype(jnp.float32)
                squares += wide * wide

            @pl.when(turn + ahead < turns)
            def _() -> None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last turn's results have left their slot
                bring_row(turn + ahead)

            sums_s[role] = squares.sum(axis=0).sum(axis=1)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(x_s.at[slot], total.at[row])
            warps = [sums_s[role, warp] for warp in range(WARPS)]
            square = (warps[0] + warps[1]) + (warps[2] + warps[3])
            scale = lax.rsqrt(square / plan.row_size + plan.eps)
            most = plgpu.layout_cast(jnp.zeros((size, WARPS, plan.line), jnp.float32), layout)
            for section, in_part in zip(of_row, of_part, strict=True):
                unit = (load(x_s.at[slot, section]).astype(jnp.float32) * scale).astype(jnp.bfloat16)
                unit *= load(fixed_s.at[0, section])
                update_s[slot, *in_part] = unit
                if plan.quantise:
                    most = jnp.maximum(most, jnp.abs(wide_norm(unit)))
            if plan.quantise:
                quantise_row(role, slot, row, most)
            else:
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(update_s.at[slot], normed[0].at[row])

        plgpu.wait_smem_to_gmem(0)

    return body


def make_plan(
    x: jax.Array, update: jax.Array, bias: jax.Array | None, weight_row: int, eps: float, tuning: AddNormTuning,
    quantise: bool = False, bound: float | None = None, scaled: bool = False,
) -> Plan:  # fmt: skip
    """As many warpgroups as have three rows each in shared memory, or with scales two, and the rows that then fit."""
    n, row_size = x.shape
    row_bytes = 2 * x.dtype.itemsize
    fixed = (1 + (bias is not None)) * row_size * x.dtype.itemsize + 4 * scaled * row_size
    programs = min(tuning.sms, n)
    values = quantise * row_size  # of each warpgroup
    room = min(tuning.bytes_in_flight, BLOCK_LIMIT - OTHER - fixed - values)
    least = 2 if scaled else 3
    warpgroups = min(max(1, room // (least * row_bytes * row_size + values)), tuning.max_warpgroups, -(-n // programs))
    room = min(tuning.bytes_in_flight, BLOCK_LIMIT - OTHER - fixed - warpgroups * values)
    slots = room // (row_bytes * row_size)
    return Plan(
        rows=n,
        row_size=row_size,
        parts=update.shape[0] if update.ndim == 3 else 1,
        weight_row=weight_row,
        bias=bias is not None,
        scaled=scaled,
        eps=eps,
        quantise=quantise,
        bound=bound,
        warpgroups=warpgroups,
        stages=min(slots // warpgroups, tuning.max_stages),
        programs=programs,
    )


def add_rms_norm_mosaic(
    x: jax.Array, update: jax.Array, weight: jax.Array, bias: jax.Array | None,
    scales: tuple[jax.Array, jax.Array] | None, *, weight_row: int, eps: float, quantise: bool, bound: float | None,
    tuning: AddNormTuning, interpret: Any = None,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """As `kernels_pallas.add_rms_norm`, which describes the arguments and has checked their shapes; weight [R, H]."""
    check_mosaic(x, update, weight, bias, scales is not None)
    n, row_size = x.shape
    if n == 0:
        return x, (x.astype(FP8), jnp.zeros(0, jnp.float32)) if quantise else x
    plan = make_plan(x, update, bias, weight_row, eps, tuning, quantise, bound, scales is not None)
    row, parts = plan.row, plan.row_parts
    slots = plan.warpgroups * plan.stages
    normed_type: list[Any] = [jax.ShapeDtypeStruct((n, *parts), x.dtype)]
    more: dict[str, Any] = {}
    if quantise:
        normed_type = [jax.ShapeDtypeStruct((n, *row), FP8), jax.ShapeDtypeStruct((n,), jnp.float32)]
        more = {
            "values_s": plgpu.SMEM((plan.warpgroups, *row), FP8),
            "most_s": plgpu.SMEM((plan.warpgroups, WARPS), jnp.float32),
        }
    if scales is not None:
        more["columns_s"] = plgpu.SMEM(row, jnp.float32)
    kernel = plgpu.kernel(
        _body(plan),
        out_type=(jax.ShapeDtypeStruct((n, *row), x.dtype), *normed_type),
        scratch_types={
            "x_s": plgpu.SMEM((slots, *row), x.dtype),
            "update_s": plgpu.SMEM((slots, *parts), x.dtype),
            "fixed_s": plgpu.SMEM((1 + plan.bias, *row), x.dtype),
            "sums_s": plgpu.SMEM((plan.warpgroups, WARPS), jnp.float32),
            "full": plgpu.Barrier(num_barriers=slots, num_arrivals=2),
            "fixed_full": plgpu.Barrier(num_arrivals=1 + plan.bias + plan.scaled),
            **more,
        },
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=plan.warpgroups,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name="add_rms_norm",
    )
    args = [x.reshape(n, *row), update.reshape(plan.parts, n, *parts[1:]), weight.reshape(-1, *row)]
    if bias is not None:
        args.append(bias.reshape(row))
    if scales is not None:
        args += [scales[0], scales[1].reshape(row)]
    moved = n * row_size * (4 * x.dtype.itemsize - quantise)
    with scheduled_as(expected_us(tuning.expected, moved, plan.programs, tuning.sms)):
        total, *normed = kernel(*args)
    total, normed[0] = total.reshape(x.shape), normed[0].reshape(x.shape)
    return total, tuple(normed) if quantise else normed[0]


def check_mosaic(x: jax.Array, update: jax.Array, weight: jax.Array, bias: jax.Array | None, scaled: bool) -> None:
    """Raises ValueError, one line that names the argument, for what the kernel does not take."""
    given = ("x", x), ("update", update), ("weight", weight), ("bias", bias)
    check_dtypes(*((name, value, (jnp.bfloat16,)) for name, value in given))
    row_size, most = x.shape[1], MAX_SCALED_ROW if scaled else MAX_ROW
    if row_size % ROW_UNIT or not ROW_UNIT <= row_size <= most:
        raise ValueError(
            f"x: rows of {row_size}; backend 'mosaic' accepts multiples of {ROW_UNIT} from {ROW_UNIT} to {most}"
            + (" with scales" if scaled else "")
        )
    parts = update.shape[0] if update.ndim == 3 else 1
    if sections(row_size) % parts:
        raise ValueError(
            f"update: columns from {parts} devices; "
            f"backend 'mosaic' accepts divisors of {sections(row_size)} with rows of {row_size}"
        )
