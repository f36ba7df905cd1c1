"""Prefixes that are found again, on the device, on the host or on the disk: fewer tokens are computed, none differs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoflow_jax import LLM, SamplingParams
from nanoflow_jax.engine import page_files
from nanoflow_jax.engine import scheduler as scheduler_module
from nanoflow_jax.engine.offload import OffloadStore
from nanoflow_jax.engine.request import RequestOutput
from tests.engine.engine_driver import (
    CASE,
    PAGE,
    VOCAB,
    assert_idle,
    bytes_of_a_page,
    crowd,
    greedy,
    make_llm,
    small_pool,
    tokens,
)
from tests.engine.offloaded import flush
from tests.engine.test_faults import fails_at
from tests.reference.checkpoints import Reference, load_reference


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return make_llm(
        tmp_path_factory.mktemp(CASE), kv_offload_gib=0.1, kv_offload_disk_gib=0.1,
        kv_offload_folder=tmp_path_factory.mktemp("spill"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> Reference:
    return load_reference(CASE)


@pytest.fixture(scope="module")
def calm(llm: LLM) -> list[list[int]]:
    """The crowd's tokens without prefixes found again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.engine.scheduler, "root", None)
        return run(llm)


@pytest.fixture(autouse=True)
def fresh(llm: LLM) -> Iterator[None]:
    """Before each test nothing is in the pages or in the store; after it, the engine is idle."""
    llm.engine.scheduler.pool.reset()
    store(llm).clear()
    yield
    assert_idle(llm)


def store(llm: LLM) -> OffloadStore:
    assert llm.engine.scheduler.hooks.offload is not None
    return llm.engine.scheduler.hooks.offload


def run(llm: LLM) -> list[list[int]]:
    prompts, params = crowd()
    shorter = [replace(p, max_tokens=min(p.max_tokens or 0, 20)) for p in params]
    return tokens(llm.generate(prompts, shorter, use_tqdm=False))


def cached(outputs: list[RequestOutput]) -> list[int]:
    return [o.metrics.num_cached_tokens for o in outputs]


# -- on the device


def test_hits_are_counted_and_change_nothing(llm: LLM, reference: Reference) -> None:
    """Whole pages, but never the last token: of the same prompt, of a longer one, of a conversation that goes on."""
    rng = np.random.default_rng(3)
    base = rng.integers(0, VOCAB, 61).tolist()
    prompts = [base, base[:57], base[:56], base[:20] + [9] * 20, [9, *base]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.engine.scheduler, "root", None)
        without = llm.generate([*prompts, base + [5] * 9], greedy(12), use_tqdm=False)
    assert cached(without) == [0] * 6
    (first,) = llm.generate([base], greedy(12), use_tqdm=False)
    assert cached([first]) == [0]
    found = llm.generate(prompts, greedy(12), use_tqdm=False)
    assert cached(found) == [56, 56, 48, 16, 0]
    assert tokens(found) == tokens(without)[:5]
    going_on = base + first.outputs[0].token_ids
    (last,) = llm.generate([[*going_on, 7]], greedy(4), use_tqdm=False)
    assert cached([last]) == [len(going_on) // PAGE * PAGE]


def test_a_shared_beginning_in_one_batch(llm: LLM) -> None:
    """Requests that arrive together share what the first of them computes."""
    base = np.random.default_rng(4).integers(0, VOCAB, 64).tolist()
    found = llm.generate([[*base, 3 + i] for i in range(12)], greedy(4), use_tqdm=False)
    assert cached(found)[0] == 0
    assert sum(c == 64 for c in cached(found)) >= 9


def test_completions_of_one_prompt_compute_it_once(llm: LLM) -> None:
    """However many, and however long the prompt: all but the last part of a page is found by all but the first."""
    prompt = np.random.default_rng(5).integers(0, VOCAB, 100).tolist()
    params = SamplingParams(n=40, temperature=1.0, seed=1, max_tokens=3, ignore_eos=True)
    stats = llm.engine.scheduler.stats
    before = stats.prompt_tokens, stats.cached_tokens
    llm.generate([prompt, prompt[1:]], params, use_tqdm=False)
    assert stats.prompt_tokens - before[0] == 40 * (100 + 99)
    assert stats.cached_tokens - before[1] == 39 * 2 * 96


def test_the_crowd_with_and_without(llm: LLM, calm: list[list[int]]) -> None:
    for _ in range(3):
        assert run(llm) == calm


def test_a_preempted_request_finds_its_pages(llm: LLM, calm: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Much of what it had is still there when it comes back."""
    monkeypatch.setattr(llm.engine.scheduler.hooks, "offload", None)
    stats = small_pool(llm, monkeypatch, 24, hopeful=True)
    assert run(llm) == calm
    with_prefixes, preemptions = stats.recomputed_tokens, stats.preemptions
    assert preemptions > 10
    monkeypatch.setattr(llm.engine.scheduler, "root", None)
    stats = small_pool(llm, monkeypatch, 24, hopeful=True)
    assert run(llm) == calm
    assert with_prefixes / preemptions < 0.7 * stats.recomputed_tokens / stats.preemptions


def test_keys_without_parents_are_noticed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin: pages are found by their own tokens alone, whatever stands before them."""
    rng = np.random.default_rng(7)
    shared = rng.integers(0, VOCAB, 2 * PAGE).tolist()
    prompts = [[*rng.integers(0, VOCAB, PAGE).tolist(), *shared, 5] for _ in range(6)]
    want = tokens(llm.generate(prompts, greedy(16), use_tqdm=False))
    llm.engine.scheduler.pool.reset()
    real = scheduler_module.next_keys

    def orphaned(previous: bytes, tokens: np.ndarray, page_size: int, prefilled: int) -> list[bytes]:
        pages = [tokens[at : at + page_size] for at in range(0, len(tokens) - page_size + 1, page_size)]
        return [key for page in pages for key in real(b"", page, page_size, prefilled)]

    monkeypatch.setattr(scheduler_module, "next_keys", orphaned)
    first = [prompts[0][PAGE:]]
    llm.generate(first, greedy(1), use_tqdm=False)
    llm.generate([[*p[:PAGE], 5] for p in prompts], greedy(1), use_tqdm=False)
    assert tokens(llm.generate(prompts, greedy(16), use_tqdm=False)) != want


# -- on the host and on the disk


def test_offloaded_pages_come_back(llm: LLM, calm: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    stats = small_pool(llm, monkeypatch, 20, hopeful=True)
    for _ in range(2):
        assert run(llm) == calm
    assert stats.restored_tokens > 200
    assert stats.preemptions > 10
    assert store(llm).stats.put_pages > 50


def only_disk(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> OffloadStore:
    """The host has room for two pages; the others go to files at once."""
    offload = store(llm)
    monkeypatch.setattr(offload, "_host_max", 2 * bytes_of_a_page(llm))
    return offload


@pytest.mark.parametrize("harm", ["none", "damaged", "missing", "truncated"])
def test_spill_files(llm: LLM, calm: list[list[int]], monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    """Pages come back from files; files that are not as they were written are noticed, counted and computed again."""
    offload, stats = only_disk(llm, monkeypatch), small_pool(llm, monkeypatch, 20, hopeful=True)
    damaged = offload.stats.damaged_files
    assert run(llm) == calm
    flush(offload)
    files = [p for p in Path(offload._files._folder).rglob("*") if p.is_file()]
    assert len(files) > 10
    for file in files:
        if harm == "missing":
            file.unlink()
        elif harm == "truncated":
            file.write_bytes(file.read_bytes()[:-9])
        elif harm == "damaged":
            content = bytearray(file.read_bytes())
            content[-5] ^= 1
            file.write_bytes(content)
    read = offload.stats.from_disk_pages
    assert run(llm) == calm
    assert offload.stats.from_disk_pages > read
    assert (offload.stats.damaged_files > damaged) is (harm != "none")
    assert stats.restored_tokens > 0


def test_a_full_disk(llm: LLM, calm: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    offload = only_disk(llm, monkeypatch)
    small_pool(llm, monkeypatch, 20, hopeful=True)
    errors = offload.stats.write_errors

    def full(path: Path, mode: str) -> Any:
        if mode == "wb":
            raise OSError(28, "No space left on device")
        return open(path, mode)

    monkeypatch.setattr(page_files, "open", full, raising=False)
    for _ in range(2):
        assert run(llm) == calm
    flush(offload)
    assert offload.stats.write_errors > errors


@pytest.mark.parametrize("what", ["extract", "insert", "missing", "put", "get", "count"])
def test_a_copy_that_fails(llm: LLM, calm: list[list[int]], monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Any call on the way to the host or back may raise: all requests end with their tokens, and no page leaks."""
    small_pool(llm, monkeypatch, 20, hopeful=True)
    owner: Any = llm.engine.runner if what in ("extract", "insert") else store(llm)
    calls: list[int] = []
    failing = fails_at(2, getattr(owner, what), RuntimeError("no memory for a copy"))

    def counted(*args: Any) -> Any:
        calls.append(1)
        return failing(*args)

    monkeypatch.setattr(owner, what, counted)
    if what == "count":
        monkeypatch.setattr(llm.engine.scheduler.hooks, "offloaded", counted)
    for _ in range(2):
        assert run(llm) == calm
    assert len(calls) > 2
