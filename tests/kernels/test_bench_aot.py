"""The benchmark's programs compile for the GPU they are meant for, and hold every call that is timed."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import decode_attention
from kernels_pallas.bench import cases, kernels, measure
from kernels_pallas.bench.cases import CASES, QUICK, AppendCase, DecodeCase, PrefillCase
from kernels_pallas.bench.kernels import Setting
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.inspect.gpu_target import gpu_mesh, saving_options


@pytest.mark.aot
@pytest.mark.parametrize("name", [*QUICK, "gather_rows/gpt-oss-120b-4096", "combine_rows/gpt-oss-120b-4096"])
def test_cases_compile_for_their_gpu(name: str) -> None:
    mesh = gpu_mesh(load_hardware("h200"), 1)
    for implementation, (function, avals) in kernels.programs(CASES[name], Setting()).items():
        placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P())) for x in avals]
        sharded = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
        text = jax.jit(sharded).lower(*placed).compile().as_text() or ""
        assert ("mosaic_gpu" in text) == (implementation == "mosaic")


TILE = 512
DECODE = DecodeCase(model=cases.RANK_70B, rows=8, context=512)
PREFILL = PrefillCase(model=cases.RANK_70B, rows=128, prefix=128)
APPEND = AppendCase(model=cases.RANK_70B, rows=16, pages=64)
COUNTED = 3  # calls
MOSAIC, LOOP = 'custom_call_target="mosaic_gpu', r"\bwhile\("
GEMM, SCATTER, SORT = r"fusion\(.*calls=%gemm_fusion_dot", r"\bscatter\(", r"\bsort\("


def _chain(kind: str) -> tuple[Any, tuple[Any, Any, list[Any]], str]:
    """A call for `chained`, the avals of its program, and what one such call is in compiled text."""
    square = jax.ShapeDtypeStruct((TILE, TILE), jnp.bfloat16)
    if kind == "gemm":
        return (lambda a, b, _: jnp.dot(a, b)), (square, square, [()]), GEMM
    if kind == "prefill":
        q, k, v, table, starts, lengths = PREFILL.avals()
        return kernels.prefill_call(Setting()), (q, (k, v, starts, lengths), [table, table]), MOSAIC
    case = replace(DECODE, fp8=kind == "decode fp8")
    q, k, v, table, *rest = case.avals(2 * case.pages)
    avals = (q, (k, v, *rest), [table, table])
    if kind == "decode xla":
        return (lambda q, kv, table: decode_attention(q, kv[0], kv[1], table, kv[2])[0]), avals, LOOP
    return kernels.decode_call(case, Setting()), avals, MOSAIC


def _append(case: AppendCase) -> tuple[Any, list[Any], tuple[Any, ...]]:
    """Avals of `appends`' program."""
    keys, values, *own = case.avals()
    return (keys, values), [tuple(own[:4])] * 2, tuple(own[4:])


def _compiled(program: Any, *avals: Any) -> str:
    """The program's text, compiled for a GPU."""
    hardware = load_hardware("h200")
    sharding = NamedSharding(gpu_mesh(hardware, 1), P())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), avals)
    lowered = program.trace(*placed).lower(lowering_platforms=("cuda",))
    return lowered.compile(saving_options(hardware)).as_text() or ""


def _count(word: str, program: Any, *avals: Any) -> int:
    return len(re.findall(word, _compiled(program, *avals)))


@pytest.mark.aot
@pytest.mark.parametrize("kind", ["decode", "decode fp8", "decode xla", "prefill", "gemm"])
def test_a_timed_program_holds_every_call(kind: str) -> None:
    """What nobody reads would be removed, and the time divided by calls that are not there."""
    call, avals, word = _chain(kind)
    whole = measure.chained(call, len(avals[2]), COUNTED)
    words = (word, SORT) if kind == "prefill" else (word,)  # prefill sorts its tiles: a part of the call
    for program, expected in (
        (whole, COUNTED),
        (jax.jit(lambda *x: whole(*x)[-1]), 1),  # broken: the last result alone
    ):
        text = _compiled(program, *avals)
        assert [len(re.findall(word, text)) for word in words] == [expected] * len(words)


@pytest.mark.aot
@pytest.mark.parametrize("fp8", [False, True])
def test_timed_appends_and_copies_are_all_there(fp8: bool) -> None:
    case = replace(APPEND, fp8=fp8)
    for backend, word, each in (("mosaic", MOSAIC, 1), ("xla", SCATTER, 2)):  # XLA: of K and of V
        call, avals = kernels.append_call(case, Setting(), backend), _append(case)
        assert _count(word, kernels.appends(call, 2, COUNTED), *avals) == each * COUNTED

        def unchained(pools: Any, own: list[Any], scales: Any, call: Any = call) -> Any:
            """Broken: every call starts from the first pools."""
            return [call(*pools, *own[i % 2], *scales) for i in range(COUNTED)][-1]

        assert _count(word, jax.jit(unchained, donate_argnums=0), *avals) == each
    aval = jax.ShapeDtypeStruct((4096,), jnp.uint32)
    word = r"= u32\[4096\]\S* xor\("
    assert _count(word, measure.copies(COUNTED), aval) == COUNTED
    assert _count(word, jax.jit(lambda x: [x ^ jnp.uint32(1) for _ in range(COUNTED)][-1]), aval) == 1
