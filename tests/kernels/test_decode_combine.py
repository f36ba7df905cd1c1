"""The kernel that joins splits, under the interpreter, against their definition in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.decode_combine_mosaic import AT_ONCE, combine
from kernels_pallas.decode_plan import Plan, make_plan
from kernels_pallas.tuning import DecodeTuning
from tests.tolerances import TOLERANCES, assert_rows_close, row_errors

TUNING = DecodeTuning(sms=2, min_split_pages=2)
PAGES = 40


def make(rows: int, kv_heads: int, repeats: int, d: int, splits: int) -> Plan:
    q = jax.ShapeDtypeStruct((rows, kv_heads * repeats, d), jnp.bfloat16)
    pages = jax.ShapeDtypeStruct((9, kv_heads, 64, d), jnp.bfloat16)
    table: Any = jax.ShapeDtypeStruct((rows, PAGES), jnp.int32)
    plan = make_plan(q, pages, table, 1.0, TUNING, None)  # pyright: ignore[reportArgumentType]
    return replace(plan, splits=splits)


def used_splits(plan: Plan, length: int) -> int:
    pages = min(-(-length // 64), PAGES)
    return -(-pages // max(2, -(-pages // plan.splits)))


def parts_of(plan: Plan, lengths: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Of every split, NaN beyond a row's length. Logarithms far apart: their exponentials would overflow."""
    rng = np.random.default_rng(plan.splits)
    parts = rng.standard_normal((plan.rows, plan.kv_heads, plan.splits, plan.head_dim, plan.heads)).astype(np.float32)
    lse = (100 * rng.standard_normal(parts.shape[:2]))[..., None, None] + 3 * rng.standard_normal(
        (*parts.shape[:3], plan.heads)
    )
    for row, length in enumerate(lengths):
        parts[row, :, used_splits(plan, length) :] = np.nan
        lse[row, :, used_splits(plan, length) :] = np.nan
    flat = plan.rows * plan.kv_heads * plan.splits
    return jnp.asarray(parts.reshape(flat, *parts.shape[3:])), jnp.asarray(lse.reshape(flat, -1), jnp.float32)


def definition(plan: Plan, parts: jax.Array, lse: jax.Array, lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """out [rows * kv_heads * repeats, d], log-sum-exp [rows * kv_heads, heads]."""
    count = plan.rows * plan.kv_heads
    wide = np.asarray(parts, np.float64).reshape(count, plan.splits, plan.head_dim, plan.heads)
    sums = np.asarray(lse, np.float64).reshape(count, plan.splits, plan.heads)
    out = np.zeros((count, plan.repeats, plan.head_dim))
    joined = np.full((count, plan.heads), -np.inf)
    for item in range(count):
        used = used_splits(plan, lengths[item // plan.kv_heads])
        if used:
            joined[item] = np.logaddexp.reduce(sums[item, :used])
            weights = np.exp(sums[item, :used] - joined[item])
            first = item * plan.repeats % plan.heads
            whole = (wide[item, :used] * weights[:, None]).sum(axis=0)
            out[item] = whole.T[first : first + plan.repeats]
    return out.reshape(-1, plan.head_dim), joined


def interpreted(plan: Plan) -> Callable[..., tuple[jax.Array, jax.Array]]:
    params = plgpu.InterpretGPUParams(detect_races=True)
    return jax.jit(lambda *args: combine(plan, *args, tuning=TUNING, interpret=params))


@pytest.fixture(autouse=True)
def _no_races(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert "RACE" not in capfd.readouterr().out


# Rows without a token, of one split, of the last split's first token, whole, and longer than the table.
LENGTHS = (0, 1, 64 * 36 + 1, 64 * 20, 10**6)


@pytest.mark.parametrize(
    ("kv_heads", "repeats", "d", "splits"),
    [(1, 8, 128, 2), (2, 4, 64, 7), (1, 16, 64, AT_ONCE + 3), (3, 2, 128, AT_ONCE)],
)
def test_equals_definition(kv_heads: int, repeats: int, d: int, splits: int) -> None:
    """Splits of one round of loads and of two, heads that share a block of queries; what was never written is NaN."""
    plan = make(len(LENGTHS), kv_heads, repeats, d, splits)
    parts, lse = parts_of(plan, LENGTHS)
    assert np.isnan(np.asarray(lse)).any()
    out, joined = interpreted(plan)(parts, lse, jnp.asarray(LENGTHS, jnp.int32))
    want, want_lse = definition(plan, parts, lse, LENGTHS)
    assert out.dtype == jnp.bfloat16
    assert_rows_close(out, want, "bfloat16")
    assert row_errors(out, want).max() < 3e-3  # one rounding
    full = np.isfinite(want_lse)
    assert full.any() and not full.all()
    np.testing.assert_allclose(np.asarray(joined)[full], want_lse[full], atol=1e-4, rtol=0)
    assert (np.asarray(joined)[~full] == -np.inf).all()


def test_broken_twins_fail() -> None:
    """A split left out, weights of another split or none, what was never written, heads that are not the item's."""
    lengths = (64 * 6, 64 * 24)  # three of the splits, and all
    plan = make(2, 1, 4, 64, 5)
    parts, lse = parts_of(plan, lengths)
    run = interpreted(plan)
    whole = jnp.asarray(lengths, jnp.int32)
    want, _ = definition(plan, parts, lse, lengths)
    assert_rows_close(run(parts, lse, whole)[0], want, "bfloat16")
    shifted = lse.reshape(2, 5, -1)
    twins = {
        "a split left out": (parts.at[jnp.array([0, 5])].set(0.0), lse, whole),
        "weights of another split": (parts, jnp.roll(shifted, 1, axis=1).reshape(lse.shape), whole),
        "no weights": (parts, jnp.zeros_like(lse), whole),
        "lengths swapped": (parts, lse, whole[::-1]),
        "heads of the neighbour": (jnp.roll(parts, 4, axis=2), lse, whole),
    }
    for name, args in twins.items():
        errors = row_errors(run(*args)[0], want)
        assert not errors.max() <= TOLERANCES["bfloat16"], name
