"""Several threads on one LLM: each call gets the tokens that it gets alone, whatever the others do or suffer."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nanoflow_jax import LLM, SamplingParams
from nanoflow_jax.engine.calls import Calls
from nanoflow_jax.engine.feed import room_ahead
from nanoflow_jax.engine.request import RequestOutput
from tests.engine.engine_driver import assert_idle, crowd, greedy, shared_llm, tokens

pytestmark = pytest.mark.usefixtures("no_leak")

LIMIT = 120.0  # seconds after which a thread counts as stuck


@pytest.fixture(scope="module")
def llm() -> LLM:
    return shared_llm()


def start(work: Callable[[], Any]) -> Callable[[], Any]:
    """Runs `work` in a thread. Returns what waits for its result, or raises its error."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append((work(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def wait() -> Any:
        thread.join(LIMIT)
        assert found, "stuck"
        result, error = found[0]
        if error is not None:
            raise error
        return result

    return wait


def streamed(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    """Tokens of the last outputs of a stream, whose tokens and texts only grow."""
    last: dict[str, RequestOutput] = {}
    for output in llm.stream(prompts, params):
        if (before := last.get(output.request_id)) is not None:
            old, new = before.outputs[0], output.outputs[0]
            assert new.token_ids[: len(old.token_ids)] == old.token_ids
            assert new.text.startswith(old.text)
        last[output.request_id] = output
    assert all(output.finished for output in last.values())
    return tokens(sorted(last.values(), key=lambda o: int(o.request_id)))


def fed(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    work = (llm.prepare(prompt, p, i) for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)))
    found: dict[int, Any] = {item.key: output for item, output in llm.run_stream(work)}
    return [found[i].outputs[0].token_ids for i in range(len(prompts))]


def test_threads_get_what_they_get_alone(llm: LLM) -> None:
    """Six threads, each with generate, stream, run_stream, score and streams that are given up, in an order of its
    own."""
    prompts, params = crowd()
    alone = tokens(llm.generate(prompts, params, use_tqdm=False))
    pairs = [(prompt[: len(prompt) // 2], prompt[len(prompt) // 2 :]) for prompt in prompts if len(prompt) > 1]
    scores = llm.score(pairs, use_tqdm=False)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(6):
            which = rng.permutation(len(prompts))[: int(rng.integers(1, 12))].tolist()
            mine, how, want = [prompts[i] for i in which], [params[i] for i in which], [alone[i] for i in which]
            match int(rng.integers(5)):
                case 0:
                    assert tokens(llm.generate(mine, how, use_tqdm=False)) == want
                case 1:
                    assert streamed(llm, mine, how) == want
                case 2:
                    assert fed(llm, mine, how) == want
                case 3:
                    which = [i % len(pairs) for i in which]
                    found = llm.score([pairs[i] for i in which], use_tqdm=False)
                    np.testing.assert_allclose([s for s, _ in found], [scores[i][0] for i in which], rtol=1e-4)
                case _:
                    stream = llm.stream(mine, how)
                    next(stream)
                    stream.close()

    for wait in [start(lambda seed=seed: work(seed)) for seed in range(6)]:
        wait()


def test_threads_share_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four calls of one request take hardly more steps than the longest of them, not their sum."""
    step, steps, together = llm.engine.step, 0, threading.Barrier(4)

    def counted() -> Any:
        nonlocal steps
        steps += 1
        time.sleep(0.002)
        return step()

    monkeypatch.setattr(llm.engine, "step", counted)

    def work(prompt: list[int]) -> Any:
        together.wait(LIMIT)
        return llm.generate(prompt, greedy(60), use_tqdm=False)

    for wait in [start(lambda i=i: work([5 + i, 6, 7])) for i in range(4)]:
        assert len(wait()[0].outputs[0].token_ids) == 60
    assert steps < 120


def test_a_half_read_stream_holds_up_nothing(llm: LLM) -> None:
    """Neither its own thread's calls nor those of others, and it goes on with what it would have given."""
    prompts, params = [[5, 6, 7], [8, 9]], [greedy(30), greedy(25)]
    alone = tokens(llm.generate(prompts, params, use_tqdm=False))

    def work() -> list[list[int]]:
        last: dict[str, RequestOutput] = {}
        for count, output in enumerate(llm.stream(prompts, params)):
            last[output.request_id] = output
            if count == 3:
                assert tokens(llm.generate(prompts[0], params[0], use_tqdm=False)) == alone[:1]
                other = start(lambda: llm.generate(prompts, params, use_tqdm=False))
                assert tokens(other()) == alone
        return tokens(list(last.values()))

    assert start(work)() == alone


def test_a_half_read_stream_of_more_than_there_is_room_for(llm: LLM) -> None:
    """What waits for slots is the stream's: a call of the same thread takes it on until there is room for its own."""
    prompts, params = crowd()
    alone = tokens(llm.generate(prompts, params, use_tqdm=False))

    def work() -> list[list[int]]:
        last: dict[str, RequestOutput] = {}
        called = False
        for output in llm.stream(prompts, params):
            last[output.request_id] = output
            if not called and len(llm.engine.scheduler.waiting) >= room_ahead(llm.calls):
                called = True
                assert tokens(llm.generate(prompts[:2], params[:2], use_tqdm=False)) == alone[:2]
        assert called
        return tokens(sorted(last.values(), key=lambda o: int(o.request_id)))

    assert start(work)() == alone


def test_streams_that_nobody_holds_any_more(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector closes one in the middle of a step, in whatever thread: no deadlock, and its requests
    end."""
    alone = tokens(llm.generate([[8, 9]], greedy(10), use_tqdm=False))
    dispatch, given_up = llm.engine.runner.dispatch, [llm.stream([5, 6, 7], greedy(100)) for _ in range(3)]
    for stream in given_up:
        next(stream)

    def collecting(shape: Any, inputs: Any) -> Any:
        if given_up:
            given_up.clear()
            gc.collect()
        return dispatch(shape, inputs)

    monkeypatch.setattr(llm.engine.runner, "dispatch", collecting)
    assert tokens(start(lambda: llm.generate([[8, 9]], greedy(10), use_tqdm=False))()) == alone


def test_an_interrupted_call_leaves_others_running(llm: LLM) -> None:
    """Ctrl-C ends the main thread's call, and nothing of another thread's."""
    alone = tokens(llm.generate([[8, 9]], greedy(100), use_tqdm=False))
    over = threading.Event()

    def until_over() -> list[list[RequestOutput]]:
        return [llm.generate([[8, 9]], greedy(100), use_tqdm=False) for _ in iter(over.is_set, True)]

    other = start(until_over)

    def press() -> None:
        while llm.engine.running.num_running < 3:
            time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)

    pressed = start(press)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(100):
            llm.generate([[5, 6, 7]] * 2, greedy(100), use_tqdm=False)
    pressed()
    over.set()
    found = [tokens(outputs) for outputs in other()]
    assert found == [alone] * len(found) != []


def test_an_interruption_as_the_engine_is_let_go(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead of the lock: the engine is let go all the same, and what ran is ended without another call."""
    alone = tokens(llm.generate([[8, 9]], greedy(10), use_tqdm=False))
    let_go, presses = Calls._let_go, iter([False] * 5 + [True])

    def interrupted(self: Calls, me: int) -> None:
        if next(presses, False):
            raise KeyboardInterrupt
        let_go(self, me)

    monkeypatch.setattr(Calls, "_let_go", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5, 6, 7]], greedy(50), use_tqdm=False)
    assert_idle(llm)
    assert tokens(llm.generate([[8, 9]], greedy(10), use_tqdm=False)) == alone


def test_a_failed_step_is_told_to_all(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that fail whoever is in them: every call tells the error, none comes back with less than it should."""
    alone = tokens(llm.generate([[5, 6, 7]], greedy(20), use_tqdm=False))
    with monkeypatch.context() as patch:

        def gone(*_: Any) -> Any:
            raise RuntimeError("a device is lost")

        patch.setattr(llm.engine.runner, "dispatch", gone)
        for wait in [start(lambda: llm.generate([[5, 6, 7]] * 4, greedy(20), use_tqdm=False)) for _ in range(3)]:
            with pytest.raises(RuntimeError, match="a device is lost"):
                wait()
    assert tokens(llm.generate([[5, 6, 7]], greedy(20), use_tqdm=False)) == alone


def test_an_interrupted_step_is_told_to_all(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is cut short leaves nothing that can be trusted: the calls beside it say so, and can be made
    again."""
    alone = tokens(llm.generate([[5, 6, 7]], greedy(20), use_tqdm=False))
    half_read = llm.stream([8, 9], greedy(50))
    next(half_read)
    dispatch, cut = llm.engine.runner.dispatch, True

    def once(shape: Any, inputs: Any) -> Any:
        nonlocal cut
        if cut:
            cut = False
            raise KeyboardInterrupt
        return dispatch(shape, inputs)

    monkeypatch.setattr(llm.engine.runner, "dispatch", once)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5, 6, 7]], greedy(20), use_tqdm=False)
    with pytest.raises(RuntimeError, match=r"another call .* KeyboardInterrupt"):
        next(half_read)
    assert tokens(llm.generate([[5, 6, 7]], greedy(20), use_tqdm=False)) == alone


def test_the_request_at_fault_is_another_calls(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt whose steps fail ends with an error in its own call; the other call has its tokens."""
    alone = tokens(llm.generate([[8, 9]] * 2, greedy(40), use_tqdm=False))
    dispatch, engine = llm.engine.runner.dispatch, llm.engine

    def poisoned(shape: Any, inputs: Any) -> Any:
        slots = inputs.slots[inputs.slots < engine.running.count]
        if any((r := engine.running.requests[s]) and r.prompt_token_ids == [66, 66] for s in slots):
            raise RuntimeError("poison")
        return dispatch(shape, inputs)

    monkeypatch.setattr(engine.runner, "dispatch", poisoned)
    other = start(lambda: llm.generate([[8, 9]] * 2, greedy(40), use_tqdm=False))
    poison = start(lambda: llm.generate([[66, 66]], greedy(40), use_tqdm=False))
    assert tokens(other()) == alone
    assert poison()[0].outputs[0].finish_reason == "error"
