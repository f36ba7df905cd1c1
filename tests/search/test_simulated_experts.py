"""What is predicted of models with experts: active weights, imbalance, splits, GPUs without the kernel, plans."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest

from nanoflow_jax.cli import main
from nanoflow_jax.config import Layer, Layouts, Mlp, ModelConfig
from nanoflow_jax.cost.demand import StepLoad
from nanoflow_jax.cost.footprint import weight_bytes
from nanoflow_jax.cost.latency import RooflineModel
from nanoflow_jax.cost.shapes import OpCosts, Shapes, optimum
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.inspect.step import kernel_costs
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.registry import model_config
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.plan.known import known_plan
from nanoflow_jax.plan.plan import NanoBatch, SchedulePlan, row_quantum
from nanoflow_jax.search.fit import quantizations
from nanoflow_jax.search.simulate import simulate_step
from nanoflow_jax.timeline.jobs import Shares, build_jobs

H200 = RooflineModel(load_hardware("h200"))
LOAD = StepLoad(1280, 768, 1024, 512)
QWEN, MIXTRAL = model_config("qwen3-235b-a22b")[1], model_config("mixtral-8x7b")[1]
PLAN = SchedulePlan("one", (NanoBatch(None, "reduce"),), expert_parallel=True)


def kinds(shared: int) -> tuple[ModelConfig, ModelConfig, ModelConfig]:
    """Four layers without experts, four with, and two of each in turn (Qwen2-MoE's decoder_sparse_step = 2)."""
    (layer,) = QWEN.pattern
    assert layer.mlp.experts is not None
    routed = replace(layer, mlp=Mlp(experts=replace(layer.mlp.experts, shared=shared)))
    patterns: list[tuple[Layer, ...]] = [(replace(layer, mlp=Mlp()),), (routed,)]
    dense, experts, mixed = (replace(QWEN, num_layers=4, pattern=p) for p in (*patterns, patterns[0] + patterns[1]))
    return dense, experts, mixed


@pytest.mark.parametrize("shared", [0, 4096])
def test_layers_of_either_kind_cost_what_they_are(shared: int) -> None:
    """Jobs of a layer without experts, and of one with, are those of models where all are such, and the search's mean
    layer takes as long as both on average."""

    def layers(config: ModelConfig, alike: bool = False) -> list[list[tuple[str, str, float]]]:
        found = defaultdict(list)
        costs = OpCosts(H200, Shapes.of(config, 8), LOAD)
        for job in build_jobs(PLAN, costs, 4, Shares(0.3, 0.4), alike=alike):
            found[job.piece.layer].append((job.piece.op, job.kind, job.prediction.us))
        return [found[i] for i in range(4)]

    def us(layer: list[tuple[str, str, float]]) -> float:
        return sum(us for *_, us in layer)

    dense, experts, mixed = (layers(config) for config in kinds(shared))
    assert mixed == [dense[0], experts[1], dense[2], experts[3]]
    mean = layers(kinds(shared)[2], alike=True)
    assert us(mean[1]) == pytest.approx((us(dense[1]) + us(experts[1])) / 2)
    assert abs(us(dense[1]) - us(experts[1])) > 0.05 * us(mean[1])


@pytest.mark.parametrize("shared", [0, 4096])
def test_steps_optimum_and_weights_of_mixed_layers(shared: int) -> None:
    """All between those of models where layers are of one kind, with the ends of a step counted once."""
    dense, experts, mixed = kinds(shared)
    both = dense.active_params + experts.active_params
    assert 2 * mixed.active_params == both
    assert optimum(mixed, H200.hardware) == H200.hardware.bf16_flops / both
    weights = [
        weight_bytes(param_infos(config, 8, Layouts(o_by_output=False, expert_parallel=True)), 8)
        for config in (dense, experts, mixed)
    ]
    assert 2 * weights[2] == weights[0] + weights[1] and weights[0] < weights[1] / 2
    times = [simulate_step(PLAN, config, H200, 8, LOAD).us for config in (dense, experts, mixed)]
    assert 2 * times[2] == pytest.approx(times[0] + times[1], rel=0.01)


def test_the_inspector_asks_for_grouped_gemms_where_there_are_experts() -> None:
    """Elsewhere a kernel under UG's name is the norm ahead of it."""
    *_, mixed = kinds(0)
    pieces = PLAN.pieces(1280, 768, row_quantum(8), experts=True)
    found = kernel_costs(mixed, PLAN, pieces, 8, 1024, H200)
    grouped = OpCosts(H200, Shapes.of(mixed, 8), LOAD).grouped("UG", 2048, True)
    assert found["UG", 1] == [None, grouped, None, grouped]


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
    assert "'0.5' is not accepted; it must be a number of at least 1" in capsys.readouterr().err


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
