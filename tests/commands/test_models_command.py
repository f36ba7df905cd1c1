"""`nanoflow models` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from nanoflow_jax.cli import main
from nanoflow_jax.config import EMBEDDED, Layouts, configs_root
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.params import random_params
from nanoflow_jax.models.registry import FAMILIES, model_config
from nanoflow_jax.step.slots import cache_shape
from tests.test_published_configs import QWEN3


def models(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["models", *arguments]) == 0
    out, err = capsys.readouterr()
    assert not err
    return out


def needs(capsys: pytest.CaptureFixture[str], model: str) -> dict[tuple[int, str | None], dict[str, Any]]:
    data = json.loads(models(capsys, model, "--json"))
    return {(share["devices"], share["quantization"]): share for share in data["shares"]}


def test_all_families(capsys: pytest.CaptureFixture[str]) -> None:
    """Each with its architectures, and in words that its own file says."""
    out = models(capsys)
    listed = json.loads(models(capsys, "--json"))
    assert [f["family"] for f in listed] == list(FAMILIES)
    for family in listed:
        assert family["about"] and family["about"] in out
        assert all(name in out for name in family["architectures"])
    assert "llama_3_1_70b" in out


def test_bytes_are_those_of_the_arrays(capsys: pytest.CaptureFixture[str]) -> None:
    """Of `tiny` on two devices: what one of them holds when the weights are there, and its pages of one token."""
    share = needs(capsys, "tiny")[2, None]
    config = model_config("tiny")[1]
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    params = random_params(param_infos(config, 2, Layouts(o_by_output=False)), mesh)
    shards = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params)]
    assert share["weight_bytes"] == sum(shards)
    page = 2 * np.prod(cache_shape(config, 2, 1, 1)) * 4 / 2
    assert share["kv_bytes"] == {"auto": page, "fp8": page / 4}


def test_a_model_by_name_folder_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """70B: one H200 holds it in fp8 only; an A100 never does; the plan is the one that `auto` takes."""
    path = configs_root() / "models" / "llama_3_1_70b.json"
    (tmp_path / "config.json").write_text(path.read_text())
    found = needs(capsys, "llama-3.1-70b")
    assert found == needs(capsys, str(path)) == needs(capsys, str(tmp_path))
    assert set(found) == {(n, q) for n in (1, 2, 4, 8) for q in (None, "fp8")}
    assert found[1, None]["fits"]["h200"]["refused"] == "the weights do not fit"
    one = found[1, "fp8"]["fits"]["h200"]
    assert one["plan"] == "auto_llama_3_1_70b_1xh200_fp8" and one["refused"] is None
    assert one["kv_tokens"]["auto"] > one["max_model_len"] == 131072
    few = found[2, None]["fits"]["h100_sxm"]
    assert few["max_model_len"] == few["kv_tokens"]["auto"] < 131072
    assert "fp8 tensor cores" in found[8, "fp8"]["fits"]["a100_sxm_80"]["refused"]
    assert found[1, None]["weight_bytes"] == pytest.approx(2 * 70.55e9, rel=1e-3)
    assert found[8, None]["weight_bytes"] * 8 == pytest.approx(2 * 70.55e9, rel=1e-3)
    assert found[1, None]["kv_bytes"] == {"auto": 327680.0, "fp8": 163840.0}
    out = models(capsys, "llama-3.1-70b")
    assert "mesh sizes that work: 1, 2, 4, 8, 16, 32, 64" in out and "131,072 tokens" in out
    assert "auto_llama_3_1_70b_1xh200_fp8: 1 x h200 fp8" in out
    assert [line.split()[:3] for line in out.splitlines() if line.startswith("1 ")][1] == ["1", "fp8", "67.69"]


def test_kv_heads_are_replicated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two KV heads on four GPUs: each holds one, as on two."""
    sizes = {"hidden_size": 2048, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 4}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**QWEN3, **sizes, "num_key_value_heads": 2}))
    found = needs(capsys, str(path))
    assert found[4, None]["kv_bytes"] == found[2, None]["kv_bytes"] == {"auto": 2048.0, "fp8": 1024.0}
    assert found[1, None]["kv_bytes"]["auto"] == 4096


def test_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = json.loads((EMBEDDED["tiny"] / "config.json").read_text())
    for more, words in (
        ({"architectures": ["Gemma2ForCausalLM"]}, "architectures: ['Gemma2ForCausalLM'] is not supported"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 must divide"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(fields | more))
        assert main(["models", str(tmp_path)]) == 1
        out, err = capsys.readouterr()
        assert not out and words in err and err.count("\n") == 1
    assert main(["models", "llama-9"]) == 1
    assert "unknown name 'llama_9'" in capsys.readouterr().err
