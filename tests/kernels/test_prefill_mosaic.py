"""prefill_attention (Mosaic GPU) under the interpreter against its float32 definition, and compiled for Hopper."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import prefill_attention, prefill_body_mosaic, reference
from kernels_pallas.prefill_tiles import BEGIN, END, FIRST, KEYS, LENGTH, SEGMENT, SHIFT, STEP, Plan, list_tiles
from kernels_pallas.targets import mosaic_supported
from kernels_pallas.tuning import BLOCK_LIMIT, PREFILL, PrefillTuning
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.inspect.gpu_target import gpu_mesh
from tests.kernels.paged import Paged, make_paged, random_queries
from tests.tolerances import TOLERANCES, assert_rows_close, row_errors

SMALL = PrefillTuning(sms=2)  # two programs take more items than they have, and slots of the pipeline are used again
# A chunk over two tiles after some context, none, a whole prompt, and one row far into its third step.
CHUNKS, LENGTHS = [18, 0, 7, 1], [150, 0, 7, 300]
PADDING = 5


def pack(chunks: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(chunks).tolist()]


def arguments(q: jax.Array, paged: Paged, starts: Sequence[int]) -> tuple[jax.Array, ...]:
    integers = (jnp.asarray(x, jnp.int32) for x in (paged.page_table, starts, paged.lengths))
    return q, paged.k_pages, paged.v_pages, *integers


def interpreted(tuning: PrefillTuning, races: bool = True, **more: Any) -> Callable[..., jax.Array]:
    params = plgpu.InterpretGPUParams(detect_races=races)
    return jax.jit(partial(prefill_attention, backend="mosaic", tuning=tuning, interpret=params, **more))


def expected(args: tuple[jax.Array, ...], scale: float) -> np.ndarray:
    return reference.prefill_attention(*args, scale=scale)


@pytest.fixture(autouse=True)
def _no_races(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("repeats", "kv_heads", "head_dim", "tuning"),
    [
        (8, 1, 128, SMALL),
        (8, 2, 64, replace(SMALL, ping_pong=False)),
        (4, 1, 64, SMALL),
        (1, 1, 128, replace(SMALL, sms=1)),
    ],
)
def test_equals_definition(repeats: int, kv_heads: int, head_dim: int, tuning: PrefillTuning) -> None:
    """Head layouts x head sizes, over ragged chunks. Whatever a request does not own is NaN, and pages come in random
    order."""
    rng = np.random.default_rng(repeats * head_dim)
    paged = make_paged(rng, LENGTHS, kv_heads=kv_heads, page_size=64, head_dim=head_dim, dtype="bfloat16")
    starts = pack(CHUNKS)
    q = random_queries(rng, starts[-1] + PADDING, repeats * kv_heads, head_dim, "bfloat16")
    args = arguments(q, paged, starts)
    out, want = interpreted(tuning)(*args), expected(args, head_dim**-0.5)
    assert out.dtype == jnp.bfloat16
    assert_rows_close(out, want, "bfloat16")
    assert row_errors(out, want).max() < 5e-3  # two roundings to bf16, of the weights and of the result
    assert (np.asarray(out)[starts[-1] :].astype(np.float32) == 0).all()


@pytest.fixture(scope="module")
def shared() -> tuple[Callable[..., jax.Array], Paged, jax.Array]:
    """One program for the tests below, and numbers instead of NaN, so that an error shows as a wrong number."""
    rng = np.random.default_rng(7)
    paged = make_paged(rng, (170, 140, 190), kv_heads=1, page_size=64, head_dim=64, dtype="bfloat16")
    paged.k_pages, paged.v_pages = jnp.nan_to_num(paged.k_pages), jnp.nan_to_num(paged.v_pages)
    run = interpreted(SMALL, races=False, scale=0.125, sm_budget=1)
    return run, paged, random_queries(rng, 32, 8, 64, "bfloat16")


def test_broken_twins_fail(shared: Any) -> None:
    """What these mistakes would give is far outside the tolerance. A segment each, so that a run tries three."""
    run, paged, q = shared
    starts = pack([9, 12, 10])
    args = arguments(q, paged, starts)
    want = expected(args, 0.125)
    assert_rows_close(run(*args), want, "bfloat16")
    table, stale = paged.page_table, paged.page_table.copy()
    stale[2, 1] = table[1, 1]  # a page that is another request's by now
    first = table[0]
    several = Paged(
        **{
            **vars(paged),
            "v_pages": paged.v_pages.at[first].set(paged.k_pages[first]),
            "page_table": stale,
            "lengths": paged.lengths - np.array([0, 64, 0], np.int32),
        }
    )
    identity = Paged(**{**vars(paged), "page_table": np.arange(table.size, dtype=np.int32).reshape(table.shape)})
    for twin, names in ((several, ("K for V", "last page dropped", "stale page")), (identity, ("identity",) * 3)):
        errors = row_errors(run(*arguments(q, twin, starts)), want).max(axis=1)
        for name, start, stop in zip(names, starts, starts[1:], strict=False):
            assert errors[start:stop].min() > TOLERANCES["bfloat16"], f"{name}: a row passes ({errors[start:stop]})"
    # One key among so many is less: but some head of a row gives it weight.
    beyond = Paged(**{**vars(paged), "lengths": paged.lengths + 1})
    assert row_errors(run(*arguments(q, beyond, starts)), want).max() > TOLERANCES["bfloat16"], "not causal by one"


def test_a_segment_does_not_depend_on_its_neighbours(shared: Any) -> None:
    """Bitwise: the same chunk elsewhere, beside other contexts."""
    run, paged, q = shared
    answers = []
    for before, after, lengths in ((0, 0, (0, 140, 0)), (3, 16, (3, 140, 190)), (17, 1, (170, 140, 1))):
        twin = Paged(**{**vars(paged), "lengths": np.array(lengths, np.int32)})
        rows = q.at[before : before + 12].set(q[:12])
        answers.append(np.asarray(run(*arguments(rows, twin, pack([before, 12, after]))))[before : before + 12])
    assert np.isfinite(answers[0].astype(np.float32)).all()
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer, answers[0])


def test_garbage_would_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin that leaves what lies past the length in the values, and NaN lies there."""
    monkeypatch.setattr(prefill_body_mosaic, "clear_tail", lambda v, left: None)
    rng = np.random.default_rng(3)
    paged = make_paged(rng, [70], kv_heads=1, page_size=64, head_dim=64, dtype="bfloat16")
    out = interpreted(SMALL, races=False)(*arguments(random_queries(rng, 8, 8, 64, "bfloat16"), paged, [0, 8]))
    assert np.isnan(np.asarray(out).astype(np.float32)).all()


def plan(repeats: int = 8, kv_heads: int = 1, tokens: int = 256, segments: int = 5, **changes: Any) -> Plan:
    static = {"row_pages": 512, "head_dim": 128, "stages": 2, "sms": 132, "scale": 1.0, "ping_pong": True}
    sizes = {"tokens": tokens, "q_heads": repeats * kv_heads, "kv_heads": kv_heads, "segments": segments}
    return Plan(**{**static, **sizes, **changes})


@pytest.mark.parametrize("repeats", [8, 4, 3])
def test_tiles_cover_every_token_once(repeats: int) -> None:
    """Of any packing: each token, padding too, is one tile's, which reads all that the token sees; heavy ones first."""
    rng = np.random.default_rng(repeats)
    sizes = plan(repeats)
    tiles_of = jax.jit(partial(list_tiles, sizes))
    for _ in range(50):
        cuts = np.sort(rng.integers(0, sizes.tokens + 1, sizes.segments))
        starts = np.concatenate([[0], cuts]).astype(np.int32)
        counts = np.diff(starts)
        lengths = np.where(counts > 0, counts + rng.integers(0, 500, sizes.segments), 0).astype(np.int32)
        tiles = np.asarray(tiles_of(jnp.asarray(starts), jnp.asarray(lengths)))
        assert (np.diff(-(-tiles[:, KEYS] // STEP)) <= 0).all()
        owner = np.full(sizes.tokens, -1)
        for number, tile in enumerate(tiles):
            begin, end = tile[BEGIN], tile[END]
            if begin == end:
                continue
            assert (owner[begin:end] == -1).all()
            owner[begin:end] = number
            assert tile[FIRST] % sizes.align == 0
            assert tile[FIRST] <= begin < end <= tile[FIRST] + sizes.tile_tokens
            if begin >= starts[-1]:
                assert tile[KEYS] == 0
                continue
            segment = np.searchsorted(starts, begin, side="right") - 1
            assert end <= starts[segment + 1]
            assert (tile[SEGMENT], tile[LENGTH]) == (segment, lengths[segment])
            assert tile[SHIFT] == lengths[segment] - starts[segment + 1]
            assert tile[KEYS] == lengths[segment] - (starts[segment + 1] - end)
        assert (owner >= 0).all()


@pytest.mark.parametrize(("repeats", "kv_heads", "chunks"), [(8, 1, [8192]), (4, 8, [8192]), (8, 8, [1000] * 8)])
def test_programs_have_equal_work(repeats: int, kv_heads: int, chunks: list[int]) -> None:
    """The busiest program has at most a tenth more steps than the mean: items in snake order, heavy ones first."""
    sizes = plan(repeats, kv_heads, tokens=8192, segments=len(chunks))
    starts = np.array(pack(chunks), np.int32)
    tiles = np.asarray(list_tiles(sizes, jnp.asarray(starts), jnp.asarray(chunks, dtype=jnp.int32)))
    steps = np.repeat(-(-tiles[:, KEYS] // STEP), sizes.head_groups)
    rounds = np.pad(steps, (0, -len(steps) % sizes.programs)).reshape(-1, sizes.programs)
    rounds[1::2] = rounds[1::2, ::-1]
    assert rounds.sum(axis=0).max() <= 1.1 * steps.sum() / sizes.programs


def _bad(**changes: Any) -> dict[str, Any]:
    pages = jnp.zeros((5, 2, 64, 64), jnp.bfloat16)
    good: dict[str, Any] = {
        "q": jnp.zeros((3, 8, 64), jnp.bfloat16),
        "k_pages": pages,
        "v_pages": pages,
        "page_table": jnp.zeros((2, 2), jnp.int32),
        "row_starts": jnp.zeros(3, jnp.int32),
        "lengths": jnp.zeros(2, jnp.int32),
        "backend": "mosaic",
    }
    return good | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "triton"}, "backend: 'triton' is not available; accepted: 'xla', 'mosaic'"),
        ({"q": jnp.zeros((3, 8, 64))}, "q: dtype float32; backend 'mosaic' accepts bfloat16"),
        ({"v_pages": jnp.zeros((5, 2, 64, 64))}, "v_pages: dtype float32; backend 'mosaic' accepts bfloat16"),
        ({"row_starts": jnp.zeros(3)}, "row_starts: dtype float32; backend 'mosaic' accepts int32"),
        ({"scale": -1.0}, "scale: -1.0 must be positive with backend 'mosaic'"),
        ({"sm_budget": 0}, "sm_budget: 0 must be at least 1"),
        ({"backend": "xla", "sm_budget": 8}, "sm_budget: 8 is not accepted with backend 'xla'"),
        ({"backend": "xla", "tuning": SMALL}, "tuning: PrefillTuning("),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        prefill_attention(**_bad(**changes))
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
        prefill_attention(**_bad(q=jnp.zeros((3, 8, head), jnp.bfloat16), k_pages=pages, v_pages=pages))


@pytest.mark.parametrize("capability", ["8.0", "10.0"])
def test_an_older_gpu_is_refused_before_lowering(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    with pytest.raises(ValueError, match=f"backend: 'mosaic' is not available on compute capability {capability}"):
        prefill_attention(**_bad())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sms": 0}, "sms: 0"),
        ({"bytes_in_flight": 64 * 1024}, "bytes_in_flight: 65536"),
        ({"bytes_in_flight": BLOCK_LIMIT}, "bytes_in_flight: 232448"),
    ],
)
def test_tuning_is_validated(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PREFILL["h200"], **changes)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("gpu", "repeats", "kv_heads", "tokens", "head_dim"),
    [
        ("h200", 8, 1, 8192, 128),
        ("h200", 4, 8, 8192, 128),
        ("h200", 1, 8, 1001, 64),
        ("h100_sxm", 8, 1, 768, 128),
    ],
)
def test_compiles_for_hopper(
    gpu: str,
    repeats: int,
    kv_heads: int,
    tokens: int,
    head_dim: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In a shard_map over compile-only GPUs: the kernel is in, its products stay asynchronous, nothing is spilled, and
    it fits."""
    for name in ("PTXAS", "RESOURCES"):
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{name}", "1")
    hardware = load_hardware(gpu)
    tuning = PREFILL[gpu.split("_", maxsplit=1)[0]]
    assert hardware.sm_count == tuning.sms
    assert mosaic_supported(hardware.capability, "prefill_attention")
    mesh, segments = gpu_mesh(hardware, 1), 12
    # A pool of another size for every case: a kernel compiled before would be taken from a cache, without a report.
    pool = jax.ShapeDtypeStruct((2000 + len(gpu), kv_heads, 64, head_dim), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((tokens, repeats * kv_heads, head_dim), jnp.bfloat16)
    shapes = ((segments, 130), (segments + 1,), (segments,))
    avals = (q, pool, pool, *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes))
    attend = partial(prefill_attention, backend="mosaic", tuning=tuning)
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P())) for x in avals]
    text = jax.jit(sharded).lower(*placed).compile().as_text() or ""
    assert text.count('custom_call_target="mosaic_gpu') == 1
    report = "".join(capfd.readouterr())
    assert "for 'sm_90a'" in report
    assert "serialized" not in report
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report) == [
        ("0", "0", "0")
    ]
    (registers,) = (int(n) for n in re.findall(r"Used (\d+) registers", report))
    assert registers <= 65536 // 384
    (shared,) = (int(n) for n in re.findall(r"smem_scratch_bytes=(\d+)", report))
    # K and V in flight, two tiles of queries and one of results; then the barriers.
    buffers = tuning.bytes_in_flight + 3 * 128 * head_dim * 2
    assert buffers <= shared <= BLOCK_LIMIT - 1024
