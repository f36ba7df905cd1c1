"""append_kv (Mosaic GPU) under the interpreter against its definition, and compiled for Hopper: in place."""

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

from kernels_pallas import append_kv, decode_attention, reference
from kernels_pallas.targets import mosaic_supported
from kernels_pallas.tuning import APPEND, BLOCK_LIMIT, AppendTuning
from nanoflow_jax.hardware import load_hardware
from tests.kernels.compiled import compiled, launched

PAGES, PAGE_SIZE = 6, 8
# Two programs with several blocks each: slots of the pipeline are used again, and the last block is moved back.
SMALL = AppendTuning(sms=2, block_bytes=1024, stages=2)

Args = tuple[jax.Array, ...]


def arguments(rows: int, heads: int, dim: int, dtype: str = "bfloat16", padding: tuple[int, ...] = ()) -> Args:
    """k_pages, v_pages (one page of NaN), k, v, pages, slots: distinct places in random order."""
    rng = np.random.default_rng(rows)
    pools = rng.standard_normal((2, PAGES, heads, PAGE_SIZE, dim)).astype(np.float32)
    pools[:, 3] = np.nan
    values = rng.standard_normal((2, rows, heads, dim)).astype(np.float32)
    places = rng.permutation(PAGES * PAGE_SIZE)[:rows]
    places[list(padding)] = PAGES * PAGE_SIZE
    pages, slots = np.divmod(places.astype(np.int32), PAGE_SIZE)
    return (*(jnp.asarray(x, dtype) for x in (*pools, *values)), jnp.asarray(pages), jnp.asarray(slots))


def interpreted(tuning: AppendTuning, races: bool = True, **more: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
    params = plgpu.InterpretGPUParams(detect_races=races)
    return jax.jit(partial(append_kv, backend="mosaic", tuning=tuning, interpret=params, **more))


def same(got: Any, want: Any) -> bool:
    """Bit for bit, NaN included."""
    pairs = zip(got, want, strict=True)
    return all(a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.fixture(autouse=True)
def _no_races(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("rows", "heads", "dim", "dtype", "padding", "tuning"),
    [
        (11, 2, 64, "bfloat16", (3, 10), SMALL),
        (23, 1, 128, "float32", (0, 1, 2, 3), replace(SMALL, stages=3)),
        (1, 1, 64, "bfloat16", (), APPEND["h200"]),
        (4, 1, 64, "bfloat16", (0, 1, 2, 3), SMALL),
    ],
)
def test_equals_definition(
    rows: int, heads: int, dim: int, dtype: str, padding: tuple[int, ...], tuning: AppendTuning
) -> None:
    """Blocks that do not divide the rows, padding rows first, last and all; all other places keep their bits."""
    args = arguments(rows, heads, dim, dtype, padding)
    got = interpreted(tuning)(*args)
    assert same(got, reference.append_kv(*args))
    assert same(got, args[:2]) == (len(padding) == rows)


def test_rounds_to_the_pages_dtype() -> None:
    k_pages, v_pages, k, v, *places = arguments(5, 1, 64)
    args = (k_pages, v_pages, k.astype(jnp.float32) * 1.001, v.astype(jnp.float32), *places)
    assert same(interpreted(SMALL)(*args), reference.append_kv(*args))


def test_broken_twins_fail_and_a_budget_changes_nothing() -> None:
    k_pages, v_pages, k, v, pages, slots = args = arguments(11, 1, 64, padding=(4,))
    want = reference.append_kv(*args)
    run = interpreted(SMALL, races=False, sm_budget=1)  # some of the twins write a place twice
    assert same(run(*args), want)
    for twin in (
        run(k_pages, v_pages, v, k, pages, slots),
        run(k_pages, v_pages, k, v, pages, slots.at[0].add(1) % PAGE_SIZE),
        run(k_pages, v_pages, k, v, pages.at[10].set(PAGES), slots),
        run(k_pages, v_pages, k, v, jnp.minimum(pages, PAGES - 1), slots),
    ):
        assert not same(twin, want)


def test_no_rows() -> None:
    args = arguments(0, 1, 64)
    assert same(interpreted(SMALL)(*args), args[:2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "triton"}, "backend: 'triton' is not available; accepted: 'xla', 'mosaic'"),
        ({"pages": jnp.zeros(3)}, "pages: dtype float32; backend 'mosaic' accepts int32"),
        ({"sm_budget": 0}, "sm_budget: 0 must be at least 1"),
        ({"tuning": replace(SMALL, block_bytes=128)}, "k_pages, v_pages: a token's 2 KV heads of 64"),
        ({"backend": "xla", "sm_budget": 8}, "sm_budget: 8 is not accepted with backend 'xla'"),
        ({"backend": "xla", "tuning": SMALL}, "tuning: AppendTuning("),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], message: str) -> None:
    names = ("k_pages", "v_pages", "k", "v", "pages", "slots")
    good = dict(zip(names, arguments(3, 2, 64), strict=True))
    with pytest.raises(ValueError) as caught:
        append_kv(**{**good, "backend": "mosaic", **changes})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("heads", "dim", "accepted"), [(1, 24, "multiples of 128"), (1, 512, "at most 256 of 256")])
def test_shapes_it_does_not_have(heads: int, dim: int, accepted: str) -> None:
    with pytest.raises(ValueError, match=f"k_pages, v_pages: .*{accepted}"):
        append_kv(*arguments(3, heads, dim), backend="mosaic")


def test_an_older_gpu_is_refused_before_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        compute_capability = "8.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    with pytest.raises(ValueError, match=r"backend: 'mosaic' is not available on compute capability 8\.0"):
        append_kv(*arguments(3, 1, 64), backend="mosaic")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"sms": 0}, "sms: 0"), ({"stages": 1}, "stages: 1"), ({"block_bytes": 64 * 1024}, "block_bytes: 65536")],
)
def test_tuning_is_validated(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(APPEND["h200"], **changes)


def avals(pool: int, rows: int, heads: int, dim: int) -> list[jax.ShapeDtypeStruct]:
    pages = jax.ShapeDtypeStruct((pool, heads, 64, dim), jnp.bfloat16)
    row = jax.ShapeDtypeStruct((rows, heads, dim), jnp.bfloat16)
    place = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return [pages, pages, row, row, place, place]


@pytest.mark.aot
@pytest.mark.parametrize(
    ("gpu", "rows", "heads"), [("h200", 2048, 1), ("h200", 2048, 8), ("h200", 1, 1), ("h100_sxm", 777, 8)]
)
def test_compiles_in_place(
    gpu: str, rows: int, heads: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One kernel and nothing else in the program: no copy of a pool, no temporary, registers alone."""
    for name in ("PTXAS", "RESOURCES"):
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{name}", "1")
    hardware = load_hardware(gpu)
    tuning = APPEND[gpu.split("_", maxsplit=1)[0]]
    assert hardware.sm_count == tuning.sms
    assert mosaic_supported(hardware.capability, "append_kv")
    # A pool of another size for every case: a kernel compiled before would be taken from a cache, without a report.
    shapes = avals(40_000 + rows + heads + len(gpu), rows, heads, 128)
    program = compiled(gpu, partial(append_kv, backend="mosaic", tuning=tuning), shapes, donate=(0, 1))
    assert launched(program) == ["append_kv"]
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == 2 * 2 * int(np.prod(shapes[0].shape))
    assert memory.temp_size_in_bytes == 0
    report = "".join(capfd.readouterr())
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report) == [
        ("0", "0", "0")
    ]
    (shared,) = (int(n) for n in re.findall(r"smem_scratch_bytes=(\d+)", report))
    assert shared <= BLOCK_LIMIT - 1024


@pytest.mark.aot
def test_compiles_in_place_ahead_of_attention() -> None:
    """Two layers' worth of append and decode attention over one donated pool: still no copy of it."""

    def step(k_pages: Any, v_pages: Any, k: Any, v: Any, pages: Any, slots: Any, q: Any, table: Any, n: Any) -> Any:
        for _ in range(2):
            k_pages, v_pages = append_kv(k_pages, v_pages, k, v, pages, slots, backend="mosaic")
            q, _ = decode_attention(q, k_pages, v_pages, table, n, backend="mosaic")
            k = v = q[:, :1]
        return k_pages, v_pages, q

    shapes = avals(20_000, 256, 1, 128)
    more = ((256, 8, 128), jnp.bfloat16), ((256, 16), jnp.int32), ((256,), jnp.int32)
    program = compiled("h200", step, [*shapes, *(jax.ShapeDtypeStruct(*x) for x in more)], donate=(0, 1))
    text = program.as_text() or ""
    # The fusion between the layers makes K and V of the result.
    assert launched(program) == ["append_kv", "decode_attention", "fusion", "append_kv", "decode_attention"]
    assert not re.search(r"bf16\[20000,1,64,128\][^=]* (copy|copy-start|fusion)\(", text)
    memory = program.memory_analysis()
    pool = 2 * int(np.prod(shapes[0].shape))
    assert memory.alias_size_in_bytes == 2 * pool
    assert memory.temp_size_in_bytes < pool // 100
