"""decode_attention (Mosaic GPU) under the interpreter against its float32 definition, and compiled for Hopper."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import decode_attention, reference
from kernels_pallas.bench.cases import CASES, DecodeCase
from kernels_pallas.bench.kernels import Setting, programs
from kernels_pallas.decode_plan import UPCAST_SLOTS, make_plan
from kernels_pallas.targets import TARGETS, mosaic_supported
from kernels_pallas.tuning import BLOCK_LIMIT, DECODE, DecodeTuning, page_bytes
from nanoflow_jax.hardware import load_hardware
from tests.kernels.compiled import compiled, launched
from tests.kernels.paged import Paged, make_paged, random_queries
from tests.tolerances import TOLERANCES, assert_rows_close, row_errors

# Two programs take more items than they have, and slots of the pipeline are used again.
SMALL = DecodeTuning(sms=2, bytes_in_flight=128 * 1024, min_split_pages=1, max_split_pages=64)
SPLIT = replace(SMALL, max_split_pages=2)
RAGGED = (65, 0, 1, 64, 330, 63)


def arguments(q: jax.Array, paged: Paged) -> tuple[jax.Array, ...]:
    return q, paged.k_pages, paged.v_pages, jnp.asarray(paged.page_table), jnp.asarray(paged.lengths)


def interpreted(tuning: DecodeTuning, races: bool = True, **more: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
    params = plgpu.InterpretGPUParams(detect_races=races)
    return jax.jit(partial(decode_attention, backend="mosaic", tuning=tuning, interpret=params, **more))


def expected(args: tuple[jax.Array, ...], scale: float) -> tuple[np.ndarray, np.ndarray]:
    return reference.decode_attention(*args, scale=scale)


@pytest.fixture(autouse=True)
def _no_races(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("repeats", "kv_heads", "head_dim", "tuning"),
    [
        (8, 1, 128, SMALL),
        (4, 2, 128, SPLIT),
        (1, 2, 64, SMALL),
        (16, 1, 64, SPLIT),
        (3, 1, 64, SPLIT),
        (1, 1, 64, replace(SMALL, sms=1)),
        (16, 2, 128, replace(SMALL, step_pages=1)),
        (8, 2, 64, replace(SPLIT, step_pages=1, sms=3)),
    ],
)
def test_equals_definition(repeats: int, kv_heads: int, head_dim: int, tuning: DecodeTuning) -> None:
    """Head layouts (blocks filled, shared, padded, cut off by the last row) x head sizes x splits x steps of one and
    two pages, over ragged lengths. Whatever a request does not own is NaN, and pages come in random order."""
    rng = np.random.default_rng(repeats * head_dim)
    paged = make_paged(rng, RAGGED, kv_heads=kv_heads, page_size=64, head_dim=head_dim, dtype="bfloat16")
    args = arguments(random_queries(rng, len(RAGGED), repeats * kv_heads, head_dim, "bfloat16"), paged)
    plan = make_plan(args[0], args[1], args[3], 1.0, tuning, None)
    assert (plan.splits > 1) == (tuning.max_split_pages == 2)
    out, lse = interpreted(tuning)(*args)
    want, want_lse = expected(args, head_dim**-0.5)
    assert out.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    assert_rows_close(out, want, "bfloat16")
    assert row_errors(out, want).max() < 5e-3  # two roundings to bf16, of the weights and of the result
    full = paged.lengths > 0
    np.testing.assert_allclose(np.asarray(lse)[full], want_lse[full], atol=1e-5, rtol=0)
    assert (np.asarray(lse)[~full] == -np.inf).all()
    assert (np.asarray(out)[~full].astype(np.float32) == 0).all()


def test_broken_twins_fail_and_neighbours_do_not_matter() -> None:
    """What these mistakes would give is far outside the tolerance; and a row among others' lengths is the same, bit for
    bit. One program for all, and one compilation."""
    rng = np.random.default_rng(7)
    paged = make_paged(rng, (170, 160, 190), kv_heads=1, page_size=64, head_dim=64, dtype="bfloat16")
    # So that an error shows as a wrong number, not as NaN.
    keys, values = jnp.nan_to_num(paged.k_pages), jnp.nan_to_num(paged.v_pages)
    table, lengths = jnp.asarray(paged.page_table), jnp.asarray(paged.lengths)
    q = random_queries(rng, 3, 4, 64, "bfloat16")
    run = interpreted(SPLIT, races=False, scale=0.125, sm_budget=1)
    want, _ = expected((q, keys, values, table, lengths), 0.125)
    right = np.asarray(run(q, keys, values, table, lengths)[0])
    assert_rows_close(right, want, "bfloat16")
    stale = paged.page_table.copy()
    stale[:, 1] = paged.page_table[[1, 2, 0], 1]  # a page that is another request's by now
    twins: dict[str, tuple[Any, ...]] = {
        "K for V": (q, keys, keys, table, lengths),
        "identity page table": (q, keys, values, jnp.arange(9, dtype=jnp.int32).reshape(3, 3), lengths),
        "last page dropped": (q, keys, values, table, (lengths - 1) // 64 * 64),
        "stale page": (q, keys, values, jnp.asarray(stale), lengths),
    }
    for name, args in twins.items():
        errors = row_errors(run(*args)[0], want)
        assert errors.max(axis=1).min() > TOLERANCES["bfloat16"], f"{name}: a row passes ({errors.max(axis=1)})"
    alone = run(q, keys, values, table, lengths * jnp.array([0, 1, 0], jnp.int32))[0]
    np.testing.assert_array_equal(np.asarray(alone)[1], right[1])
    # Four heads are half a block: row 0's are read for row 1 too.
    beside = run(q.at[0].set(jnp.nan), keys, values, table, lengths)[0]
    np.testing.assert_array_equal(np.asarray(beside)[1:], right[1:])
    beyond = run(q, keys, values, table, lengths + 1000)[0]  # than the page table: it ends there
    assert_rows_close(beyond, expected((q, keys, values, table, jnp.full(3, 192, jnp.int32)), 0.125)[0], "bfloat16")


def _bad(**changes: Any) -> dict[str, Any]:
    pages = jnp.zeros((5, 2, 64, 64), jnp.bfloat16)
    good: dict[str, Any] = {
        "q": jnp.zeros((3, 8, 64), jnp.bfloat16),
        "k_pages": pages,
        "v_pages": pages,
        "page_table": jnp.zeros((3, 2), jnp.int32),
        "lengths": jnp.zeros(3, jnp.int32),
        "backend": "mosaic",
    }
    return good | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "triton"}, "backend: 'triton' is not available; accepted: 'xla', 'mosaic'"),
        ({"q": jnp.zeros((3, 8, 64))}, "q: dtype float32; backend 'mosaic' accepts bfloat16"),
        ({"v_pages": jnp.zeros((5, 2, 64, 64))}, "v_pages: dtype float32; backend 'mosaic' accepts bfloat16"),
        ({"lengths": jnp.zeros(3)}, "lengths: dtype float32; backend 'mosaic' accepts int32"),
        ({"q": jnp.zeros((3, 34, 64), jnp.bfloat16)}, "q: 17 query heads per KV head; backend 'mosaic' accepts 1 to"),
        ({"sm_budget": 0}, "sm_budget: 0 must be at least 1"),
        ({"backend": "xla", "sm_budget": 8}, "sm_budget: 8 is not accepted with backend 'xla'"),
        ({"backend": "xla", "tuning": SMALL}, "tuning: DecodeTuning("),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        decode_attention(**_bad(**changes))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("page", "head", "message"),
    [
        (32, 64, "k_pages, v_pages: page size 32; backend"),
        (64, 96, "q: head size 96; backend 'mosaic' accepts 64, 128"),
    ],
)
def test_shapes_it_does_not_have(page: int, head: int, message: str) -> None:
    pages = jnp.zeros((5, 2, page, head), jnp.bfloat16)
    with pytest.raises(ValueError, match=re.escape(message)):
        decode_attention(**_bad(q=jnp.zeros((3, 8, head), jnp.bfloat16), k_pages=pages, v_pages=pages))


def test_targets() -> None:
    """Hopper alone; a GPU older than that must not even be tried."""
    assert {t.gpus: mosaic_supported((t.major, 0)) for t in TARGETS} == {
        ("A100",): False,
        ("H100", "H200"): True,
        ("B200",): False,
    }
    assert not mosaic_supported((8, 9))
    assert mosaic_supported((9, 0), "prefill_attention")


@pytest.mark.parametrize("capability", ["8.0", "10.0"])
def test_an_older_gpu_is_refused_before_lowering(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    with pytest.raises(ValueError, match=f"backend: 'mosaic' is not available on compute capability {capability}"):
        decode_attention(**_bad())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sms": 0}, "sms: 0"),
        ({"step_pages": 3}, "step_pages: 3"),
        ({"bytes_in_flight": 32 * 1024}, "bytes_in_flight: 32768"),
        ({"bytes_in_flight": BLOCK_LIMIT}, "bytes_in_flight: 232448"),
        ({"max_split_pages": 2}, "max_split_pages: 2"),
    ],
)
def test_tuning_is_validated(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(DECODE["h200"], **changes)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("gpu", "case"),
    [
        ("h200", "70b-1280x1k"),
        ("h200", "8b-32x4k"),
        ("h200", "70b-1x32k"),
        ("h100_sxm", "70b-1280x1k"),
        ("h200", "8b-1x32k"),
        ("h200", "70b-1280x1k-fp8"),
        ("h200", "8b-32x4k-fp8"),
        ("h100_sxm", "70b-1x32k-fp8"),
    ],
)
def test_compiles_for_hopper(
    gpu: str, case: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The benchmark's own calls, in a shard_map over compile-only GPUs: the kernels are in, alone, in registers, and
    fit."""
    for name in ("PTXAS", "RESOURCES"):
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{name}", "1")
    hardware = load_hardware(gpu)
    key = gpu.split("_", maxsplit=1)[0]
    tuning = DECODE[key]
    assert hardware.sm_count == tuning.sms
    assert mosaic_supported(hardware.capability)
    shape = CASES[f"decode_attention/{case}"]
    assert isinstance(shape, DecodeCase)
    ((attend, avals),) = programs(shape, Setting(gpu=key)).values()
    # A pool of another size for every case: a kernel compiled before would be taken from a cache, without a report.
    avals = [*avals[:1], *shape.avals(shape.pages + len(gpu))[1:]]
    program = compiled(gpu, attend, avals)
    # fp8 needs its two scales in one array; a row on its own is split. Nothing pads, cuts or turns anything.
    joins = ["decode_combine"] * (shape.rows == 1)
    assert launched(program) == ["fusion"] * shape.fp8 + ["decode_attention", *joins]
    report = "".join(capfd.readouterr())
    kernels = 1 + len(joins)
    assert report.count("for 'sm_90a'") == kernels
    assert (
        re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        == [("0", "0", "0")] * kernels
    )
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert registers[0] <= 65536 // (384 if shape.fp8 else 256)
    assert max(registers[1:], default=0) <= 128  # four programs at least on an SM
    shared = int(re.findall(r"smem_scratch_bytes=(\d+)", report)[0])
    wide = UPCAST_SLOTS * tuning.step_pages * 64 * 128 * 2 if shape.fp8 else 0
    item = shape.dtype.itemsize
    flight = tuning.stages(128, item, wide) * tuning.step_pages * page_bytes(128, item)
    assert flight + wide <= shared <= BLOCK_LIMIT - 1024  # and the barriers
    assert flight >= 64 * 1024
