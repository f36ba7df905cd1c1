"""The bias and count tables: which vectors share a row, what is written to the device, and that the sampler obeys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.step.sampler_tables import (
    TOKENS_PER_WRITE,
    BiasRows,
    BiasVector,
    SamplerTables,
    build_bias_writer,
    build_history_writer,
    history_writes,
)
from nanoflow_jax.step.slots import SLOT_SPECS, KVCache, SlotSizes, SlotState, StepState
from tests.step.sampler_driver import MESHES, NO_ROW, Case, make_mesh, sample_on, settings

VOCAB = 2176  # more than two writes; 272 columns on each of 8 devices
SLOTS, BIAS_ROWS = 3, 4

# -- vectors


def dense(vector: BiasVector | None, vocab: int) -> np.ndarray:
    """float32 [vocab]: what the vector adds."""
    if vector is None:
        return np.zeros(vocab, np.float32)
    out = np.full(vocab, vector.fill, np.float32)
    out[np.frombuffer(vector.ids, np.int32)] = np.frombuffer(vector.values, np.float32)
    return out


@pytest.mark.parametrize(
    ("fields", "forbidden", "expected"),
    [
        ({}, (), [0, 0, 0, 0, 0]),
        ({}, [1, 4], [0, -np.inf, 0, 0, -np.inf]),
        ({"logit_bias": {2: 1.5, 0: -100}}, (), [-100, 0, 1.5, 0, 0]),
        ({"logit_bias": {2: 1.5, 0: -100}}, [2], [-100, 0, -np.inf, 0, 0]),
        ({"allowed_token_ids": [3, 1, 3]}, (), [-np.inf, 0, -np.inf, 0, -np.inf]),
        ({"allowed_token_ids": [1, 3], "logit_bias": {3: 2, 4: 9}}, (), [-np.inf, 0, -np.inf, 2, -np.inf]),
        ({"allowed_token_ids": [1, 3], "logit_bias": {3: 2, 4: 9}}, [0, 1], [-np.inf, -np.inf, -np.inf, 2, -np.inf]),
    ],
)
def test_bias_vectors(fields: dict[str, Any], forbidden: Any, expected: list[float]) -> None:
    vector = BiasVector.of(SamplingParams(**fields), forbidden)
    assert (vector is None) == (not any(expected))
    np.testing.assert_array_equal(dense(vector, 5), np.array(expected, np.float32))


def test_equal_content_is_an_equal_vector() -> None:
    """However it is written down; and another fill or value is another vector."""

    def of(**fields: Any) -> BiasVector | None:
        return BiasVector.of(SamplingParams(**fields))

    assert of(logit_bias={5: 1, 2: 3}) == of(logit_bias={2: 3.0, 5: 1.0})
    assert of(allowed_token_ids=[7, 2]) == of(allowed_token_ids=(2, 7, 7)) == of(allowed_token_ids={2, 7})
    different = [of(logit_bias={2: 0}), of(allowed_token_ids=[2]), of(logit_bias={2: 1}), of(logit_bias={3: 1})]
    assert len(set(different)) == 4


# -- rows


class FakeTable:
    """The rows as NumPy arrays, and how many writes there were."""

    def __init__(self, rows: int):
        self.rows = np.full((rows, VOCAB), 777, np.float32)
        self.writes = 0

    def write(self, row: int, ids: np.ndarray, values: np.ndarray, fill: float, clear: bool) -> None:
        assert ids.shape == values.shape == (TOKENS_PER_WRITE,)
        self.writes += 1
        if clear:
            self.rows[row] = fill
        self.rows[row, ids[ids >= 0]] = values[ids >= 0]


def bias(token: int, value: float = 1.0) -> BiasVector:
    vector = BiasVector.of(SamplingParams(logit_bias={token: value}))
    assert vector is not None
    return vector


def test_requests_with_the_same_bias_share_a_row() -> None:
    table = FakeTable(2)
    rows = BiasRows(2, table.write)
    first, second = rows.acquire(bias(1)), rows.acquire(bias(2))
    assert {first, second} == {0, 1}
    assert rows.acquire(bias(1)) == first and table.writes == 2
    assert rows.acquire(bias(3)) is None
    rows.release(first or 0)
    assert rows.acquire(bias(3)) is None  # one user is left
    rows.release(first or 0)
    assert rows.acquire(bias(1)) == first and table.writes == 2  # still there
    rows.release(first or 0)
    assert rows.acquire(bias(3)) == first and table.writes == 3
    np.testing.assert_array_equal(table.rows[first or 0], dense(bias(3), VOCAB))
    with pytest.raises(AssertionError, match="no user"):
        for _ in range(2):
            rows.release(second or 0)


def test_the_row_unused_for_longest_is_taken() -> None:
    rows = BiasRows(3, FakeTable(3).write)
    places = [rows.acquire(bias(i)) for i in range(3)]
    for i in (1, 0, 2):
        rows.release(places[i] or 0)
    assert rows.acquire(bias(1)) == places[1]  # used again: not the one to go
    assert rows.acquire(bias(9)) == places[0]
    assert rows.acquire(bias(0)) == places[2]


def test_random_requests_find_their_own_bias_in_their_row() -> None:
    """Acquired and released at random: a row in use holds what its users want, and none is lost."""
    rng = np.random.default_rng(0)
    table = FakeTable(4)
    rows = BiasRows(4, table.write)
    held: list[tuple[int, BiasVector]] = []
    refused = 0
    for _ in range(600):
        if held and rng.random() < 0.45:
            row, _ = held.pop(int(rng.integers(len(held))))
            rows.release(row)
        else:
            vector = bias(int(rng.integers(7)), float(rng.integers(1, 3)))
            row = rows.acquire(vector)
            if row is None:
                refused += 1
                assert len({v for _, v in held}) == 4 and vector not in {v for _, v in held}
            else:
                held.append((row, vector))
        for row, vector in held:
            np.testing.assert_array_equal(table.rows[row, :8], dense(vector, VOCAB)[:8])
    assert refused > 20
    assert table.writes < 250  # fewer than were acquired: most were shared or still there


# -- the tables of an engine


@dataclass
class Owner:
    mesh: Mesh
    sizes: SlotSizes
    state: StepState

    @property
    def counts(self) -> np.ndarray:
        return np.asarray(self.state.slots.counts)

    @property
    def biases(self) -> np.ndarray:
        return np.asarray(self.state.slots.biases)


def make_owner(devices: int) -> Owner:
    """Tables full of what earlier requests left there."""
    mesh = make_mesh(devices)
    rng = np.random.default_rng(0)
    slots = SlotState(
        tokens=np.zeros(SLOTS, np.int32),
        tables=np.zeros((SLOTS, 1), np.int32),
        counts=rng.integers(0, 2**16, (SLOTS, VOCAB)).astype(np.uint16),
        biases=rng.normal(0, 1, (BIAS_ROWS, VOCAB)).astype(np.float32),
    )
    slots = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), slots, SLOT_SPECS)
    return Owner(mesh, SlotSizes(SLOTS, BIAS_ROWS, 1), StepState(KVCache(None, None), slots))


@pytest.mark.parametrize("devices", MESHES)
def test_written_biases_and_counts(devices: int) -> None:
    """Longer than one write, on all shards, over what was there; other rows stay."""
    owner = make_owner(devices)
    tables = SamplerTables(owner)
    before = owner.counts, owner.biases
    rng = np.random.default_rng(3)
    allowed = rng.choice(VOCAB, 1500, replace=False).tolist()
    params = SamplingParams(allowed_token_ids=allowed, logit_bias={allowed[0]: 2.5}, min_tokens=3, presence_penalty=1.0)
    rows = tables.acquire(params, [allowed[1], allowed[1400]])
    assert rows is not None and rows[0] != rows[1]
    expected = np.full(VOCAB, -np.inf, np.float32)
    expected[allowed] = 0
    expected[allowed[0]] = 2.5
    np.testing.assert_array_equal(owner.biases[rows[1]], expected)
    expected[[allowed[1], allowed[1400]]] = -np.inf
    np.testing.assert_array_equal(owner.biases[rows[0]], expected)
    others = [i for i in range(BIAS_ROWS) if i not in rows]
    np.testing.assert_array_equal(owner.biases[others], before[1][others])

    prompt = rng.integers(0, VOCAB, 2500).tolist()
    output = [*rng.integers(0, 40, 1300).tolist(), VOCAB - 1]
    tables.write_history(1, prompt, output)
    counts = np.bincount(output, minlength=VOCAB)
    counts[prompt] += 1 << 15
    np.testing.assert_array_equal(owner.counts[1], counts)
    np.testing.assert_array_equal(owner.counts[[0, 2]], before[0][[0, 2]])
    tables.write_history(1, [7], [])
    np.testing.assert_array_equal(owner.counts[1], (np.arange(VOCAB) == 7) << 15)
    tables.write_history(1, [], [])
    assert not owner.counts[1].any()


@pytest.mark.parametrize("devices", [1, 8])
def test_writers_alone(devices: int) -> None:
    """Counts add up and saturate, rows past the table are dropped, and the old array is given away."""
    owner = make_owner(devices)
    write = build_history_writer(owner.mesh)
    ids = np.full(TOKENS_PER_WRITE, 5, np.int32)
    ids[1000:] = -1
    counts = write(owner.state.slots.counts, np.int32(0), ids, np.bool_(False), np.bool_(True))
    assert owner.state.slots.counts.is_deleted()
    for _ in range(40):
        counts = write(counts, np.int32(0), ids, np.bool_(False), np.bool_(False))
    assert np.asarray(counts)[0, 5] == 32767 and np.asarray(counts)[0].sum() == 32767
    counts = write(counts, np.int32(0), ids, np.bool_(True), np.bool_(False))
    assert np.asarray(counts)[0, 5] == 65535
    before = np.asarray(counts)
    counts = write(counts, np.int32(SLOTS), ids, np.bool_(True), np.bool_(True))
    np.testing.assert_array_equal(np.asarray(counts), before)

    write_bias = build_bias_writer(owner.mesh)
    before = make_owner(1).biases  # the same; a view of the one that is given away would keep it
    values = np.full(TOKENS_PER_WRITE, 9, np.float32)
    ids[:] = -1
    ids[:3] = [0, VOCAB - 1, VOCAB]  # the last is past the table
    biases = write_bias(owner.state.slots.biases, np.int32(2), ids, values, np.float32(-1), np.bool_(False))
    assert owner.state.slots.biases.is_deleted()
    expected = before.copy()
    expected[2, [0, VOCAB - 1]] = 9
    np.testing.assert_array_equal(np.asarray(biases), expected)
    biases = write_bias(biases, np.int32(BIAS_ROWS), ids, values, np.float32(-1), np.bool_(True))
    np.testing.assert_array_equal(np.asarray(biases), expected)


def test_history_writes_are_few() -> None:
    assert len(list(history_writes([1] * 1024, [2]))) == 2
    assert [clear for _, _, clear in history_writes([1] * 1025, [2])] == [True, False, False]


def test_rows_before_and_from_min_tokens() -> None:
    tables = SamplerTables(make_owner(1))
    none = BIAS_ROWS
    assert tables.acquire(SamplingParams(), [2]) == (none, none)
    assert tables.acquire(SamplingParams(min_tokens=3), []) == (none, none)
    below, then = tables.acquire(SamplingParams(min_tokens=3), [2, 5]) or (none, none)
    assert below != none and then == none
    assert tables.acquire(SamplingParams(min_tokens=9), [5, 2]) == (below, then)  # the same tokens are forbidden
    both = tables.acquire(SamplingParams(logit_bias={1: 1.0}), [2])
    assert both is not None and both[0] == both[1] != none
    for row in (below, then, below, then, *both):
        tables.release(row)
    assert len(tables._rows._unused) == BIAS_ROWS


def test_a_full_table_refuses_and_keeps_nothing() -> None:
    """A request whose second row does not fit leaves the first as it was."""
    tables = SamplerTables(make_owner(1))
    for i in range(BIAS_ROWS - 1):
        assert tables.acquire(SamplingParams(logit_bias={i: 1.0}), []) is not None
    two = SamplingParams(logit_bias={50: 1.0}, min_tokens=2)
    for _ in range(3):
        assert tables.acquire(two, [9]) is None
    one = tables.acquire(SamplingParams(logit_bias={60: 1.0}), [])
    assert one is not None
    for row in one:
        tables.release(row)
    tables.release(0)
    tables.release(0)
    assert tables.acquire(two, [9]) is not None


def test_a_request_that_can_never_fit_is_an_error() -> None:
    owner = make_owner(1)
    owner.sizes = SlotSizes(SLOTS, 1, 1)
    with pytest.raises(ValueError, match="2 rows of the bias table; it has 1"):
        SamplerTables(owner).acquire(SamplingParams(logit_bias={1: 1.0}, min_tokens=2), [9])


def test_after_a_reset_everything_is_written_again() -> None:
    owner = make_owner(2)
    tables = SamplerTables(owner)
    params = SamplingParams(logit_bias={3: 4.0})
    rows = tables.acquire(params, [])
    assert rows is not None
    fresh = make_owner(2)
    owner.state = fresh.state
    tables.reset()
    again = tables.acquire(params, [])
    assert again is not None
    np.testing.assert_array_equal(owner.biases[again[0]], dense(BiasVector.of(params), VOCAB))


@pytest.mark.parametrize("devices", [1, 8])
def test_the_sampler_obeys_the_tables(devices: int) -> None:
    """Allowed tokens of one shard only, forbidden stop tokens, a bias, and penalties on a written history: greedy
    tokens by hand."""
    owner = make_owner(devices)
    tables = SamplerTables(owner)
    logits = np.zeros((7, VOCAB), np.float32)
    logits[:, 5], logits[:, 6], logits[:, 2000], logits[:, VOCAB - 1] = 9.0, 8.0, 7.0, 6.0
    only = tables.acquire(SamplingParams(allowed_token_ids=[VOCAB - 1, VOCAB - 2]), [])
    minimum = tables.acquire(SamplingParams(min_tokens=1), [5])
    pushed = tables.acquire(SamplingParams(logit_bias={2000: 2.5, 5: -0.25}), [])
    assert only and minimum and pushed
    tables.write_history(0, [5, 6], [5, 5])
    tables.write_history(2, [5], [6])
    params = settings(
        7,
        bias=[only[0], minimum[0], minimum[1], pushed[0], NO_ROW, NO_ROW, pushed[0]],
        history=[NO_ROW, NO_ROW, NO_ROW, NO_ROW, 0, 2, NO_ROW],
        frequency_penalty=[0, 0, 0, 0, 1.5, 0, 0],
        repetition_penalty=[1, 1, 1, 1, 1, 4, 1],
    )
    sampled, _ = sample_on(devices, Case(logits, params, owner.counts, owner.biases))
    assert sampled.tokens.tolist() == [VOCAB - 1, 6, 5, 2000, 6, 2000, 2000]
