"""docs/kernels.md says of every GPU what `targets.TARGETS` says, and of decode attention what its checks accept."""

from __future__ import annotations

from pathlib import Path

from kernels_pallas.append_kv_mosaic import TMA_ALIGNMENT, TMA_BOX
from kernels_pallas.checks import HEAD_DIMS, PAGE_SIZE
from kernels_pallas.decode_plan import MAX_REPEATS
from kernels_pallas.targets import TARGETS

TEXT = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
LINES = TEXT.splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def table(first: str) -> list[list[str]]:
    """Rows of the table whose heading row begins with this cell, the heading first."""
    start = next(i for i, line in enumerate(LINES) if line.startswith(f"| {first} |"))
    rows = []
    for line in LINES[start:]:
        if not line.startswith("|"):
            break
        rows.append(cells(line))
    return [rows[0], *rows[2:]]


def test_every_gpu_has_the_kernels_its_target_names() -> None:
    heading, *rows = table("GPU")
    kernels = heading[2:]
    assert {kernel for target in TARGETS for kernel in target.mosaic} <= set(kernels)
    assert [(row[0], row[1]) for row in rows] == [(", ".join(t.gpus), t.architecture) for t in TARGETS]
    for row, target in zip(rows, TARGETS, strict=True):
        said = tuple(kernel for kernel, cell in zip(kernels, row[2:], strict=True) if "Mosaic" in cell)
        assert said == tuple(kernel for kernel in kernels if kernel in target.mosaic), row


def test_what_the_kernels_take() -> None:
    rows = {row[0]: row for row in table("kernel")[1:]}
    _, _, pages, head, page, heads = rows["decode_attention"]
    assert pages == "bfloat16, float8_e4m3fn"
    assert head == ", ".join(map(str, HEAD_DIMS))
    assert (page, heads) == (str(PAGE_SIZE), f"1 to {MAX_REPEATS} query heads per KV head")
    assert rows["append_kv"][3] == f"up to {TMA_BOX}"
    assert f"{TMA_ALIGNMENT} bytes" in rows["append_kv"][5]
