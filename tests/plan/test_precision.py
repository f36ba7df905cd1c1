"""Plans are searched for a precision of the weights, name it, and are found by it."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from nanoflow_jax.cli import main
from nanoflow_jax.config import ConfigError, ModelConfig, configs_root
from nanoflow_jax.cost.demand import Demand, StepLoad
from nanoflow_jax.cost.latency import RooflineModel
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.models.registry import model_config
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.plan.known import known_plan, plans_with_target
from nanoflow_jax.search.predict import average_step
from nanoflow_jax.search.simulate import simulate_step
from nanoflow_jax.workload import load_workload

BF16 = model_config("llama_3_1_70b")[1]
FP8 = replace(BF16, quantization="fp8")


def test_auto_takes_the_plan_of_the_precision() -> None:
    plan, why = known_plan(FP8, "h200", 8, 2048, 1280)
    assert plan.name == "auto_llama_3_1_70b_8xh200_fp8" and "in fp8" in why and "none is known" not in why
    assert known_plan(BF16, "h200", 8, 2048, 1280)[0].name == "auto_llama_3_1_70b_8xh200"
    for decode, suffix in ((168, ""), (96, "_d96")):
        assert (
            known_plan(FP8, "h100_sxm", 2, 512 if decode == 168 else 1664, decode)[0].name
            == f"auto_llama_3_1_70b_2xh100_sxm_fp8{suffix}"
        )


@pytest.mark.parametrize(
    ("config", "gpu", "devices", "taken", "asks"),
    [
        (FP8, "b200", 8, "auto_llama_3_1_70b_8xb200_d768", "fp8: nanoflow search --quantization fp8 finds one"),
        (BF16, "h100_sxm", 2, "auto_llama_3_1_70b_2xh100_sxm_fp8", "bfloat16: nanoflow search finds one"),
        (FP8, "h200", 4, "auto_llama_3_1_70b_8xh200_fp8", "4 x h200; nanoflow search --quantization fp8 finds one"),
    ],
)
def test_another_precision_is_better_than_none_and_says_so(
    config: ModelConfig, gpu: str, devices: int, taken: str, asks: str
) -> None:
    plan, why = known_plan(config, gpu, devices, 512, 168)
    assert plan.name == taken
    assert why.endswith(asks) and "\n" not in why


def test_files_say_fp8_only() -> None:
    """Older ones, which name no precision, are of bfloat16. A plan's digest, in manifests of runs and keys of pages, is
    of what it does: that of older plans stays."""
    named = {plan.name: plan.target for plan in plans_with_target() if plan.target}
    for name, target in named.items():
        text = (configs_root() / "plans" / f"{name}.toml").read_text()
        assert ("quantization" in tomllib.loads(text)["for"]) == ("_fp8" in name), name
        assert target.quantization == ("fp8" if "_fp8" in name else None)
    assert load_plan("auto_llama_3_1_70b_8xh200").identity == "auto_llama_3_1_70b_8xh200 " + DIGEST


DIGEST = "1e4ff8ea7222bd3f"  # as it was before plans named a precision


def test_search_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    asked = ["--model", "llama-3.1-8b", "--devices", "1", "--tokens-per-step", "256", "--no-lanes", "--quiet"]
    assert main(["search", *asked, "--quantization", "fp8", "--output", str(path)]) == 0
    target = load_plan(str(path)).target
    assert target is not None and target.quantization == "fp8"
    assert main(["search", *asked]) == 0
    assert "quantization" not in capsys.readouterr().out.split("[for]")[1]
    text = path.read_text()
    for wrong in ('"int8"', "8"):
        path.write_text(text.replace('"fp8"', wrong))
        with pytest.raises(ConfigError, match=r"for\.quantization: .* expected 'fp8'"):
            load_plan(str(path))


@pytest.mark.parametrize(
    ("gpu", "devices", "suffix", "workload"),
    [
        ("h200", 8, "", None),
        ("h100_sxm", 8, "", None),
        ("h100_sxm", 2, "", "constant:1024:512"),
        ("h100_sxm", 2, "_d96", "constant:2048:128"),
        ("h200", 1, "", "constant:1024:512"),
    ],
)
def test_committed_plans_are_the_best_known(gpu: str, devices: int, suffix: str, workload: str | None) -> None:
    """By the model at hand, at the load that each names. On one GPU it is `sequential`, as fast as that; a lane without
    a limit of its own (`nanoflow_8b`) is not searched."""
    hardware = load_hardware(gpu)
    name = f"auto_llama_3_1_70b_{devices}x{gpu}_fp8{suffix}"
    plans = {path.stem: load_plan(path.stem) for path in (configs_root() / "plans").glob("*.toml")}
    load = StepLoad(1280, 768, 1024, 1024)
    if workload is not None:
        demand = Demand.of(load_workload(workload), FP8.max_position_embeddings)
        load = average_step(FP8, hardware, devices, demand, 2048)
        rows, decode = plans[name].tokens_per_step, plans[name].decode_tokens
        assert rows is not None and decode is not None
        assert 0 <= load.rows - rows < 128, "whole tiles of what workload and memory allow"
        load = replace(load, decode_rows=decode, prefill_rows=rows - decode)
    us = {
        other: simulate_step(plan, FP8, RooflineModel(hardware), devices, load).inner.us
        for other, plan in plans.items()
        if not plan.lanes
    }
    assert us[name] <= 1.0001 * min(us.values())
    if devices == 1:
        assert us[name] == pytest.approx(us["sequential"], rel=1e-9)
    else:
        assert us[name] < 0.98 * us["sequential"]
