"""deterministic=True: tokens and logprobs are bitwise the same whatever runs beside a request and whatever becomes of
its pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflow_jax import LLM, SamplingParams
from nanoflow_jax.engine import scheduler
from nanoflow_jax.engine.request import RequestOutput
from nanoflow_jax.step import trace as step
from tests.engine.engine_driver import CASE, assert_idle, crowd, make_llm, small_pool

Load = tuple[list[list[int]], list[SamplingParams]]
Bits = tuple[list[int], bytes, bytes]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """Its prefill attention rounds differently from decode attention, as on a GPU. On some CPUs both would agree bit
    for bit, and nothing be proven."""
    real = step._prefill_attention

    def rounded(*args: Any, **options: Any) -> jax.Array:
        return real(*args, **options) * jnp.float32(1 + 2**-20)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "_prefill_attention", rounded)
        llm = make_llm(tmp_path_factory.mktemp(CASE), deterministic=True, kv_offload_gib=0.1)
    assert len(llm.engine.scheduler.shapes) == 1
    return llm


@pytest.fixture(scope="module")
def load() -> Load:
    return crowd(logprobs=3, prompt_logprobs=None)


@pytest.fixture(autouse=True)
def no_leak(llm: LLM) -> Iterator[None]:
    yield
    assert_idle(llm)
    assert llm.engine.scheduler.hooks.offload is not None
    llm.engine.scheduler.hooks.offload.clear()
    llm.engine.scheduler.pool.reset()


def bits(output: RequestOutput) -> Bits:
    """Tokens, and every bit of their logprobs and of those of the prompt."""
    done = output.outputs[0]

    def raw(entries: list | None) -> bytes:
        return np.array([(t, x.logprob, x.rank) for e in entries or [] if e for t, x in e.items()]).tobytes()

    return done.token_ids, raw(done.logprobs), raw(output.prompt_logprobs)


def run(llm: LLM, load: Load) -> list[Bits]:
    return [bits(o) for o in llm.generate(*load, use_tqdm=False)]


@pytest.fixture(scope="module")
def alone(llm: LLM, load: Load) -> list[Bits]:
    """Each of the forty by itself, nothing of it in the pages."""
    found = []
    for prompt, params in zip(*load, strict=True):
        llm.engine.scheduler.pool.reset()
        found += run(llm, ([prompt], [params]))
    llm.engine.scheduler.pool.reset()
    return found


def test_in_a_crowd_and_in_another_order(llm: LLM, load: Load, alone: list[Bits]) -> None:
    assert run(llm, load) == alone
    llm.engine.scheduler.pool.reset()
    order = np.random.default_rng(1).permutation(len(alone))
    found = run(llm, ([load[0][i] for i in order], [load[1][i] for i in order]))
    assert found == [alone[i] for i in order]


def test_with_prefix_hits(llm: LLM, load: Load, alone: list[Bits]) -> None:
    """The whole crowd again and again, with the pages of the last time; and after others that share only beginnings."""
    few = load[0][:12], load[1][:12]  # so many that all their pages stay on the device
    assert run(llm, few) == alone[:12]
    before = llm.engine.scheduler.stats.cached_tokens
    assert run(llm, few) == alone[:12]
    assert llm.engine.scheduler.stats.cached_tokens > before
    llm.engine.scheduler.pool.reset()
    cut = [prompt[: 1 + len(prompt) * 2 // 3] for prompt in load[0]]
    run(llm, (cut, load[1]))
    assert run(llm, load) == alone
    # Conversations: the output so far is part of the next prompt, and its pages were computed in decode rows.
    llm.engine.scheduler.pool.reset()
    longer = [p + tokens for p, (tokens, _, _) in zip(load[0], alone, strict=True)], load[1]
    fresh = run(llm, longer)
    llm.engine.scheduler.pool.reset()
    run(llm, load)
    assert run(llm, longer) == fresh


@pytest.mark.parametrize("num_pages", [17, 24])
def test_after_preemption_and_restored_pages(
    llm: LLM, load: Load, alone: list[Bits], monkeypatch: pytest.MonkeyPatch, num_pages: int
) -> None:
    """With a pool of a few pages: computed again, found again, or brought back from the host."""
    stats = small_pool(llm, monkeypatch, num_pages, hopeful=True)
    assert run(llm, load) == alone
    assert stats.preemptions > 10
    assert stats.recomputed_tokens > 0
    assert run(llm, load) == alone
    assert stats.restored_tokens > 0


def test_prompt_logprobs(llm: LLM, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of prompts cut into chunks as the neighbours leave room."""
    params = [SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=1, ignore_eos=True)] * len(load[0])
    alone = []
    for prompt, one in zip(load[0], params, strict=True):
        alone += run(llm, ([prompt], [one]))
    assert run(llm, (load[0], params)) == alone
    small_pool(llm, monkeypatch, 17, hopeful=True)
    assert run(llm, (load[0], params)) == alone


def test_tokens_computed_again_in_prefill_rows_are_noticed(
    llm: LLM, load: Load, alone: list[Bits], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken twin: without phases, a preempted request's output tokens go through prefill rows."""
    monkeypatch.setattr(llm.engine.scheduler, "by_phase", False)
    monkeypatch.setattr(llm.engine.scheduler, "root", None)
    stats = small_pool(llm, monkeypatch, 17, hopeful=True)
    found = run(llm, load)
    assert stats.preemptions > 10
    assert [f[0] for f in found] == [a[0] for a in alone], "only roundings differ"
    assert found != alone


def test_pages_without_phases_in_their_keys_are_noticed(
    llm: LLM, load: Load, alone: list[Bits], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another: a prompt finds pages that were computed in decode rows."""
    keys = scheduler.next_keys

    def same_for_all(previous: bytes, tokens: np.ndarray, page_size: int, prefilled: int) -> list[bytes]:
        return keys(previous, tokens, page_size, len(tokens))

    longer = [p + tokens for p, (tokens, _, _) in zip(load[0], alone, strict=True)], load[1]
    fresh = run(llm, longer)
    llm.engine.scheduler.pool.reset()
    monkeypatch.setattr(scheduler, "next_keys", same_for_all)
    run(llm, load)
    assert run(llm, longer) != fresh


def test_plans_that_treat_rows_differently_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"deterministic: plan 'nanoflow_70b' treats rows differently"):
        make_llm(tmp_path, deterministic=True, plan="nanoflow_70b")
