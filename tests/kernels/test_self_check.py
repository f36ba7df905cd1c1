"""The check before a Mosaic kernel is trusted: under the interpreter the kernels pass, and twins do not."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.experimental.pallas import mosaic_gpu as plgpu

import kernels_pallas
from kernels_pallas import combine_rows
from kernels_pallas import self_check_cases as self_check
from kernels_pallas.add_norm_mosaic import make_plan
from kernels_pallas.bench import check as command
from kernels_pallas.decode_attention_mosaic import Q_SLOTS
from kernels_pallas.self_check import KERNELS, QUICK, THOROUGH, KernelError, check_kernel, check_variants
from kernels_pallas.self_check_cases import WIDEST, WINDOWED, Heads, Variant, make_check
from kernels_pallas.tuning import ADD_NORM, APPEND, DECODE, PAGE_TOKENS, PREFILL, PREFILL_STEP_PAGES

BF16 = Heads(q_heads=2, kv_heads=1, head_dim=64)
FP8 = Heads(q_heads=4, kv_heads=2, head_dim=64, fp8=True)
QUANTISED = replace(BF16, quantised=True)
SLIDING = replace(BF16, windows=(100,))
NARROW = replace(BF16, hidden=512, ffn=512)  # fewer steps of a product, still more than stages


@pytest.mark.parametrize(
    ("kernel", "heads"),
    [
        *((k, NARROW if k in ("rows_to_fp8", "grouped_gemm") else BF16) for k in KERNELS if k != "add_rms_norm"),
        ("decode_attention", FP8),
        ("append_kv", FP8),
    ],
)
def test_kernels_pass(kernel: str, heads: Heads) -> None:
    error = check_kernel(kernel, heads, interpret=plgpu.InterpretGPUParams())
    # Two GEMMs, one after the other; and what rounding to fp8 takes of what is allowed, half.
    assert error < {"grouped_gemm": 1e-2, "rows_to_fp8": 1.1e-2}.get(kernel, 5e-3)
    assert (error == 0) == (kernel == "append_kv")


def test_norms_pass() -> None:
    """In bfloat16, and in fp8 beside them, where rounding takes half of what is allowed."""
    check = make_check("add_rms_norm", QUANTISED, interpret=plgpu.InterpretGPUParams())
    (variant,) = QUICK["add_rms_norm"]
    got, want = jax.jit(partial(check.run, variant))(*check.arrays), jax.jit(check.reference)(*check.arrays)
    assert len(got) == 3
    assert 0 < check.error(got[:2], want[:2]) < 5e-3 < check.error(got, want) < self_check.TOLERANCE / 2


@pytest.mark.parametrize("kernel", WINDOWED)
def test_windowed_kernels_pass(kernel: str) -> None:
    """Wide windows are checked as one that cuts contexts; what lies below it is not read."""
    heads = replace(BF16, windows=(4096, 5000))
    assert heads.checked_windows(kernel) == [None, WIDEST]
    assert max(self_check.LENGTHS) > WIDEST + PAGE_TOKENS
    check = make_check(kernel, heads, window=WIDEST, interpret=plgpu.InterpretGPUParams())
    got = jax.jit(partial(check.run, QUICK[kernel][-1]))(*check.arrays)
    assert check.error(got, jax.jit(check.reference)(*check.arrays)) < 5e-3


def test_other_kernels_know_no_window() -> None:
    assert all(SLIDING.checked_windows(kernel) == [None] for kernel in KERNELS if kernel not in WINDOWED)


MADE = cache(make_check)  # the XLA path is compiled once for all twins of a kernel


def as_mosaic(monkeypatch: pytest.MonkeyPatch, kernel: str, twin: Any) -> None:
    """The check calls `twin(real, *arrays, **options)` where it asks for the Mosaic kernel; XLA's stands in for it.
    options: sm_budget, first_page and scales; the stand-in knows no budget."""
    function = getattr(kernels_pallas, kernel)

    def real(*arrays: Any, sm_budget: Any = None, **options: Any) -> Any:
        return function(*arrays, **options)

    def call(*arrays: Any, backend: str = "xla", tuning: Any = None, interpret: Any = None, **options: Any) -> Any:
        return twin(real, *arrays, **options) if backend == "mosaic" else real(*arrays, **options)

    monkeypatch.setattr(self_check, "make_check", MADE)
    monkeypatch.setattr(self_check, kernel, call)
    if kernel == "grouped_gemm":
        monkeypatch.setattr(self_check, "gather_rows", lambda x, rows, used, **more: x[rows])
        monkeypatch.setattr(self_check, "combine_rows", lambda *arrays, **more: combine_rows(*arrays))


def stale_pages(table: Any, stages: int = 12) -> Any:
    """What a slot that is used again before its barrier's phase has turned holds: the page of `stages` pages before."""
    return jnp.concatenate([table[:, :stages], table[:, :-stages]], axis=1)


def stale_rows(x: Any, rows: int = 96) -> Any:
    """The same of append: a block of rows once more, instead of the one `rows` later."""
    return jnp.concatenate([x[:rows], x[:-rows]])


def other_scales(found: Any) -> Any:
    """A norm in fp8 with the scales of its neighbours."""
    total, normed = found
    return (total, (normed[0], jnp.roll(normed[1], 1))) if isinstance(normed, tuple) else found


def first_of_each(f: Any, *args: Any, sm_budget: int, **more: Any) -> Any:
    """A program that takes its first item and no further one: nobody has written the rows of those."""
    out, lse = f(*args, **more)
    return out.at[sm_budget:].set(0), lse


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
    "log-sum-exp off": (
        "decode_attention",
        BF16,
        lambda f, *args, **more: (f(*args, **more)[0], f(*args, **more)[1] * 1.02),
    ),
    "scales ignored": (
        "decode_attention",
        FP8,
        lambda f, *args, k_scale, **more: f(*args, k_scale=jnp.ones_like(k_scale), **more),
    ),
    "a slot's old page": (
        "decode_attention",
        BF16,
        lambda f, q, k, v, t, *rest, **more: f(q, k, v, stale_pages(t), *rest, **more),
    ),
    "first page ignored": ("decode_attention", BF16, lambda f, *args, first_page, **more: f(*args, **more)),
    "budget's stride ignored": ("decode_attention", BF16, first_of_each),
    "an empty row read": (
        "decode_attention",
        BF16,
        lambda f, *args, **more: f(*args[:-1], jnp.maximum(args[-1], 1), **more),
    ),
    "K for V in prefill": ("prefill_attention", BF16, lambda f, q, k, v, *rest, **more: f(q, k, k, *rest, **more)),
    "not causal": ("prefill_attention", BF16, lambda f, q, k, v, t, s, n, **more: f(q, k, v, t, s, n + 1, **more)),
    "a slot's old page in prefill": (
        "prefill_attention",
        BF16,
        lambda f, q, k, v, t, *rest, **more: f(q, k, v, stale_pages(t), *rest, **more),
    ),
    "first page ignored in prefill": ("prefill_attention", BF16, lambda f, *args, first_page, **more: f(*args, **more)),
    "padding not answered": (
        "prefill_attention",
        BF16,
        lambda f, *args, **more: f(*args, **more).at[-1].set(jnp.bfloat16(1e-3)),
    ),
    "V not written": ("append_kv", BF16, lambda f, k, v, *rest, **more: (f(k, v, *rest, **more)[0], v)),
    "dropped row written": (
        "append_kv",
        BF16,
        lambda f, k, v, a, b, p, s, **more: f(k, v, a, b, p % (k.shape[0] - self_check.FIRST_PAGE), s, **more),
    ),
    "scales not applied": (
        "append_kv",
        FP8,
        lambda f, *args, k_scale, **more: f(*args, k_scale=jnp.ones_like(k_scale), **more),
    ),
    "a block's old rows": (
        "append_kv",
        BF16,
        lambda f, k, v, a, b, *rest, **more: f(k, v, stale_rows(a), b, *rest, **more),
    ),
    "an update not added": ("add_rms_norm", BF16, lambda f, x, u, w, **more: f(x, jnp.zeros_like(u), w, **more)),
    "columns of another device": (
        "add_rms_norm",
        BF16,
        lambda f, x, u, w, **more: f(x, u[::-1] if u.ndim == 3 else u, w, **more),
    ),
    "weight ignored": ("add_rms_norm", BF16, lambda f, x, u, w, **more: f(x, u, jnp.ones_like(w), **more)),
    "a slot's old row": (
        "add_rms_norm",
        BF16,
        lambda f, x, u, w, **more: (f(x, u, w, **more)[0], stale_rows(f(x, u, w, **more)[1], 48)),
    ),
    "scales of other rows": ("add_rms_norm", QUANTISED, lambda f, *args, **more: other_scales(f(*args, **more))),
    "a piece's first rows": (
        "rows_to_fp8",
        BF16,
        lambda f, *args, cuts=None, **more: f(*args, cuts=cuts and [(0, b - a) for a, b in cuts], **more),
    ),
    "scales of other channels": (
        "rows_to_fp8",
        BF16,
        lambda f, *args, scales=None, **more: f(*args, scales=scales and (scales[0], jnp.roll(scales[1], 128)), **more),
    ),
    "a row with its neighbour's scale": (
        "rows_to_fp8",
        BF16,
        lambda f, *args, **more: other_scales((None, f(*args, **more)))[1],
    ),
    "biases ignored": ("grouped_gemm", BF16, lambda f, *args, bias, **more: f(*args, **more)),
    "rows of the group before": (
        "grouped_gemm",
        BF16,
        lambda f, x, w, sizes, **more: f(x, w, jnp.roll(sizes, 1), **more),
    ),
    "a window ignored": ("decode_attention", SLIDING, lambda f, *args, window, **more: f(*args, **more)),
    "a window too wide by one": (
        "decode_attention",
        SLIDING,
        lambda f, *args, window, **more: f(*args, window=window and window + 1, **more),
    ),
    "a window too narrow by one": (
        "prefill_attention",
        SLIDING,
        lambda f, *args, window, **more: f(*args, window=window and window - 1, **more),
    ),
    "first page ignored in append": ("append_kv", BF16, lambda f, *args, first_page, **more: f(*args, **more)),
}


@pytest.mark.parametrize(
    ("kernel", "heads"),
    [*((kernel, SLIDING) for kernel in KERNELS), ("decode_attention", FP8), ("add_rms_norm", QUANTISED)],
)
def test_the_stand_in_of_the_twins_passes(kernel: str, heads: Heads, monkeypatch: pytest.MonkeyPatch) -> None:
    as_mosaic(monkeypatch, kernel, lambda f, *arrays, **more: f(*arrays, **more))
    assert check_kernel(kernel, heads) < self_check.TOLERANCE / (1.8 if kernel == "rows_to_fp8" else 2)


@pytest.mark.parametrize("name", TWINS)
def test_twins_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, heads, twin = TWINS[name]
    as_mosaic(monkeypatch, kernel, twin)
    with pytest.raises(
        KernelError, match=rf"^{kernel}: a row is off by .* of its norm from the XLA path, over 0\.02 \(.*\)$"
    ):
        check_kernel(kernel, heads)


def test_sums_of_choices_that_are_not_here_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    as_mosaic(monkeypatch, "grouped_gemm", lambda f, *arrays, **more: f(*arrays, **more))

    def twin(rows: Any, place: Any, weights: Any, backend: str = "xla", **more: Any) -> Any:
        return combine_rows(rows, place % rows.shape[0] if backend == "mosaic" else place, weights)

    monkeypatch.setattr(self_check, "combine_rows", twin)
    with pytest.raises(KernelError, match=r"^grouped_gemm: a row is off by .* of its norm from the XLA path"):
        check_kernel("grouped_gemm", BF16)


def test_a_kernel_that_cannot_run_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no such instruction\nand a long trace")

    as_mosaic(monkeypatch, "append_kv", fails)
    with pytest.raises(
        KernelError, match=r"^append_kv failed: NotImplementedError: no such instruction \(sm_budget 2\)$"
    ):
        check_kernel("append_kv", BF16)


def test_runs_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right within the tolerance every time, but not the same bits: only repeats show it."""

    def twin(f: Any, *args: Any, **more: Any) -> Any:
        out, lse = f(*args, **more)
        return (out.astype(jnp.float32) * factor()).astype(out.dtype), lse

    runs = itertools.count()

    def factor() -> Any:
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return io_callback(lambda: np.float32(1.0 if next(runs) < 3 else 1.01), shape)

    as_mosaic(monkeypatch, "decode_attention", twin)
    variants = (Variant(None),)
    assert [e < self_check.TOLERANCE for _, e in check_variants("decode_attention", BF16, variants, repeats=2)] == [
        True
    ]
    with pytest.raises(KernelError, match=r"^decode_attention: 4 of 4 more runs gave other bits .* \(all SMs\)$"):
        runs = itertools.chain([0], itertools.repeat(9))
        list(check_variants("decode_attention", BF16, variants, repeats=4))


def test_what_the_checks_cover() -> None:
    """Whatever the tuning: more steps of a row than stages, more items of a program than slots for queries, more blocks
    than stages; and both lists together have all budgets."""
    longest = -(-max(self_check.LENGTHS) // PAGE_TOKENS)
    assert longest == self_check.ROW_PAGES
    for tuning in DECODE.values():
        assert longest // tuning.step_pages >= 2 * tuning.stages(128)
        assert longest // tuning.step_pages > tuning.stages(64, itemsize=1)
    assert all(longest // PREFILL_STEP_PAGES >= 2 * tuning.stages(64) for tuning in PREFILL.values())
    assert all(2 * 16 * 2 * tuning.stages < self_check.APPENDED for tuning in APPEND.values())
    for tuning in ADD_NORM.values():
        x = jnp.zeros((self_check.NORMED, BF16.hidden), jnp.bfloat16)
        plan = make_plan(x, x, None, 0, self_check.EPS, replace(tuning, sms=2))
        assert 2 * 2 * plan.warpgroups * plan.stages <= self_check.NORMED
    assert sum(n > 0 for n in self_check.LENGTHS) > 2 * 2 * Q_SLOTS
    assert 0 in self_check.LENGTHS and 0 in self_check.CHUNKS
    for kernel in KERNELS:
        assert {v.sm_budget for v in (*QUICK[kernel], *THOROUGH[kernel])} == {1, 2, 7, None}
    assert {v.splits for v in QUICK["decode_attention"]} == {1, 3}


def test_the_command_takes_a_window() -> None:
    options = command._parser().parse_args(["decode_attention", "--window", "1024", "--smallest"])
    heads, _ = command.chosen(options)
    assert [one.windows for one in heads] == [(1024,)]
    heads, _ = command.chosen(command._parser().parse_args(["decode_attention"]))
    assert all(one.windows == () for one in heads)
