"""From a scheduled step to the arrays that the host sends."""

from __future__ import annotations

import numpy as np

from nanoflow_jax.engine.scheduler import ScheduledStep
from nanoflow_jax.engine.slot_table import SlotTable
from nanoflow_jax.step.slots import SlotSizes, StepInputs, empty_inputs, sampling_settings

IN_FLIGHT = -1  # a decode row's token that only the device knows


def build_inputs(step: ScheduledStep, running: SlotTable, num_pages: int, sizes: SlotSizes) -> StepInputs:
    """Fills the padded inputs of the step's shape. Sampled row i belongs to decode row i, then (from decode_rows) to
    prefill chunk i."""
    shape, page_size = step.shape, running.page_size
    inputs = empty_inputs(shape, num_pages, sizes.slots, sizes.bias_rows)
    slots, positions, n = step.decode, step.positions, len(step.decode)
    inputs.token_ids[:n] = IN_FLIGHT
    again = np.flatnonzero(positions < running.known[slots])  # tokens that the host knows: computed once more
    inputs.token_ids[again] = running.tokens[slots[again], positions[again]]
    inputs.positions[:n] = positions
    write_pages = inputs.write_pages.reshape(running.pages.shape[1], -1)
    places = positions // page_size
    for table, of_table in enumerate(write_pages):
        of_table[:n] = running.pages[slots, table, places]
    inputs.slots[:n] = slots
    row, first = shape.decode_rows, shape.decode_rows
    for segment, chunk in enumerate(step.prefill):
        slot, count = chunk.slot, chunk.stop - chunk.start
        rows = slice(row, row + count)
        chunk_positions = np.arange(chunk.start, chunk.stop, dtype=np.int32)
        inputs.token_ids[rows] = running.tokens[slot, chunk.start : chunk.stop]
        inputs.positions[rows] = chunk_positions
        places = chunk_positions // page_size
        tables = inputs.prefill_table[segment].reshape(len(write_pages), -1)
        dropped, filled = running.dropped[slot].tolist(), running.filled[slot].tolist()
        for table, (first_held, last_held) in enumerate(zip(dropped, filled, strict=True)):
            own = running.pages[slot, table]
            write_pages[table, rows] = own[places]
            tables[table, first_held:last_held] = own[first_held:last_held]
        row += count
        inputs.prefill_starts[segment + 1] = row - first
        inputs.slots[first + segment] = slot
        _want_scores(inputs, running, slot, chunk.start, rows.start - first, count)
    inputs.prefill_starts[len(step.prefill) + 1 :] = row - first

    _fill_sampling(inputs, step, running)
    return inputs


def constrained_rows(step: ScheduledStep, running: SlotTable) -> list[tuple[int, int]]:
    """Sampled rows of the step whose requests are constrained: row and slot."""
    constrained, first = running.constrained, step.shape.decode_rows
    found = [(row, int(step.decode[row])) for row in np.flatnonzero(step.samples & constrained[step.decode]).tolist()]
    return found + [(first + i, c.slot) for i, c in enumerate(step.prefill) if c.samples and constrained[c.slot]]


def _fill_sampling(inputs: StepInputs, step: ScheduledStep, running: SlotTable) -> None:
    """Rows that do not sample take neutral settings, which cost nothing and change no history."""
    n, first, chunks = len(step.decode), step.shape.decode_rows, step.prefill
    slots = inputs.slots.astype(np.intp)
    slots[:n][~step.samples] = running.count
    slots[first : first + len(chunks)] = [c.slot if c.samples else running.count for c in chunks]
    running.settings.take(slots, axis=1, out=sampling_settings(inputs), mode="clip")
    length = inputs.sampling.position  # tokens of each sequence ahead of the sampled one
    length[:n] = np.where(step.samples, step.positions + 1, 0)
    length[first : first + len(chunks)] = [c.stop if c.samples else 0 for c in chunks]
    below = np.flatnonzero(length < running.min_length.take(slots, mode="clip"))
    below = below[slots[below] < running.count]
    inputs.sampling.bias[below] = running.bias_below[slots[below]]


def _want_scores(inputs: StepInputs, running: SlotTable, slot: int, start: int, row: int, count: int) -> None:
    """Targets of a chunk that starts at `row` of the prefill rows: after position i, the token at i + 1."""
    request = running.requests[slot]
    assert request is not None
    if (wanted := request.next_score) is None:
        return
    first, last = max(start, wanted), min(start + count, int(running.prompt_length[slot]) - 1)
    if first < last:
        inputs.targets[row + first - start : row + last - start] = running.tokens[slot, first + 1 : last + 1]
        assert request.params.prompt_logprobs is not None
        inputs.target_logprobs[0] = max(inputs.target_logprobs[0], request.params.prompt_logprobs)
