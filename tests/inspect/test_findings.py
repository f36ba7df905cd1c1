"""Custom calls that no op piece owns, each beside a twin whose name, or whose caller's, leads to one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.inspect.findings import Finding
from nanoflow_jax.inspect.report import inspect_compiled, render
from nanoflow_jax.timeline.totals import TIMES, InnerLayer

CALL = (
    '%{name} = bf16[256,8,128]{{2,1,0}} custom-call(%q), custom_call_target="{target}", metadata={{op_name="{scope}"}}'
)
MOSAIC, SORT = "mosaic_gpu_v2", "__cub$DeviceRadixSort"


def findings(entry: list[str], called: list[str] | None = None) -> list[Finding]:
    """Of a program with %q; `called`: instructions of a computation %inner, whose own %q is its parameter."""
    inner = ""
    if called:
        body = "\n".join("  " + line for line in called)
        inner = f"%inner (q: bf16[]) -> bf16[] {{\n  %q = bf16[256,8,128]{{2,1,0}} parameter(0)\n{body}\n}}\n\n"
    lines = ["%q = bf16[256,8,128]{2,1,0} parameter(0)", *entry, "ROOT %out = () tuple()"]
    body = "\n".join("  " + line for line in lines)
    text = f"HloModule m, is_scheduled=true\n\n{inner}ENTRY %main (q: bf16[]) -> () {{\n{body}\n}}\n"
    return list(inspect_compiled(text, None, load_hardware("h200"), 8).findings)


@pytest.mark.parametrize("target", [MOSAIC, SORT])
def test_a_kernel_without_a_piece_is_reported(target: str) -> None:
    named = CALL.format(name="attend.1", target=target, scope="jit(step)/L0/GEMV.1/decode_attention")
    lost = CALL.format(name="attend.2", target=target, scope="jit(step)/decode_attention")
    assert findings([named]) == []
    (finding,) = findings([named, lost])
    assert (finding.kind, finding.op, finding.layer) == ("untraced_kernel", None, None)
    assert "attend.2" in finding.detail and target in finding.detail and "jit(step)/decode_attention" in finding.detail


@pytest.mark.parametrize(
    "caller",
    [
        "bf16[256,8,128]{2,1,0} fusion(%q), kind=kCustom, calls=%inner",
        "bf16[256,8,128]{2,1,0} call(%q), to_apply=%inner",
    ],
)
def test_the_caller_may_have_the_name(caller: str) -> None:
    lost = ["ROOT " + CALL.format(name="attend", target=MOSAIC, scope="")]
    named = ["ROOT " + CALL.format(name="attend", target=MOSAIC, scope="L0/GEMV.1/x")]
    assert [f.kind for f in findings([f"%outer = {caller}"], lost)] == ["untraced_kernel"]
    assert findings([f'%outer = {caller}, metadata={{op_name="L0/GEMV.1"}}'], lost) == []
    assert findings([f"%outer = {caller}"], named) == []


@pytest.mark.parametrize(
    ("rows", "body", "found"),
    [
        (256, '%a = {t} add(%p, %p), metadata={{op_name="L0/D.AR.1/add"}}\n  ROOT %c = {t} convert(%a)', []),
        (256, "%a = {t} add(%p, %p)\n  ROOT %c = {t} convert(%a)", []),  # half a MiB
        (1024, "%a = {t} add(%p, %p)\n  ROOT %c = {t} convert(%a)", ["untraced_kernel"]),
    ],
    ids=["named inside", "small", "large"],
)
def test_a_fusion_without_a_name(rows: int, body: str, found: list[str]) -> None:
    """XLA gives a fusion whose root it made itself no name: then one from inside counts."""
    shape = f"f32[{rows},256]{{1,0}}"
    inner = f"%inner (p: f32[]) -> f32[] {{\n  %p = {shape} parameter(0)\n  {body.format(t=shape)}\n}}\n\n"
    entry = [f"%p = {shape} parameter(0)", f"%outer = {shape} fusion(%p), kind=kLoop, calls=%inner"]
    lines = "\n".join("  " + line for line in [*entry, "ROOT %out = () tuple()"])
    text = f"HloModule m, is_scheduled=true\n\n{inner}ENTRY %main (p: f32[]) -> () {{\n{lines}\n}}\n"
    report = inspect_compiled(text, None, load_hardware("h200"), 8)
    assert [f.kind for f in report.findings] == found
    assert [bool(e.pieces) for e in report.timeline.events] == [not found and "L0" in body]


def test_gemms_and_buffers_are_no_kernels_of_their_own() -> None:
    """A GEMM library's call has a finding of its own kind; a buffer runs nothing."""
    buffer = CALL.format(name="buffer", target="AllocateBuffer", scope="")
    assert findings([buffer]) == []


FUSED = """HloModule m, is_scheduled=true

%inner (p: s32[30000]) -> bf16[256,8,128] {{
  %p = s32[30000]{{0}} parameter(0)
  %q = bf16[512,8,128]{{2,1,0}} parameter(1)
  %i = s32[] parameter(2)
  %cut = s32[1024]{{0}} slice(%p), slice={{[{table}:{end}]}}
  %table = s32[64,16]{{1,0}} bitcast(%cut)
  %rows = {rows}
  ROOT %call = bf16[256,8,128]{{2,1,0}} custom-call(%rows, %table), custom_call_target="{target}"
}}

ENTRY %main (p: s32[30000]) -> bf16[256,8,128] {{
  %p = s32[30000]{{0}} parameter(0)
  %q = bf16[512,8,128]{{2,1,0}} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = bf16[256,8,128]{{2,1,0}} fusion(%p, %q, %i), kind=kCustom, calls=%inner, metadata={{op_name="L3/PF.1"}}
}}
"""
ROWS = "bf16[256,8,128]{{2,1,0}} slice(%q), slice={{[{first}:{end}], [0:8], [0:128]}}"


@pytest.mark.parametrize(
    ("table", "first", "target", "found"),
    [
        (7488, 8, MOSAIC, []),  # 117 * 256 bytes, and 8 rows of 2048
        (7472, 8, MOSAIC, ["operand 1 begins at byte 29888"]),
        (7472, 8, "__cublas$lt$matmul", []),  # has no such rule
    ],
)
def test_a_slice_that_a_kernel_refuses(table: int, first: int, target: str, found: list[str]) -> None:
    rows = ROWS.format(first=first, end=first + 256)
    text = FUSED.format(table=table, end=table + 1024, rows=rows, target=target)
    report = inspect_compiled(text, None, load_hardware("h200"), 8)
    wrong = [f for f in report.findings if f.kind == "misaligned_slice"]
    assert [(f.op, f.layer) for f in wrong] == [("PF", 3)] * len(found)
    assert all(part in f.detail for part, f in zip(found, wrong, strict=True))


@pytest.mark.parametrize(("dims", "aligned"), [("512,8,128", True), ("512,3,24", False)])
def test_a_slice_whose_place_only_the_run_knows(dims: str, aligned: bool) -> None:
    """Row by row of 2048 bytes it is aligned wherever it lies, of 144 bytes not."""
    tail = dims.partition(",")[2]
    cut = f"bf16[256,{tail}]{{2,1,0}} dynamic-slice(%q, %i), dynamic_slice_sizes={{256,{tail}}}"
    text = FUSED.format(table=7488, end=8512, rows=cut, target=MOSAIC).replace("bf16[512,8,128]", f"bf16[{dims}]")
    report = inspect_compiled(text, None, load_hardware("h200"), 8)
    assert [f.kind for f in report.findings if f.kind == "misaligned_slice"] == (
        [] if aligned else ["misaligned_slice"]
    )


def test_no_table_has_a_negative_nothing() -> None:
    """Rounding leaves -1e-12 us where nothing was lost; it is printed as 0."""
    report = inspect_compiled(
        "HloModule m, is_scheduled=true\n\nENTRY %main (q: bf16[]) -> () {\n  ROOT %out = () tuple()\n}\n",
        None, load_hardware("h200"), 8,
    )  # fmt: skip
    nothing = dict.fromkeys(TIMES, -1e-12)
    text = render(replace(report, totals=replace(report.totals, **nothing)))
    assert "-0" not in text and " 0.0 " in text
    busy = {"us": 1.0, "compute_us": 1.0, "memory_us": 1.0, "network_us": 1.0}
    assert "-0" not in InnerLayer(**{**nothing, **busy}, layers=(1,)).text()
