"""Comparing runs: what differs, the order, the ratios; and prefix hits in a real run."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from nanoflow_jax.bench import compare
from nanoflow_jax.bench.compare import measure_in_turn, sides
from nanoflow_jax.bench.report import ThroughputOptions, ThroughputReport, text
from nanoflow_jax.bench.timeline import TimedStep, Window, steady_window
from nanoflow_jax.cli import main
from nanoflow_jax.config import ConfigError
from nanoflow_jax.models.registry import read_config
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.weights.hub import EMBEDDED
from nanoflow_jax.workload import load_workload

OPTIONS = ThroughputOptions(
    model="tiny",
    config=read_config(EMBEDDED["tiny"] / "config.json"),
    model_layers=3,
    workload=load_workload("constant:4:4"),
    plan="a",
)


def report(plan: str, options: ThroughputOptions, served: float) -> ThroughputReport:
    names = ("seconds", "share_of_run", "steps", "tokens", "requests_ended", "running_median", "rows_used_mean")
    of_steps = ("step_ms_median", "layer_ms", "gap_ms_median", "dispatch_ms_median", "ramp_seconds")
    window: dict[str, float] = dict.fromkeys((*names, *of_steps), 1.0)
    return ThroughputReport(
        model="tiny", layers=3, model_layers=3, dtype="float32", plan=plan, workload="w", device="d", hardware=None,
        gpus=1, rank_of=None, tokens_per_second_per_gpu=served / 2, served_tokens_per_second_per_gpu=served,
        prefix_hits={"prompt_tokens": 8, "cached_tokens": 6, "share": 0.75}, optimum_tokens_per_second_per_gpu=None,
        share_of_optimum=None, lost={"useful": 1.0}, window=window, weights_seconds=1, compile_seconds=1,
        warmup_seconds=1, options={"requests": options.requests or 77, "tokens_per_step": 8,
        "enable_prefix_caching": options.enable_prefix_caching},
    )  # fmt: skip


@pytest.fixture
def collections(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where runs are made up: one line for each time that what an engine held would be given back, which takes a second
    where many tests ran before."""
    found: list[str] = []
    monkeypatch.setattr(compare, "gc", SimpleNamespace(collect=lambda: found.append("collected")))
    return found


def test_pairs_run_in_turn_with_the_same_requests_and_give_the_median_ratio(collections: list[str]):
    calls: list[tuple[object, bool, int | None]] = []
    speeds = iter([10.0, 5.0, 30.0, 10.0, 50.0, 50.0])

    def measure(options: ThroughputOptions) -> ThroughputReport:
        calls.append((options.plan, options.deterministic, options.requests))
        return report("a", options, next(speeds))

    found = measure_in_turn(OPTIONS, "deterministic", 3, measure)
    assert calls == [("a", False, None), *[("a", True, 77), ("a", False, 77)] * 2, ("a", True, 77)]
    assert len(collections) == len(calls) - 1  # between runs
    assert found.ratios == [2.0, 3.0, 1.0]
    data = found.to_json()
    assert (data["ratio"], data["ratio_range"]) == (2.0, [1.0, 3.0])
    assert data["runs"] == [[10, 30, 50], [5, 10, 50]]
    assert data["compared"] == ["not deterministic", "deterministic"]
    assert [r.served_tokens_per_second_per_gpu for r in found.shown] == [30, 10]
    assert "not deterministic / deterministic: 2.000 times" in found.text()
    assert "median of 3 pairs in turn, 1.000 to 3.000" in found.text()


def test_a_plan_and_a_single_run(collections: list[str]):
    def measure(options: ThroughputOptions) -> ThroughputReport:
        return report(str(options.plan), options, 8.0)

    found = measure_in_turn(OPTIONS, "b", 1, measure)
    assert found.labels == ("a", "b")
    assert found.text() == "a / b: 1.000 times the tokens/s served, in one run"
    assert len(collections) == 1
    assert measure_in_turn(OPTIONS, None, 1, measure).to_json() == {}
    assert len(collections) == 1  # there was none before


def test_options_are_toggled_both_ways():
    for name, field in (("deterministic", "deterministic"), ("no-prefix-caching", "enable_prefix_caching")):
        first, second = sides(OPTIONS, name)
        assert first.options == OPTIONS
        assert second.options == replace(OPTIONS, **{field: not getattr(OPTIONS, field)})
        back = sides(second.options, name)
        assert (back[0].label, back[1].label) == (second.label, first.label)
    assert sides(OPTIONS, "xla-attention")[1].options.attention_backend == "xla"


def test_the_report_says_what_was_computed_and_what_was_found():
    lines = text(report("a", OPTIONS, 8.0)).splitlines()
    assert lines[1].startswith("4.0 tokens/s/GPU (prompt + output, computed)")
    assert lines[2].startswith("8.0 tokens/s/GPU served")
    assert lines[2].endswith("(6 of 8, 75.0%)")
    on_a_cpu = text(replace(report("a", OPTIONS, 8.0), device="cpu"))
    assert on_a_cpu.count("tokens/s/device") == 2 and "/s/GPU" not in on_a_cpu


def test_served_tokens_of_a_window():
    shape = StepShape(4, 4, 1, 1)
    steps = [
        TimedStep(shape, 2, 2, 4, 1, 0, False, 0, i, i + 1.0, prompt_tokens=10 * i, cached_tokens=7 * i)
        for i in range(5)
    ]
    window = Window(tuple(steps), 0.0, 4, 4, 1.0)
    assert (window.tokens, window.prompt_tokens, window.cached_tokens, window.served_tokens) == (20, 40, 28, 48)


def test_a_run_cut_by_time_is_told_to_take_longer():
    steps = [TimedStep(StepShape(4, 4, 1, 1), 2, 2, i, 5, i, False, 0, i, i + 1.0) for i in range(1, 30)]
    with pytest.raises(ConfigError, match=r"29 seconds are too few .* accepted: --seconds 58 or more"):
        steady_window(steps, 500, 100, cut=True)


def test_common_beginnings_are_found_in_a_real_run(capsys: pytest.CaptureFixture[str]):
    """Of 40 prompt tokens, 32 are two full pages that all share."""
    arguments = (
        *("bench", "throughput", "--quiet", "--json", "--model", "tiny", "--layers", "1", "--deterministic"),
        *("--tensor-parallel-size", "2", "--tokens-per-step", "32", "--decode-slots", "16", "--page-size", "16"),
        *("--workload", "shared:36:40:12", "--requests", "120", "--compare", "no-prefix-caching"),
    )
    status = main(arguments)
    printed = capsys.readouterr()
    assert status == 0, printed.err
    found = json.loads(printed.out)
    assert found["compared"] == ["prefix caching", "no prefix caching"]
    assert found["prefix_hits"]["share"] == pytest.approx(32 / 40, abs=0.02)
    computed, served = found["tokens_per_second_per_gpu"], found["served_tokens_per_second_per_gpu"]
    # Of a request 40 + 11 rows are served, 8 + 11 of them computed.
    assert served / computed == pytest.approx(51 / 19, rel=0.1)
    other = found["compare"]
    assert other["prefix_hits"]["cached_tokens"] == 0
    assert other["tokens_per_second_per_gpu"] == other["served_tokens_per_second_per_gpu"]
    assert found["ratio"] == pytest.approx(served / other["served_tokens_per_second_per_gpu"])
    assert other["options"]["requests"] == found["options"]["requests"] == 120


def test_bad_comparisons(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "throughput", "--model", "tiny", "--compare", "determinism"]) == 1
    error = capsys.readouterr().err
    assert "unknown name 'determinism'" in error
    assert error.count("\n") == 1
