"""What is measured: shapes, their bytes and operations. Data alone; nothing here touches a device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.bench.expert_cases import GPT_OSS_120B, QWEN3_235B, ExpertCase, ExpertModel, expert_cases
from kernels_pallas.checks import FP8
from kernels_pallas.tuning import PAGE_TOKENS

POOL_LIMIT = 48 * 2**30  # bytes of pages that a case may own


@dataclass(frozen=True, kw_only=True)
class Model:
    """Heads of one rank."""

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int = 128


RANK_70B = Model(name="70b", q_heads=8, kv_heads=1)  # one of eight
WHOLE_8B = Model(name="8b", q_heads=32, kv_heads=8)
MODELS = (RANK_70B, WHOLE_8B)


@dataclass(frozen=True, kw_only=True)
class DecodeCase:
    """A decode step. `context`: tokens of every request, or the longest of a ragged mix."""

    model: Model
    rows: int
    context: int
    ragged: bool = False
    fp8: bool = False

    @property
    def name(self) -> str:
        size = "ragged" if self.ragged else _short(self.context)
        return f"{self.model.name}-{self.rows}x{size}" + ("-fp8" if self.fp8 else "")

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(FP8 if self.fp8 else jnp.bfloat16)

    def lengths(self) -> np.ndarray:
        """[rows] int32; a ragged mix is lognormal, most of it about a sixteenth of the longest."""
        if not self.ragged:
            return np.full(self.rows, self.context, np.int32)
        drawn = np.random.default_rng(0).lognormal(np.log(self.context / 16), 1.0, self.rows)
        return np.clip(drawn, 1, self.context).astype(np.int32)

    @property
    def row_pages(self) -> int:
        return -(-self.context // PAGE_TOKENS)

    @property
    def pages(self) -> int:
        """Pages the requests own."""
        return int((-(-self.lengths() // PAGE_TOKENS)).sum())

    @property
    def pool_bytes(self) -> int:
        return 2 * self.pages * PAGE_TOKENS * self.model.kv_heads * self.model.head_dim * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """K, V, q, the result and its log-sum-exp."""
        kv = 2 * int(self.lengths().sum()) * self.model.kv_heads * self.model.head_dim * self.dtype.itemsize
        return kv + self.rows * self.model.q_heads * (2 * self.model.head_dim * 2 + 4)

    def avals(self, pages: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of q, k_pages, v_pages, page_table, lengths and, with fp8, two scales; for a pool of so many pages."""
        model = self.model
        pool = jax.ShapeDtypeStruct((pages, model.kv_heads, PAGE_TOKENS, model.head_dim), self.dtype)
        scales = (jax.ShapeDtypeStruct((model.kv_heads,), jnp.float32),) * 2 if self.fp8 else ()
        return (
            jax.ShapeDtypeStruct((self.rows, model.q_heads, model.head_dim), jnp.bfloat16),
            pool,
            pool,
            jax.ShapeDtypeStruct((self.rows, self.row_pages), jnp.int32),
            jax.ShapeDtypeStruct((self.rows,), jnp.int32),
            *scales,
        )


@dataclass(frozen=True, kw_only=True)
class AppendCase:
    """Rows written to a pool of `pages` pages."""

    model: Model
    rows: int
    pages: int = 8192
    fp8: bool = False

    @property
    def name(self) -> str:
        return f"{self.model.name}-{self.rows}" + ("-fp8" if self.fp8 else "")

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(FP8 if self.fp8 else jnp.bfloat16)

    @property
    def bytes(self) -> int:
        """K and V read as bfloat16 and written to the pages, and where they go."""
        elements = self.rows * self.model.kv_heads * self.model.head_dim
        return 2 * elements * (2 + self.dtype.itemsize) + self.rows * 8

    def avals(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of k_pages, v_pages, k, v, pages, slots and, with fp8, two scales."""
        model = self.model
        pool = jax.ShapeDtypeStruct((self.pages, model.kv_heads, PAGE_TOKENS, model.head_dim), self.dtype)
        row = jax.ShapeDtypeStruct((self.rows, model.kv_heads, model.head_dim), jnp.bfloat16)
        place = jax.ShapeDtypeStruct((self.rows,), jnp.int32)
        scales = (jax.ShapeDtypeStruct((model.kv_heads,), jnp.float32),) * 2 if self.fp8 else ()
        return (pool, pool, row, row, place, place, *scales)


@dataclass(frozen=True, kw_only=True)
class PrefillCase:
    """One chunk of `rows` tokens after `prefix` tokens of context."""

    model: Model
    rows: int
    prefix: int = 0

    @property
    def name(self) -> str:
        after = f"-after-{_short(self.prefix)}" if self.prefix else ""
        return f"{self.model.name}-{_short(self.rows)}{after}"

    @property
    def context(self) -> int:
        return self.prefix + self.rows

    @property
    def pages(self) -> int:
        return -(-self.context // PAGE_TOKENS)

    @property
    def flops(self) -> int:
        """Two products over what each row may see."""
        seen = self.rows * self.prefix + self.rows * (self.rows + 1) // 2
        return 4 * seen * self.model.q_heads * self.model.head_dim

    def avals(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of q, k_pages, v_pages, page_table, row_starts and lengths."""
        model = self.model
        pool = jax.ShapeDtypeStruct((self.pages, model.kv_heads, PAGE_TOKENS, model.head_dim), jnp.bfloat16)
        return (
            jax.ShapeDtypeStruct((self.rows, model.q_heads, model.head_dim), jnp.bfloat16),
            pool,
            pool,
            jax.ShapeDtypeStruct((1, self.pages), jnp.int32),
            jax.ShapeDtypeStruct((2,), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        )


PagedCase = DecodeCase | AppendCase | PrefillCase
Case = PagedCase | ExpertCase


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def kind(case: Case) -> str:
    if isinstance(case, ExpertCase):
        return case.kernel
    return {DecodeCase: "decode_attention", AppendCase: "append_kv", PrefillCase: "prefill_attention"}[type(case)]


def key(case: Case) -> str:
    """The case's name in a report and on the command line."""
    return f"{kind(case)}/{case.name}"


def _decode_cases(model: Model) -> list[DecodeCase]:
    shapes = [(rows, context) for context in (512, 1024, 4096, 32768) for rows in (1, 32, 256, 1280)]
    cases = [DecodeCase(model=model, rows=rows, context=context) for rows, context in shapes]
    cases += [DecodeCase(model=model, rows=rows, context=8192, ragged=True) for rows in (32, 256, 1280)]
    cases = [case for case in cases if case.pool_bytes <= POOL_LIMIT]
    return [twin for case in cases for twin in (case, replace(case, fp8=True))]


def _prefill_cases(model: Model) -> list[PrefillCase]:
    cases = [PrefillCase(model=model, rows=rows) for rows in (512, 1024, 2048, 4096, 8192)]
    return [*cases, PrefillCase(model=model, rows=2048, prefix=30720)]


def _append_cases(model: Model) -> list[AppendCase]:
    cases = [AppendCase(model=model, rows=rows) for rows in (1, 256, 1280, 2048, 8192)]
    return [*cases, AppendCase(model=model, rows=2048, fp8=True)]


_ALL: list[Case] = [
    case for make in (_decode_cases, _prefill_cases, _append_cases) for model in MODELS for case in make(model)
]
# Rows of the nano-batches of Qwen3-235B's plan and gpt-oss-120b's, and many.
_ALL += [*expert_cases(QWEN3_235B, (1152, 2432, 8192)), *expert_cases(GPT_OSS_120B, (2112, 4096, 8192))]
_FIRST = (
    "decode_attention/70b-1280x1k",
    "decode_attention/70b-1280x1k-fp8",
    "prefill_attention/70b-8k",
    "append_kv/70b-2048",
    "decode_attention/8b-32x4k",
    "decode_attention/8b-32x4k-fp8",
    "decode_attention/70b-1x32k",
    "prefill_attention/8b-2k-after-30k",
    "append_kv/8b-2048",
)
# In the order in which they are measured: those first that say most, should the time run out.
CASES: dict[str, Case] = {key(case): case for case in sorted(_ALL, key=lambda case: key(case) not in _FIRST)}
QUICK = _FIRST

# Of every kind one, for the interpreter.
_TINY = Model(name="tiny", q_heads=4, kv_heads=1, head_dim=64)
TINY: dict[str, Case] = {
    key(case): case
    for case in (
        DecodeCase(model=_TINY, rows=2, context=150, ragged=True),
        DecodeCase(model=_TINY, rows=2, context=70, fp8=True),
        AppendCase(model=_TINY, rows=5, pages=3),
        AppendCase(model=replace(_TINY, kv_heads=2), rows=5, pages=3, fp8=True),
        PrefillCase(model=_TINY, rows=24, prefix=50),
        *expert_cases(ExpertModel(name="tiny", hidden=192, size=64, experts=2, choices=2, devices=2, bias=True), (24,)),
    )
}


def scale_of(case: PagedCase) -> float:
    return 1.0 / math.sqrt(case.model.head_dim)
