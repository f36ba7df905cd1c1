"""How long calls are expected to take: the formula by hand, and that the program says it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import decode_attention
from kernels_pallas.expected import LATENCY, Expected, scheduled_as
from kernels_pallas.tuning import ADD_NORM, APPEND, DECODE, PREFILL, DecodeTuning, tuned_gpu

RATES = Expected(source="a test", bytes_per_second=1e12, sm_bytes_per_second=2e10, flops_per_second=1e14, start_us=2.0)


def test_us_by_hand() -> None:
    assert RATES.us(moved=1e8, sms=100, all_sms=100) == pytest.approx(2 + 100)  # 0.1 GB at 1 TB/s
    assert RATES.us(moved=1e8, sms=25, all_sms=100) == pytest.approx(2 + 200)  # 25 SMs take 0.5 TB/s
    assert RATES.us(moved=0, flops=1e10, sms=100, all_sms=100) == pytest.approx(2 + 100)
    assert RATES.us(moved=1e7, flops=1e10, sms=50, all_sms=100) == pytest.approx(2 + 200)


@pytest.mark.parametrize("field", ["bytes_per_second", "sm_bytes_per_second", "flops_per_second", "start_us"])
def test_wrong_rates_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: -1"):
        replace(RATES, **{field: -1})


def test_every_tuning_says_what_it_is_from() -> None:
    """No figure of these kernels has been measured on a GPU: all say so."""
    for table in (DECODE, APPEND, PREFILL, ADD_NORM):
        for gpu, tuning in table.items():
            given = [getattr(tuning, name) for name in ("expected", "expected_fp8") if hasattr(tuning, name)]
            assert given, gpu
            for expected in given:
                assert expected.source.startswith("target, not measured"), gpu


def test_tuned_gpu_by_the_name_of_the_device() -> None:
    assert tuned_gpu("NVIDIA H100 80GB HBM3") == "h100"
    assert tuned_gpu("NVIDIA H200 141GB HBM3e") == "h200"
    assert tuned_gpu("cpu") == "h200"


def told(tuning: DecodeTuning, **more: Any) -> list[str]:
    """The attribute's values in the lowered program of a decode step: 3 rows, 4 pages each, of 2 KV heads."""
    shapes = ((3, 8, 64), jnp.bfloat16), ((9, 2, 64, 64), jnp.bfloat16), ((9, 2, 64, 64), jnp.bfloat16)
    avals = [jax.ShapeDtypeStruct(*s) for s in (*shapes, ((3, 4), jnp.int32), ((3,), jnp.int32))]
    params = plgpu.InterpretGPUParams()

    def call(*args: Any) -> Any:
        return decode_attention(*args, backend="mosaic", tuning=tuning, interpret=params, **more)

    text = jax.jit(call).lower(*avals).as_text()
    return re.findall(rf'{LATENCY} = "(\d+)"', text)


def test_the_program_says_it() -> None:
    """Of the context that is expected, by default the table's; nothing where the tuning knows nothing."""
    tuning = DecodeTuning(sms=2, min_split_pages=4, expected=RATES)
    rows = 3 * 8 * 64 * 4  # queries and results
    for context, more in ((256, {}), (100, {"expected_context": 100})):
        us = 2 + (2 * 3 * context * 2 * 64 * 2 + rows) / 4e10 * 1e6  # two SMs
        assert set(told(tuning, **more)) == {str(round(us * 1000))}
    assert told(replace(tuning, expected=None)) == []


def test_nothing_outside_is_marked() -> None:
    def f(x: jax.Array) -> jax.Array:
        with scheduled_as(7.0):
            y = jnp.sin(x)
        return jnp.cos(y)

    lines = [line for line in jax.jit(f).lower(jnp.ones(3)).as_text().splitlines() if LATENCY in line]
    assert len(lines) == 1
    assert "sine" in lines[0]
    assert '"7000"' in lines[0]
