"""What a server counts, in Prometheus' text format (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping

from nanoflow_jax.engine.request import Request
from nanoflow_jax.serve.engine_thread import Distant

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)  # bounds of the histograms
Labels = tuple[tuple[str, str], ...]


class Histogram:
    """Of seconds."""

    def __init__(self) -> None:
        self._counts, self._sum = [0] * (len(SECONDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(SECONDS, seconds)] += 1
        self._sum += seconds

    def samples(self) -> Iterable[tuple[str, Labels, float]]:
        total = 0
        for bound, count in zip((*map(str, SECONDS), "+Inf"), self._counts, strict=True):
            total += count
            yield "_bucket", (("le", bound),), total
        yield "_sum", (), self._sum
        yield "_count", (), total


class Metrics:
    """Counts of a server; its methods are called on the event loop."""

    def __init__(self) -> None:
        self._answers: Counter[tuple[str, int]] = Counter()  # by endpoint and status
        self._ends: Counter[str] = Counter()  # completions by finish_reason
        self._prompt_tokens = self._output_tokens = self._cached_tokens = 0
        self._first, self._whole = Histogram(), Histogram()

    def answered(self, endpoint: str, status: int) -> None:
        self._answers[endpoint, status] += 1

    def gone(self, completions: int) -> None:
        """Their client went away."""
        self._ends["cancelled"] += completions

    def ended(self, request: Request | Distant) -> None:
        times = request.metrics
        self._ends[request.finish_reason or "abort"] += 1
        if not request.index:
            self._prompt_tokens += request.prompt_length
        self._output_tokens += request.num_generated
        self._cached_tokens += times.num_cached_tokens
        if times.first_token_time is not None:
            self._first.add(times.first_token_time - times.arrival_time)
        if times.finished_time is not None:
            self._whole.add(times.finished_time - times.arrival_time)

    def text(self, engine: Mapping[str, int], load: int) -> str:
        """engine: `engine_counts`; load: completions that are in its hands, running or waiting."""
        running = engine.get("running", 0)
        answers = [
            ((("endpoint", path), ("status", str(code))), n) for (path, code), n in sorted(self._answers.items())
        ]
        ends = [((("finish_reason", reason),), n) for reason, n in sorted(self._ends.items())]
        lines: list[str] = []
        for name, kind, told, values in (
            ("requests_total", "counter", "HTTP requests that were answered.", answers),
            ("completions_total", "counter", "Completions that have ended.", ends),
            ("prompt_tokens_total", "counter", "Tokens of their prompts.", self._prompt_tokens),
            ("generated_tokens_total", "counter", "Tokens of their outputs.", self._output_tokens),
            ("cached_tokens_total", "counter", "Prompt tokens found in the prefix cache.", self._cached_tokens),
            ("preemptions_total", "counter", "Completions put back for want of pages.", engine.get("preemptions", 0)),
            ("steps_total", "counter", "Steps of the engine.", engine.get("steps", 0)),
            ("completions_running", "gauge", "Completions that have a slot.", running),
            ("completions_waiting", "gauge", "Completions that wait for one.", max(load - running, 0)),
            ("slots", "gauge", "Completions that can run at once.", engine.get("slots", 0)),
            ("kv_pages", "gauge", "Pages of the KV cache.", engine.get("pages", 0)),
            ("kv_pages_in_use", "gauge", "Of these, held by completions.", engine.get("pages_in_use", 0)),
        ):  # fmt: skip
            many = values if isinstance(values, list) else [((), values)]
            lines += _head(name, kind, told) + [_sample(name, labels, value) for labels, value in many]
        for name, told, histogram in (
            ("time_to_first_token_seconds", "From arrival to the first token.", self._first),
            ("completion_seconds", "From arrival to the end.", self._whole),
        ):
            lines += _head(name, "histogram", told)
            lines += [_sample(name + suffix, labels, value) for suffix, labels, value in histogram.samples()]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, told: str) -> list[str]:
    return [f"# HELP nanoflow_{name} {told}", f"# TYPE nanoflow_{name} {kind}"]


def _sample(name: str, labels: Labels, value: float) -> str:
    marks = ",".join(f'{label}="{text}"' for label, text in labels)
    return f"nanoflow_{name}{{{marks}}} {value}" if marks else f"nanoflow_{name} {value}"
