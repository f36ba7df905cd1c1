"""A lane's SMs are some of the GPU's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanoflow_jax import LLM, api
from nanoflow_jax.cli import main
from nanoflow_jax.config import ConfigError, configs_root
from nanoflow_jax.cost.demand import StepLoad
from nanoflow_jax.cost.latency import RooflineModel
from nanoflow_jax.hardware import known_hardware, load_hardware
from nanoflow_jax.inspect.step import inspect_step
from nanoflow_jax.models.registry import model_config
from nanoflow_jax.plan.file import load_plan, plan_toml
from nanoflow_jax.plan.known import check_sms
from nanoflow_jax.plan.plan import Lane
from nanoflow_jax.profile import run as profile_run
from nanoflow_jax.search.simulate import simulate_step

TOLD = "lanes.GEMV.sms: 133 is not accepted; h200 has 132 SMs, accepted: 1 to 132"


def test_the_gpu_has_the_last_word() -> None:
    plan, h200 = load_plan("nanoflow_70b"), load_hardware("h200")
    for sms in (1, 132, None):
        check_sms(replace(plan, lanes={"GEMV": Lane(1, sms)}), h200)
    wrong = replace(plan, lanes={"GEMV": Lane(1, 133)})
    check_sms(wrong, None)
    check_sms(wrong, replace(h200, sm_count=133))
    with pytest.raises(ConfigError) as error:
        check_sms(wrong, h200)
    assert str(error.value) == f"plan nanoflow_70b: {TOLD}"


def test_published_plans_fit_their_gpus() -> None:
    gpus = {hardware.name: hardware for hardware in known_hardware()}
    for path in (configs_root() / "plans").glob("*.toml"):
        plan = load_plan(path.stem)
        check_sms(plan, gpus[plan.target.gpu] if plan.target else None)


@pytest.mark.parametrize("command", ["simulate", "inspect"])
def test_commands_tell_it_before_the_work(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(plan_toml(replace(load_plan("nanoflow_70b"), lanes={"GEMV": Lane(1, 133)}), []))
    assert main([command, "--gpu", "h200", "--plan", str(file)]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"nanoflow {command}: plan mine: {TOLD}\n")


def test_so_do_calls_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, h200 = replace(load_plan("nanoflow_70b"), lanes={"GEMV": Lane(1, 133)}), load_hardware("h200")
    config = model_config("llama-3.1-70b")[1]
    with pytest.raises(ConfigError, match=TOLD):
        simulate_step(wrong, config, RooflineModel(h200), 8, StepLoad(1280, 768, 1024, 512))
    with pytest.raises(ConfigError, match=TOLD):
        inspect_step("llama-3.1-70b", "h200", wrong, layers=4)
    monkeypatch.setattr(profile_run, "hardware_of", lambda _: h200)
    with pytest.raises(ConfigError, match=TOLD):
        profile_run.profile("tiny", model_config("tiny")[1], [wrong], tmp_path / "table.jsonl", tokens=64, context=64)


def test_so_does_an_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mesh:
        size = 1
        devices = SimpleNamespace(flat=[SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")])

    monkeypatch.setattr(api, "make_mesh", lambda *_: Mesh())
    monkeypatch.setattr(api, "build_engine", lambda *_: pytest.fail("an engine was made"))
    with pytest.raises(ConfigError, match="133 is not accepted; h200 has 132 SMs"):
        LLM("tiny", plan=replace(load_plan("nanoflow_70b"), lanes={"GEMV": Lane(1, 133)}))
