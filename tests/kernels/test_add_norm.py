"""add_rms_norm: the XLA path and the Mosaic kernel (under the interpreter, and compiled for Hopper) against the float32
definition."""

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
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import add_rms_norm, reference
from kernels_pallas.add_norm_mosaic import make_plan
from kernels_pallas.expected import LATENCY
from kernels_pallas.rows_fp8 import quantise_rows
from kernels_pallas.targets import mosaic_supported
from kernels_pallas.tuning import ADD_NORM, BLOCK_LIMIT, AddNormTuning
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.inspect.gpu_target import gpu_mesh
from nanoflow_jax.models.parts import rms_norm
from tests.tolerances import TOLERANCES, assert_rows_close, row_errors

EPS = 1e-5
ROWS = 3  # of the stack of weights
# Two programs of two warpgroups: with 13 rows and more, slots of shared memory are used again.
SMALL = AddNormTuning(sms=2, max_warpgroups=2, max_stages=3)

Call = Callable[..., tuple[jax.Array, jax.Array]]


def arguments(rows: int, row_size: int, parts: int | None = None, dtype: str = "bfloat16") -> tuple[jax.Array, ...]:
    """x, update (gathered columns of `parts` devices, or whole rows), the weights [3, H], bias. Rows differ in size, so
    that each needs statistics of its own."""
    rng = np.random.default_rng(rows + row_size)
    x, update = rng.standard_normal((2, rows, row_size)) * (1 + np.arange(rows))[:, None]
    weight, bias = 1 + 0.3 * rng.standard_normal((ROWS, row_size)), 3 * rng.standard_normal(row_size)
    if parts is not None:
        update = update.reshape(rows, parts, -1).swapaxes(0, 1)
    x, update, weight, bias = (jnp.asarray(a, dtype) for a in (x, update, weight, bias))
    return x, update, weight, bias


@cache  # a program for all of the tests that run it
def interpreted(tuning: AddNormTuning = SMALL, **more: Any) -> Call:
    params = plgpu.InterpretGPUParams(detect_races=True)
    return jax.jit(partial(add_rms_norm, eps=EPS, backend="mosaic", tuning=tuning, interpret=params, **more))


def same(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(autouse=True)
def _no_races(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parts", [None, 4])
def test_xla_path(dtype: str, parts: int | None) -> None:
    """Compiled, against the definition, with and without a bias; the norm is bit for bit that of the model."""
    x, update, weight, given = arguments(5, 96, parts, dtype)
    for bias in (None, given):
        total, normed = jax.jit(partial(add_rms_norm, weight_row=1, eps=EPS))(x, update, weight, bias=bias)
        want_total, want = reference.add_rms_norm(x, update, weight[1], bias=bias, eps=EPS)
        assert same(total, want_total)
        assert_rows_close(normed, want, dtype)
        total, normed = add_rms_norm(x, update, weight[1], bias=bias, eps=EPS)
        assert same(normed, rms_norm(total, weight[1], EPS))


@pytest.mark.parametrize(
    ("rows", "row_size", "parts", "biased", "tuning"),
    [
        (13, 1024, 4, True, SMALL),  # 8 sections of one chunk, 1 element per thread
        (1, 2048, 8, False, ADD_NORM["h200"]),  # 2 elements
        (14, 4096, None, False, replace(SMALL, max_stages=2)),  # 4 elements
        (3, 8192, 8, True, SMALL),  # sections of two chunks
        (5, 384, 1, True, replace(SMALL, sms=1)),  # one section
        (6, 2560, 2, False, SMALL),  # 4 sections of five chunks
    ],
)
def test_equals_definition(rows: int, row_size: int, parts: int | None, biased: bool, tuning: AddNormTuning) -> None:
    x, update, weight, bias = arguments(rows, row_size, parts)
    more = {"bias": bias} if biased else {}
    total, normed = interpreted(tuning, weight_row=2)(x, update, weight, **more)
    want_total, want = reference.add_rms_norm(x, update, weight[2], eps=EPS, **more)
    assert normed.dtype == jnp.bfloat16
    assert_rows_close(normed, want, "bfloat16")
    assert same(total, want_total)
    assert same(total, jax.jit(partial(add_rms_norm, eps=EPS))(x, update, weight, **more)[0])


def in_wide(rows: Any) -> np.ndarray:
    values, scales = (np.asarray(a, np.float32) for a in rows)
    return values * scales[:, None]


FP8_ROUNDING = 0.03  # of a row's norm: three bits of mantissa


@pytest.mark.parametrize(
    ("rows", "row_size", "parts", "biased", "tuning"),
    [
        (13, 1024, 4, True, SMALL),  # 1 element per thread
        (14, 4096, None, False, replace(SMALL, max_stages=2)),
        (3, 8192, 8, True, SMALL),  # a bias, and rows in fp8: one warpgroup
    ],
)
def test_rows_in_fp8(rows: int, row_size: int, parts: int | None, biased: bool, tuning: AddNormTuning) -> None:
    """What the same rows are in bfloat16, rounded, with a bound and without; the sums are untouched."""
    x, update, weight, bias = arguments(rows, row_size, parts)
    more: dict[str, Any] = {"bias": bias} if biased else {}
    total, normed = interpreted(tuning, weight_row=2)(x, update, weight, **more)
    whole, cut = np.asarray(normed, np.float32), np.clip(np.asarray(normed, np.float32), -1.5, 1.5)
    fp8 = interpreted(tuning, weight_row=2, quantise=True)
    bounded = interpreted(tuning, weight_row=2, quantise=True, bound=1.5)
    by_xla = partial(add_rms_norm, eps=EPS, weight_row=2, quantise=True)
    runs = ((fp8, whole), (by_xla, whole), (bounded, cut), (partial(by_xla, bound=1.5), cut))
    for run, want in runs:
        again, found = run(x, update, weight, **more)
        assert same(again, total)
        assert found[0].dtype == jnp.float8_e4m3fn and found[1].dtype == jnp.float32
        assert row_errors(in_wide(found), want).max() < FP8_ROUNDING
        # The largest of a row is 448, and less than a step of bfloat16 off as a number.
        most = np.abs(np.asarray(found[0], np.float32)).max(axis=1)
        assert (most == 448).all()
        np.testing.assert_allclose(np.abs(in_wide(found)).max(axis=1), np.abs(want).max(axis=1), rtol=2**-7)
    values, scales = (np.asarray(a) for a in fp8(x, update, weight, **more)[1])
    moved = row_errors(in_wide((values, np.roll(scales, 1))), whole)
    other = row_errors(in_wide(fp8(x, update, np.roll(weight, 1, axis=0), **more)[1]), whole)
    per_step = row_errors(in_wide((np.concatenate([values[:-1], values[-2:-1]]), scales)), whole)
    unbounded = row_errors(in_wide((values, scales)), cut)
    assert min(unbounded.min(), other.min(), per_step[-1]) > 3 * FP8_ROUNDING and moved.max() > FP8_ROUNDING


def test_scales_of_the_update() -> None:
    """As if the update had been multiplied and rounded before, bit for bit; each of the scales counts."""
    x, update, weight, bias = arguments(13, 1024)
    rng = np.random.default_rng(1)
    token, channel = (jnp.asarray(0.3 + rng.random(size), jnp.float32) for size in (13, 1024))
    before = (update.astype(jnp.float32) * token[:, None] * channel[None, :]).astype(jnp.bfloat16)
    for run in (interpreted(), interpreted(quantise=True)):
        found, want = run(x, update, weight, bias=bias, scales=(token, channel)), run(x, before, weight, bias=bias)
        assert all(same(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True))
    by_xla = add_rms_norm(x, update, weight, bias=bias, scales=(token, channel), eps=EPS)
    assert same(by_xla[0], found[0])
    for twin in ((jnp.roll(token, 1), channel), (token, jnp.roll(channel, 1))):
        other = run(x, update, weight, bias=bias, scales=twin)[0]
        assert (np.asarray(other != found[0]).mean(axis=1) > 0.5).all()


def test_rows_of_zeros_in_fp8() -> None:
    zeros = jnp.zeros((3, 1024), jnp.bfloat16)
    for run in (interpreted(quantise=True), partial(add_rms_norm, eps=EPS, quantise=True)):
        _, (values, scales) = run(zeros, zeros, jnp.ones(1024, jnp.bfloat16))
        assert not np.asarray(values, np.float32).any() and (np.asarray(scales) == 2.0**-40).all()
    values, scales = quantise_rows(jnp.zeros((2, 4)), 1)
    assert not np.asarray(values, np.float32).any() and (np.asarray(scales) == 2.0**-40).all()


def test_every_sum_is_rounded_and_the_norm_is_that_of_the_rounded_sum() -> None:
    """256 + 1 is 256 in bfloat16, and so once more: the norm is 1 to the bit. Of 257 or 258 it would be less.

    What XLA compiles for a CPU, interpreted kernels too, keeps a sum's excess precision for what is fused with it, so
    its norm shows nothing. That the kernel adds in bfloat16 is asserted of its compiled code, below."""
    x, one = jnp.full((2, 1024), 256, jnp.bfloat16), jnp.ones((2, 1024), jnp.bfloat16)
    for bias in (None, one[0]):
        assert same(interpreted()(x, one, one[0], bias=bias)[0], x)
        for run in (add_rms_norm, reference.add_rms_norm):
            total, normed = run(x, one, one[0], bias=bias, eps=EPS)
            assert same(total, x)
            assert same(normed.astype(jnp.bfloat16), one)


def test_a_row_does_not_depend_on_its_place_on_the_others_or_on_the_form_of_the_update() -> None:
    x, update, weight, bias = arguments(13, 1024)
    run = partial(interpreted(), bias=bias)
    whole = run(x, update, weight)
    order = np.random.default_rng(0).permutation(13)[:7]
    some = run(x[order], update[order], weight)
    gathered = run(x, update.reshape(13, 4, -1).swapaxes(0, 1), weight)
    for all_rows, fewer, other_form in zip(whole, some, gathered, strict=True):
        assert same(fewer, all_rows[order])
        assert same(other_form, all_rows)


def test_eps_counts() -> None:
    x, update, weight, _ = arguments(2, 512)
    args = x * jnp.bfloat16(1e-3), update * jnp.bfloat16(1e-3), weight
    _, normed = interpreted()(*args)
    assert_rows_close(normed, reference.add_rms_norm(*args[:2], weight[0], eps=EPS)[1], "bfloat16")
    assert row_errors(normed, reference.add_rms_norm(*args[:2], weight[0], eps=0.0)[1]).min() > TOLERANCES["bfloat16"]


def test_broken_twins_fail() -> None:
    x, update, weight, bias = arguments(7, 1024, 4)
    want_total, want = reference.add_rms_norm(x, update, weight[1], bias=bias, eps=EPS)
    run = interpreted(weight_row=1)
    right = run(x, update, weight, bias=bias)
    assert same(right[0], want_total)
    sums = {
        "no bias": run(x, update, weight, bias=jnp.zeros_like(bias)),
        "columns in another order": run(x, update[::-1], weight, bias=bias),
        "rows and devices exchanged": run(x, update.reshape(7, 4, -1).swapaxes(0, 1), weight, bias=bias),
        "no update": run(x, jnp.zeros_like(update), weight, bias=bias),
    }
    for name, (total, normed) in sums.items():
        errors = row_errors(normed, want)
        assert errors.min() > TOLERANCES["bfloat16"], f"{name}: a row passes ({errors})"
        assert not same(total, want_total), name
    _, normed = run(x, update, jnp.roll(weight, 1, axis=0), bias=bias)
    assert row_errors(normed, want).min() > TOLERANCES["bfloat16"], "the row of the weights"
    skipped = row_errors(right[1].at[6].set(right[1][5]), want)
    assert np.flatnonzero(skipped > TOLERANCES["bfloat16"]).tolist() == [6]


def test_no_rows() -> None:
    x, update, weight, _ = arguments(0, 1024)
    for run in (interpreted(), partial(add_rms_norm, eps=EPS)):
        assert [a.shape for a in run(x, update, weight)] == [(0, 1024)] * 2
    _, (values, scales) = interpreted(quantise=True)(x, update, weight)
    assert values.shape == (0, 1024) and scales.shape == (0,) and values.dtype == jnp.float8_e4m3fn


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "triton"}, "backend: 'triton' is not available; accepted: 'xla', 'mosaic'"),
        ({"x": jnp.zeros(4)}, "x: shape (4,) must be [n, H]"),
        ({"update": jnp.zeros((3, 512))}, "update: shape (3, 512) must be [3, 1024] or [p, 3, 1024 / p]"),
        ({"update": jnp.zeros((3, 4, 256))}, "update: shape (3, 4, 256) must be"),
        ({"weight": jnp.zeros((2, 512))}, "weight: shape (2, 512) must be [1024] or [R, 1024]"),
        ({"weight_row": 3}, "weight_row: 3 must be in [0, 3)"),
        ({"weight_row": -1}, "weight_row: -1 must be in [0, 3)"),
        ({"bias": jnp.zeros(3)}, "bias: shape (3,) must be [1024]"),
        ({"x": jnp.zeros((3, 1024))}, "x: dtype float32; backend 'mosaic' accepts bfloat16"),
        ({"update": jnp.zeros((3, 1024))}, "update: dtype float32; backend 'mosaic' accepts bfloat16"),
        ({"bias": jnp.zeros(1024)}, "bias: dtype float32; backend 'mosaic' accepts bfloat16"),
        ({"update": jnp.zeros((16, 3, 64), jnp.bfloat16)}, "update: columns from 16 devices; backend 'mosaic' accepts"),
        ({"backend": "xla", "tuning": SMALL}, "tuning: AddNormTuning("),
        ({"bound": 2.0}, "bound: 2.0 is not accepted; accepted: None, or with quantise=True a number above 0"),
        ({"quantise": True, "bound": 0.0}, "bound: 0.0 is not accepted"),
        ({"scales": (jnp.ones(1024), jnp.ones(3))}, "scales: ['float32[1024]', 'float32[3]'] must be float32[3] of"),
        (
            {"scales": (jnp.ones(3), jnp.ones(1024)), "update": jnp.zeros((4, 3, 256), jnp.bfloat16)},
            "scales: ['float32[3]', 'float32[1024]'] must be float32[3] of the rows and float32[1024] of the columns",
        ),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], message: str) -> None:
    good = dict(zip(("x", "update", "weight"), arguments(3, 1024), strict=False))
    with pytest.raises(ValueError) as caught:
        add_rms_norm(**{**good, "eps": EPS, "backend": "mosaic", **changes})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("row_size", [96, 192, 16_512])
def test_row_sizes_it_does_not_have(row_size: int) -> None:
    x, update, weight, _ = arguments(3, row_size)
    with pytest.raises(ValueError, match=f"^x: rows of {row_size}; backend 'mosaic' accepts multiples of 128 from 128"):
        add_rms_norm(x, update, weight, eps=EPS, backend="mosaic")


def test_an_older_gpu_is_refused_before_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        compute_capability = "8.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    x, update, weight, _ = arguments(3, 1024)
    with pytest.raises(ValueError, match=r"backend: 'mosaic' is not available on compute capability 8\.0"):
        add_rms_norm(x, update, weight, eps=EPS, backend="mosaic")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sms": 0}, "sms: 0"),
        ({"max_warpgroups": 9}, "max_warpgroups: 9"),
        ({"max_stages": 1}, "max_stages: 1"),
        ({"max_stages": 9}, "max_stages: 9"),
        ({"bytes_in_flight": 64 * 1024}, "bytes_in_flight: 65536"),
    ],
)
def test_tuning_is_validated(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ADD_NORM["h200"], **changes)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Compiles a call for a GPU that is not there: the program's text, and the report with the kernel's code."""
    for name in ("PTX", "PTXAS", "RESOURCES"):
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{name}", "1")

    def compiled(gpu: str, rows: int, row_size: int, parts: int | None, biased: bool, **more: Any) -> tuple[str, str]:
        tuning = ADD_NORM[gpu.split("_", maxsplit=1)[0]]
        # A stack of another size for every GPU: a kernel compiled before would be taken from a cache, without a report.
        scaled = more.pop("scaled", False)
        shapes: list[tuple[int, ...]] = [(rows, row_size), (rows, row_size), (50 + len(gpu) + scaled, 2, row_size)]
        shapes += [(row_size,)] * biased
        if parts is not None:
            shapes[1] = (parts, rows, row_size // parts)
        mesh = gpu_mesh(load_hardware(gpu), 1)
        placed = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=NamedSharding(mesh, P())) for s in shapes]

        placed += [
            jax.ShapeDtypeStruct((size,), jnp.float32, sharding=NamedSharding(mesh, P()))
            for size in ((rows, row_size) if scaled else ())
        ]

        def call(x: Any, update: Any, weight: Any, *rest: Any) -> Any:
            given = rest[0] if biased else None
            if scaled:
                more["scales"] = rest[biased:]
            weight = weight.reshape(-1, row_size)
            options = {"weight_row": 7, "eps": EPS, "backend": "mosaic", "tuning": tuning} | more
            return add_rms_norm(x, update, weight, bias=given, **options)

        sharded = jax.shard_map(call, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
        text = jax.jit(sharded).lower(*placed).compile().as_text() or ""
        return text, "".join(capfd.readouterr())

    return compiled


@pytest.mark.aot
@pytest.mark.parametrize(
    ("gpu", "rows", "row_size", "parts", "biased"),
    [
        ("h200", 640, 8192, 8, False),
        ("h200", 1408, 8192, None, False),
        ("h100_sxm", 1408, 8192, 8, True),
        ("h100_sxm", 2048, 4096, None, False),
        ("h200", 2048, 4096, 8, False),
        ("h200", 8, 2048, 8, True),
        ("h100_sxm", 8192, 16_384, None, True),
        ("h200", 256, 7168, 8, False),
    ],
)
def test_compiles_for_hopper(
    gpu: str, rows: int, row_size: int, parts: int | None, biased: bool, compiled: Callable[..., tuple[str, str]]
) -> None:
    """One kernel and nothing else in the program, the norms of all layers among its arguments: no slice, no copy, no
    transpose. Registers alone, sums in bfloat16, enough bytes in flight, and the expected time said."""
    hardware, tuning = load_hardware(gpu), ADD_NORM[gpu.split("_", maxsplit=1)[0]]
    assert hardware.sm_count == tuning.sms
    assert mosaic_supported(hardware.capability, "add_rms_norm")
    text, report = compiled(gpu, rows, row_size, parts, biased)
    assert text.count('custom_call_target="mosaic_gpu') == 1
    assert not re.search(r" (copy|copy-start|fusion|transpose|dynamic-slice)\(", text)
    assert tuning.expected is not None
    us = tuning.expected.us(moved=4 * 2 * rows * row_size, sms=132, all_sms=132)
    assert set(re.findall(rf'{LATENCY}="(\d+)"', text)) == {str(round(us * 1000))}
    assert "for 'sm_90a'" in report
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report) == [
        ("0", "0", "0")
    ]
    sums = sum(2 if pair else 1 for pair in re.findall(r"\tadd(?:\.rn)?\.bf16(x2)? ", report))
    assert sums == (1 + biased) * row_size // 128  # of a thread
    # The rounded sum is widened for its square and for its norm; x and update themselves never are.
    assert report.count("cvt.f32.bf16") == 2 * row_size // 128
    (shared,) = (int(n) for n in re.findall(r"smem_scratch_bytes=(\d+)", report))
    assert shared <= BLOCK_LIMIT - 1024  # and the barriers
    (slots,) = (int(n) for n in re.findall(r"num_barriers=(\d+)", report) if int(n) > 1)
    warpgroups = int(re.findall(r"\.maxntid (\d+)", report)[0]) // 128
    assert (slots - warpgroups) * 2 * 2 * row_size >= (64 * 1024 if rows > 132 else 5 * 2 * 2 * row_size)


@pytest.mark.aot
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("quantise", "scaled"), [(False, False), (True, False), (True, True)])
def test_shared_memory_is_enough_for_every_row(quantise: bool, scaled: bool, bias: bool) -> None:
    """Mosaic aligns each array to 1024 bytes, and refuses a program that then needs more than a block may have."""
    for row_size in range(128, (8192 if scaled else 16384) + 1, 128):
        for rows in (1, 384, 2048):
            x: Any = jax.ShapeDtypeStruct((rows, row_size), jnp.bfloat16)
            plan = make_plan(x, x, x if bias else None, 0, EPS, ADD_NORM["h200"], quantise, None, scaled)
            slots, of_row = plan.warpgroups * plan.stages, 2 * row_size
            sizes = [slots * of_row] * 2 + [(1 + bias) * of_row, 16 * plan.warpgroups]
            sizes += [plan.warpgroups * row_size, 16 * plan.warpgroups] * quantise + [4 * row_size] * scaled
            barriers = 8 * (slots + 2 + plan.warpgroups)
            assert plan.stages >= 2
            assert sum(-(-size // 1024) * 1024 for size in sizes) + barriers <= BLOCK_LIMIT, (row_size, rows)


@pytest.mark.parametrize(
    ("gpu", "rows", "row_size", "parts", "scaled"),
    [
        ("h200", 1024, 8192, None, False),
        ("h100_sxm", 1408, 5120, 2, False),
        ("h200", 2048, 8192, None, True),
        ("h100_sxm", 512, 4096, None, True),
    ],
)
def test_compiles_in_fp8(
    gpu: str, rows: int, row_size: int, parts: int | None, scaled: bool, compiled: Callable[..., tuple[str, str]]
) -> None:
    """One kernel: nothing else reads the norm for its largest magnitude, and nothing else rounds it, or multiplies what
    an fp8 GEMM gave by its scales."""
    text, report = compiled(gpu, rows, row_size, parts, False, quantise=True, scaled=scaled)
    assert text.count('custom_call_target="mosaic_gpu') == 1
    assert not re.search(r" (copy|copy-start|fusion|transpose|dynamic-slice|reduce)\(", text)
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report) == [
        ("0", "0", "0")
    ]
    expected = ADD_NORM[gpu.split("_", maxsplit=1)[0]].expected
    assert expected is not None
    us = expected.us(moved=7 * rows * row_size, sms=132, all_sms=132)
    assert set(re.findall(rf'{LATENCY}="(\d+)"', text)) == {str(round(us * 1000))}
    (slots,) = (int(n) for n in re.findall(r"num_barriers=(\d+)", report) if int(n) > 1)
    warpgroups = int(re.findall(r"\.maxntid (\d+)", report)[0]) // 128
    assert slots // warpgroups >= (2 if scaled else 3)
    assert warpgroups == (2 if row_size == 8192 else 4) or not scaled
    (shared,) = (int(n) for n in re.findall(r"smem_scratch_bytes=(\d+)", report))
    assert shared <= BLOCK_LIMIT - 1024


@pytest.mark.aot
def test_the_arithmetic_is_the_row_sizes_alone(compiled: Callable[..., tuple[str, str]]) -> None:
    """The same operations in the same order for few rows and for many, whole and gathered, on either GPU: a row's bits
    depend on nothing else. The interpreter's sums are XLA's, so they cannot show it."""

    def arithmetic(*case: Any) -> list[str]:
        names = r"\t((?:add|mul|fma|rsqrt|cvt|shfl)\.[a-z0-9.]*(?:f32|bf16)[a-z0-9.]*|shfl\.sync\.bfly\S*) "
        return re.findall(names, compiled(*case)[1])

    first = arithmetic("h200", 8, 3072, None, False)
    assert first.count("shfl.sync.bfly.b32") == 5
    assert arithmetic("h200", 1000, 3072, 8, False) == first
    assert arithmetic("h100_sxm", 300, 3072, 2, False) == first
    assert arithmetic("h200", 1000, 2048, 8, False) != first
