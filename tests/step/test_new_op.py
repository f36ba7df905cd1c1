"""How many places a new op touches: a made-up one enters the table, the layer program and its two machines, and then
plans name it, steps run it, the simulator times it and the inspector finds it in a compiled program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest

from nanoflow_jax.config import ConfigError
from nanoflow_jax.cost.demand import StepLoad
from nanoflow_jax.cost.latency import RooflineModel
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.inspect.step import inspect_step
from nanoflow_jax.models.registry import read_config
from nanoflow_jax.plan.file import load_plan, parse_plan
from nanoflow_jax.plan.ops import COMPUTE, OPS, STRATEGIES, Op
from nanoflow_jax.plan.plan import OpPiece, SchedulePlan
from nanoflow_jax.search.simulate import simulate_step
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.step.layer import StepProgram
from nanoflow_jax.step.trace import Tracer
from nanoflow_jax.timeline.jobs import JobMaker
from tests.reference.checkpoints import load_reference, write_checkpoint
from tests.step.step_driver import Driver, Packer, logits_of
from tests.tolerances import TOLERANCES, assert_rows_close, row_errors

TINY = Path(__file__).parents[2] / "nanoflow_jax" / "assets" / "tiny_llama"
CASE = "biases"


def doubled(program: StepProgram[Any], piece: OpPiece, s: Any) -> None:
    s.projected[piece.piece] = cast(Any, program.machine).double(piece, s.projected[piece.piece])


def double_arrays(tracer: Tracer, piece: OpPiece, x: jax.Array) -> jax.Array:
    return tracer.order.run(lambda x: 2 * x, x)


def double_jobs(maker: JobMaker, piece: OpPiece, x: tuple[int, ...]) -> tuple[int, ...]:
    return maker.run("elementwise", maker.costs.norm(piece.rows), x)


@pytest.fixture
def new_op(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`O.TWICE` doubles O's partial sums ahead of O.AR."""
    known, added = dict(OPS), {}
    for name, op in known.items():
        added[name] = op
        if name == "O":
            added["O.TWICE"] = Op("O.TWICE", COMPUTE, "elementwise")
    OPS.clear()
    OPS.update(added)
    monkeypatch.setitem(STRATEGIES, "reduce", ("O", "O.TWICE", "O.AR", "UG", "D", "D.AR"))
    monkeypatch.setattr(StepProgram, "o_twice", doubled, raising=False)
    monkeypatch.setattr(Tracer, "double", double_arrays, raising=False)
    monkeypatch.setattr(JobMaker, "double", double_jobs, raising=False)
    yield
    OPS.clear()
    OPS.update(known)


def plan() -> SchedulePlan:
    return parse_plan(
        "new",
        {
            "tokens_per_step": 32,
            "decode_tokens": 0,
            "nano_batches": [{"rows": 16, "attention_output": "reduce"}] * 2,
            "order": [
                *("KQV.1", "KQV.2", "PF.1", "O.1", "PF.2", "O.TWICE.1", "O.AR.1", "O.2", "O.TWICE.2", "O.AR.2"),
                *("UG.1", "D.1", "D.AR.1", "UG.2", "D.2", "D.AR.2"),
            ],
        },
    )


def test_a_plan_is_held_to_its_place(new_op: None) -> None:
    fields = {"nano_batches": [{"attention_output": "reduce"}], "order": list(OPS)}
    order = [f"{op}.1" for op in ("KQV", "GEMV", "PF", "O", "O.AR", "O.TWICE", "UG", "D", "D.AR")]
    with pytest.raises(ConfigError, match=r"order: 'O.AR.1' needs O.TWICE.1, which must come before it"):
        parse_plan("new", {**fields, "order": order})


def test_a_step_runs_it(new_op: None, tmp_path: Path) -> None:
    """And gives what twice the weights of O would."""
    write_checkpoint(CASE, tmp_path)
    shape = StepShape(0, 32, 2, 4)
    prompts = [tokens[:14] for tokens in load_reference(CASE).prompts[:2]]
    packed = [Packer(prompts, shape, 96).pack(prefill=[(i, 0, len(p)) for i, p in enumerate(prompts)])]
    found = logits_of(Driver(tmp_path, plan(), shape, 2), packed)
    STRATEGIES["reduce"] = tuple(op for op in STRATEGIES["reduce"] if op != "O.TWICE")  # as it was
    without = Driver(tmp_path, load_plan("sequential"), shape, 2)
    layers = tuple(replace(layer, o_by_input=2 * layer.o_by_input) for layer in without.params.layers)
    wanted, plain = (logits_of(without, packed, some) for some in (replace(without.params, layers=layers), None))
    rows = sorted(found)
    got, want, other = (np.stack([x[place] for place in rows]) for x in (found, wanted, plain))
    assert_rows_close(got, want, "float32")
    assert (row_errors(got, other) > TOLERANCES["float32"]).all()


def test_the_simulator_times_it(new_op: None) -> None:
    config, model = read_config(TINY / "config.json"), RooflineModel(load_hardware("h200"))
    found = simulate_step(plan(), config, model, 2, StepLoad(0, 32, 0, 16))
    times = [e.us for e in found.timeline.events if e.piece and e.piece.op == "O.TWICE"]
    assert len(times) == 2 * config.num_layers
    assert min(times) > 0


@pytest.mark.aot
def test_the_inspector_finds_it(new_op: None) -> None:
    step = inspect_step(str(TINY), "a100_sxm_80", plan(), devices=2, tokens=32, decode_tokens=0)
    events = [e for e in step.report.timeline.events if e.piece and e.piece.op == "O.TWICE"]
    assert {(e.piece.layer, e.piece.piece) for e in events if e.piece} == {(i, n) for i in range(3) for n in (1, 2)}
    assert [f for f in step.report.findings if f.kind == "unknown_hlo"] == []
