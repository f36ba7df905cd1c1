"""What admission expects of running requests: never too few pages for lengths that come true."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_jax.engine import scheduler
from nanoflow_jax.engine.admission import Expectation, peak_pages
from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.step.batch import StepShape
from tests.engine.fake_device import VOCAB
from tests.engine.fake_engine import Drive, Job, Load


@st.composite
def running(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """remaining, spare, held, page_size of requests that run together."""
    page_size = draw(st.sampled_from([1, 2, 3, 16, 64]))
    count = draw(st.integers(0, 12))
    remaining = draw(st.lists(st.integers(0, 90), min_size=count, max_size=count))
    lengths = draw(st.lists(st.integers(1, 90), min_size=count, max_size=count))
    held = [-(-n // page_size) for n in lengths]
    spare = [h * page_size - n for h, n in zip(held, lengths, strict=True)]
    return np.array(remaining, np.int64), np.array(spare, np.int64), np.array(held, np.int64), page_size


def simulated_peak(remaining: np.ndarray, spare: np.ndarray, held: np.ndarray, page_size: int) -> int:
    """Token by token: the most pages at once beyond those held at the beginning."""
    lengths, most = held * page_size - spare, 0
    for step in range(1, int(remaining.max(initial=0)) + 1):
        growing = remaining >= step
        most = max(most, int((-(-(lengths[growing] + step) // page_size)).sum()))
    return max(0, most - int(held.sum()))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(running())
def test_the_peak_is_never_below_what_happens_and_close_to_it(
    load: tuple[np.ndarray, np.ndarray, np.ndarray, int],
) -> None:
    """Above by less than a page per request: each page is rounded up once."""
    truth, bound = simulated_peak(*load), peak_pages(*load)
    assert truth <= bound <= truth + len(load[0])


def test_the_peak_counts_what_is_given_back() -> None:
    """One ends after 4 tokens and leaves its 10 pages to the other, that grows by 10 pages."""
    remaining, spare, held = np.array([4, 40]), np.array([0, 0]), np.array([10, 1])
    assert simulated_peak(remaining, spare, held, 4) == 2
    assert peak_pages(remaining, spare, held, 4) <= 3


def test_expectation_learns_and_forgets() -> None:
    expectation = Expectation()
    assert expectation.share == 0.5
    for _ in range(50):
        expectation.saw(10, 100)
    assert 0.1 < expectation.share < 0.2
    for _ in range(2000):
        expectation.saw(100, 100)
    assert expectation.share == pytest.approx(1, abs=0.01)
    before = expectation.share
    expectation.saw(0, 0)  # it only wanted its prompt computed: says nothing
    assert expectation.share == before


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 100))), st.integers(0, 100), st.integers(0, 100))
def test_expected_lengths_stay_within_what_is_allowed(seen: list[tuple[int, int]], produced: int, allowed: int) -> None:
    """And one that has passed the mean is never expected to end at once."""
    expectation = Expectation()
    for done, limit in seen:
        expectation.saw(min(done, limit), limit)
    produced = min(produced, allowed)
    (remaining,) = expectation.remaining(np.array([produced]), np.array([allowed])).tolist()
    assert 0 <= remaining <= allowed - produced
    assert remaining > 0 or produced == allowed


def crowd(output: int, allowed: int, slots: int = 8) -> Load:
    """Sixteen requests that may produce `allowed` tokens and end after about `output`, in a pool for three."""
    ends = tuple(range(max(1, VOCAB // output)))  # a token in so many ends a request
    params = SamplingParams(temperature=0.0, max_tokens=allowed, ignore_eos=True, stop_token_ids=ends, seed=0)
    jobs = [Job(tuple((7 * i + place * (i + 1)) % VOCAB for place in range(10)), params) for i in range(16)]
    return Load([StepShape(slots, 24, 4, 18)], 54, 4, jobs, slots, caching=False)


def test_short_answers_let_more_run_together() -> None:
    """By their limit three requests fit; they end early, and after a few more are let in."""
    drive, together = Drive(crowd(output=4, allowed=60)), []
    drive.go(lambda drive: together.append(drive.engine.running.num_running)).check_answers()
    assert max(together) > 4


def test_long_answers_are_not_started_and_preempted_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the limits reached, admission that looks ahead preempts less than admission that does not."""

    def preemptions() -> int:
        drive = Drive(crowd(output=1000, allowed=60))
        drive.engine.scheduler.expectation.saw(1000, 1000)
        return drive.go().engine.scheduler.stats.preemptions

    looking_ahead = preemptions()
    monkeypatch.setattr(scheduler.Scheduler, "_fits_later", lambda *args: True)
    assert looking_ahead < preemptions()


def test_one_request_is_always_let_in() -> None:
    """With nothing running, even when it is expected to need more than all pages."""
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, seed=0)
    load = Load([StepShape(2, 8, 2, 18)], 18, 4, [Job(tuple(range(10)), params)] * 3, 2)
    drive = Drive(load)
    drive.engine.scheduler.expectation.saw(10**6, 1)
    drive.go().check_answers()
