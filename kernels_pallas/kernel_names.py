"""A Mosaic GPU kernel's module is called after the kernel, however many were lowered before it.

JAX (seen in 0.11.2) numbers the modules of a process, in an attribute that names files of dumps. The number is part of
the module's bytes: a step that was lowered after others, or by another thread first, has another key in the compile
cache, and the same kernel in two step shapes is compiled twice.
"""

from __future__ import annotations

import os
from typing import Any

from jax.experimental.mosaic.gpu import core
from jaxlib.mlir import ir

_ATTRIBUTE = "mosaic_gpu.dump_basename"
_DUMPS = "MOSAIC_GPU_DUMP"  # environment variables; dumps of a process need names of their own


def name_after_kernel() -> None:
    """Once for the process, before a kernel is lowered. Does nothing where JAX has no such attribute."""
    dialect: Any = getattr(core, "dialect", None)
    original = getattr(dialect, "get_or_set_dump_options", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    def get_or_set_dump_options(module: Any) -> Any:
        attributes = module.operation.attributes
        if _ATTRIBUTE not in attributes and not any(name.startswith(_DUMPS) for name in os.environ):
            name = attributes["sym_name"] if "sym_name" in attributes else ir.StringAttr.get("kernel", module.context)
            attributes[_ATTRIBUTE] = name
        return original(module)

    get_or_set_dump_options.__wrapped__ = original  # pyright: ignore[reportFunctionMemberAccess]
    dialect.get_or_set_dump_options = get_or_set_dump_options
