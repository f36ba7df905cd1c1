"""The measurement of many samples of a prompt."""

from __future__ import annotations

from nanoflow_jax.bench.samples import SLOTS, measure


def test_samples_are_counted_and_few_are_requests_at_once() -> None:
    found = measure(4, 400)
    assert (found.samples, found.prompts, found.n) == (1600, 4, 400)
    assert found.record_bytes > 1600 * len('{"index": 0, "text": "", "logprobs": null, "finish_reason": "length"}')
    assert 0 < found.most < SLOTS + 100
    assert 0 < found.before <= found.peak
