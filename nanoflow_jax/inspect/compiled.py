"""A program compiled for a GPU that is not there: what is read of it is kept beside the compiled steps of the devices
that are there, so that the same program is compiled once."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

import kernels_pallas
import nanoflow_jax
from nanoflow_jax.hardware import Hardware
from nanoflow_jax.inspect.gpu_target import saving_options, target_config
from nanoflow_jax.inspect.thunks import Thunks, dump_options, dumped_thunks
from nanoflow_jax.inspect.versions import compiler_versions
from nanoflow_jax.plan.plan import SchedulePlan
from nanoflow_jax.step.compile import Option, compile_step
from nanoflow_jax.system.platform import use_compile_cache, without_compile_cache


@dataclass(frozen=True)
class ProgramMemory:
    """Bytes on one device, by the names of JAX's `memory_analysis`."""

    argument_size_in_bytes: int
    output_size_in_bytes: int
    alias_size_in_bytes: int
    temp_size_in_bytes: int
    generated_code_size_in_bytes: int


@dataclass(frozen=True)
class Compiled:
    """What is read of a compiled program. hlo: its scheduled text; thunks None: this XLA does not say; seconds: what
    lowering and compiling took, when it was done."""

    hlo: str
    memory: ProgramMemory
    thunks: Thunks | None
    seconds: float

    def memory_analysis(self) -> ProgramMemory:
        return self.memory


def compile_absent(
    traced: jax.stages.Traced,
    hardware: Hardware,
    plan: SchedulePlan | None,
    *,
    pin_starts: bool,
    options: Mapping[str, Option] | None = None,
) -> Compiled:
    """Compiles what was traced on a mesh of `gpu_mesh(hardware, ...)`, or reads what was kept of it. `plan`,
    `pin_starts` and `options` are those of `compile_step`."""
    use_compile_cache()
    root = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    consts = [np.asarray(const).tobytes() for const in traced.jaxpr.consts]
    told = (traced.jaxpr.pretty_print(name_stack=True), consts, traced.args_info, target_config(hardware))
    rest = (plan, pin_starts, options or {}, os.environ.get("XLA_FLAGS"), compiler_versions(), _sources())
    path = Path(root) / "absent" / hashlib.sha256(repr((*told, *rest)).encode()).hexdigest() if root else None
    if path and (kept := _read(path)):
        return kept
    started = time.monotonic()
    lowered = traced.lower()
    with tempfile.TemporaryDirectory(prefix="nanoflow-thunks-") as folder, without_compile_cache():
        chosen = {**saving_options(hardware), **dump_options(Path(folder)), **(options or {})}
        program = compile_step(lowered, "cuda", plan, pin_starts=pin_starts, options=chosen)
        hlo, memory = program.as_text(), program.memory_analysis()
        thunks = dumped_thunks(Path(folder), hlo)
    sizes = ProgramMemory(**{name: getattr(memory, name) for name in ProgramMemory.__dataclass_fields__})
    found = Compiled(hlo, sizes, thunks, time.monotonic() - started)
    if path:
        _write(path, found)
    return found


@cache
def _sources() -> str:
    """A digest of the code that a program comes from."""
    digest = hashlib.sha256()
    for package in (nanoflow_jax, kernels_pallas):
        for path in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _write(path: Path, found: Compiled) -> None:
    """Whole or not at all: others may write the same."""
    data = lzma.compress(json.dumps(asdict(found)).encode(), preset=2)
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
    except OSError:  # a full disk: compiled again next time
        return


def _read(path: Path) -> Compiled | None:
    """None: there is none, or it cannot be read."""
    try:
        data: dict[str, Any] = json.loads(lzma.decompress(path.read_bytes()))
        thunks = data["thunks"] and Thunks(**data["thunks"])
        return Compiled(data["hlo"], ProgramMemory(**data["memory"]), thunks, data["seconds"])
    except (OSError, lzma.LZMAError, ValueError, KeyError, TypeError):
        return None
