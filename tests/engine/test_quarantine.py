"""A request that makes steps fail ends with an error, alone; everybody else gets what they would get without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_jax.engine.quarantine import GIVE_UP, Quarantine
from nanoflow_jax.engine.request import Request
from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.step.slots import StepInputs
from tests.engine.fake_device import VOCAB
from tests.engine.fake_engine import Drive, Job, Load

JOBS = 9  # each has its number as the seed, by which the device knows it


def load(num_pages: int = 60, **fields: object) -> Load:
    """Nine requests, some of them with a common prefix."""
    jobs = [
        Job(
            tuple((place * 7 + number // 3) % VOCAB for place in range(5 + number)),
            SamplingParams(temperature=0.0, max_tokens=6 + number, ignore_eos=True, seed=number),
            arrival=number // 4,
        )
        for number in range(JOBS)
    ]
    return replace(Load([StepShape(8, 0, 0, 8), StepShape(8, 24, 4, 8)], num_pages, 4, jobs, 8), **fields)


def sampled(inputs: StepInputs) -> dict[int, int]:
    """Seed -> output tokens before, of the requests that sample in a step."""
    s, real = inputs.sampling, inputs.sampling.position > 0
    return {int(seed): int(p) - 5 - int(seed) for seed, p in zip(s.seed[real], s.position[real], strict=True)}


def poisonous(poison: Sequence[int], at: int, times: float = float("inf")) -> Callable[[StepInputs], bool]:
    """Steps fail in which one of `poison` samples its output token `at` or a later one, so many times."""
    left = times

    def fails(inputs: StepInputs) -> bool:
        nonlocal left
        rows = sampled(inputs)
        fail = left > 0 and any(rows.get(number, -1) >= at for number in poison)
        left -= fail
        return fail

    return fails


POISON = {"the first": [0], "one": [4], "the last": [8], "two": [2, 6], "two side by side": [4, 5]}


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "when read"])
@pytest.mark.parametrize("at", [0, 1, 5])
@pytest.mark.parametrize("who", POISON)
@pytest.mark.parametrize("num_pages", [60, 12])
def test_who_fails_at_a_token_ends_alone(who: str, at: int, at_once: bool, num_pages: int) -> None:
    """At its first token or later, with pages for all and with so few that requests are preempted."""
    drive = Drive(load(num_pages))
    drive.runner.fails, drive.runner.at_once = poisonous(POISON[who], at), at_once
    drive.go(strict=False).check_answers(failed=POISON[who])
    for number in POISON[who]:
        request = drive.requests[number]
        assert request.error == "RuntimeError: the device failed"
        lost = at - len(request.output_token_ids)
        assert 0 <= lost <= at_once, "what it had is kept, but for a token in flight when a dispatch raises"


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "when read"])
@pytest.mark.parametrize("jobs", [1, 2, JOBS])
@pytest.mark.parametrize("times", [1, 2])
def test_a_failure_that_passes_costs_nobody_anything(jobs: int, at_once: bool, times: int) -> None:
    """Also when only one request is running."""
    all_jobs = load()
    drive = Drive(replace(all_jobs, jobs=all_jobs.jobs[:jobs]))
    drive.runner.fails, drive.runner.at_once = poisonous([0], 3, times), at_once
    drive.go(strict=False).check_answers()


def test_who_fails_at_admission_ends_alone() -> None:
    drive = Drive(load())
    drive.tables.refuses = lambda params: params.seed in (0, 5)
    drive.go(strict=False).check_answers(failed=[0, 5])
    assert drive.requests[5].error == "ValueError: not this one"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_failures_at_random(data: st.DataObject) -> None:
    """One or two requests fail from some token on, besides a failure that passes; others are aborted, others come."""
    poison = data.draw(st.lists(st.integers(0, JOBS - 1), min_size=1, max_size=2, unique=True))
    aborts = data.draw(st.dictionaries(st.integers(0, JOBS - 1), st.integers(0, 40), max_size=3))
    late = data.draw(st.dictionaries(st.integers(0, JOBS - 1), st.integers(0, 30), max_size=4))
    passing = data.draw(st.sets(st.integers(1, 60), max_size=1))
    drive = Drive(load(data.draw(st.sampled_from([60, 12])), by_phase=data.draw(st.booleans())))
    drive.jobs = [replace(job, abort_after=aborts.get(i)) for i, job in enumerate(drive.jobs) if i not in late]
    drive.jobs += [replace(drive.load.jobs[i], arrival=late[i]) for i in sorted(late, key=lambda i: (late[i], i))]
    drive.jobs.sort(key=lambda job: job.arrival)
    fails = poisonous(poison, data.draw(st.integers(0, 5)))
    drive.runner.fails = lambda inputs: drive.runner.num_steps in passing or fails(inputs)
    drive.runner.at_once = data.draw(st.booleans())
    drive.go(strict=False)
    by_number = dict(enumerate(job.params.seed for job in drive.jobs))
    drive.check_answers(failed=[n for n, seed in by_number.items() if seed in poison])


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "when read"])
def test_a_persistent_failure_is_raised(at_once: bool) -> None:
    """No request is at fault when one after another fails alone; the engine can be used afterwards."""
    drive = Drive(load())
    drive.runner.fails, drive.runner.at_once = lambda inputs: True, at_once
    with pytest.raises(RuntimeError, match="the device failed"):
        drive.go(strict=False)
    assert len([r for r in drive.requests.values() if r.finish_reason == "error"]) == GIVE_UP - 1
    drive.engine.abort_all()
    assert {r.finish_reason for r in drive.requests.values()} == {"error", "abort"}
    assert not drive.engine.has_work
    drive.check_idle()
    drive.runner.fails = lambda inputs: False
    again = drive.engine.add(None, [1, 2, 3], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
    while drive.engine.has_work:
        drive.engine.step()
    assert again.finish_reason == "length"
    drive.check_idle()


def test_who_comes_during_a_trial_waits_for_its_end() -> None:
    """They are served, but never in a step with the suspects."""
    drive = Drive(load())
    drive.jobs = [replace(job, arrival=0 if i < 6 else 8) for i, job in enumerate(drive.jobs)]
    together: list[set[int]] = []
    fails = poisonous([1], 4)

    def watch(inputs: StepInputs) -> bool:
        if not drive.engine._quarantine.is_open:
            together.append(set(sampled(inputs)))
        return fails(inputs)

    drive.runner.fails = watch
    drive.go(strict=False).check_answers(failed=[1])
    assert together
    assert not any(numbers & {6, 7, 8} for numbers in together)


# -- broken twins


class _BlamesWhoRuns(Quarantine):
    """A request that happens to run alone when a step fails is at fault."""

    def failed(self, suspects: list[Request], error: Exception) -> list[Request]:
        self.tried = self.tried or suspects
        return super().failed(suspects, error)


class _TriesTooSoon(Quarantine):
    """The next group is tried while the last step of the one before is in flight."""

    def progressed(self) -> None:
        super().progressed()
        if self.tried and not self.trial:
            super().progressed()


class _ForgetsTheHeld(Quarantine):
    def _go_on(self) -> None:
        self.held = self.held[1:] if not self.groups else self.held
        super()._go_on()


class _LetsAllIn(Quarantine):
    """The others are not held back during a trial."""

    def _go_on(self) -> None:
        held, self.held = self.held, []
        super()._go_on()
        for request in held:
            self.scheduler.add(request)


@pytest.mark.parametrize("twin", [_BlamesWhoRuns, _TriesTooSoon, _ForgetsTheHeld, _LetsAllIn])
def test_broken_twins_are_found(twin: type[Quarantine]) -> None:
    def tries() -> None:
        for jobs, poison, at, times in ((1, [0], 3, 1), (2, [0, 1], 0, 4), (JOBS, [4], 5, 1000), (4, [1], 2, 3)):
            for at_once in (False, True):
                all_jobs = load()
                drive = Drive(replace(all_jobs, jobs=all_jobs.jobs[:jobs]))
                drive.engine._quarantine = twin(drive.engine.scheduler)
                drive.runner.fails, drive.runner.at_once = poisonous(poison, at, times), at_once
                drive.go(lambda drive: _not_for_ever(drive), strict=False)
                drive.check_answers(failed=[r.number for r in drive.requests.values() if r.error and times > 100])

    with pytest.raises((AssertionError, RuntimeError)):
        tries()


def _not_for_ever(drive: Drive) -> None:
    assert drive.steps < 5 * drive.bound, "no progress"
