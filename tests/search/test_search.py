"""The search equals brute force on small instances; what it finds passes every check; it is deterministic."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanoflow_jax.cli import main
from nanoflow_jax.config import ConfigError, configs_root
from nanoflow_jax.cost.demand import StepLoad
from nanoflow_jax.cost.latency import RooflineModel
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.models.registry import model_config
from nanoflow_jax.plan.file import load_plan, plan_toml
from nanoflow_jax.plan.known import known_plan
from nanoflow_jax.plan.plan import Target
from nanoflow_jax.search.orders import best_order
from nanoflow_jax.search.search import LANE_SHARES, Finder, Found, Space, search
from nanoflow_jax.search.simulate import simulate_step
from nanoflow_jax.step.batch import StepShape

A100, H200 = (RooflineModel(load_hardware(name)) for name in ("a100_sxm_80", "h200"))
LLAMA = model_config("llama_3_1_70b")[1]
MIXED = StepLoad(320, 192, 1024, 512)


@pytest.mark.parametrize(
    ("model", "load", "space", "cut_wins"),
    [
        (H200, MIXED, Space(batches=(1, 2), strategies=("gather", "reduce"), grid={1: 128, 2: 128}), False),
        (A100, StepLoad(1280, 768, 1024, 1024), Space(batches=(2,), strategies=("scatter",), grid={2: 128}), True),
    ],
    ids=["h200", "a100"],
)
def test_no_structure_is_ruled_out_wrongly(model: RooflineModel, load: StepLoad, space: Space, cut_wins: bool) -> None:
    """The pruned search against every structure, each in the best of all orders of its pieces, whole and cut."""
    found = search("p", LLAMA, model, 8, load, space=space)
    finder = Finder("p", LLAMA, model, 8, load, space)
    shares = (0.0, *(LANE_SHARES if model is H200 else ()))
    whole = [replace(s, lane=lane) for s in finder.structures() for lane in shares]
    periods = {s: best_order(*finder.problem(s)).period for one in whole for s in (one, *finder.cuts(one))}
    assert bool(found.plan.splits) == cut_wins
    assert found.structures == len(whole)
    assert found.tried < len(periods) / 2
    assert found.ruled_out > len(whole) / 2
    assert found.period_us == pytest.approx(min(periods.values()), rel=1e-9)
    assert found.without_lane_us == pytest.approx(min(us for s, us in periods.items() if not s.lane), rel=1e-9)
    assert found.bound_us == found.period_us
    assert found.gap == found.open == 0
    for structure, period in periods.items():
        assert finder.bound(structure) <= period * (1 + 1e-9)
        whole_bound = finder.bound(replace(structure, cuts=(1,) * len(structure.rows)))
        assert finder.bound(structure) >= whole_bound * (1 - 1e-9)


def test_processes_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    space = Space(batches=(2,), strategies=("reduce", "scatter"), grid={1: 128, 2: 128, 3: 128})
    alone = search("p", LLAMA, H200, 8, MIXED, space=space)
    monkeypatch.setattr("nanoflow_jax.search.search.ALONE", 0)
    assert search("p", LLAMA, H200, 8, MIXED, space=space, workers=2) == alone


def searched(gpu: str) -> Found:
    space = Space(batches=(2,), strategies=("reduce",), grid={1: 128, 2: 256, 3: 512}, shares=())
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
    assert found.bound_us == pytest.approx(simulated, rel=1e-6)
    for name in ("sequential", "two_all_reduce", "nanoflow_70b"):
        assert simulate_step(load_plan(name), LLAMA, model, 8, load).inner.us > simulated


def test_committed_plans_are_the_best_known() -> None:
    """Each beats every other plan file on its GPU and load, by the model at hand."""
    names = sorted(path.stem for path in (configs_root() / "plans").glob("*.toml"))
    plans = {name: plan for name in names if (plan := load_plan(name)).gathers is None}  # the weights are in bfloat16
    for gpu in ("a100_sxm_80", "h100_sxm", "h200", "b200"):
        model = RooflineModel(load_hardware(gpu))
        for decode, suffix in ((768, "_d768"), (1280, ""), (1792, "_d1792")):
            load = StepLoad(decode, 2048 - decode, 1024, 1024)
            periods = {name: simulate_step(plan, LLAMA, model, 8, load).inner.us for name, plan in plans.items()}
            name = f"auto_llama_3_1_70b_8x{gpu}{suffix}"
            assert periods[name] <= 1.0001 * min(periods.values()), name
            assert known_plan(LLAMA, gpu, 8, 2048, decode)[0] == plans[name]


# -- plan="auto"


def test_auto_finds_what_was_searched_for_the_device() -> None:
    plan, why = known_plan(LLAMA, "h200", 8, 2048, 1280)
    assert plan.name == "auto_llama_3_1_70b_8xh200"
    assert "auto_llama_3_1_70b_8xh200" in why
    assert known_plan(model_config("llama_3_3_70b")[1], "h200", 8, 4096, 2304)[0] == plan
    assert known_plan(LLAMA, "h200", 8, 4096, 1024)[0].name == "auto_llama_3_1_70b_8xh200_d768"
    for config, gpu, devices, taken in (
        (LLAMA, "h200", 4, "auto_llama_3_1_70b_8xh200"),
        (replace(LLAMA, num_layers=32), "h200", 8, "auto_llama_3_1_70b_8xh200"),
        (replace(LLAMA, num_layers=32), "h200", 1, "sequential"),
        (LLAMA, None, 8, "two_gather_one_reduce"),
        (LLAMA, "a GPU of the user's own", 8, "two_gather_one_reduce"),
    ):
        plan, why = known_plan(config, gpu, devices, 2048, 1280)
        assert plan.name == taken
        assert taken in why and (gpu is None or "nanoflow search finds one" in why)


@pytest.mark.parametrize("model", ["qwen2.5-72b", "qwen3-32b", "mistral-large-2411", "gemma-3-27b", "llama-3.1-8b"])
@pytest.mark.parametrize(
    ("gpu", "devices"), [("h200", 8), ("h200", 2), ("h100_sxm", 8), ("a100_sxm_80", 8), ("b200", 8)]
)
def test_a_plan_searched_for_another_model_is_better_than_none(model: str, gpu: str, devices: int) -> None:
    """Than the plan that was taken before, and than one that hides nothing."""
    config, latency = model_config(model)[1], RooflineModel(load_hardware(gpu))
    load = StepLoad(1280, 768, 1024, 512)
    plan, _ = known_plan(config, gpu, devices, load.rows, load.decode_rows)
    found, default, uncut = (
        simulate_step(p, config, latency, devices, load).us
        for p in (plan, load_plan("two_gather_one_reduce"), load_plan("sequential"))
    )
    assert found < 0.97 * min(default, uncut)


def test_auto_on_a_cpu_says_what_it_takes(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoflow_jax import LLM, api

    scheduler = SimpleNamespace(shapes=[StepShape(8, 8, 1, 4)])
    engine = SimpleNamespace(max_model_len=64, scheduler=scheduler, grammars=SimpleNamespace())
    monkeypatch.setattr(api, "build_engine", lambda *_: engine)
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
    assert "No plan of the space has a shorter layer: " in capsys.readouterr().out
    assert main([*common, "--output", str(second), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert first.read_text() == second.read_text()
    assert data["bound_us"] <= data["layer_us"]
    assert set(data["tokens_per_second_per_gpu"]) == {"plan", "sequential", "two_all_reduce", "nanoflow_70b"}
    assert load_plan(str(first)).target == Target.of(LLAMA, "h200", 8)
    assert main([*common, "--output", str(first)]) == 1
    assert "exists" in capsys.readouterr().err


def test_search_on_one_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer rows than asked, in whole tiles, where memory holds no more requests; the explanation has no network."""
    path = tmp_path / "plan.toml"
    one = ["search", "--model", "llama-3.1-8b", "--devices", "1", "--quiet", "--workers", "1", "--nano-batches", "2"]
    assert main([*one, "--gpu", "h100_sxm", "--output", str(path)]) == 0
    out = capsys.readouterr().out
    assert "decode attention's" in out and "network" not in out
    plan = load_plan(str(path))
    assert (plan.tokens_per_step, plan.decode_tokens) == (1024, 344)
    assert plan.target == Target.of(model_config("llama_3_1_8b")[1], "h100_sxm", 1)
    assert main([*one, "--gpu", "a100_sxm_80", "--decode-tokens", "1280", "--context", "1024"]) == 0
    out = " ".join(capsys.readouterr().out.replace("#", "").split())
    assert "room for 457707 tokens of KV, and these rows attend to 1310720" in out
    assert "nothing runs beside anything" in out


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
