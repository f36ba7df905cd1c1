"""A plan as the TOML file that people and the engine read."""

from __future__ import annotations

import json
from dataclasses import asdict
from textwrap import wrap

from nanoflow_jax.plan.plan import SchedulePlan


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
