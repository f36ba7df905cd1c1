"""fp8 weights against a float64 definition of what they mean, from the checkpoint to a whole step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nanoflow_jax import LLM, SamplingParams
from nanoflow_jax.config import EMBEDDED, Layouts
from nanoflow_jax.cost.footprint import weight_bytes
from nanoflow_jax.cost.shapes import optimum
from nanoflow_jax.engine.setup import prefix_root
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.params import ParamInfo, Source, is_info, random_params
from nanoflow_jax.models.parts import contract
from nanoflow_jax.models.quantised import LARGEST, Quantised, quantised_info
from nanoflow_jax.models.registry import model_config
from nanoflow_jax.parallel.mesh import make_mesh
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.weights import convert
from tests.reference.checkpoints import PROMPT_LENGTHS, load_reference, write_checkpoint
from tests.step.step_driver import Driver, Packer, against_reference, logits_of
from tests.tolerances import row_errors

FP8 = ml_dtypes.float8_e4m3fn
CASE, MOST = "biases", 0.08  # of the norm of a row of logits, in the median
HALF_STEP = 2.0**-4  # the largest relative error of rounding to three bits of mantissa
COUNT = len(PROMPT_LENGTHS)
SHAPE = StepShape(COUNT + 1, sum(PROMPT_LENGTHS) + 1, COUNT + 1, pages_per_request=14)


def dequantised(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """float64 [...]: rounded to fp8 over the largest magnitude along `axis`."""
    scale = np.abs(x).max(axis=axis, keepdims=True) / LARGEST
    return (x / scale).astype(np.float32).astype(FP8).astype(np.float64) * scale


def made(weight: np.ndarray) -> Quantised:
    scale = (np.abs(weight).max(axis=-1) / LARGEST).astype(np.float32)
    return Quantised(jnp.asarray((weight / scale[..., None]).astype(FP8)), jnp.asarray(scale))


@pytest.mark.parametrize("axis", [0, 1])
def test_contract_multiplies_what_was_rounded(axis: int) -> None:
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=(3, 8, 64)) * 10.0 ** rng.uniform(-3, 3, (3, 8, 1))).astype(np.float32)
    x = (rng.normal(size=(16, 64)) * 10.0 ** rng.uniform(-3, 3, (16, 1))).astype(np.float32)
    want = dequantised(x) @ dequantised(weight).reshape(24, 64).T
    size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(weight.reshape(24, 64), axis=1)[None, :]

    def off(weight: Quantised, x: np.ndarray) -> float:
        got = np.asarray(contract(jnp.asarray(x if axis else x.T), weight, axis), np.float64)
        return float((np.abs(got - want) / size).max())

    quantised = made(weight)
    assert off(quantised, x) < 1e-5
    assert off(quantised, np.zeros_like(x)) > 0.1
    scales_of_neighbours = replace(quantised, scale=jnp.roll(quantised.scale, 1))
    per_tensor = replace(quantised, scale=jnp.full_like(quantised.scale, quantised.scale.max()))
    by_columns = made(np.ascontiguousarray(weight.reshape(24, 64)[:, ::-1]).reshape(weight.shape))
    for broken in (scales_of_neighbours, per_tensor, by_columns):
        assert off(broken, x) > 1e-2
    rounded = np.abs(want - x.astype(np.float64) @ weight.reshape(24, 64).T.astype(np.float64)) / size
    assert 1e-4 < rounded.max() < 2 * HALF_STEP, "fp8 is coarse, and not wrong"


@pytest.mark.parametrize("spec", [P("tp", None), P(None, "tp")])
def test_a_weight_is_quantised_by_whole_rows_however_it_is_split(spec: P) -> None:
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(16, 64)).astype(np.float32)
    weight[3] = 0.0
    info = ParamInfo(
        weight.shape, jnp.dtype("bfloat16"), spec, "normal", (Source("w", weight.shape),), lambda read, i: read("w", i)
    )
    quantised = quantised_info(info)

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        return weight[index]

    scale = quantised.scale.read(read, (slice(0, 16),))
    whole = quantised.values.read(read, (slice(0, 16), slice(0, 64)))
    assert whole.dtype == FP8 and scale.dtype == np.float32
    for columns in (slice(0, 32), slice(32, 64)):
        part = quantised.values.read(read, (slice(4, 8), columns))
        np.testing.assert_array_equal(part.astype(np.float32), whole[4:8, columns].astype(np.float32))
        assert (quantised.scale.read(read, (slice(4, 8),)) == scale[4:8]).all()
    again = whole.astype(np.float64) * scale[:, None].astype(np.float64)
    assert (np.abs(again - weight) <= HALF_STEP * np.abs(weight) + scale[:, None] * 2.0**-9).all()
    assert (again[3] == 0).all()
    assert quantised.values.spec == spec and tuple(quantised.scale.spec) == tuple(spec)[:1]


def test_half_the_bytes_of_all_but_embedding_head_and_norms() -> None:
    config = model_config("llama-3.1-70b")[1]
    for devices in (1, 8):
        plain, fp8 = (
            param_infos(replace(config, quantization=q), devices, Layouts(o_by_input=False)) for q in (None, "fp8")
        )
        rest = replace(plain, layers=())
        layers = weight_bytes(plain, devices) - weight_bytes(rest, devices)
        scales = sum(i.nbytes for i in jax.tree.leaves(fp8.layers, is_leaf=is_info) if i.dtype == jnp.float32)
        assert weight_bytes(fp8, devices) - weight_bytes(rest, devices) == pytest.approx(layers / 2, abs=scales)
        assert scales < 0.002 * layers


@pytest.fixture(scope="module")
def driver_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Driver]:
    folder, made = write_checkpoint(CASE, tmp_path_factory.mktemp(CASE)), {}

    def get(plan: str, devices: int) -> Driver:
        if (plan, devices) not in made:
            made[plan, devices] = Driver(folder, load_plan(plan), SHAPE, devices, "float32", quantization="fp8")
        return made[plan, devices]

    return get


@pytest.mark.parametrize("plan", ["two_gather_one_reduce", "two_all_reduce"])
def test_a_step_is_as_good_as_its_rounding(plan: str, driver_of: Callable[[str, int], Driver]) -> None:
    """Logits of one device and of eight are near the float32 reference. A device's share of a token's activations has a
    scale of its own, so that eight round a little otherwise than one."""
    reference = load_reference(CASE)

    def errors(devices: int, change: Callable[[Quantised], Quantised] = lambda weight: weight) -> float:
        driver = driver_of(plan, devices)
        packer = Packer(reference.prompts, SHAPE, driver.num_pages)
        steps = [packer.pack(prefill=[(s, 0, len(p)) for s, p in enumerate(reference.prompts)])]
        layers = tuple(replace(layer, down=change(layer.down)) for layer in driver.params.layers)
        logits = logits_of(driver, steps, replace(driver.params, layers=layers))
        return float(np.median(row_errors(*against_reference(logits, reference, "float32"))))

    exact, split = errors(1), errors(8)
    assert 1e-3 < exact < MOST and 1e-3 < split < MOST
    assert errors(1, lambda w: replace(w, scale=w.scale * jnp.where(jnp.arange(w.scale.size) % 2, 0.5, 1.5))) > 2 * MOST
    assert errors(1, lambda w: replace(w, values=w.values.at[::4].set(0))) > 2 * MOST


@pytest.mark.parametrize("case", ["qwen3", "granite_biases", "olmo2_gqa"])
def test_families_in_fp8(case: str, tmp_path: Path) -> None:
    """Weights and pages in fp8, on eight devices."""
    reference, plan = load_reference(case), load_plan("two_gather_one_reduce")
    driver = Driver(
        write_checkpoint(case, tmp_path), plan, SHAPE, 8, "float32", kv_cache_dtype="fp8", quantization="fp8"
    )
    packer = Packer(reference.prompts, SHAPE, driver.num_pages)
    steps = [packer.pack(prefill=[(s, 0, len(p)) for s, p in enumerate(reference.prompts)])]
    errors = row_errors(*against_reference(logits_of(driver, steps), reference, "float32"))
    assert 1e-3 < np.median(errors) < 2**0.5 * MOST  # two roundings
    turned = logits_of(driver, steps, replace(driver.params, layers=driver.params.layers[::-1]))
    assert np.median(row_errors(*against_reference(turned, reference, "float32"))) > 2 * MOST


def test_random_weights_have_the_size_of_others() -> None:
    """Benchmarks run on them: neither zeros nor overflow."""
    config = replace(model_config("tiny")[1], num_layers=1, dtype="bfloat16", quantization="fp8")
    params = random_params(param_infos(config, 8), make_mesh(config, 8))
    down = params.layers[0].down
    weight = np.asarray(down.values, np.float32) * np.asarray(down.scale)[:, None]
    assert weight.std() == pytest.approx(config.intermediate_size**-0.5, rel=0.05)
    assert np.isfinite(weight).all()


def test_an_llm_multiplies_by_them(tmp_path: Path) -> None:
    """Not only accepted: the weights on the devices are in fp8, and the answers are those that are asked for. A
    checkpoint that was written so needs no option, and gives the same weights."""
    options: dict[str, Any] = {
        "tensor_parallel_size": 2, "max_model_len": 64, "decode_slots": 8, "tokens_per_step": 32, "page_size": 16,
        "kv_cache_tokens": 512, "deterministic": True, "progress": False,
    }  # fmt: skip
    folder = convert(EMBEDDED["tiny"], tmp_path / "fp8", quantization="fp8")
    prompts = ["12+30=", "47+85=", "sort 52917="]
    weights = []
    for model, quantization in (("tiny", "fp8"), (str(folder), None)):
        llm = LLM(model, quantization=quantization, **options)
        weights.append(llm.engine.runner._params)
        found = Counter(array.dtype.name for array in weights[-1])
        assert found["float8_e4m3fn"] == 4 * llm.config.num_layers
        answers = [o.outputs[0].text for o in llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=8))]
        assert answers == ["42", "132", "12579"]
    for a, b in zip(*weights, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_what_depends_on_them() -> None:
    """Keys and values of other weights are never found as prefixes; the optimum is that of fp8 tensor cores."""
    config, h200 = model_config("llama-3.1-70b")[1], load_hardware("h200")
    both = (config, replace(config, quantization="fp8"))
    roots = {prefix_root(Path("model"), c, load_plan("sequential"), "xla bfloat16", False) for c in both}
    assert len(roots) == 2
    plain, fp8 = (optimum(c, h200) for c in both)
    assert fp8 / plain == pytest.approx(h200.fp8_flops / h200.bf16_flops)
