"""`python -m kernels_pallas.bench`: decode attention on this machine's GPU, as JSON. First whether it is right.

The bound is the memory: every figure stands beside a device copy measured in the same run. Calls run one after another
over pools of pages several times the L2's size, so that no call finds its pages there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.decode_attention import decode_attention
from kernels_pallas.targets import mosaic_supported
from kernels_pallas.tuning import DECODE, DEFAULT_GPU, PAGE_TOKENS, DecodeTuning

CALLS = 16  # in one program: what starting a program costs is shared by them
RUNS = 15
COLD_BYTES = 512 * 2**20  # of pages, at least, between two uses of one, as far as CALLS reach: many times the L2
COPY_BYTES = 2**30
TOLERANCE = 2e-2  # relative error of a row
CHECKED_ROWS = 8


@dataclass(frozen=True)
class Case:
    """A decode step's shape. `context`: tokens of every request, or the longest of a ragged mix."""

    rows: int
    q_heads: int
    kv_heads: int
    context: int
    ragged: bool = False
    head_dim: int = 128

    def lengths(self) -> np.ndarray:
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
    def bytes(self) -> int:
        """K, V, q and the result."""
        kv = 2 * int(self.lengths().sum()) * self.kv_heads * self.head_dim * 2
        return kv + self.rows * self.q_heads * (2 * self.head_dim * 2 + 4)

    def avals(self, pages: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of q, k_pages, v_pages, page_table and lengths, for a pool of so many pages."""
        pool = jax.ShapeDtypeStruct((pages, self.kv_heads, PAGE_TOKENS, self.head_dim), jnp.bfloat16)
        return (
            jax.ShapeDtypeStruct((self.rows, self.q_heads, self.head_dim), jnp.bfloat16),
            pool,
            pool,
            jax.ShapeDtypeStruct((self.rows, self.row_pages), jnp.int32),
            jax.ShapeDtypeStruct((self.rows,), jnp.int32),
        )


# One rank of a 70B model on eight GPUs, and an 8B model on one.
CASES = {
    "70b-1x32k": Case(1, 8, 1, 32768),
    "70b-32x4k": Case(32, 8, 1, 4096),
    "70b-256x1k": Case(256, 8, 1, 1024),
    "70b-1280x512": Case(1280, 8, 1, 512),
    "70b-1280x1k": Case(1280, 8, 1, 1024),
    "70b-256x4k": Case(256, 8, 1, 4096),
    "70b-1280-ragged": Case(1280, 8, 1, 8192, ragged=True),
    "8b-1x32k": Case(1, 32, 8, 32768),
    "8b-32x4k": Case(32, 32, 8, 4096),
    "8b-256x1k": Case(256, 32, 8, 1024),
    "8b-32x32k": Case(32, 32, 8, 32768),
    "8b-256-ragged": Case(256, 32, 8, 8192, ragged=True),
}


def attend(q: Any, k_pages: Any, v_pages: Any, table: Any, lengths: Any, *, tuning: DecodeTuning) -> Any:
    """The call that is measured."""
    return decode_attention(q, k_pages, v_pages, table, lengths, backend="mosaic", tuning=tuning)


def _seconds(program: Callable[..., Any], *args: Any) -> float:
    """Median time of one run."""
    jax.block_until_ready(program(*args))
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        jax.block_until_ready(program(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 1 GiB."""

    @jax.jit
    def copies(x: jax.Array) -> jax.Array:
        for _ in range(CALLS):
            x = jax.lax.optimization_barrier(x ^ jnp.uint32(1))
        return x

    return 2 * COPY_BYTES * CALLS / _seconds(copies, jnp.zeros(COPY_BYTES // 4, jnp.uint32))


def _tables(case: Case, sets: int) -> np.ndarray:
    """[sets, rows, row_pages]: each set owns pages of its own, in random order; entries past a length are 0."""
    order = np.random.default_rng(1).permutation(sets * case.pages).astype(np.int32)
    needed = -(-case.lengths() // PAGE_TOKENS)
    tables = np.zeros((sets, case.rows, case.row_pages), np.int32)
    tables[:, np.arange(case.row_pages)[None, :] < needed[:, None]] = order.reshape(sets, case.pages)
    return tables


def _error(case: Case, tuning: DecodeTuning, q: Any, keys: Any, values: Any, table: Any, lengths: Any) -> float:
    """Largest relative error of a row, of some requests, against float32 on the same device."""
    out, _ = jax.jit(partial(attend, tuning=tuning))(q, keys, values, table, lengths)
    some = np.unique(np.linspace(0, case.rows - 1, min(CHECKED_ROWS, case.rows)).astype(np.int32))
    own = [pool[table[some].reshape(-1)].astype(jnp.float32) for pool in (keys, values)]
    identity = jnp.arange(len(some) * case.row_pages, dtype=jnp.int32).reshape(len(some), case.row_pages)
    want, _ = jax.jit(decode_attention)(q[some].astype(jnp.float32), *own, identity, lengths[some])
    got, want = (np.asarray(x, np.float64) for x in (out[some].astype(jnp.float32), want))
    error = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    return float(np.where(np.isfinite(got).all(axis=-1), error, np.inf).max())


def measure(case: Case, tuning: DecodeTuning, copy: float) -> dict[str, Any]:
    """One case: its error, then its time. Raises RuntimeError when the error is beyond the tolerance."""
    sets = min(CALLS, -(-COLD_BYTES // case.bytes))
    q_aval, pool_aval, *_ = case.avals(sets * case.pages)
    names = jax.random.split(jax.random.key(0), 3)
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    q = draw(names[0], q_aval.shape, jnp.bfloat16)
    keys, values = (draw(name, pool_aval.shape, jnp.bfloat16) for name in names[1:])
    tables, lengths = [jnp.asarray(table) for table in _tables(case, sets)], jnp.asarray(case.lengths())
    error = _error(case, tuning, q, keys, values, tables[0], lengths)
    if not error <= TOLERANCE:
        raise RuntimeError(f"a row is off by {error:.3g} of its norm, tolerance {TOLERANCE:g}")

    @jax.jit
    def calls(q: Any, keys: Any, values: Any, tables: list[Any], lengths: Any) -> Any:
        out = q
        for i in range(CALLS):
            # One after another, and no two of them the same call.
            q, _ = jax.lax.optimization_barrier((q, out))
            out, _ = attend(q, keys, values, tables[i % sets], lengths, tuning=tuning)
        return out

    seconds = _seconds(calls, q, keys, values, tables, lengths) / CALLS
    return {
        "error": error,
        "us": seconds * 1e6,
        "bytes": case.bytes,
        "bytes_per_second": case.bytes / seconds,
        "percent_of_copy": 100 * case.bytes / seconds / copy,
    }


def _refusal() -> str | None:
    if not Path("/dev/nvidiactl").exists():  # asked first: looking for a GPU through JAX may print long errors
        return "no NVIDIA GPU on this machine"
    if jax.default_backend() != "gpu":
        return f"JAX runs on {jax.default_backend()!r} here, not on the GPU"
    capability = str(jax.devices()[0].compute_capability)
    major, minor = (int(part) for part in capability.split("."))
    if not mosaic_supported((major, minor)):
        return f"compute capability {capability} has no Mosaic decode attention, only 9.x"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kernels_pallas.bench", description=__doc__)
    parser.add_argument(
        "--case", action="append", choices=sorted(CASES), help="one case; may be repeated (default: all)"
    )
    parser.add_argument("--tuning", choices=sorted(DECODE), default=DEFAULT_GPU)
    options = parser.parse_args(arguments)
    if refusal := _refusal():
        print(f"kernels_pallas.bench: {refusal}", file=sys.stderr)
        return 2
    copy = copy_bandwidth()
    results: dict[str, Any] = {}
    for name in options.case or CASES:
        try:
            results[name] = measure(CASES[name], DECODE[options.tuning], copy)
        except RuntimeError as error:  # wrong, or out of memory: the other cases still count
            results[name] = {"failed": str(error).splitlines()[0]}
    device = jax.devices()[0].device_kind
    report = {"device": device, "jax": jax.__version__, "copy_bytes_per_second": copy, "decode_attention": results}
    print(json.dumps(report, indent=2))
    return int(any("failed" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
