"""Gathers in fp8: what a quantised weight reads is quantised before it is gathered, and not after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas import rows_to_fp8
from kernels_pallas.rows_fp8 import next_power_of_two
from nanoflow_jax.cli import main
from nanoflow_jax.config import ConfigError
from nanoflow_jax.cost.demand import Demand, StepLoad
from nanoflow_jax.cost.latency import RooflineModel
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.models.quantised import LARGEST, LEAST, QuantisedRows, join_parts
from nanoflow_jax.models.registry import model_config
from nanoflow_jax.plan.file import load_plan, parse_plan, plan_toml
from nanoflow_jax.plan.known import known_plan
from nanoflow_jax.plan.plan import NanoBatch, SchedulePlan
from nanoflow_jax.search.layouts import layouts
from nanoflow_jax.search.orders import best_order
from nanoflow_jax.search.search import Finder, Space, search
from nanoflow_jax.step import gemm_ops, trace
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.step.trace import StepSpec
from nanoflow_jax.workload import load_workload
from tests.reference.checkpoints import PROMPT_LENGTHS, load_reference, write_checkpoint
from tests.reference.fp8_checkpoints import FORMS, write
from tests.step.step_driver import FAST_COMPILE, Driver, Packer, against_reference, logits_of
from tests.tolerances import row_errors

FP8 = ml_dtypes.float8_e4m3fn
CASE, MOST = "biases", 0.08  # of the norm of a row of logits, in the median, as in test_quantised
COUNT, DEVICES = len(PROMPT_LENGTHS), 8
SHAPE = StepShape(8, -(-sum(PROMPT_LENGTHS) // 8) * 8, COUNT + 1, pages_per_request=14)


def plan(strategy: str, gathers: str | None = "fp8") -> SchedulePlan:
    return SchedulePlan(strategy, (NanoBatch(None, strategy),), gathers=gathers)


# -- the rounding of heads


def heads(devices: int, rows: int = 5, columns: int = 32) -> np.ndarray:
    """[p, n, w/p], of very different sizes; a device's of the last row are zeros, and all of another row's."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(devices, rows, columns)) * 10.0 ** rng.uniform(-2, 2, (devices, rows, 1))
    x[1, -1], x[:, 1] = 0, 0
    return x.astype(np.float32)


def quantised_part(x: jax.Array, bound: float | None = None) -> QuantisedRows:
    return QuantisedRows(*rows_to_fp8(x, bound=bound, power_of_two=True), x.dtype)


def joined(x: np.ndarray, change: Callable[[QuantisedRows], QuantisedRows] = lambda parts: parts) -> np.ndarray:
    parts = [quantised_part(jnp.asarray(part)) for part in x]
    gathered = change(jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts))
    whole = join_parts(gathered)
    return np.asarray(whole.values, np.float64) * np.asarray(whole.scale, np.float64)[:, None]


def test_a_rows_parts_get_one_scale() -> None:
    """What fp8 holds over a power of two for the whole row, once rounded, and twice only below its normal numbers."""
    x = heads(4)
    rows = x.transpose(1, 0, 2).reshape(5, -1)
    most = np.maximum(np.abs(rows).max(axis=1) / LARGEST, LEAST)
    scale = 2.0 ** np.ceil(np.log2(most))[:, None]
    want = (rows / scale).astype(np.float32).astype(FP8).astype(np.float64) * scale
    got = joined(x)
    normal = np.abs(rows) >= 2.0**-6 * scale
    assert 0.3 < normal.mean() < 0.95
    np.testing.assert_array_equal(got[normal], want[normal])
    assert (np.abs(got - rows) <= 2.0**-4 * np.abs(rows) + 2.0**-9 * scale).all()
    swapped = joined(x, lambda parts: replace(parts, scale=parts.scale[::-1]))
    assert (np.abs(swapped - rows) > 2.0**-4 * np.abs(rows) + 2.0**-9 * scale).mean() > 0.2


def test_magnitudes_are_cut_off_at_the_bound() -> None:
    x = jnp.asarray([[1.0, -5.0, 300.0, 2.0]])
    part = quantised_part(x, 4.0)
    assert (np.asarray(part.values, np.float32) * float(part.scale[0])).tolist() == [[1.0, -4.0, 4.0, 2.0]]


def test_next_power_of_two() -> None:
    x = [1.0, np.nextafter(np.float32(1), np.float32(2)), 3.0, 4.0, 2.0**-40, 1.5 * 2.0**-40]
    assert next_power_of_two(jnp.asarray(x, jnp.float32)).tolist() == [1.0, 2.0, 4.0, 4.0, 2.0**-40, 2.0**-39]


# -- a step


@pytest.fixture(scope="module", autouse=True)
def one_code_generator() -> Iterator[None]:
    """XLA's own, and not that of other tests (tests/conftest.py): fused otherwise, the same row would be rounded
    otherwise by two programs that are compared bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAST_COMPILE, "xla_backend_extra_options", "")
        yield


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[tuple[int, int], np.ndarray]]:
    folder, reference = write_checkpoint(CASE, tmp_path_factory.mktemp(CASE)), load_reference(CASE)

    def of(chosen: SchedulePlan, dtype: str = "float32") -> dict[tuple[int, int], np.ndarray]:
        driver = Driver(folder, chosen, SHAPE, DEVICES, dtype, quantization="fp8")
        packer = Packer(reference.prompts, SHAPE, driver.num_pages)
        return logits_of(driver, [packer.pack(prefill=[(s, 0, len(p)) for s, p in enumerate(reference.prompts)])])

    return of


def test_rows_are_the_same_however_they_are_gathered(
    logits: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the scatter strategy: a row is whole on its device. Every bit of the logits."""
    plain, fp8 = logits(plan("scatter", None)), logits(plan("scatter"))
    assert plain.keys() == fp8.keys()
    assert all(plain[place].tobytes() == fp8[place].tobytes() for place in plain)
    # Scales of other rows: the gather's result is what is read.
    rows = trace.collectives.all_gather_rows
    monkeypatch.setattr(trace.collectives, "all_gather_rows", lambda x: rows(x[::-1] if x.ndim == 1 else x))
    turned = logits(plan("scatter"))
    assert not all(plain[place].tobytes() == turned[place].tobytes() for place in plain)


def test_heads_are_as_good_as_their_rounding(logits: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the gather strategy: a row's heads are on all devices, and rounded a little otherwise."""
    reference = load_reference(CASE)

    def error(found: dict[tuple[int, int], np.ndarray]) -> float:
        return float(np.median(row_errors(*against_reference(found, reference, "float32"))))

    plain, fp8 = error(logits(plan("gather", None))), error(logits(plan("gather")))
    assert 1e-3 < plain < MOST and 1e-3 < fp8 < min(MOST, 1.25 * plain)
    monkeypatch.setattr(gemm_ops, "join_parts", lambda x: join_parts(replace(x, scale=x.scale[::-1])))
    assert error(logits(plan("gather"))) > 1.5 * MOST


def test_layers_that_stay_in_16_bits_are_gathered_so(tmp_path: Path) -> None:
    """Of a checkpoint that leaves some out, whatever the plan says."""
    write(CASE, FORMS["kept"], tmp_path)
    reference, found = load_reference(CASE), []
    for gathers in (None, "fp8"):
        driver = Driver(tmp_path, plan("scatter", gathers), SHAPE, DEVICES)
        packer = Packer(reference.prompts, SHAPE, driver.num_pages)
        found.append(
            logits_of(driver, [packer.pack(prefill=[(s, 0, len(p)) for s, p in enumerate(reference.prompts)])])
        )
    plain, fp8 = found
    assert all(plain[place].tobytes() == fp8[place].tobytes() for place in plain)
    with pytest.raises(TypeError, match="quantised rows are multiplied with a quantised weight"):
        rows = QuantisedRows(jnp.zeros((2, 4), jnp.float8_e4m3fn), jnp.ones(2), jnp.float32)
        trace.parts.contract(rows, jnp.zeros((3, 4)), 1)


# -- plans


def test_a_plan_says_so_and_is_written_so(tmp_path: Path) -> None:
    chosen = plan("scatter")
    path = tmp_path / "scatter.toml"
    path.write_text(plan_toml(chosen, []))
    assert 'gathers = "fp8"' in path.read_text() and load_plan(str(path)) == chosen
    with pytest.raises(ConfigError, match=r"^gathers: 'int8' is not accepted; expected 'fp8', or no such line$"):
        parse_plan("p", {"gathers": "int8", "nano_batches": [{"attention_output": "gather"}]})
    # What depends on a plan's text (kept prefixes, manifests) depends on this, and not on the field's being there.
    assert "gathers" in repr(chosen) and "gathers" not in repr(replace(chosen, gathers=None))


def test_a_model_that_is_not_quantised_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config, message = (
        model_config("llama-3.1-70b")[1],
        "gathers: plan 'scatter' gathers in fp8, and the model's weights",
    )
    with pytest.raises(
        ConfigError, match=rf"^{message} are not in it; accepted: quantization='fp8', or a plan without"
    ):
        StepSpec(config, plan("scatter"), SHAPE)
    StepSpec(replace(config, quantization="fp8"), plan("scatter"), SHAPE)
    path = tmp_path / "scatter.toml"
    path.write_text(plan_toml(plan("scatter"), []))
    assert main(["simulate", "--plan", str(path), "--workload", "constant:512:512"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert message in line


def test_auto_takes_the_plan_without_them_where_the_weights_are_not() -> None:
    config = model_config("llama-3.1-70b")[1]
    made = replace(load_plan("auto_llama_3_1_70b_8xh200_fp8"), name="made")
    assert made.gathers == "fp8"
    for quantization in (None, "fp8"):
        found, _ = known_plan(replace(config, quantization=quantization), "h200", 8, 2048, 1280, [made])
        assert (found.name, found.gathers) == ("made", quantization)


def test_search_takes_them_where_they_pay() -> None:
    """The same space without them holds nothing as good; weights in bfloat16 have no choice."""
    config, model = model_config("llama-3.1-70b")[1], RooflineModel(load_hardware("h200"))
    load, space = StepLoad(1280, 768, 1024, 1024), Space(batches=(1, 2), grid={1: 128, 2: 512}, shares=())
    own = replace(config, quantization="fp8")
    found = search("p", own, model, 8, load, space=space)
    assert found.plan.gathers == "fp8" and found.gap == 0
    finder = Finder("p", own, model, 8, load, space)
    plain = [s for s in finder.structures() if s.gathers is None]
    assert {s.gathers for s in finder.structures()} == {None, "fp8"} and len(plain) > 10
    assert min(map(finder.bound, plain)) > 0.97 * found.period_us
    best = min(best_order(*finder.problem(s)).period for s in plain)
    assert found.period_us < 0.98 * best
    assert search("p", config, model, 8, load, space=space).plan.gathers is None


def test_layouts_say_which_weights_a_plan_is_not_for() -> None:
    config, model = model_config("llama-3.1-70b")[1], RooflineModel(load_hardware("h200"))
    demand = Demand.of(load_workload("constant:1024:512"), config.max_position_embeddings)
    found = layouts("70b", config, model, 8, demand, plans=["auto_llama_3_1_70b_8xh200_fp8"])
    refused = {layout.quantization for layout in found if "gathers in fp8" in (layout.refused or "")}
    assert refused == {None} and any(layout.quantization == "fp8" and not layout.refused for layout in found)
