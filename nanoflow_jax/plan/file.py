"""A plan as a file.

A plan is a TOML file in `configs/plans` that people and the search read and write:

    description = "..."
    tokens_per_step = 2048            # the rows that the sizes below add up to, decode rows first
    decode_tokens = 1280
    # Optional: one layer's issue order, OP.PIECE counted from 1. A collective starts where it is listed and is
    # waited for by the first op that reads it, in this layer or the next. D.AG ahead of its rows' KQV gathers what
    # the layer before left.
    order = ["KQV.1", "GEMV.1", ...]

    [[nano_batches]]
    rows = 640                        # left out when there is one nano-batch: all rows
    attention_output = "gather"       # or "reduce", "scatter": see `ops`

    # Optional, for weights in fp8: what is gathered and then quantised (GEMV.AG; of scatter also O.AG and D.AG) is
    # quantised first, and goes over the network in fp8 with a scale per token.
    gathers = "fp8"

    # optional: rows of each piece; KQV over all rows, GEMV over decode, PF over prefill rows
    [splits]
    KQV = [256, 384, 768, 640]

    # Optional, on a GPU: decode attention on a second stream, beside GEMMs, on at most so many of the SMs.
    [lanes.GEMV]
    stream = 1
    sms = 48

    # Optional, of a model with experts: whole ones on each device (true), or a share of each (false). Left out: whole
    # ones where their number divides. An order that names no ROUTE, DISPATCH and COMBINE has each right ahead of the op
    # that needs it.
    expert_parallel = true

    # optional: what the plan was made for, by which LLM(plan="auto") finds it; a GPU by its name in configs/hardware
    [for]
    gpu = "h200"
    devices = 8
    hidden_size = 8192
    intermediate_size = 28672
    num_layers = 80
    num_heads = 64
    num_kv_heads = 8
    quantization = "fp8"              # only where the layers' weights are
    num_experts = 128                 # only of a model with experts
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from dataclasses import fields as fields_of
from textwrap import wrap
from typing import Any

from nanoflow_jax.config import ConfigError, config_path
from nanoflow_jax.plan.plan import Lane, NanoBatch, SchedulePlan, Target
from nanoflow_jax.system.reading import Malformed, parse_toml, read_text

MOST_BYTES = 2**20


def load_plan(name: str) -> SchedulePlan:
    """A plan of `configs/plans` by name, or a TOML file by path. Raises ConfigError naming the file, the line and the
    fix."""
    path = config_path("plans", name)
    text = read_text(path, MOST_BYTES)
    try:
        return parse_plan(path.stem, parse_toml(text))
    except Malformed as error:
        line = re.search(r"at line (\d+)", str(error))
        raise ConfigError(f"{path}{':' + line[1] if line else ''}: not valid TOML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}{_line_of(text, str(error))}: {error}") from None


def _line_of(text: str, message: str) -> str:
    """ ":N" of the line that holds the first thing the message quotes or its field, when there is one."""
    for wanted in (*re.findall(r"'([^']+)'", message), message.split(":")[0].split("[")[0]):
        for number, line in enumerate(text.splitlines(), start=1):
            if re.search(rf"(?<![\w.]){re.escape(wanted)}(?![\w.])", line.split("#")[0]):
                return f":{number}"
    return ""


def parse_plan(name: str, fields: dict[str, Any]) -> SchedulePlan:
    """The plan in parsed TOML. Raises ConfigError naming the field."""
    known = {f.name for f in fields_of(SchedulePlan)} - {"name", "target"} | {"for"}
    if unknown := sorted(set(fields) - known):
        raise ConfigError(f"{unknown[0]}: unknown field; accepted: {', '.join(sorted(known))}")
    batches = _typed("nano_batches", fields.get("nano_batches"), list)
    parsed = []
    for i, batch in enumerate(batches, start=1):
        where = f"nano_batches[{i}]"
        _typed(where, batch, dict)
        if unknown := sorted(set(batch) - {"rows", "attention_output"}):
            raise ConfigError(f"{where}.{unknown[0]}: unknown field; accepted: attention_output, rows")
        rows = batch.get("rows")
        parsed.append(
            NanoBatch(None if rows is None else _typed(f"{where}.rows", rows, int), str(batch.get("attention_output")))
        )
    splits = {
        op: tuple(_sizes(f"splits.{op}", s)) for op, s in _typed("splits", fields.get("splits", {}), dict).items()
    }
    lanes = {op: _lane(f"lanes.{op}", f) for op, f in _typed("lanes", fields.get("lanes", {}), dict).items()}
    order = _typed("order", fields.get("order", []), list)
    if not all(isinstance(o, str) for o in order):
        raise ConfigError("order: must be a list of strings such as 'KQV.1'")
    sized = {k: _typed(k, fields[k], int) for k in ("tokens_per_step", "decode_tokens") if k in fields}
    description = _typed("description", fields.get("description", ""), str)
    target = _target(fields["for"]) if "for" in fields else None
    whole = fields.get("expert_parallel")
    if whole not in (None, True, False) or (isinstance(whole, int) and not isinstance(whole, bool)):
        raise ConfigError(f"expert_parallel: {whole!r} must be true or false")
    return SchedulePlan(
        name, tuple(parsed), description, splits=splits, order=tuple(order), lanes=lanes, target=target,
        gathers=fields.get("gathers"), expert_parallel=whole, **sized,
    )  # fmt: skip


def _typed(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(f"{name}: {value!r} must be {kind.__name__}")
    return value


def _sizes(name: str, value: Any) -> list[int]:
    return [_typed(f"{name}[{i}]", v, int) for i, v in enumerate(_typed(name, value, list), start=1)]


def _lane(name: str, value: Any) -> Lane:
    fields = _typed(name, value, dict)
    if unknown := sorted(set(fields) - {"stream", "sms"}):
        raise ConfigError(f"{name}.{unknown[0]}: unknown field; accepted: stream, sms")
    numbers = {key: _typed(f"{name}.{key}", number, int) for key, number in fields.items()}
    if "stream" not in numbers or min(numbers.values()) < 1:
        raise ConfigError(f"{name}: needs stream (1 or more), and may have sms (1 or more), not {fields}")
    return Lane(**numbers)


def _target(value: Any) -> Target:
    table = _typed("for", value, dict)
    quantization = table.get("quantization")
    if quantization not in (None, "fp8"):
        raise ConfigError(f"for.quantization: {quantization!r} is not accepted; expected 'fp8', or no such line")
    optional = {"quantization", "num_experts"}
    wanted = {f.name: str if f.name == "gpu" else int for f in fields_of(Target) if f.name not in optional}
    if odd := sorted(set(table) - optional ^ set(wanted)):
        raise ConfigError(
            f"for.{odd[0]}: the table [for] holds {', '.join(wanted)}, and quantization where it is fp8, "
            "num_experts of a model with experts"
        )
    if "num_experts" in table:
        wanted["num_experts"] = int
    sizes = {name: _typed(f"for.{name}", table[name], kind) for name, kind in wanted.items()}
    return Target(**sizes, quantization=quantization)


def plan_toml(plan: SchedulePlan, remarks: list[str]) -> str:
    """The file's text; remarks: lines of comment at its head. `load_plan` reads the same plan back."""
    lines = [f"# {part}" for remark in remarks for part in wrap(remark, 136)]
    lines.append(f"description = {json.dumps(plan.description)}")
    sizes = {name: getattr(plan, name) for name in ("tokens_per_step", "decode_tokens")}
    lines += [f"{name} = {value}" for name, value in sizes.items() if value is not None]
    lines += [f'gathers = "{plan.gathers}"'] if plan.gathers else []
    if plan.expert_parallel is not None:
        lines.append(f"expert_parallel = {str(plan.expert_parallel).lower()}")
    if plan.order:
        listed = wrap(", ".join(f'"{name}"' for name in plan.order) + ",", 120, break_on_hyphens=False)
        lines += ["order = [", *(f"    {part}" for part in listed), "]"]
    for batch in plan.nano_batches:
        rows = [] if batch.rows is None else [f"rows = {batch.rows}"]
        lines += ["", "[[nano_batches]]", *rows, f'attention_output = "{batch.attention_output}"']
    if plan.splits:
        lines += ["", "[splits]", *(f"{op} = {list(sizes)}" for op, sizes in plan.splits.items())]
    for op, lane in plan.lanes.items():
        lines += ["", f"[lanes.{op}]", f"stream = {lane.stream}", *([f"sms = {lane.sms}"] if lane.sms else [])]
    if plan.target:
        told = {name: value for name, value in asdict(plan.target).items() if value is not None}
        lines += ["", "[for]", *(f"{name} = {json.dumps(value)}" for name, value in told.items())]
    return "\n".join(lines) + "\n"
