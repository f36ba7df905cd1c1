"""Which attention backend is taken, and that Mosaic kernels are checked before an engine uses them on a GPU."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import decode_attention_mosaic
from kernels_pallas.gate import Gate
from kernels_pallas.self_check import KernelError
from kernels_pallas.self_check_cases import Heads
from kernels_pallas.tuning import DECODE
from nanoflow_jax import LLM
from nanoflow_jax.config import ConfigError, ModelConfig
from nanoflow_jax.engine import kernel_check, setup
from nanoflow_jax.engine.kernel_check import check_mosaic_kernels
from nanoflow_jax.models.registry import model_config, parse_config, read_config
from nanoflow_jax.step.attention import KernelBackends, choose_backend, gated_in_one
from nanoflow_jax.weights.hub import resolve_model
from tests.reference.checkpoints import CASES

FIELDS = {**CASES["bare_config"].config, "head_dim": 64, "torch_dtype": "bfloat16"}
CONFIG = parse_config(FIELDS)
LLAMA = read_config(resolve_model("tiny") / "config.json")
HEADS = Heads(q_heads=2, kv_heads=1, head_dim=64)
XLA = KernelBackends("xla", "xla", "xla", "xla")
MOSAIC = KernelBackends("mosaic", "mosaic", "mosaic", "mosaic")


@dataclass(frozen=True)
class FakeDevice:
    compute_capability: str = "9.0"
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def nothing_checked_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_check._checked.cache_clear()
    monkeypatch.setattr(kernel_check.jax, "default_device", nullcontext)


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        (FakeDevice("9.0"), "mosaic"),
        (FakeDevice("8.0"), "xla"),
        (FakeDevice("10.0"), "xla"),
        (FakeDevice("", "cpu", "cpu"), "xla"),
    ],
)
def test_auto(device: FakeDevice, backend: str) -> None:
    assert choose_backend("auto", CONFIG, setup.capability(device), 64) == backend
    assert choose_backend("xla", CONFIG, setup.capability(device), 64) == "xla"
    if backend == "xla":
        with pytest.raises(ConfigError, match="attention_backend: 'mosaic' cannot be used: it needs a Hopper GPU"):
            choose_backend("mosaic", CONFIG, setup.capability(device), 64)


@pytest.mark.parametrize(
    ("config", "page_size"),
    [
        (replace(CONFIG, dtype="float32"), 64),
        (CONFIG, 32),
        (parse_config({**FIELDS, "head_dim": 32}), 64),
        (parse_config({**FIELDS, "num_attention_heads": 32, "num_key_value_heads": 1}), 64),
    ],
)
def test_auto_leaves_what_mosaic_cannot_do_to_xla(config: ModelConfig, page_size: int) -> None:
    assert choose_backend("auto", config, (9, 0), page_size) == "xla"


WIDE = replace(CONFIG, head_dim=128, hidden_size=2048)


@pytest.mark.parametrize(
    ("pages", "config", "devices", "expected"),
    [
        ("bfloat16", WIDE, 2, MOSAIC),
        ("float8_e4m3fn", WIDE, 2, KernelBackends("mosaic", "xla", "mosaic", "mosaic")),  # no prefill over fp8 pages
        ("float8_e4m3fn", replace(WIDE, head_dim=64), 2, KernelBackends("mosaic", "xla", "xla", "mosaic")),
        ("bfloat16", replace(WIDE, hidden_size=1920), 2, KernelBackends("mosaic", "mosaic", "mosaic", "xla")),
        ("bfloat16", replace(WIDE, hidden_size=32768), 2, KernelBackends("mosaic", "mosaic", "mosaic", "xla")),
    ],
)
def test_each_kernel_has_its_own_backend(
    pages: str, config: ModelConfig, devices: int, expected: KernelBackends
) -> None:
    """Rows too narrow for a bulk copy, and columns of a device that do not fill a warp's reads, are XLA's."""
    config = replace(config, num_kv_heads=devices)
    assert KernelBackends.of("mosaic", pages, config, devices) == expected
    assert KernelBackends.of("xla", pages, config, devices) == XLA


def test_rows_to_fp8_are_those_of_fp8_weights() -> None:
    """A kernel's, where all that is multiplied with them fills a warp's reads on a device."""
    config = replace(WIDE, quantization="fp8", num_kv_heads=2, intermediate_size=4096)
    assert KernelBackends.of("mosaic", "bfloat16", config, 2).rows == "mosaic"
    assert KernelBackends.of("mosaic", "bfloat16", replace(config, intermediate_size=3840), 4).rows == "xla"
    assert KernelBackends.of("mosaic", "bfloat16", replace(config, quantization=None), 2).rows is None
    plain = config.layers[0].mlp
    assert gated_in_one(config, plain) and not gated_in_one(replace(config, residual_multiplier=0.2), plain)
    assert not gated_in_one(config, replace(plain, bias=True))
    assert not gated_in_one(config, replace(plain, activation="gelu_tanh"))


def test_what_the_kernels_are_told() -> None:
    assert KernelBackends("mosaic", "xla", "xla", "mosaic").text() == "mosaic (prefill xla, append xla)"
    options = MOSAIC.options("h100", 700)
    assert options.decode == {"backend": "mosaic", "tuning": DECODE["h100"], "expected_context": 700}
    assert options.prefill["expected_context"] == 700
    assert set(options.append) == set(options.norm) == {"backend", "tuning"}
    assert XLA.options("h100", 700) == ({"backend": "xla"},) * 6


def record(monkeypatch: pytest.MonkeyPatch, wrong: str = "") -> list[str]:
    """Stands in for the kernels: those called, of which one may be wrong."""
    called: list[str] = []

    def check(kernel: str, heads: Heads, *, tuning: Any, interpret: Any) -> float:
        called.append(kernel)
        if kernel == wrong:
            raise KernelError(f"{kernel}: a row is off by 1.4 of its norm from the XLA path, over 0.02")
        return 1e-3

    monkeypatch.setattr(kernel_check, "check_kernel", check)
    return called


def test_only_what_is_used_is_checked_and_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nanoflow_jax")
    called = record(monkeypatch)
    for _ in range(2):
        check_mosaic_kernels(MOSAIC, HEADS, FakeDevice())
    assert called == ["decode_attention", "prefill_attention", "append_kv", "add_rms_norm"]
    some = KernelBackends("mosaic", "xla", "mosaic", "xla", rows="mosaic")
    check_mosaic_kernels(some, replace(HEADS, fp8=True), FakeDevice())
    assert called[4:] == ["decode_attention", "append_kv", "rows_to_fp8"]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert lines[0].startswith("Mosaic kernels checked against the XLA path in ")
    assert "decode_attention 1.0e-03, prefill_attention 1.0e-03, append_kv 1.0e-03" in lines[0]


def test_a_wrong_kernel_is_an_error_that_says_what_to_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    record(monkeypatch, wrong="prefill_attention")
    for _ in range(2):  # a second engine of the process is refused too
        with pytest.raises(ConfigError) as caught:
            check_mosaic_kernels(MOSAIC, HEADS, FakeDevice())
        assert str(caught.value) == (
            "attention_backend: the Mosaic kernels are not used: prefill_attention: a row is off by 1.4 of its norm "
            "from the XLA path, over 0.02 (NVIDIA H100 80GB HBM3, 2 query and 1 KV heads of 64); "
            'accepted: attention_backend="xla"'
        )


def test_k_for_v_in_the_kernel_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Mosaic kernel under the interpreter, given K where V should be."""
    real = decode_attention_mosaic.decode_attention_mosaic

    def twin(q: Any, k: Any, v: Any, *rest: Any, **more: Any) -> Any:
        return real(q, k, k, *rest, **more)

    monkeypatch.setattr(decode_attention_mosaic, "decode_attention_mosaic", twin)
    only_decode = KernelBackends("mosaic", "xla", "xla", "xla")
    with pytest.raises(ConfigError, match=r"decode_attention: a row is off by .*; accepted: attention_backend=\"xla\""):
        check_mosaic_kernels(only_decode, HEADS, FakeDevice(), plgpu.InterpretGPUParams())


def test_an_engine_checks_before_it_loads_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what the check raises is what the user sees."""
    seen: list[tuple[Any, ...]] = []

    def refuse(*what: Any) -> None:
        seen.append(what)
        raise ConfigError("attention_backend: the Mosaic kernels are not used: a test")

    monkeypatch.setattr(setup, "choose_backend", lambda *_: "mosaic")
    monkeypatch.setattr(setup, "check_mosaic_kernels", refuse)
    monkeypatch.setattr(setup, "load_params", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match=r"^attention_backend: the Mosaic kernels are not used: a test$"):
        LLM("tiny", tensor_parallel_size=2, kv_cache_dtype="fp8", progress=False)
    ((backends, heads, device),) = seen
    assert backends.prefill == "xla"
    assert heads.fp8
    assert heads.q_heads * 2 == LLAMA.num_heads
    assert device.platform == "cpu"


@pytest.mark.parametrize(
    ("model", "whole", "experts"),
    [("mixtral-8x7b", True, "mosaic"), ("mixtral-8x7b", False, "mosaic"), ("gpt-oss-120b", True, "mosaic"),
     ("gpt-oss-120b", False, "xla"), ("llama-3.1-8b", False, None)],
)  # fmt: skip
def test_kernels_of_experts(model: str, whole: bool, experts: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an expert, or an eighth of it, has whole tiles; checked like the others, and named where it is another
    backend than attention's."""
    backends = KernelBackends.of("mosaic", jnp.bfloat16, model_config(model)[1], 8, whole)
    assert backends.experts == experts
    assert ("experts xla" in backends.text()) == (experts == "xla")
    assert backends.options("h200", 700).experts["backend"] == (experts or "xla")
    called = record(monkeypatch)
    check_mosaic_kernels(backends, replace(HEADS, head_dim=64, gate=Gate()), FakeDevice())
    assert ("grouped_gemm" in called) == (experts == "mosaic")
