"""append_kv (XLA) against its definition: every row in its place, nothing else touched, padding rows dropped."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import append_kv, reference

PAGES, HEADS, PAGE_SIZE, DIM, ROWS = 6, 2, 4, 3, 9

_jitted = jax.jit(append_kv)


def pool(dtype: str = "float32") -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, PAGES, HEADS, PAGE_SIZE, DIM)).astype(np.float32)
    values[:, 3] = np.nan  # an unwritten page stays as it is
    return jnp.asarray(values[0], dtype), jnp.asarray(values[1], dtype)


def assert_same(got: Any, want: Any) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a.astype(jnp.float32)), np.asarray(b.astype(jnp.float32)))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(places=st.lists(st.integers(0, PAGES * PAGE_SIZE - 1), max_size=ROWS, unique=True), data=st.data())
def test_equals_definition(places: list[int], data: st.DataObject) -> None:
    """Bitwise, for any distinct places in any order, padding rows anywhere between them."""
    rows = data.draw(st.permutations([*places, *[PAGES * PAGE_SIZE] * (ROWS - len(places))]))
    k, v = (
        jnp.asarray(x)
        for x in np.random.default_rng(len(places)).standard_normal((2, ROWS, HEADS, DIM)).astype(np.float32)
    )
    pages, slots = np.divmod(np.array(rows, np.int32), PAGE_SIZE)
    args = (*pool(), k, v, jnp.asarray(pages), jnp.asarray(slots))
    assert_same(_jitted(*args), reference.append_kv(*args))


def test_rounds_to_the_pages_dtype() -> None:
    """float32 rows into bfloat16 pages; other pages keep their bits."""
    k, v = jnp.full((1, HEADS, DIM), 1.001), jnp.full((1, HEADS, DIM), -3.003)
    args = (*pool("bfloat16"), k, v, jnp.array([2]), jnp.array([1]))
    assert_same(_jitted(*args), reference.append_kv(*args))


def test_donated_pages_are_updated_in_place() -> None:
    """The compiled append aliases both pools: no second copy of the cache is ever made."""
    k = jnp.ones((ROWS, HEADS, DIM))
    places = jnp.arange(ROWS, dtype=jnp.int32)
    lowered = jax.jit(append_kv, donate_argnums=(0, 1)).lower(*pool(), k, k, places % PAGES, places // PAGES)
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == 2 * 4 * PAGES * HEADS * PAGE_SIZE * DIM


def test_broken_twins_fail() -> None:
    """K for V, a wrong slot, a dropped row and a padding row that is written are all seen."""
    k, v = jnp.ones((3, HEADS, DIM)), jnp.full((3, HEADS, DIM), 2.0)
    pages, slots = jnp.array([5, 0, PAGES]), jnp.array([0, 1, 2])
    want = reference.append_kv(*pool(), k, v, pages, slots)
    assert_same(append_kv(*pool(), k, v, pages, slots), want)
    for twin in (
        append_kv(*pool(), v, k, pages, slots),
        append_kv(*pool(), k, v, pages, slots + 1),
        append_kv(*pool(), k[:1], v[:1], pages[:1], slots[:1]),
        append_kv(*pool(), k, v, jnp.minimum(pages, PAGES - 1), slots),
    ):
        with pytest.raises(AssertionError):
            assert_same(twin, want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "mosaic?"}, "backend: 'mosaic?'"),
        ({"v_pages": (PAGES, HEADS, PAGE_SIZE, DIM + 1)}, "k_pages, v_pages: shapes"),
        ({"k_pages": (PAGES, HEADS, DIM), "v_pages": (PAGES, HEADS, DIM)}, "k_pages, v_pages: shapes"),
        ({"v": (2, HEADS, DIM + 1)}, "k, v: shapes"),
        ({"k": (3, 1, DIM), "v": (3, 1, DIM)}, "k, v: shapes"),
        ({"pages": (2,)}, "pages: shape"),
        ({"slots": (3, 1)}, "slots: shape"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], message: str) -> None:
    shapes: dict[str, Any] = {"k_pages": (PAGES, HEADS, PAGE_SIZE, DIM), "v_pages": (PAGES, HEADS, PAGE_SIZE, DIM)}
    shapes |= {"k": (3, HEADS, DIM), "v": (3, HEADS, DIM), "pages": (3,), "slots": (3,), **changes}
    arguments: dict[str, Any] = {
        n: jnp.zeros(s, jnp.int32 if n in ("pages", "slots") else jnp.float32) if isinstance(s, tuple) else s
        for n, s in shapes.items()
    }
    with pytest.raises(ValueError) as caught:
        append_kv(**arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
