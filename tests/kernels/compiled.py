"""Programs compiled for one GPU that is not there, and what they launch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.inspect.gpu_target import gpu_mesh

_NOTHING = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")  # of a program's lines: launch no kernel


def compiled(
    gpu: str, function: Callable[..., Any], avals: Sequence[jax.ShapeDtypeStruct], donate: tuple[int, ...] = ()
) -> Any:
    mesh = gpu_mesh(load_hardware(gpu), 1)
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P())) for x in avals]
    sharded = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(sharded, donate_argnums=donate).lower(*placed).compile()


def launched(program: Any) -> list[str]:
    """What the program runs, in its order: the names of Mosaic's kernels, of everything else the opcode."""
    (entry,) = re.findall(r"^ENTRY .*?^}", program.as_text() or "", re.S | re.M)
    lines = re.findall(r"^\s+(?:ROOT )?%\S+ = .*? ([\w-]+)\((.*)$", entry, re.M)
    mosaic = [re.search(r'op_name="[^"]*?(\w+)/mpmd_map', rest) for _, rest in lines]
    return [
        name[1] if "mosaic_gpu" in rest and name else opcode
        for (opcode, rest), name in zip(lines, mosaic, strict=True)
        if opcode not in _NOTHING
    ]


def compiled_report(attend: Any, avals: Any, monkeypatch: Any, capfd: Any) -> tuple[Any, list[int]]:
    """The program for an H200 that is not there, and the registers of a thread of its Mosaic kernels; none spills."""
    for name in ("PTXAS", "RESOURCES"):
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{name}", "1")
    program = compiled("h200", attend, avals)
    report = "".join(capfd.readouterr())
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills == [("0", "0", "0")] * len(registers)
    assert "serialized" not in report
    return program, registers
