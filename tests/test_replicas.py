"""How replicas are laid out and handed prompts, without Ray; tests/evaluate/test_ray_replicas.py has the real one."""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nanoflow_jax import LLM, SamplingParams, api
from nanoflow_jax.cli import main
from nanoflow_jax.engine.feed import Work
from nanoflow_jax.engine.request import CompletionOutput, RequestMetrics, RequestOutput
from nanoflow_jax.evaluate.journal import manifest_path
from nanoflow_jax.options import LLMOptions
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.replicas import members, process
from nanoflow_jax.replicas.front import TRIES, ReplicaError, Replicas
from nanoflow_jax.replicas.layout import find_layout
from nanoflow_jax.replicas.members import Member, Waits
from nanoflow_jax.replicas.process import About, Growth, Hung, Replica
from nanoflow_jax.step.compile import compile_step
from tests.evaluate.stand_in import StandIn

# -- devices


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with so many GPUs."""

    def make(gpus: int, **variables: str) -> None:
        monkeypatch.setattr("nanoflow_jax.replicas.layout.num_gpus", lambda: gpus)
        for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "RAY_ADDRESS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return make


@pytest.mark.parametrize(
    ("replicas", "size", "found"),
    [(8, 1, (8, 1)), (4, 2, (4, 2)), (2, None, (2, 4)), ("auto", 4, (2, 4)), (3, 2, (3, 2))],
)
def test_a_node_is_cut(node: Callable[..., None], replicas: Any, size: int | None, found: tuple[int, int]) -> None:
    node(8)
    layout = find_layout(LLMOptions("m", data_parallel_size=replicas, tensor_parallel_size=size))
    assert (layout.count(8), layout.devices, layout.on_cpu) == (*found, False)


@pytest.mark.parametrize(
    ("variables", "options", "told"),
    [
        ({}, (4, 4), "data_parallel_size: 4 replicas of 4 GPUs (tensor_parallel_size) wanted, and this machine has 8"),
        ({}, (9, None), "data_parallel_size: 9 replicas of 1 GPUs"),
        ({}, ("auto", 16), "data_parallel_size: 1 replicas of 16 GPUs"),
        ({"RAY_ADDRESS": "head:1"}, (2, None), "tensor_parallel_size: on a Ray cluster"),
        (
            {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"},
            (2, 4),
            "tensor_parallel_size: 4 devices wanted, and each replica has 2",
        ),
    ],
)
def test_more_than_there_is_is_one_line(
    node: Callable[..., None], variables: dict[str, str], options: tuple[Any, int | None], told: str
) -> None:
    node(8, **variables)
    with pytest.raises(ValueError) as error:
        find_layout(LLMOptions("m", data_parallel_size=options[0], tensor_parallel_size=options[1]))
    assert str(error.value).startswith(told) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "all", None])
def test_wrong_numbers(value: Any) -> None:
    with pytest.raises(ValueError, match=r'^data_parallel_size: .* an integer of at least 1, or "auto"$'):
        LLMOptions("m", data_parallel_size=value)


def test_without_ray_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"not installed \(ray\); accepted: pip install "):
        LLM("tiny", data_parallel_size=2)


# -- handing out, with something in the place of Ray


class Failed(Exception):
    """As Ray tells what a method has raised."""

    def __init__(self, cause: Exception | None = None):
        self.cause = cause


class Died(Failed):
    """As Ray tells that an actor has."""


class Ray:
    """Answers at once. `replica` makes an actor's answer to an exchange; Died is the end of it."""

    exceptions = SimpleNamespace(RayActorError=Died, RayError=Failed)

    def __init__(self, answer: Callable[[Any, Work], Any]):
        self.answer, self.killed = answer, list[Actor]()

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor)

    def wait(self, refs: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return list(refs), []

    def get(self, ref: Any) -> Any:
        actor, new = ref
        if new is None:
            return about(actor.number)
        actor.kept += new
        batch, actor.kept = actor.kept[:3], actor.kept[3:]
        return [(work.key, self.answer(actor, work)) for work in batch]


class Actor:
    def __init__(self, number: int):
        self.number, self.kept, self.closed, self.gone = number, [], 0, []
        self.exchange = SimpleNamespace(remote=lambda _, new, gone: (self.gone.extend(gone), (self, tuple(new)))[1])
        self.close = SimpleNamespace(remote=lambda _: setattr(self, "closed", 1))


def about(process: int) -> About:
    return About(process, "node", "", 1, 128, 64, 8, load_plan("sequential"), "cpu")


def made(ray: Ray, count: int = 2) -> Replicas:
    numbers = itertools.count()
    found: Any = Replicas.__new__(Replicas)
    found._ray, found._lock, found._calls = ray, threading.Lock(), itertools.count()
    found._options, found._seeds = LLMOptions("m"), itertools.count()

    def begin(member: Member) -> None:
        member.actor = Actor(next(numbers))
        member.starting = (member.actor, None)

    found._begin = begin
    found.members = [Member(i) for i in range(count)]
    for member in found.members:
        begin(member)
    return found


def output(work: Work) -> RequestOutput:
    done = [CompletionOutput(i, "", [1], "length") for i in range(work.params.n)]
    return RequestOutput("0", None, work.prompt_token_ids, done, RequestMetrics(0.0))


def works(count: int, **params: Any) -> list[Work]:
    return [Work(f"key {i}", None, [i], SamplingParams(**{"temperature": 0.0, **params})) for i in range(count)]


def test_each_prompt_comes_back_once(caplog: pytest.LogCaptureFixture) -> None:
    """With its own key, also where a replica dies in its middle: which is named, and started again."""
    deaths = iter([False] * 10 + [True] + [False] * 10**3)

    def answer(actor: Actor, work: Work) -> RequestOutput:
        if next(deaths):
            raise Died
        return output(work)

    several = made(Ray(answer))
    given = iter([*works(40), None, *works(60)[40:]])
    ended = [item for turn in several.run(given) for item in turn]
    assert sorted(work.key for work, _ in ended) == sorted(work.key for work in works(60))
    assert all(isinstance(o, RequestOutput) and o.prompt_token_ids == w.prompt_token_ids for w, o in ended)
    outputs = [o for _, o in ended if isinstance(o, RequestOutput)]
    assert several.num_rows == sum(len(o.prompt_token_ids) + len(o.outputs[0].token_ids) for o in outputs) > 60
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 1 and "of 2 (process " in told[0] and "has died; it is started again" in told[0]


def test_a_replica_that_says_it_hangs_is_ended_and_named(caplog: pytest.LogCaptureFixture) -> None:
    hangs = iter([False] * 10 + [True] + [False] * 10**3)

    def answer(actor: Actor, work: Work) -> RequestOutput:
        if next(hangs):
            raise Failed(Hung("no step for 601 s"))
        return output(work)

    ray = Ray(answer)
    several = made(ray)
    ended = [item for turn in several.run(works(40)) for item in turn]
    assert sorted(work.key for work, _ in ended) == sorted(work.key for work in works(40))
    assert len(ray.killed) == 1 and ray.killed[0] not in [m.actor for m in several.members]
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 1 and "hangs (no step for 601 s) and is ended; it is started again" in told[0]


def test_silence_counts_while_it_is_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A front that was stopped itself for an hour has heard nothing; the answers may be there."""
    now, there = [0.0], list[Any]()

    def wait(refs: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        now[0] += 0.2
        return [ref for ref in refs if ref in there], []

    monkeypatch.setattr(members, "time", SimpleNamespace(monotonic=lambda: now[0]))
    ray: Any = SimpleNamespace(wait=wait)
    waits = Waits(ray)
    for _ in range(200):  # 40 s
        assert waits.wait(["a", "b"]) == (set(), [])
    now[0] += 3600
    assert waits.wait(["a", "b"]) == (set(), [])
    there.append("a")
    assert waits.wait(["a", "b"]) == ({"a"}, [])
    there.clear()
    late = [waits.wait(["a", "b"])[1] for _ in range(120)]
    assert [found for found in late if found] == [["b"]]


class Engine:
    """In the place of an `LLM` in a replica: makes `step`s until it `goes_on`."""

    def __init__(self, step: Callable[[threading.Event], Any]):
        self.step, self.goes_on = step, threading.Event()

        self.calls, self.tokenizer, self.reasoning = self, None, None

    def feed(self, work: Any) -> Any:
        item = next(work)
        while not self.goes_on.is_set():
            self.step(self.goes_on)
            yield [], []
        yield [(replace(item, scored_from=0), output(item))], []


def compiling_step(goes_on: threading.Event) -> None:
    lowered: Any = SimpleNamespace(compile=lambda **_: goes_on.wait())
    compile_step(lowered, "cpu", None)


@pytest.mark.parametrize(
    ("step", "hangs"), [(threading.Event.wait, True), (compiling_step, False), (lambda _: time.sleep(0.01), False)]
)
def test_an_engine_that_makes_no_step_hangs_unless_it_compiles(
    step: Callable[[threading.Event], Any], hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program of a rare request may take any time to compile, and an answer many steps."""
    ahead = [0.0]
    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=lambda: ahead[0] + time.monotonic()))
    monkeypatch.setattr(process, "feed", lambda engine, work, gone: engine.feed(work))
    monkeypatch.setattr(process, "score_of", lambda found: found)
    engine, replica = Engine(step), cast(Any, Replica.__new__(Replica))
    replica._calls, replica._lock, replica._llm = {}, threading.Lock(), engine
    assert replica.exchange(0, [], []) == []
    ahead[0] += 10**4  # nothing to do for hours
    assert replica.exchange(0, works(1), []) == []
    for _ in range(3):
        ahead[0] += process.STEP_SECONDS / 4
        assert replica.exchange(0, [], []) == []
    ahead[0] += process.STEP_SECONDS / 2
    with pytest.raises(Hung, match=r"^no step for \d+ s$") if hangs else nullcontext():
        assert replica.exchange(0, [], []) == []
    engine.goes_on.set()
    end = time.monotonic() + 10
    while not (found := replica.exchange(0, [], [])):
        assert time.monotonic() < end
    assert found[0][0] == "key 0"


def test_a_replica_that_is_being_made_answers() -> None:
    """Its process is alive, however long it loads and compiles."""
    goes_on = threading.Event()

    def make(**_: Any) -> Any:
        goes_on.wait()
        raise ValueError("model: there is none")

    replica = Replica(make, {}, "", None)
    assert replica.about() is None
    goes_on.set()
    replica._making.join()
    with pytest.raises(ValueError, match=r"^model: there is none$"):
        replica.about()


def test_a_prompt_that_kills_its_replicas_ends_the_run() -> None:
    """The others have their results."""
    killers = []

    def answer(actor: Actor, work: Work) -> RequestOutput:
        if work.prompt_token_ids == [7]:
            killers.append(actor)
            raise Died
        return output(work)

    found = []
    with pytest.raises(ReplicaError, match=f"lost its replica {TRIES + 1} times"):
        for turn in made(Ray(answer), 3).run(works(30)):
            found += turn
    assert len(set(killers)) == TRIES + 1


def test_replicas_that_never_answer_end_the_run() -> None:
    def answer(actor: Actor, work: Work) -> RequestOutput:
        raise Died

    with pytest.raises(ReplicaError, match=r"^data_parallel_size: "):
        list(made(Ray(answer)).run(works(9)))


def test_requests_without_seeds_get_different_ones_here() -> None:
    seeds: list[Any] = []
    several = made(Ray(lambda actor, work: (seeds.append(work.params.seed), output(work))[1]))
    list(several.run(works(20, temperature=1.0)))
    assert None not in seeds and len(set(seeds)) == 20
    seeds.clear()
    list(several.run(works(3, temperature=1.0, seed=5)))
    assert seeds == [5, 5, 5]


def test_so_many_replicas_are_used() -> None:
    """And each is kept full, however large n is: none gets all."""
    for most, n in ((1, 1), (2, 1), (None, 1), (None, 5)):
        used: list[int] = []
        several = made(Ray(lambda actor, work, used=used: (used.append(actor.number), output(work))[1]), 3)
        list(several.run(works(60, temperature=1.0, n=n, seed=1), most))
        assert len(used) == 60 and set(used) == set(range(most or 3))
        assert max(map(used.count, set(used))) <= 60 // (most or 3) + 12


def test_a_closed_run_ends_what_the_replicas_have() -> None:
    several = made(Ray(lambda actor, work: output(work)))
    run = several.run(works(100))
    while not next(run):
        pass
    run.close()
    assert [m.actor.closed for m in several.members] == [1, 1]


def test_the_fewest_tokens_in_flight_get_the_next_prompt() -> None:
    used: list[tuple[int, int | None]] = []
    several = made(Ray(lambda actor, work: (used.append((actor.number, work.params.max_tokens)), output(work))[1]))
    list(several.run([*works(1, max_tokens=100), *works(5, max_tokens=10)]))
    assert sorted(used) == [(0, 100)] + [(1, 10)] * 5


def test_what_is_not_wanted_any_more_is_told_to_its_replica_and_forgotten() -> None:
    """And a prompt of which a part was handed on ends with an error when its replica dies; others are tried again."""
    part = Growth(CompletionOutput(0, "a", [1]), RequestMetrics(0.0), None)
    wanted, unwanted, begun = works(3)

    def answer(actor: Actor, work: Work) -> Any:
        if work.prompt_token_ids == [0] and actor.number < 2:
            raise Died
        return output(work) if work.prompt_token_ids == [0] else part

    several = made(Ray(answer), 1)
    for member in several.members:
        member.actor.number = 0
    gone: deque[Work] = deque()
    given = iter([begun, unwanted, None, None, wanted, None, None, None])
    found: list[tuple[Work, Any]] = []
    actor: Any = several.members[0].actor
    for _, turn in zip(range(500), several.watch(given, gone=gone), strict=False):
        found += turn
        if (unwanted, part) in found and not gone and not actor.gone:
            gone.append(unwanted)
    assert actor.gone == [1]
    ((_, lost),) = [item for item in found if item[0] is begun and item[1] is not part]
    assert lost.outputs[0].finish_reason == "error"
    assert lost.outputs[0].error == "replica 1 of 1 has died while it answered; try again"
    assert [item[1].outputs[0].finish_reason for item in found if item[0] is wanted] == ["length"]


# -- what a run's manifest says


def test_the_manifest_names_the_plan_that_the_replicas_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], node: Callable[..., None]
) -> None:
    """Also of a run that is continued; another plan is refused before a record of it is written, and told."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f'{{"prompt": "{i}+1="}}\n' for i in range(4)))
    command = ["batch", "-i", str(source), "-o", str(out), "--data-parallel-size=2", "--quiet"]
    node(2)
    one, two = load_plan("sequential"), replace(load_plan("two_all_reduce"), name="two")

    def run(plan: Any, stop: int, options: tuple[str, ...] = ()) -> tuple[int, str, int]:
        llm: Any = StandIn()
        llm.plan, llm.replicas, llm.close = plan, SimpleNamespace(device_kind="H100"), lambda: None
        answered = llm.run_stream

        def some(work: Any, between: Any = None) -> Any:
            for i, item in enumerate(answered(work, between)):
                if i == stop:
                    raise ValueError("stopped")
                yield item

        llm.run_stream = some
        monkeypatch.setattr(api, "LLM", lambda *_, **__: llm)
        status = main([*command, *options])
        return status, capsys.readouterr().err, out.read_bytes().count(b"\n") if out.exists() else 0

    def plan() -> str:
        return json.loads(manifest_path(out).read_text())["identity"]["plan"]

    status, err, lines = run(one, 1)
    assert (status, lines, plan()) == (1, 1, one.identity), err
    status, err, lines = run(two, 9)
    assert (status, lines, plan()) == (1, 1, one.identity)
    assert f"plan was {one.identity} and is {two.identity} on H100" in err and err.count("\n") == 1
    assert run(one, 1)[2] == 2
    status, err, lines = run(two, 9, options=("--allow-changed",))
    assert (status, lines, plan()) == (0, 4, two.identity), err
