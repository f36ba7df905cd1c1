"""What is predicted of models with experts: active weights, imbalance, splits, GPUs without the kernel, plans."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_jax.cli import main
from nanoflow_jax.cost.demand import StepLoad
from nanoflow_jax.cost.latency import RooflineModel
from nanoflow_jax.cost.shapes import OpCosts, Shapes, optimum
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.models.registry import model_config
from nanoflow_jax.plan.known import known_plan
from nanoflow_jax.plan.plan import load_plan
from nanoflow_jax.search.fit import quantizations
from nanoflow_jax.search.simulate import simulate_step

H200 = RooflineModel(load_hardware("h200"))
LOAD = StepLoad(1280, 768, 1024, 512)
QWEN, MIXTRAL = model_config("qwen3-235b-a22b")[1], model_config("mixtral-8x7b")[1]


def test_the_optimum_is_of_the_weights_that_a_token_meets() -> None:
    assert optimum(QWEN, H200.hardware) == H200.hardware.bf16_flops / (2 * QWEN.active_params)
    assert QWEN.active_params < QWEN.num_params / 10


def test_rows_of_experts() -> None:
    """By number a device has an eighth of the choices, times the imbalance, and never more than all rows for each of
    its experts; over each it has all."""
    costs = OpCosts(H200, Shapes.of(QWEN, 8), LOAD)
    assert costs.routed(2048, True) == 2048
    assert replace(costs, imbalance=1.5).routed(2048, True) == 3072
    assert replace(costs, imbalance=1.5).routed(2048, False) == costs.routed(2048, False) == 8 * 2048
    assert replace(costs, imbalance=1e3).routed(2048, True) == 16 * 2048
    assert costs.dispatch(2048, False).bytes == 8 * costs.dispatch(2048, True).bytes


def test_grouped_gemms() -> None:
    """Many rows: the products and no more than half a tile for each expert; one row: the weights of its experts.
    Without a kernel every row by every expert."""
    costs = OpCosts(H200, Shapes.of(QWEN, 8), LOAD)
    weights = 2 * 1536 * 4096 * 2  # bytes of an expert's UG
    many, one = costs.grouped("UG", 65536, True), costs.grouped("UG", 1, True)
    products = 2 * 65536 * 3072 * 4096
    assert products < many.flops < 1.02 * products
    assert weights < one.bytes < 1.01 * weights  # one of its eight experts is here
    assert costs.grouped("D", 2048, True).bytes > 16 * weights / 2 > costs.grouped("D", 1, True).bytes
    a100 = replace(costs, model=RooflineModel(load_hardware("a100_sxm_80")))
    assert a100.grouped("UG", 65536, True).flops == 16 * 8 * products


def test_imbalance_is_predicted() -> None:
    plan = load_plan("auto_qwen3_235b_a22b_8xh200")
    rates = [
        simulate_step(plan, QWEN, H200, 8, LOAD, imbalance=x).tokens_per_second_per_gpu for x in (1.0, 1.5, 3.0, 100.0)
    ]
    assert rates == sorted(rates, reverse=True) and rates[0] > 1.05 * rates[2]
    inside = simulate_step(replace(plan, expert_parallel=False), QWEN, H200, 8, LOAD)
    assert inside.tokens_per_second_per_gpu < rates[0]


def test_imbalance_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", "--model", "mixtral-8x7b", "--plan", "sequential"]
    said = []
    for more in ([], ["--expert-imbalance", "1.5"]):
        assert main([*arguments, *more]) == 0
        said.append(capsys.readouterr().out)
    assert "the busiest device has 1 times the mean" in said[0]
    assert "the busiest device has 1.5 times the mean" in said[1]
    assert said[0].splitlines()[1] != said[1].splitlines()[1]
    assert main(["simulate", "--model", "llama-3.1-8b", "--plan", "sequential"]) == 0
    assert "busiest" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*arguments, "--expert-imbalance", "0.5"])
    assert "'0.5' is not accepted; expected a number of at least 1" in capsys.readouterr().err


def test_plans_for_experts_and_for_others_are_not_mixed_up() -> None:
    """Nobody's plan was made for Mixtral or Qwen2.5: the former takes one of a model with experts, the latter does
    not."""
    for model, has in (("mixtral-8x7b", True), ("qwen2.5-72b", False)):
        plan, why = known_plan(model_config(model)[1], "h200", 8, 4096, 1360)
        assert plan.target is not None and (plan.target.num_experts is not None) == has
        assert "searched for another model" in why
    plan, why = known_plan(QWEN, "h200", 8, 2048, 680)
    assert plan.name == "auto_qwen3_235b_a22b_8xh200" and "searched for this model" in why


def test_precisions_of_experts() -> None:
    assert quantizations(MIXTRAL) == (None,)
    assert quantizations(model_config("llama-3.1-8b")[1]) == (None, "fp8")
