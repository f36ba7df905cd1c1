"""Each Mosaic kernel at small shapes, beside the XLA path in float32: is it right on this device?

For a caller that is about to trust a kernel on a GPU where nobody has run it yet. Takes seconds, mostly compiling. The
shapes (`self_check_cases`) are small, but a program has many work items and many steps of one: every slot of shared
memory is used again, and every barrier's phase wraps. `python -m kernels_pallas.bench.check` asks for more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from kernels_pallas.self_check_cases import TOLERANCE, Heads, Variant, make_check, same_bits

# With few SMs a program has many items.
_OTHERS = ("prefill_attention", "append_kv", "add_rms_norm", "rows_to_fp8", "grouped_gemm")
QUICK: dict[str, tuple[Variant, ...]] = {
    "decode_attention": (Variant(2), Variant(7, splits=3)), **dict.fromkeys(_OTHERS, (Variant(2),))
}  # fmt: skip
THOROUGH: dict[str, tuple[Variant, ...]] = {
    "decode_attention": (
        Variant(1), Variant(2, splits=3), Variant(7), Variant(None), Variant(None, splits=3), Variant(7, splits=12),
    ),
    **dict.fromkeys(_OTHERS, (Variant(1), Variant(7), Variant(None))),
}  # fmt: skip
KERNELS = tuple(QUICK)


class KernelError(RuntimeError):
    """A kernel that fails or disagrees; one line."""


def check_variants(
    kernel: str,
    heads: Heads,
    variants: tuple[Variant, ...],
    *,
    repeats: int = 0,
    tuning: Any = None,
    interpret: Any = None,
) -> Iterator[tuple[Variant, float]]:
    """Yields each variant and its error, one after another, and all of them again for each window of the heads'.
    `repeats`: more runs of each, the same in every bit.

    Raises KernelError as `check_kernel` does.
    """
    for window in heads.checked_windows(kernel):
        again = tuple(replace(variant, window=window) for variant in variants)
        yield from _check_window(kernel, heads, window, again, repeats, tuning, interpret)


def _check_window(
    kernel: str,
    heads: Heads,
    window: int | None,
    variants: tuple[Variant, ...],
    repeats: int,
    tuning: Any,
    interpret: Any,
) -> Iterator[tuple[Variant, float]]:
    try:
        check = make_check(kernel, heads, window=window, tuning=tuning, interpret=interpret)
        want = jax.jit(check.reference)(*check.arrays)
    except Exception as error:
        raise KernelError(f"{kernel}: the XLA path failed: {_first_line(error)}") from error
    for variant in variants:
        try:
            call = jax.jit(partial(check.run, variant))
            got = call(*check.arrays)
            error = check.error(got, want)
            same = [same_bits(call(*check.arrays), got) for _ in range(repeats)] if error <= TOLERANCE else []
            same = [bool(x) for x in same]
        except Exception as error:  # whatever it is: the caller must not take this kernel
            raise KernelError(f"{kernel} failed: {_first_line(error)} ({variant.text})") from error
        if not error <= TOLERANCE:
            raise KernelError(
                f"{kernel}: a row is off by {error:.3g} of its norm from the XLA path, over {TOLERANCE:g} "
                f"({variant.text})"
            )
        if not all(same):
            raise KernelError(
                f"{kernel}: {same.count(False)} of {repeats} more runs gave other bits than the first ({variant.text})"
            )
        yield variant, error


def check_kernel(kernel: str, heads: Heads, *, tuning: Any = None, interpret: Any = None) -> float:
    """The error of a Mosaic kernel's worst row on this process' default device.

    kernel     one of KERNELS
    tuning     as the kernel takes it
    interpret  likewise, for tests without a GPU

    Raises KernelError, one line, when the kernel cannot be built or run, or is off by more than TOLERANCE.
    """
    return max(error for _, error in check_variants(kernel, heads, QUICK[kernel], tuning=tuning, interpret=interpret))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
