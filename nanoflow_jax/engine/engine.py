"""The engine: a loop of schedule, run, book, over continuous batching."""

from __future__ import annotations

import numpy as np

from nanoflow_jax.engine.pages import PageAllocator
from nanoflow_jax.engine.request import Request
from nanoflow_jax.engine.runner import Runner
from nanoflow_jax.engine.sampling_params import SamplingParams
from nanoflow_jax.engine.scheduler import Scheduler
from nanoflow_jax.engine.step_batch import build_batch
from nanoflow_jax.schedule.batch import StepShape


class Engine:
    """Takes requests at any time; each `step` moves all of them on and returns those that it finished."""

    def __init__(
        self,
        runner: Runner,
        shapes: list[StepShape],
        *,
        page_size: int,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
        seed: int,
    ):
        self.runner, self.page_size, self.max_model_len = runner, page_size, max_model_len
        self.scheduler = Scheduler(shapes, PageAllocator(runner.num_pages), page_size)
        self._eos, self._seed, self._count = eos_token_ids, seed, 0
        self.num_steps = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def check(self, prompt_token_ids: list[int], vocab_size: int) -> None:
        """Raises ValueError when a prompt can never be served."""
        if not prompt_token_ids:
            raise ValueError("prompt: it is empty; at least one token is needed")
        if len(prompt_token_ids) >= self.max_model_len:
            raise ValueError(
                f"prompt: {len(prompt_token_ids)} tokens; "
                f"accepted: at most {self.max_model_len - 1} (max_model_len - 1)"
            )
        for token in prompt_token_ids:
            if not 0 <= token < vocab_size:
                raise ValueError(f"prompt: token id {token} is outside the vocabulary; accepted: 0 to {vocab_size - 1}")

    def add(self, prompt: str | None, prompt_token_ids: list[int], params: SamplingParams) -> Request:
        """Queues a request. The prompt must have passed `check`."""
        number = self._count
        self._count += 1
        limit = self.max_model_len
        if params.max_tokens is not None:
            limit = min(limit, len(prompt_token_ids) + params.max_tokens)
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(self._eos))
        seed = params.seed
        if seed is None:
            seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1, np.uint32)[0])
        request = Request(number, str(number), prompt, prompt_token_ids, params, seed, frozenset(stops), limit)
        self.scheduler.add(request)
        return request

    def step(self) -> list[Request]:
        """One step of the device. Returns the requests that ended with it."""
        scheduled = self.scheduler.schedule()
        batch = build_batch(scheduled, self.runner.num_pages, self.page_size)
        tokens = self.runner.run(scheduled.shape, batch)
        self.num_steps += 1
        finished = []
        for first, chunks in ((0, scheduled.decode), (scheduled.shape.decode_rows, scheduled.prefill)):
            for i, chunk in enumerate(chunks):
                self.scheduler.computed(chunk, int(tokens[first + i]) if chunk.samples else None)
                if chunk.request.finish_reason:
                    finished.append(chunk.request)
        return finished

    def abort(self, request: Request) -> None:
        self.scheduler.abort(request)


def step_shapes(tokens_per_step: int, decode_slots: int, pages_per_request: int, quantum: int = 8) -> list[StepShape]:
    """The compiled shapes: few decode rows or all of them, each with no prefill, a little, or all that the budget
    leaves.

    A shape is chosen by load, so that one request does not pay for a full step's rows. Rows are multiples of `quantum`,
    as the two sizes given must be.
    """
    few = -(-decode_slots // (8 * quantum)) * quantum
    shapes = []
    for decode in sorted({min(few, decode_slots), decode_slots}):
        most = tokens_per_step - decode
        little = max(-(-64 // quantum), tokens_per_step // (16 * quantum)) * quantum
        for prefill in sorted({0, min(most, little), most}):
            segments = max(1, min(64, prefill // 16))
            shapes.append(StepShape(decode, prefill, segments if prefill else 0, pages_per_request))
    return shapes
