"""Models with sliding windows through `LLM`: the tokens of `transformers`, whatever the engine gives back, finds again
or takes away."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from nanoflow_jax import LLM, SamplingParams
from nanoflow_jax.config import ConfigError
from nanoflow_jax.weights.hub import resolve_model
from tests.engine.engine_driver import assert_idle, greedy, small_pool, tokens
from tests.reference.checkpoints import GREEDY_TOKENS, load_reference, write_checkpoint

LENGTH = 112


@cache
def llm_of(case: str, devices: int) -> LLM:
    with TemporaryDirectory() as folder:
        return LLM(
            write_checkpoint(case, Path(folder)), tokenizer=str(resolve_model("tiny")), dtype="float32",
            tensor_parallel_size=devices, max_model_len=LENGTH, decode_slots=8, tokens_per_step=24, page_size=8,
            kv_cache_tokens=5 * LENGTH, progress=False,
        )  # fmt: skip


@pytest.mark.parametrize("case", ["olmo3", "gemma3_new_rope", "mistral_window"])
def test_tokens_with_few_pages(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks of 16 across windows of 8 or 12 tokens, with so few pages that requests are preempted and
    computed again."""
    llm, reference = llm_of(case, 2), load_reference(case)
    windows = llm.engine.scheduler.windows
    assert llm.engine.runner.num_pages == 5 * LENGTH // 8 * len(windows)
    least = sum(-(-LENGTH // 8) if window is None else -(-(window - 1) // 8) + 3 for window in windows)
    stats = small_pool(llm, monkeypatch, least, hopeful=True)
    found = tokens(llm.generate(reference.prompts, greedy(), use_tqdm=False))
    np.testing.assert_array_equal(found, reference.greedy_tokens)
    assert stats.preemptions > 0
    assert_idle(llm)


@pytest.mark.parametrize("case", ["olmo3", "gemma3_new_rope", "mistral_window"])
def test_a_chat_goes_on_from_its_pages(case: str) -> None:
    """A second turn finds all of the first, though its windows' pages are few; and the tokens are those without."""
    llm, reference = llm_of(case, 2), load_reference(case)
    prompt = max(reference.prompts, key=len)
    said = reference.greedy_tokens[reference.prompts.index(prompt)].tolist()
    first = len(prompt) + 20
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    (one,) = llm.generate([prompt], params, use_tqdm=False)
    assert one.outputs[0].token_ids == said[:20]
    (two,) = llm.generate([prompt + said[:20]], params, use_tqdm=False)
    assert two.outputs[0].token_ids == said[20:40]
    assert two.metrics.num_cached_tokens == (first - 1) // 8 * 8
    assert len(prompt) + GREEDY_TOKENS <= LENGTH


def test_windows_save_pages() -> None:
    """Of a request that decodes at 100 tokens: 13 pages where layers see all, and at most three where they see 12."""
    llm = llm_of("gemma3_new_rope", 2)
    most = np.zeros(len(llm.engine.scheduler.windows), int)

    def watch(_: object) -> None:
        run = llm.engine.running
        most[:] = np.maximum(most, (run.filled - run.dropped)[run.computed > 60].max(axis=0, initial=0))

    llm.engine.on_step = watch
    try:
        llm.generate([[5] * 40], greedy(60), use_tqdm=False)
    finally:
        llm.engine.on_step = None
    windows = llm.engine.scheduler.windows
    assert sorted(windows, key=str) == [12, 12, None]
    assert [most[i] for i in range(3)] == [13 if window is None else 3 for window in windows]


def test_what_windows_do_not_do_yet(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^kv_offload_gib: .*sliding window .*; accepted: 0$"):
        LLM(
            write_checkpoint("gemma3", tmp_path), tokenizer=str(resolve_model("tiny")), tensor_parallel_size=1,
            kv_offload_gib=1, progress=False,
        )  # fmt: skip
