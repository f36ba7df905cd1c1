"""What page tables with windows keep, against counting it token by token; and what is made of a model's windows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_jax.cost.footprint import request_kv_bytes
from nanoflow_jax.engine.admission import peak_growth
from nanoflow_jax.engine.pages import PagePool
from nanoflow_jax.engine.setup import heads_of
from nanoflow_jax.engine.windows import Windows
from nanoflow_jax.models.layout import page_tables
from nanoflow_jax.models.registry import model_config

OF_TABLES = st.lists(st.one_of(st.none(), st.integers(1, 20)), min_size=1, max_size=3)


def held(windows: Windows, computed: int, until: int) -> int:
    """Pages of a sequence with so many tokens computed, and with pages for `until`."""
    tables = range(len(windows.of_tables))
    return sum(-(-until // windows.page_size) - int(windows.first_kept(table, computed)) for table in tables)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(OF_TABLES, st.integers(1, 7), st.integers(1, 60), st.integers(1, 20))
def test_the_most_pages_of_a_sequence(of_tables: list[int | None], size: int, tokens: int, chunk: int) -> None:
    """While it decodes, and while its prompt comes in chunks that begin anywhere: never more, and nearly so many."""
    windows = Windows(of_tables, size)
    decoding = max(held(windows, at, at + 1) for at in range(tokens))
    assert decoding <= windows.pages(tokens) <= decoding + len(of_tables)
    chunked = max(held(windows, at, min(at + chunk, tokens)) for at in range(tokens))
    assert chunked <= windows.pages_while_chunked(tokens, chunk) <= chunked + 2 * len(of_tables)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    OF_TABLES, st.integers(1, 7), st.lists(st.tuples(st.integers(1, 60), st.integers(0, 90)), min_size=1, max_size=5)
)
def test_growth_below_windows(of_tables: list[int | None], size: int, requests: list[tuple[int, int]]) -> None:
    """The peak is never below what happens, and above by less than a page for each table of a request."""
    windows = Windows(of_tables, size)
    length, remaining = (np.array(x) for x in zip(*requests, strict=True))
    tables = range(len(of_tables))
    filled = np.stack([-(-length // size)] * len(of_tables), axis=1)
    kept = filled - np.stack([windows.first_kept(table, length - 1) for table in tables], axis=1)
    most = max(
        sum(held(windows, n + step - 1, n + step) for n, left in requests if left >= step)
        for step in range(int(remaining.max()) + 1)
    )
    bound = peak_growth(remaining, length, filled, kept, windows)
    assert most - kept.sum() <= bound
    if len(requests) == 1:
        assert bound <= max(0, most - kept.sum()) + 2 * len(of_tables)


def test_what_fails_is_found_by_no_table() -> None:
    pool, windows = PagePool(8), Windows((None, 4), 4)
    pages = pool.allocate(4)
    assert pages is not None
    keys = [b"first", b"second"]
    windows.register(pool, pages.reshape(2, 2), np.zeros(2, np.int32), keys, 0, 2)
    pool.release(pages)
    count, found = windows.find(pool, keys)
    assert count == 2 and [len(of) for of in found] == [2, 1]
    windows.forget(pool, keys)
    assert not pool._kept


@pytest.mark.parametrize(
    ("model", "depth", "tables"), [("llama-3.1-70b", 80, 1), ("gemma-3-27b", 10, 7), ("olmo-3-32b", 16, 4)]
)
def test_page_tables_of_models(model: str, depth: int, tables: int) -> None:
    """Layers that see all fill their pages; each layer has a place of its own, in a table of its window."""
    config = model_config(model)[1]
    found = page_tables(config)
    assert (found.depth, found.count) == (depth, tables)
    assert len(set(zip(found.table, found.place, strict=True))) == config.num_layers
    assert max(found.place) < depth
    for layer, table in zip(config.layers, found.table, strict=True):
        assert layer.attention.window == found.windows[table]


def test_what_is_made_of_windows() -> None:
    """Bytes of long requests, and what kernels are checked with before they are trusted."""
    config = model_config("gemma-3-27b")[1]
    of_layer = 2 * 16 // 8 * 128 * 2
    assert request_kv_bytes(config, 8, 2, 500) == 62 * 500 * of_layer
    assert request_kv_bytes(config, 8, 2, 8192) == (10 * 8192 + 52 * 1024) * of_layer
    assert heads_of(config, 8, fp8=False).windows == (1024,)
    assert heads_of(model_config("llama-3.1-70b")[1], 8, fp8=True).windows == ()
