"""Every plan in `configs/plans`, at its own size, gives the tokens of the plain plan on one device."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from nanoflow_jax.config import configs_root
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.params import is_info
from nanoflow_jax.models.registry import parse_config
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.plan.plan import SchedulePlan
from nanoflow_jax.step.batch import StepBatch, StepShape
from nanoflow_jax.step.slots import CACHE_SPEC, KVCache, cache_shape
from nanoflow_jax.step.trace import StepSpec
from tests.step.logits_step import build_logits_step, empty_batch
from tests.step.step_driver import FAST_COMPILE

PLAIN = "two_all_reduce"
PLANS = sorted(path.stem for path in (configs_root() / "plans").glob("*.toml"))
DECODE, PREFILL, SEGMENTS, TABLE, PAGE, PAGES = 1280, 768, 24, 3, 16, 4000
CONFIG = parse_config(
    {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
     "num_key_value_heads": 8, "max_position_embeddings": 64, "dtype": "float32"}
)  # fmt: skip


@cache
def batch() -> StepBatch:
    """Ragged decode rows (every ninth one empty) and chunks of prompts, over permuted pages; the cache is full of
    old values."""
    rng = np.random.default_rng(3)
    b = empty_batch(StepShape(DECODE, PREFILL, SEGMENTS, TABLE), PAGES)
    pages = rng.permutation(PAGES)[: (DECODE + SEGMENTS) * TABLE].reshape(-1, TABLE).astype(np.int32)
    b.token_ids[:] = rng.integers(0, CONFIG.vocab_size, DECODE + PREFILL)
    b.decode_table[:], b.prefill_table[:] = pages[:DECODE], pages[DECODE:]
    lengths = rng.integers(1, TABLE * PAGE + 1, DECODE).astype(np.int32)
    live = np.arange(DECODE) % 9 != 0
    b.decode_lengths[:] = np.where(live, lengths, 0)
    at = np.where(live, lengths - 1, 0)
    b.positions[:DECODE] = at
    b.write_pages[:DECODE] = np.where(live, b.decode_table[np.arange(DECODE), at // PAGE], PAGES)
    b.write_slots[:DECODE] = at % PAGE
    row = 0
    for s, count in enumerate(rng.integers(10, 31, SEGMENTS)):
        first = int(rng.integers(0, TABLE * PAGE - count + 1))
        where, rows = np.arange(first, first + count), slice(DECODE + row, DECODE + row + count)
        b.positions[rows], b.write_slots[rows] = where, where % PAGE
        b.write_pages[rows] = b.prefill_table[s, where // PAGE]
        b.prefill_lengths[s] = first + count
        row += int(count)
        b.prefill_starts[s + 1 :] = row
        b.sampled[DECODE + s] = DECODE + row - 1
    return b


def run(plan_name: str, devices: int, enforce_order: bool = False) -> np.ndarray:
    """Logits of the live decode rows and of all chunk rows."""
    # The weights are not in fp8; and plans of two GPUs may be the same.
    plan = replace(load_plan(plan_name), name="", description="", target=None, gathers=None)
    return _run(plan, devices, enforce_order)


@cache
def _run(plan: SchedulePlan, devices: int, enforce_order: bool) -> np.ndarray:
    mesh = Mesh(np.array(jax.devices()[:devices]), ("tp",))
    infos = param_infos(CONFIG, devices, plan.layouts(CONFIG, devices))

    def values(name: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng(sum(name.encode()) + len(name))
        return (rng.normal(size=shape) * shape[-1] ** -0.5 + (len(shape) == 1)).astype(np.float32)[index]

    def load(info):
        shapes = {source.name: source.shape for source in info.sources}
        return jax.make_array_from_callback(
            info.shape, info.sharding(mesh), lambda i: info.read(lambda n, at: values(n, at, shapes[n]), i)
        )

    params = jax.tree.map(load, infos, is_leaf=is_info)
    old = np.random.default_rng(5).normal(size=cache_shape(CONFIG, 1, PAGES, PAGE)).astype(np.float32)
    sharding = NamedSharding(mesh, CACHE_SPEC)
    cache_ = KVCache(*(jax.device_put(jnp.asarray(old), sharding) for _ in range(2)))
    spec = StepSpec(CONFIG, plan, StepShape(DECODE, PREFILL, SEGMENTS, TABLE), enforce_order=enforce_order)
    step: Any = build_logits_step(spec, mesh, infos)  # jitted
    _, logits = step.lower(params, cache_, batch()).compile(compiler_options=FAST_COMPILE)(params, cache_, batch())
    live = np.flatnonzero(batch().decode_lengths).tolist()
    return np.asarray(logits)[[*live, *range(DECODE, DECODE + int(batch().prefill_starts[-1]))]]


@pytest.mark.parametrize("name", PLANS)
def test_plan_gives_the_logits_of_one_device(name: str) -> None:
    """2048 rows in the plan's own pieces and order, on as many devices as it was made for, the order enforced."""
    target = load_plan(name).target
    got, want = run(name, target.devices if target else 8, enforce_order=True), run(PLAIN, 1)
    error = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    assert error.max() < 1e-4, name
    assert (got.argmax(1) == want.argmax(1)).mean() > 0.999


def test_the_comparison_sees_one_wrong_row() -> None:
    """The broken twin: two rows exchanged."""
    want = run(PLAIN, 1)
    got = want.copy()
    got[[3, 700]] = got[[700, 3]]
    error = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    assert error.max() > 1e-2
