"""Checkpoints that come in fp8: what is on the devices is what they mean, and steps multiply by it as defined."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from nanoflow_jax.config import ConfigError, ModelConfig
from nanoflow_jax.models import parts
from nanoflow_jax.models.fp8_formats import find_weight_scales
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.kv_scales import find_kv_scales
from nanoflow_jax.models.layout import ModelParams
from nanoflow_jax.models.quantised import Quantised
from nanoflow_jax.models.registry import read_config
from nanoflow_jax.parallel.mesh import make_mesh
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.step.attention import check_quantization
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.weights.load import load_params, open_weights
from tests.reference.checkpoints import PROMPT_LENGTHS, make_prompts
from tests.reference.fp8_checkpoints import BLOCKS, FORMS, Tensors, make, save, write
from tests.reference.plain_forward import forward
from tests.step.step_driver import Driver, Packer, logits_of
from tests.tolerances import TOLERANCES, row_errors
from tests.weights.unfuse import MESH_SIZES, assert_same_tensors, hugging_face_tensors

CASE, TIED = "biases", "llama3_new_rope_tied"  # 2 KV heads, and 8 with a tied head
BOUND = 1.5  # of activations, which cuts some off
SHAPE = StepShape(len(PROMPT_LENGTHS) + 1, sum(PROMPT_LENGTHS) + 1, len(PROMPT_LENGTHS) + 1, pages_per_request=14)


def load(folder: Path, devices: int, **changed: Any) -> tuple[ModelConfig, ModelParams]:
    config = replace(read_config(folder / "config.json"), dtype="float32", **changed)
    source = open_weights(folder)
    infos = param_infos(config, devices, weight_scales=find_weight_scales(source.table, config))
    return config, load_params(source, config, make_mesh(config, devices), infos)


def dequantised(params: ModelParams) -> ModelParams:
    def plain(weight: Any) -> Any:
        if not isinstance(weight, Quantised):
            return weight
        return np.asarray(weight.values).astype(np.float32) * np.asarray(weight.scale)[..., None]

    return jax.tree.map(plain, params, is_leaf=lambda x: isinstance(x, Quantised))


def quantised_names(params: ModelParams) -> int:
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Quantised))
    return sum(isinstance(leaf, Quantised) for leaf in leaves)


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_the_devices_hold_what_the_checkpoint_means(name: str, tmp_path: Path) -> None:
    """Exactly: a value that was rounded again, or had the scale of another channel, would be another number."""
    for case in (CASE, TIED):
        meant = write(case, FORMS[name], tmp_path / case)
        for devices in MESH_SIZES if name in ("dynamic", "static") else (1, 8):
            config, params = load(tmp_path / case, devices)
            assert not config.tie_word_embeddings or params.head is None
            assert config.quantization == "fp8"
            assert quantised_names(params) == 5 * 2 - (4 if FORMS[name].kept else 0)  # o_proj is there in two layouts
            assert_same_tensors(hugging_face_tensors(dequantised(params), config), meant)


@pytest.mark.parametrize("name", BLOCKS)
def test_scales_of_blocks(name: str, tmp_path: Path) -> None:
    """Multiplied in, which is exact in float32; with quantization="fp8", rounded again: as what they mean is."""
    meant = write(CASE, BLOCKS[name], tmp_path / "blocks")
    fields = json.loads((tmp_path / "blocks" / "config.json").read_text())
    del fields["quantization_config"]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text(json.dumps(fields))
    save(tmp_path / "plain" / "model.safetensors", meant)
    for devices in (1, 8):
        config, params = load(tmp_path / "blocks", devices)
        assert config.quantization is None and not quantised_names(params)
        assert_same_tensors(hugging_face_tensors(params, config), meant)
        again, want = (load(tmp_path / folder, devices, quantization="fp8")[1] for folder in ("blocks", "plain"))
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(np.asarray(a).astype(np.float32), np.asarray(b).astype(np.float32))


def test_quantization_is_accepted_for_what_is_fp8_already(tmp_path: Path) -> None:
    meant = write(CASE, FORMS["fp8"], tmp_path)
    config, params = load(tmp_path, 2, quantization="fp8")
    assert_same_tensors(hugging_face_tensors(dequantised(params), config), meant)
    check_quantization(config, (8, 9))
    message = r"^quantization: the checkpoint's weights are in fp8, which needs fp8 tensor cores \(.*\), not 8\.0; "
    with pytest.raises(ConfigError, match=message + "accepted: the 16-bit checkpoint$"):
        check_quantization(config, (8, 0))
    assert check_quantization(replace(config, quantization=None), (8, 0)) is None


def test_scales_of_pages_that_come_along(tmp_path: Path) -> None:
    """ModelOpt's beside a projection, and the older ones of compressed-tensors: neither is unknown, both are found."""
    for name in ("{0}_proj.{0}_scale", "{0}_proj.output_scale"):
        write(CASE, FORMS["static"], tmp_path)
        stored = make(CASE, FORMS["static"])[0]
        scales = {f"model.layers.{i}.self_attn.{name.format(p)}": np.float32(0.1 + i) for i in range(2) for p in "kv"}
        save(tmp_path / "model.safetensors", stored | {key: np.array([value]) for key, value in scales.items()})
        config, _ = load(tmp_path, 1)
        shapes = {key: tensor.shape for key, tensor in open_weights(tmp_path).table.items()}
        assert find_kv_scales(shapes, config) == dict.fromkeys(scales, (1,))


def test_what_is_done_otherwise_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, changed, said in (
        (
            "dynamic",
            {},
            "checkpoint: fp8 weights (compressed-tensors); activations are quantised per token as they run",
        ),
        (
            "modelopt",
            {},
            "(modelopt); activations are quantised per token as they run; its static scales of them are not",
        ),
        ("fp8_blocks", {}, "(fp8) with scales of blocks, which no fp8 GEMM here has: they are loaded in float32"),
        ("fp8_blocks", {"quantization": "fp8"}, "rounded again, per output channel, which adds as much error as"),
    ):
        write(CASE, (FORMS | BLOCKS)[name], tmp_path / name)
        caplog.clear()
        with caplog.at_level(logging.INFO, "nanoflow_jax"):
            load(tmp_path / name, 1, **changed)
        assert len(caplog.records) == 1 and said in caplog.records[0].getMessage()


# ---- steps ----------------------------------------------------------------------------------------------------------


def by_definition(
    folder: Path, meant: Tensors, bound: float = np.inf, kept: Callable[[ModelParams], list[Any]] = lambda _: []
) -> list[np.ndarray]:
    """Logits of each prompt: the plain forward on the weights meant, in float32, with what every GEMM of a layer
    multiplies rounded to fp8 over each token's largest magnitude, but for the weights `kept`."""
    config = replace(read_config(folder / "config.json"), dtype="float32", quantization=None, fp8_checkpoint=None)
    plain = folder / "meant"
    plain.mkdir(exist_ok=True)
    save(plain / "model.safetensors", meant)
    params = load_params(plain, config, make_mesh(config, 1), param_infos(config, 1))

    def contract(x: jax.Array, weight: jax.Array, axis: int, out_dtype: Any = None) -> jax.Array:
        assert axis == 1 and out_dtype is None
        if not any(weight is other for other in kept(params)):
            x = jnp.clip(x, -bound, bound)
            scale = jnp.max(jnp.abs(x), axis=1, keepdims=True) / 448
            x = (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(jnp.float32) * scale
        return jnp.dot(x, weight.reshape(-1, weight.shape[-1]).T, precision="highest")

    with pytest.MonkeyPatch.context() as patch:  # the head's stays
        patch.setattr(parts, "contract", contract)
        longest = max(PROMPT_LENGTHS)
        padded = [np.pad(prompt, (0, longest - len(prompt))) for prompt in make_prompts(CASE)]  # no row sees later ones
        found = [np.asarray(forward(config, params, jnp.asarray(prompt))) for prompt in padded]
    return [logits[:length] for logits, length in zip(found, PROMPT_LENGTHS, strict=True)]


@cache
def driver(folder: Path, plan: str, devices: int) -> Driver:
    return Driver(folder, load_plan(plan), SHAPE, devices, "float32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensors]]:
    root = tmp_path_factory.mktemp("fp8")
    forms = {name: FORMS[name] for name in ("static", "dynamic", "kept")}
    forms["fbgemm"] = replace(FORMS["fbgemm"], config={**FORMS["fbgemm"].config, "activation_scale_ub": BOUND})
    return {name: (root / name, write(CASE, form, root / name)) for name, form in forms.items()}


def errors(step: Driver, params: ModelParams, want: list[np.ndarray]) -> np.ndarray:
    prompts = make_prompts(CASE)
    packer = Packer(prompts, SHAPE, step.num_pages)
    found = logits_of(step, [packer.pack(prefill=[(s, 0, len(p)) for s, p in enumerate(prompts)])], params)
    return row_errors(np.stack([found[key] for key in sorted(found)]), np.concatenate(want))


def layers(params: ModelParams, change: Callable[[Any], Any]) -> ModelParams:
    return replace(params, layers=tuple(change(layer) for layer in params.layers))


def scaled(change: Callable[[jax.Array], jax.Array]) -> Callable[[Any], Any]:
    return lambda layer: replace(layer, ug=replace(layer.ug, scale=change(layer.ug.scale)))


BROKEN: dict[str, Callable[[Any], Any]] = {
    "scales of the neighbours": scaled(lambda scale: jnp.roll(scale, 1, axis=1)),
    "gate's scale for up": scaled(lambda scale: jnp.stack([scale[0], scale[0]])),
    "a scale inverted": scaled(lambda scale: 1 / scale),
    "q's scale for k": lambda layer: replace(
        layer, kqv=replace(layer.kqv, scale=layer.kqv.scale.at[:, -2].set(layer.kqv.scale[:, 0]))
    ),
}
# Of a row's norm, in the median. On eight devices a share of a token's activations has a scale of its own.
MOST = {1: TOLERANCES["float32"], 8: 0.06}


@pytest.mark.parametrize("plan", ["two_gather_one_reduce", "two_all_reduce"])
@pytest.mark.parametrize("devices", [1, 8])
def test_a_step_computes_what_is_defined(plan: str, devices: int, folders: dict[str, tuple[Path, Tensors]]) -> None:
    step = driver(folders["dynamic"][0], plan, devices)
    for name in ("static", "dynamic"):
        folder, meant = folders[name]
        params = driver(folder, plan, devices).params
        want = by_definition(folder, meant)
        assert np.median(errors(step, params, want)) < MOST[devices]
        for broken, change in BROKEN.items():
            if name == "static" and broken.startswith("scales of"):
                continue  # all are equal
            off = np.median(errors(step, layers(params, change), want))
            assert off > 2 * MOST[devices], f"{name}, {broken}: {off}"


def test_weights_that_stay_as_they_are(folders: dict[str, tuple[Path, Tensors]]) -> None:
    """Of some layers, which then multiply what is not rounded."""
    folder, meant = folders["kept"]
    kept = lambda p: [p.layers[0].o_by_input, p.layers[0].o_by_output, p.layers[1].down, p.layers[1].ug]  # noqa: E731
    step = driver(folder, "two_gather_one_reduce", 1)
    assert np.median(errors(step, step.params, by_definition(folder, meant, kept=kept))) < MOST[1]
    assert np.median(errors(step, step.params, by_definition(folder, meant))) > 2 * MOST[1]
    step = driver(folder, "two_gather_one_reduce", 8)
    assert np.median(errors(step, step.params, by_definition(folder, meant, kept=kept))) < MOST[8]


def test_the_bound_of_activations_is_applied(folders: dict[str, tuple[Path, Tensors]]) -> None:
    folder, meant = folders["fbgemm"]
    step = driver(folder, "two_gather_one_reduce", 1)
    assert np.median(errors(step, step.params, by_definition(folder, meant, BOUND))) < MOST[1]
    assert np.median(errors(step, step.params, by_definition(folder, meant))) > 2 * MOST[1]
    step = driver(folder, "two_gather_one_reduce", 8)
    assert np.median(errors(step, step.params, by_definition(folder, meant, BOUND))) < MOST[8]
