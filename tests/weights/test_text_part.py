"""Checkpoints of a text model with a vision tower beside it."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.registry import read_config
from nanoflow_jax.parallel.mesh import make_mesh
from nanoflow_jax.weights.load import load_params
from nanoflow_jax.weights.source import WeightsError
from tests.reference.checkpoints import write_checkpoint

NAMES = {"4": ("language_model.model.", "language_model.lm_head."), "5": ("model.language_model.", "lm_head.")}


def with_vision(folder: Path, style: str, **more: np.ndarray) -> Path:
    """Makes one of a text model's checkpoint, as transformers of version `style` writes it."""
    (file,) = folder.glob("*.safetensors")
    layers, head = NAMES[style]
    tensors = {
        name.replace("model.", layers, 1) if name.startswith("model.") else name.replace("lm_head.", head): value
        for name, value in load_file(file).items()
    }
    tower = {f"{'model.' * (style == '5')}{name}.weight": np.ones(3, np.float32)
             for name in ("vision_tower.encoder.layers.0.q_proj", "multi_modal_projector.norm")}  # fmt: skip
    save_file({**tensors, **tower, **more}, file)
    path = folder / "config.json"
    text = json.loads(path.read_text())
    beside = {name: text.pop(name) for name in ("eos_token_id", "torch_dtype") if name in text}
    text.pop("architectures")
    path.write_text(
        json.dumps(
            {
                "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text,
                "vision_config": {}, **beside,
            }
        )
    )  # fmt: skip
    return folder


def params_of(folder: Path) -> list[np.ndarray]:
    config = read_config(folder / "config.json")
    return [
        np.asarray(x)
        for x in jax.tree.leaves(load_params(folder, config, make_mesh(config, 1), param_infos(config, 1)))
    ]


@pytest.mark.parametrize(("case", "style"), [("gemma3", "4"), ("gemma3_new_rope", "4"), ("gemma3_new_rope", "5")])
def test_the_text_model_is_found(case: str, style: str, tmp_path: Path) -> None:
    """The same config and the same weights, head included."""
    plain = write_checkpoint(case, tmp_path / "plain")
    wrapped = with_vision(write_checkpoint(case, tmp_path / "wrapped"), style)
    assert read_config(wrapped / "config.json") == read_config(plain / "config.json")
    for one, other in zip(params_of(plain), params_of(wrapped), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_tensor_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    folder = with_vision(write_checkpoint("gemma3", tmp_path), "4", audio_tower=np.ones(2, np.float32))
    with pytest.raises(WeightsError, match="unknown audio_tower"):
        params_of(folder)
