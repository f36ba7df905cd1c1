"""A leading and a following engine on fake devices: the follower runs the same steps, from the messages alone."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_jax.engine.engine import step_shapes
from nanoflow_jax.engine.multiprocess import (
    FollowerEngine,
    LeaderEngine,
    MultiprocessEngine,
    params_fields,
    params_from,
)
from nanoflow_jax.engine.pages import root_key
from nanoflow_jax.parallel.processes import PeerError
from nanoflow_jax.sampling_params import SamplingParams, StructuredOutputsParams
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.step.slots import SlotSizes, StepInputs, pack
from tests.engine.fake_device import EOS, VOCAB, FakeRunner, FakeTables, Letters, letters

PAGE, LONGEST = 4, 64
FORM = [letters([8, 9, 10, 11]), letters([9, 9, 9]), letters(range(30, 39))]
SHAPES = step_shapes(16, 8, LONGEST // PAGE, 4)


class Link:
    """Stands for `Processes`: messages through JSON, as on their way to another process."""

    def __init__(self, rank: int, sent: list[str]):
        self.rank, self.count, self.sent, self.forgotten = rank, 2, sent, -1

    def send(self, message: dict[str, Any]) -> int:
        self.sent.append(json.dumps(message))
        return len(self.sent) - 1

    def forget(self, number: int) -> None:
        self.forgotten = max(self.forgotten, number)

    def waiting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def explain(self, error: Exception) -> PeerError:
        return PeerError(str(error))


class Runner(FakeRunner):
    """Keeps all inputs, to compare."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.inputs: list[bytes] = []
        self.on_dispatch: Any = None

    def dispatch(self, shape: StepShape, inputs: StepInputs) -> Any:
        packed = pack(inputs).copy()
        self.on_dispatch(packed)
        self.inputs.append(packed.tobytes())
        return super().dispatch(shape, inputs)


def make(kind: type[MultiprocessEngine], link: Link) -> Any:
    runner = Runner(SlotSizes(8, 4, LONGEST // PAGE), 40, PAGE)
    fakes: list[Any] = [link, runner, FakeTables(runner), Letters()]
    return kind(
        fakes[0], fakes[1], SHAPES, fakes[2], fakes[3], max_model_len=LONGEST, vocab_size=VOCAB, eos_token_ids=(EOS,),
        seed=3, root=root_key("a model"),
    )  # fmt: skip


class Pair:
    def __init__(self) -> None:
        self.sent: list[str] = []
        self.leader: LeaderEngine = make(LeaderEngine, Link(0, self.sent))
        self.follower: FollowerEngine = make(FollowerEngine, Link(1, self.sent))
        self.followed = 0

    def turn(self) -> None:
        self.leader.step()
        self.follow()

    def follow(self) -> None:
        while self.followed < len(self.sent):
            self.follower.follow(json.loads(self.sent[self.followed]))
            self.followed += 1


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(count)
    return [rng.integers(8, VOCAB, int(rng.integers(1, 30))).tolist() for _ in range(count)]


def settings(i: int) -> SamplingParams:
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0, "stop": ["C", "DE"], "min_tokens": 2},
        {"logit_bias": {3: -5.0, 9: 2.5}, "presence_penalty": 0.5},
        {"allowed_token_ids": {8, 9, 10, 11}, "logprobs": 2, "ignore_eos": True},
        {"stop_token_ids": (12, 13), "seed": 7, "prompt_logprobs": 0},
        {"structured_outputs": StructuredOutputsParams(choice=FORM), "logprobs": 1},
    ]
    return SamplingParams(max_tokens=12, **kinds[i % len(kinds)])


def test_the_follower_dispatches_what_the_leader_dispatches() -> None:
    pair = Pair()
    requests = []
    for i, prompt in enumerate(prompts(25)):
        requests.append(
            pair.leader.add(None, prompt, settings(i), watched=i % 7 == 0, max_tokens=0 if i % 7 == 4 else None)
        )
        if i % 3 == 0:
            pair.turn()
        if i in (8, 14):
            pair.leader.abort(requests[i - 2])
    while pair.leader.has_work:
        pair.turn()
    pair.turn()
    leader, follower = pair.leader.runner, pair.follower.runner
    assert isinstance(leader, Runner) and isinstance(follower, Runner)
    assert len(leader.inputs) > 20 and follower.inputs == leader.inputs
    assert {r.finish_reason for r in requests} == {"stop", "length", "abort"}
    formed = [r for r in requests if r.params.structured_outputs and r.finish_reason == "stop"]
    assert len(formed) >= 2 and {letters(r.output_token_ids) for r in formed} <= set(FORM)
    assert not pair.follower._requests, "requests that have ended are kept"
    assert not pair.follower.has_work
    link = pair.leader.processes
    assert isinstance(link, Link) and link.forgotten > 20


def test_after_an_interruption_both_are_empty_and_go_on() -> None:
    pair = Pair()
    for i, prompt in enumerate(prompts(5)):
        pair.leader.add(None, prompt, settings(i))
    for _ in range(3):
        pair.turn()
    pair.leader.abort_all()
    again = pair.leader.add(None, [9, 10, 11], SamplingParams(max_tokens=5, ignore_eos=True))
    while pair.leader.has_work:
        pair.turn()
    assert again.finish_reason == "length" and not pair.follower.has_work and not pair.follower._requests
    assert pair.follower.digest == pair.leader.digest


def test_a_follower_that_differs_says_so_at_the_next_step() -> None:
    pair = Pair()
    pair.leader.add(None, [9, 10, 11], SamplingParams(max_tokens=5, ignore_eos=True))
    pair.leader.step()
    message = json.loads(pair.sent[0])
    message["step"][0][1][2] = 12  # another last token
    pair.follower.follow(message)
    pair.followed = 1
    with pytest.raises(PeerError, match=r"^process 1 of 2 has run other steps than process 0"):
        pair.turn()


def test_a_step_that_fails_ends_the_run() -> None:
    pair = Pair()
    pair.leader.add(None, [9, 10, 11], SamplingParams(max_tokens=5))
    runner = pair.leader.runner
    assert isinstance(runner, Runner)
    runner.fails = lambda inputs: True
    with pytest.raises(PeerError, match="the device failed"):
        pair.turn()


texts = st.text(max_size=5).filter(bool)
tokens = st.integers(0, VOCAB - 1)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "n": st.integers(1, 4),
            "temperature": st.floats(0, 5),
            "top_p": st.floats(0.01, 1),
            "top_k": st.integers(-1, 50),
            "seed": st.none() | st.integers(0, 2**31),
            "max_tokens": st.none() | st.integers(1, 100),
            "stop": st.none() | texts | st.lists(texts, max_size=3),
            "stop_token_ids": st.lists(tokens, max_size=3) | st.sets(tokens, max_size=3),
            "logit_bias": st.none() | st.dictionaries(tokens, st.floats(-100, 100), max_size=3),
            "allowed_token_ids": st.none() | st.sets(tokens, min_size=1, max_size=4),
            "logprobs": st.none() | st.integers(0, 5),
            "detokenize": st.booleans(),
            "structured_outputs": st.none()
            | st.builds(StructuredOutputsParams, json=st.sampled_from(['{"type": "object"}', {"enum": [1]}]))
            | st.builds(StructuredOutputsParams, choice=st.lists(texts, min_size=1)),
        },
    )
)
def test_sampling_params_survive_the_way(options: dict[str, Any]) -> None:
    try:
        params = SamplingParams(**options)
    except ValueError:  # a combination that is not accepted
        return
    back = params_from(json.loads(json.dumps(params_fields(params))))

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, (list, tuple, set, frozenset)) else value

    for name in SamplingParams.__dataclass_fields__:
        assert plain(getattr(back, name)) == plain(getattr(params, name)), name
