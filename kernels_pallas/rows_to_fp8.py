"""Rows of what a GEMM reads, in fp8: attention's output, or the gated products of the GEMM before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.checks import check_backend
from kernels_pallas.gate import Gate
from kernels_pallas.rows_fp8 import quantise_rows
from kernels_pallas.tuning import DEFAULT_GPU, ROWS, RowsTuning


def rows_to_fp8(
    *pieces: jax.Array,
    cuts: Sequence[tuple[int, int]] | None = None,
    gate: Gate | None = None,
    scales: tuple[jax.Array, jax.Array] | None = None,
    bound: float | None = None,
    power_of_two: bool = False,
    backend: str = "xla",
    tuning: RowsTuning | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """float8_e4m3fn values [n, K] and a scale [n] float32 per row, as `rows_fp8.quantise_rows` makes them.

    pieces        [n_i, K] each, or with a gate one of [n, 2 K]: what an fp8 GEMM gave, gate and up side by side
    cuts          (start, stop) of each piece: its rows that count; None: all. The result has them one after another
    gate          what becomes of gate and up ahead of the rounding
    scales        with a gate: of the GEMM's rows [n] and of its columns [2 K], float32, by which it is multiplied first
    bound         magnitudes beyond are cut off first
    power_of_two  of the scale: the next that is not below
    backend       "xla" or "mosaic" (Hopper: bfloat16, K a multiple of 128 up to 65536)
    tuning        "mosaic" alone; by default that of an H200
    interpret     `pallas_call`'s interpreter, for tests without a GPU

    What is rounded to fp8 is rounded to the pieces' dtype before; of the gate's inputs, scaled, "xla" rounds as much as
    the compiler does round what it fuses, "mosaic" nothing. With "mosaic", which divides to 2 units in the last place
    of float32, a row's result depends neither on n, nor on its place, nor on the pieces. Raises ValueError naming the
    argument that does not fit.
    """
    check_backend("rows_to_fp8", backend, interpret, tuning=tuning)
    if not pieces or any(x.ndim != 2 or x.shape[1] != pieces[0].shape[1] for x in pieces):
        raise ValueError(f"pieces: shapes {[x.shape for x in pieces]} must be [n, K], all with the same K")
    columns = pieces[0].shape[1]
    if cuts is None:
        cuts = [(0, x.shape[0]) for x in pieces]
    if len(cuts) != len(pieces) or any(not 0 <= a <= b <= x.shape[0] for (a, b), x in zip(cuts, pieces, strict=False)):
        raise ValueError(f"cuts: {list(cuts)} must be a (start, stop) within each of {[len(x) for x in pieces]} rows")
    if (gate is None) != (scales is None) or (gate is not None and (len(pieces) != 1 or columns % 2)):
        raise ValueError("gate: goes with scales, and with one piece of an even number of columns")
    if scales is not None and [(s.shape, s.dtype) for s in scales] != [
        ((pieces[0].shape[0],), jnp.float32), ((columns,), jnp.float32)
    ]:  # fmt: skip
        raise ValueError(
            f"scales: {[f'{s.dtype}{list(s.shape)}' for s in scales]} must be float32[{pieces[0].shape[0]}] of the "
            f"rows and float32[{columns}] of the columns"
        )
    if gate is not None and tuple(cuts) != ((0, pieces[0].shape[0]),):
        raise ValueError(f"cuts: {list(cuts)} is not accepted with a gate; accepted: None")
    if bound is not None and not bound > 0:
        raise ValueError(f"bound: {bound} must be above 0")

    if backend == "mosaic":
        from kernels_pallas.rows_fp8_mosaic import rows_to_fp8_mosaic

        spans = [(a, b - a) for a, b in cuts]
        return rows_to_fp8_mosaic(
            pieces, spans, scales, gate=gate, bound=bound, power_of_two=power_of_two,
            tuning=tuning or ROWS[DEFAULT_GPU], interpret=interpret,
        )  # fmt: skip

    rows = [x if (a, b) == (0, x.shape[0]) else x[a:b] for x, (a, b) in zip(pieces, cuts, strict=True)]
    x = rows[0] if len(rows) == 1 else jnp.concatenate(rows)
    if gate is not None and scales is not None:
        both = (x.astype(jnp.float32) * scales[0][:, None] * scales[1][None, :]).astype(x.dtype)
        x = gate(both[:, : columns // 2], both[:, columns // 2 :])
    return quantise_rows(x, 1, bound, power_of_two)
