"""rows_to_fp8: the XLA path and the Mosaic kernel (under the interpreter, and compiled for Hopper) against what they
mean, in NumPy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import rows_to_fp8
from kernels_pallas.expected import LATENCY
from kernels_pallas.gate import Gate
from kernels_pallas.rows_fp8_mosaic import make_plan
from kernels_pallas.targets import mosaic_supported
from kernels_pallas.tuning import BLOCK_LIMIT, ROWS, RowsTuning
from nanoflow_jax.hardware import load_hardware
from tests.kernels.compiled import compiled
from tests.tolerances import row_errors

# Two programs of two warpgroups: slots of shared memory are used again, and so are maxima.
SMALL = RowsTuning(sms=2, max_group=3, max_warpgroups=2, max_stages=2)
ROUNDING = 0.03  # of a row's norm: three bits of mantissa
GATE = Gate()


@cache  # a program for all of the tests that run it
def interpreted(tuning: RowsTuning = SMALL, **more: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
    params = plgpu.InterpretGPUParams(detect_races=True)
    return jax.jit(partial(rows_to_fp8, backend="mosaic", tuning=tuning, interpret=params, **more))


@pytest.fixture(autouse=True)
def _no_races(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert "RACE" not in capfd.readouterr().out


def rows_of(rows: int, columns: int, seed: int = 0) -> jax.Array:
    """Rows differ in size, so that each needs a scale of its own."""
    x = np.random.default_rng(seed).standard_normal((rows, columns)) * (1 + np.arange(rows))[:, None]
    return jnp.asarray(x, jnp.bfloat16)


def product(rows: int, columns: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """What a GEMM gave, and the scales of its rows and columns, each different."""
    rng = np.random.default_rng(columns)
    scales = 0.5 + 4 * rng.random(rows), 0.2 + rng.random(2 * columns)
    x = jnp.asarray(rng.standard_normal((rows, 2 * columns)), jnp.bfloat16)
    return x, (jnp.asarray(scales[0], jnp.float32), jnp.asarray(scales[1], jnp.float32))


def gated(x: jax.Array, scales: tuple[jax.Array, jax.Array]) -> np.ndarray:
    """The definition, in float64."""
    both = np.asarray(x, np.float64) * np.asarray(scales[0])[:, None] * np.asarray(scales[1])[None, :]
    gate, up = np.split(both, 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def in_wide(found: Any) -> np.ndarray:
    values, scales = (np.asarray(a, np.float32) for a in found)
    return values * scales[:, None]


def same(a: Any, b: Any) -> bool:
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(a, b, strict=True))


def check_rows(found: Any, want: np.ndarray, power_of_two: bool = False) -> None:
    """Rounded once, over the scale that the largest of a row has, or the next power of two."""
    assert found[0].dtype == jnp.float8_e4m3fn and found[1].dtype == jnp.float32
    assert row_errors(in_wide(found), want.astype(np.float32)).max() < ROUNDING
    if power_of_two:
        assert same((found[1],), (2.0 ** np.ceil(np.log2(np.abs(want).max(axis=1) / 448)).astype(np.float32),))
        return
    assert (np.abs(np.asarray(found[0], np.float32)).max(axis=1) == 448).all()
    np.testing.assert_allclose(np.asarray(found[1]), np.abs(want).max(axis=1) / 448, rtol=2**-7)


@pytest.mark.parametrize(
    ("rows", "columns", "tuning", "options"),
    [
        (13, 1536, SMALL, {}),  # three chunks for two warpgroups, 4 elements per thread
        (7, 128, SMALL, {"bound": 1.5}),  # one chunk, 1 element
        (5, 768, replace(SMALL, sms=1, max_group=2), {"power_of_two": True}),  # 2 elements, groups that share a row
        (1, 512, ROWS["h200"], {}),
    ],
)
def test_equals_definition(rows: int, columns: int, tuning: RowsTuning, options: dict[str, Any]) -> None:
    """Of rows as they are, bit for bit what XLA makes; and of a gate's inputs."""
    x, bound = rows_of(rows, columns), options.get("bound", np.inf)
    found = interpreted(tuning, **options)(x)
    assert same(found, jax.jit(partial(rows_to_fp8, **options))(x))
    power = options.get("power_of_two", False)
    check_rows(found, np.clip(np.asarray(x, np.float32), -bound, bound), power)
    given, scales = product(rows, columns)
    want = np.clip(gated(given, scales), -bound, bound)
    for run in (interpreted(tuning, gate=GATE, **options), jax.jit(partial(rows_to_fp8, gate=GATE, **options))):
        check_rows(run(given, scales=scales), want, power)


def test_rows_of_pieces() -> None:
    """Those that count of each, one after another; a piece may have none of them."""
    pieces = rows_of(9, 640), rows_of(6, 640, 1), rows_of(4, 640, 2)
    cuts = (2, 9), (3, 3), (0, 4)
    found = interpreted(cuts=cuts)(*pieces)
    whole = jnp.concatenate([x[a:b] for x, (a, b) in zip(pieces, cuts, strict=True)])
    assert same(found, rows_to_fp8(*pieces, cuts=cuts)) and same(found, rows_to_fp8(whole))
    assert not same(found, rows_to_fp8(*pieces, cuts=((1, 8), (3, 3), (0, 4))))
    assert [a.shape for a in interpreted(cuts=((1, 1),))(pieces[0])] == [(0, 640), (0,)]


def test_rows_of_zeros() -> None:
    zeros = jnp.zeros((3, 1024), jnp.bfloat16)
    one = jnp.ones(3, jnp.float32), jnp.ones(1024, jnp.float32)
    for found in (interpreted()(zeros), interpreted(gate=GATE)(zeros, scales=one), rows_to_fp8(zeros)):
        assert not np.asarray(found[0], np.float32).any() and (np.asarray(found[1]) == 2.0**-40).all()


def test_a_row_depends_neither_on_its_place_nor_on_the_others() -> None:
    given, (token, channel) = product(13, 1024)
    run = interpreted(gate=GATE)  # one program or two, groups of three
    whole = run(given, scales=(token, channel))
    order = np.random.default_rng(0).permutation(13)[:8]
    some = run(given[order], scales=(token[order], channel))
    alone = interpreted(replace(SMALL, max_group=1, max_warpgroups=1), gate=GATE)(given, scales=(token, channel))
    assert same(some, [a[order] for a in whole]) and same(alone, whole)


def test_broken_twins_fail() -> None:
    given, (token, channel) = product(7, 1024)
    want = gated(given, (token, channel))
    run = interpreted(gate=GATE)

    def errors(found: Any) -> np.ndarray:
        return row_errors(in_wide(found), want.astype(np.float32))

    right = run(given, scales=(token, channel))
    assert errors(right).max() < ROUNDING
    twins = {
        "tokens of other rows": run(given, scales=(jnp.roll(token, 1), channel)),
        "channels not applied": run(given, scales=(token, jnp.ones_like(channel))),
        "channels of up for gate": run(given, scales=(token, jnp.roll(channel, 1024))),
        "up for gate": run(jnp.roll(given, 1024, axis=1), scales=(token, channel)),
        "another gate": interpreted(gate=Gate(alpha=1.702))(given, scales=(token, channel)),
        "scales of other rows": (right[0], jnp.roll(right[1], 1)),
    }
    for name, found in twins.items():
        assert errors(found).min() > ROUNDING, name
    skipped = errors((right[0].at[6].set(right[0][5]), right[1]))
    assert np.flatnonzero(skipped > ROUNDING).tolist() == [6]


GOOD: dict[str, Any] = {"pieces": [rows_of(4, 256)], "backend": "mosaic"}
SCALES = jnp.ones(4), jnp.ones(256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "triton"}, "backend: 'triton' is not available; accepted: 'xla', 'mosaic'"),
        ({"backend": "xla", "tuning": SMALL}, "tuning: RowsTuning("),
        ({"pieces": []}, "pieces: shapes [] must be [n, K]"),
        ({"pieces": [jnp.zeros((2, 3)), jnp.zeros((2, 4))]}, "pieces: shapes [(2, 3), (2, 4)] must be [n, K]"),
        ({"cuts": [(0, 5)]}, "cuts: [(0, 5)] must be a (start, stop) within each of [4] rows"),
        ({"cuts": [(0, 1), (0, 1)]}, "cuts: [(0, 1), (0, 1)] must be"),
        ({"gate": GATE}, "gate: goes with scales"),
        ({"scales": SCALES}, "gate: goes with scales"),
        ({"gate": GATE, "scales": SCALES[::-1]}, "scales: ['float32[256]', 'float32[4]'] must be float32[4] of the"),
        ({"gate": GATE, "scales": SCALES, "cuts": [(0, 3)]}, "cuts: [(0, 3)] is not accepted with a gate"),
        ({"bound": 0.0}, "bound: 0.0 must be above 0"),
        ({"pieces": [jnp.zeros((4, 256))]}, "x: dtype float32; backend 'mosaic' accepts bfloat16"),
        ({"pieces": [rows_of(4, 192)]}, "x: rows of 192 in the result; backend 'mosaic' accepts multiples of 128"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], message: str) -> None:
    options = {**GOOD, **changes}
    with pytest.raises(ValueError) as caught:
        rows_to_fp8(*options.pop("pieces"), **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sms": 0}, "sms: 0"),
        ({"max_group": 9}, "max_group: 9"),
        ({"max_warpgroups": 5}, "max_warpgroups: 5"),
        ({"max_stages": 1}, "max_stages: 1"),
        ({"max_stages": 9}, "max_stages: 9"),
    ],
)
def test_tuning_is_validated(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ROWS["h200"], **changes)


def test_groups() -> None:
    """Few SMs more would not help: as many rows as the busiest program must take; of those the largest that fit."""
    tuning = ROWS["h200"]

    def group(rows: int, columns: int, gate: Gate | None = GATE) -> tuple[int, int, int]:
        plan = make_plan(columns, [(0, rows)], gate, None, False, tuning)
        return plan.group, plan.stages, plan.programs

    assert group(2048, 28_672) == (2, 3, 132)  # 16 rows of one program, whether one or two at a time; three do not fit
    assert group(240, 28_672) == (2, 3, 120)
    assert group(100, 28_672)[::2] == (1, 100)
    assert group(1024, 3584)[0] == 4
    assert make_plan(8192, [(0, 1280), (0, 3)], None, None, False, tuning).group <= 3  # no piece is shorter
    assert make_plan(65_536, [(0, 8)], GATE, None, False, tuning).stages >= 2


def rows_at_once(report: str) -> int:
    """Of the compiled kernel: it stores one scale of each."""
    wide = re.findall(r"st\.global(?:\.v(\d))?\.b32", report)
    return sum(int(width or 1) for width in wide)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("gpu", "rows", "columns", "gate", "power_of_two"),
    [
        ("h200", (2048,), 28_672, GATE, False),
        ("h100_sxm", (1664,), 14_336, GATE, False),
        ("h200", (1024,), 3584, GATE, False),
        ("h200", (1280, 768), 8192, None, False),
        ("h100_sxm", (1024,), 1024, None, True),
        ("h200", (64,), 65_536, GATE, False),
    ],
)
def test_compiles_for_hopper(
    gpu: str, rows: tuple[int, ...], columns: int, gate: Gate | None, power_of_two: bool,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One kernel and nothing else in the program: nobody joins the pieces, nobody else reads a row for its largest.
    Registers alone, and the expected time said."""
    for name in ("PTX", "PTXAS", "RESOURCES"):
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{name}", "1")
    hardware, tuning = load_hardware(gpu), ROWS[gpu.split("_", maxsplit=1)[0]]
    assert hardware.sm_count == tuning.sms and mosaic_supported(hardware.capability, "rows_to_fp8")
    n, halves = sum(rows), 1 if gate is None else 2
    avals = [jax.ShapeDtypeStruct((count, halves * columns), jnp.bfloat16) for count in rows]
    avals += [jax.ShapeDtypeStruct((size,), jnp.float32) for size in ((n, 2 * columns) if gate else ())]

    def call(*args: Any) -> Any:
        pieces, scales = args[: len(rows)], args[len(rows) :]
        return rows_to_fp8(
            *pieces, gate=gate, scales=scales or None, power_of_two=power_of_two, backend="mosaic", tuning=tuning
        )

    text, report = compiled(gpu, call, avals).as_text() or "", "".join(capfd.readouterr())
    assert text.count('custom_call_target="mosaic_gpu') == 1
    assert not re.search(r" (copy|copy-start|fusion|transpose|dynamic-slice|reduce|concatenate)\(", text)
    assert "for 'sm_90a'" in report
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report) == [
        ("0", "0", "0")
    ]
    assert max(int(used) for used in re.findall(r"Used (\d+) registers", report)) <= 128  # of 512 threads
    (shared,) = (int(n) for n in re.findall(r"smem_scratch_bytes=(\d+)", report))
    assert shared <= BLOCK_LIMIT - 1024  # and the barriers
    # A sigmoid is one 2^x and one reciprocal of each element: what is exact to the last bit takes longer than memory.
    assert report.count("ex2.approx") == (0 if gate is None else 4 * rows_at_once(report))
    assert "fma.rm" not in report
    assert tuning.expected is not None
    us = tuning.expected.us(moved=(2 * halves + 1) * n * columns, sms=min(132, n), all_sms=132)
    assert set(re.findall(rf'{LATENCY}="(\d+)"', text)) == {str(round(us * 1000))}
