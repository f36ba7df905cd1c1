"""The tables that the sampler reads, kept up from the host: bias vectors, shared by the requests that want the same,
and the token counts of the requests with penalties."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from nanoflow_jax.parallel import collectives
from nanoflow_jax.parallel.mesh import AXIS
from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.step.sampler import IN_PROMPT, MAX_COUNT
from nanoflow_jax.step.slots import SlotSizes, StepState

TOKENS_PER_WRITE = 1024

# row, token ids [TOKENS_PER_WRITE] padded with -1, their biases, bias of all others, set the others too
WriteBias = Callable[[int, np.ndarray, np.ndarray, float, bool], None]


@dataclass(frozen=True)
class BiasVector:
    """What is added to the logits: `values` (float32 bytes) to the tokens `ids` (int32 bytes, ascending), `fill` to all
    others."""

    ids: bytes
    values: bytes
    fill: float

    @classmethod
    def of(cls, params: SamplingParams, forbidden: Collection[int] = ()) -> BiasVector | None:
        """The request's logit_bias and allowed_token_ids, and -inf for `forbidden`; None when nothing is added."""
        bias: dict[int, float] = dict.fromkeys(params.allowed_token_ids or (), 0.0)
        for token, value in (params.logit_bias or {}).items():
            if params.allowed_token_ids is None or token in bias:
                bias[token] = float(value)
        bias.update(dict.fromkeys(forbidden, -np.inf))
        if not bias:
            return None
        ids = np.array(sorted(bias), np.int32)
        values = np.array([bias[token] for token in ids.tolist()], np.float32)
        return cls(ids.tobytes(), values.tobytes(), 0.0 if params.allowed_token_ids is None else -np.inf)


class BiasRows:
    """Which bias vector is in which row of a table, and how many requests use it. A vector stays in its row after the
    last user, until the row is needed."""

    def __init__(self, num_rows: int, write: WriteBias):
        self._write = write
        self._vectors: list[BiasVector | None] = [None] * num_rows
        self._users = [0] * num_rows
        self._row_of: dict[BiasVector, int] = {}
        self._unused = dict.fromkeys(range(num_rows))  # an ordered set: unused for longest first

    def acquire(self, vector: BiasVector) -> int | None:
        """A row that holds the vector; None when other vectors are in use in all rows."""
        row = self._row_of.get(vector)
        if row is None:
            if not self._unused:
                return None
            row = next(iter(self._unused))
            self._put(row, vector)
        self._unused.pop(row, None)
        self._users[row] += 1
        return row

    def release(self, row: int) -> None:
        """One user less of a row that `acquire` gave."""
        assert self._users[row] > 0, f"bias row {row} has no user"
        self._users[row] -= 1
        if not self._users[row]:
            self._unused[row] = None

    def _put(self, row: int, vector: BiasVector) -> None:
        if (old := self._vectors[row]) is not None:
            del self._row_of[old]
        self._vectors[row] = vector
        self._row_of[vector] = row
        ids, values = np.frombuffer(vector.ids, np.int32), np.frombuffer(vector.values, np.float32)
        for at in range(0, len(ids), TOKENS_PER_WRITE):
            here = values[at : at + TOKENS_PER_WRITE]
            padded = np.zeros(TOKENS_PER_WRITE, np.float32)
            padded[: len(here)] = here
            self._write(row, _padded(ids[at : at + TOKENS_PER_WRITE]), padded, vector.fill, at == 0)


class TableOwner(Protocol):
    """Whoever holds the state of the steps: the runner."""

    @property
    def mesh(self) -> Mesh: ...
    @property
    def sizes(self) -> SlotSizes: ...

    state: StepState


class SamplerTables:
    """Writes the tables in the state of `owner`, in order with the steps that it dispatches; nothing here waits for the
    device."""

    def __init__(self, owner: TableOwner):
        self._owner = owner
        self._write_history_program = build_history_writer(owner.mesh)
        self._write_bias_program = build_bias_writer(owner.mesh)
        self.reset()

    def reset(self) -> None:
        """Nobody uses a row, and all contents are unknown."""
        self._rows = BiasRows(self._owner.sizes.bias_rows, self._write_bias)

    def acquire(self, params: SamplingParams, stop_tokens: Collection[int]) -> tuple[int, int] | None:
        """Rows of the bias table for a request: below min_tokens, when `stop_tokens` are forbidden, and from then on.

        Each that is not the number of rows (no bias at all) must be released once, also when both are the same. None
        while the table is full. Raises ValueError when even an empty table would be too small.
        """
        then = BiasVector.of(params)
        below = BiasVector.of(params, stop_tokens) if params.min_tokens else then
        num_rows = self._owner.sizes.bias_rows
        if (wanted := len({below, then} - {None})) > num_rows:
            raise ValueError(f"the request needs {wanted} rows of the bias table; it has {num_rows}")
        rows: list[int] = []
        for vector in (below, then):
            row = num_rows if vector is None else self._rows.acquire(vector)
            if row is None:
                for other in rows:
                    self.release(other)
                return None
            rows.append(row)
        return rows[0], rows[1]

    def release(self, row: int) -> None:
        """Gives back one row of `acquire`; the row that means no bias may be given as well."""
        if row != self._owner.sizes.bias_rows:
            self._rows.release(row)

    def write_history(self, row: int, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Makes the counts of a row those of a request with this prompt and output."""
        write = self._write_history_program
        for ids, in_prompt, clear in history_writes(prompt, output):
            slots = self._owner.state.slots
            counts = write(slots.counts, np.int32(row), ids, np.bool_(in_prompt), np.bool_(clear))
            self._set_slots(counts=counts)

    def _write_bias(self, row: int, ids: np.ndarray, values: np.ndarray, fill: float, clear: bool) -> None:
        biases = self._owner.state.slots.biases
        self._set_slots(
            biases=self._write_bias_program(biases, np.int32(row), ids, values, np.float32(fill), np.bool_(clear))
        )

    def _set_slots(self, **tables: jax.Array) -> None:
        state = self._owner.state
        self._owner.state = replace(state, slots=replace(state.slots, **tables))


def history_writes(prompt: Sequence[int], output: Sequence[int]) -> Iterator[tuple[np.ndarray, bool, bool]]:
    """The calls that write a request's token counts: token ids, whether they are in the prompt, and whether to clear
    the row first."""
    clear = True
    for tokens, in_prompt in ((prompt, True), (output, False)):
        for at in range(0, len(tokens), TOKENS_PER_WRITE):
            yield _padded(np.array(tokens[at : at + TOKENS_PER_WRITE], np.int32)), in_prompt, clear
            clear = False
    if clear:
        yield _padded(np.zeros(0, np.int32)), True, True


def _padded(ids: np.ndarray) -> np.ndarray:
    out = np.full(TOKENS_PER_WRITE, -1, np.int32)
    out[: len(ids)] = ids
    return out


def build_history_writer(mesh: Mesh) -> jax.stages.Wrapped:
    """A jitted `(counts, row, token_ids, in_prompt, clear) -> counts`, counts donated.

    counts     [S, V] uint16 as in `SlotState`, split over V; row S is dropped
    token_ids  [n] int32, -1 where there is none: added to the times generated or, with in_prompt, marked as in the
               prompt
    clear      start from nothing
    """
    return _writer(_history, mesh, 4)


def build_bias_writer(mesh: Mesh) -> jax.stages.Wrapped:
    """A jitted `(biases, row, token_ids, values, fill, clear) -> biases`, biases donated.

    biases     [K, V] float32, split over V; row K is dropped
    token_ids  [n] int32, all different, -1 where there is none: their biases become `values` [n] float32
    clear      first make the whole row `fill`
    """
    return _writer(_bias, mesh, 5)


def _writer(write: Callable[..., jax.Array], mesh: Mesh, others: int) -> jax.stages.Wrapped:
    """Of a table split over the vocabulary, and so many arguments besides."""
    split = P(None, AXIS)
    sharded = jax.shard_map(write, mesh=mesh, in_specs=(split, *[P()] * others), out_specs=split, check_vma=False)
    return jax.jit(sharded, donate_argnums=(0,))


def _history(counts: jax.Array, row: jax.Array, ids: jax.Array, in_prompt: jax.Array, clear: jax.Array) -> jax.Array:
    width = counts.shape[1]
    times = jnp.zeros(width, jnp.int32).at[_columns(ids, width)].add(1, mode="drop")
    old = lax.dynamic_index_in_dim(counts, row, keepdims=False).astype(jnp.int32)
    old = jnp.where(clear, 0, old)
    generated = jnp.minimum((old & MAX_COUNT) + jnp.where(in_prompt, 0, times), MAX_COUNT)
    prompt = (old & IN_PROMPT) | jnp.where(in_prompt & (times > 0), IN_PROMPT, 0)
    return counts.at[row].set((generated | prompt).astype(jnp.uint16), mode="drop")


def _bias(
    biases: jax.Array, row: jax.Array, ids: jax.Array, values: jax.Array, fill: jax.Array, clear: jax.Array
) -> jax.Array:
    width = biases.shape[1]
    old = jnp.where(clear, fill, lax.dynamic_index_in_dim(biases, row, keepdims=False))
    return biases.at[row].set(old.at[_columns(ids, width)].set(values, mode="drop"), mode="drop")


def _columns(ids: jax.Array, width: int) -> jax.Array:
    """This device's column of each token; `width` (dropped) for those of others."""
    local = ids - collectives.device_index() * width
    return jnp.where((local >= 0) & (local < width), local, width)
