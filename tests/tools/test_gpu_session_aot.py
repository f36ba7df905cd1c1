"""What a GPU session compiles, compiled for a GPU that is not there: one layer at full width, and a kernel of each
kind. `python -m tools.gpu_session.aot` compiles all of it."""

from __future__ import annotations

import itertools

import pytest

from kernels_pallas.tuning import tuned_gpu
from nanoflow_jax.cost.footprint import weight_bytes
from nanoflow_jax.engine.memory import page_bytes
from nanoflow_jax.engine.setup import _slot_bytes
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.inspect.gpu_target import gpu_mesh
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.params import rank_infos
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.step.attention import why_not_mosaic
from nanoflow_jax.step.slots import BIAS_ROWS, SlotSizes
from tools.gpu_session import aot as session_aot
from tools.gpu_session.aot import GPUS, programs, run_options
from tools.gpu_session.parts import Part, call_a, good, of_experts, whole_fp8

PARTS: dict[str, Part] = {part.name: part for part in [*call_a(), *good("h100"), whole_fp8("h100"), *of_experts()]}
STEPS = ("tokens.tiny", "8b.8-layers", "fp8.whole", "70b.nanoflow_70b", "70b.sequential")


def test_every_part_that_compiles_is_listed() -> None:
    """Each with the programs of its process; one shape of a step."""
    found = {name: [title for title, _ in programs(part)] for name, part in PARTS.items()}
    assert {name for name, titles in found.items() if not titles} == {"machine", "torch"}
    assert found["8b.whole"] == ["llama-3.1-8b, 32 layers, sequential, mosaic, 1280 + 768 rows"]
    assert [title.split(", ")[-2] for title in found["tokens.8b"]] == ["xla", "Logprobs", "mosaic", "Logprobs"]
    assert (
        found["experts.kernels"][0] == "grouped_gemm/qwen3-235b-up-1152, timed" and len(found["experts.kernels"]) == 8
    )
    assert len(found["check.decode"]) == 18  # two models: the definition, and eight ways
    # The run's step is the one that the check of its tokens has compiled: the same program, from the cache.
    assert found["8b.8-layers"][0].partition(", ")[2] == found["tokens.8b"][2].partition(", ")[2]


@pytest.mark.aot
@pytest.mark.parametrize("name", STEPS)
def test_its_steps_compile(name: str) -> None:
    hardware = load_hardware("h100_sxm")
    for title, build in programs(PARTS[name], layers=1):
        compiled = build(gpu_mesh(hardware, 1), hardware).program
        assert ("mosaic" in compiled.as_text()) == (", mosaic, " in title)
        assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * hardware.memory_bytes
        assert compiled.as_text().count("__cublas$lt$matmul$f8") == (4 if name == "fp8.whole" else 0)


@pytest.mark.aot
@pytest.mark.parametrize("name", ["check.decode", "check.prefill", "check.append-fp8", "kernels.append-70b-2048"])
def test_its_kernels_compile(name: str) -> None:
    """With few SMs; a timed program of many calls."""
    hardware = load_hardware("h200")
    title, build = next(found for found in programs(PARTS[name]) if "XLA" not in found[0])
    assert title in ("8/1x128, sm_budget 2", "timed")
    assert "mosaic_gpu" in build(gpu_mesh(hardware, 1), hardware).program.as_text()


@pytest.mark.parametrize(("gpu", "name"), list(itertools.product(GPUS, ["8b.8-layers", "8b.whole", *STEPS[2:]])))
def test_its_runs_fit(gpu: str, name: str) -> None:
    """Weights, slots and the pages that are asked for: within four fifths of the GPU, beyond which XLA's scheduler has
    no memory to plan with."""
    hardware = load_hardware(gpu)
    tuned = tuned_gpu(hardware.device_name)
    part = {part.name: part for part in [*call_a(), *good(tuned), whole_fp8(tuned)]}[name]
    options, plan_name = run_options(part)
    config, plan, devices = options.config, load_plan(plan_name), options.rank_of or 1
    assert why_not_mosaic(config, hardware.capability, options.page_size) is None
    infos = param_infos(config, devices, plan.layouts(config, devices))
    limit = options.workload.limit(config.max_position_embeddings)
    slots = SlotSizes(
        options.decode_slots or options.tokens_per_step * 5 // 8, BIAS_ROWS, -(-limit // options.page_size)
    )
    assert options.kv_cache_tokens is not None and options.kv_cache_tokens % options.page_size == 0
    pages = options.kv_cache_tokens // options.page_size
    needed = (
        weight_bytes(rank_infos(infos, devices) if options.rank_of else infos, 1)
        + pages * page_bytes(config, devices, options.page_size)
        + _slot_bytes(config, devices, slots)
    )
    assert needed < 0.79 * hardware.memory_bytes
    # And enough for as many requests as the rows of a step are for, or most of the GPU.
    assert pages * options.page_size >= 683 * limit or needed > 0.7 * hardware.memory_bytes


def test_the_command_says_what_takes_how_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And fails where a part would not be done within its limit."""

    def fake(part: Part, layers: int | None = None) -> session_aot.Named:
        yield "a", lambda *_: session_aot.Compiled(None, 1.0, 8.0)
        yield "b", lambda *_: session_aot.Compiled(None, 0.5, 9.0)

    monkeypatch.setattr(session_aot, "programs", fake)
    monkeypatch.setattr(session_aot, "gpu_mesh", lambda *_: None)
    assert session_aot.main(["--gpu", "h200", "--only", "kernels.decode-70b-1280x1k"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "h200 kernels.decode-70b-1280x1k: a: lowered 1.0 s, compiled 8.0 s"
    assert lines[-1] == "h200 kernels.decode-70b-1280x1k: 18.5 s of its 16 s"
    assert session_aot.main(["--gpu", "h200", "--only", "kernels.prefill-70b-8k"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h300"], "--gpu: hardware: unknown name 'h300'; accepted: a100_sxm_80"),
        (["--only", "nope"], "--only: 'nope' is no part; accepted: machine, "),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        session_aot.main(arguments)
    assert message in capsys.readouterr().err
