"""The search equals brute force on small instances; what it finds passes every check; it is deterministic."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nanoflow_jax.cli import main
from nanoflow_jax.config import ConfigError, configs_root, model_config
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.schedule.plan import NanoBatch, SchedulePlan, Target, load_plan, needs
from nanoflow_jax.search.bound import least_period
from nanoflow_jax.search.jobs import Shares, build_jobs
from nanoflow_jax.search.known import known_plan
from nanoflow_jax.search.latency import RooflineModel
from nanoflow_jax.search.load import StepLoad
from nanoflow_jax.search.orders import Steps, best_order, interleavings
from nanoflow_jax.search.search import Found, Space, search
from nanoflow_jax.search.shapes import OpCosts, Shapes
from nanoflow_jax.search.simulate import simulate_step
from nanoflow_jax.search.write import plan_toml

A100, H200 = (RooflineModel(load_hardware(name)) for name in ("a100_sxm_80", "h200"))
LLAMA = model_config("llama_3_1_70b")[1]
DECODE_ONLY = StepLoad(512, 0, 1024, 0)
GRID = {1: 128, 2: 256, 3: 128}


def steps_of(plan: SchedulePlan, model: RooflineModel, load: StepLoad) -> Steps:
    jobs = build_jobs(plan, OpCosts(model, Shapes.of(LLAMA, 8), load), 3, Shares(0.3, 0.4))
    speeds = {
        kind: (model.rate(kind, 0.7, "network").speed, model.rate("network", 0.3, kind).speed)
        for kind in ("compute", "memory")
    }
    return Steps.read(jobs, speeds)


def all_orders(plan: SchedulePlan, load: StepLoad) -> list[tuple[str, ...]]:
    """Every order that the pieces' needs allow, collectives anywhere: not the search's blocks."""
    pieces = {p.name: p for p in plan.pieces(load.decode_rows, load.prefill_rows, 8)}
    chains = [tuple((p.name,) for p in pieces.values() if p.nano_batch == n) for n in (1, 2)]
    return list(interleavings(chains, {name: tuple(needs(p, pieces)) for name, p in pieces.items()}))


@pytest.mark.parametrize("model", [A100, H200], ids=["a100", "h200"])
@pytest.mark.parametrize("strategies", [("reduce", "reduce"), ("gather", "reduce")])
def test_two_nano_batches_equal_brute_force(model: RooflineModel, strategies: tuple[str, str]) -> None:
    """512 decode rows in two halves: the search over its own orders against all orders, collectives placed freely."""
    plan = SchedulePlan("p", tuple(NanoBatch(256, s) for s in strategies), "", 512, 512)
    steps = steps_of(plan, model, DECODE_ONLY)
    orders = all_orders(plan, DECODE_ONLY)
    assert len(orders) == {("reduce", "reduce"): 3432, ("gather", "reduce"): 6435}[strategies]
    brute = min(steps.period(order) for order in orders)
    space = Space(batches=(2,), strategies=tuple(dict.fromkeys(strategies)), grid=GRID, lanes=False)
    found = search("p", LLAMA, model, 8, DECODE_ONLY, space=space)
    assert found.proven
    if len(set(strategies)) == 1:
        assert found.period_us == pytest.approx(brute, rel=1e-9)
    assert found.bound_us <= found.period_us * (1 + 1e-9) <= brute * (1 + 2e-9)


def test_the_closed_form_is_the_simulator() -> None:
    """Over orders of mixed strategies, drawn at random, and a bound below all of them."""
    rng = np.random.default_rng(0)
    load = StepLoad(320, 192, 1024, 512)
    for strategies in (("gather", "scatter"), ("reduce", "gather"), ("scatter", "scatter")):
        plan = SchedulePlan("p", tuple(NanoBatch(256, s) for s in strategies), "", 512, 320)
        steps = steps_of(plan, H200, load)
        bound = least_period(build_jobs(plan, OpCosts(H200, Shapes.of(LLAMA, 8), load), 3, Shares(0.3, 0.4)), H200)
        pieces = {p.name: p for p in plan.pieces(320, 192, 8)}
        for _ in range(12):
            order, left = [], dict(pieces)
            while left:
                ready = [name for name, p in left.items() if not set(needs(p, pieces)) & set(left)]
                order.append(ready[rng.integers(len(ready))])
                del left[order[-1]]
            simulated = simulate_step(replace(plan, order=tuple(order)), LLAMA, H200, 8, load, layers=8).inner.us
            assert steps.period(order) == pytest.approx(simulated, rel=2e-3)
            assert bound <= simulated * (1 + 1e-9)


def test_local_search_is_near_the_best_order() -> None:
    """Where there are too many orders to try them all: here it may not try, and is compared with those that were."""
    plan = SchedulePlan("p", (NanoBatch(256, "reduce"), NanoBatch(256, "gather")), "", 512, 320)
    load = StepLoad(320, 192, 1024, 512)
    steps = steps_of(plan, H200, load)
    chains = [
        (("KQV.1",), ("GEMV.1",), ("O.1", "O.AR.1"), ("UG.1",), ("D.1", "D.AR.1")),
        (("KQV.2",), ("GEMV.2",), ("PF.2", "GEMV.AG.2"), ("O.2", "O.AG.2"), ("UG.2",), ("D.2", "D.AR.2")),
    ]
    best, _, complete = best_order(steps, chains, {})
    climbed, order, tried_all = best_order(steps, chains, {}, limit=1)
    assert complete
    assert not tried_all
    assert best <= climbed <= 1.03 * best
    assert steps.period(order) == climbed


def test_no_structure_is_ruled_out_wrongly() -> None:
    """The pruned search against every structure and every order of it."""
    load = StepLoad(320, 192, 1024, 512)
    space = Space(batches=(1, 2), strategies=("gather", "reduce"), grid={1: 128, 2: 128, 3: 128}, lanes=False)
    found = search("p", LLAMA, H200, 8, load, space=space)
    periods = []
    for rows in ((512,), (128, 384), (256, 256), (384, 128)):
        for strategies in product(("gather", "reduce"), repeat=len(rows)):
            plan = SchedulePlan("p", tuple(map(NanoBatch, rows, strategies)), "", 512, 320)
            steps = steps_of(plan, H200, load)
            pieces = {p.name: p for p in plan.pieces(320, 192, 8)}
            after = {name: tuple(needs(p, pieces)) for name, p in pieces.items()}
            chains = [tuple((p.name,) for p in pieces.values() if p.nano_batch == n) for n in range(1, len(rows) + 1)]
            some = islice(interleavings(chains, after), 0, None, 7)  # every seventh order: none may be better
            periods.append(min(map(steps.period, some)))
    assert found.tried < found.structures
    assert found.period_us <= min(periods) * (1 + 1e-9)


def searched(gpu: str) -> Found:
    space = Space(batches=(2,), strategies=("reduce",), grid={1: 128, 2: 256, 3: 512}, lanes=False)
    return search("found", LLAMA, RooflineModel(load_hardware(gpu)), 8, StepLoad(1280, 768, 1024, 512), space=space)


@pytest.mark.parametrize("gpu", ["a100_sxm_80", "h200"])
def test_a_found_plan_is_a_plan(gpu: str, tmp_path: Path) -> None:
    """It comes back from its file, and beats the baselines."""
    found = searched(gpu)
    plan = replace(found.plan, target=Target.of(LLAMA, gpu, 8), description='a "plan"')
    path = tmp_path / "found.toml"
    path.write_text(plan_toml(plan, ["A remark."]))
    assert load_plan(str(path)) == plan
    load, model = StepLoad(1280, 768, 1024, 512), RooflineModel(load_hardware(gpu))
    simulated = simulate_step(plan, LLAMA, model, 8, load).inner.us
    assert simulated == pytest.approx(found.period_us, rel=1e-6)
    assert found.bound_us <= simulated
    assert found.gap == pytest.approx(simulated / found.bound_us - 1)
    for name in ("sequential", "two_all_reduce", "nanoflow_70b"):
        assert simulate_step(load_plan(name), LLAMA, model, 8, load).inner.us > simulated


def test_committed_plans_are_the_best_known() -> None:
    """Each beats every other plan file on its GPU, by the model at hand."""
    load = StepLoad(1280, 768, 1024, 1024)
    names = sorted(path.stem for path in (configs_root() / "plans").glob("*.toml"))
    for gpu in ("a100_sxm_80", "h100_sxm", "h200", "b200"):
        model = RooflineModel(load_hardware(gpu))
        periods = {name: simulate_step(load_plan(name), LLAMA, model, 8, load).inner.us for name in names}
        assert periods[f"auto_llama_3_1_70b_8x{gpu}"] <= 1.0001 * min(periods.values()), gpu


# -- plan="auto"


def test_auto_finds_what_was_searched_for_the_device() -> None:
    plan, why = known_plan(LLAMA, "h200", 8, 2048, 1280)
    assert plan.name == "auto_llama_3_1_70b_8xh200"
    assert "auto_llama_3_1_70b_8xh200" in why
    assert known_plan(model_config("llama_3_3_70b")[1], "h200", 8, 4096, 2048)[0] == plan
    for config, gpu, devices in ((LLAMA, "h200", 4), (replace(LLAMA, num_layers=32), "h200", 8), (LLAMA, None, 8)):
        plan, why = known_plan(config, gpu, devices, 2048, 1280)
        assert plan.name == "two_gather_one_reduce"
        assert "two_gather_one_reduce" in why


def test_auto_on_a_cpu_says_what_it_takes(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoflow_jax import LLM, api

    monkeypatch.setattr(api, "build_engine", lambda *_: SimpleNamespace(max_model_len=64))
    with caplog.at_level(logging.INFO, logger="nanoflow_jax"):
        assert LLM("tiny", tensor_parallel_size=1).plan.name == "two_gather_one_reduce"
    assert "plan two_gather_one_reduce: no plan is known for this device" in caplog.text
    assert LLM("tiny", tensor_parallel_size=1, deterministic=True).plan.name == "two_gather_one_reduce"
    assert LLM("tiny", tensor_parallel_size=1, plan="sequential").plan.name == "sequential"


def test_a_table_of_what_a_plan_is_for_is_checked(tmp_path: Path) -> None:
    text = (configs_root() / "plans" / "auto_llama_3_1_70b_8xh200.toml").read_text()
    path = tmp_path / "mine.toml"
    for old, new, said in (
        ("devices = 8", "devices = '8'", "for.devices: '8' must be int"),
        ("devices = 8", "device = 8", "for.device: the table"),
        ("num_heads = 64\n", "", "for.num_heads: the table"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(ConfigError, match=said):
            load_plan(str(path))


# -- the command


def test_search_writes_the_same_file_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "plan.toml", tmp_path / "again" / "plan.toml"
    second.parent.mkdir()
    common = ["search", "--tokens-per-step", "512", "--nano-batches", "2", "--quiet", "--no-lanes"]
    assert main([*common, "--output", str(first)]) == 0
    assert "No plan of the space has a layer below" in capsys.readouterr().out
    assert main([*common, "--output", str(second), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert first.read_text() == second.read_text()
    assert data["bound_us"] <= data["layer_us"]
    assert set(data["tokens_per_second_per_gpu"]) == {"plan", "sequential", "two_all_reduce", "nanoflow_70b"}
    assert load_plan(str(first)).target == Target.of(LLAMA, "h200", 8)
    assert main([*common, "--output", str(first)]) == 1
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--decode-tokens", "4096"], ["--decode-tokens", "4096", "2048"]),
        (["--tokens-per-step", "100"], ["--tokens-per-step", "100", "multiple of 8"]),
        (["--nano-batches", "4"], ["--nano-batches", "at most 3"]),
        (["--tokens-per-step", "128", "--nano-batches", "2"], ["128 rows", "fewer nano-batches"]),
        (["--gpu", "a100_sxm_80", "--devices", "1"], ["do not fit", "1 x a100_sxm_80"]),
        (["--output", "plan.json"], ["--output", "plan.json", ".toml"]),
    ],
)
def test_one_line_names_what_is_wrong(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", *arguments]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert all(word in err.splitlines()[-1] for word in words), err
