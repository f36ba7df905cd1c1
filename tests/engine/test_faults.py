"""What goes wrong costs the request at fault, or nobody: everyone else gets the tokens of a calm run, no page leaks,
and the engine goes on."""

from __future__ import annotations

import json
import linecache
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import numpy as np
import pytest

from nanoflow_jax import LLM, SamplingParams
from nanoflow_jax.engine.request import RequestOutput
from tests.engine.engine_driver import assert_idle, crowd, greedy, shared_llm, small_pool, tokens

pytestmark = pytest.mark.usefixtures("no_leak")

Load = tuple[list[list[int]], list[SamplingParams]]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return shared_llm()


@pytest.fixture(scope="module")
def load() -> Load:
    """Twenty-four of the crowd, at most 14 tokens each, every third one with logprobs."""
    prompts, params = crowd()
    shorter = [
        replace(p, max_tokens=min(p.max_tokens or 0, 14), logprobs=None if i % 3 else 1) for i, p in enumerate(params)
    ]
    return prompts[:24], shorter[:24]


@pytest.fixture(scope="module")
def calm(llm: LLM, load: Load) -> list[list[int]]:
    return tokens(llm.generate(*load, use_tqdm=False))


class Unreadable:
    """Tokens whose step failed on the device: nobody knows before they are read."""

    def __init__(self, error: Exception):
        self._error = error

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise self._error


def fails_at(k: int, call: Callable[..., Any], error: BaseException, after: bool = False) -> Callable[..., Any]:
    """`call`, but the k-th time it raises, after it has done its work or instead."""
    count = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == k and not after:
            raise error
        result = call(*args, **kwargs)
        if count == k:
            raise error
        return result

    return wrapped


@pytest.mark.parametrize("k", [1, 2, 9, 40])
def test_a_failing_allocation(
    llm: LLM, load: Load, calm: list[list[int]], monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    """Before or after the pages are taken, at admission or for a decode row."""
    for after in (False, True):
        pool = llm.engine.scheduler.pool
        with monkeypatch.context() as patch:
            patch.setattr(pool, "allocate", fails_at(k, pool.allocate, MemoryError("no memory"), after))
            assert tokens(llm.generate(*load, use_tqdm=False)) == calm


@pytest.mark.parametrize("k", [1, 2, 7, 15])
def test_tokens_that_cannot_be_read(
    llm: LLM, load: Load, calm: list[list[int]], monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    dispatch, count = llm.engine.runner.dispatch, 0

    def sometimes(shape: Any, inputs: Any) -> Any:
        nonlocal count
        count += 1
        output = dispatch(shape, inputs)
        if count != k:
            return output
        return replace(output, sampled=replace(output.sampled, tokens=Unreadable(RuntimeError("a device is lost"))))

    monkeypatch.setattr(llm.engine.runner, "dispatch", sometimes)
    assert tokens(llm.generate(*load, use_tqdm=False)) == calm
    assert count > k


@pytest.mark.parametrize("how", ["dispatch", "read"])
@pytest.mark.parametrize("num_pages", [128, 18])
@pytest.mark.parametrize("which", [0, 11, 23])
def test_one_poison_prompt(
    llm: LLM, load: Load, calm: list[list[int]], monkeypatch: pytest.MonkeyPatch, which: int, num_pages: int, how: str
) -> None:
    """Whatever step it is in fails. It ends with finish_reason "error", and it alone."""
    small_pool(llm, monkeypatch, num_pages, hopeful=True)
    dispatch, engine = llm.engine.runner.dispatch, llm.engine

    def poisoned(shape: Any, inputs: Any) -> Any:
        slots = inputs.slots[inputs.slots < engine.running.count]
        inside = any((r := engine.running.requests[s]) and r.prompt_token_ids == load[0][which] for s in slots)
        error = RuntimeError("it does not agree with me\nand more\nlines")
        if inside and how == "dispatch":
            raise error
        output = dispatch(shape, inputs)
        return replace(output, sampled=replace(output.sampled, tokens=Unreadable(error))) if inside else output

    monkeypatch.setattr(engine.runner, "dispatch", poisoned)
    outputs = llm.generate(*load, use_tqdm=False)
    wrong = outputs.pop(which).outputs[0]
    assert (wrong.finish_reason, wrong.error) == ("error", "RuntimeError: it does not agree with me")
    assert tokens(outputs) == calm[:which] + calm[which + 1 :]
    assert all(o.outputs[0].finish_reason == "length" and o.outputs[0].error is None for o in outputs)


def test_a_text_that_cannot_be_decoded(
    llm: LLM, load: Load, calm: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only of the request that looks for a stop string in it."""
    params = [replace(p, stop="never there" if i == 5 else None, detokenize=i == 5) for i, p in enumerate(load[1])]
    spell, count = llm.tokenizer.token_bytes, 0

    def fails_once(token: int) -> bytes:
        nonlocal count
        count += 1
        if count == 7:
            raise KeyError("no such token")
        return spell(token)

    monkeypatch.setattr(llm.tokenizer, "token_bytes", fails_once)
    outputs = llm.generate(load[0], params, use_tqdm=False)
    wrong = outputs.pop(5).outputs[0]
    assert wrong.finish_reason == "error"
    assert "no such token" in (wrong.error or "")
    assert tokens(outputs) == calm[:5] + calm[6:]


def test_an_error_that_stays_is_raised(
    llm: LLM, load: Load, calm: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that is gone is not blamed on every request in turn, and the engine can be used when it is back."""
    with monkeypatch.context() as patch:

        def gone(*_: Any) -> Any:
            raise RuntimeError("a device is lost")

        patch.setattr(llm.engine.runner, "dispatch", gone)
        with pytest.raises(RuntimeError, match="a device is lost"):
            llm.generate(*load, use_tqdm=False)
    assert_idle(llm)
    assert tokens(llm.generate(*load, use_tqdm=False)) == calm


# -- interruptions


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line that runs in the engine's files."""

    def __init__(self, line: int):
        self.left = line

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if "nanoflow_jax/engine" not in name or name.endswith("outputs.py"):
            return None
        if event == "line" and self.left >= 0:
            self.left -= 1
            # Python sees no signal at a `try`, nor where a `with` is left, on its own line: a lock would stay taken.
            if self.left < 0 and linecache.getline(name, frame.f_lineno).lstrip().startswith(("with ", "try:")):
                self.left = 0
            if self.left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def interrupted(llm: LLM, load: Load, line: int) -> list[RequestOutput | None] | None:
    """What was finished when line number `line` was interrupted; None when the run had fewer lines."""
    sys.settrace(Interrupt(line))
    try:
        llm.generate(*load, use_tqdm=False)
    except KeyboardInterrupt:
        return llm.last_outputs
    finally:
        sys.settrace(None)
    return None


def test_interrupted_anywhere(llm: LLM, load: Load, calm: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """At lines all over the engine, with preemptions: what was finished is kept and right, and the next call too."""
    stats = small_pool(llm, monkeypatch, 20, hopeful=True)
    counter = Interrupt(10**9)
    sys.settrace(counter)
    try:
        assert tokens(llm.generate(*load, use_tqdm=False)) == calm
    finally:
        sys.settrace(None)
    lines, finished, few = 10**9 - counter.left, [], (load[0][:3], load[1][:3])
    assert stats.preemptions > 0
    for line in np.random.default_rng(6).integers(0, lines, 25).tolist():
        if (outputs := interrupted(llm, load, line)) is None:
            continue
        if llm.calls._holder is None:  # else it came just ahead of letting go, which the thread's next call makes good
            assert_idle(llm)
        if not outputs:  # before the first request was queued
            continue
        finished.append(sum(o is not None for o in outputs))
        for output, want in zip(outputs, calm, strict=True):
            assert output is None or output.outputs[0].token_ids == want
        assert tokens(llm.generate(*few, use_tqdm=False)) == calm[:3], f"after line {line}"
    assert len(finished) > 15
    assert 0 < np.mean(finished) < len(calm)
    assert tokens(llm.generate(*load, use_tqdm=False)) == calm


SCRIPT = """
import json, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without one
from nanoflow_jax import LLM, SamplingParams
llm = LLM("tiny", tensor_parallel_size=2, max_model_len=512, decode_slots=8, tokens_per_step=72, page_size=16,
          kv_cache_tokens=4096, progress=False)
params = [SamplingParams(temperature=1.0, seed=i, max_tokens=4 if i < 3 else 400, ignore_eos=True) for i in range(200)]
llm.generate(["12+30="] * 3, params[:3], use_tqdm=False)
step, steps = llm.engine.step, 0
def counted():
    global steps
    steps += 1
    if steps == 50:  # by then the short requests are done, and thousands of steps are left
        print("ready", flush=True)
    return step()
llm.engine.step = counted
try:
    llm.generate(["12+30="] * 200, params, use_tqdm=False)
except KeyboardInterrupt:
    count, done = len(llm.last_outputs), [o.outputs[0].token_ids for o in llm.last_outputs if o is not None]
    text = llm.generate("12+30=", SamplingParams(temperature=0.0, max_tokens=8), use_tqdm=False)[0].outputs[0].text
    print(json.dumps([count, done[:3], text]))
"""


def test_a_real_interrupt() -> None:
    """SIGINT to a process of its own: it keeps what was finished and answers the next question."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    count, done, text = json.loads(out)
    assert count == 200
    assert [len(ids) for ids in done] == [4, 4, 4]
    assert text == "42"


def test_an_interrupt_is_not_lost(llm: LLM, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes where Python drops exceptions, as in a garbage collector's callback, still ends the call; a second
    one does not wait for the step's end."""
    step, swallowed = llm.engine.step, []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def lossy(presses: int) -> Any:
        try:
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            swallowed.append(presses)
        return step()

    try:
        for presses in (1, 2):
            monkeypatch.setattr(llm.engine, "step", lambda presses=presses: lossy(presses))
            with pytest.raises(KeyboardInterrupt):
                llm.generate(*load, use_tqdm=False)
            assert_idle(llm)
        assert swallowed == [2]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_engine_is_as_before(llm: LLM, load: Load, calm: list[list[int]]) -> None:
    """After all of the above."""
    assert tokens(llm.generate(*load, use_tqdm=False)) == calm
    assert len(tokens(llm.generate([[5] * 9], greedy(4), use_tqdm=False))[0]) == 4
