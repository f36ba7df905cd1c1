"""Layers of experts: places for any routing, both ways to split them, and what a plan says of them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_jax import LLM, SamplingParams
from nanoflow_jax.config import ConfigError, Experts, Mlp
from nanoflow_jax.models.experts import combine, most_places, places, route
from nanoflow_jax.models.layout import ExpertParams, ModelParams
from nanoflow_jax.models.registry import model_config
from nanoflow_jax.plan.file import load_plan, parse_plan, plan_toml
from nanoflow_jax.plan.ops import OPS, STRATEGIES
from nanoflow_jax.plan.plan import SchedulePlan
from nanoflow_jax.step.attention import check_quantization
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.weights.hub import resolve_model
from tests.engine.engine_driver import small_pool
from tests.reference.checkpoints import PROMPT_LENGTHS, Reference, load_reference, write_checkpoint
from tests.reference.plain_forward import forward
from tests.step.step_driver import FAST_COMPILE, Driver, against_reference, logits_of
from tests.tolerances import TOLERANCES, assert_rows_close, row_errors

COUNT = len(PROMPT_LENGTHS)
SHAPE = StepShape(COUNT + 1, sum(PROMPT_LENGTHS) + 1, COUNT + 1, pages_per_request=14)


def logits(driver: Driver, reference: Reference, params: ModelParams | None = None) -> dict[tuple[int, int], Any]:
    steps = [driver.packer(reference.prompts).pack(prefill=[(s, 0, len(p)) for s, p in enumerate(reference.prompts)])]
    return logits_of(driver, steps, params)


@pytest.mark.parametrize(
    ("case", "devices", "whole"), [("mixtral", 8, False), ("gpt_oss", 8, False), ("gpt_oss_default_layers", 2, True)]
)
def test_the_other_split(case: str, devices: int, whole: bool, tmp_path: Path) -> None:
    """Than the one that test_reference_outputs.py takes: each expert over all devices, or each on one. Of the devices
    that an expert is split over one adds its bias: more would show."""
    reference = load_reference(case)
    plan = replace(load_plan("two_all_reduce"), expert_parallel=whole)
    driver = Driver(write_checkpoint(case, tmp_path), plan, SHAPE, devices)
    assert_rows_close(*against_reference(logits(driver, reference), reference, "float32"), "float32")


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    return Driver(write_checkpoint("gpt_oss", tmp_path_factory.mktemp("gpt")), load_plan("two_all_reduce"), SHAPE, 8)


@pytest.mark.parametrize("favoured", [(0, 1), (6, 7), (3, 4)])
def test_experts_with_all_rows_and_with_none(favoured: tuple[int, int], gpt_oss: Driver) -> None:
    """All rows go to two experts, of one device each, and to no other: as the plain forward has it."""
    biased = [
        replace(
            layer,
            experts=replace(layer.experts, router_bias=layer.experts.router_bias.at[jnp.array(favoured)].add(1e3)),
        )
        for layer in gpt_oss.params.layers
    ]
    placed = jax.tree.map(lambda x: x.sharding, gpt_oss.params)
    params = jax.device_put(replace(gpt_oss.params, layers=tuple(biased)), placed)
    reference = load_reference("gpt_oss")
    found, prompt = logits(gpt_oss, reference, params), max(reference.prompts, key=len)
    run: Any = jax.jit(partial(forward, gpt_oss.config), compiler_options=FAST_COMPILE)
    want = np.asarray(run(params, np.array(prompt)))
    number = reference.prompts.index(prompt)
    got = np.stack([found[number, at] for at in range(len(prompt))])
    assert_rows_close(got, want, "float32")
    assert (row_errors(want, reference.logits["float32"][number]) > TOLERANCES["bfloat16"]).any()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_places(data: st.DataObject) -> None:
    """Each choice of a local expert has a place of its own, in its expert's group, that holds its row; groups are
    aligned and follow each other; there is room for any routing."""
    # Few sizes: every new one is compiled.
    n, count, align = (data.draw(st.sampled_from(sizes)) for sizes in ((1, 4, 9), (1, 2, 6), (1, 3, 8)))
    k = data.draw(st.integers(1, count))
    first = data.draw(st.integers(0, count - 1))
    local = data.draw(st.integers(1, count - first))
    chosen = np.array([data.draw(st.permutations(range(count)))[:k] for _ in range(n)])
    at = places(jnp.asarray(chosen, jnp.int32), first, local, align)
    ends = np.cumsum(at.sizes)
    assert (np.asarray(at.sizes) % align == 0).all()
    assert ends[-1] <= at.rows.shape[0] == most_places(n, k, local, align)
    taken = set[int]()
    for row in range(n):
        for choice in range(k):
            expert, place = chosen[row, choice] - first, int(at.place[row, choice])
            assert (place >= 0) == (0 <= expert < local)
            if place >= 0:
                assert ends[expert] - at.sizes[expert] <= place < ends[expert]
                assert at.rows[place] == row
                assert place not in taken
                taken.add(place)


def test_ties_go_to_the_first_experts() -> None:
    router = jnp.zeros((5, 4)).at[3].set(1.0)
    params = ExpertParams(router, None, *[None] * 5)
    found = route(jnp.ones((2, 4)), params, Mlp(experts=Experts(5, 3, 8)))
    np.testing.assert_array_equal(found.chosen, [[3, 0, 1]] * 2)
    np.testing.assert_allclose(found.weights.sum(axis=1), 1.0, rtol=1e-6)
    shares = route(jnp.ones((2, 4)), params, Mlp(experts=Experts(5, 3, 8, normalized=False))).weights
    np.testing.assert_allclose(shares, np.exp([[4.0, 0.0, 0.0]] * 2) / (np.exp(4) + 4), rtol=1e-6)


def test_what_nobody_computed_is_never_read() -> None:
    """NaN in places that are empty, and in those of other devices."""
    chosen = jnp.array([[0, 3], [2, 1], [3, 2]], jnp.int32)
    routing = route(jnp.ones((3, 4)), ExpertParams(jnp.zeros((4, 4)), None, *[None] * 5), Mlp(experts=Experts(4, 2, 8)))
    at = places(chosen, 2, 2)
    out = jnp.full((at.rows.shape[0], 4), jnp.nan).at[at.place[at.place >= 0]].set(1.0)
    summed = combine(out, at, replace(routing, weights=jnp.full((3, 2), 0.5)), None)
    np.testing.assert_array_equal(summed[:, 0], [0.5, 0.5, 1.0])


# ---- plans


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pieces_of_models_with_experts(strategy: str) -> None:
    plan = parse_plan("p", {"nano_batches": [{"attention_output": strategy}]})
    assert [p.op for p in plan.pieces(8, 8, experts=True)] == ["KQV", "GEMV", "PF", *STRATEGIES[strategy]]
    dense = [op for op in STRATEGIES[strategy] if not OPS[op].experts]
    assert [p.op for p in plan.pieces(8, 8)] == ["KQV", "GEMV", "PF", *dense]


def test_an_order_that_names_no_experts_has_them_ahead_of_what_needs_them() -> None:
    plan = load_plan("nanoflow_70b")
    names = [p.name for p in plan.pieces(1280, 768, experts=True)]
    assert [name for name in names if not OPS[name.rpartition(".")[0]].experts] == list(plan.order)
    for piece in ("1", "2"):
        at = names.index(f"UG.{piece}")
        assert names[at - 2 : at] == [f"ROUTE.{piece}", f"DISPATCH.{piece}"]
        after = next(op for op in ("D.AR", "D.RS") if f"{op}.{piece}" in names)
        assert names[names.index(f"{after}.{piece}") - 1] == f"COMBINE.{piece}"


def test_plans_that_name_experts() -> None:
    names = ["KQV.1", "GEMV.1", "PF.1", "O.1", "O.AR.1", "ROUTE.1", "DISPATCH.1", "UG.1", "D.1", "COMBINE.1", "D.AR.1"]
    fields: dict[str, Any] = {"nano_batches": [{"attention_output": "reduce"}], "order": names}
    plan = parse_plan("p", fields | {"expert_parallel": False})
    assert [p.name for p in plan.pieces(8, 8, experts=True)] == names
    assert [p.name for p in plan.pieces(8, 8)] == [n for n in names if n[:-2] not in ("ROUTE", "DISPATCH", "COMBINE")]
    assert "expert_parallel = false" in plan_toml(plan, [])
    swapped = [*names[:5], "DISPATCH.1", "ROUTE.1", *names[7:]]
    for wrong, says in (
        ({"order": swapped}, r"order: 'DISPATCH.1' needs ROUTE.1, which must come before it"),
        (
            {"order": [n for n in names if n != "COMBINE.1"]},
            r"order: 'D.AR.1' needs COMBINE.1, which must come before it",
        ),
        ({"expert_parallel": 1}, r"expert_parallel: 1 must be true or false"),
    ):
        with pytest.raises(ConfigError, match=f"^{says}$"):
            parse_plan("p", fields | wrong)


def test_how_experts_are_split() -> None:
    """By their number where it divides; a plan may say otherwise, and its digest tells."""
    plan, config = load_plan("sequential"), model_config("mixtral-8x7b")[1]
    assert plan.layouts(config, 8).expert_parallel and not plan.layouts(config, 16).expert_parallel
    inside = replace(plan, expert_parallel=False)
    assert not inside.layouts(config, 8).expert_parallel
    assert not replace(plan, expert_parallel=True).layouts(model_config("llama-3.1-8b")[1], 8).expert_parallel
    assert len({p.digest for p in (plan, inside, replace(plan, expert_parallel=True))}) == 3
    with pytest.raises(ConfigError, match=r"^expert_parallel: true splits 8 experts over 16 devices, which does not"):
        replace(plan, expert_parallel=True).layouts(config, 16)


def test_experts_are_not_quantised() -> None:
    config = replace(model_config("mixtral-8x7b")[1], quantization="fp8")
    with pytest.raises(
        ConfigError, match=r"^quantization: 'fp8' is not there for models with experts; accepted: None$"
    ):
        check_quantization(config, (9, 0))


# ---- through the engine


@pytest.mark.parametrize("case", ["qwen3_moe", "gpt_oss"])
def test_neighbours_change_nothing(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logprobs and all, alone or in a crowd that takes pages away: one device's experts have few or many rows."""
    reference = load_reference(case)
    llm = LLM(
        write_checkpoint(case, tmp_path), tokenizer=str(resolve_model("tiny")), dtype="float32",
        tensor_parallel_size=8, max_model_len=112, decode_slots=8, tokens_per_step=64, page_size=8,
        kv_cache_tokens=5 * 112, deterministic=True, progress=False,
    )  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True, logprobs=1)
    least = 14 * len(llm.engine.scheduler.windows)
    stats = small_pool(llm, monkeypatch, least, hopeful=True)
    crowd = llm.generate(reference.prompts, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in crowd] == [list(tokens) for tokens in reference.greedy_tokens]
    assert stats.preemptions > 0
    (alone,) = llm.generate([reference.prompts[2]], params, use_tqdm=False)
    assert alone.outputs[0].logprobs == crowd[2].outputs[0].logprobs


def test_a_plan_without_experts_of_its_own(tmp_path: Path) -> None:
    """A scattered one with decode attention on a lane, made for a dense model."""
    plan: SchedulePlan = load_plan("scatter_70b")
    driver = Driver(write_checkpoint("mixtral", tmp_path), plan, replace(SHAPE, prefill_rows=106), 8)
    reference = load_reference("mixtral")
    assert_rows_close(*against_reference(logits(driver, reference), reference, "float32"), "float32")
