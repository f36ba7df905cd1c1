"""From a scheduled step to the arrays of a `StepBatch`."""

from __future__ import annotations

import numpy as np

from nanoflow_jax.engine.request import Request
from nanoflow_jax.engine.scheduler import ScheduledStep
from nanoflow_jax.schedule.batch import StepBatch, empty_batch


def build_batch(step: ScheduledStep, num_pages: int, page_size: int) -> StepBatch:
    """Fills a padded batch of the step's shape. Sampled row i belongs to decode chunk i, then (from decode_rows)
    prefill chunk i."""
    shape = step.shape
    batch = empty_batch(shape, num_pages)
    for row, chunk in enumerate(step.decode):
        request, position = chunk.request, chunk.start
        batch.token_ids[row] = request.tokens[position]
        batch.positions[row] = position
        batch.write_pages[row] = request.pages[position // page_size]
        batch.write_slots[row] = position % page_size
        batch.decode_table[row, : len(request.pages)] = request.pages
        batch.decode_lengths[row] = chunk.stop
        _fill_sampling(batch, row, request)
    row = shape.decode_rows
    for segment, chunk in enumerate(step.prefill):
        request, count = chunk.request, chunk.stop - chunk.start
        rows = slice(row, row + count)
        positions = np.arange(chunk.start, chunk.stop, dtype=np.int32)
        pages = np.asarray(request.pages, np.int32)
        batch.token_ids[rows] = request.tokens[chunk.start : chunk.stop]
        batch.positions[rows] = positions
        batch.write_pages[rows] = pages[positions // page_size]
        batch.write_slots[rows] = positions % page_size
        batch.prefill_table[segment, : len(pages)] = pages
        batch.prefill_lengths[segment] = chunk.stop
        row += count
        batch.prefill_starts[segment + 1 :] = row - shape.decode_rows
        batch.sampled[shape.decode_rows + segment] = row - 1
        _fill_sampling(batch, shape.decode_rows + segment, request)
    return batch


def _fill_sampling(batch: StepBatch, row: int, request: Request) -> None:
    sampling, params = batch.sampling, request.params
    sampling.temperature[row] = params.temperature
    sampling.top_p[row] = params.top_p
    sampling.top_k[row] = max(params.top_k, 0)
    sampling.seed[row] = request.seed
    sampling.position[row] = len(request.tokens)
