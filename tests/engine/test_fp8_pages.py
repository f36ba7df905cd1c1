"""KV pages of float8_e4m3fn in the model and the engine: against a computation of its own in NumPy, over meshes, with
scales from the checkpoint, and through the engine's prefixes, preemptions and offload."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nanoflow_jax import LLM
from nanoflow_jax.config import ConfigError, ModelConfig
from nanoflow_jax.engine.memory import page_bytes, plan_pages
from nanoflow_jax.engine.setup import prefix_root
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.kv_scales import NAMES, find_kv_scales, is_kv_scale
from nanoflow_jax.models.layout import ModelParams
from nanoflow_jax.models.registry import parse_config
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.step.attention import page_dtype
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.weights.checkpoint import convert
from nanoflow_jax.weights.hub import resolve_model
from nanoflow_jax.weights.load import load_params, open_weights
from tests.engine.engine_driver import assert_idle, bytes_of_a_page, greedy, small_pool, tokens
from tests.reference.checkpoints import CASES, make_prompts, make_weights, write_checkpoint
from tests.step.step_driver import Driver, Packer, logits_of
from tests.tolerances import TOLERANCES, assert_rows_close, row_errors

CASE = "bare_config"  # 8 query heads on 4 KV heads, 2 layers: eight devices replicate the KV heads
CONFIG = CASES[CASE].config
HEADS, KV_HEADS, DIM, LAYERS = 8, 4, 8, 2
SHAPE = StepShape(3, 40, 3, pages_per_request=6)

# K's and V's scale of each layer: per head in the first, one for all heads in the second.
SCALES = {
    "model.layers.0.self_attn.k_proj.k_scale": np.array([0.011, 0.02, 0.031, 0.007], np.float32),
    "model.layers.0.self_attn.v_proj.v_scale": np.array([0.017, 0.0043, 0.029, 0.012], np.float32),
    "model.layers.1.self_attn.k_proj.k_scale": np.array(0.023, np.float32),
    "model.layers.1.self_attn.v_proj.v_scale": np.array([0.0071], np.float32),
}


def write(folder: Path, scales: dict[str, np.ndarray] | None = None) -> Path:
    """The case's checkpoint with these scales."""
    write_checkpoint(CASE, folder)
    file = folder / "model.safetensors"
    save_file({**load_file(file), **(SCALES if scales is None else scales)}, file)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp(CASE))


# -- a model of its own


def forward(sequence: list[int], scales: dict[str, np.ndarray] | None) -> np.ndarray:
    """Logits [L, V] in float64; K and V rounded to float8_e4m3fn in units of their scales, or not at all."""
    w = {name: value.astype(np.float64) for name, value in make_weights(CASE).items()}
    x = w["model.embed_tokens.weight"][sequence]
    length = len(sequence)
    angle = np.arange(length)[:, None] / 10000.0 ** (np.arange(0, DIM, 2) / DIM)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w[name]

    def rope(x: np.ndarray) -> np.ndarray:
        a, b = np.split(x, 2, axis=-1)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def rounded(x: np.ndarray, name: str) -> np.ndarray:
        if scales is None:
            return x
        scale = np.broadcast_to(scales[name].reshape(-1), (KV_HEADS,)).astype(np.float64)[None, :, None]
        return np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale

    for i in range(LAYERS):
        at = f"model.layers.{i}"
        h = norm(x, f"{at}.input_layernorm.weight")
        q, k, v = ((h @ w[f"{at}.self_attn.{p}_proj.weight"].T).reshape(length, -1, DIM) for p in "qkv")
        k = rounded(rope(k), f"{at}.self_attn.k_proj.k_scale").repeat(HEADS // KV_HEADS, axis=1)
        v = rounded(v, f"{at}.self_attn.v_proj.v_scale").repeat(HEADS // KV_HEADS, axis=1)
        scores = np.einsum("qhd,khd->hqk", rope(q), k) / np.sqrt(DIM)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
        x = x + attended.reshape(length, -1) @ w[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, f"{at}.post_attention_layernorm.weight")
        gate, up = (h @ w[f"{at}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}.mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


PROMPTS = make_prompts(CASE)[:3]  # of 3, 16 and 17 tokens


@cache
def wanted() -> np.ndarray:
    return np.concatenate([forward(p, SCALES) for p in PROMPTS])


def logits(driver: Driver, params: ModelParams | None = None) -> np.ndarray:
    """All but the last token of each prompt through prefill rows, the last through a decode row."""
    packer = Packer(PROMPTS, SHAPE, driver.num_pages)
    steps = [
        packer.pack(prefill=[(s, 0, len(p) - 1) for s, p in enumerate(PROMPTS)]),
        packer.pack([(s, len(p) - 1) for s, p in enumerate(PROMPTS)]),
    ]
    found = logits_of(driver, steps, params)
    return np.stack([found[place] for place in sorted(found)])


def driver(folder: Path, devices: int) -> Driver:
    plan = load_plan("two_gather_one_reduce" if devices > 1 else "two_all_reduce")
    return Driver(folder, plan, SHAPE, devices, kv_cache_dtype="fp8")


def test_the_definition_without_rounding_is_the_model() -> None:
    """What the tests below stand on, against `transformers`."""
    from tests.reference.checkpoints import load_reference

    want = np.concatenate(load_reference(CASE).logits["float32"][:3])
    assert_rows_close(np.concatenate([forward(p, None) for p in PROMPTS]), want, "float32")


def test_logits_on_one_device_and_on_eight(folder: Path) -> None:
    """Both equal the definition, and each other; mistakes with scales are far outside the tolerance."""
    one, eight = driver(folder, 1), driver(folder, 8)
    first = logits(one)
    assert_rows_close(first, wanted(), "float32")
    assert_rows_close(logits(eight), wanted(), "float32")
    assert eight.params.kv_scales.shape == (2, LAYERS, 8)
    np.testing.assert_array_equal(eight.params.kv_scales[:, :, ::2], one.params.kv_scales)
    scales = one.params.kv_scales
    twins = {
        "scales ignored": jnp.ones_like(scales),
        "K's and V's exchanged": scales[::-1],
        "of the other layer": scales[:, ::-1],
        "of another head": jnp.roll(scales, 1, axis=2),
    }
    shown = np.array([len(p) > 3 for p in PROMPTS for _ in p])
    for name, wrong in twins.items():
        errors = row_errors(logits(one, replace(one.params, kv_scales=wrong)), wanted())
        assert errors[shown].max() > 20 * TOLERANCES["float32"], name
        assert np.median(errors) > TOLERANCES["float32"], name
    unrounded = np.concatenate([forward(p, None) for p in PROMPTS])
    assert np.median(row_errors(unrounded, wanted())) > 20 * TOLERANCES["float32"]


# -- scales of a checkpoint


def config() -> ModelConfig:
    return parse_config(CONFIG)


@pytest.mark.parametrize("style", NAMES)
def test_names_of_scales(style: str) -> None:
    names = [f"model.layers.{i}.{style.format(part)}" for i in range(LAYERS) for part in "kv"]
    assert all(map(is_kv_scale, names))
    assert list(find_kv_scales(dict.fromkeys(names, ()), config())) == names
    assert not is_kv_scale("model.layers.0.self_attn.k_proj.weight_scale")
    assert find_kv_scales({"model.norm.weight": (64,)}, config()) == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.layers.1.self_attn.v_proj.v_scale": None}, ["model.layers.1.self_attn.v_proj.v_scale", "absent"]),
        ({"model.layers.1.self_attn.k_proj.k_scale": np.ones(3, np.float32)}, ["k_scale", "(3,)", "(4,)"]),
        ({"model.layers.0.self_attn.v_proj.v_scale": np.zeros(4, np.float32)}, ["v_scale", "0.0", "above 0"]),
    ],
)
def test_scales_that_cannot_be(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    scales = {name: value for name, value in {**SCALES, **changes}.items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        _ = driver(write(tmp_path, scales), 1).params
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_convert_keeps_scales_and_other_pages_need_none(folder: Path, tmp_path: Path) -> None:
    converted = convert(folder, tmp_path / "converted", dtype="bfloat16")
    before, after = driver(folder, 1), driver(converted, 1)
    np.testing.assert_array_equal(before.params.kv_scales, after.params.kv_scales)
    plain = load_params(converted, before.config, before.mesh, param_infos(before.config, 1))
    assert plain.kv_scales is None


# -- sizes and keys


def test_pages_of_half_the_bytes() -> None:
    bf16 = replace(config(), dtype="bfloat16")
    assert page_bytes(bf16, 8, 64) == 2 * page_bytes(bf16, 8, 64, "fp8") == 4 * LAYERS * 64 * DIM
    pools = [
        plan_pages(2**30, 2**28, 2**20, page_bytes(bf16, 8, 64, kind), 10**9, 1, lambda _: 2**24).num_pages
        for kind in ("auto", "fp8")
    ]
    assert pools[1] in (2 * pools[0], 2 * pools[0] + 1)
    assert page_dtype(bf16, "fp8") == page_dtype(bf16, "fp8_e4m3") == jnp.float8_e4m3fn
    with pytest.raises(ConfigError, match="kv_cache_dtype: 'int8' is not supported; accepted: 'auto', 'fp8'"):
        page_dtype(bf16, "int8")


def test_prefixes_of_other_pages_are_others(folder: Path) -> None:
    plan = load_plan("two_all_reduce")
    keys = {prefix_root(folder, config(), plan, f"xla {dtype}", False) for dtype in ("bfloat16", "float8_e4m3fn")}
    assert len(keys) == 2


# -- the engine


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    made = LLM(
        folder, tokenizer=str(resolve_model("tiny")), dtype="float32", tensor_parallel_size=2, max_model_len=64,
        decode_slots=8, tokens_per_step=32, page_size=8, kv_cache_tokens=512, deterministic=True, kv_offload_gib=0.1,
        kv_cache_dtype="fp8", progress=False,
    )  # fmt: skip
    yield made
    assert_idle(made)


def test_the_engine_gives_the_tokens_of_the_definition(llm: LLM) -> None:
    """Pages are fp8 with the checkpoint's scales; each token is the definition's best, or as good as it."""
    cache = llm.engine.runner.state.cache
    assert cache.k.dtype == cache.v.dtype == jnp.float8_e4m3fn
    assert bytes_of_a_page(llm) == 2 * LAYERS * 8 * KV_HEADS * DIM
    found = tokens(llm.generate(PROMPTS, greedy(12), use_tqdm=False))
    for prompt, got in zip(PROMPTS, found, strict=True):
        rows = forward([*prompt, *got], SCALES)[len(prompt) - 1 : -1]
        assert (rows[np.arange(len(got)), got] >= rows.max(axis=1) - 1e-3).all()


def test_prefixes_preemptions_and_offload_change_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit the same tokens alone, in a crowd with few pages, and when pages come back from the host."""
    rng = np.random.default_rng(0)
    shared = rng.integers(3, 96, 17).tolist()
    prompts = [shared[: 17 * (i % 2)] + rng.integers(3, 96, 3 + i).tolist() for i in range(12)]
    alone = []
    for prompt in prompts:
        alone += tokens(llm.generate([prompt], greedy(20), use_tqdm=False))
        llm.engine.scheduler.pool.reset()
    offload = llm.engine.scheduler.hooks.offload
    assert offload is not None
    offload.clear()
    stats = small_pool(llm, monkeypatch, 14, hopeful=True)
    for _ in range(2):
        assert tokens(llm.generate(prompts, greedy(20), use_tqdm=False)) == alone
    assert stats.preemptions > 3
    assert stats.restored_tokens > 0
    (page,) = llm.engine.runner.extract([0])
    assert page.dtype == jnp.float8_e4m3fn


def test_without_scales_they_are_one_and_it_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from nanoflow_jax.engine import setup

    caplog.set_level(logging.INFO, "nanoflow_jax")
    plain = write_checkpoint(CASE, tmp_path)
    assert setup._kv_scales(open_weights(plain), config()) == {}
    assert "scales of the fp8 KV pages: 1, the checkpoint has none" in caplog.text
    scales = driver(plain, 2).params.kv_scales
    np.testing.assert_array_equal(scales, np.ones((2, LAYERS, KV_HEADS), np.float32))
    assert isinstance(scales, jax.Array)
