"""The running requests as arrays, one entry per slot, so that a step is scheduled and booked without a loop over
requests."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from nanoflow_jax.engine.request import Request
from nanoflow_jax.step.slots import neutral_settings, sampling_views

STOPS = 8  # stop tokens of a request that are compared at once; one with more is watched
NEVER = np.iinfo(np.int64).max


class SlotTable:
    """State per slot. The pages hold the keys and values of tokens [0, computed), as soon as the steps dispatched so
    far have run; in page tables whose layers have a window, of the last ones."""

    def __init__(self, slots: int, max_model_len: int, page_size: int, num_biases: int, tables: int = 1):
        self.count, self.page_size, self._num_biases = slots, page_size, num_biases

        def zeros(*shape: int, dtype: type = np.int32) -> np.ndarray:
            return np.zeros((slots, *shape), dtype)

        self.requests: list[Request | None] = [None] * slots
        self.epoch = zeros(dtype=np.int64)  # counts the requests that had the slot
        self.number = np.full(slots, NEVER, np.int64)  # order of arrival; NEVER: the slot is empty
        # Memory is touched as sequences grow: most never come near the longest.
        self.tokens = np.empty((slots, max_model_len), np.int32)
        self.known = zeros()  # tokens that the host knows
        self.length = zeros()  # and those being sampled by a step in flight
        self.computed = zeros()
        self.prefill_end = zeros()  # tokens before it go through prefill rows, later ones through decode rows
        self.prompt_length = zeros()
        self.max_length = zeros()
        self.in_table = np.zeros(slots, bool)  # the device has its page table
        # Pages [slot, table, entry]: those of entries [dropped, filled) are held, num_pages in all tables.
        self.pages = zeros(tables, -(-max_model_len // page_size))
        self.dropped = zeros(tables)
        self.filled = zeros(tables)
        self.num_pages = zeros()
        self.most_pages = zeros()  # of a sequence of max_length
        self.stops = np.full((STOPS, slots), -1, np.int32)
        self.num_stops = 0  # the most that any request here has had
        self.watched = np.zeros(slots, bool)  # its tokens are looked at one by one
        self.constrained = np.zeros(slots, bool)  # what its next token may be depends on its last one
        self.min_length = zeros()  # until the sequence is so long, bias_below counts, then bias
        self.bias_below = zeros()
        # As one array, so that a step takes all settings of its rows at once. `position` is not kept here. The last
        # column is for rows that sample nothing.
        self.settings = neutral_settings(slots + 1, slots, num_biases)
        self.sampling = sampling_views(self.settings)
        self.bias, self.history = self.sampling.bias, self.sampling.history
        self._free = list(range(slots - 1, -1, -1))

    @property
    def num_running(self) -> int:
        return self.count - len(self._free)

    @property
    def is_full(self) -> bool:
        return not self._free

    @property
    def active(self) -> np.ndarray:
        return self.number != NEVER

    def in_order(self, which: np.ndarray) -> np.ndarray:
        """The slots where `which` [S] bool is set, the earliest request first."""
        slots = np.flatnonzero(which)
        return slots if len(slots) < 2 else slots[np.argsort(self.number[slots])]

    def enter(
        self,
        request: Request,
        pages: Sequence[tuple[int, np.ndarray]],
        computed: int,
        prefill_end: int,
        biases: tuple[int, int],
        most_pages: int,
    ) -> int:
        """Gives a request a slot. pages: of each table, its first entry and those that it holds from there on; biases:
        rows of the bias table until `min_tokens` is reached, and then; most_pages: that it may come to hold."""
        slot, params, tokens = self._free.pop(), request.params, request.tokens
        request.slot = slot
        self.requests[slot] = request
        self.number[slot] = request.number
        self.tokens[slot, : len(tokens)] = tokens
        self.known[slot] = self.length[slot] = len(tokens)
        self.computed[slot], self.prefill_end[slot] = computed, prefill_end
        self.prompt_length[slot], self.max_length[slot] = request.prompt_length, request.max_length
        self.in_table[slot] = False
        for table, (first, held) in enumerate(pages):
            self.pages[slot, table, first : first + len(held)] = held
            self.dropped[slot, table], self.filled[slot, table] = first, first + len(held)
        self.num_pages[slot] = (self.filled[slot] - self.dropped[slot]).sum()
        self.most_pages[slot] = most_pages
        stops = sorted(request.stop_tokens)
        self.stops[:, slot] = -1
        self.stops[: min(len(stops), STOPS), slot] = stops[:STOPS]
        self.num_stops = max(self.num_stops, min(len(stops), STOPS))
        self.constrained[slot] = constrained = request.constraint is not None
        self.watched[slot] = (
            request.watched or constrained or bool(params.stop) or params.logprobs is not None or len(stops) > STOPS
        )
        self.min_length[slot] = request.prompt_length + params.min_tokens
        self.bias_below[slot], self.bias[slot] = biases
        penalised = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
        self.history[slot] = slot if penalised else self.count
        s = self.sampling
        s.temperature[slot], s.top_p[slot], s.top_k[slot] = params.temperature, params.top_p, max(params.top_k, 0)
        s.min_p[slot], s.seed[slot] = params.min_p, request.seed
        s.presence_penalty[slot], s.frequency_penalty[slot] = params.presence_penalty, params.frequency_penalty
        s.repetition_penalty[slot] = params.repetition_penalty
        s.top_logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        return slot

    def leave(self, slot: int) -> Request:
        """Takes the request out of its slot. Its known tokens go with it."""
        request = self.requests[slot]
        assert request is not None
        request.tokens = self.tokens[slot, : self.known[slot]].copy()
        request.slot = None
        self.requests[slot] = None
        self.number[slot] = NEVER
        self.known[slot] = self.length[slot] = self.computed[slot] = 0
        self.num_pages[slot] = self.most_pages[slot] = 0
        self.dropped[slot] = self.filled[slot] = 0
        self.epoch[slot] += 1
        self._free.append(slot)
        return request

    def reset(self) -> list[Request]:
        """Empties all slots, in whatever state an interruption left them. Returns the requests that were there, the
        earliest first, each with its known tokens."""
        found = []
        for slot, request in enumerate(self.requests):
            if request is not None:
                if self.known[slot] >= len(request.tokens):  # else it had not fully entered
                    request.tokens = self.tokens[slot, : self.known[slot]].copy()
                request.slot = None
                found.append(request)
        epoch = self.epoch + 1
        self.__init__(self.count, self.tokens.shape[1], self.page_size, self._num_biases, self.pages.shape[1])
        self.epoch = epoch
        return sorted(found, key=lambda r: r.number)

    def output_of(self, request: Request) -> np.ndarray:
        """Tokens of a request's output that the host knows, also of one that has no slot."""
        tokens = request.tokens if request.slot is None else self.tokens[request.slot, : self.known[request.slot]]
        return tokens[request.prompt_length :]

    def pages_of(self, slot: int) -> np.ndarray:
        """All that it holds, table by table, each in order of the sequence."""
        bounds = zip(self.pages[slot], self.dropped[slot], self.filled[slot], strict=True)
        return np.concatenate([table[first:last] for table, first, last in bounds])

    def drop(self, table: int, slots: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Slots [n] hold no entries before first [n] any more. Returns their pages."""
        rows, entries = _ranges(slots, self.dropped[slots, table], first)
        self.num_pages[slots] -= first - self.dropped[slots, table]
        self.dropped[slots, table] = first
        return self.pages[rows, table, entries]

    def fill(self, table: int, slots: np.ndarray, counts: np.ndarray, pages: np.ndarray) -> None:
        """Gives slots [n] `counts` [n] more pages each, of `pages`."""
        filled = self.filled[slots, table]
        one_each = len(pages) == len(slots)
        rows, entries = (slots, filled) if one_each else _ranges(slots, filled, filled + counts)
        self.pages[rows, table, entries] = pages
        self.filled[slots, table] += counts
        self.num_pages[slots] += counts

    def append(self, slots: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Books one sampled token of each slot [n]. Returns which of them it ends, bool [n]: an end token or the
        length says so, or it is negative, so no token, and not booked."""
        places, none = self.known[slots], tokens < 0
        self.tokens[slots, places] = tokens
        self.known[slots] = places + ~none
        for slot in slots[places == self.prompt_length[slots]].tolist():
            request = self.requests[slot]
            assert request is not None
            request.metrics.first_token_time = request.metrics.first_token_time or time.monotonic()
        ended = none | (places + 1 >= self.max_length[slots])
        for stops in self.stops[: self.num_stops]:
            ended |= stops[slots] == tokens
        return ended


def _ranges(slots: np.ndarray, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(slot, entry) for every entry of [first, last) of each slot."""
    counts = last - first
    ends = np.cumsum(counts)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    return np.repeat(slots, counts), np.repeat(first, counts) + within
