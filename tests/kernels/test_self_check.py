"""The check before a Mosaic kernel is trusted: under the interpreter the kernels pass, and twins do not."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import append_kv, decode_attention, prefill_attention, self_check
from kernels_pallas.self_check import CHECKS, Heads, KernelError, check_kernel

BF16 = Heads(q_heads=2, kv_heads=1, head_dim=64)
FP8 = Heads(q_heads=4, kv_heads=2, head_dim=64, fp8=True)


@pytest.mark.parametrize(
    ("kernel", "heads"),
    [*((kernel, BF16) for kernel in CHECKS), ("decode_attention", FP8), ("append_kv", FP8)],
)
def test_kernels_pass(kernel: str, heads: Heads) -> None:
    error = check_kernel(kernel, heads, interpret=plgpu.InterpretGPUParams())
    assert error < 5e-3
    assert (error == 0) == (kernel == "append_kv")


def as_mosaic(monkeypatch: pytest.MonkeyPatch, kernel: str, twin: Any) -> None:
    """The check calls `twin(real, *arrays, **scales)` where it asks for the Mosaic kernel; XLA's stands in for it."""
    real = {"decode_attention": decode_attention, "prefill_attention": prefill_attention, "append_kv": append_kv}[
        kernel
    ]

    def call(*arrays: Any, backend: str = "xla", tuning: Any = None, interpret: Any = None, **more: Any) -> Any:
        return twin(real, *arrays, **more) if backend == "mosaic" else real(*arrays, **more)

    monkeypatch.setattr(self_check, kernel, call)


TWINS: dict[str, tuple[str, Heads, Any]] = {
    "K for V": ("decode_attention", BF16, lambda f, q, k, v, *rest, **more: f(q, k, k, *rest, **more)),
    "identity page table": (
        "decode_attention",
        BF16,
        lambda f, q, k, v, t, *rest, **more: f(
            q, k, v, jnp.arange(t.size, dtype=t.dtype).reshape(t.shape), *rest, **more
        ),
    ),
    "one token too many": ("decode_attention", BF16, lambda f, *args, **more: f(*args[:-1], args[-1] + 1, **more)),
    "zeros": ("decode_attention", BF16, lambda f, *args, **more: tuple(jnp.zeros_like(x) for x in f(*args, **more))),
    "NaN": ("decode_attention", BF16, lambda f, *args, **more: tuple(x * jnp.nan for x in f(*args, **more))),
    "log-sum-exp off": ("decode_attention", BF16, lambda f, *args, **more: (f(*args)[0], f(*args)[1] * 1.02)),
    "scales ignored": (
        "decode_attention",
        FP8,
        lambda f, *args, k_scale, v_scale: f(*args, k_scale=jnp.ones_like(k_scale), v_scale=v_scale),
    ),
    "K for V in prefill": ("prefill_attention", BF16, lambda f, q, k, v, *rest, **more: f(q, k, k, *rest, **more)),
    "not causal": ("prefill_attention", BF16, lambda f, q, k, v, t, s, n, **more: f(q, k, v, t, s, n + 1, **more)),
    "V not written": ("append_kv", BF16, lambda f, k, v, *rest, **more: (f(k, v, *rest, **more)[0], v)),
    "dropped row written": ("append_kv", BF16, lambda f, k, v, a, b, p, s, **more: f(k, v, a, b, p % k.shape[0], s)),
    "scales not applied": (
        "append_kv",
        FP8,
        lambda f, *args, k_scale, v_scale: f(*args, k_scale=jnp.ones_like(k_scale), v_scale=v_scale),
    ),
}


@pytest.mark.parametrize(("kernel", "heads"), [*((kernel, BF16) for kernel in CHECKS), ("decode_attention", FP8)])
def test_the_stand_in_of_the_twins_passes(kernel: str, heads: Heads, monkeypatch: pytest.MonkeyPatch) -> None:
    as_mosaic(monkeypatch, kernel, lambda f, *arrays, **more: f(*arrays, **more))
    assert check_kernel(kernel, heads) < self_check.TOLERANCE / 2


@pytest.mark.parametrize("name", TWINS)
def test_twins_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, heads, twin = TWINS[name]
    as_mosaic(monkeypatch, kernel, twin)
    with pytest.raises(KernelError, match=rf"^{kernel}: a row is off by .* of its norm from the XLA path, over 0\.02$"):
        check_kernel(kernel, heads)


def test_a_kernel_that_cannot_run_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no such instruction\nand a long trace")

    as_mosaic(monkeypatch, "append_kv", fails)
    with pytest.raises(KernelError, match=r"^append_kv failed: NotImplementedError: no such instruction$"):
        check_kernel("append_kv", BF16)
