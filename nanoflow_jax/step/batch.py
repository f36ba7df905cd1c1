"""The shape a step is compiled for, and the arrays that its layers and its sampler read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flax import struct


@dataclass(frozen=True)
class StepShape:
    """The static sizes of a compiled step.

    decode_rows       rows that each belong to one running request (one token of input each)
    prefill_rows      rows after them, filled with packed chunks of prompts
    prefill_segments  the most chunks that share those rows
    pages_per_request width of a page table
    tables            page tables of a request (`models.layout.PageTables`), side by side in one row: M = tables *
                      pages_per_request entries
    """

    decode_rows: int
    prefill_rows: int
    prefill_segments: int
    pages_per_request: int
    tables: int = 1

    @property
    def table_width(self) -> int:
        return self.tables * self.pages_per_request

    @property
    def rows(self) -> int:
        return self.decode_rows + self.prefill_rows

    @property
    def sampled_rows(self) -> int:
        """One token is sampled per decode row and per prefill segment."""
        return self.decode_rows + self.prefill_segments


@struct.dataclass
class SamplingArrays:
    """How the next token of each sampled row [B] is chosen. Rows with temperature 0 are greedy."""

    temperature: Any  # float32
    top_p: Any  # float32 in (0, 1]
    top_k: Any  # int32; 0 keeps all
    min_p: Any  # float32 in [0, 1]; 0 keeps all
    seed: Any  # uint32
    position: Any  # int32: index of the sampled token in its sequence; with the seed, the key of its noise
    presence_penalty: Any  # float32; 0 is none
    frequency_penalty: Any  # float32; 0 is none
    repetition_penalty: Any  # float32 above 0; 1 is none
    history: Any  # int32: row of the token counts that the penalties read; past the last row: none
    bias: Any  # int32: row of the bias table that is added to the logits; past the last row: none
    top_logprobs: Any  # int32: how many of the likeliest tokens to report, 0 to MAX_LOGPROBS; -1: no logprobs at all


@struct.dataclass
class StepBatch:
    """What the layers of a step read, the same on every device. T rows, D decode rows, S segments, K page tables, M
    entries of all of a request's."""

    token_ids: Any  # [T] int32
    positions: Any  # [T] int32
    write_pages: Any  # [K * T] int32, table by table; the number of pages marks a padding row
    write_slots: Any  # [T] int32
    decode_table: Any  # [D, M] int32
    decode_lengths: Any  # [D] int32; 0 marks an empty row
    prefill_table: Any  # [S, M] int32
    prefill_starts: Any  # [S + 1] int32, counted from the first prefill row
    prefill_lengths: Any  # [S] int32: context after this chunk
    sampled: Any  # [B] int32: the rows whose next token is sampled
