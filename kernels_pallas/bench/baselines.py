"""What else the machine has: JAX's Triton and cuDNN attention in this process, PyTorch and FlashInfer in another.

Every one may be missing or fail; then the report says why in a line, and the run goes on.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from kernels_pallas.bench.cases import DecodeCase, PrefillCase, scale_of
from kernels_pallas.bench.kernels import DecodeInputs, PrefillInputs, time_decode, time_prefill
from kernels_pallas.bench.measure import Effort

TRITON = "jax.experimental.pallas.ops.gpu.paged_attention"
TRITON_BYTES = 16 * 2**30  # of pages: they are needed in another layout too
SPLIT_PROGRAMS = 264  # with fewer rows x KV heads than this, two for every SM, it splits the context


class Missing(Exception):
    """A baseline that is not available, and why."""


def triton_call(case: DecodeCase, interpret: bool = False) -> tuple[Callable[..., Any], dict[str, Any]]:
    """JAX's deprecated paged attention, and the options it is given. Raises Missing."""
    if case.fp8:
        raise Missing("takes no scale per head")
    if case.pool_bytes > TRITON_BYTES:
        raise Missing(f"pages of more than {TRITON_BYTES // 2**30} GiB are not copied to its layout")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(TRITON)
    except ImportError as error:
        raise Missing(f"{TRITON} cannot be imported: {error}") from error
    splits = 16 if case.rows * case.model.kv_heads < SPLIT_PROGRAMS else 1
    while case.row_pages % splits:
        splits //= 2
    block = 8
    while (case.row_pages // splits) % block:
        block //= 2
    options = {"k_splits": splits, "pages_per_compute_block": block}

    def call(q: Any, shared: Any, table: Any) -> Any:
        keys, values, lengths = shared  # [Hkv, N, page_size, d]
        return module.paged_attention(
            q * jax.numpy.asarray(scale_of(case), q.dtype), keys, values, table, lengths, interpret=interpret, **options
        ).astype(q.dtype)

    return call, options


def time_triton(case: DecodeCase, inputs: DecodeInputs, effort: Effort, interpret: bool = False) -> dict[str, Any]:
    call, options = triton_call(case, interpret)
    keys, values = inputs.keys.swapaxes(0, 1), inputs.values.swapaxes(0, 1)
    return time_decode(call, inputs, effort, (keys, values)) | {"options": options}


def time_cudnn(case: PrefillCase, inputs: PrefillInputs, effort: Effort) -> dict[str, Any]:
    """cuDNN's attention through `jax.nn`, over K and V that are contiguous: no page table, so easier work."""
    if case.prefix:
        raise Missing("its causal mask has no prefix")
    if jax.default_backend() != "gpu":
        raise Missing("needs a GPU")

    def contiguous(pool: jax.Array, table: jax.Array) -> jax.Array:
        rows = pool[table[0]].swapaxes(1, 2)
        return rows.reshape(1, -1, *rows.shape[2:])[:, : case.rows]

    def call(q: Any, shared: Any, own: Any) -> Any:
        del shared
        return jax.nn.dot_product_attention(q[None], *own, is_causal=True, implementation="cudnn")[0]

    gathered = jax.jit(contiguous)
    return time_prefill(
        call, inputs, effort, [(gathered(inputs.keys, t), gathered(inputs.values, t)) for t in inputs.tables]
    )


def in_torch(names: Sequence[str], timeout: float) -> dict[str, dict[str, Any]]:
    """{implementation: {case: result}} of PyTorch and FlashInfer, from another process, while no other holds the GPU.

    Without PyTorch, {"torch": {"not_available": why}}. What was measured before the time ran out is kept.
    """
    if importlib.util.find_spec("torch") is None:
        return {"torch": {"not_available": "torch is not installed"}}
    command = [sys.executable, "-m", "kernels_pallas.bench.torch_worker", *names]
    results: dict[str, dict[str, Any]] = {}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        output, note = done.stdout, done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        note = [f"stopped after {timeout:.0f} s"]
    for line in output.splitlines():
        if line.startswith("{"):
            record = json.loads(line)
            if "case" not in record:
                return {"torch": record}
            results.setdefault(record.pop("implementation"), {})[record.pop("case")] = record
    if note:
        results.setdefault("torch", {})["not_available"] = note[0]
    return results
