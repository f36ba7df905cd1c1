"""Grouped GEMMs and the rows gathered for them, Mosaic: under the interpreter against float32, and compiled for
Hopper."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import gather_rows, grouped_gemm, grouped_gemm_mosaic
from kernels_pallas.gate import Gate
from kernels_pallas.group_tiles import TILE, list_tiles
from kernels_pallas.tuning import GROUPED, GroupedTuning
from tests.kernels.compiled import compiled_report, launched
from tests.tolerances import row_errors

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
SMALL = GroupedTuning(sms=2, block=128, stages=3)  # programs take more items than they have, and slots again
CLAMPED = Gate(1.702, 1.0, 1.0)
LIMIT = 6e-3  # of a row: two or three roundings to bfloat16


@pytest.fixture(autouse=True)
def _no_races(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert "RACE" not in capfd.readouterr().out


def inputs(rows: int, experts: int, inputs: int, columns: int, gate: Gate | None, bias: bool) -> list[Any]:
    rng, parts = np.random.default_rng(rows), () if gate is None else (2,)
    x = rng.standard_normal((rows, inputs))
    weight = rng.standard_normal((experts, *parts, columns, inputs)) * inputs**-0.5
    found = [x, weight, *([rng.standard_normal((experts, *parts, columns))] if bias else [])]
    return [jnp.asarray(value, jnp.bfloat16) for value in found]


def by_hand(x: Any, weight: Any, sizes: list[int], gate: Gate | None, bias: Any) -> np.ndarray:
    """float64, row by row."""
    x, weight = (np.asarray(value, np.float64) for value in (x, weight))
    rows = []
    for row, expert in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        both = weight[expert] @ x[row] + (0 if bias is None else np.asarray(bias, np.float64)[expert])
        if gate is None:
            rows.append(both)
            continue
        first, second = np.minimum(both[0], gate.limit), np.clip(both[1], -gate.limit, gate.limit)
        rows.append(first / (1 + np.exp(-gate.alpha * first)) * (second + gate.shift))
    return np.array(rows)


@pytest.mark.parametrize(
    ("rows", "k", "n", "sizes", "gate", "bias"),
    [
        (320, 128, 128, [8, 0, 136, 16, 0], None, False),  # a group over two tiles, none, some rows in no group
        (160, 128, 64, [0, 160, 0], Gate(), False),  # one has all
        (144, 192, 64, [136, 8], CLAMPED, True),
        (32, 64, 192, [8, 16, 0], None, True),  # fewer rows than a tile
        (136, 64, 64, [0, 0], None, False),
    ],
)
@pytest.mark.parametrize("backend", ["xla", "mosaic"])
def test_grouped_gemm(backend: str, rows: int, k: int, n: int, sizes: list[int], gate: Gate | None, bias: bool) -> None:
    x, weight, *more = inputs(rows, len(sizes), k, n, gate, bias)
    options: dict[str, Any] = {"tuning": SMALL, "interpret": INTERPRET} if backend == "mosaic" else {}
    call = partial(grouped_gemm, gate=gate, backend=backend, **options)
    biases = {"bias": more[0]} if bias else {}
    out = jax.jit(call)(x.at[sum(sizes) :].set(jnp.nan), weight, jnp.asarray(sizes, jnp.int32), **biases)
    want = by_hand(x, weight, sizes, gate, more[0] if bias else None)
    assert out.shape == (rows, n)
    if sum(sizes):
        assert row_errors(np.asarray(out, np.float32)[: sum(sizes)], want).max() < LIMIT


def test_a_row_does_not_depend_on_others() -> None:
    """Bit for bit: whoever shares its group, and wherever that begins."""
    x, weight = inputs(144, 3, 128, 64, Gate(), False)
    call: Any = jax.jit(partial(grouped_gemm, gate=Gate(), backend="mosaic", tuning=SMALL, interpret=INTERPRET))
    many = call(x, weight, jnp.array([8, 128, 8], jnp.int32))
    few = call(jnp.roll(x, -8, axis=0), weight, jnp.array([0, 16, 0], jnp.int32))
    np.testing.assert_array_equal(many[8:24], few[:16])


def test_tiles_that_store_rows_of_others_would_show(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The twin whose tiles answer for all of their rows: whoever stores last is right or wrong."""

    def whole_tiles(rows: int, sizes: jax.Array) -> jax.Array:
        tiles = list_tiles(rows, sizes)
        return tiles.at[:-1, 2].set(tiles[:-1, 1] + TILE)

    x, weight = inputs(256, 3, 128, 64, None, False)
    monkeypatch.setattr(grouped_gemm_mosaic, "list_tiles", whole_tiles)
    call = partial(grouped_gemm, backend="mosaic", tuning=GroupedTuning(sms=1), interpret=INTERPRET)
    jax.block_until_ready(jax.jit(call)(x, weight, jnp.array([8, 136, 16], jnp.int32)))
    assert "RACE" in capfd.readouterr().out


def test_tiles() -> None:
    """Of any groups: every row of one is in one tile, and there are no others."""
    tiles_of = jax.jit(list_tiles, static_argnums=0)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(0, 60, 12) * 8 * rng.integers(0, 2, 12)
        rows = -(-int(sizes.sum()) // 1024) * 1024 + 128  # of a few lengths: a program each
        tiles = np.asarray(tiles_of(rows, jnp.asarray(sizes, jnp.int32)))
        count = tiles[-1, 0]
        found = [(e, row) for e, first, end in tiles[:count] for row in range(first, min(end, first + TILE))]
        ends = np.cumsum(sizes)
        assert found == [(e, row) for e in range(12) for row in range(ends[e] - sizes[e], ends[e])]


def test_gather_rows() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((20, 192)), jnp.bfloat16)
    rows = jnp.asarray(rng.integers(0, 20, 64), jnp.int32)
    call = jax.jit(partial(gather_rows, backend="mosaic", tuning=SMALL, interpret=INTERPRET))
    want = np.asarray(x)[np.asarray(rows)]
    for used in (0, 8, 40, 64):
        np.testing.assert_array_equal(np.asarray(call(x, rows, jnp.int32(used)))[:used], want[:used])
    np.testing.assert_array_equal(gather_rows(x, rows, jnp.int32(40)), want)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weight": (2, 64, 64)}, r"weight: bfloat16 \[2, 64, 64\] must be bfloat16 \[E, N, 128\]"),
        ({"sizes": (2,)}, r"sizes: int32 \[2\] must be int32 \[3\]"),
        ({"bias": (3, 32)}, r"bias: \[3, 32\] must be \[3, 64\]"),
        ({"x": (12, 128)}, "x: 12 rows; backend 'mosaic' accepts multiples of 8"),
        ({"x": (16, 96), "weight": (3, 64, 96)}, "weight: 64 x 96; backend 'mosaic' accepts multiples of 64"),
    ],
)
def test_what_does_not_fit(change: dict[str, tuple[int, ...]], says: str) -> None:
    shapes = {"x": (16, 128), "weight": (3, 64, 128), "sizes": (3,), **change}
    arrays: dict[str, Any] = {n: jnp.zeros(s, jnp.int32 if n == "sizes" else jnp.bfloat16) for n, s in shapes.items()}
    with pytest.raises(ValueError, match=f"^{says}$"):
        grouped_gemm(**arrays, backend="mosaic", tuning=SMALL, interpret=INTERPRET)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("experts", "hidden", "size", "gate"), [(16, 4096, 1536, Gate()), (16, 2880, 2880, Gate(1.702, 7.0, 1.0))]
)
def test_compiles_for_hopper(
    experts: int, hidden: int, size: int, gate: Gate, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Qwen3-235B's experts and gpt-oss-120b's on one of eight GPUs: nothing spilled, no copy of a weight."""
    rows, bias = 16 * 1024 + experts * 8, gate.shift != 0
    shapes = [(rows, hidden), (experts, 2, size, hidden), (experts, hidden, size)]
    shapes += [(experts, 2, size), (experts, hidden)] if bias else []
    avals = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    options: dict[str, Any] = {"backend": "mosaic", "tuning": GROUPED["h200"]}

    def mlp(sizes: jax.Array, x: jax.Array, up: jax.Array, down: jax.Array, *biases: jax.Array) -> jax.Array:
        of_up, of_down = biases or (None, None)
        inner = grouped_gemm(x, up, sizes, bias=of_up, gate=gate, **options)
        return grouped_gemm(inner, down, sizes, bias=of_down, **options)

    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
    program, registers = compiled_report(mlp, [sizes, *avals], monkeypatch, capfd)
    assert [name for name in launched(program) if name != "fusion"] == ["grouped_gemm"] * 2
    assert len(registers) == 2
    assert "copy(" not in program.as_text() and "transpose(" not in program.as_text()
