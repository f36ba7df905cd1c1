"""From a scheduled step to what the layers read: `build_inputs` and `resolve` against constructions that go element by
element, and `pack` against itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from nanoflow_jax.engine.request import Request
from nanoflow_jax.engine.scheduler import Chunk, ScheduledStep
from nanoflow_jax.engine.slot_table import SlotTable
from nanoflow_jax.engine.step_batch import build_inputs
from nanoflow_jax.parallel.mesh import AXIS
from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.step.batch import StepBatch, StepShape
from nanoflow_jax.step.slots import (
    SLOT_SPECS,
    SlotSizes,
    SlotState,
    StepInputs,
    empty_inputs,
    pack,
    packed_length,
    resolve,
    unpack,
)  # fmt: skip

NUM_PAGES, PAGE, SLOTS, BIASES, LIMIT = 97, 4, 24, 5, 24
SIZES = SlotSizes(SLOTS, BIASES, LIMIT // PAGE)
SHAPES = [StepShape(8, 0, 0, 6), StepShape(1, 8, 1, 6), StepShape(4, 24, 5, 6), StepShape(16, 40, 3, 6)]


def random_step(rng: np.random.Generator, shape: StepShape) -> tuple[ScheduledStep, SlotTable]:
    """Decode rows (of a token in flight, of a known one that samples, of one that is computed again) and chunks
    (sampling, not sampling, empty), of requests with scattered pages and different settings."""
    running = SlotTable(SLOTS, LIMIT, PAGE, BIASES)
    free = rng.permutation(NUM_PAGES).tolist()
    pick = rng.choice

    def enter(tokens: int) -> int:
        prompt = int(rng.integers(1, tokens + 1))
        params = SamplingParams(
            temperature=float(rng.uniform(0, 2)), top_p=float(rng.uniform(0.1, 1)), top_k=int(rng.integers(-1, 50)),
            min_p=float(rng.uniform(0, 1)), presence_penalty=float(pick([0, 1])), max_tokens=40,
            repetition_penalty=float(pick([1, 2])), min_tokens=int(rng.integers(0, 12)),
            logprobs=[None, 0, 7][rng.integers(3)], prompt_logprobs=[None, None, 3, 5][rng.integers(4)],
        )  # fmt: skip
        number = running.num_running
        request = Request(
            number,
            "",
            None,
            rng.integers(0, 1000, prompt).tolist(),
            params,
            int(rng.integers(2**32)),
            frozenset(),
            LIMIT,
        )
        request.tokens = np.append(request.tokens, rng.integers(0, 1000, tokens - prompt)).astype(np.int32)
        request.scored_from = int(rng.integers(0, 4))
        pages = np.array([free.pop() for _ in range(-(-(tokens + 1) // PAGE))], np.int32)
        biases = (int(rng.integers(BIASES)), int(rng.integers(BIASES + 1)))
        return running.enter(request, [(0, pages)], 0, tokens, biases, len(pages))

    for _ in range(rng.integers(0, 3)):  # slots that have no row in the step
        enter(3)
    decode, positions, samples = [], [], []
    for _ in range(rng.integers(0, shape.decode_rows + 1)):
        tokens = int(rng.integers(2, 12))
        decode.append(enter(tokens))
        kind = rng.integers(3)
        positions.append(tokens if kind == 0 else tokens - 1 if kind == 1 else int(rng.integers(0, tokens - 1)))
        samples.append(kind != 2)
    chunks, rows = [], shape.prefill_rows
    for _ in range(rng.integers(0, shape.prefill_segments + 1)):
        tokens, start = int(rng.integers(2, 16)), int(rng.integers(0, 2))
        count = 0 if rng.integers(6) == 0 else int(rng.integers(0, min(rows, tokens - start) + 1))
        chunks.append(Chunk(enter(tokens), start, start + count, count > 0 and start + count == tokens))
        rows -= count
    step = ScheduledStep(
        shape, np.array(decode, np.int32), np.array(positions, np.int32), np.array(samples, bool), chunks,
        running.epoch.copy(),
    )  # fmt: skip
    return step, running


def slow(step: ScheduledStep, running: SlotTable) -> tuple[dict[str, dict[Any, Any]], dict[str, dict[int, Any]]]:
    """The inputs by their definition, one element at a time; what is not named keeps the padding."""
    names = ("token_ids", "positions", "write_pages", "slots", "prefill_table", "prefill_starts", "targets")
    wanted: dict[str, dict[Any, Any]] = {name: {} for name in (*names, "target_logprobs")}
    sampling: dict[str, dict[int, Any]] = {}
    shape, row = step.shape, step.shape.decode_rows

    def token(row: int, slot: int, position: int) -> None:
        known = position < running.known[slot]
        wanted["token_ids"][row] = running.tokens[slot, position] if known else -1
        wanted["positions"][row] = position
        wanted["write_pages"][row] = running.pages[slot, 0, position // PAGE]

    def settings(place: int, slot: int, length: int) -> None:
        request = running.requests[slot]
        assert request is not None
        p = request.params
        penalised = p.presence_penalty != 0 or p.frequency_penalty != 0 or p.repetition_penalty != 1
        below = length - request.prompt_length < p.min_tokens
        values = {
            "temperature": np.float32(p.temperature), "top_p": np.float32(p.top_p), "top_k": max(0, p.top_k),
            "min_p": np.float32(p.min_p), "seed": request.seed, "position": length,
            "presence_penalty": p.presence_penalty, "frequency_penalty": p.frequency_penalty,
            "repetition_penalty": p.repetition_penalty, "history": slot if penalised else SLOTS,
            "bias": running.bias_below[slot] if below else running.bias[slot],
            "top_logprobs": -1 if p.logprobs is None else p.logprobs,
        }  # fmt: skip
        for name, value in values.items():
            sampling.setdefault(name, {})[place] = value

    for place, slot in enumerate(step.decode.tolist()):
        position = int(step.positions[place])
        token(place, slot, position)
        wanted["slots"][place] = slot
        if step.samples[place]:
            settings(place, slot, position + 1)
    for segment, chunk in enumerate(step.prefill):
        request = running.requests[chunk.slot]
        assert request is not None
        for position in range(chunk.start, chunk.stop):
            token(row, chunk.slot, position)
            top = request.params.prompt_logprobs
            if top is not None and request.scored_from <= position < request.prompt_length - 1:
                wanted["targets"][row - shape.decode_rows] = request.prompt_token_ids[position + 1]
                wanted["target_logprobs"][0] = max(top, wanted["target_logprobs"].get(0, 0))
            row += 1
        for i, page in enumerate(running.pages_of(chunk.slot).tolist()):
            wanted["prefill_table"][segment, i] = page
        wanted["prefill_starts"][segment + 1] = row - shape.decode_rows
        wanted["slots"][shape.decode_rows + segment] = chunk.slot
        if chunk.samples:
            settings(shape.decode_rows + segment, chunk.slot, chunk.stop)
    for segment in range(len(step.prefill), shape.prefill_segments):
        wanted["prefill_starts"][segment + 1] = row - shape.decode_rows
    return wanted, sampling


def differences(inputs: StepInputs, step: ScheduledStep, running: SlotTable) -> list[str]:
    like = empty_inputs(step.shape, NUM_PAGES, SLOTS, BIASES)
    wanted, sampling = slow(step, running)
    pairs = [(name, getattr(like, name), getattr(inputs, name), entries) for name, entries in wanted.items()]
    one, other = like.sampling, inputs.sampling
    pairs += [(name, getattr(one, name), getattr(other, name), sampling.get(name, {})) for name in vars(one)]
    found = []
    for name, whole, mine, entries in pairs:
        for place, value in entries.items():
            whole[place] = value
        if whole.shape != mine.shape or whole.dtype != mine.dtype or (whole != mine).any():
            found.append(name)
    return found


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inputs_equal_the_slow_construction(shape: StepShape, seed: int) -> None:
    step, running = random_step(np.random.default_rng(seed), shape)
    assert differences(build_inputs(step, running, NUM_PAGES, SIZES), step, running) == []


FIELDS = ["token_ids", "positions", "write_pages", "slots", "prefill_table", "prefill_starts", "targets"]


@pytest.mark.parametrize("name", [*FIELDS, "temperature", "seed", "position", "history", "bias"])
def test_the_comparison_sees_one_wrong_entry(name: str) -> None:
    """The broken twin: one entry is off by one."""
    step, running = random_step(np.random.default_rng(1), SHAPES[2])
    inputs = build_inputs(step, running, NUM_PAGES, SIZES)
    array = getattr(inputs if name in FIELDS else inputs.sampling, name)
    array[(0,) * array.ndim] += 1
    assert differences(inputs, step, running) == [name]


# -- packing


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], StepShape(0, 8, 2, 3)], ids=str)
def test_packing_keeps_every_bit(shape: StepShape) -> None:
    """Any bits at all, NaNs among them; from the views that the host fills, and from arrays of one's own."""
    rng = np.random.default_rng(0)
    inputs = empty_inputs(shape, NUM_PAGES, SLOTS, BIASES)
    for leaf in jax.tree.leaves(inputs):
        leaf.view(np.int32)[...] = rng.integers(-(2**31), 2**31, leaf.shape)
    packed = pack(inputs)
    assert packed.dtype == np.int32
    assert packed.size == packed_length(shape)
    np.testing.assert_array_equal(pack(jax.tree.map(np.copy, inputs)), packed)
    back = jax.jit(partial(unpack, shape=shape))(packed)
    for mine, theirs in zip(jax.tree.leaves(inputs), jax.tree.leaves(back), strict=True):
        assert theirs.dtype == mine.dtype
        assert np.asarray(theirs).tobytes() == mine.tobytes()


def test_inputs_are_padding_and_nobody_elses() -> None:
    """What one step wrote is not seen by the next one, although the padding is kept."""
    first, second = (empty_inputs(SHAPES[2], NUM_PAGES, SLOTS, BIASES) for _ in range(2))
    before = pack(second).copy()
    for leaf in jax.tree.leaves(first):
        leaf[...] = 3
    third = empty_inputs(SHAPES[2], NUM_PAGES, SLOTS, BIASES)
    np.testing.assert_array_equal(pack(second), before)
    np.testing.assert_array_equal(pack(third), before)
    assert (third.write_pages == NUM_PAGES).all()
    assert (third.slots == SLOTS).all()
    assert (third.sampling.history == SLOTS).all()
    assert (third.sampling.bias == BIASES).all()
    assert (third.sampling.top_logprobs == -1).all()


# -- resolving


def resolved(
    inputs: StepInputs, tokens: np.ndarray, tables: np.ndarray, shape: StepShape
) -> tuple[StepBatch, np.ndarray]:
    """By definition: what the layers read, and the tables afterwards."""
    decode, after = shape.decode_rows, tables.copy()
    token_ids = inputs.token_ids.copy()
    lengths, decode_table = np.zeros(decode, np.int32), np.zeros((decode, tables.shape[1]), np.int32)
    for row in range(decode):
        slot = int(inputs.slots[row])
        if slot < SLOTS:
            after[slot, inputs.positions[row] // PAGE] = inputs.write_pages[row]
            lengths[row] = inputs.positions[row] + 1
            decode_table[row] = after[slot]
            if token_ids[row] < 0:
                token_ids[row] = tokens[slot]
    prefill_lengths, sampled = np.zeros(shape.prefill_segments, np.int32), list(range(decode))
    for segment in range(shape.prefill_segments):
        slot, (start, stop) = int(inputs.slots[decode + segment]), inputs.prefill_starts[segment : segment + 2].tolist()
        if slot < SLOTS:
            after[slot] = inputs.prefill_table[segment]
        if stop > start:
            prefill_lengths[segment] = inputs.positions[decode + stop - 1] + 1
        sampled.append(decode + stop - 1)
    batch = StepBatch(
        token_ids=token_ids, positions=inputs.positions, write_pages=inputs.write_pages,
        write_slots=inputs.positions % PAGE, decode_table=decode_table, decode_lengths=lengths,
        prefill_table=inputs.prefill_table, prefill_starts=inputs.prefill_starts, prefill_lengths=prefill_lengths,
        sampled=np.array(sampled, np.int32),
    )  # fmt: skip
    return batch, after


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=str)
def test_resolve_by_definition(shape: StepShape, devices: int) -> None:
    """On a mesh as in a step; only rows that are read count: those of slots, and the last ones of chunks."""
    mesh = Mesh(np.array(jax.devices()[:devices]), (AXIS,))

    def step(packed: jax.Array, state: SlotState) -> tuple[StepBatch, SlotState]:
        return resolve(unpack(packed, shape), state, shape, PAGE)

    program = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(P(), SLOT_SPECS), out_specs=(P(), SLOT_SPECS), check_vma=False),
        donate_argnums=(1,),
    )
    for seed in range(12):
        rng = np.random.default_rng(seed)
        scheduled, running = random_step(rng, shape)
        inputs = build_inputs(scheduled, running, NUM_PAGES, SIZES)
        tokens = rng.integers(0, 1000, SLOTS, np.int32)
        tables = rng.integers(0, NUM_PAGES, (SLOTS, SIZES.table_width), np.int32)
        counts, biases = np.zeros((SLOTS, 16), np.uint16), np.zeros((BIASES, 16), np.float32)
        batch, state = program(pack(inputs), SlotState(tokens, tables, counts, biases))
        wanted, after = resolved(inputs, tokens, tables, shape)
        np.testing.assert_array_equal(state.tables, after)
        np.testing.assert_array_equal(state.tokens, tokens)
        read = inputs.slots < SLOTS
        chunks = np.diff(inputs.prefill_starts) > 0
        for name in vars(wanted):
            mine, theirs = getattr(wanted, name), np.asarray(getattr(batch, name))
            if name == "sampled":
                keep = np.concatenate([read[: shape.decode_rows], chunks])
                mine, theirs = mine[keep], theirs[keep]
                assert ((np.asarray(batch.sampled) >= 0) & (np.asarray(batch.sampled) < shape.rows)).all()
            elif name == "decode_table":
                mine, theirs = (x[read[: shape.decode_rows]] for x in (mine, theirs))
            np.testing.assert_array_equal(theirs, mine, err_msg=name)


@pytest.mark.parametrize("shape", [*SHAPES, StepShape(1280, 768, 48, 16), StepShape(5, 3, 1, 7)], ids=str)
def test_what_kernels_read_is_aligned(shape: StepShape) -> None:
    """XLA gives a kernel a slice of the packed vector as an address in it, of which Mosaic wants a multiple of 256."""
    inputs = empty_inputs(shape, NUM_PAGES, SLOTS, BIASES)
    vector = pack(inputs)
    base = vector.__array_interface__["data"][0]
    for name, leaf in vars(inputs).items():
        if name != "sampling":
            assert (leaf.__array_interface__["data"][0] - base) % 256 == 0, name
    assert (inputs.sampling.temperature.__array_interface__["data"][0] - base) % 256 == 0
