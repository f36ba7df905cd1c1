"""The memory plan never promises more than there is, compiles at most twice, and its refusals name what would fit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from nanoflow_jax.config import ConfigError
from nanoflow_jax.cost.footprint import weight_bytes
from nanoflow_jax.engine.memory import CLOSE, MemoryPlan, check_weights, page_bytes, plan_pages
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.params import is_info
from nanoflow_jax.models.registry import read_config
from nanoflow_jax.parallel.mesh import make_mesh, valid_sizes
from nanoflow_jax.step.slots import CACHE_SPEC, cache_shape
from nanoflow_jax.weights.hub import resolve_model

TINY = read_config(resolve_model("tiny") / "config.json")
LIMIT = 100_000


class Compiler:
    """Stands for compilation: temporaries by the number of pages. Counts its calls."""

    def __init__(self, temporaries: Callable[[int], int]):
        self.temporaries = temporaries
        self.calls: list[int] = []  # pages

    def __call__(self, pages: int) -> int:
        assert pages >= 1
        self.calls.append(pages)
        return self.temporaries(pages)


@st.composite
def temporaries(draw: st.DrawFn) -> Callable[[int], int]:
    """Bytes by pages: constant, growing, falling, with a jump, or any."""
    base, slope = draw(st.integers(0, LIMIT)), draw(st.integers(0, 50))
    kind = draw(st.sampled_from(["constant", "growing", "falling", "jump", "odd"]))
    if kind == "constant":
        return lambda pages: base
    if kind == "growing":
        return lambda pages: base // 4 + slope * pages
    if kind == "falling":
        return lambda pages: max(0, base - slope * pages)
    if kind == "jump":
        return lambda pages: base // 8 if pages * slope < 500 else base // 2
    return lambda pages: (pages * 7919 + base) % (base + 1)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    temporaries(), st.integers(0, LIMIT), st.integers(0, 5_000), st.integers(1, 9_000), st.integers(1, 500),
    st.integers(1, 40),
)  # fmt: skip
def test_a_plan_fits_or_is_refused(
    bytes_for: Callable[[int], int], weights: int, slots: int, page: int, most: int, needed: int
) -> None:
    """What is promised fits beside the temporaries of a step that was compiled with at least as many pages."""
    compiler = Compiler(bytes_for)
    try:
        plan = plan_pages(LIMIT, weights, slots, page, most, needed, compiler)
    except ConfigError as error:
        fit = int(re.search(r"needs \d+ KV pages and (\d+) fit", str(error)).group(1))  # type: ignore[union-attr]
        assert fit < needed
    else:
        assert needed <= plan.num_pages <= most
        assert plan.num_pages <= compiler.calls[-1]
        assert plan.temporaries == bytes_for(compiler.calls[-1])
        assert plan.weights + plan.slots + plan.temporaries + plan.num_pages * plan.page <= LIMIT
    assert 1 <= len(compiler.calls) <= 2


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, LIMIT), st.integers(0, 30), st.integers(50, 2_000))
def test_with_temporaries_that_grow_little_gets_used(base: int, slope: int, page: int) -> None:
    """The pool is within CLOSE of the largest that fits, where temporaries are what they are; and within what a
    second guess loses where they grow with the pages."""
    compiler = Compiler(lambda pages: base // 2 + slope * pages)
    best = max((n for n in range(1, LIMIT // page + 1) if compiler.temporaries(n) + n * page <= LIMIT), default=0)
    try:
        plan = plan_pages(LIMIT, 0, 0, page, 10**6, 1, compiler)
    except ConfigError:
        assert best <= 1
        return
    assert plan.num_pages <= best
    share = 1 - CLOSE if not slope else (1 - CLOSE) * page / (page + slope) * (1 - slope / page)
    assert plan.num_pages >= math.floor(share * best) - 1


def test_the_refusal_says_how_many_fit_and_what_to_change() -> None:
    with pytest.raises(
        ConfigError, match=r"^max_model_len: one request needs 11 KV pages and 10 fit \(.*\); accepted: "
    ):
        plan_pages(LIMIT, 50_000, 10_000, 2_000, 1_000, 11, lambda pages: 20_000)
    assert plan_pages(LIMIT, 50_000, 10_000, 2_000, 1_000, 10, lambda pages: 20_000).num_pages == 10
    with pytest.raises(ConfigError, match="needs 1 KV pages and 0 fit"):
        plan_pages(LIMIT, 99_000, 0, 2_000, 1_000, 1, lambda pages: 20_000)


def test_the_plan_adds_up_in_words() -> None:
    gib = 2**30
    text = MemoryPlan(80 * gib, 40 * gib, gib, 2 * gib, gib // 4, 100).text()
    assert text == "memory per device, GiB: weights 40.00, slots 1.00, step 2.00, 100 KV pages 25.00, of 80.00"


# -- bytes, against real arrays


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_real_arrays(devices: int, kv_heads: int, dtype: str) -> None:
    """Of each device, with KV heads split, and replicated where there are fewer than devices."""
    config = replace(TINY, num_kv_heads=kv_heads, dtype=dtype)
    mesh, infos = make_mesh(config, devices), param_infos(config, devices)

    def on_each(arrays: list[jax.Array]) -> int:
        sizes = dict.fromkeys(mesh.devices.flat, 0)
        for shard in (shard for array in arrays for shard in array.addressable_shards):
            sizes[shard.device] += shard.data.nbytes
        assert len(set(sizes.values())) == 1
        return next(iter(sizes.values()))

    weights = [
        jax.device_put(jnp.zeros(info.shape, info.dtype), info.sharding(mesh))
        for info in jax.tree.leaves(infos, is_leaf=is_info)
    ]
    assert weight_bytes(infos, devices) == on_each(weights)
    pages = jnp.zeros(cache_shape(config, devices, 3, 4), jnp.dtype(dtype))
    pools = [jax.device_put(pages, NamedSharding(mesh, CACHE_SPEC)) for _ in range(2)]
    assert 3 * page_bytes(config, devices, 4) == on_each(pools)


# -- weights that do not fit


@pytest.mark.parametrize("share", [1.5, 1.0, 0.6, 0.3, 0.15, 0.01])
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_size_that_is_named_fits(share: float, devices: int, dtype: str) -> None:
    """The smallest larger one that leaves a tenth for the rest; none is named when none does."""
    config = replace(TINY, dtype=dtype)
    limit = int(weight_bytes(param_infos(config, 1), 1) * share)
    fits = {n: weight_bytes(param_infos(config, n), n) < limit for n in valid_sizes(config)}
    if fits[devices]:
        check_weights(config, param_infos(config, devices), devices, limit)
        return
    with pytest.raises(ConfigError) as caught:
        check_weights(config, param_infos(config, devices), devices, limit)
    message = str(caught.value)
    assert "\n" not in message
    assert ("bfloat16" in message) == (dtype == "float32")
    named = re.search(r"tensor_parallel_size=(\d+) would", message)
    roomy = [n for n in valid_sizes(config) if n > devices and weight_bytes(param_infos(config, n), n) < 0.9 * limit]
    if named:
        assert int(named.group(1)) == roomy[0]
        assert fits[roomy[0]]
    else:
        assert not roomy
        assert "no tensor_parallel_size of this model would" in message
