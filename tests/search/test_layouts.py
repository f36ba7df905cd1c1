"""Ways to use a node: the figures are the simulator's, what does not fit is never first; the hint that an LLM logs."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from nanoflow_jax import LLM, api
from nanoflow_jax.cli import main
from nanoflow_jax.config import ConfigError
from nanoflow_jax.cost.demand import Demand
from nanoflow_jax.cost.latency import RooflineModel
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.models.registry import model_config, parse_config
from nanoflow_jax.search import layouts as module
from nanoflow_jax.search.layouts import Layout, faster_layout, layouts
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.workload import load_workload
from tests.test_published_configs import QWEN2

LLAMA = model_config("llama_3_1_70b")[1]
SMALL = model_config("llama_3_1_8b")[1]
H200, H100, A100 = (RooflineModel(load_hardware(name)) for name in ("h200", "h100_sxm", "a100_sxm_80"))
DEMAND = Demand.of(load_workload("constant:1024:512"), 131072)


@pytest.fixture(scope="module")
def on_h200() -> list[Layout]:
    return layouts("70b", LLAMA, H200, 8, DEMAND)


def fake(kind: str, platform: str = "gpu") -> Any:
    return SimpleNamespace(platform=platform, device_kind=kind)


def test_every_way_is_there_once(on_h200: list[Layout]) -> None:
    """Weights, pages and sizes of the mesh; each that can run with every plan, the fastest first."""
    kinds = {(at.quantization, at.kv_cache_dtype, at.devices, at.replicas) for at in on_h200}
    assert kinds == {(q, kv, n, 8 // n) for q in (None, "fp8") for kv in ("auto", "fp8") for n in (1, 2, 4, 8)}
    assert len({(at.quantization, at.kv_cache_dtype, at.devices, at.plan) for at in on_h200}) == len(on_h200)
    rates = [at.tokens_per_second for at in on_h200]
    assert rates == sorted(rates, reverse=True)
    eight = {at.plan for at in on_h200 if at.devices == 8 and at.quantization == "fp8"}
    assert eight == {"auto_llama_3_1_70b_8xh200_fp8", "sequential", "two_all_reduce", "two_gather_one_reduce"}
    assert {at.plan for at in on_h200 if at.auto and at.devices == 1 and at.quantization == "fp8"} == {
        "auto_llama_3_1_70b_1xh200_fp8"
    }


def test_what_does_not_fit_is_last_with_the_reason(on_h200: list[Layout]) -> None:
    """70B in bfloat16 on one GPU. On an H100 it leaves 8,000 tokens of KV in fp8: a request of 16,000 is refused."""
    refused = [at for at in on_h200 if at.refused]
    assert on_h200[-len(refused) :] == refused and not on_h200[0].refused
    assert {(at.quantization, at.devices, at.refused) for at in refused} == {(None, 1, "the weights do not fit")}
    assert all(at.tokens_per_second == at.tokens_per_step == 0 for at in refused)
    long = Demand.of(load_workload("constant:16000:512"), 131072)
    found = {(at.quantization, at.kv_cache_dtype, at.devices): at for at in layouts("70b", LLAMA, H100, 8, long)}
    assert found["fp8", "auto", 1].refused == "KV has room for 8,214 tokens, a request has 16,511"
    assert found["fp8", "auto", 2].refused is None


def test_little_kv_means_few_decode_rows(on_h200: list[Layout]) -> None:
    """What LLM would have to be given: never more requests than the KV holds, and fp8 pages hold twice as many."""
    held = DEMAND.decode_context + 32
    for at in on_h200:
        if not at.refused:
            assert at.decode_slots * held <= at.kv_tokens
            assert at.decode_slots < at.tokens_per_step <= 2048
    one = {at.kv_cache_dtype: at for at in on_h200 if at.devices == 1 and at.quantization == "fp8" and at.auto}
    assert one["fp8"].kv_tokens == pytest.approx(2 * one["auto"].kv_tokens, rel=1e-4)
    assert one["auto"].decode_slots == 144 and one["fp8"].decode_slots == 288
    assert max(at.decode_slots for at in on_h200) == 680
    four = [at for at in on_h200 if (at.devices, at.quantization, at.plan) == (4, "fp8", "sequential")]
    (small, large) = sorted(four, key=lambda at: at.step_ms)
    assert (small.kv_cache_dtype, large.kv_cache_dtype) == ("fp8", "auto"), "the same rows read half the bytes"
    assert small.decode_slots == large.decode_slots and small.step_ms < 0.95 * large.step_ms


@pytest.mark.parametrize(
    ("quantization", "pages", "devices", "plan"),
    [
        ("fp8", "fp8", 1, "auto_llama_3_1_70b_1xh200_fp8"),
        ("fp8", "auto", 2, "sequential"),
        (None, "fp8", 4, "two_all_reduce"),
        (None, "auto", 8, "auto_llama_3_1_70b_8xh200_d768"),
    ],
)
def test_figures_are_those_of_simulate(
    quantization: str | None, pages: str, devices: int, plan: str, on_h200: list[Layout],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    weights = ["--quantization", quantization] if quantization else []
    asked = ["--gpu", "h200", "--devices", str(devices), "--plan", plan, "--kv-cache-dtype", pages, *weights]
    assert main(["simulate", *asked, "--tokens-per-step", "2048", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (at,) = [
        at
        for at in on_h200
        if (at.quantization, at.kv_cache_dtype, at.devices, at.plan) == (quantization, pages, devices, plan)
    ]
    assert told["tokens_per_second_per_gpu"] == at.tokens_per_second_per_gpu == at.tokens_per_second / 8
    assert told["latency_per_token_ms"] == at.step_ms
    assert told["kv_tokens"]["capacity"] == at.kv_tokens
    assert (told["tokens_per_step"], told["decode_slots"]) == (at.tokens_per_step, at.decode_slots)
    assert (told["quantization"], told["kv_cache_dtype"]) == (quantization, pages)


def test_a_mesh_that_cannot_be_is_refused() -> None:
    """28 heads with 4 KV heads cannot be split in 8; a node of an H200 has no 16 GPUs; an A100 has no fp8."""
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28}
    qwen = parse_config({**QWEN2, **sizes, "num_key_value_heads": 4})
    found = layouts("7b", qwen, H200, 8, DEMAND)
    eight = [at for at in found if at.devices == 8]
    assert eight and all("cannot be split over 8 GPUs (sizes that work: 1, 2, 4)" in str(at.refused) for at in eight)
    assert not found[0].refused and found[0].devices < 8
    with pytest.raises(ConfigError, match="gpus: 16 is not accepted; a node of h200 has 1 to 8"):
        layouts("70b", LLAMA, H200, 16, DEMAND)
    for at in layouts("70b", LLAMA, A100, 8, DEMAND):
        if at.quantization == "fp8":
            assert at.refused == "the GPU has no fp8 tensor cores"
    with pytest.raises(ConfigError, match="tokens_per_step: 8 is not accepted"):
        layouts("70b", LLAMA, H200, 8, DEMAND, tokens_per_step=8)
    fixed = layouts("70b", replace(LLAMA, quantization="fp8"), H200, 2, DEMAND)
    assert {at.quantization for at in fixed} == {"fp8"}, "a checkpoint in fp8 stays so"


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["layouts", "--gpu", "h200", "--gpus", "2", "--plans", "auto", "sequential"]
    assert main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 x h200: predicted" in lines[0]
    assert lines[2].split()[:4] == ["2", "1", "fp8", "fp8"] and lines[2].endswith("1.00")
    assert len([line for line in lines if line[:1].isdigit()]) == 6
    assert "not 2 x 1 bfloat16, 2 x 1 bfloat16 with fp8 pages: the weights do not fit" in lines
    assert main([*asked, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["predicted"] and {at["plan"] for at in data["layouts"]} >= {
        "sequential",
        "auto_llama_3_1_70b_8xh200_fp8",
    }
    assert main([*asked, "--all"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > len(lines)
    for wrong, words in (
        (["--gpus", "16"], "gpus: 16"),
        (["--gpu", "a100_sxm_80", "--gpus", "1"], "in no layout: not 1 x 1 bfloat16"),
        (["--plans", "nothing"], "unknown name 'nothing'"),
    ):
        assert main(["layouts", *wrong]) == 1
        out, err = capsys.readouterr()
        assert not out and words in err and err.count("\n") == 1


# -- the hint


def test_a_hint_names_what_to_give() -> None:
    hint = faster_layout("llama-3.1-70b", LLAMA, fake("NVIDIA H200"), 8)
    assert hint is not None and "\n" not in hint
    assert hint.startswith(
        "8 replicas with data_parallel_size=8, tensor_parallel_size=1, quantization='fp8', tokens_per_step=432, "
        "decode_slots=144 are "
    )
    assert "2.5 times as fast" in hint
    assert "nanoflow layouts --model llama-3.1-70b --gpu h200 --gpus 8" in hint
    assert "kv_cache_dtype" not in hint
    own = faster_layout("m", replace(LLAMA, quantization="fp8"), fake("NVIDIA H100 80GB HBM3"), 8)
    assert own is not None and own.startswith(
        "4 replicas with data_parallel_size=4, tensor_parallel_size=2, tokens_per_step="
    )


@pytest.mark.parametrize(
    ("config", "device", "gpus", "why"),
    [
        (LLAMA, fake("cpu", "cpu"), 8, "a CPU"),
        (LLAMA, fake("NVIDIA GeForce RTX 4090"), 8, "no file names it"),
        (LLAMA, fake("NVIDIA A100-SXM4-80GB"), 8, "nothing is 20 % faster"),
        (LLAMA, fake("NVIDIA H200"), 1, "one GPU"),
        (LLAMA, fake("NVIDIA H200"), 16, "several nodes"),
        (replace(LLAMA, num_layers=160), fake("NVIDIA H200"), 2, "the weights do not fit, which the LLM will say"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_hint(config: Any, device: Any, gpus: int, why: str) -> None:
    assert faster_layout("m", config, device, gpus) is None, why


def test_a_hint_is_about_clear_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """8B on eight A100: eight replicas are 1.4 times as fast."""
    a100 = fake("NVIDIA A100-SXM4-80GB")
    assert "1.4 times as fast" in str(faster_layout("m", SMALL, a100, 8))
    monkeypatch.setattr(module, "CLEARLY", 1.8)
    assert faster_layout("m", SMALL, a100, 8) is None


def test_an_llm_logs_it_once_on_gpus_alone(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU never asks. With a GPU in its place, the answer is one line; a plan of the user's own, or `deterministic`,
    asks for none."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, "faster_layout", lambda *a: (asked.append(a), "8 replicas are faster")[1])
    scheduler = SimpleNamespace(shapes=[StepShape(8, 8, 1, 4)])
    engine = SimpleNamespace(max_model_len=64, scheduler=scheduler, grammars=SimpleNamespace())
    monkeypatch.setattr(api, "build_engine", lambda *_: engine)
    LLM("tiny", tensor_parallel_size=2)
    assert not asked and "replicas" not in caplog.text

    class Mesh:
        size, devices = 2, SimpleNamespace(flat=[fake("NVIDIA H200")])

    monkeypatch.setattr(api, "make_mesh", lambda *_: Mesh())
    LLM("tiny", tensor_parallel_size=2, kv_cache_dtype="fp8", quantization="fp8")
    (model, config, device, gpus, pages), *others = asked
    assert not others and (gpus, pages, config.quantization, device.platform) == (2, "fp8", "fp8", "gpu")
    assert model_config(model)[1] == replace(config, quantization=None)
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warned == ["layout: 8 replicas are faster"]
    LLM("tiny", tensor_parallel_size=2, plan="sequential")
    LLM("tiny", tensor_parallel_size=2, deterministic=True)
    assert len(asked) == 1
