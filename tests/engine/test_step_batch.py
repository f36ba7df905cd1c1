"""`build_batch` against a construction that goes token by token."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from nanoflow_jax.engine.request import Request
from nanoflow_jax.engine.sampling_params import SamplingParams
from nanoflow_jax.engine.scheduler import Chunk, ScheduledStep
from nanoflow_jax.engine.step_batch import build_batch
from nanoflow_jax.schedule.batch import StepBatch, StepShape, empty_batch

NUM_PAGES, PAGE_SIZE = 97, 4


def random_step(rng: np.random.Generator, shape: StepShape) -> ScheduledStep:
    """Some decode rows and chunks of requests whose pages are scattered, with different sampling settings."""
    free = rng.permutation(NUM_PAGES).tolist()
    number = 0

    def request(tokens: int, computed: int) -> Request:
        nonlocal number
        number += 1
        prompt = rng.integers(0, 1000, tokens).tolist()
        params = SamplingParams(
            temperature=float(rng.uniform(0, 2)), top_p=float(rng.uniform(0.1, 1)), top_k=int(rng.integers(-1, 50))
        )
        seed = int(rng.integers(0, 2**32))
        r = Request(number, str(number), None, prompt, params, seed, frozenset(), tokens + 9)
        r.num_computed = computed
        r.pages = [free.pop() for _ in range(-(-tokens // PAGE_SIZE) + int(rng.integers(0, 2)))][
            : shape.pages_per_request
        ]
        return r

    decode = []
    for _ in range(rng.integers(0, shape.decode_rows + 1)):
        tokens = int(rng.integers(1, 12))
        decode.append(Chunk(request(tokens, tokens - 1), tokens - 1, tokens))
    prefill, rows = [], shape.prefill_rows
    for _ in range(rng.integers(0, shape.prefill_segments + 1)):
        if rows == 0:
            break
        tokens, start = int(rng.integers(2, 16)), int(rng.integers(0, 2))
        stop = start + int(rng.integers(1, min(rows, tokens - start) + 1))
        prefill.append(Chunk(request(tokens, start), start, stop))
        rows -= stop - start
    return ScheduledStep(shape, decode, prefill)


def slow(step: ScheduledStep) -> dict[str, Any]:
    """The same, from the field's definitions in `StepBatch`, one element at a time; missing entries do not matter."""
    shape = step.shape
    expected: dict[str, dict[Any, Any]] = {name: {} for name in StepBatch.__dataclass_fields__ if name != "sampling"}
    sampling: dict[str, dict[int, Any]] = {n: {} for n in ("temperature", "top_p", "top_k", "seed", "position")}

    def token(row: int, request: Request, position: int) -> None:
        expected["token_ids"][row] = request.tokens[position]
        expected["positions"][row] = position
        expected["write_pages"][row] = request.pages[position // PAGE_SIZE]
        expected["write_slots"][row] = position % PAGE_SIZE

    def sampled(place: int, row: int, request: Request) -> None:
        expected["sampled"][place] = row
        sampling["temperature"][place] = np.float32(request.params.temperature)
        sampling["top_p"][place] = np.float32(request.params.top_p)
        sampling["top_k"][place] = 0 if request.params.top_k == -1 else request.params.top_k
        sampling["seed"][place] = request.seed
        sampling["position"][place] = len(request.tokens)

    for row, chunk in enumerate(step.decode):
        token(row, chunk.request, chunk.start)
        for i, page in enumerate(chunk.request.pages):
            expected["decode_table"][row, i] = page
        expected["decode_lengths"][row] = chunk.stop
        sampled(row, row, chunk.request)
    for row in range(len(step.decode), shape.decode_rows):
        expected["decode_lengths"][row] = 0
        expected["write_pages"][row] = NUM_PAGES
    row = shape.decode_rows
    expected["prefill_starts"][0] = 0
    for segment, chunk in enumerate(step.prefill):
        for position in range(chunk.start, chunk.stop):
            token(row, chunk.request, position)
            row += 1
        for i, page in enumerate(chunk.request.pages):
            expected["prefill_table"][segment, i] = page
        expected["prefill_lengths"][segment] = chunk.stop
        expected["prefill_starts"][segment + 1] = row - shape.decode_rows
        sampled(shape.decode_rows + segment, row - 1, chunk.request)
    for segment in range(len(step.prefill), shape.prefill_segments):
        expected["prefill_starts"][segment + 1] = row - shape.decode_rows  # empty
        expected["prefill_lengths"][segment] = 0
    for padding in range(row, shape.rows):
        expected["write_pages"][padding] = NUM_PAGES
    return {**expected, "sampling": sampling}


def differences(batch: StepBatch, step: ScheduledStep) -> list[str]:
    wanted = slow(step)
    found = []
    for name, entries in wanted.items():
        if name == "sampling":
            found += [
                f"{k}[{i}]" for k, e in entries.items() for i, v in e.items() if getattr(batch.sampling, k)[i] != v
            ]
        else:
            found += [f"{name}[{i}]" for i, v in entries.items() if getattr(batch, name)[i] != v]
    return found


SHAPES = [StepShape(8, 0, 0, 5), StepShape(1, 8, 1, 4), StepShape(4, 24, 5, 6), StepShape(16, 40, 3, 5)]


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_equals_the_slow_construction(shape: StepShape, seed: int) -> None:
    rng = np.random.default_rng(seed)
    step = random_step(rng, shape)
    batch = build_batch(step, NUM_PAGES, PAGE_SIZE)
    assert differences(batch, step) == []


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes_are_those_compiled_for(shape: StepShape) -> None:
    """A step is compiled for `empty_batch`; a batch of any other shape or dtype would not run."""
    batch = build_batch(random_step(np.random.default_rng(3), shape), NUM_PAGES, PAGE_SIZE)

    def kinds(b: StepBatch) -> list[tuple[tuple[int, ...], np.dtype]]:
        return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(b)]

    assert kinds(batch) == kinds(empty_batch(shape, NUM_PAGES))
    assert batch.sampled.min() >= 0 and batch.sampled.max() < shape.rows


@pytest.mark.parametrize("field", ["positions", "write_pages", "decode_table", "prefill_starts", "sampled"])
def test_the_comparison_sees_one_wrong_entry(field: str) -> None:
    """The broken twin: one entry that matters is off by one."""
    step = random_step(np.random.default_rng(1), StepShape(4, 24, 5, 6))
    assert step.decode and step.prefill
    batch = build_batch(step, NUM_PAGES, PAGE_SIZE)
    array = getattr(batch, field)
    array[(0,) * array.ndim] += 1
    assert differences(batch, step)
