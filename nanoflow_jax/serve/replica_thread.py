"""Replicas behind an event loop: the same for its requests as the engine's thread.

event loop   submit | cancel                      texts, JSON, sockets
thread             hand out, wait, take what has come, hand over | ...
replica                  step, step, step: parts of what is watched, outputs of what has ended
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace

from nanoflow_jax.engine.feed import Work
from nanoflow_jax.engine.request import CompletionOutput, RequestMetrics, RequestOutput
from nanoflow_jax.replicas.front import Replicas
from nanoflow_jax.replicas.process import Found, Growth
from nanoflow_jax.serve.engine_thread import Distant, Exchange, News, Worker


class ReplicaThread(Worker):
    def __init__(self, replicas: Replicas, on_death: Callable[[], None] = lambda: None):
        self._replicas = replicas
        self._place: dict[Work, tuple[Exchange, int]] = {}  # of prompts that have not ended
        self._gone: deque[Work] = deque()
        self._news: list[tuple[Exchange, News]] = []
        super().__init__(on_death)

    def counts(self) -> dict[str, int]:
        return self._replicas.counts()

    def _work(self) -> None:
        with closing(self._replicas.watch(self._source(), gone=self._gone)) as turns:
            for turn in turns:
                if self._stopping:
                    return
                for work, found in turn:
                    self._take(work, found)
                self._hand_over()

    def _source(self) -> Iterator[Work | None]:
        while True:
            self._hand_over()
            with self._wanted:
                while not (
                    self._new or self._cancelled or self._stopping or self._turns or (self._ready and self._news)
                ):
                    self._wanted.wait()
                if self._stopping:
                    return
                new, self._new = self._new, []
                cancelled, self._cancelled = self._cancelled, []
            works = [work for exchange in new for work in self._begin(exchange)]
            for exchange in cancelled:
                self._end(exchange)
            yield from [work for work in works if work in self._place]
            if self._turns:
                yield None

    @property
    def _turns(self) -> bool:
        """Whether there is something to hear of the replicas: of prompts, or of one that is started again."""
        return bool(self._place) or self._replicas.num_ready < len(self._replicas.members)

    def _begin(self, exchange: Exchange) -> list[Work]:
        works = [replace(work, watched=exchange.watched) for work in exchange.work]
        exchange.outputs = [RequestOutput("", w.prompt, w.prompt_token_ids, [], RequestMetrics(0.0)) for w in works]
        exchange.requests = [
            [Distant(i, w.params, w.prompt_token_ids, RequestMetrics(0.0)) for i in range(w.completions)] for w in works
        ]
        self._place |= {work: (exchange, place) for place, work in enumerate(works)}
        return works

    def _end(self, exchange: Exchange) -> None:
        gone = [work for work, (other, _) in self._place.items() if other is exchange]
        for work in gone:
            del self._place[work]
        self._gone += gone
        self._news = [(other, news) for other, news in self._news if other is not exchange]
        self._forget(sum(not one.finish_reason for group in exchange.requests for one in group))

    def _take(self, work: Work, found: Found) -> None:
        if (place := self._place.get(work)) is None:  # cancelled
            return
        exchange, number = place
        group = exchange.requests[number]
        if isinstance(found, Growth):
            one = group[found.part.index]
            assert isinstance(one, Distant)
            one.prompt_logprobs = one.prompt_logprobs or found.prompt_logprobs
            self._grow(exchange, one, found.part, found.metrics)
            return
        assert isinstance(found, RequestOutput)
        del self._place[work]
        exchange.outputs[number] = found
        for one, output in zip(group, found.outputs, strict=True):
            assert isinstance(one, Distant)
            if not one.finish_reason:
                self._grow(exchange, one, output, found.metrics)

    def _grow(self, exchange: Exchange, one: Distant, part: CompletionOutput, metrics: RequestMetrics) -> None:
        one.num_generated += len(part.token_ids)
        if not part.finish_reason:
            self._news.append((exchange, (one, part)))
            return
        one.finish_reason, one.error, one.metrics, one.last = part.finish_reason, part.error, metrics, part
        self._forget(1)
        self._news.append((exchange, (one, None)))

    def _hand_over(self) -> None:
        with self._wanted:
            if not self._ready or not self._news:
                return
            self._ready = False
        news, self._news = self._news, []
        self._call_loop(self._deliver, news, None)
